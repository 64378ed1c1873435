#!/usr/bin/env bash
# Check the kernels on a card, then time them beside their peers, then train for real with and without them.
#
#   bash benchmarks/gpu.sh [PART]...     correctness, kernels, step, curve: all four, in this order, when none is named
#
# The parts of kernels have names too: elementwise, linear_cross_entropy, attention, moe; and those of step: step-1.2b,
# step-2.4b. Each is cut to end within ten minutes, which no card has shown yet. Needs a CUDA device, torch and Triton,
# pytest for the first part (pytest-xdist spreads it over the cores); no network. Two peers take part where they are installed:
# `pip install --no-deps liger-kernel cut-cross-entropy`.
#
# Nothing is timed after a failed check; a benchmark that fails leaves the others to run. Results go to
# kernels/benchmarks/results/*.json as they come, so that a run cut short keeps what it has.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export PYTHONPATH=".:kernels:training:export:serve${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

has() { "$python" -c "import $1" 2>/dev/null; }

correctness() {
  if ! has pytest; then
    echo "error: the tests need pytest: '$python' has none" >&2
    return 1
  fi
  # Most of the time goes into compiling hundreds of variants of the kernels, on one core for each process.
  local workers=()
  if has xdist; then workers=(-n 8 --dist worksteal); fi
  # All failures are shown, up to a number that says that the card itself has stopped working. Tests ask torch to fill
  # fresh memory with NaN, a mode in which cuBLAS wants its workspace fixed. Warnings of versions that CI does not have
  # are no failure here.
  MINICPM_TEST_DEVICE=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 \
    "$python" -m pytest tests/kernels -q --tb=short --maxfail=25 ${workers[@]+"${workers[@]}"} \
    -W default -o timeout=240 -o timeout_method=thread \
    --deselect tests/kernels/test_sm90.py::test_table_is_current_and_limits_hold
}

benchmark() { "$python" "kernels/benchmarks/$1.py" "${@:2}"; }

if [ $# -eq 0 ]; then
  set -- correctness kernels step curve
fi
parts=()
for part in "$@"; do
  case "$part" in
    kernels) parts+=(elementwise linear_cross_entropy attention moe) ;;
    step) parts+=(step-1.2b step-2.4b) ;;
    correctness | elementwise | linear_cross_entropy | attention | moe | step-1.2b | step-2.4b | curve) parts+=("$part") ;;
    *)
      echo "error: no part is called '$part'; use correctness, kernels (elementwise, linear_cross_entropy," \
        "attention, moe), step (step-1.2b, step-2.4b) or curve" >&2
      exit 2
      ;;
  esac
done
failed=()
for part in "${parts[@]}"; do
  echo "=== $part"
  case "$part" in
    correctness) correctness ;;
    step-*) benchmark model_step --model "minicpm-${part#step-}" || failed+=("$part") ;;
    curve) benchmark curve_check || failed+=("$part") ;;
    *) benchmark "$part" || failed+=("$part") ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "error: failed: ${failed[*]}" >&2
  exit 1
fi
