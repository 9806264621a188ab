#!/bin/sh
# What packed weights save on a CPU with the target in directory $1: benchmarks/results/products.json and products.md.
# The published run's target is SmolLM2-135M-Instruct, which takes some three minutes on one core.
set -eu
target=$1
shift
exec "${PYTHON:-.venv/bin/python}" "$(dirname "$0")/../bench_products.py" "$target" \
    --output "$(dirname "$0")/../results/products.json" "$@"
