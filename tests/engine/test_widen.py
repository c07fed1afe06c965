"""A widened model computes what its source does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import VOCAB_SIZE, build_tiny_model
from vllm_selfspec.bench import widen as script

# Two query heads per key/value head, and two of those: a copy that reads another head's
# keys and values cannot stay unnoticed.
SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
# Query heads wider together than the hidden size.
ODD_HEAD_DIM = {"hidden_size": 48, "head_dim": 20}
BIASED = {"attention_bias": True, "mlp_bias": True}


def build_source(directory: Path, family: str = "llama", **overrides: Any) -> Path:
    """A tiny model; its biases, if any, are random, where transformers makes them 0."""
    from safetensors.torch import load_file, save_file

    source = build_tiny_model(family, directory, **{**SMALL, **overrides})
    weights = load_file(source / "model.safetensors")
    for name in (name for name in weights if name.endswith("bias")):
        weights[name].normal_()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    return source


def logits(path: Path) -> torch.Tensor:
    """`[rows * positions, vocab]` of transformers, for fixed random text."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(VOCAB_SIZE, (4, 24), generator=generator)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with torch.no_grad():
        found: torch.Tensor = model(token_ids).logits.flatten(0, 1).float()
    return found


@pytest.mark.parametrize(
    ("factor", "overrides"),
    [
        (2, {}),
        (4, {"tie_word_embeddings": True}),
        (2, {"tie_word_embeddings": True, **ODD_HEAD_DIM}),
        (4, BIASED),
        (4, {"family": "qwen2", "tie_word_embeddings": True}),
    ],
)
def test_logits_stay(tmp_path: Path, factor: int, overrides: dict[str, Any]) -> None:
    source = build_source(tmp_path, **overrides)
    wide = script.widen(source, tmp_path / "wide", factor, "float32")
    expected, found = logits(source), logits(wide)
    # The sums have `factor` times as many terms, in another order. Float32 rounds at
    # 6e-8; through four layers that grew to 6e-6 of the range here. One exchanged head
    # changes logits by more than a tenth of it.
    tolerance = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_greedy_choice_stays_in_bfloat16(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = build_source(tmp_path, tie_word_embeddings=True)
    narrow = AutoModelForCausalLM.from_pretrained(source)
    narrow.to(torch.bfloat16).save_pretrained(source)
    expected = logits(source)
    found = logits(script.widen(source, tmp_path / "wide", 4))
    # Sums are kept in float32 and then rounded to 8 bits of mantissa: a sum at an edge
    # may round the other way, a unit of 2**-8 of its size. Through four layers up to 4
    # units came of it; two tokens whose gap both errors could bridge are a tie.
    tie = 2 * 4 * 2**-8 * float(expected.abs().max())
    best = expected.topk(2).values
    is_clear = best[:, 0] - best[:, 1] > tie
    same = expected.argmax(-1) == found.argmax(-1)
    assert is_clear.float().mean() > 0.5, "the test must have something to compare"
    assert same[is_clear].all(), f"{int((~same[is_clear]).sum())} clear choices flipped"


def test_config_and_weights_grow(tmp_path: Path) -> None:
    from safetensors import safe_open

    source = build_source(tmp_path, tie_word_embeddings=True)
    wide = script.widen(source, tmp_path / "wide", 2)
    config = json.loads((wide / "config.json").read_bytes())
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[key] for key in keys] == [128, 8, 4, 16]
    assert config["intermediate_size"] == 192
    assert config["tie_word_embeddings"] is False
    with safe_open(wide / "model.safetensors", framework="pt") as tensors:
        head, embedding = (
            tensors.get_tensor(n)
            for n in ("lm_head.weight", "model.embed_tokens.weight")
        )
    assert head.dtype == torch.bfloat16
    assert torch.equal(head * 2, embedding), "a tied head is the embedding divided by r"


def test_tokenizer_and_chat_template_come_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = build_source(tmp_path)
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "checkpoint.pt").write_text("of no use to a reader")
    wide = script.widen(source, tmp_path / "wide", 2)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, wide))
    assert after("a text") == before("a text")
    assert after.chat_template == before.chat_template
    assert (wide / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert not (wide / "checkpoint.pt").exists()


def test_sharded_source_is_read_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = build_source(tmp_path)
    sharded = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one = script.widen(source, tmp_path / "one", 2, "float32") / "model.safetensors"
    many = script.widen(sharded, tmp_path / "many", 2, "float32") / "model.safetensors"
    assert one.read_bytes() == many.read_bytes()


def inode(path: Path) -> int:
    return (path / "model.safetensors").stat().st_ino


def test_second_call_is_idle_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = build_source(tmp_path)
    first = inode(script.widen(source, tmp_path / "wide", 2))
    assert "already" not in capsys.readouterr().err
    assert inode(script.widen(source, tmp_path / "wide", 2)) == first
    assert "already" in capsys.readouterr().err


@pytest.mark.parametrize("change", ("factor", "dtype", "weights", "tokenizer", "lost"))
def test_own_output_is_replaced_when_it_is_out_of_date(
    tmp_path: Path, change: str
) -> None:
    source, output = build_source(tmp_path), tmp_path / "wide"
    script.widen(source, output, 2)
    stamp = (output / "widened.json").read_text()
    if change == "weights":
        build_tiny_model("llama", tmp_path, **SMALL, initializer_range=0.1)
    elif change == "tokenizer":
        with (source / "tokenizer.json").open("a") as file:
            file.write("\n")
    elif change == "lost":
        (output / "model.safetensors").unlink()
    factor = 4 if change == "factor" else 2
    dtype = "float32" if change == "dtype" else "bfloat16"
    script.widen(source, output, factor, dtype)
    assert (output / "model.safetensors").is_file()
    assert ((output / "widened.json").read_text() == stamp) == (change == "lost")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "wide"], "no scraps"


def test_interrupted_run_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = build_source(tmp_path), tmp_path / "wide"
    first = inode(script.widen(source, output, 2))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script.shutil, "copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.widen(source, output, 4)
    assert inode(output) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "wide"], "no scraps"


def write_config(directory: Path, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("factor", (0, 3, 12, -4))
def test_factor_that_is_no_power_of_two_is_refused(tmp_path: Path, factor: int) -> None:
    source = write_config(tmp_path / "model", architectures=["LlamaForCausalLM"])
    with pytest.raises(script.WidenError, match=f"it is {factor}: use "):
        script.widen(source, tmp_path / "wide", factor)


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    source = write_config(tmp_path / "model", architectures=["Qwen3ForCausalLM"])
    with pytest.raises(script.WidenError, match="Qwen3ForCausalLM.*choose one"):
        script.widen(source, tmp_path / "wide", 2)


def test_quantised_model_is_refused(tmp_path: Path) -> None:
    source = write_config(
        tmp_path / "model",
        architectures=["LlamaForCausalLM"],
        quantization_config={"quant_method": "awq"},
    )
    with pytest.raises(script.WidenError, match="awq: choose the original"):
        script.widen(source, tmp_path / "wide", 2)


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(script.WidenError, match="config.json.*check the path"):
        script.widen(tmp_path, tmp_path / "wide", 2)


def test_dtype_that_could_lose_weights_is_refused(tmp_path: Path) -> None:
    source = write_config(tmp_path / "model", architectures=["LlamaForCausalLM"])
    with pytest.raises(script.WidenError, match="'float16': use bfloat16"):
        script.widen(source, tmp_path / "wide", 2, "float16")


def test_output_that_holds_something_else_is_refused_untouched(tmp_path: Path) -> None:
    source, output = build_source(tmp_path), tmp_path / "mine"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(script.WidenError, match="choose another, or delete it"):
        script.widen(source, output, 2)
    assert (output / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("output", (".", ".."))
def test_output_that_holds_the_source_is_refused(tmp_path: Path, output: str) -> None:
    source = build_source(tmp_path)
    (source / "widened.json").write_text("{}")
    with pytest.raises(script.WidenError, match="holds the source"):
        script.widen(source, source / output, 2)


def test_command_prints_the_path_or_one_line_of_error(tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(script.main)
    source, output = build_source(tmp_path), tmp_path / "wide"
    done = CliRunner().invoke(app, [str(source), str(output), "--factor", "2"])
    assert (done.exit_code, done.stdout.strip()) == (0, str(output))
    refused = CliRunner().invoke(app, [str(source), str(output), "--factor", "3"])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: ") and refused.stderr.count("\n") == 1


def write_head(directory: Path, source: Path) -> Path:
    """An exit layer after two layers, all of it random."""
    from safetensors.torch import save

    from vllm_selfspec.plan.exit_card import write_exit_layer
    from vllm_selfspec.plan.target_model import TargetModel, weights_fingerprint
    from vllm_selfspec.training.student import Student

    student = Student(source, 2)
    tensors = {
        name: tensor + 0.1 * torch.randn_like(tensor)
        for name, tensor in student.tensors(torch.float32).items()
    }
    target = TargetModel.read(source, "small")
    card = {
        "exit_layer": 2,
        "num_layers": target.num_layers,
        "model": target.name,
        "architecture": dict(target.architecture),
        "weights": weights_fingerprint(source),
        "num_parameters": student.num_parameters,
    }
    write_exit_layer(directory, card, save(tensors))
    return directory


def test_a_widened_exit_layer_drafts_the_same(tmp_path: Path) -> None:
    from vllm_selfspec.plan.exit_card import read_exit_card
    from vllm_selfspec.training.student import Student

    source = build_source(tmp_path, tie_word_embeddings=True)
    wide = script.widen(source, tmp_path / "wide", 4, "float32")
    head = write_head(tmp_path / "head", source)
    wide_head = script.widen_exit_layer(head, source, wide, tmp_path / "wide_head")
    ids = torch.randint(VOCAB_SIZE, (4, 24), generator=torch.manual_seed(0))
    where = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        narrow = Student.read(source, head)
        expected = narrow.logits(ids, where)
        untrained = Student(source, 2).logits(ids, where)
        student = Student.read(wide, wide_head)
        found = student.logits(ids, where)
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * largest)
    assert (untrained - expected).abs().max() > 0.01 * largest, "it must matter"
    card = read_exit_card(wide_head)
    assert card.num_parameters == student.num_parameters > narrow.num_parameters
    assert card.architecture["hidden_size"] == 4 * 64


def test_a_head_of_another_model_is_not_widened(tmp_path: Path) -> None:
    from vllm_selfspec.plan.exit_card import ExitLayerError

    source = build_source(tmp_path / "source")
    other = build_source(tmp_path / "other", hidden_size=32)
    wide = script.widen(source, tmp_path / "wide", 2, "float32")
    head = write_head(tmp_path / "head", source)
    with pytest.raises(ExitLayerError, match="hidden_size 32 in place of 64"):
        script.widen_exit_layer(head, other, wide, tmp_path / "out")
    wide_other = script.widen(other, tmp_path / "wide_other", 2, "float32")
    with pytest.raises(script.WidenError, match="widen that first"):
        script.widen_exit_layer(head, source, wide_other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
