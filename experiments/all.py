"""All experiments that record arms, by name: for the report's tables and the tests of the texts."""
from experiments import dpd, fg_wsd, rl, sft_data, stem

EXPERIMENTS = {
    "fg_wsd": fg_wsd.EXPERIMENT,
    "sft_data": sft_data.EXPERIMENT,
    "dpd": dpd.EXPERIMENT,
    "rl": rl.EXPERIMENT,
    "stem": stem.EXPERIMENT,
}
