"""Compiles a draft view as vLLM compiled the target, and apart from it.

One rule: vLLM's own compile wrapper does the work, with the target's settings. The view
is of the target's class and shares its modules, so it needs a wrapper of its own (that
of the target holds the target's code) and a compile cache of its own (vLLM's key knows
the class and the configuration, and both are the same).
"""

import copy

import torch
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from vllm_selfspec.draft.view import DraftView
from vllm_selfspec.served_config import DRAFT_PART

TAG = "selfspec_draft"  # of the view in vLLM's compile cache and log
WARM_UP_TOKENS = 2  # of one token, torch would take the batch size for a constant


@torch.inference_mode()
def compile_view(view: DraftView, vllm_config: VllmConfig) -> None:
    """Compiles the parts of the view that vLLM compiles in the target; now, so that no
    request waits for it. Idle where the target is not, or the view may not be.

    Args:
        view: A draft view whose target is loaded.
        vllm_config: The target's.
    """
    parts = [
        module
        for module in view.own_modules
        if isinstance(module, TorchCompileWithNoGuardsWrapper)
        and not module.do_not_compile
    ]
    if not parts or not view.may_compile:
        return
    draft_config = copy.copy(vllm_config)  # another key for the same settings
    draft_config.additional_config = {
        **vllm_config.additional_config,
        DRAFT_PART: "draft",
    }
    for part in parts:
        part.aot_compiled_fn = None
        part.was_aot_compile_fn_loaded_from_disk = False
        part._compile_tag = TAG
        with set_current_vllm_config(draft_config), set_model_tag(TAG):
            TorchCompileWithNoGuardsWrapper.__init__(part)
    view.is_compiled = True
    tokens = torch.zeros(
        WARM_UP_TOKENS, dtype=torch.int64, device=vllm_config.device_config.device
    )
    with set_forward_context(None, vllm_config, num_tokens=WARM_UP_TOKENS):
        view(tokens.int(), tokens)
