"""`DeviceCopies`: copies for the V2 model runner, matched on the device.

One rule: nothing waits for the device, so steps stay scheduled ahead of it. Who matched
is not known when the next step is scheduled; the scheduler goes by how often the copies
of each request were right so far, and plans their length as it does the model's. Which
of both a step drafts from it tells by the number of tokens that it asks for: more than
the model's longest draft are copies, and no draft step is run.

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
    """`SelfSpecSpeculator`, with vLLM's matcher beside the model or in its place.

    Attributes:
        draft_logits: None where the model does not draft: a copied token is proposed
            for certain.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        if not self._num_model_tokens:
            self.draft_logits = None
        self._matcher: NgramGPUSpeculator | None = None

    def use_request_states(self, states: Any) -> None:
        """The runner's, where the matcher reads all tokens of each request."""
        config = _for_matcher(self.vllm_config)
        self._matcher = NgramGPUSpeculator(config, self.device, states)

    @torch.inference_mode()
    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> Any:
        """The model's drafts, or what followed the last time that each request said the
        same: signature and result as of vLLM's own."""
        drafts = super().propose(input_batch, *args, **kwargs)
        num_drafts = kwargs.get("num_speculative_tokens")
        if num_drafts is None or num_drafts <= self._num_model_tokens:
            return drafts  # a dummy run, a plain step, or the model's turn
        assert self._matcher is not None
        copied = self._matcher.propose(input_batch, *args, **kwargs)
        if self.draft_logits is not None:
            self._propose_for_certain(copied, input_batch.idx_mapping)
        return copied

    def _begin(
        self, input_batch: InputBatch, num_sampled: torch.Tensor, num_drafts: int
    ) -> int:
        """No draft step where copies are asked for."""
        is_of_model = num_drafts <= self._num_model_tokens
        return num_drafts if is_of_model else 0

    def _propose_for_certain(
        self, token_ids: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Makes one-hot what these tokens, `[num_reqs, k]`, are taken to be drawn from,
        for the requests in `slots`, `[num_reqs]`."""
        assert self.draft_logits is not None
        self.draft_logits.index_fill_(0, slots, -torch.inf)
        at = torch.arange(token_ids.shape[1], device=token_ids.device)
        self.draft_logits[slots[:, None], at, token_ids] = 0.0


def _for_matcher(vllm_config: VllmConfig) -> VllmConfig:
    """The configuration as vLLM's matcher reads it."""
    options = served_config.sources_of(vllm_config)["context"]
    found, speculative_config = copy.copy(vllm_config), vllm_config.speculative_config
    found.speculative_config = copy.copy(speculative_config)
    assert found.speculative_config is not None
    found.speculative_config.prompt_lookup_min = options["prompt_lookup_min"]
    found.speculative_config.prompt_lookup_max = options["prompt_lookup_max"]
    return found
