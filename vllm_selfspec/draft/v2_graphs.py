"""vLLM's CUDA graphs in the V2 runner: those of draft steps, and which one a
verification of any length takes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
)

from vllm_selfspec.served_config import num_model_tokens


class DraftGraphManager(SpeculatorCudaGraphManager):
    """vLLM's graphs for draft steps, with one for each number of drafts from 1."""

    _capture_descs: dict[CUDAGraphMode, list[BatchExecutionDescriptor]]

    def capture(
        self, *args: Any, specialize_spec_tokens: bool = False, **kwargs: Any
    ) -> None:
        # vLLM leaves out 1, for which its loop has nothing to capture.
        if specialize_spec_tokens:
            self._capture_descs = {
                mode: [
                    SpeculatorBatchDescriptor(**vars(desc), num_speculative_tokens=k)
                    for desc in descs
                    for k in self._draft_lengths()
                ]
                for mode, descs in self._capture_descs.items()
            }
        super().capture(*args, **kwargs)

    def _draft_lengths(self) -> list[int]:
        """Every number of the model's drafts that the schedule may ask for, the longest
        first."""
        config = self.vllm_config.speculative_config
        assert config is not None
        schedule = build_dynamic_sd_schedule_lookup(
            config.num_speculative_tokens_per_batch_size,
            vllm_max_batch_size=self.max_num_reqs,
            vllm_num_speculative_tokens=self.vllm_config.num_speculative_tokens,
        )
        longest = num_model_tokens(self.vllm_config)
        return sorted({k for k in schedule if 0 < k <= longest}, reverse=True)


def smallest_fitting(
    descs_by_mode: Mapping[CUDAGraphMode, Sequence[BatchExecutionDescriptor]],
    num_tokens: int,
    num_active_loras: int,
) -> list[BatchExecutionDescriptor]:
    """The graphs that a batch of so many tokens may take: of each kind the smallest
    that holds it, full ones first.

    A kind is what a graph was captured for beside its size: tokens of each request,
    adapters, microbatches. Whether the batch is of that kind is for the caller to see.
    """
    found = []
    for mode in (CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE):
        smallest: dict[BatchExecutionDescriptor, BatchExecutionDescriptor] = {}
        for desc in sorted(descs_by_mode.get(mode, ()), key=lambda d: d.num_tokens):
            holds = desc.num_tokens >= num_tokens
            if holds and desc.num_active_loras == num_active_loras:
                kind = replace(desc, num_tokens=0, num_reqs=None)
                smallest.setdefault(kind, desc)
        found += sorted(smallest.values(), key=lambda d: d.num_tokens)
    return found
