"""A file holds what it held, or all that is new; serving goes on without either."""

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.full_disk import full_disk
from vllm_selfspec import whole_file
from vllm_selfspec.plan.exit_card import CARD_FILE, write_exit_layer
from vllm_selfspec.training.report import CURVE, write_curve
from vllm_selfspec.whole_file import WriteError, write, write_if_possible

ROOM = 1 << 20  # more than a test prints
MUCH = "x" * 2 * ROOM


def write_shard(file: Path) -> None:
    from vllm_selfspec.training.texts import Continuation, write_shard

    num = ROOM // 2
    top = np.zeros((num, 1))
    write_shard(file, [Continuation(np.zeros(num), 0, top, top, 0.0)])


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda file: write(MUCH, file),
    "bytes": lambda file: write(MUCH.encode(), file),
    "profile.json": lambda file: whole_file.write_json({"note": MUCH}, file),
    "00000.safetensors": write_shard,
    CURVE: lambda file: write_curve([0.1] * ROOM, file.parent),
    CARD_FILE: lambda file: write_head(file.parent),
}


def write_head(directory: Path) -> None:
    keys: dict[str, Any] = {"exit_layer": 1, "num_layers": 2, "model": "m"}
    keys |= {"architecture": {}, "weights": "w", "num_parameters": 1}
    write_exit_layer(directory, keys, MUCH.encode())


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_keeps_the_old_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text("old")
    with full_disk(ROOM), pytest.raises(WriteError) as error:
        WRITERS[name](file)
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file], "and nothing beside it"
    message = str(error.value)
    assert str(tmp_path) in message, "which file"
    assert "it is as it was: make room there, or choose another place" in message


def test_with_room_again_the_new_file_is_there(tmp_path: Path) -> None:
    for name in ("text", "00000.safetensors"):
        file = tmp_path / name
        with full_disk(ROOM), pytest.raises(WriteError):
            WRITERS[name](file)
        assert not file.exists()
        WRITERS[name](file)
        assert file.stat().st_size > ROOM
        assert not [*tmp_path.glob("*.partial")]


def test_an_error_of_the_writers_own_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file.replacing(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for attempt in (
        lambda: write("", tmp_path / "file" / "below"),
        lambda: whole_file.make_directory(tmp_path / "file" / "below"),
    ):
        with pytest.raises(WriteError, match="choose another place"):
            attempt()


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "link", tmp_path / "elsewhere" / "file"
    link.symlink_to(file)
    write("new", link)
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write("all", pipe)
    reader.join(30)
    assert found == ["all"]
    assert pipe.is_fifo()


def test_serving_goes_on_without_what_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(whole_file, "_logged", set())
    failed: Counter[str] = Counter()
    file = tmp_path / "f"
    with full_disk(ROOM):
        for _ in range(3):
            write_if_possible(MUCH, file, "profile", failed)
    assert failed == {"profile": 3}
    assert len(caplog.records) == 1, "logged once"
    assert "serves on without its profile" in caplog.text
    write_if_possible("new", file, "profile", failed)
    assert file.read_text() == "new"
    assert failed == {"profile": 3}


def test_a_command_that_cannot_write_says_so_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    command = [sys.executable, "-c", "from vllm_selfspec.cli.main import main; main()"]
    command += ["tune", "no/model", "--output", str(file / "profile.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (line,) = (at for at in done.stderr.splitlines() if at.startswith("Error: "))
    assert "must be a directory to write to" in line
    assert "Traceback" not in done.stderr
    assert file.read_text() == "old"
