"""`ModelWeights`: what a decode step reads, and the speed-up that follows from it.

One rule: only the headers of a checkpoint are read, never a weight; torch and vLLM are
not needed.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_selfspec.plan.families import FAMILIES
from vllm_selfspec.plan.step_cost import StepCost

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# The limit of the safetensors library itself; a header is parsed whole.
MAX_HEADER_BYTES = 100_000_000

# Every family's names: a checkpoint is read before it is known whether its family can
# draft, and of those that cannot many are called like these.
CHECKPOINTS = tuple({family.checkpoint: None for family in FAMILIES.values()})
SUBLAYER_OF = {
    name: sublayer
    for one in CHECKPOINTS
    for sublayer, names in (("attention", one.attention), ("mlp", one.mlp))
    for name in names
}
EMBEDDINGS = tuple({one.embedding: None for one in CHECKPOINTS})
HEADS = tuple({one.head: None for one in CHECKPOINTS})
LAST_NORMS = tuple({one.last_norm: None for one in CHECKPOINTS})
POSITIONS = tuple({one.positions: None for one in CHECKPOINTS if one.positions})
LISTS = {re.escape(one.layers): None for one in CHECKPOINTS}
LAYER = re.compile(
    rf"(?:.+\.)?(?:{'|'.join(LISTS)})"
    r"\.(?P<index>\d+)\.(?P<part>[^.]+)\."
)
OUTSIDE_LAYERS = re.compile(
    rf"(?:.+\.)?(?P<part>{'|'.join([*EMBEDDINGS, *HEADS, *LAST_NORMS, *POSITIONS])})\."
)
# Granite's are rows of two tensors.
EXPERT = re.compile(r"\.experts?\.|\.block_sparse_moe\.(?:in|out)put_linear\.")
# What turns images or audio into embeddings runs once a prompt.
TOWER = re.compile(r"(?:vision_tower|audio_tower|multi_modal_projector)\.")
# How many experts a model has, as families call it.
NUM_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
# Of a matrix that is not quantised, by its type.
WEIGHT_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}
NUM_CHOSEN = ("num_experts_per_tok", "moe_k")  # of them for a token


class CheckpointError(ValueError):
    """A checkpoint that cannot be found or read, or whose parts are not known."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of one of its tensors.

    Attributes:
        num_bytes: Of its data.
        dtype: As safetensors names it, "BF16"; empty where it is not said.
        shape: One number per dimension.
    """

    num_bytes: int
    dtype: str = ""
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "TensorHeader":
        """By its entry in the header's JSON.

        Raises:
            TypeError: If the entry is of another form.
            KeyError: If it does not say where the data lies.
            ValueError: If one of its numbers is none.
        """
        begin, end = entry["data_offsets"]
        shape = tuple(int(size) for size in entry.get("shape", ()))
        return cls(int(end) - int(begin), str(entry.get("dtype", "")), shape)


@dataclass(frozen=True)
class ModelWeights:
    """Bytes that one decode step streams from memory, by part.

    Of the embedding a step reads one row per request, so it counts only where it is
    the LM head too. Of experts as many count as one token runs through. Quantised
    weights count with their scales.

    Attributes:
        attention: Attention sublayer and the norm before it, by layer.
        mlp: MLP sublayer and the norm before it, by layer.
        head: Final norm and LM head.
        weight_bytes: Bytes of one weight of a matrix; 0 where they are quantised.
        has_experts: Whether MLPs are mixtures of experts.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    head: int
    weight_bytes: float = 2.0
    has_experts: bool = False

    @classmethod
    def from_checkpoint(cls, path: Path) -> "ModelWeights":
        """Adds up the headers of the safetensors files in the directory `path`.

        Raises:
            CheckpointError: If there are none, or a tensor's part is not known.
        """
        return cls.from_headers(read_headers(weight_files(path)), path)

    @classmethod
    def from_headers(
        cls, headers: Mapping[str, TensorHeader], path: Path
    ) -> "ModelWeights":
        """Adds up these tensors of the model whose config.json is in `path`.

        Raises:
            CheckpointError: If a tensor's part is not known, or one is missing.
        """
        sizes: Counter[tuple[str, int]] = Counter()
        expert_share = _expert_share(path)
        for name, header in headers.items():
            if TOWER.match(name):
                continue
            share = expert_share if EXPERT.search(name) else 1.0
            sizes[_part_of(name)] += round(share * header.num_bytes)
        indices = range(_num_layers(path, sizes))
        # Tied embeddings: the head is the embedding.
        head, tied, norm = (
            sum(sizes[part, 0] for part in parts)
            for parts in (HEADS, EMBEDDINGS, LAST_NORMS)
        )
        if not head + tied:
            raise CheckpointError(
                f"a checkpoint must hold lm_head or {' or '.join(EMBEDDINGS)}, but "
                f"{str(path)!r} has neither: use a complete checkpoint"
            )
        return cls(
            attention=tuple(sizes["attention", i] for i in indices),
            mlp=tuple(sizes["mlp", i] for i in indices),
            head=(head or tied) + norm,
            weight_bytes=_weight_bytes(headers),
            has_experts=any(map(EXPERT.search, headers)),
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.attention)

    @property
    def step(self) -> StepCost:
        """The bytes that one decode step of the whole model reads."""
        return StepCost(
            self.attention,
            self.mlp,
            self.head,
            weight_bytes=self.weight_bytes,
            has_experts=self.has_experts,
        )

    @property
    def streamed(self) -> int:
        """All of them."""
        return sum(self.attention) + sum(self.mlp) + self.head


def _part_of(name: str) -> tuple[str, int]:
    """The part that tensor `name` belongs to, and its layer (0 for parts outside)."""
    if (layer := LAYER.match(name)) and layer["part"] in SUBLAYER_OF:
        return SUBLAYER_OF[layer["part"]], int(layer["index"])
    if outside := OUTSIDE_LAYERS.match(name):
        return outside["part"], 0
    raise CheckpointError(
        f"every tensor must be part of a layer's {', '.join(SUBLAYER_OF)}, or of "
        f"the LM head, last norm or embedding, but {name!r} is of none: use a "
        "checkpoint of a supported family"
    )


def _weight_bytes(headers: Mapping[str, TensorHeader]) -> float:
    """Of the widest matrix of a layer; 0 if one is quantised."""
    types = {
        header.dtype
        for name, header in headers.items()
        if LAYER.match(name) and len(header.shape) > 1
    }
    if not types <= WEIGHT_BYTES.keys():
        return 0.0
    return max((WEIGHT_BYTES[name] for name in types), default=2.0)


def _expert_share(path: Path) -> float:
    """Of its experts, how many a token runs through."""
    try:
        config = json.loads((path / "config.json").read_bytes())
        num = next(int(config[key]) for key in NUM_EXPERTS if key in config)
        return next(int(config[key]) for key in NUM_CHOSEN if key in config) / num
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return 1.0


def _num_layers(path: Path, parts: Iterable[tuple[str, int]]) -> int:
    found = {index for part, index in parts if part in SUBLAYER_OF.values()}
    if not found or max(found) + 1 != len(found):
        raise CheckpointError(
            f"a checkpoint must hold layers 0 to N-1, as 'model.layers.0.mlp', but "
            f"{str(path)!r} has {sorted(found) or 'none'}: use a complete checkpoint "
            "of a supported family"
        )
    return len(found)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory: one, or those its index names.

    Raises:
        CheckpointError: If there are none, or one is missing.
    """
    if (path / INDEX).is_file():
        shards = sorted(set(_index(path / INDEX).values()))
    else:
        shards = [WEIGHTS]
    files = [path / shard for shard in shards]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"a checkpoint directory holds {WEIGHTS}, or {INDEX} and its shards, but "
            f"{str(path)!r} lacks {missing[0]}: check the path, or convert the weights "
            "to safetensors"
        )
    return files


def _index(file: Path) -> dict[str, str]:
    """Tensor name to shard; a shard outside the checkpoint's directory is refused."""
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
        shards = dict(weight_map)
        is_valid = shards and all(
            isinstance(s, str) and Path(s).name == s for s in shards.values()
        )
    except (ValueError, TypeError, KeyError) as error:
        raise _malformed(file, f"{type(error).__name__}: {error}") from error
    if not is_valid:
        raise _malformed(file, "weight_map does not name files beside it")
    return shards


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Every tensor in these safetensors files, by name.

    Raises:
        CheckpointError: If a file's header is not valid.
    """
    found = {}
    for file in files:
        for name, entry in _header(file).items():
            if name == "__metadata__":
                continue
            try:
                found[name] = TensorHeader.of(entry)
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise _malformed(file, f"tensor {name!r:.80}") from error
    return found


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """The header: 8 bytes of length, little-endian, then JSON of that length."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise _malformed(file, f"header of {length} bytes")
        data = stream.read(length)
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _malformed(file, "header is not JSON") from error
    if not isinstance(header, dict):
        raise _malformed(file, "header is not a JSON object")
    return header


def _malformed(file: Path, finding: str) -> CheckpointError:
    hint = " (a Git LFS pointer?)" if file.stat().st_size < 1000 else ""
    return CheckpointError(
        f"a checkpoint's files must be whole, but {str(file)!r} is malformed"
        f"{hint}: {finding}: download it again"
    )


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens one verification of `k` draft tokens emits on average.

    `(1 - a^(k+1)) / (1 - a)`: Leviathan et al. 2023 (arXiv 2211.17192), equation 1,
    which takes each draft token to be accepted with the same probability `a`.

    Raises:
        ValueError: If `acceptance` is no probability or `k` is negative.
    """
    if not 0 <= acceptance <= 1 or k < 0:
        raise ValueError(
            "acceptance must be between 0 and 1 and k at least 0, but they are "
            f"{acceptance} and {k}: pass a share, not a percentage"
        )
    return float(sum(acceptance**i for i in range(k + 1)))


def bound(tokens_per_verification: float, k: int, c: float, v: float = 1.0) -> float:
    """The most that drafting can speed up decoding: `E / (v + k * c)`.

    Plain decoding pays one target step per token. A verification and its `k` draft
    steps pay `v + k * c` of those for `E` tokens (Leviathan et al. 2023, theorem 3.8,
    with `v` = 1).

    Args:
        tokens_per_verification: `E`, measured or from `expected_tokens`.
        k: Draft tokens per verification.
        c: Cost of a draft step over a target step; while decoding is bound by memory,
            `ModelWeights.draft_share`.
        v: Cost of verifying `k + 1` tokens over decoding one; about 1 while decoding is
            bound by memory.

    Raises:
        ValueError: If a cost or `k` is negative, or `v` is 0.
    """
    if k < 0 or c < 0 or v <= 0:
        raise ValueError(
            "k and c must be at least 0 and v above 0, but they are "
            f"{k}, {c} and {v}: costs are shares of one target step"
        )
    return tokens_per_verification / (v + k * c)


def decimal(num_bytes: int) -> str:
    """`1_073_844_224` as `1.07 GB`."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    num_decimals = max(3 - len(str(int(size))), 0) if units[0] != "B" else 0
    return f"{size:.{num_decimals}f} {units[0]}"
