"""`Keys`: JSON that a user wrote, checked; and what is wrong with it, in one line.

One rule: a finding names the key, the value, the rule and the fix.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

MAX_FILE_BYTES = 1_000_000  # of JSON that is read
MAX_SHOWN = 100  # characters of a value in a message
MAX_FINDINGS = 3

# Of a value that may be written in several forms, the form that was meant. Pydantic
# puts it into a finding's location.
PATH, OBJECT = FORMS = ("path", "object")

# Rule and fix for what pydantic finds; its own words speak of Python's types.
RULES = {
    "int_type": "must be a whole number: write one, without quotes",
    "string_type": "must be text: put it in quotes",
    "tuple_type": "must be a list of layer indices: write one, like [3, 4]",
    "model_type": "must be a JSON object: write one, in braces",
    "literal_error": "must be {expected}: write that",
    "greater_than_equal": "must be at least {ge}: raise it",
    "less_than_equal": "must be at most {le}: lower it",
    "less_than": "must be less than {lt}: lower it",
    "string_too_long": "must have at most {max_length} characters: shorten it",
    "union_tag_not_found": "must be 'auto', 'online', the path of a JSON profile, or a "
    "skip set: "
    'write one, like {{"attention": [3], "mlp": [4]}}',
}


class Keys(BaseModel):
    """A JSON object that refuses an unknown key with the list of known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, keys: Any) -> Any:
        if isinstance(keys, Mapping):
            for key in keys:
                if key not in cls.model_fields:
                    raise ValueError(
                        f"there is no key {shown(key)}: remove it, or use one of "
                        f"{', '.join(cls.model_fields)}"
                    )
        return keys


def describe(error: Exception) -> str:
    """What was found wrong, in one line: key, value, rule and fix of each finding."""
    if not isinstance(error, ValidationError):
        return str(error) or type(error).__name__
    items = error.errors(include_url=False)
    findings = [_finding(item) for item in items[:MAX_FINDINGS]]
    if len(items) > MAX_FINDINGS:
        findings.append(f"and {len(items) - MAX_FINDINGS} more")
    return "; ".join(findings)


def _finding(item: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"] if part not in FORMS)
    if item["type"] == "value_error":  # one of our own validators: it says it all
        text = str(item["msg"]).removeprefix("Value error, ")
        return f"{key}{' ' if text.startswith('is ') else ': '}{text}" if key else text
    if item["type"] == "missing":
        return f"{key} is missing: add it"
    if item["type"] in RULES:
        rule = RULES[item["type"]].format_map(item.get("ctx", {}))
    else:
        rule = f"that is not allowed: {item['msg']}"
    return f"{key or 'the whole'} is {shown(item['input'])}, but {rule}"


def shown(value: object) -> str:
    """`value` in a message: short, however large or deeply nested it is."""
    try:
        text = _repr.repr(value)
        return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
    except ValueError:  # an int of more digits than Python converts to text
        return f"({type(value).__name__} too long to show)"


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 80
