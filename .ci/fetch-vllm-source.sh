#!/usr/bin/env bash
# Makes .cache/vllm-source/VERSION: the Python source of the vLLM releases that are
# supported but not installed, for the tests that hold the seams and `patches/` to it.
# Of the wheel, most of it kernels, the Python files are kept. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
for version in 0.33.0; do
    target=.cache/vllm-source/$version
    [ -d "$target" ] && continue
    echo "Fetching the source of vLLM $version ..."
    wheel=$(mktemp -d)
    trap 'rm -rf "$wheel"' EXIT
    .venv/bin/python -m pip --disable-pip-version-check download -qq --no-deps \
        --no-cache-dir --only-binary :all: --dest "$wheel" "vllm==$version"
    mkdir -p "$wheel/source" "$(dirname "$target")"
    .venv/bin/python - "$wheel" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
    archive.extractall(folder / "source", names)
PYTHON
    mv "$wheel/source" "$target"  # whole or not at all
done
