#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most 10 minutes: builds fastreplay, runs the
# tests that need a GPU, compute-sanitizer over every kernel, the benchmarks, and a training of
# ddqn_atari.py with either replay. Wants nvcc, and CleanQ's requirements and test extra.
#
#   benchmarks/gpu.sh benchmarks/records/2026-01-01_gpu            the folder of the record
#   benchmarks/gpu.sh benchmarks/records/2026-01-01_gpu tests buffers       only these steps
#
# PYTHON names the interpreter, SECONDS_IN_ALL the limit (default 570). A step that fails, or finds
# no time left, is named at the end, and the others run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python || command -v python3)}
record=${1:?the folder of the record}
shift
wanted=" ${*:-build tests runs memcheck racecheck initcheck buffers training synccheck} "
limit=${SECONDS_IN_ALL:-570}
mkdir -p "$record"
failed=()

finish() {
  {
    echo "# On a GPU"
    echo
    echo "\`benchmarks/gpu.sh\`, steps:$wanted(the log of each lies here). Failed: ${failed[*]:-none}."
    echo
    "$python" -c "import torch; print('-', torch.cuda.get_device_name(), 'torch', torch.__version__)" \
      2>/dev/null
  } >"$record/README.md"
  sed -i -E "s#$PWD/##g; s#/[^ :\"']*/(site-packages|dist-packages)/##g" "$record"/*.log
  cat "$record/README.md"
}
trap finish EXIT

step() { # NAME SECONDS COMMAND...: its output goes to the screen and to NAME.log
  local name=$1 seconds=$2 left=$((limit - SECONDS))
  shift 2
  [[ $wanted == *" $name "* ]] || return 0
  ((left < seconds)) && seconds=$left
  echo "== $name, at $SECONDS s"
  if ((seconds < 10)); then
    failed+=("$name (no time left)")
    return 1
  fi
  timeout -k 5 "$seconds" "$@" 2>&1 | tee "$record/$name.log" && return 0
  failed+=("$name")
  return 1
}

export FASTREPLAY_CUDA=1 PYTHONUNBUFFERED=1
step build 150 "$python" setup.py --quiet build --build-base build/gpu --build-lib build/gpu/lib
export PYTHONPATH="$PWD/build/gpu/lib${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import fastreplay as f, sys; sys.exit(f.cuda_problem() or 0)'; then
  failed+=("all: fastreplay cannot use this machine's GPU")
  exit 1
fi

pytest=("$python" -m pytest -v --no-header --tb=short -rfE -m gpu -p no:cacheprovider)
step tests 120 "${pytest[@]}" tests/test_cuda.py tests/test_sum_tree.py tests/test_frame_replay.py
step runs 60 "${pytest[@]}" tests/test_learning.py

# Without torch's cache every tensor has an allocation of its own, whose ends are known.
check() { # TOOL OPTIONS...
  local tool=$1
  shift
  step "$tool" 70 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")" \
    --tool "$tool" --error-exitcode 1 "$@" "$python" benchmarks/gpu_check.py
}
own=(--kernel-name kernel_substring=fastreplay)
check memcheck --padding 512 --report-api-errors no "${own[@]}"
check racecheck "${own[@]}"
check initcheck # what torch's own kernels write counts, too

step buffers 170 "$python" benchmarks/buffers.py --device cuda --capacity 1000000 --seconds 0.4 \
  --record "$record/buffers"

step training 90 "$python" benchmarks/throughput.py --task atari --alone --seconds 4 --repeats 3 \
  --variants "script=ddqn_atari device=cuda buffer=cuda" "script=ddqn_atari device=cuda buffer=numpy" \
  --record "$record/training"

check synccheck "${own[@]}"
[ ${#failed[@]} -eq 0 ]
