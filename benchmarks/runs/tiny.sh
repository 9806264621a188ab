#!/bin/sh
# Re-makes the tiny world: corpus, tokenizer, target and specialist drafters, with recipe.json beside them.
# Under 20 minutes on 2 cores. Usage: benchmarks/runs/tiny.sh [folder] (default: out/tiny; the shipped models stay).
set -eu
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
exec "$python" -m taps_ext.tiny.recipe --output "${1:-out/tiny}"
