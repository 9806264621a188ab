#!/usr/bin/env bash
# All that a GPU can show, from a bare checkout in under 9 minutes (one H100 or H200, 16 cores): builds the CUDA ops in
# place, runs their tests and the rest of the suite, compute-sanitizer and the demo side by side, then the benchmarks
# alone. Needs Python with torch (CUDA), transformers and pytest, and nvcc; no network. A part that fails stops no other.
#
#   benchmarks/runs/gpu.sh                    writes <device>-<date>.json and .md, and gpu.log, to ${OUT:-benchmarks/results}
#   TAPS_GPU_SH_DRY=1 benchmarks/runs/gpu.sh  the same on the CPU's ops, to try the script; the build is left as it is
#
# PYTHON (python3), TORCH_CUDA_ARCH_LIST (9.0), MAX_JOBS (all cores), TAPS_GPU_SECONDS (530, for everything)
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
dry=${TAPS_GPU_SH_DRY:+1}
seconds=${TAPS_GPU_SECONDS:-530}
logs=$(mktemp -d)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
mkdir -p "$out"

# phase NAME SECONDS COMMAND...: runs the command within its time; what it prints goes to a log of its own.
phase() {
  local name=$1 limit=$2 begun=$SECONDS code verdict
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  case $code in
    0) verdict=passed ;;
    77) verdict='left out' ;;
    124 | 137) verdict="cut off after $limit s" ;;
    *) verdict="FAILED ($code)" ;;
  esac
  printf '%-22s %-24s %4d s   %s\n' "$name" "$verdict" $((SECONDS - begun)) "$(last_line "$name")" | tee "$logs/$name.result"
}

last_line() {
  grep -vE '^[[:space:]]*$|^=+ COMPUTE-SANITIZER' "$logs/$1.log" | tail -n 1 | cut -c 1-150
}

has_module() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

# Tests that need a library which this machine lacks: those of the command line, of recipes as files, of data sets.
pytest() {
  local without=() module
  local printed=(--ignore=python_tests/test_{check_lossless,cli,cli_evaluation,demo,docs,report}.py
    --ignore=python_tests/test_{training_progress,transcript}.py)
  for module in typer rich; do
    has_module "$module" || without=("${printed[@]}" --ignore=python_tests/test_cli_training.py)
  done
  for module in pydantic datasets; do
    has_module "$module" || without+=(--ignore=python_tests/test_{cli_training,docs,recipe_files,tasks,training_data}.py)
  done
  "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors ${without[@]+"${without[@]}"} "$@"
}

build() {
  "$python" setup.py -q egg_info || return # so that the checkout counts as installed
  [ -n "$dry" ] && echo 'a dry run: not built' && return 77
  TAPS_FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
    "$python" setup.py build_ext --inplace || return
  "$python" -c 'from taps_ext import native; print(native.load().build_info())'
}

ops_tests() {
  if [ -n "$dry" ]; then pytest python_tests --backend cpu --cases 60; else pytest python_tests --backend cuda; fi
}

# The rest of the suite. The stand-in for CUDA is not built here: CI runs it; nor is the command installed.
other_tests() {
  local several=() which=(python_tests)
  has_module xdist && several=(-n $(($(nproc) / 2 + 1)))
  [ -n "$dry" ] && which=(python_tests/test_tree.py python_tests/test_house.py)
  pytest "${which[@]}" --backend none ${several[@]+"${several[@]}"} \
    -k 'not simt and not cuda_check and not wheel and not installed_command'
}

# A short subset, since every access is watched. Without torch's pool of memory, each tensor has its own bounds.
sanitizer() {
  local tool=$1 program
  program=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer") ||
    { echo 'compute-sanitizer is not on this machine'; return 77; }
  if [ -n "$dry" ]; then echo 'a dry run'; return 77; fi
  local options=(--tool "$tool" --error-exitcode 9 --print-limit 20)
  if [ "$tool" = memcheck ]; then options+=(--report-api-errors no); fi  # torch tries calls that may fail
  "$program" "${options[@]}" "$python" -c 'import torch; torch.ones(1).cuda().add_(1).cpu()' ||
    { echo 'compute-sanitizer fails on torch alone: see the log above'; return 77; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" "${options[@]}" \
    "$python" -m pytest -q -p no:cacheprovider python_tests/test_kernels.py --backend cuda --cases 24
}

demo() {
  "$python" benchmarks/gpu_demo.py ${dry:+--device cpu --prompts 1}
}

benchmark() {
  "$python" benchmarks/bench_gpu.py --folder "$out" --seconds "$1" ${dry:+--dry}
}

export -f build ops_tests other_tests sanitizer demo benchmark pytest has_module
export python out dry
run() { phase "$1" "$2" bash -c "$3"; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no GPU is visible'
"$python" -c 'import setuptools, sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "setuptools", setuptools.__version__)'
has_module pytest || echo 'pytest is missing: the tests cannot run, the demo and the benchmarks can'

run build 240 build
run ops 170 ops_tests &
run suite 170 other_tests &
run memcheck 170 'sanitizer memcheck' &
run racecheck 170 'sanitizer racecheck' &
run demo 170 demo &
wait
left=$((seconds - SECONDS - 15))
run benchmark $((left > 30 ? left : 30)) "benchmark $((left > 240 ? 210 : left - 30))"

for name in build ops suite memcheck racecheck demo benchmark; do
  printf '\n######## %s\n' "$name"
  tail -c 1000000 "$logs/$name.log"
done >"$out/gpu.log"
printf '\n======== %s s in all; everything printed is in gpu.log\n' "$SECONDS"
cat "$logs"/{build,ops,suite,memcheck,racecheck,demo,benchmark}.result
grep -hE '^(FAILED|ERROR) ' "$logs"/{ops,suite}.log | cut -c 1-200 | head -n 40
tail -n 40 "$logs/benchmark.log"
! grep -qE 'FAILED|cut off' "$logs"/*.result
