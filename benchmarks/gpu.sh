#!/usr/bin/env bash
# On a machine with a GPU and the CUDA toolkit: builds fastreplay, runs the tests that need a GPU,
# and looks for races and bad accesses in every kernel.
#
#   benchmarks/gpu.sh [FOLDER]    logs go to FOLDER (default: build/gpu)
#
# PYTHON names the interpreter (default: python), which has CleanQ's requirements and test extra.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-build/gpu}
mkdir -p "$out"

echo "== build"
FASTREPLAY_CUDA=1 "$python" setup.py --quiet build --build-base "$out" --build-lib "$out/lib"
export PYTHONPATH="$PWD/$out/lib${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())" |
  tee "$out/machine.txt"

echo "== tests"
"$python" -m pytest -q -m gpu -p no:cacheprovider \
  tests/test_sum_tree.py tests/test_frame_replay.py tests/test_cuda.py 2>&1 | tee "$out/tests.log"

echo "== compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer)
for tool in memcheck racecheck synccheck initcheck; do
  "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" benchmarks/gpu_check.py 2>&1 |
    tee "$out/$tool.log"
done

echo "== benchmarks"
# They come here: the buffers and the scripts with --device cuda.
