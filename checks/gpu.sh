#!/usr/bin/env bash
# What one GPU makes of all this, in at most nine minutes: `bash checks/gpu.sh`. It writes
# results/gpu/<part>.json and prints a table.
#
# The parts come in the order of worth. Each must end by its time, in seconds from the start, or is
# stopped: what the parts before it left is its own too. `memory` needs no GPU, so it is last.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
parts=(kernels:85 peers:160 tiles:225 training:375 updates:445 sampler:480 rl_step:510 memory:535)

has_gpu=$("$python" -c 'import torch; print(torch.cuda.is_available())') || exit
if [ "$has_gpu" != True ]; then
    for part in "${parts[@]}"; do echo "${part%:*}: skipped, there is no GPU here"; done
    exit 0
fi
rm -f results/gpu/*.json  # the table is of one run
for entry in "${parts[@]}"; do
    part=${entry%:*} left=$((${entry#*:} - SECONDS))
    [ "$left" -gt 0 ] || { echo "$part: no time is left"; continue; }
    echo "== $part: $left s"
    timeout --kill-after=3 "$left" "$python" -m checks.gpu "$part" || echo "$part: exit code $?"
done
echo
"$python" -m checks.gpu table
