#!/bin/sh
# The headline ratios of the ops: benchmarks/results/ops.json. Some ten seconds on one core.
set -eu
cd "$(dirname "$0")/../.."
exec "${PYTHON:-.venv/bin/python}" benchmarks/bench_ops.py --output benchmarks/results/ops.json "$@"
