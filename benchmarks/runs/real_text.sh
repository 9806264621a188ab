#!/bin/sh
# TAPS on real text, from nothing: a small target, EAGLE-2 and HASS drafters on math, on chat, on half of each and on
# all of both, from three seeds, evaluated on MT-Bench, GSM8K, MATH-500 and SVAMP. What is there already is kept, and
# what was stopped goes on, so that it can be run a piece at a time; some 100 minutes of 2 cores in all.
#
# Usage: real_text.sh DATA [FOLDER [STAGE...]]     FOLDER is out/real_text, the stages are target, drafters, evaluate, report
#   DATA/train/{math,chat}.jsonl: conversations; DATA/eval/{mt_bench,gsm8k,math500,svamp}.jsonl: questions
#   JOBS=2 drafters are trained at a time, and as many processes evaluate; STEPS=300 updates of a specialist
#   TARGET_OPTIONS is for real_text_target.py: on a GPU '--hidden-size 768 --layers 12 --steps 4000' is 100 million
set -eu
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
data="$(cd "$1" && pwd)"
folder="${2:-$root/out/real_text}"
jobs="${JOBS:-2}"
steps="${STEPS:-300}"
self="$root/benchmarks/runs/$(basename "$0")"
shift
[ $# -eq 0 ] || shift
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

math="$data/train/math.jsonl"
chat="$data/train/chat.jsonl"

# A drafter: METHOD SEED NAME. An update of HASS takes more than twice the time, so that it gets half as many. `half` sees
# as much text as a specialist, half of it math; `full` as much of each as its specialist: the paper's two mixtures.
train_drafter() {
    run="$folder/drafters/$1/$2/$3"
    updates=$steps
    [ "$1" = hass ] && updates=$((updates / 2))
    case "$3" in
    math) sources="[$math]" ;;
    chat) sources="[$chat]" ;;
    *) sources="[{path: $math, weight: 1}, {path: $chat, weight: 1}]" ;;
    esac
    [ "$3" = full ] && updates=$((updates * 2))
    calibrate=false # only the first seed is sampled from
    [ "$2" = 1 ] && calibrate=true
    [ -e "$run/done" ] && return
    OMP_NUM_THREADS=1 "$python" -m taps_ext train target="$folder/target" target_dtype=bfloat16 output="$run" \
        objective.name="$1" "data.sources=$sources" data.max_length=512 data.validation=64 training.seed="$2" \
        training.steps=$updates training.batch_size=16 training.learning_rate=8e-3 training.warmup_steps=30 \
        training.clip_norm=1.0 training.clip_value=null training.precision=bf16 training.calibrate=$calibrate \
        training.validate_every=$updates training.log_every=50 >"$run.log" 2>&1 || { cat "$run.log" >&2; exit 1; }
    touch "$run/done"
    grep 'held out' "$run.log" | sed "s|^|$1 $3, seed $2: |"
}

if [ "${1:-}" = train-one ]; then
    train_drafter "$2" "$3" "$4"
    exit
fi

stage_target() {
    # shellcheck disable=SC2086 # options are words
    "$python" "$root/benchmarks/real_text_target.py" "$math" "$chat" --output "$folder/target" ${TARGET_OPTIONS:-}
}

stage_drafters() {
    for seed in 1 2 3; do
        for method in eagle2 hass; do
            mkdir -p "$folder/drafters/$method/$seed"
            for name in full chat half math; do
                echo "$data $folder train-one $method $seed $name"
            done
        done
    done | STEPS=$steps xargs -P "$jobs" -L 1 sh "$self"
}

[ $# -gt 0 ] || set -- target drafters evaluate report
for stage in "$@"; do
    echo "$stage: $(date -u +%H:%M)"
    "stage_$stage"
done
