#!/usr/bin/env bash
# Makes every table of README.md and docs/ again, by their commands, on 2 CPU cores in about six
# hours:
#
#     bash experiments/reproduce.sh                # from a fresh clone; nothing is made twice
#     bash experiments/reproduce.sh fuzz refine    # these parts alone
#     bash experiments/reproduce.sh --list         # all parts, with their minutes
#
# The parts of SFT, DPD and RL go on from the first, pipeline.
#
# Public files come by environment variables, and what lacks its file is left out with a line: TEXT
# (your own text; ours is tinyshakespeare), GSM8K (a folder with train.jsonl and test.jsonl),
# MATH500, AIME24, HUMANEVAL, MBPP (sanitized), BFCL (files, with commas between), and LM_EVAL, the
# command of the lm-evaluation-harness.
#
#     GSM8K=sets/gsm8k MATH500=sets/math500.jsonl bash experiments/reproduce.sh verify
#
# What a part finds in results/NAME.jsonl is first moved to results/NAME.jsonl.before.
set -euo pipefail
cd "$(dirname "$0")/.."
parts=(pipeline:95 context:8 quality:3 fg_wsd:33 sft_data:27 refine:2 sft_speed:3 dpd:70
       dpd_speed:4 rl:90 verifier:2 stem:32 hacking:14 rl_speed:4 verify:1 fuzz:9 programs:3 sets:1 evaluate:5
       kernels:20 bench:6 kills:20)

pipeline() {  # all phases with three seeds; a model of your own text
    aside pretrain sft distill rl_run
    bash speedrun.sh
    python -m report configs/tiny.py --run=tiny --record
    another_seed 1
    another_seed 2
    given TEXT || return 0
    python -m data.text.corpus configs/char.py --corpus.path="$TEXT"
    python pretrain.py configs/char.py --corpus.path="$TEXT"
    python -m report configs/char.py --record
}
another_seed() {  # speedrun.sh's phases on the same text, with another seed each
    local run=tiny-seed$1
    local -x OMP_NUM_THREADS=1  # as in speedrun.sh
    python pretrain.py configs/tiny.py --run="$run" --pretrain.seed="$1" \
        --corpus.folder=out/tiny/data
    python refine.py configs/tiny.py --run="$run" --practice
    python sft.py configs/tiny_teacher.py --run="$run/teacher" --init_from="out/$run/pretrain" \
        --sft.data="out/$run/practice" --sft.seed="$1"
    python -m data.verify.transcripts configs/tiny.py --run="$run"
    python sft.py configs/tiny_verifier.py --run="$run/verifier" --init_from="out/$run/pretrain" \
        --sft.data="out/$run/verifier_data" --sft.seed="$1"
    python refine.py configs/tiny.py --run="$run"
    python sft.py configs/tiny.py --run="$run" --sft.seed="$1"
    python distill.py configs/tiny.py --run="$run" --distill.seed="$1"
    python reward.py configs/tiny.py --run="$run" --reward.seed="$1"
    python rl.py configs/tiny.py --run="$run" --rl.seed="$1"
    python -m report configs/tiny.py --run="$run" --record
}
context() {
    aside context
    python -m data.text.corpus configs/context.py
    python pretrain.py configs/context.py
    python -m checks.context --record
    python pretrain.py configs/context_no_abf.py --corpus.folder=out/context/data \
        --pretrain.branch_from=out/context/pretrain/step_00000916
    python -m checks.context out/context_no_abf --record
}
quality() { aside quality; python -m checks.quality --write; }
fg_wsd() { aside fg_wsd; python -m experiments.fg_wsd --seeds 5; }
sft_data() { aside sft_data; python -m experiments.sft_data --seeds 3; }
refine() { aside refine; python -m checks.refine --kills=10; }
sft_speed() { aside sft_speed; OMP_NUM_THREADS=1 python -m checks.sft_speed; }
dpd() { aside dpd; python -m experiments.dpd --seeds 3; }
dpd_speed() { aside dpd_speed; OMP_NUM_THREADS=1 python -m checks.dpd_speed; }
rl() { aside rl; python -m experiments.rl --seeds 3; }
verifier() { aside verifier; python -m checks.verifier configs/tiny.py --write; }
stem() { aside stem; python -m experiments.stem --seeds 3; }
hacking() { aside hacking; python -m experiments.hacking; }
rl_speed() { aside rl_speed; OMP_NUM_THREADS=1 python -m checks.rl_speed; }
verify() {
    given GSM8K MATH500 || return 0
    aside verify
    python -m checks.verify --gsm8k="$GSM8K" --math500="$MATH500" --write
}
fuzz() { aside fuzz; python -m checks.fuzz --n=10000 --write; }
programs() {
    given HUMANEVAL MBPP || return 0
    aside programs
    python -m checks.programs --humaneval="$HUMANEVAL" --mbpp="$MBPP" --write
}
sets() {
    given GSM8K MATH500 AIME24 HUMANEVAL MBPP BFCL || return 0
    aside sets
    python -m checks.sets --gsm8k="$GSM8K/test.jsonl" --math500="$MATH500" --aime24="$AIME24" \
        --humaneval="$HUMANEVAL" --mbpp="$MBPP" --bfcl="$BFCL" --write
}
evaluate() {
    given LM_EVAL || return 0
    aside evaluate
    for phase in pretrain sft; do
        python -m checks.evaluate "out/tiny/$phase" --task=math --n=256 --lm_eval="$LM_EVAL" --write
    done
}
kernels() {
    for module in attention rmsnorm cross_entropy tools.aot; do python -m "kernels.$module"; done
}
bench() { aside bench; OMP_NUM_THREADS=1 python -m checks.peers --write; }
kills() { python -m checks.kill --kills=20; python -m checks.kill --phase=rl --kills=10; }

given() {  # VARIABLE…: whether all are set
    for variable; do
        [ -n "${!variable:-}" ] || { echo "left out: $variable=… is not given"; return 1; }
    done
}
aside() {  # NAME…: moves these results out of the way
    for name; do
        [ ! -e "results/$name.jsonl" ] || mv --backup=numbered "results/$name.jsonl"{,.before}
    done
}

if [ "${1:-}" = --list ]; then printf '%s minutes\n' "${parts[@]/:/ }"; exit; fi
for name; do
    [[ " ${parts[*]%:*} " == *" $name "* ]] ||
        { echo "error: there is no part $name, see --list" >&2; exit 2; }
done
source setup.sh requirements-dev.txt
[ $# != 0 ] || set -- "${parts[@]%:*}"
for name; do
    printf '\n=== %s\n' "$name"
    "$name"
done
