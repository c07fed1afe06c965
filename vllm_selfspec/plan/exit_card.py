"""`ExitCard`: what an exit layer on disk says of itself.

One rule: a layer that is not whole, or is another target's, is refused before any of
its weights is used. Reading a card needs neither torch nor vLLM.

An exit layer is a directory with this card and `TENSORS_FILE`. The tensors have the
names they have in the target's checkpoint, with 0 for the layer's index, as if it were
a model of one layer. Norm and LM head after it are the target's.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from vllm_selfspec import whole_file
from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.keys import MAX_FILE_BYTES, Keys, describe, shown
from vllm_selfspec.plan.target_model import TargetModel, weights_fingerprint

TENSORS_FILE, CARD_FILE = "exit_layer.safetensors", "card.json"
FORMER_TENSORS_FILE = "exit_head.safetensors"  # still read
# Keys of former cards, null in all but those that cannot be served any more.
FORMER_KEYS = {
    "head_rank": "an exit layer drafts through the target's own LM head",
    "skip_layers": "an exit layer is trained on the target's first layers whole",
}


class ExitLayerError(PlanError):
    """An exit layer that is missing, damaged, or another target's."""


class ExitCard(Keys):
    """What `card.json` holds."""

    exit_layer: int = Field(
        ge=1, lt=10_000, strict=True, description="N: the target's layers before it."
    )
    num_layers: int = Field(
        ge=1, lt=10_000, strict=True, description="Decoder layers of the target."
    )
    model: str = Field(
        max_length=4096, description="Name of the target; shown, not checked."
    )
    architecture: dict[str, int | tuple[str, ...]] = Field(
        description="Of the target, by keys of its config.json; checked."
    )
    weights: str = Field(
        max_length=64, description="Fingerprint of the target's weights; checked."
    )
    num_parameters: int = Field(ge=1, strict=True, description="Trained parameters.")
    tensors: str = Field(max_length=64, description=f"SHA-256 of {TENSORS_FILE}.")
    training: dict[str, Any] = Field(
        default={}, description="How it was trained; shown, not checked."
    )

    @model_validator(mode="before")
    @classmethod
    def _without_former_keys(cls, card: Any) -> Any:
        if not isinstance(card, Mapping):
            return card
        for key, rule in FORMER_KEYS.items():
            if card.get(key) is not None:
                raise ValueError(f"{key} is {shown(card[key])}, but {rule}")
        return {key: card[key] for key in card if key not in FORMER_KEYS}

    def check_fits(self, target: TargetModel, path: Path) -> None:
        """Raises `ExitLayerError` if it was trained for another target.

        Args:
            target: The model that is to be drafted for.
            path: Its checkpoint directory, for `check_weights`.
        """
        found = target.differences(self.architecture)
        if target.num_layers != self.num_layers:
            found = [f"{target.num_layers} layers in place of {self.num_layers}"]
        self._raise_if(found)
        self.check_weights(path)

    def check_weights(self, path: Path) -> None:
        """Raises `ExitLayerError` if the checkpoint in the directory `path` has other
        weights than it was trained for. Without safetensors there is nothing to tell.
        """
        if any(path.glob("*.safetensors")):
            weights = weights_fingerprint(path)
            is_other = weights != self.weights
            words = f"weights {weights} in place of {self.weights}"
            self._raise_if([words] if is_other else [])

    def _raise_if(self, differences: list[str]) -> None:
        if differences:
            raise ExitLayerError(
                "an exit layer drafts for the very model it was trained for, which "
                f"was {shown(self.model)}, but this one has {', '.join(differences)}: "
                "train one by 'vllm-selfspec train-exit'"
            )


def read_exit_card(directory: Path) -> ExitCard:
    """Reads the card of an exit layer, and checks that it is whole.

    Args:
        directory: With `card.json` and `TENSORS_FILE`.

    Raises:
        ExitLayerError: If one of them is missing or damaged, or the card is none.
    """
    for file in (directory / CARD_FILE, tensors_file(directory)):
        if not file.is_file():
            raise ExitLayerError(
                f"an exit layer is a directory with {CARD_FILE} and {TENSORS_FILE}, "
                f"but {str(directory)!r} has no {file.name}: check the path, or train "
                "one by 'vllm-selfspec train-exit'"
            )
    file = directory / CARD_FILE
    try:
        card = ExitCard.model_validate(json.loads(_content(file)))
    except (OSError, ValueError, RecursionError) as error:
        raise ExitLayerError(
            "an exit layer's card is JSON as 'vllm-selfspec train-exit' writes it, but "
            f"{str(file)!r} is not: {describe(error)}: train it again"
        ) from error
    _check_whole(tensors_file(directory), card)
    return card


def tensors_file(directory: Path) -> Path:
    """Where an exit layer's tensors are; the file used to have another name."""
    former = directory / FORMER_TENSORS_FILE
    return former if former.is_file() else directory / TENSORS_FILE


def _content(file: Path) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has over {MAX_FILE_BYTES} bytes")
    return data


def _check_whole(file: Path, card: ExitCard) -> None:
    if card.exit_layer >= card.num_layers:
        raise ExitLayerError(
            f"an exit layer stands for the last of the target's {card.num_layers} "
            f"layers, but the card beside {str(file)!r} has it after "
            f"{card.exit_layer}: train it again"
        )
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ExitLayerError(
            f"an exit layer's tensors must be readable, but {str(file)!r} is not "
            f"({error}): check its permissions"
        ) from error
    if found != card.tensors:
        raise ExitLayerError(
            f"an exit layer's tensors are those its card was written for, with SHA-256 "
            f"{card.tensors:.16}..., but {str(file)!r} has {found:.16}...: it is "
            "damaged or half exchanged, copy or train it again"
        )


def write_exit_layer(
    directory: Path, card: Mapping[str, Any], tensors: bytes
) -> ExitCard:
    """Writes an exit layer: each file whole or not at all, the card last.

    Killed in between, it leaves tensors that the old card does not know: refused as
    damaged, never mistaken.

    Args:
        directory: Made where it is missing.
        card: The keys of `ExitCard` but `tensors`.
        tensors: Content of `TENSORS_FILE`.

    Raises:
        WriteError: If a file cannot be written.
    """
    digest = hashlib.sha256(tensors).hexdigest()
    checked = ExitCard.model_validate({**card, "tensors": digest})
    whole_file.write(tensors, tensors_file(directory))
    whole_file.write_json(checked.model_dump(), directory / CARD_FILE)
    return checked
