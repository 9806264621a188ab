#!/bin/sh
# Every op, size and type: benchmarks/results/ops_grid.json. Under a minute on one core.
set -eu
cd "$(dirname "$0")/../.."
exec "${PYTHON:-.venv/bin/python}" benchmarks/bench_ops.py --grid --output benchmarks/results/ops_grid.json "$@"
