#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most 10 minutes. Needs nvcc, an NVIDIA GPU, a
# clean checkout, and CleanQ's requirements with the test extra.
#
#   benchmarks/gpu.sh benchmarks/records/2026-01-01_gpu                   all steps, in this order:
#
#     build        fastreplay with CUDA, into build/gpu
#     tests        the tests that need a GPU
#     kernels      each tuned kernel compared with its plain reference
#     memcheck     compute-sanitizer over every kernel: accesses,
#     racecheck        races in shared memory,
#     initcheck        reads of uninitialised memory,
#     synccheck        barriers
#     train        a short training of ddqn_atari.py with the replay on the GPU
#     buffers      fastreplay compared with other replay buffers on the GPU
#     throughput   agent steps per second of ddqn_atari.py with each replay, and as CUDA graphs
#     graphs       the tests of the update as a CUDA graph: does it learn what plain calls learn?
#     runs         the tests that train on the GPU, save a checkpoint and resume
#
#   benchmarks/gpu.sh benchmarks/records/2026-01-01_gpu build kernels     only these steps
#
# The record folder gets a log of each step and a README.md with their commands and results. Each
# step has a time limit, which shrinks if earlier steps were slow, but not below the step's reserved
# time. A step that fails does not stop the others, except build.
#
# PYTHON           the interpreter
# SECONDS_IN_ALL   the time limit for all steps together, default 570
# COMMIT           the commit of the sources, if they are not in a git repository
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-$(command -v python || command -v python3)}
total=${SECONDS_IN_ALL:-570}

steps=(build tests kernels memcheck racecheck initcheck synccheck train buffers throughput graphs
  runs)
declare -A reserved=([build]=40 [tests]=60 [kernels]=40 [memcheck]=35 [racecheck]=35 [initcheck]=30
  [synccheck]=25 [train]=35 [buffers]=80 [throughput]=100 [graphs]=40 [runs]=40) # seconds, 560
declare -A most=([build]=150 [tests]=120 [kernels]=90 [memcheck]=70 [racecheck]=70 [initcheck]=60
  [synccheck]=60 [train]=90 [buffers]=190 [throughput]=150 [graphs]=90 [runs]=90)

(($# > 0)) || { echo "usage: benchmarks/gpu.sh RECORD_FOLDER [STEP...]" >&2 && exit 2; }
record=$1
shift
wanted=("${steps[@]}")
(($# > 0)) && wanted=("$@")
for name in "${wanted[@]}"; do
  [[ -v "most[$name]" ]] || { echo "error: no step $name; steps: ${steps[*]}" >&2 && exit 2; }
done
is_wanted() { [[ " ${wanted[*]} " == *" $1 "* ]]; }

if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
  if [[ -n $(git status --porcelain --untracked-files=no) ]]; then
    echo "error: the checkout has uncommitted changes; commit them first." >&2
    exit 1
  fi
elif [[ -z ${COMMIT:-} ]]; then
  echo "error: no git repository here; set COMMIT to the commit of these sources." >&2
  exit 1
fi

mkdir -p "$record" || exit
rows=()
failed=()

# Removes this machine's paths. `here` is $PWD as a regular expression.
here=$(printf '%s' "$PWD" | sed 's/[][\.*^$+?(){}|#]/\\&/g')
without_paths() {
  sed -u -E "s#$here/##g; s#/[^ :\"']*/(site-packages|dist-packages|bin)/##g; s# +\$##"
}

# step NAME COMMAND...: runs a command within its time limit. Its output goes to the screen and to
# NAME.log, its result to the table.
step() {
  local name=$1 later=0 is_after=0 other limit left start=$SECONDS status result command
  shift
  is_wanted "$name" || return 0
  for other in "${steps[@]}"; do
    ((is_after)) && is_wanted "$other" && ((later += reserved[$other]))
    [[ $other == "$name" ]] && is_after=1
  done
  left=$((total - SECONDS))
  limit=$((left - later))
  ((limit < reserved[$name])) && limit=${reserved[$name]}
  ((limit > left)) && limit=$left
  ((limit > most[$name])) && limit=${most[$name]}
  command=$(printf '%q ' "$@" | without_paths)
  echo "== $name, at $SECONDS s, limit $limit s"
  if ((limit < 10)); then
    result="not run: no time left"
    status=1
  else
    {
      echo "\$ $command"
      timeout -k 5 "$limit" "$@" 2>&1
      status=$?
      echo "exit status $status"
      exit "$status"
    } | without_paths | tee "$record/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
      0) result=passed ;;
      124 | 137) result="stopped at its limit of $limit s" ;;
      *) result="failed, exit status $status" ;;
    esac
  fi
  rows+=("| $name | $result | $((SECONDS - start)) | \`$command\` |")
  ((status == 0)) || failed+=("$name")
  return "$status"
}

write_readme() {
  {
    echo "# On a GPU"
    echo
    "$python" -c "import sys; sys.path.insert(0, 'benchmarks')
from machine import describe
for key, value in describe().items():
    if key != 'command':
        print(f'- {key}: {value}')" 2>/dev/null || echo "- machine: not described"
    echo
    echo "\`benchmarks/gpu.sh\`, steps ${wanted[*]}. Failed: ${failed[*]:-none}."
    echo
    echo "| step | result | seconds | command |"
    echo "|---|---|---:|---|"
    ((${#rows[@]} == 0)) || printf '%s\n' "${rows[@]}"
  } >"$record/README.md"
  cat "$record/README.md"
}
trap write_readme EXIT

export FASTREPLAY_CUDA=1 PYTHONUNBUFFERED=1
if [[ -z ${FASTREPLAY_CUDA_ARCHITECTURES:-} ]]; then # only this GPU's: the build is four times faster
  FASTREPLAY_CUDA_ARCHITECTURES=$("$python" -c 'import torch
print("%d%d" % torch.cuda.get_device_capability())') || unset FASTREPLAY_CUDA_ARCHITECTURES
  export FASTREPLAY_CUDA_ARCHITECTURES
fi
step build "$python" setup.py --quiet build --build-base build/gpu --build-lib build/gpu/lib || exit
export PYTHONPATH="$PWD/build/gpu/lib${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import fastreplay as f, sys; sys.exit(f.cuda_problem() or 0)'; then
  failed+=("every other step: fastreplay cannot use this machine's GPU")
  exit 1
fi

pytest=("$python" -m pytest -v --no-header --tb=short -rfE -p no:cacheprovider -m gpu)
step tests "${pytest[@]}" tests/test_cuda.py tests/test_kernels.py tests/test_sum_tree.py \
  tests/test_frame_replay.py tests/test_tiles.py
step kernels "$python" benchmarks/buffers_cuda.py --kernels tuned reference \
  --record "$record/kernels"

sanitizer=$(command -v compute-sanitizer ||
  echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
# Without torch's cache, every tensor is a separate allocation with known bounds.
check() { # TOOL OPTIONS...
  step "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 1 \
    "${@:2}" "$python" benchmarks/gpu_check.py
}
own=(--kernel-name kernel_substring=fastreplay)
check memcheck --padding 512 --report-api-errors no "${own[@]}"
check racecheck "${own[@]}"
check initcheck # all kernels, because torch's kernels initialise memory, too
check synccheck "${own[@]}"

step train "$python" algos/ddqn_atari.py --env-id BreakoutNoFrameskip-v4 \
  --device cuda --buffer cuda --total-timesteps 20000 --learning-starts 2000 --buffer-size 20000 \
  --eval-frequency 0 --eval-episodes 1
step buffers "$python" benchmarks/buffers.py --device cuda --capacity 1000000 --seconds 0.4 \
  --record "$record/buffers"
step throughput "$python" benchmarks/throughput.py --task atari --alone --seconds 5 --warm-up 2 \
  --repeats 1 \
  --variants "script=ddqn_atari device=cuda buffer=cuda" \
  "script=ddqn_atari device=cuda buffer=cuda cuda_graphs=True" \
  "script=ddqn_atari device=cuda buffer=cuda cuda_graphs=True precision=bfloat16" \
  "script=ddqn_atari device=cuda buffer=cuda cuda_graphs=True num_envs=128" \
  "script=ddqn_atari device=cuda buffer=cuda replay_storage=tiles" \
  "script=ddqn_atari device=cuda buffer=numpy" --record "$record/throughput"
step graphs "${pytest[@]}" tests/test_graphs.py
step runs "${pytest[@]}" tests/test_learning.py

((${#failed[@]} == 0))
