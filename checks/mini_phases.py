"""A miniature of all five phases, in a folder of checks.mini: phases.py and the data it names.

`python -m checks.mini_phases sft.py phases.py …` runs a phase's script with the toy rewards of
checks.mini_rl; the phases after the first start from out/base/pretrain.
"""
import importlib
import json
import sys

import common
from checks.mini import Mini
from checks.mini_rl import CONFIG as RL_CONFIG
from checks.mini_rl import toy
from data.tasks import pages, registry
from data.tasks.problem import as_reply, seeded_rng, to_chat, to_document

PHASES = ("pretrain", "sft", "distill", "reward", "rl")
SECTIONS = """
sft = dict(batch_tokens=768, micro_tokens=256, pools=dict(talks=[dict(path="talks.jsonl")]),
           stages=[dict(name="s", lr=[1, 1], context=256, epochs=dict(talks=1))])
distill = dict(pairs="pairs.jsonl", context=192, batch_pairs=8, micro_pairs=3, kl_chosen=0,
               kl_rejected=0, max_new_tokens=8)
reward = dict(preferences=[dict(taste=96, seed=6)], context=192, batch_pairs=8, micro_pairs=3)
"""


def prepare(mini: Mini) -> None:
    """Writes the config and the files that the five phases read."""
    (mini.folder / "phases.py").write_text(RL_CONFIG + SECTIONS)
    problems = registry.family("math").problems("train", 24, 1)
    talks = [json.dumps({"messages": to_chat(problem)}) for problem in problems]
    (mini.folder / "talks.jsonl").write_text("\n".join(talks) + "\n")
    rng, pairs = seeded_rng("pairs"), []
    for problem in problems:
        texts = (to_document(problem), pages.corrupt(problem, "wrong result", rng))
        chosen, rejected = (as_reply(text.partition("Work:")[2]) for text in texts)
        pairs.append(json.dumps({"prompt": problem.question, "chosen": chosen,
                                 "rejected": rejected, "task": "math"}))
    (mini.folder / "pairs.jsonl").write_text("\n".join(pairs) + "\n")


def command(phase: str, run: str) -> list[str]:
    """The arguments of a phase's script, its own name first."""
    start = [] if phase == "pretrain" else ["--init_from=out/base/pretrain"]
    return [f"{phase}.py", "phases.py", f"--run={run}", "--corpus.folder=data", *start]


def main():
    """Runs the script that the first argument names."""
    toy(setattr)
    sys.argv.pop(0)
    importlib.import_module(sys.argv[0].removesuffix(".py")).main()


if __name__ == "__main__":
    common.cli(main)
