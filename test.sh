#!/usr/bin/env bash
# All tests: `bash test.sh`, or some: `bash test.sh data -k mixture`. Installs what they need first.
set -euo pipefail
cd "$(dirname "$0")"
source setup.sh requirements-dev.txt
OMP_NUM_THREADS=1 python -m pytest -q --durations=5 "$@"
