"""The entry point that vLLM calls: `vllm.general_plugins`, name `selfspec`.

One rule: loading it costs nothing and changes nothing until selfspec is asked for. vLLM
calls it in every process, some more than once; each call after the first is idle.
"""

from vllm_selfspec import seams


def register() -> None:
    """Installs the seams. Imports neither torch, nor vLLM, nor any drafting code."""
    seams.install()
