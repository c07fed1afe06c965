"""The source `suffix`: what followed the same tokens in other requests' outputs, too.

One rule: the matching is arctic-inference's, as in vLLM's suffix decoding (Oliaro et
al., *SuffixDecoding*, 2024): a suffix tree of the request itself and one of the outputs
of others, from which the likeliest continuation is taken. How far of it is verified is
not its to say, but `draft_length.goodput`'s.

The trees are fed with what a request has got since it was last looked at. A request
that has become shorter, or that comes again by the same name, is fed anew.
"""

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vllm_selfspec.plan.keys import Keys
from vllm_selfspec.plan.source import NOTHING, Proposal, Proposer
from vllm_selfspec.plan.source_context import CopyingSource, kind_of

PACKAGE = "arctic_inference"


class SuffixKeys(Keys):
    """Names, meaning and defaults are vLLM's, of its suffix decoding."""

    suffix_decoding_max_tree_depth: int = Field(
        default=24,
        ge=2,
        le=256,
        strict=True,
        description="Source 'suffix': the longest match and continuation together.",
    )
    suffix_decoding_max_cached_requests: int = Field(
        default=10_000,
        ge=0,
        le=10_000_000,
        strict=True,
        description="Source 'suffix': requests whose outputs are kept for others; the "
        "oldest go first.",
    )
    suffix_decoding_min_token_prob: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Source 'suffix': how often a token must have followed, of all "
        "times, to be proposed.",
    )


class SuffixSource(CopyingSource):
    """Copies from the request itself and from the outputs of others."""

    name = "suffix"
    keys = SuffixKeys

    @property
    def words(self) -> str:
        return "copies from the request's own tokens and other outputs"

    def refusal(self) -> str | None:
        """Why it cannot be used here."""
        if importlib.util.find_spec(PACKAGE) is not None:
            return None
        return "arctic-inference is not installed: pip install arctic-inference==0.3.0"

    def options(self, config: Any) -> dict[str, Any]:
        return {
            **super().options(config),
            "num_copied_tokens": config.num_copied_tokens,
            "prompt_lookup_min": config.prompt_lookup_min,
        }

    def proposer(self, options: Mapping[str, Any]) -> Proposer:
        return SuffixTrees(
            options["suffix_decoding_max_tree_depth"],
            options["suffix_decoding_max_cached_requests"],
            options["suffix_decoding_min_token_prob"],
            options["num_copied_tokens"],
            options["prompt_lookup_min"],
        )


class SuffixTrees(Proposer):
    """The source at work."""

    def __init__(
        self,
        max_tree_depth: int,
        max_cached_requests: int,
        min_token_prob: float,
        num_tokens: int,
        shortest: int,
    ) -> None:
        """With the user's keys."""
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._cache: Any = SuffixDecodingCache(max_tree_depth, max_cached_requests)
        self._depth, self._num_tokens = max_tree_depth, num_tokens
        self._shortest, self._min_token_prob = shortest, min_token_prob
        self._num_fed: dict[str, int] = {}  # tokens, by request

    def keep(self, req_ids: Collection[str]) -> None:
        """Ends all other requests; their outputs stay."""
        for req_id in self._num_fed.keys() - set(req_ids):
            del self._num_fed[req_id]
            self._cache.stop_request(req_id)

    def propose(self, req_id: str, token_ids: NDArray[np.int32]) -> Proposal:
        """Continues the longest match that has a likely continuation."""
        self._feed(req_id, token_ids)
        draft = self._cache.speculate(
            req_id,
            token_ids[-self._depth :],
            max_spec_tokens=self._num_tokens,
            max_spec_factor=float(self._num_tokens),  # goodput says how far it goes
            min_token_prob=self._min_token_prob,
        )
        if draft.match_len < self._shortest or not draft.token_ids:
            return NOTHING
        copied = np.array(draft.token_ids, np.int32)
        return Proposal(copied, kind_of(draft.match_len))

    def _feed(self, req_id: str, token_ids: NDArray[np.int32]) -> None:
        num_fed = self._num_fed.get(req_id)
        if num_fed is not None and num_fed > len(token_ids):
            self._cache.stop_request(req_id)
            num_fed = None
        if num_fed is None:
            self._cache.start_request(req_id, token_ids)
        elif num_fed < len(token_ids):
            self._cache.add_active_response(req_id, token_ids[num_fed:])
        self._num_fed[req_id] = len(token_ids)
