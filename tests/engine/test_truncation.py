"""What drafts and targets are drawn from on a CPU is what vLLM draws from."""

import itertools

import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_selfspec.draft import truncation
from vllm_selfspec.draft.truncation import Limits, distribution

TOP_K = (None, 1, 20, 255, 256, 1000)
TOP_P = (None, 1e-6, 0.47, 0.93, 0.999)  # no sum of a few equal ones


def of_vllm(logits: torch.Tensor, limits: Limits) -> torch.Tensor:
    top_k = None if limits.top_k is None else torch.tensor([limits.top_k])
    top_p = None if limits.top_p is None else torch.tensor([limits.top_p])
    scaled = logits[None].float() / limits.temperature
    return apply_top_k_top_p(scaled, top_k, top_p).softmax(dim=-1)[0]


@pytest.mark.parametrize("vocab_size", [100, 6000])
@pytest.mark.parametrize("peak", [0.3, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("step", [0.0, 1.0], ids=["", "ties"])
def test_what_is_drawn_from_is_what_vllm_draws_from(
    vocab_size: int, peak: float, step: float
) -> None:
    """Above all where tokens are equal at the end of what may be drawn."""
    torch.manual_seed(0)
    for top_k, top_p in itertools.product(TOP_K, TOP_P):
        logits = torch.randn(vocab_size) * peak
        if step:
            logits = (logits / step).round() * step
        top_k = top_k and min(top_k, vocab_size)
        limits = Limits(0.8, top_k, top_p)
        found, wanted = distribution(logits, limits), of_vllm(logits, limits)
        assert torch.equal(found > 0, wanted > 0), (top_k, top_p)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        draft = distribution(logits, limits, is_draft=True).sort().values
        torch.testing.assert_close(draft, wanted.sort().values, rtol=1e-5, atol=1e-7)


def test_a_vocabulary_is_sorted_only_to_tell_equal_tokens_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sorted_rows = []
    monkeypatch.setattr(
        truncation,
        "apply_top_k_top_p",
        lambda logits, *limits: sorted_rows.append(logits) or logits,
    )
    torch.manual_seed(0)
    logits = torch.randn(20_000)
    for top_k, top_p in ((20, 0.8), (None, 0.95), (50, None)):
        distribution(logits, Limits(0.7, top_k, top_p))
    equal = torch.zeros(20_000), Limits(0.7, None, 0.95)
    distribution(*equal, is_draft=True)
    assert not sorted_rows
    distribution(*equal)
    assert sorted_rows
