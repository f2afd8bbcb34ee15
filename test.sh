#!/usr/bin/env bash
# All tests: `bash test.sh`, or some: `bash test.sh data -k mixture`. Installs what they need first.
set -euo pipefail
cd "$(dirname "$0")"
source setup.sh requirements-dev.txt
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1  # two threads on busy cores are slower than one
[ $# = 0 ] || exec python -m pytest -q --durations=5 "$@"
# Two processes side by side, of about the same time. Kernels are tested alone: without a GPU, all
# of them run in Triton's interpreter.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
(
    failed=0
    python -m pytest -q --durations=5 kernels || failed=1
    python -m pytest -q --durations=5 data --ignore=data/verify || failed=1
    exit $failed
) > "$log" 2>&1 &
failed=0
python -m pytest -q --durations=5 --ignore=kernels --ignore=data || failed=1
python -m pytest -q --durations=5 data/verify || failed=1
wait $! || failed=1
cat "$log"
exit $failed
