"""The entry point that vLLM calls: `vllm.general_plugins`, name `selfspec`.

One rule: loading it costs nothing and changes nothing until selfspec is asked for. vLLM
calls it in every process, some more than once; each call after the first is idle.
"""

from vllm_selfspec.engine import registry, seams


def register() -> None:
    """Registers the method where vLLM has a registry of them, and installs the seams
    that are left. Imports neither torch nor any drafting code, nor vLLM without one."""
    if registry.exists():
        registry.register()
    seams.install()
