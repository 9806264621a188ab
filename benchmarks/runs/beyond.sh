#!/bin/sh
# Coupled drafting, evidence and the stop rule: benchmarks/results/beyond.json, .md and .png. Some two hours of one core;
# what is done is kept in out/beyond.jsonl, and a second start goes on from there.
# Usage: beyond.sh WORLDS [options of bench_beyond.py]; WORLDS is what worlds.sh made, its drafters calibrated (out/worlds)
set -eu
cd "$(dirname "$0")/../.."
worlds="${1:-out/worlds}"
[ $# -gt 0 ] && shift
exec "${PYTHON:-.venv/bin/python}" benchmarks/bench_beyond.py --seeds "$worlds/seeds" --four "$worlds/four" \
    --journal out/beyond.jsonl --output benchmarks/results/beyond.json "$@"
