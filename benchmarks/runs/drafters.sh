#!/bin/sh
# What more drafters cost: benchmarks/results/drafters.json and drafters.png. Some five minutes on one core.
set -eu
cd "$(dirname "$0")/../.."
exec "${PYTHON:-.venv/bin/python}" benchmarks/bench_drafters.py --output benchmarks/results/drafters.json "$@"
