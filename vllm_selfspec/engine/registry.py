"""vLLM's registry of speculative methods, where it has one.

One rule: what can be said there is said there, and needs no seam. `patches/` holds the
registry as a diff for vLLM; no release has it yet.
"""

import importlib.util
from pathlib import Path
from typing import Any

REGISTRY_FILE = Path("v1", "spec_decode", "registry.py")


def exists() -> bool:
    """Whether the installed vLLM has a registry; looks at files, imports nothing."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        return False
    return (Path(vllm.origin).parent / REGISTRY_FILE).exists()


def register() -> None:
    """Makes `method="selfspec"` known to vLLM. Again is idle."""
    from vllm.v1.spec_decode.registry import (
        RegisteredMethod,
        register_speculative_method,
    )

    register_speculative_method(
        RegisteredMethod(
            name="selfspec",
            configure=_configure,
            proposer="vllm_selfspec.draft.v1_proposer:SelfSpecProposer",
            speculator="vllm_selfspec.draft.v2_row_stops:make_speculator",
            writes_kv=True,
        )
    )


def _configure(
    engine_args: Any, model_config: Any, parallel_config: Any
) -> dict[str, Any]:
    from vllm_selfspec.engine import seams, vllm_args

    seams.raise_if_unusable()
    return vllm_args.configure(engine_args, model_config, parallel_config)
