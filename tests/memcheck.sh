#!/usr/bin/env bash
# Runs the marked GPU tests under compute-sanitizer: tests/memcheck.sh [TOOL [short]] [further arguments of pytest]
#   memcheck   (default) accesses outside allocations, after it has caught a planted one
#   racecheck  accesses of shared memory that no barrier orders. Of a barrier in memory it knows the threads that arrive
#              themselves, so in the kernels whoever writes what others read arrives
#   initcheck  reads of global memory that nobody wrote. It does not see what the copy engine writes, so readers of
#              products are left out: there the tests' NaN in fresh memory tells
# All are slow: with short they take a small case or two of the products, the scan and the stack step.
# Others by -k, one file to a process, as in
#   tests/memcheck.sh racecheck tests/test_sign_linear.py -k "test_value_and_gradients and bfloat16"
# The caching allocator is off, so that every tensor is an allocation of its own with nothing mapped behind it.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=${1:-memcheck}
[ $# = 0 ] || shift
short=()
if [ "${1:-}" = short ]; then
  shift
  short=(tests/test_{packed_linear,ternary_linear,sign_linear,ssd_scan,mamba2_stack_step,mamba2_prompt}.py)
  short+=(-k "(bfloat16 and (N127-K or N300-K or N33-K513 or N200-K320 or N3000-K2049 or T64-H40)) or T65-H24 or (layers and (L1-W4 or B2-K256)) or (prompt and 130-B1-K256 and bfloat16-bfloat16)")
fi
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
sanitize=(compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 1000)
tests=(python3 -m pytest -q -p no:cacheprovider -m "memcheck and gpu" "${short[@]}" "$@")

case $tool in
memcheck)
  if "${sanitize[@]}" python3 tests/planted_fault.py >/dev/null 2>&1; then
    echo "the planted out-of-bounds write was not caught: the check cannot fail" >&2
    exit 1
  fi
  echo "planted out-of-bounds write: caught"
  ;;
initcheck)
  # Fresh memory that the tests fill with NaN would count as written.
  export BITKERNELS_POISON=0
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  compute-sanitizer --tool initcheck --print-limit 100000 --show-backtrace no "${tests[@]}" | tee "$log" | grep -v "^="
  # Torch reads outputs, the gradient of weights (sign_linear.cu) a product of cuBLAS, and a cut product waits (await)
  # for a word that nobody may have written, by design.
  others="at::native\|in sign_linear.cu\|cuda::await("
  if grep -A 1 Uninitialized "$log" | grep " at " | grep -v "$others" >&2; then exit 99; fi
  exit
  ;;
esac
"${sanitize[@]}" "${tests[@]}"
