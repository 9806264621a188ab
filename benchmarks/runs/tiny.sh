#!/bin/sh
# Re-makes the tiny world: corpus, tokenizer, target and specialist drafters, with recipe.json beside them.
# 11 minutes on 2 cores, bit for bit the shipped files there. Usage: tiny.sh [folder] (out/tiny; the shipped models stay).
set -eu
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
exec "$python" -m taps_ext.tiny.recipe --output "${1:-out/tiny}"
