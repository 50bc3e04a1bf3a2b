#!/usr/bin/env bash
# The losses alone need torch >= 2.2: make an environment with that version and compare every loss with its golden
# vector there. About 3 GB of downloads, once.   bash tools/old_torch.sh [FOLDER, default .venv-old]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-old}
if [ ! -x "$folder/bin/python" ]; then
    "$(command -v python3 || command -v python)" -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check 'torch==2.2.2' 'numpy<2' scipy pytest
fi
export OMP_NUM_THREADS=1
"$folder/bin/python" -m pytest -q --noconftest -p no:cacheprovider tests/test_golden.py
