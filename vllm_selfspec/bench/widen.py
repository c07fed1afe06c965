"""Widens a small Llama or Qwen2: the same outputs at the cost of a big model.

A model of a few million parameters only times the engine around it. Here every hidden
unit, attention head and MLP unit is repeated r times, and every matrix, all of which
read a widened input, is divided by r. Each unit of the wide model then computes what
the unit it is a copy of does, so the logits stay, while the matrices grow by r squared.

What it rests on: a matrix sums over r copies of each input, 1/r times each, and r is a
power of two, so the division is exact. RMSNorm's mean of squares over copies is that
over the originals. `head_dim` stays, and with it the attention scale and the rotary
embedding. Copies are laid out in whole blocks (0 1 2 0 1 2), query and key/value heads
alike: query head j reads key/value head j // group, and both are copies of a pair that
belonged together. A tied embedding would have to be divided as LM head but not as
embedding, so it is untied.

    python -m vllm_selfspec.bench.widen MODEL_DIR OUT_DIR --factor 8
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from vllm_selfspec import whole_file
from vllm_selfspec.plan.cost import WEIGHTS, CheckpointError, weight_files
from vllm_selfspec.plan.exit_card import (
    read_exit_card,
    tensors_file,
    write_exit_layer,
)
from vllm_selfspec.plan.target_model import TargetModel, weights_fingerprint

if TYPE_CHECKING:
    import torch

ARCHITECTURES = (["LlamaForCausalLM"], ["Qwen2ForCausalLM"])
DTYPES = ("bfloat16", "float32")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What the output was made from, so that a second call can be idle. A new meaning of the
# output needs a new FORMAT.
STAMP, FORMAT = "widened.json", 1
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template*",
)


class WidenError(ValueError):
    """A model, factor or output directory that cannot be used."""


def widen(source: Path, output: Path, factor: int, dtype: str = "bfloat16") -> Path:
    """Writes the widened form of a checkpoint; idle if it is there already.

    Args:
        source: Checkpoint directory: config.json and safetensors.
        output: Directory to write, atomically. It may hold an earlier output.
        factor: How often every unit is repeated; a power of two.
        dtype: Of the written weights: bfloat16 or float32.

    Returns:
        `output`.

    Raises:
        WidenError: If one of them is not as described.
        CheckpointError: If the weights of `source` are missing.
    """
    config = read_config(source)
    _check(source, output, factor, dtype)
    stamp = {
        "format": FORMAT,
        "source_sha256": digest(source),
        "factor": factor,
        "dtype": dtype,
    }
    if read_stamp(output) == stamp and (output / WEIGHTS).is_file():
        typer.echo(f"{output} is {source} widened by {factor} already: kept", err=True)
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=output.parent, prefix=f".{output.name}.", suffix=".partial"
    ) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        _write(new, source, config, stamp)
        if output.exists():
            output.rename(Path(scratch) / "old")
        new.rename(output)
    return output


def _write(
    directory: Path, source: Path, config: dict[str, Any], stamp: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    factor, dtype = stamp["factor"], stamp["dtype"]
    weights = widened_weights(source, config, factor, _torch_dtype(dtype))
    save_file(weights, directory / WEIGHTS, {"format": "pt"})  # transformers wants it
    wide = widened_config(config, factor, dtype)
    whole_file.write_json(wide, directory / "config.json")
    whole_file.write_json(stamp, directory / STAMP)
    for file in companions(source):
        shutil.copy(file, directory)


def read_config(source: Path) -> dict[str, Any]:
    """config.json, if it is of a model that can be widened."""
    file = source / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise WidenError(
            f"the model must be a directory with a config.json, but {file} cannot be "
            f"read ({error}): check the path"
        ) from error
    if config.get("architectures") not in ARCHITECTURES:
        known = " and ".join(name for (name,) in ARCHITECTURES)
        raise WidenError(
            f"only {known} can be widened, but {source} has architectures "
            f"{config.get('architectures')}: choose one of those"
        )
    if "quantization_config" in config:
        raise WidenError(
            f"only plain weights can be widened, but {source} is quantised by "
            f"{config['quantization_config'].get('quant_method')}: choose the original"
        )
    return config


def _check(source: Path, output: Path, factor: int, dtype: str) -> None:
    if factor < 1 or factor & (factor - 1):
        near = 1 << max(factor, 1).bit_length()
        raise WidenError(
            "the factor must be a power of two, so that dividing by it is exact, but "
            f"it is {factor}: use {near // 2} or {near}"
        )
    if dtype not in DTYPES:
        raise WidenError(
            f"the dtype must be one of {', '.join(DTYPES)}, but it is {dtype!r}: use "
            "bfloat16 (float16 would lose small weights when they are divided)"
        )
    if source.resolve().is_relative_to(output.resolve()):
        raise WidenError(
            f"the output replaces its directory whole, but {output} holds the source "
            f"{source}: choose another output"
        )
    is_ours = output.is_dir() and (read_stamp(output) or not any(output.iterdir()))
    if output.exists() and not is_ours:
        raise WidenError(
            f"the output must be a new or empty directory, or one with a {STAMP} from "
            f"an earlier run, but {output} holds something else: choose another, or "
            "delete it"
        )


def read_stamp(output: Path) -> dict[str, Any] | None:
    """What an earlier run wrote about its output; None if there is none."""
    try:
        stamp = json.loads((output / STAMP).read_bytes())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def companions(source: Path) -> list[Path]:
    """Tokenizer, generation config and chat template: files that are copied."""
    found = {file for pattern in COMPANIONS for file in source.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def digest(source: Path) -> str:
    """SHA-256 over the names and contents of all files that decide the output."""
    files = [source / "config.json", *weight_files(source), *companions(source)]
    sums = [_sha256(file) for file in files]
    names = [file.name for file in files]
    lines = (f"{s} {n}\n" for n, s in sorted(zip(names, sums, strict=True)))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def widened_config(config: dict[str, Any], factor: int, dtype: str) -> dict[str, Any]:
    """The config of the wide model; every unit count but `head_dim` has grown."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dtype_key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {
        **config,
        "hidden_size": config["hidden_size"] * factor,
        "intermediate_size": config["intermediate_size"] * factor,
        "num_attention_heads": heads * factor,
        "num_key_value_heads": kv_heads * factor,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "tie_word_embeddings": False,
        dtype_key: dtype,
    }


def widened_weights(
    source: Path, config: dict[str, Any], factor: int, dtype: "torch.dtype"
) -> dict[str, "torch.Tensor"]:
    """All tensors of the wide model, the untied LM head among them."""
    weights = dict(_tensors(source))
    if config.get("tie_word_embeddings"):
        weights[HEAD] = weights[EMBEDDING]
    steps = track(
        weights.items(), "widening", console=Console(stderr=True), transient=True
    )
    return {name: widen_tensor(name, w.to(dtype), factor) for name, w in steps}


def _torch_dtype(name: str) -> "torch.dtype":
    import torch

    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def _tensors(source: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    from safetensors import safe_open

    for file in weight_files(source):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                if not name.endswith("rotary_emb.inv_freq"):  # a buffer of old releases
                    yield name, tensors.get_tensor(name)


def widen_tensor(name: str, weight: "torch.Tensor", factor: int) -> "torch.Tensor":
    """One widened tensor.

    Args:
        name: In the Hugging Face checkpoint. The embedding reads token ids and the LM
            head writes logits, which are not widened; all else is on both sides.
        weight: `[out, in]`; `[units]` for a norm or a bias.
        factor: How often every unit is repeated.
    """
    if name == EMBEDDING:
        return weight.repeat(1, factor)
    if name == HEAD:
        return weight.repeat(1, factor) / factor
    if weight.ndim == 1:
        return weight.repeat(factor)
    return weight.repeat(factor, factor) / factor


def widen_exit_layer(layer: Path, source: Path, wide: Path, output: Path) -> Path:
    """Writes an exit layer of a small model as the one of its widened form.

    What it drafts stays the same.

    Args:
        layer: Directory of the exit layer.
        source: Checkpoint directory of its target.
        wide: What `widen` made of that.
        output: Directory to write.

    Returns:
        `output`.

    Raises:
        ExitLayerError: If it is damaged, or not of `source`.
        WidenError: If `wide` is not made of `source`.
    """
    from safetensors.torch import load_file, save

    card = read_exit_card(layer)
    card.check_fits(TargetModel.read(source, str(source)), source)
    stamp = read_stamp(wide) or {}
    if stamp.get("source_sha256") != digest(source):
        raise WidenError(
            "an exit layer is widened for a model that was widened from its target "
            f"{source}, but {wide} was not: widen that first"
        )
    factor, dtype = int(stamp["factor"]), _torch_dtype(stamp["dtype"])
    tensors = {
        name: widen_tensor(name, tensor.to(dtype), factor)
        for name, tensor in load_file(tensors_file(layer)).items()
    }
    target = TargetModel.read(wide, wide.name)
    changed = {
        "model": f"{card.model}, widened {factor} times",
        "architecture": dict(target.architecture),
        "weights": weights_fingerprint(wide),
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    write_exit_layer(
        output,
        card.model_dump(exclude={"tensors"}) | changed,
        save(tensors, {"format": "pt"}),
    )
    return output


def main(
    model: Annotated[Path, typer.Argument(help="Directory of a small Llama or Qwen2.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    factor: Annotated[
        int, typer.Option(help="Repetitions of every unit; a power of two.")
    ] = 8,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Write a model FACTOR times as wide as MODEL that computes the same logits.

    Example: python -m vllm_selfspec.bench.widen benchmarks/demo_model wide --factor 8
    """
    try:
        widen(model, output, factor, dtype)
    except (WidenError, CheckpointError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    print(output)


if __name__ == "__main__":
    typer.run(main)
