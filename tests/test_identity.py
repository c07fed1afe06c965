"""Greedy output equals plain vLLM's token for token, in float32, whatever is skipped."""

from typing import Any

import pytest
from conftest import FAMILIES, NUM_LAYERS, Engines, prompts_of, run, token_ids

EMPTY: dict[str, Any] = {"skip_layers": {"attention": [], "mlp": []}}


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_skip_set_accepts_every_draft_token(
    family: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm = engines.get(tiny_models[family], EMPTY)
    for num_reqs in (1, 8):
        _, counts = run(llm, prompts_of(num_reqs), params)
        assert counts.draft_tokens > 0
        assert counts.accepted_tokens == counts.draft_tokens, (
            f"with nothing skipped the draft is the target, yet {counts} "
            f"at {num_reqs} requests"
        )
