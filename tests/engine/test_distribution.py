"""Sampling: the distribution of the output is plain vLLM's.

The exact distribution of four sampled tokens is read from plain vLLM, token by token,
as its processed log-probabilities; thousands of real drafting runs are then compared
with it by a chi-squared test. A right build fails one comparison with probability
`FALSE_ALARM`, so all of them together with less than 1 in 10,000.
"""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.engines import (
    Engines,
    planner_of,
    run,
    source_by_turns,
    token_ids,
    with_costs,
)
from helpers.environment import IS_PART, IS_V2
from helpers.exit_layers import build_exit_layer
from helpers.models import DEMO_MODEL, build_tiny_model
from vllm_selfspec.bench.tasks import load
from vllm_selfspec.draft.drawing import drawn, largest
from vllm_selfspec.draft.verification import Draws
from vllm_selfspec.draft_length.best_lengths import Mix

pytestmark = pytest.mark.v2
FALSE_ALARM = 1e-6
# The V2 runner's kernels run in Triton's interpreter, at 0.2 s a sample: fewer of them,
# over fewer sequences.
VOCAB_SIZE = 4 if IS_V2 else 6
NUM_TOKENS = 3 if IS_V2 else 4  # one from the prefill, two drafted, one after them
NUM_SAMPLES = 400 if IS_V2 else 6000
PROMPT = [1, 3, 0, 2, 1]
SETTINGS: dict[str, dict[str, Any]] = {
    "T=1": {"temperature": 1.0},
    "T=0.7": {"temperature": 0.7},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "top_k": {"temperature": 1.3, "top_k": 3},
}
if not IS_V2:
    # Verified by vLLM's rejection sampler on a CPU, too.
    all_tokens = {"temperature": 1.0, "allowed_token_ids": [*range(VOCAB_SIZE)]}
    SETTINGS["more than tokens"] = all_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("distribution")
    return str(build_tiny_model("llama", directory, vocab_size=VOCAB_SIZE))


def params(**overrides: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(ignore_eos=True, detokenize=False, **overrides)


def exact(engines: Engines, model: str, setting: dict[str, Any]) -> np.ndarray:
    """Probability of every sequence of `NUM_TOKENS` tokens under plain vLLM."""
    plain = engines.get(model, logprobs_mode="processed_logprobs", max_num_seqs=256)
    total = np.ones(())
    for length in range(NUM_TOKENS):
        prefixes = itertools.product(range(VOCAB_SIZE), repeat=length)
        prompts = [{"prompt_token_ids": PROMPT + list(prefix)} for prefix in prefixes]
        sampling = params(max_tokens=1, logprobs=VOCAB_SIZE, **setting)
        outputs, _ = run(plain, prompts, sampling)
        rows = np.zeros((len(prompts), VOCAB_SIZE))
        for row, output in zip(rows, outputs, strict=True):
            for token, logprob in output.outputs[0].logprobs[0].items():
                row[token] = np.exp(logprob.logprob)
        np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-4)
        shape = (VOCAB_SIZE,) * (length + 1)
        total = total[..., None] * rows.reshape(shape)
    return total


def p_value(samples: list[tuple[int, ...]], expected: np.ndarray) -> float:
    """Chi-squared test of `samples`; rare sequences share one cell.

    Cells expected fewer than 10 times are merged, for the test to be accurate far out.
    A sequence that plain vLLM cannot produce at all makes it 0.
    """
    counts = np.zeros(expected.shape)
    for sample, count in Counter(samples).items():
        counts[sample] = count
    if counts[expected < 1e-12].any():
        return 0.0
    expected = expected * len(samples)
    is_rare = expected < 10
    observed = np.append(counts[~is_rare], counts[is_rare].sum())
    wanted = np.append(expected[~is_rare], expected[is_rare].sum())
    keep = wanted > 0
    wanted = wanted[keep] * observed.sum() / wanted.sum()
    return float(stats.chisquare(observed[keep], wanted).pvalue)


def drafting(engines: Engines, model: str, method: str, policy: str = "fixed") -> Any:
    spec = {"exit_layer": 2, "num_speculative_tokens": 2, "draft_sample_method": method}
    return engines.get(model, {**spec, "draft_length": policy}, max_num_seqs=256)


def samples_of(llm: Any, setting: dict[str, Any]) -> list[tuple[int, ...]]:
    prompts = [{"prompt_token_ids": PROMPT}] * NUM_SAMPLES
    outputs, counts = run(llm, prompts, params(max_tokens=NUM_TOKENS, **setting))
    rate = counts.accepted_tokens / counts.draft_tokens
    assert 0.1 < rate < 0.95, f"acceptance {rate:.2f}: one outcome is hardly tested"
    return [tuple(samples[0]) for samples in token_ids(outputs)]


@pytest.mark.shows("Requests", "sampling: temperature, top_p, top_k")
@pytest.mark.parametrize(
    ("setting", "method"),
    [("T=0.7", "greedy"), ("top_p", "probabilistic")]
    if IS_PART
    else [*itertools.product(SETTINGS, ["greedy", "probabilistic"])],
)
def test_sampled_text_is_distributed_as_plain_vllms(
    setting: str, method: str, model: str, engines: Engines
) -> None:
    samples = samples_of(drafting(engines, model, method), SETTINGS[setting])
    p = p_value(samples, exact(engines, model, SETTINGS[setting]))
    assert p > FALSE_ALARM, f"{setting}, {method} drafts: p = {p:.2g}"


@pytest.mark.parametrize("setting", ["T=0.7", "top_p", "top_k"])
def test_a_draft_that_skips_nothing_is_drawn_as_the_target_is(
    setting: str, model: str, engines: Engines
) -> None:
    """Whatever the target would not choose would be drawn, and rejected, otherwise."""
    spec = {"skip_layers": {}, "num_speculative_tokens": 2}
    llm = engines.get(model, {**spec, "draft_sample_method": "probabilistic"})
    prompts = [{"prompt_token_ids": PROMPT}] * 8
    sampling = params(max_tokens=14, **SETTINGS[setting])
    _, counts = run(llm, prompts, sampling)
    assert counts.draft_tokens > 40
    # Rounding of p / q may cost a token in a thousand.
    assert counts.accepted_tokens >= counts.draft_tokens - 1


@pytest.mark.skipif(IS_V2, reason="a trained model takes hours in the interpreter")
def test_drafts_are_accepted_more_often_the_more_they_are_like_the_target(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a trained model: what a random one drafts is not like it anyway."""
    prompts = [prompt.render(None) for prompt in load("code").prompts]
    sampling = params(max_tokens=24, **SETTINGS["top_p"])

    def acceptance(method: str) -> float:
        spec = {"exit_layer": 6, "num_speculative_tokens": 2}
        llm = engines.get(str(DEMO_MODEL), {**spec, "draft_sample_method": method})
        _, counts = run(llm, prompts, sampling)
        return counts.accepted_tokens / counts.draft_tokens

    greedy, truncated = acceptance("greedy"), acceptance("probabilistic")
    monkeypatch.setattr(
        "vllm_selfspec.draft.sampler.distribution",
        lambda logits, limits, **_: logits.float().softmax(dim=-1),
    )
    # Some 1000 drafts each: their acceptance has a deviation below 0.02.
    assert truncated > acceptance("probabilistic") + 0.08
    assert truncated > greedy + 0.2


@pytest.mark.parametrize(
    "method", ["probabilistic"] if IS_PART else ["greedy", "probabilistic"]
)
@pytest.mark.parametrize("policy", ["threshold", "thompson", "thompson-calibrated"])
def test_rows_that_stop_drafting_leave_the_distribution_alone(
    policy: str, method: str, model: str, engines: Engines
) -> None:
    llm = drafting(engines, model, method, policy)
    samples = samples_of(llm, SETTINGS["T=1"])
    p = p_value(samples, exact(engines, model, SETTINGS["T=1"]))
    assert p > FALSE_ALARM, f"{policy}, {method} drafts: p = {p:.2g}"


def mixing(engines: Engines, model: str, method: str, monkeypatch: Any) -> Any:
    """An engine in which a coin decides whether a row that can copy does."""
    rng = np.random.default_rng(0)

    def by_coin(model: Any, free: Any, *_: Any) -> Mix:
        is_free = (free > 0).any(axis=1) & (rng.random(len(model)) < 0.5)
        lengths = np.where(is_free, np.minimum((free > 0).sum(axis=1), 2), 2)
        return Mix(lengths.astype(np.int64), is_free, rate=1e6)  # asking pays

    monkeypatch.setattr("vllm_selfspec.draft_length.goodput.best_mix", by_coin)
    spec = {"exit_layer": 2, "num_speculative_tokens": 2, "draft_sample_method": method}
    spec |= {"draft_source": "auto", "prompt_lookup_min": 1}
    return engines.get(model, spec, max_num_seqs=256, async_scheduling=False)


@pytest.mark.parametrize(
    "method", ["probabilistic"] if IS_PART else ["greedy", "probabilistic"]
)
def test_rows_that_copy_beside_rows_that_draft_leave_the_distribution_alone(
    method: str, model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = mixing(engines, model, method, monkeypatch)
    stats = planner_of(llm).stats
    before = dict(stats.drafted)
    samples = samples_of(llm, SETTINGS["T=1"])
    drafted = {k: num - before.get(k, 0) for k, num in stats.drafted.items()}
    of_model = drafted.pop("model")
    assert min(of_model, sum(drafted.values())) > NUM_SAMPLES / 10
    p = p_value(samples, exact(engines, model, SETTINGS["T=1"]))
    assert p > FALSE_ALARM, f"{method} drafts: p = {p:.2g}"


@pytest.mark.skipif(not IS_V2, reason="the V1 runner mixes them in one batch")
def test_batches_that_copy_and_that_draft_leave_the_distribution_alone(
    model: str,
    engines: Engines,
    cpu_schedules_as_configured: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = {"exit_layer": 2, "num_speculative_tokens": 2, "draft_length": "goodput"}
    spec |= {"draft_source": "auto", "prompt_lookup_min": 1}
    llm = engines.get(model, spec, max_num_seqs=256)
    with_costs(llm, ((1, 512), (1.0, 1.0), (0.001, 0.001)), monkeypatch)
    source_by_turns(monkeypatch)
    stats = planner_of(llm).stats
    samples = samples_of(llm, SETTINGS["T=1"])
    assert min(stats.drafted["model"], stats.drafted["context"]) > NUM_SAMPLES / 10
    p = p_value(samples, exact(engines, model, SETTINGS["T=1"]))
    assert p > FALSE_ALARM, f"p = {p:.2g}"


@pytest.mark.skipif(IS_V2, reason="its few samples show greater errors alone")
def test_the_test_catches_copies_that_are_taken_for_draws(
    model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_selfspec.draft.mixed_probs import MixedProbs

    llm = mixing(engines, model, "probabilistic", monkeypatch)
    right = MixedProbs.__getitem__

    def spread(self: Any, key: Any) -> Any:
        return 0.7 * right(self, key) + 0.3 / VOCAB_SIZE

    monkeypatch.setattr(MixedProbs, "__getitem__", spread)
    samples = samples_of(llm, SETTINGS["T=1"])
    assert p_value(samples, exact(engines, model, SETTINGS["T=1"])) < FALSE_ALARM, (
        "wrong distributions of copies went unnoticed"
    )


@pytest.mark.skipif(IS_V2, reason="its few samples show greater errors alone")
def test_the_test_catches_a_rule_that_drops_the_token_it_stops_at(
    model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_selfspec.draft.row_stops import RowStops

    llm = drafting(engines, model, "probabilistic", "threshold")
    after = RowStops.after

    def dropping(self: Any, step: int, confidence: Any) -> bool:
        goes_on = after(self, step, confidence)
        if step == 0:
            self.lengths[confidence < 0.5] = 0
        return goes_on

    monkeypatch.setattr(RowStops, "after", dropping)
    samples = samples_of(llm, SETTINGS["T=1"])
    assert p_value(samples, exact(engines, model, SETTINGS["T=1"])) < FALSE_ALARM, (
        "a biased stop went unnoticed"
    )


@pytest.mark.parametrize(
    "method", ["probabilistic"] if IS_PART else ["greedy", "probabilistic"]
)
def test_goodput_lengths_leave_the_distribution_alone(
    method: str, model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = drafting(engines, model, method, "goodput")
    # Costs at which the second token pays for some requests and not for others: beside
    # 256 plain rows in 60 s, 0.1 s for a row is worth it above an acceptance of 0.43.
    costs = ((1, 256, 1024), (50.0, 60.0, 137.0), (1e-3, 1e-3, 1e-3))
    with_costs(llm, costs, monkeypatch)
    samples = samples_of(llm, SETTINGS["T=1"])
    p = p_value(samples, exact(engines, model, SETTINGS["T=1"]))
    assert p > FALSE_ALARM, f"goodput, {method} drafts: p = {p:.2g}"


@pytest.mark.parametrize(
    ("method", "policy"),
    [("probabilistic", "thompson-calibrated")]
    if IS_PART
    else [*itertools.product(["greedy", "probabilistic"], ["fixed", "thompson"])],
)
def test_an_exit_layer_leaves_the_distribution_alone(
    method: str, policy: str, model: str, engines: Engines, tmp_path: Path
) -> None:
    head = build_exit_layer(model, 2, tmp_path / "head")
    spec = {"trained_exit_layer": str(head), "num_speculative_tokens": 2}
    spec |= {"draft_sample_method": method, "draft_length": policy}
    llm = engines.get(model, spec, max_num_seqs=256)
    samples = samples_of(llm, SETTINGS["T=1"])
    p = p_value(samples, exact(engines, model, SETTINGS["T=1"]))
    assert p > FALSE_ALARM, f"{policy}, {method} drafts: p = {p:.2g}"


@pytest.mark.parametrize(
    "method", ["probabilistic"] if IS_PART else ["greedy", "probabilistic"]
)
def test_low_bit_weights_leave_the_distribution_alone(
    method: str, model: str, engines: Engines
) -> None:
    spec = {"draft_weights": "int4", "num_speculative_tokens": 2}
    spec |= {"draft_sample_method": method}
    llm = engines.get(model, spec, max_num_seqs=256)
    samples = samples_of(llm, SETTINGS["T=0.7"])
    p = p_value(samples, exact(engines, model, SETTINGS["T=0.7"]))
    assert p > FALSE_ALARM, f"{method} drafts: p = {p:.2g}"


@pytest.mark.skipif(IS_V2, reason="its rejection is a kernel; V1's can be exchanged")
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_the_test_catches_a_rejection_that_accepts_everything(
    method: str, model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = drafting(engines, model, method)
    expected = exact(engines, model, SETTINGS["T=1"])
    token = Draws.token

    def accepting(self: Any, req: int, row: int, before: Any, *of_draft: Any) -> int:
        return int(of_draft[0]) if of_draft else token(self, req, row, before)

    monkeypatch.setattr(Draws, "token", accepting)
    prompts = [{"prompt_token_ids": PROMPT}] * NUM_SAMPLES
    outputs, _ = run(llm, prompts, params(max_tokens=NUM_TOKENS, temperature=1.0))
    samples = [tuple(sample[0]) for sample in token_ids(outputs)]
    assert p_value(samples, expected) < FALSE_ALARM, "a broken rejection went unnoticed"


def test_a_token_is_drawn_by_its_probability() -> None:
    torch.manual_seed(0)
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0], [0, 0, 0, 0, 0, 1e-30]])
    tokens = torch.stack([drawn(probs) for _ in range(4000)])
    assert tokens[:, 1].unique().tolist() == [5], "sums may be of any size"
    counts = torch.bincount(tokens[:, 0], minlength=6).numpy()
    assert counts[[0, 2, 5]].sum() == 0
    fair = stats.chisquare(counts[[1, 3, 4]], [2000, 1000, 1000])
    assert fair.pvalue > FALSE_ALARM
    ties = torch.tensor([[1.0, 3.0, 3.0], [3.0, 3.0, 3.0]], dtype=torch.bfloat16)
    assert largest(ties).tolist() == ties.argmax(-1).tolist() == [1, 0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_nothing_impossible_is_drawn(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *s, **k: torch.full(s, uniform, **k))
    probs = torch.zeros(2, 1001)
    probs[0, 1::2], probs[1, 500] = 0.1, 1.0
    tokens = drawn(probs)
    assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_a_row_of_nans_does_not_end_the_engine() -> None:
    probs = torch.full((2, 600), torch.nan)
    probs[1] = 1 / 600
    assert all(0 <= token < 600 for token in drawn(probs).tolist())


def flatten_draft_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws as ever, but hands over the square root of what was drawn from."""
    if IS_V2:
        from vllm_selfspec.draft.v2_speculator import SelfSpecSpeculator

        propose = SelfSpecSpeculator.propose

        def flattened_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = propose(self, *args, **kwargs)
            self.draft_logits /= 2
            return tokens

        monkeypatch.setattr(SelfSpecSpeculator, "propose", flattened_logits)
        return
    from vllm_selfspec.draft.sampler import DraftSampler

    right = DraftSampler._drawn

    def flattened(*args: Any) -> Any:
        tokens, probs = right(*args)
        return tokens, probs.sqrt() / probs.sqrt().sum(-1, keepdim=True)

    monkeypatch.setattr(DraftSampler, "_drawn", flattened)


def test_the_test_catches_wrong_draft_probabilities(
    model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = drafting(engines, model, "probabilistic")
    expected = exact(engines, model, SETTINGS["T=1"])
    flatten_draft_probabilities(monkeypatch)
    samples = samples_of(llm, SETTINGS["T=1"])
    assert p_value(samples, expected) < FALSE_ALARM, (
        "wrong probabilities went unnoticed"
    )
