#!/usr/bin/env bash
# All benchmarks, on a machine that does nothing else: bash benchmarks/run.sh [--quick]
# Writes results/benchmarks-losses.json, -trainer.json and -images.json, and refreshes docs/speed.md.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -m benchmarks.losses "$@" --out results/benchmarks-losses.json
"$PYTHON" -m benchmarks.trainer "$@" --out results/benchmarks-trainer.json
"$PYTHON" -m benchmarks.images --out results/benchmarks-images.json
"$PYTHON" -m report refresh
