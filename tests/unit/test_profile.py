"""Reading a profile only parses JSON and checks it; every refusal says what to do."""

import json
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_selfspec.plan.keys import MAX_FILE_BYTES, shown
from vllm_selfspec.plan.profile import ProfileError, profile_type, read_profile
from vllm_selfspec.plan.target_model import TargetModel


def refusal(path: Path) -> str:
    """The message that reading `path` is refused with."""
    with pytest.raises(ProfileError) as error:
        read_profile(path)
    message = str(error.value)
    assert "skip_layers" in message, "the key that named the profile"
    assert repr(str(path))[:40] in message, "which profile"
    return message


def refusal_of(content: str | bytes, directory: Path) -> str:
    """The message that a profile of this content is refused with."""
    path = directory / "profile.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(path)
    assert "correct it, or use skip_layers 'auto'" in message, "the fix"
    return message


def test_a_profile_says_what_to_skip_and_for_which_model(tmp_path: Path) -> None:
    content = {
        "skip_layers": {"attention": [1, 2], "mlp": [2]},
        "num_layers": 4,
        "model": "some/model",
        "note": "found by hand",
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    profile = read_profile(path)
    assert profile.skip_layers.attention == (1, 2)
    assert profile.skip_layers.mlp == (2,)
    assert (profile.num_layers, profile.model) == (4, "some/model")
    profile.check_fits(TargetModel(4))


def test_a_profile_of_another_depth_is_refused() -> None:
    profile = profile_type().model_validate(
        {"skip_layers": {}, "num_layers": 12, "model": "other/model"}
    )
    with pytest.raises(ProfileError) as error:
        profile.check_fits(TargetModel(4))
    message = str(error.value)
    assert "found for other/model" in message, "the rule"
    assert "this model has 4 layers in place of 12" in message, "the value found"
    assert "use a profile of this model, or skip_layers 'auto'" in message, "the fix"


def test_a_profile_without_a_depth_fits_any() -> None:
    profile_type().model_validate({"skip_layers": {"mlp": [1]}}).check_fits(
        TargetModel(4)
    )


def test_a_profile_of_another_architecture_is_refused_with_what_differs() -> None:
    profile = profile_type().model_validate(
        {
            "skip_layers": {"mlp": [1]},
            "architecture": {
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 32000,
            },
        }
    )
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32016}
    with pytest.raises(ProfileError, match="vocab_size 32016 in place of 32000"):
        profile.check_fits(TargetModel.of(4, "x", config))
    config = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 32000}
    with pytest.raises(ProfileError, match="Qwen3ForCausalLM in place of LlamaFor"):
        profile.check_fits(TargetModel.of(4, "x", config))
    profile.check_fits(TargetModel.of(4, "x", {"vocab_size": 32000}))


def test_a_missing_profile_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere.json")
    assert "skip_layers is 'auto', a skip set, or the path of a JSON profile" in message
    assert "No such file" in message and message.endswith("check the path")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_a_name_that_can_be_no_file_is_refused(name: str) -> None:
    assert refusal(Path(name)).endswith("check the path")


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # reading one would wait for ever
    for path in (tmp_path, fifo, Path("/dev/zero")):
        message = refusal(path)
        assert "not a regular file" in message and message.endswith("check the path")


def test_a_profile_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # sparse: a gigabyte that takes no room
    message = refusal(path)
    assert f"at most {MAX_FILE_BYTES} bytes" in message
    assert message.endswith("check the path")


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ("", "Expecting value"),
        ("skip_layers: auto", "Expecting value"),
        ("{}", "skip_layers is missing: add it"),
        ("[]", "the whole is [], but must be a JSON object: write one"),
        ("null", "the whole is None, but must be a JSON object: write one"),
        (
            '{"skip_layers": "auto"}',
            "skip_layers is 'auto', but must be a JSON object: write one",
        ),
        (
            '{"skip_layers": {"attention": 3}}',
            "skip_layers.attention is 3, but must be a list of layer indices: write",
        ),
        (
            '{"skip_layers": {"mlp": ["3"]}}',
            "skip_layers.mlp.0 is '3', but must be a whole number: write one",
        ),
        (
            '{"skip_layers": {"mlp": [1, true]}}',
            "skip_layers.mlp.1 is True, but must be a whole number: write one",
        ),
        (
            '{"skip_layers": {"mlp": [NaN]}}',
            "skip_layers.mlp.0 is nan, but must be a whole number: write one",
        ),
        (
            '{"skip_layers": {"mlp": [-1]}}',
            "skip_layers.mlp.0 is -1, but must be at least 0: raise it",
        ),
        (
            '{"skip_layers": {"mlp": [99999]}}',
            "skip_layers.mlp.0 is 99999, but must be less than 10000: lower it",
        ),
        (
            '{"skip_layers": {"attn": [1]}}',
            "skip_layers: there is no key 'attn': remove it, or use one of "
            "attention, mlp",
        ),
        (
            '{"skip_layers": {}, "layers": 4}',
            "there is no key 'layers': remove it, or use one of num_layers, "
            "model, architecture, note, figures, provenance, skip_layers, "
            "trained_exit_layer",
        ),
        (
            '{"skip_layers": {}, "num_layers": "4"}',
            "num_layers is '4', but must be a whole number: write one",
        ),
        (
            '{"skip_layers": {}, "num_layers": true}',
            "num_layers is True, but must be a whole number: write one",
        ),
        (
            '{"skip_layers": {}, "model": 4}',
            "model is 4, but must be text: put it in quotes",
        ),
        (
            '{"skip_layers": {"mlp": [1], "mlp": [2]}}',
            "key 'mlp' is written twice: remove one",
        ),
    ],
)
def test_a_malformed_profile_is_refused_by_key_value_rule_and_fix(
    content: str, finding: str, tmp_path: Path
) -> None:
    assert finding in refusal_of(content, tmp_path)


def test_a_flood_of_findings_makes_a_short_message(tmp_path: Path) -> None:
    content = json.dumps({"skip_layers": {"mlp": ["x"] * 100_000}})
    message = refusal_of(content, tmp_path)
    assert "and 99997 more" in message
    assert len(message) < 1000


def test_a_flood_of_equal_keys_is_refused_at_once(tmp_path: Path) -> None:
    # Were it quadratic in the number of keys, this would take minutes.
    pairs = ",".join(f'"{i}":1' for i in range(90_000))
    assert "'7' is written twice" in refusal_of(f'{{{pairs},"7":1}}', tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 400_000,
        '{"a":' * 150_000,
        '{"skip_layers": ' + "[" * 900 + "]" * 900 + "}",
    ],
    ids=["lists", "objects", "closed lists"],
)
def test_deep_nesting_is_refused_and_exhausts_no_stack(
    content: str, tmp_path: Path
) -> None:
    assert len(refusal_of(content, tmp_path)) < 1000


def test_a_number_of_5000_digits_is_refused(tmp_path: Path) -> None:
    # Python itself refuses to convert it, which keeps parsing from being quadratic.
    content = '{"skip_layers": {"mlp": [' + "9" * 5000 + "]}}"
    assert "digits" in refusal_of(content, tmp_path)


class _Canary:
    """Unpickling it would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_profile_is_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    command = f"__import__('os').mkdir({str(canary)!r})"
    hostile: list[str | bytes] = [
        pickle.dumps(_Canary(canary)),
        f"!!python/object/apply:os.mkdir [{str(canary)!r}]",
        command,
        json.dumps({"skip_layers": command}),
        json.dumps({"skip_layers": {"mlp": [command]}}),
        json.dumps({"skip_layers": {}, "__class__": command}),
        json.dumps({"skip_layers": {"__reduce__": ["os.mkdir", [str(canary)]]}}),
        json.dumps({"skip_layers": {}, "num_layers": {"$eval": command}}),
    ]
    for content in hostile:
        refusal_of(content, tmp_path)
        assert not canary.exists(), f"executed: {content!r}"
    pickle.loads(hostile[0])  # type: ignore[arg-type]
    assert canary.exists(), "the canary must be one that would have shown it"


def test_a_value_in_a_message_is_short_whatever_it_is() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value in ("x" * 10**6, list(range(10**6)), nested, {"k": nested}, 10**5000):
        assert len(shown(value)) < 200


WRITING = """
import sys
from pathlib import Path
from vllm_selfspec import whole_file
layers = list(range(2000))
while True:  # long enough that a kill comes within
    for mlp in (layers, layers[:1]):
        document = {"skip_layers": {"mlp": mlp}, "num_layers": 2001}
        whole_file.write_json(document, Path(sys.argv[1]))
"""


def test_a_profile_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    chance = random.Random(0)
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITING, str(file)])
        deadline = time.monotonic() + 30
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.05))
        writer.kill()
        writer.wait()
        assert len(read_profile(file).skip_layers.mlp) in (1, 2000)
        file.unlink()
