#!/usr/bin/env bash
# All tests: `bash test.sh`, or some: `bash test.sh data -k mixture`. Installs what they need first.
set -euo pipefail
cd "$(dirname "$0")"
source setup.sh requirements-dev.txt
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1  # two threads on busy cores are slower than one
[ $# = 0 ] || exec python -m pytest -q --durations=5 "$@"
failed=0
python -m pytest -q --durations=5 --ignore=kernels || failed=1
python -m pytest -q --durations=5 kernels || failed=1  # a process of their own: without a GPU, Triton's interpreter
exit $failed
