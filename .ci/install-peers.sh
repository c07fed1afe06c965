#!/usr/bin/env bash
# Adds arctic-inference to .venv, which vLLM's suffix decoding needs: a peer in `make
# bench`. It is built from source, and needs a C++ compiler and Python's headers; without
# it the benchmark leaves that peer out. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

echo "Building arctic-inference, about a minute ..."
pip install -qq --no-deps cmake==4.4.4 grpcio-tools==1.85.1 nanobind==3.1.0
headers=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
# In a virtual environment CMake finds the interpreter, but not its headers.
CMAKE_ARGS="-DPython_EXECUTABLE=$PWD/.venv/bin/python -DPython_INCLUDE_DIR=$headers" \
    pip install -qq --no-deps --no-build-isolation arctic-inference==0.3.0
date > .venv/peers
