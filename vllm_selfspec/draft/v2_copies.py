"""`DeviceCopies`: copies for the V2 model runner, matched on the device.

One rule: nothing waits for the device, so steps stay scheduled ahead of it. Who matched
is not known when the next step is scheduled; the scheduler goes by how often the copies
of each request were right so far, and plans their length as it does the model's.

The matcher is vLLM's own of `ngram_gpu`. A row without a match verifies tokens that are
hardly ever right, so where nothing repeats itself copies are soon left alone.
"""

import copy
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

from vllm_selfspec import served_config
from vllm_selfspec.draft.v2_speculator import SelfSpecSpeculator


class DeviceCopies(SelfSpecSpeculator):
    """`SelfSpecSpeculator` without a model's drafts, and vLLM's matcher in their place.

    Attributes:
        draft_logits: None: a copied token is proposed for certain.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.draft_logits = None
        self._matcher: NgramGPUSpeculator | None = None

    def use_request_states(self, states: Any) -> None:
        """The runner's, where the matcher reads all tokens of each request."""
        config = _for_matcher(self.vllm_config)
        self._matcher = NgramGPUSpeculator(config, self.device, states)

    @torch.inference_mode()
    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> Any:
        """What followed the last time that each request said the same: signature and
        result as of vLLM's own."""
        if not kwargs.get("num_speculative_tokens"):  # a dummy run, or a plain step
            return self.draft_tokens[: input_batch.num_reqs, 1:]
        assert self._matcher is not None
        return self._matcher.propose(input_batch, *args, **kwargs)


def _for_matcher(vllm_config: VllmConfig) -> VllmConfig:
    """The configuration as vLLM's matcher reads it."""
    options = served_config.sources_of(vllm_config)["context"]
    found, speculative_config = copy.copy(vllm_config), vllm_config.speculative_config
    found.speculative_config = copy.copy(speculative_config)
    assert found.speculative_config is not None
    found.speculative_config.prompt_lookup_min = options["prompt_lookup_min"]
    found.speculative_config.prompt_lookup_max = options["prompt_lookup_max"]
    return found
