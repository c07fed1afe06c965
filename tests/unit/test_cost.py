"""`ModelWeights` counts what a decode step reads, from a checkpoint's headers alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.models import NUM_LAYERS, TINY, VOCAB_SIZE, build_tiny_model
from vllm_selfspec.plan import cost
from vllm_selfspec.plan.cost import (
    CheckpointError,
    ModelWeights,
    bound,
    expected_tokens,
)
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.skip_set import SkipSet

LAYER = {"self_attn.q_proj": 60, "input_layernorm": 4, "mlp.up_proj": 90}
MODEL = {
    "model.embed_tokens.weight": 1000,
    "model.norm.weight": 5,
    "lm_head.weight": 1000,
    **{f"model.layers.{i}.{n}.weight": b for i in range(3) for n, b in LAYER.items()},
}
EXPECTED = ModelWeights(attention=(64,) * 3, mlp=(90,) * 3, head=1005)


def write_shard(file: Path, tensors: dict[str, int]) -> None:
    """A safetensors header without the data behind it, which nothing may need."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in tensors.items():
        span = [offset, offset + size]
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": span}
        offset += size
    data = json.dumps(header).encode()
    file.write_bytes(len(data).to_bytes(8, "little") + data)


def write_model(directory: Path, tensors: dict[str, int]) -> Path:
    write_shard(directory / cost.WEIGHTS, tensors)
    return directory


@pytest.mark.parametrize("tied", (False, True))
def test_parts_of_a_real_checkpoint_add_up(tmp_path: Path, tied: bool) -> None:
    path = build_tiny_model("llama", tmp_path, tie_word_embeddings=tied)
    weights = ModelWeights.from_checkpoint(path)
    hidden, mlp, head_dim = (
        TINY[key] for key in ("hidden_size", "intermediate_size", "head_dim")
    )
    heads = 2 * (TINY["num_attention_heads"] + TINY["num_key_value_heads"])  # q,o + k,v
    # Four bytes each: parameters of the projections, and of the norm before them.
    attention = 4 * (heads * head_dim * hidden + hidden)
    assert weights == ModelWeights(
        attention=(attention,) * NUM_LAYERS,
        mlp=(4 * (3 * mlp * hidden + hidden),) * NUM_LAYERS,
        head=4 * (VOCAB_SIZE * hidden + hidden),
        weight_bytes=4,
    )


def test_only_headers_are_read(tmp_path: Path) -> None:
    assert ModelWeights.from_checkpoint(write_model(tmp_path, MODEL)) == EXPECTED


def test_sharded_checkpoint_counts_like_a_single_file(tmp_path: Path) -> None:
    names = sorted(MODEL)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        write_shard(tmp_path / shard, {name: MODEL[name] for name in members})
    write_shard(tmp_path / "consolidated.safetensors", MODEL)  # named by no index
    weight_map = {n: shard for shard, members in shards.items() for n in members}
    (tmp_path / cost.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert ModelWeights.from_checkpoint(tmp_path) == EXPECTED


def test_tied_embedding_counts_as_the_head(tmp_path: Path) -> None:
    tied = {name: size for name, size in MODEL.items() if "lm_head" not in name}
    assert ModelWeights.from_checkpoint(write_model(tmp_path, tied)) == EXPECTED


def test_scales_of_quantised_weights_count(tmp_path: Path) -> None:
    scales = {
        "model.layers.0.self_attn.q_proj.weight_scale": 6,
        "model.layers.2.mlp.up_proj.qzeros": 7,
        "lm_head.weight_scale": 8,
    }
    weights = ModelWeights.from_checkpoint(write_model(tmp_path, {**MODEL, **scales}))
    assert weights == ModelWeights((70, 64, 64), (90, 90, 97), 1013)


def test_draft_share_is_what_is_left_over_the_whole() -> None:
    weights = ModelWeights(attention=(10, 20, 30), mlp=(1, 2, 3), head=34)
    for skip_set, share in (
        (SkipSet.of(3), 1),
        (SkipSet.of(3, attention=[1], mlp=[2]), 0.77),
        (SkipSet.early_exit(3, 1), 0.45),
    ):
        assert DraftPlan.of(3, skip_layers=skip_set).share(weights.step) == share


def test_a_plan_of_another_depth_is_refused() -> None:
    weights = ModelWeights(attention=(1, 1), mlp=(1, 1), head=1)
    with pytest.raises(PlanError, match="of 3 layers and the model has 2"):
        DraftPlan(3).share(weights.step)


@pytest.mark.parametrize(
    ("tensors", "finding"),
    [
        ({"model.norm.weight": 4}, "has none"),
        ({"transformer.h.0.ssm.w": 4}, "'transformer.h.0.ssm.w' is of none"),
        ({"model.layers.0.mamba.A": 4}, "'model.layers.0.mamba.A' is of none"),
        ({"model.layers.1.mlp.w": 4}, r"has \[1\]"),
        (
            {"model.layers.0.mlp.w": 4, "mtp.layers.0.mlp.w": 4},
            "'mtp.layers.0.mlp.w' is of",
        ),
    ],
)
def test_unknown_layout_is_refused(
    tmp_path: Path, tensors: dict[str, int], finding: str
) -> None:
    with pytest.raises(CheckpointError, match=finding) as error:
        ModelWeights.from_checkpoint(write_model(tmp_path, tensors))
    assert "of a supported family" in str(error.value)


def test_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lm_head or embed_tokens"):
        ModelWeights.from_checkpoint(write_model(tmp_path, {"model.layers.0.mlp.w": 4}))


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        (b"", "header of 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x04" + bytes(7) + b"{{{{", "header is not JSON"),
        (b"\x02" + bytes(7) + b"[]", "header is not a JSON object"),
        (b"\x07" + bytes(7) + b'{"a":1}', "tensor 'a'"),
    ],
)
def test_malformed_file_is_refused(tmp_path: Path, data: bytes, finding: str) -> None:
    (tmp_path / cost.WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=finding):
        ModelWeights.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}']
)
def test_malformed_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / cost.INDEX).write_text(index)
    with pytest.raises(CheckpointError, match="index.json' is malformed"):
        cost.weight_files(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / cost.INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(CheckpointError, match="lacks b.safetensors"):
        cost.weight_files(tmp_path)


def test_expected_tokens_is_the_geometric_sum() -> None:
    assert expected_tokens(0.5, 3) == 1 + 0.5 + 0.25 + 0.125
    assert expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert expected_tokens(1.0, 4) == 5, "all accepted, and the target's own token"
    assert expected_tokens(0.0, 4) == 1, "the target's own token"
    assert expected_tokens(0.9, 0) == 1, "nothing drafted"


def test_bound_weighs_tokens_against_cost() -> None:
    assert bound(3.0, k=4, c=0.5) == 1.0
    assert bound(3.0, k=4, c=0.25) == 1.5
    assert bound(3.0, k=4, c=0.25, v=2) == 1.0
    assert bound(1.0, k=0, c=0.5) == 1.0, "without drafts it is plain decoding"


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not a percentage"):
        expected_tokens(80, 4)
    with pytest.raises(ValueError, match="v above 0"):
        bound(2.0, k=1, c=0.5, v=0)


def test_neither_torch_nor_vllm_is_imported() -> None:
    code = "import sys; import vllm_selfspec.plan.cost; " + (
        "print({'torch', 'vllm'} & set(sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "set()"
