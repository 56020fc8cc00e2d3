#!/usr/bin/env bash
# Runs the marked GPU tests under compute-sanitizer: tests/memcheck.sh [memcheck|racecheck|initcheck|synccheck]
# The caching allocator is off, so that every tensor is an allocation of its own with nothing mapped behind it.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=${1:-memcheck}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
sanitize=(compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 20)

if [ "$tool" = memcheck ]; then
  if "${sanitize[@]}" python3 tests/planted_fault.py >/dev/null 2>&1; then
    echo "the planted out-of-bounds write was not caught: the check cannot fail" >&2
    exit 1
  fi
  echo "planted out-of-bounds write: caught"
fi
"${sanitize[@]}" python3 -m pytest -q -p no:cacheprovider -m "memcheck and gpu" tests
