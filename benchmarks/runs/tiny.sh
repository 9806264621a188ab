#!/bin/sh
# Re-makes the embedded drafters, bit for bit the shipped weights on one kind of processor, and measures them and all that
# were tried beside them: 17 minutes of one core. Usage: tiny.sh [folder] (out/tiny; the shipped models stay).
# The target is the shipped one, which an earlier order of the texts made; NEW_TARGET=1 trains another: 15 minutes more.
set -eu
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
folder="${1:-out/tiny}"
keep=
if [ -z "${NEW_TARGET:-}" ]; then
    mkdir -p "$folder"
    cp -r taps_ext/assets/target taps_ext/assets/recipe.json "$folder"
    keep=--keep-target
fi
PYTHONPATH=benchmarks "$python" -m worlds.recipe --output "$folder" $keep
exec "$python" benchmarks/bench_tiny_training.py "$folder" --output "$folder/tiny_training.json"
