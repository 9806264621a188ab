#!/bin/sh
# Where a decode step's time goes: benchmarks/results/decode.json and decode.png. Under a minute on one core.
set -eu
cd "$(dirname "$0")/../.."
exec "${PYTHON:-.venv/bin/python}" benchmarks/bench_decode.py --output benchmarks/results/decode.json "$@"
