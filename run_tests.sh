#!/usr/bin/env bash
# Install what the tests need (once) and run them: bash run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1    # several processes with several threads each starve one another

need='import torch, torchvision, numpy, scipy, tqdm, matplotlib, pytest, xdist, tensorboard, h5py, safetensors, importlib.metadata
assert importlib.metadata.version("ruff") == "0.17.5"
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)'
for PYTHON in "$(command -v python3 || true)" "$(command -v python || true)" .venv/bin/python; do
    if [ -n "$PYTHON" ] && "$PYTHON" -c "$need" 2>/dev/null; then break; fi
    PYTHON=
done
if [ -z "$PYTHON" ]; then
    echo 'installing requirements into .venv (once; PyTorch is large) ...'
    [ -x .venv/bin/python ] || "$(command -v python3 || command -v python)" -m venv .venv
    PYTHON=.venv/bin/python
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
fi
exec "$PYTHON" -m pytest -rs -n 2 --dist worksteal "$@"
