"""`TargetModel`: as much of a model as tells plans that were found for it from others.

One rule: a checkpoint's config.json says it; neither torch nor vLLM is needed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_selfspec.plan.cost import NUM_EXPERTS, CheckpointError

# Of a config.json: what must be the same for a skip set to mean the same.
ARCHITECTURE_KEYS = (
    "architectures",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)

IN_HUB_CACHE = re.compile(r"/models--[^/]+--(?P<name>[^/]+)/snapshots/")


@dataclass(frozen=True)
class TargetModel:
    """A model that is to be drafted for.

    Attributes:
        num_layers: Decoder layers.
        name: Path or Hub name, as the user gave it.
        architecture: The values of `ARCHITECTURE_KEYS`, as far as they are known.
        has_experts: Whether MLPs are mixtures of experts.
    """

    num_layers: int
    name: str = ""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    has_experts: bool = False

    @classmethod
    def read(cls, path: Path, name: str) -> "TargetModel":
        """By the checkpoint in the directory `path`.

        Raises:
            CheckpointError: If its config.json is missing, or names neither class nor
                number of layers.
        """
        file = path / "config.json"
        try:
            config = json.loads(file.read_bytes())
            str(config["architectures"][0])
            text = {**config, **config.get("text_config", {})}  # of a multimodal model
            text["architectures"] = config["architectures"]
            key = "n_layer" if "n_layer" in text else "num_hidden_layers"  # GPT-2's
            return cls.of(int(text[key]), name, text)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise CheckpointError(
                "a model directory holds a config.json with architectures and "
                f"num_hidden_layers, but {str(file)!r} does not "
                f"({type(error).__name__}: {error}): check the path"
            ) from error

    @classmethod
    def of(cls, num_layers: int, name: str, config: Mapping[str, Any]) -> "TargetModel":
        """By its config.json, or that as vLLM holds it."""
        found = {
            key: _plain(config[key]) for key in ARCHITECTURE_KEYS if config.get(key)
        }
        if "num_attention_heads" in found:  # old configurations leave it out
            found.setdefault("num_key_value_heads", found["num_attention_heads"])
        has_experts = any(config.get(key) for key in NUM_EXPERTS)
        return cls(num_layers, name, found, has_experts)

    def differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """Where it is another architecture, in words."""
        return [
            f"{key} {_shown(self.architecture[key])} in place of {_shown(value)}"
            for key, value in wanted.items()
            if key in self.architecture and self.architecture[key] != value
        ]

    @property
    def class_name(self) -> str:
        """The model's class, as vLLM names it."""
        return str(self.architecture["architectures"][0])

    @property
    def short_name(self) -> str:
        """The last part of the name, which a copy on disk keeps."""
        of_hub = IN_HUB_CACHE.search(self.name)
        name = of_hub["name"] if of_hub else self.name.rstrip("/").rpartition("/")[2]
        return name.lower()


def weights_fingerprint(path: Path) -> str:
    """Of a checkpoint: names, shapes and types of its tensors, and the ends of files.

    Not all of it is read: 26 GB would take a minute.
    """
    found = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            found.update(content.read(1 << 20))
            content.seek(max(0, size - (1 << 20)))
            found.update(content.read())
    return found.hexdigest()[:16]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
