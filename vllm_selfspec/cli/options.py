"""What the values of options mean, wherever several commands take them."""

import json
from typing import Any

from vllm_selfspec.config import ConfigError


def numbers(flag: str, text: str, kind: type, least: float) -> list[Any]:
    """The numbers of a list such as `1,4,8`.

    Raises:
        ConfigError: If it is none, or holds one below `least`.
    """
    try:
        found = [kind(piece) for piece in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{flag} takes numbers such as 1,4,8, but {text!r} is not: separate them "
            "with commas"
        ) from error
    if min(found) < least:
        raise ConfigError(
            f"{flag} takes numbers from {least}, but {text!r} holds {min(found)}: "
            "leave it out"
        )
    return found


def method_groups(text: str) -> list[str]:
    """The methods to compare, of a list such as `selfspec,ngram`.

    Raises:
        ConfigError: If one is not known.
    """
    from vllm_selfspec.bench.methods import GROUPS

    found = [piece.strip() for piece in text.split(",")]
    for piece in found:
        if piece not in GROUPS:
            raise ConfigError(
                f"--methods takes {', '.join(GROUPS)}, but it holds {piece!r}: "
                "correct it"
            )
    return found


def parse_exit_layer(text: str) -> int | None:
    """N, or None for `auto`.

    Raises:
        ConfigError: If it is neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ConfigError(
            f"--exit-layer takes a number of layers or auto, but it is {text!r}: "
            "correct it"
        )
    return int(text)


def parse_skip_layers(text: str) -> Any:
    """What `--skip-layers` means: a JSON object, else a word or a path.

    Raises:
        ConfigError: If it starts like JSON and is none.
    """
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "--skip-layers takes 'auto', a path, or JSON like "
            f'{{"attention": [3], "mlp": [4]}}, but {text!r:.80} is not JSON '
            f"({error}): put it in single quotes for the shell"
        ) from error


def json_object(option: str, text: str) -> dict[str, Any]:
    """What an option's value means that is a JSON object.

    Raises:
        ConfigError: If it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{option} takes a JSON object such as '{{\"exit_layer\": 3}}', but it is "
            f"{text!r:.80}: correct it, in single quotes for the shell"
        )
    return found
