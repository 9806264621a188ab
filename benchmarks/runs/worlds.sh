#!/bin/sh
# Makes what several drafters are measured on, in a folder beside the shipped models; what is there already is kept.
#   seeds/  the shipped target, with the shipped kind of specialists from three seeds: drafters/<seed>/<domain>
#   four/   a world of four domains, whose target changes the subject where a user does, with two kinds of specialists:
#           drafters/<domain>, drafters/<domain>-hass
# Some 50 minutes of one core, 30 of them for the target of four/. Usage: worlds.sh [folder] (out/worlds)
set -eu
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
folder="${1:-out/worlds}"

# make_world NAME OPTION...: from its target on, if that is all there is; a world with drafters is whole.
make_world() {
    world="$folder/$1"
    shift
    [ -d "$world/drafters" ] && return
    rm -rf "$world/texts" "$world/runs"
    keep=
    [ -f "$world/recipe.json" ] && keep=--keep-target
    PYTHONPATH=benchmarks "$python" -m worlds.recipe --output "$world" $keep "$@"
}

mkdir -p "$folder/seeds"
[ -f "$folder/seeds/recipe.json" ] || cp -r taps_ext/assets/target taps_ext/assets/recipe.json "$folder/seeds"
make_world seeds --methods eagle2 --seeds 1 2 3
make_world four --domains math chat code tables --switching 4000 --target-steps 8000 --methods eagle2 hass
exec "$python" benchmarks/bench_tiny_training.py "$folder/four" --output "$folder/four/tiny_training.json"
