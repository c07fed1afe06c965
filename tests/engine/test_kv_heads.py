"""Nothing is drafted for a target whose KV heads vLLM miscounts."""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from helpers.engines import Engines, greedy, prompts_of, run, token_ids
from helpers.environment import IS_SHORT
from helpers.models import build_tiny_model
from vllm_selfspec.plan.families import UnsupportedModelError

pytestmark = pytest.mark.v2
NUM_HEADS, HIDDEN = 3, 192
NOTHING = {"skip_layers": {"attention": [], "mlp": []}, "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX, whose attention has one KV head for every query head.

    Made in a process of its own: where vLLM has served a GPT-NeoX, Transformers' class
    is not what it was.
    """
    keys = {
        "hidden_size": HIDDEN,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": None,
        "head_dim": None,
    }
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        directory = tmp_path_factory.mktemp("whole")
        made = process.submit(build_tiny_model, "gpt_neox", directory, **keys)
        return made.result()


@pytest.fixture(scope="module")
def converted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with keys that its code does not read, as a converter leaves them."""
    path = tmp_path_factory.mktemp("converted") / "gpt_neox"
    shutil.copytree(whole, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"num_key_value_heads": 1, "head_dim": HIDDEN // NUM_HEADS}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_a_number_of_kv_heads_that_is_not_the_models_is_refused(
    converted: str, engines: Engines
) -> None:
    """vLLM's kernel would read slots beyond those of the draft's rows."""
    with pytest.raises(UnsupportedModelError) as error:
        engines.get(converted, NOTHING)
    message = str(error.value)
    assert "must keep as many KV heads as the model's attention makes" in message
    assert "GPTNeoXAttention makes 3 and its config.json says 1" in message
    assert message.endswith("""--hf-overrides '{"num_key_value_heads": 3}'""")


def test_with_the_number_that_the_refusal_names_drafts_are_right(
    whole: Path, converted: str, engines: Engines
) -> None:
    prompts, params = prompts_of(4), greedy(16)
    expected, _ = run(engines.get(str(whole)), prompts, params)
    llm = engines.get(converted, NOTHING, hf_overrides={"num_key_value_heads": 3})
    found, counts = run(llm, prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens
    assert counts.acceptance == 1, "nothing was skipped"


@pytest.mark.skipif(IS_SHORT, reason="long: make test-all")
def test_plain_vllm_still_needs_that_number(
    converted: str, whole: Path, engines: Engines
) -> None:
    """Otherwise there is a text to be identical to, and nothing to refuse."""
    prompts, params = prompts_of(3), greedy(16)
    llm = engines.get(converted)
    together = token_ids(run(llm, prompts, params)[0])
    alone = [token_ids(run(llm, [prompt], params)[0])[0] for prompt in prompts]
    assert alone != together, "plain vLLM gives the same text in a batch and alone"
    right = token_ids(run(engines.get(str(whole)), prompts, params)[0])
    assert right != together, "plain vLLM gives the text of the model as it is"
