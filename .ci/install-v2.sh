#!/usr/bin/env bash
# Makes .venv-v2: Triton and a stub backend for it, to be put before .venv's packages with
# PYTHONPATH. Apart from .venv, because without the interpreter the stub breaks the V1
# runner. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

echo "Installing Triton and its CPU stub ..."
rm -rf .venv-v2
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r tests/triton_cpu_stub "$build/stub"  # setuptools leaves its litter beside
pip install -qq --no-deps --no-build-isolation --target .venv-v2 \
    triton==3.9.0 "$build/stub"
date > .venv-v2/installed
