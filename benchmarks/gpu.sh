#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most 10 minutes: builds fastreplay, runs the
# tests that need a GPU, the benchmarks, a training of ddqn_atari.py with either replay, and
# compute-sanitizer over every kernel. Wants nvcc, and CleanQ's requirements and test extra.
#
#   benchmarks/gpu.sh benchmarks/records/2026-01-01_gpu    the folder of the record
#
# PYTHON names the interpreter (default: python). A step that fails or takes too long is named at
# the end, and the others run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
record=${1:?the folder of the record}
mkdir -p "$record"
failed=()

step() { # NAME SECONDS COMMAND...: its output goes to the screen and to NAME.log
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$record/$name.log" || failed+=("$name")
}

export FASTREPLAY_CUDA=1
step build 120 "$python" setup.py --quiet build --build-base build/gpu --build-lib build/gpu/lib
export PYTHONPATH="$PWD/build/gpu/lib${PYTHONPATH:+:$PYTHONPATH}"

step tests 100 "$python" -m pytest -q -m gpu -p no:cacheprovider

step buffers 120 "$python" benchmarks/buffers.py --device cuda --seconds 0.5 \
  --record "$record/buffers"

step training 100 "$python" benchmarks/throughput.py --task atari --seconds 4 \
  --variants "script=ddqn_atari device=cuda buffer=cuda" "script=ddqn_atari device=cuda buffer=numpy" \
  --record "$record/training"

sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
for tool in memcheck racecheck synccheck initcheck; do
  step "$tool" 40 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" benchmarks/gpu_check.py
done

{
  echo "# On a GPU"
  echo
  echo "\`benchmarks/gpu.sh\`: the log of each step lies beside this page. Failed: ${failed[*]:-none}."
  echo
  "$python" -c "import torch; print('-', torch.cuda.get_device_name(), 'torch', torch.__version__)"
} >"$record/README.md"
cat "$record/README.md"
[ ${#failed[@]} -eq 0 ]
