#!/usr/bin/env bash
# Builds fastreplay with a sanitizer of GCC and runs the tests of csrc/ under it.
#
#   tests/sanitize.sh address    AddressSanitizer and UndefinedBehaviorSanitizer, all tests; the
#                                CUDA kernels as the tests emulate them on a CPU
#   tests/sanitize.sh thread     ThreadSanitizer, the tests that use threads
#
# PYTHON names the interpreter (default: python).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
show=
threads=2
kind=${1:?address or thread}
tests=(tests/test_sum_tree.py tests/test_frame_replay.py tests/test_cuda.py)
case $kind in
  address)
    flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    # The order matters: the C++ runtime's exceptions are wrapped by the sanitizer's.
    preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
    select="not importing and not without_a_gpu"
    ;;
  thread)
    flags="-fsanitize=thread"
    preload="$(gcc -print-file-name=libtsan.so)"
    select="(threads or child or given_batch) and not cuda"
    show=-s    # a race ends the process: its report must not be captured
    threads=1  # of torch: its OpenMP is not built for this sanitizer
    ;;
  *) echo "usage: $0 address|thread" >&2 && exit 2 ;;
esac
preload="$preload $(gcc -print-file-name=libstdc++.so)"

out=build/$kind
export CFLAGS="$flags -O1 -g -fno-omit-frame-pointer" LDFLAGS="$flags" FASTREPLAY_CUDA=0
"$python" setup.py --quiet build --build-base "$out" --build-lib "$out/lib"
if [ "$kind" = address ]; then
  FASTREPLAY_EMULATED=$("$python" tests/emulated.py "$out/emulated")
  export FASTREPLAY_EMULATED
fi
test -n "$(find "$out/lib" -name '_cpu*.so')" || { echo "fastreplay did not compile" >&2; exit 1; }

# Python itself never frees some of its memory, so leaks are not looked for. Fixed addresses,
# because ThreadSanitizer cannot place its shadow under every random layout.
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  TSAN_OPTIONS="halt_on_error=1 die_after_fork=0" \
  setarch "$(uname -m)" -R env LD_PRELOAD="$preload" OMP_NUM_THREADS=$threads \
  "$python" -m pytest -q $show -p no:cacheprovider -o pythonpath="$out/lib" -k "$select" "${tests[@]}"
