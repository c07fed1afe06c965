"""Greedy rows are verified on a CPU as vLLM's rejection sampler does it, in less."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from helpers.engines import Engines
from vllm_selfspec.draft import drawing
from vllm_selfspec.engine import replacements

LENGTHS = (3, 0, 1, 4, 2, 4)  # draft tokens of each request
VOCAB_SIZE = 40


def greedy_sampling(**asked: Any) -> SamplingMetadata:
    nothing = torch.zeros(len(LENGTHS))
    found = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[[] for _ in LENGTHS],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    return replace(found, **asked)


def verification(generator: torch.Generator) -> tuple[SpecDecodeMetadata, torch.Tensor]:
    """Drafts of which most are right, and logits with many ties."""
    num_rows = sum(LENGTHS) + len(LENGTHS)
    shape = (num_rows, VOCAB_SIZE)
    logits = torch.randint(0, 6, shape, generator=generator).bfloat16()
    said = logits.float().argmax(-1)
    wrong = torch.rand(num_rows, generator=generator) < 0.3
    drafts, targets, bonus, first = [], [], [], 0
    for length in LENGTHS:
        rows = [*range(first, first + length)]
        drafts.append([int(said[row] + wrong[row]) % VOCAB_SIZE for row in rows])
        targets += rows
        bonus.append(first + length)
        first += length + 1
    found = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    found.target_logits_indices = torch.tensor(targets)
    found.bonus_logits_indices = torch.tensor(bonus)
    return found, logits


def test_what_is_emitted_is_what_vllm_emits(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engines.get(tiny_models["llama"], {"skip_layers": {}})
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    verify, counted = drawing.verified_greedily, []
    monkeypatch.setattr(
        drawing, "verified_greedily", lambda *a: counted.append(0) or verify(*a)
    )
    generator, sampling = torch.Generator().manual_seed(0), greedy_sampling()
    emitted = set()
    for number in range(50):
        metadata, logits = verification(generator)
        found = runner.rejection_sampler(metadata, None, logits.clone(), sampling)
        assert len(counted) == 1 + number
        with monkeypatch.context() as plain:
            plain.setattr(replacements, "is_in_use", lambda: False)
            wanted = runner.rejection_sampler(metadata, None, logits.clone(), sampling)
        assert found.sampled_token_ids.dtype == wanted.sampled_token_ids.dtype
        assert found.sampled_token_ids.tolist() == wanted.sampled_token_ids.tolist()
        emitted |= {*(found.sampled_token_ids >= 0).sum(1).tolist()}
    assert emitted == {1, 2, 3, 4, 5}, "from the first wrong to all right"


@pytest.mark.parametrize(
    "asked",
    [
        {"all_greedy": False},
        {"no_penalties": False},
        {"max_num_logprobs": 0},
        {"logprob_token_ids": {0: [1]}},
        {"allowed_token_ids_mask": torch.zeros(1, 1, dtype=torch.bool)},
        {"bad_words_token_ids": {0: [[1]]}},
        {"logitsprocs": SimpleNamespace(non_argmax_invariant=[object()])},
        {
            "thinking_budget_state_holder": SimpleNamespace(
                has_tracked_requests=lambda: True
            )
        },
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_else_is_asked_for_is_left_to_vllm(asked: dict[str, Any]) -> None:
    assert drawing.is_greedy_alone(greedy_sampling())
    assert not drawing.is_greedy_alone(greedy_sampling(**asked))
