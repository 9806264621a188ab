#!/bin/sh
# TAPS on real text, from nothing: a small target, EAGLE-2 and HASS drafters on math, on chat, on half of each and on
# all of both, from three seeds, evaluated on MT-Bench, GSM8K, MATH-500 and SVAMP. What is there already is kept, and
# what was stopped goes on, so that it can be run a piece at a time. On 2 cores the target takes half an hour, the
# drafters take one to two, and the evaluation one and a half to two.
#
# Usage: real_text.sh DATA [FOLDER [STAGE...]]     FOLDER is out/real_text, the stages are target, drafters, evaluate, report
#   DATA/train/{math,chat}.jsonl: conversations; DATA/eval/{mt_bench,gsm8k,math500,svamp}.jsonl: questions
#   JOBS=2 drafters are trained at a time, and as many processes evaluate; STEPS=300 updates of a specialist
#   TARGET_OPTIONS is for real_text_target.py: on a GPU '--hidden-size 768 --layers 12 --steps 4000' is 100 million
set -eu
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
case "$python" in /*) ;; */*) python="$PWD/$python" ;; esac
[ $# -gt 0 ] || { echo "usage: real_text.sh DATA [FOLDER [STAGE...]]" >&2; exit 2; }
data="$(cd "$1" && pwd)"
mkdir -p "${2:-$root/out/real_text}"
folder="$(cd "${2:-$root/out/real_text}" && pwd)"
cd "$root" # python -m takes modules from where it stands before all others
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
    # shellcheck disable=SC2086 # three words
    train_drafter $2
    exit
fi

stage_target() {
    # shellcheck disable=SC2086 # options are words
    "$python" "$root/benchmarks/real_text_target.py" "$math" "$chat" --output "$folder/target" ${TARGET_OPTIONS:-}
}

stage_drafters() {
    for which in 'eagle2 1' 'hass 1' 'eagle2 2' 'eagle2 3' 'hass 2' 'hass 3'; do
        mkdir -p "$folder/drafters/${which% *}/${which#* }"
        for name in full chat half math; do
            echo "$which $name"
        done
    done | STEPS=$steps xargs -P "$jobs" -I '{}' sh "$self" "$data" "$folder" train-one '{}'
}

# evaluate RESULTS METHOD SEED LABEL OPTION...: with the drafters of that method and seed.
evaluate() {
    results="$folder/results/$1" drafters="$folder/drafters/$2/$3" label="$4"
    shift 4
    # shellcheck disable=SC2086 # launchers are words
    OMP_NUM_THREADS=1 ${LAUNCH:-"$python" -m torch.distributed.run --nproc-per-node "$jobs" --master-port 29517 -m} \
        taps_ext evaluate --target "$folder/target" --dtype float32 --label "$label" --output "$results" \
        --drafter math="$drafters/math/final" --drafter chat="$drafters/chat/final" \
        --drafter half="$drafters/half/final" --drafter full="$drafters/full/final" \
        --limit 80 --max-new-tokens 64 --batch-size 8 "$@"
}

two_tasks="--task mt_bench=$data/eval/mt_bench.jsonl --task gsm8k=$data/eval/gsm8k.jsonl"
all_tasks="$two_tasks --task math500=$data/eval/math500.jsonl --task svamp=$data/eval/svamp.jsonl"
singles='--variant single:math --variant single:chat --variant single:half --variant single:full'
both='math+chat'
merged="--variant merged:$both --variant merged:$both@60"
paper="$singles --variant average:$both --variant confidence:$both $merged"

stage_evaluate() {
    # shellcheck disable=SC2086 # options are words
    {
        evaluate eagle2-1 eagle2 1 EAGLE-2 $all_tasks --temperature 0 --temperature 1 $paper --variant entropy:$both \
            --variant evidence:$both --variant merged:$both@60,evidence=0 --variant single:math,topk \
            --variant single:chat,topk --variant confidence:$both,topk --variant merged:$both,topk
        evaluate eagle2-topk eagle2 1 EAGLE-2 $all_tasks --temperature 1 --variant single:half,topk \
            --variant single:full,topk --variant entropy:$both,topk --variant evidence:$both,topk
        evaluate hass-1 hass 1 HASS $all_tasks --temperature 0 --temperature 1 $paper
        for seed in 2 3; do
            evaluate eagle2-$seed eagle2 $seed EAGLE-2 $all_tasks --temperature 0 $singles $merged
            evaluate hass-$seed hass $seed HASS $all_tasks --temperature 0 $singles $merged
        done
        evaluate eagle2-weights eagle2 1 EAGLE-2 $all_tasks --temperature 0 --variant average:$both,weight=0.1 \
            --variant average:$both,weight=0.3 --variant average:$both,weight=0.7 --variant average:$both,weight=0.9
        evaluate eagle2-budgets eagle2 1 EAGLE-2 $two_tasks --temperature 0 \
            --variant single:math@20 --variant single:math@120 --variant single:math@240 \
            --variant single:chat@20 --variant single:chat@120 --variant single:chat@240 \
            --variant merged:$both@20 --variant merged:$both@120 --variant merged:$both@240
    }
}

stage_report() {
    PYTHONPATH="$root/benchmarks:$PYTHONPATH" "$python" -m paper "$folder/results" --output "$folder/report"
}

[ $# -gt 0 ] || set -- target drafters evaluate report
for stage in "$@"; do
    echo "$stage: $(date -u +%H:%M)"
    "stage_$stage"
done
