#!/usr/bin/env bash
# Builds fastreplay with a sanitizer of GCC and runs the tests of csrc/ with it.
#
#   tests/sanitize.sh address          AddressSanitizer and UndefinedBehaviorSanitizer, all tests;
#                                      the CUDA kernels run on the emulation
#   tests/sanitize.sh address quick    the same without the emulation and what takes longest
#   tests/sanitize.sh thread           ThreadSanitizer, the tests that use threads
#
# The environment variable PYTHON names the interpreter (default: python).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
show=
threads=2
kind=${1:?address or thread}
tests=(tests/test_sum_tree.py tests/test_frame_replay.py tests/test_tiles.py tests/test_cuda.py)
case $kind in
  address)
    flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    # In this order: the sanitizer intercepts the C++ runtime's exceptions.
    preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
    # A limit of address space does not fit the sanitizer, which reserves most of it.
    select="not importing and not without_a_gpu and not memory_runs_out"
    if [ "${2:-}" = quick ]; then
      select="$select and not emulated and (not numpy or numpy_numbers)"
      select="$select and not (scaled_outputs and shape2) and not frames_of_games"
      select="$select and not draws_follow and not wait_for_the_lock"
      select="$select and not (a_state_of_tiles and not mixed)"
      export FASTREPLAY_EMULATED=none.so  # there is none, so what needs it is skipped
      tests+=(--deselect "tests/test_tiles.py::test_random_operations_on_the_store[3]")  # [64] stays
    fi
    ;;
  thread)
    flags="-fsanitize=thread"
    preload="$(gcc -print-file-name=libtsan.so)"
    select="(threads or child or given_batch) and not cuda"
    show=-s    # a race ends the process, and pytest must not hide its report
    threads=1  # of torch, whose OpenMP is not built for this sanitizer
    ;;
  *) echo "usage: $0 address [quick]|thread" >&2 && exit 2 ;;
esac
preload="$preload $(gcc -print-file-name=libstdc++.so)"

out=build/$kind
export CFLAGS="$flags -O1 -g1 -fno-omit-frame-pointer" LDFLAGS="$flags" FASTREPLAY_CUDA=0
export CXXFLAGS="$CFLAGS"  # setuptools reads these for C++, older ones read CFLAGS
"$python" setup.py --quiet build --build-base "$out" --build-lib "$out/lib"
if [ "$kind ${2:-}" = "address " ]; then
  FASTREPLAY_EMULATED=$("$python" tests/emulated.py "$out/emulated")
  export FASTREPLAY_EMULATED
fi
built=$(find "$out/lib" -name '_cpu*.so')
test -n "$built" || { echo "fastreplay did not compile" >&2; exit 1; }
case $kind in address) calls="__asan_ __ubsan_" ;; thread) calls=__tsan_ ;; esac
symbols=$(nm -D --undefined-only "$built")
for call in $calls; do  # of the instrumented code, into the sanitizer's library
  [[ $symbols == *$call* ]] || { echo "fastreplay was compiled without the sanitizer" >&2; exit 1; }
done

# When a thread ends, glibc may free the thread-local memory of one that ended before, under a
# lock of its own that ThreadSanitizer does not see.
echo "race:_dl_deallocate_tls" > "$out/suppressions"

# No leak detection: Python does not free all of its memory. No address randomization:
# ThreadSanitizer cannot place its shadow memory in every layout.
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  TSAN_OPTIONS="halt_on_error=1 die_after_fork=0 suppressions=$out/suppressions" \
  setarch "$(uname -m)" -R env LD_PRELOAD="$preload" OMP_NUM_THREADS=$threads \
  "$python" -m pytest -q $show -p no:cacheprovider -o pythonpath="$out/lib" -k "$select" "${tests[@]}"
