"""`SeededRows`: a request with a seed gets the text that plain vLLM gives it.

One rule: the text of a seeded request does not depend on its drafts. vLLM draws a token
as the winner of a race: with the noise that the request's generator yields for it,
every token of the vocabulary has a score, and the highest wins. A draft token is
accepted while it is the winner that plain vLLM would draw there, and where it is not,
that winner is emitted in its place. So whatever was drafted, how far, and in whatever
company, the tokens are those of plain vLLM, and the generator stands where plain vLLM's
would: one draw further for each token that was emitted.

A draft that is drawn with the same noise is accepted with probability (1 - TV) /
(1 + TV) at least, TV being the total variation distance of the two distributions
(Daliri et al., *Coupling without Communication and Drafter-Invariant Speculative
Decoding*, 2025). The standard rule, which requests without a seed keep, accepts 1 - TV;
its text depends on the drafts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

PLACEHOLDER_TOKEN_ID = -1  # vLLM's, for what was not emitted


@contextmanager
def rewound(generators: Iterable[torch.Generator]) -> Iterator[None]:
    """Takes back what is drawn from the generators meanwhile."""
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def draw(
    sampler: Sampler, logits: torch.Tensor, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """The tokens that vLLM draws, one from each row's generator, `[num_rows]`.

    Args:
        sampler: vLLM's V1 sampler; what its noise is depends on the platform.
        logits: `[num_rows, vocab_size]`, float32, over the temperature and truncated.
        generators: One for each row.
    """
    of_rows = dict(enumerate(generators))
    tokens: torch.Tensor = sampler.topk_topp_sampler(logits, of_rows, None, None)[0]
    return tokens


def for_rows(sampling: SamplingMetadata, rows: np.ndarray) -> SamplingMetadata:
    """The metadata of some rows; only what drawing a token reads is selected."""
    if sampling.temperature is None and sampling.no_penalties:
        return sampling
    index = torch.from_numpy(rows).to(sampling.repetition_penalties.device)
    numbers, generators = rows.tolist(), sampling.generators
    found = replace(
        sampling,
        temperature=_selected(sampling.temperature, index),
        top_k=_selected(sampling.top_k, index),
        top_p=_selected(sampling.top_p, index),
        generators={
            new: generators[old] for new, old in enumerate(numbers) if old in generators
        },
    )
    if sampling.no_penalties:
        return found
    return replace(
        found,
        prompt_token_ids=_selected(sampling.prompt_token_ids, index),
        output_token_ids=[sampling.output_token_ids[row] for row in numbers],
        repetition_penalties=sampling.repetition_penalties[index],
        frequency_penalties=sampling.frequency_penalties[index],
        presence_penalties=sampling.presence_penalties[index],
    )


def _selected(of_all: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    return None if of_all is None else of_all[index]


@dataclass
class SeededSamplingMetadata(SamplingMetadata):
    """vLLM's, on its way through the rejection sampler, without the generators of the
    seeded rows that have drafts: those are drawn for afterwards."""

    seeded: "SeededRows | None" = None


class SeededRows:
    """The rows of a verification whose requests have a seed, and drafts."""

    def __init__(
        self,
        sampler: Sampler,
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        sampling: SamplingMetadata,
    ) -> None:
        """For what vLLM's V1 `RejectionSampler.forward` is given."""
        self._sampler, self._sampling = sampler, sampling
        self._bonus_logits = logits[metadata.bonus_logits_indices]
        self._num_drafts = metadata.num_draft_tokens
        self._generators: dict[int, torch.Generator] = {}
        others: dict[int, torch.Generator] = {}
        for row, generator in sampling.generators.items():
            found = self._generators if self._num_drafts[row] else others
            found[row] = generator
        self.metadata = SeededSamplingMetadata(
            **{**vars(sampling), "generators": others}, seeded=self
        )

    def verify(
        self,
        output_token_ids: torch.Tensor,
        draft_token_ids: torch.Tensor,
        target_logits: torch.Tensor,
    ) -> None:
        """Draws token after token, as plain vLLM, until one is not what was drafted.

        Args:
            output_token_ids: `[num_reqs, 1 + max_num_drafts]`; the seeded rows are
                written.
            draft_token_ids: Of all requests, `[num_tokens]`.
            target_logits: Of their positions, `[num_tokens, vocab_size]`, over the
                temperature and truncated.
        """
        drafted = draft_token_ids.tolist()
        first = np.cumsum([0, *self._num_drafts])  # of each request
        rows, position = [*self._generators], 0
        output_token_ids[rows] = PLACEHOLDER_TOKEN_ID
        all_accepted: list[int] = []
        while rows:
            index = [int(first[row]) + position for row in rows]
            tokens = self._draw(target_logits[index], rows)
            output_token_ids[rows, position] = tokens.to(output_token_ids.dtype)
            position += 1
            drawn = zip(rows, index, tokens.tolist(), strict=True)
            accepted = [row for row, i, token in drawn if token == drafted[i]]
            all_accepted += [r for r in accepted if self._num_drafts[r] == position]
            rows = [row for row in accepted if self._num_drafts[row] > position]
        if all_accepted:
            ends = [self._num_drafts[row] for row in all_accepted]
            bonus = self._draw_bonus(all_accepted)
            output_token_ids[all_accepted, ends] = bonus.to(output_token_ids.dtype)

    def _draw(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return draw(self._sampler, logits, [self._generators[row] for row in rows])

    def _draw_bonus(self, rows: list[int]) -> torch.Tensor:
        """The tokens after the last drafts, as vLLM's rejection sampler draws them."""
        logits = self._sampler.apply_logits_processors(
            self._bonus_logits.to(torch.float32), self._sampling, True
        )
        sampling = for_rows(self._sampling, np.array(rows))
        tokens: torch.Tensor = self._sampler.sample(logits[rows], sampling)[0]
        return tokens


def verify_on_device(
    sampler: Any,
    processed_logits: torch.Tensor,
    drafted: torch.Tensor,
    positions: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping_np: np.ndarray,
    expanded_idx_mapping: torch.Tensor,
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the V2 runner, where noise is a function of seed and position.

    Nothing here waits for the device.

    Args:
        sampler: vLLM's V2 `Sampler`.
        processed_logits: `[num_logits, vocab_size]`, over the temperature, truncated.
        drafted: The input of each row of logits, `[num_logits]`: the newest token of a
            request, then its drafts; -1 for one that is to be rejected.
        positions: Of those inputs.
        cu_num_logits: `[num_reqs + 1]`.
        idx_mapping_np: The state of each request, `[num_reqs]`.
        expanded_idx_mapping: The same by row of logits, `[num_logits]`.
        sampled: What the standard rule emits, `[num_reqs, 1 + k]`.
        num_sampled: How many of them, `[num_reqs]`.

    Returns:
        `sampled` and `num_sampled`, of seeded requests by their winners.
    """
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    states = sampler.sampling_states
    winners = gumbel_sample(
        processed_logits,
        expanded_idx_mapping,
        states.temperature.gpu,
        states.seeds.gpu,
        positions,
        apply_temperature=False,
        is_drafting=False,
        use_fp64=sampler.use_fp64_gumbel,
    )
    first, end = cu_num_logits[:-1, None], cu_num_logits[1:, None]
    columns = torch.arange(sampled.shape[1], device=sampled.device)
    # [num_reqs, 1 + k]; beyond a request's last row of logits nothing is read.
    index = torch.minimum(first + columns, end - 1).long()
    is_draft = first + columns + 1 < end
    following = torch.minimum(index + 1, end - 1)
    is_accepted = is_draft & (winners[index] == drafted[following])
    num_accepted = is_accepted.long().cumprod(dim=1).sum(dim=1)
    is_seeded = torch.from_numpy(states.seeds_set[idx_mapping_np])
    is_seeded = is_seeded.to(sampled.device, non_blocking=True)
    return (
        torch.where(is_seeded[:, None], winners[index], sampled),
        torch.where(is_seeded, (num_accepted + 1).to(num_sampled.dtype), num_sampled),
    )
