"""KV heads: whether a target's attention makes as many as vLLM keeps.

One rule: where the two differ, nothing is drafted. vLLM's Transformers backend takes
the number from config.json, and the model's own code need not read the key at all:
GPT-NeoX's has one KV head for every query head, whatever `num_key_value_heads` a
converted checkpoint carries. vLLM then takes the K of three heads for the K of three
tokens, and its kernel reads three slots for each one there is. In plain vLLM the slots
beyond are those of other requests and of steps before, so its text changes with the
batch, with a prompt's chunks and with any speculative method; there is none to be
identical to. A draft's slots end where its rows do, and the kernel would write to
whatever address comes after them.
"""

from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention

from vllm_selfspec.plan.families import UnsupportedModelError


def raise_if_misread(target: nn.Module, vllm_config: Any) -> None:
    """Refuses a target whose attention makes more or fewer KV heads than vLLM keeps.

    vLLM's own models make both from one number; only its Transformers backend has two.
    By Hugging Face's convention a module with fewer KV heads than query heads says in
    `num_key_value_groups` how many of these share one.

    Raises:
        UnsupportedModelError: With the number that config.json must say.
    """
    if not vllm_config.model_config.using_transformers_backend():
        return
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    for module in target.modules():
        for attention in module.children():
            if not isinstance(attention, Attention):
                continue
            group = getattr(module, "num_key_value_groups", 1)
            # A rank has one at least, as in vLLM's `get_num_kv_heads`.
            if attention.num_kv_heads == max(1, attention.num_heads // group):
                continue
            made = attention.num_heads * num_ranks // group
            kept = vllm_config.model_config.get_total_num_kv_heads()
            raise UnsupportedModelError(
                "selfspec: vLLM must keep as many KV heads as the model's attention "
                f"makes, but {type(module).__name__} makes {made} and its config.json "
                f"says {kept}, with which plain vLLM's text is wrong, too, and changes "
                "with the batch: serve it, with selfspec or without, with "
                f"--hf-overrides '{{\"num_key_value_heads\": {made}}}'"
            )
