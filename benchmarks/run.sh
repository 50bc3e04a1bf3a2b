#!/usr/bin/env bash
# The benchmarks of losses, whole trainings and made images, on a machine that does nothing else:
#   bash benchmarks/run.sh [--quick]
# Writes results/benchmarks-losses.json, -trainer.json and -images.json, and refreshes docs/speed.md. The others
# (steps, side_by_side, lm, ...) have their command in their file, results/benchmarks-*.json, under "command".
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -m benchmarks.losses "$@" --out results/benchmarks-losses.json
"$PYTHON" -m benchmarks.trainer "$@" --out results/benchmarks-trainer.json
"$PYTHON" -m benchmarks.images --out results/benchmarks-images.json
"$PYTHON" -m report refresh
