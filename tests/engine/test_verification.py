"""On a CPU, what vLLM's rejection sampler would emit is emitted in less time.

That what is drawn has the right distribution is for `test_distribution` to say.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from helpers.engines import Engines, run
from vllm_selfspec.draft import verification
from vllm_selfspec.draft.penalties import Penalties

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


def drafts_of(generator: torch.Generator) -> tuple[SpecDecodeMetadata, torch.Tensor]:
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


def penalties(generator: torch.Generator) -> dict[str, Any]:
    """Strong ones, of prompts and outputs of several lengths; none for the last."""
    tokens = torch.randint(0, VOCAB_SIZE, (2, len(LENGTHS), 30), generator=generator)
    tokens[0, 1, 7:] = VOCAB_SIZE  # as vLLM pads
    asked = torch.rand(3, len(LENGTHS), generator=generator) - 0.5
    asked[:, -1] = 0.0
    return {
        "no_penalties": False,
        "prompt_token_ids": tokens[0],
        "output_token_ids": [row[:n].tolist() for n, row in enumerate(tokens[1], 9)],
        "repetition_penalties": 1 + asked[0],
        "frequency_penalties": asked[1],
        "presence_penalties": asked[2],
    }


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What is called here from now on, of a step with drafts and of one without."""
    found = set()

    def counting(name: str) -> Any:
        right = getattr(verification, name)
        return lambda *args: found.add(name) or right(*args)

    for name in ("emitted", "sampled"):
        monkeypatch.setattr(verification, name, counting(name))
    return found


@pytest.mark.parametrize("has_penalties", [False, True], ids=["", "penalties"])
def test_what_is_emitted_is_what_vllm_emits(
    has_penalties: bool, tiny_models: dict[str, str], engines: Engines
) -> None:
    llm = engines.get(tiny_models["llama"], {"skip_layers": {}})
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    sampling = greedy_sampling()
    generator = torch.Generator().manual_seed(0)
    emitted = set()
    for _ in range(50):
        metadata, logits = drafts_of(generator)
        if has_penalties:
            drafts = metadata.draft_token_ids.split(LENGTHS)
            sampling = greedy_sampling(
                spec_token_ids=[tokens.tolist() for tokens in drafts],
                **penalties(generator),
            )
        found = verification.emitted(metadata, None, logits, sampling)
        of_vllm = runner.rejection_sampler(metadata, None, logits, sampling)
        assert found.dtype == of_vllm.sampled_token_ids.dtype
        assert found.tolist() == of_vllm.sampled_token_ids.tolist()
        emitted |= {*(found >= 0).sum(1).tolist()}
    assert emitted == {1, 2, 3, 4, 5}, "from the first wrong to all right"


@pytest.mark.parametrize(
    ("asked", "is_sampled_here"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 1.0}, True),
        ({"temperature": 1.0, "top_k": 5, "top_p": 0.9}, True),
        ({"temperature": 0.0, "min_tokens": 8}, False),
        ({"temperature": 0.0, "logprobs": 0}, False),
        ({"temperature": 1.0, "seed": 1}, False),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, True),
        ({"temperature": 1.0, "allowed_token_ids": [5, 6, 7, 8]}, False),
    ],
    ids=str,
)
def test_an_engine_samples_so_where_tokens_are_all_that_is_asked_for(
    asked: dict[str, Any],
    is_sampled_here: bool,
    tiny_models: dict[str, str],
    engines: Engines,
    called: set[str],
) -> None:
    from vllm import SamplingParams

    llm = engines.get(tiny_models["llama"], {"skip_layers": {}})
    params = SamplingParams(max_tokens=8, ignore_eos=True, **asked)
    _, counts = run(llm, [{"prompt_token_ids": [5, 6, 7]}], params)
    assert counts.draft_tokens
    assert called == ({"emitted", "sampled"} if is_sampled_here else set())


@pytest.mark.parametrize(
    "asked",
    [
        {"generators": {0: torch.Generator()}},
        {"max_num_logprobs": 0},
        {"logprob_token_ids": {0: [1]}},
        {"allowed_token_ids_mask": torch.zeros(1, 1, dtype=torch.bool)},
        {"bad_words_token_ids": {0: [[1]]}},
        {"logitsprocs": LogitsProcessors([SimpleNamespace(is_argmax_invariant=bool)])},
        {
            "thinking_budget_state_holder": SimpleNamespace(
                has_tracked_requests=lambda: True
            )
        },
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_else_is_asked_for_is_left_to_vllm(asked: dict[str, Any]) -> None:
    assert verification.asks_for_tokens_alone(greedy_sampling())
    assert not verification.asks_for_tokens_alone(greedy_sampling(**asked))


GREEDY, COLD, HOT = 0, 1, 2  # requests


def test_greedy_and_drawn_rows_of_one_batch_are_verified_by_their_own_rule() -> None:
    """A greedy row takes the largest whatever is likely, also in place of a draft that
    was drawn from another distribution; one that is drawn takes any but what is out of
    its top-k."""
    torch.manual_seed(0)
    drafts = [[3, 3], [3, 1], [2, 4]]
    metadata = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    metadata.target_logits_indices = torch.tensor([0, 1, 3, 4, 6, 7])
    metadata.bonus_logits_indices = torch.tensor([2, 5, 8])
    logits = torch.tensor([[0.0, 1.0, 0.5, 2.0, 1.5]]).repeat(9, 1)
    sampling = greedy_sampling(
        temperature=torch.tensor([0.0, 0.01, 1.0]),
        all_greedy=False,
        top_k=torch.tensor([5, 5, 2]),
    )
    draft_probs = torch.full((6, 5), 0.2)
    seen = set()
    for _ in range(200):
        emitted = verification.emitted(metadata, draft_probs, logits, sampling)
        assert emitted[GREEDY].tolist() == [3, 3, 3]
        assert emitted[COLD].tolist() == [3, 3, -1]
        seen |= {tuple(emitted[HOT].tolist())}
    assert seen == {(3, -1, -1), (4, -1, -1)}, "2 is out of the top two"


def test_penalties_change_logits_as_vllm_changes_them() -> None:
    generator = torch.Generator().manual_seed(0)
    sampling = greedy_sampling(**penalties(generator))
    logits = torch.randn(len(LENGTHS), VOCAB_SIZE, generator=generator) * 3
    drafted = [7, 7, 8]
    found = [
        Penalties(sampling).applied(r, row, drafted) for r, row in enumerate(logits)
    ]
    wanted = apply_all_penalties(
        logits.clone(),
        sampling.prompt_token_ids,
        sampling.presence_penalties,
        sampling.frequency_penalties,
        sampling.repetition_penalties,
        [[*tokens, *drafted] for tokens in sampling.output_token_ids],
    )
    assert torch.equal(torch.stack(found), wanted)
    assert not torch.equal(wanted[:-1], logits[:-1])


def test_what_skips_nothing_is_drafted_with_the_target_s_penalties(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    """Whatever repeats itself would be rejected otherwise."""
    from vllm import SamplingParams

    llm = engines.get(tiny_models["llama"], {"skip_layers": {}})
    asked = {"repetition_penalty": 1.5, "frequency_penalty": 0.5}
    params = SamplingParams(temperature=0.0, max_tokens=21, ignore_eos=True, **asked)
    prompts = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [9, 8]}]
    _, counts = run(llm, prompts, params)
    assert counts.draft_tokens > 20
    assert counts.accepted_tokens == counts.draft_tokens


def test_a_draft_is_as_sure_as_the_target_is_after_penalties(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows stop by it. Of logits without them the largest would be another token."""
    from vllm import SamplingParams

    from vllm_selfspec.draft import v1_proposer

    seen: list[bool] = []

    def noting(token_ids: Any, logits: Any, probs: Any) -> Any:
        seen.append(bool((logits.argmax(dim=-1) == token_ids).all()))
        return confidence_of(token_ids, logits, probs)

    confidence_of = v1_proposer.confidence_of
    monkeypatch.setattr(v1_proposer, "confidence_of", noting)
    spec = {"skip_layers": {}, "draft_length": "threshold"}
    llm = engines.get(tiny_models["llama"], spec)
    asked = {"repetition_penalty": 1.8, "frequency_penalty": 0.9}
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, **asked)
    _, counts = run(llm, [{"prompt_token_ids": [5, 6, 7]}], params)
    assert counts.accepted_tokens == counts.draft_tokens
    assert len(seen) > 5 and all(seen)
