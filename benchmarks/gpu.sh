#!/usr/bin/env bash
# Check the kernels on a card, then time them beside their peers, then train for real with and without them.
#
#   bash benchmarks/gpu.sh [correctness|kernels|step|curve]...     all four, in this order, when none is named
#
# Needs a CUDA device, torch and Triton, pytest for the first part; no network. Each part ends within ten minutes.
# Nothing is timed after a failed check. Results go to kernels/benchmarks/results/*.json.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export PYTHONPATH=".:kernels:training:export:serve${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

correctness() {
  # Tests ask torch to fill fresh memory with NaN, a mode in which cuBLAS wants its workspace fixed. Warnings of
  # versions that CI does not have are no failure here.
  MINICPM_TEST_DEVICE=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 \
    "$python" -m pytest tests/kernels -q -x -W default --deselect tests/kernels/test_sm90.py::test_table_is_current_and_limits_hold
}

kernels() {
  for name in elementwise linear_cross_entropy attention moe; do
    "$python" "kernels/benchmarks/$name.py"
  done
}

step() { "$python" kernels/benchmarks/model_step.py; }

curve() { "$python" kernels/benchmarks/curve_check.py; }

if [ $# -eq 0 ]; then
  set -- correctness kernels step curve
fi
for part in "$@"; do
  case "$part" in
    correctness | kernels | step | curve) ;;
    *)
      echo "error: no part is called '$part'; use correctness, kernels, step or curve" >&2
      exit 2
      ;;
  esac
done
for part in "$@"; do
  echo "=== $part"
  "$part"
done
