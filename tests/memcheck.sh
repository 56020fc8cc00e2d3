#!/usr/bin/env bash
# Runs the marked GPU tests under compute-sanitizer: tests/memcheck.sh [TOOL] [further arguments of pytest]
#   memcheck   (default) accesses outside allocations, after it has caught a planted one
#   racecheck  accesses of shared memory that no barrier orders
#   initcheck  reads of global memory that nobody wrote
#   synccheck  barriers that not all threads reach
# racecheck and initcheck are slow: give them a few small tests by -k, or one file to a process, as in
#   tests/memcheck.sh racecheck tests/test_sign_linear.py -k "test_value_and_gradients and bfloat16"
# The caching allocator is off, so that every tensor is an allocation of its own with nothing mapped behind it.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=${1:-memcheck}
[ $# = 0 ] || shift
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
sanitize=(compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 20)

# Fresh memory that the tests fill with NaN counts as written.
[ "$tool" != initcheck ] || export BITKERNELS_POISON=0
if [ "$tool" = memcheck ]; then
  if "${sanitize[@]}" python3 tests/planted_fault.py >/dev/null 2>&1; then
    echo "the planted out-of-bounds write was not caught: the check cannot fail" >&2
    exit 1
  fi
  echo "planted out-of-bounds write: caught"
fi
"${sanitize[@]}" python3 -m pytest -q -p no:cacheprovider -m "memcheck and gpu" "$@"
