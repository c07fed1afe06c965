"""Models on the Hugging Face Hub, for which a server of ours stands in."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from vllm_selfspec.plan.cost import CheckpointError, ModelWeights
from vllm_selfspec.plan.hub import locate

COMMIT = "0" * 39 + "1"
NAMES = [
    f"model.layers.{i}.{part}.weight"
    for i in range(4)
    for part in ("self_attn.q_proj", "mlp.up_proj")
]
MATRIX_BYTES = 1 << 20
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as lists one repository's files and sends them, in parts."""

    repository: ClassVar[Path]
    sent: ClassVar[dict[str, int]]

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        """Size and commit of a file."""
        self.answer(with_body=False)

    def do_GET(self) -> None:
        """A file, part of one, or the list of all."""
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        """Says 404 of what there is not."""
        if self.path.startswith("/api/models/nobody/model"):
            files = sorted(self.repository.iterdir())
            about: Any = {"id": "nobody/model", "sha": COMMIT}
            about["siblings"] = [{"rfilename": file.name} for file in files]
            if "/tree/" in self.path:
                keys = {"type": "file", "size": 1, "oid": ""}
                about = [{"path": file.name, **keys} for file in files]
            self.send(json.dumps(about).encode(), with_body=with_body)
            return
        found = re.fullmatch(r"/nobody/model/resolve/\w+/([\w.-]+)", self.path)
        file = self.repository / found[1] if found else None
        if file is None or not file.is_file():
            self.send(b"", with_body=False, status=404, error="EntryNotFound")
            return
        data, status = file.read_bytes(), 200
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data, status = data[int(part[1]) : int(part[2]) + 1], 206
        if with_body:
            self.sent[file.name] = self.sent.get(file.name, 0) + len(data)
        self.send(data, with_body=with_body, status=status)

    def send(
        self, data: bytes, *, with_body: bool, status: int = 200, error: str = ""
    ) -> None:
        """One answer; `error` is the Hub's own word for what is wrong."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    Hub.repository = tmp_path / "repository"
    Hub.repository.mkdir()
    Hub.sent = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def write_weights(file: Path, names: list[str]) -> None:
    """A safetensors file of zeros."""
    shape = [MATRIX_BYTES // 1024, 512]
    header = {
        name: {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [i * MATRIX_BYTES, (i + 1) * MATRIX_BYTES],
        }
        for i, name in enumerate(names)
    }
    data = json.dumps(header).encode()
    size = len(data).to_bytes(8, "little")
    file.write_bytes(size + data + bytes(len(names) * MATRIX_BYTES))


def write_model(path: Path, *, in_shards: bool) -> None:
    """A Llama of four layers: one file of weights, or two and their index."""
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4}
    (path / "config.json").write_text(json.dumps(config))
    if not in_shards:
        write_weights(path / "model.safetensors", [*NAMES, "lm_head.weight"])
        return
    write_weights(path / SHARDS[0], NAMES)
    write_weights(path / SHARDS[1], ["lm_head.weight"])
    shard_of = {**dict.fromkeys(NAMES, SHARDS[0]), "lm_head.weight": SHARDS[1]}
    index = {"metadata": {}, "weight_map": shard_of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def show(
    hub: ThreadingHTTPServer, home: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """`vllm-selfspec show` of the model there, with a cache of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_selfspec.cli", "show", "nobody/model", "--json"],
        env={
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            **more,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("in_shards", [False, True])
def test_show_downloads_headers_and_no_weights(
    hub: ThreadingHTTPServer, tmp_path: Path, in_shards: bool
) -> None:
    write_model(Hub.repository, in_shards=in_shards)
    done = show(hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    weights = ModelWeights.from_checkpoint(Hub.repository)
    assert found["streamed_bytes"]["total"]["target"] == weights.streamed
    assert found["num_layers"] == 4
    sent = sum(n for name, n in Hub.sent.items() if name.endswith(".safetensors"))
    assert 0 < sent < MATRIX_BYTES


def test_show_reads_weights_of_the_cache_without_a_network(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    write_model(Hub.repository, in_shards=False)
    cached = tmp_path / "home" / "hub" / "models--nobody--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    Hub.repository.rename(cached / "snapshots" / COMMIT)
    done = show(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_layers"] == 4


def test_repository_without_safetensors_is_refused(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    write_model(Hub.repository, in_shards=False)
    (Hub.repository / "model.safetensors").rename(Hub.repository / "model.bin")
    done = show(hub, tmp_path / "home")
    assert done.returncode == 1
    assert "must be safetensors files, but 'nobody/model' has none" in done.stderr


def test_locate_returns_a_local_directory(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["nobody/nothing", "/no/such/place", "a b"])
def test_locate_says_what_to_do_when_there_is_no_such_model(model: str) -> None:
    with pytest.raises(CheckpointError, match="check the name") as error:
        locate(model)
    assert model in str(error.value)
