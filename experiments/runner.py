"""Experiments: trains the arms of one side by side, and says what the difference is worth.

    python -m experiments.fg_wsd --seeds 5       # writes results/fg_wsd.jsonl and prints the tables
    python -m experiments.sft_data --seeds 3     # after speedrun.sh: what refinement and reconstruction are worth
    python -m experiments.dpd --seeds 3          # after speedrun.sh: what each part of the distillation's loss is worth
    python -m experiments.rl --seeds 3           # after speedrun.sh: each stage, the filter, DPD before RL, stages or a mix
    python -m experiments.fg_wsd --scale 0.02 --seeds 1      # a try of the machinery, in minutes
    python -m experiments.fg_wsd --show          # the tables of results/fg_wsd.jsonl again, without a run

An arm is a config with other settings. The protocol: the sweep is run on the dev split with seed 100; then all is
frozen and seeds 0, 1, 2, … are run once on the test split, and what comes out is reported. A gain is claimed only where
the paired 95 % interval over problems excludes 0 and all seeds agree in sign.

A run is kept under out/<name>/runs/ by the hash of its settings, the code and the data: nothing runs twice, and a
killed experiment goes on. Arms that begin alike share that part.
"""
import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from report import plots
from experiments import results, stats
from experiments.labels import DIMENSIONS, labelled_pages
from common import UserError
from data.refine.refinement import split
from report.plots import plt
from experiments.stats import best_rates, by_stage, by_task, compare, tuned

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation; `stages` is JSON, so that equal beginnings are equal text."""
    experiment: str
    table: str     # which of the experiment's tables it belongs to; "sweep"
    arm: str
    seed: int
    lr: float
    split: str
    stages: tuple[str, ...]
    phase = "pretrain"

    def settings(self) -> dict[str, object]:
        stages = [json.loads(stage) for stage in self.stages]
        return {"corpus.folder": f"out/{self.experiment}/data", "pretrain.lr": self.lr, "pretrain.seed": self.seed,
                "pretrain.stages": stages}

    def folder(self, made_by: str) -> Path:
        key = hashlib.sha256(json.dumps([self.settings(), self.split, made_by]).encode()).hexdigest()[:10]
        return Path("out") / self.experiment / "runs" / f"{self.table}-{self.arm}-{self.seed}-{key}"


# ---------------------------------------------------------------------------------------------------------------------
# fg_wsd: does it help to order data by quality, when rate, tokens and documents are the same?

ARMS = {
    "a": "FG-WSD: high + medium, then high",
    "b": "the same documents, shuffled",
    "c": "WSD: high and medium 1:1 throughout",
    "d": "the same documents, quality changes with the rate",
    "e": "the same documents, high first",
}
STEPS = dict(warmup=30, diversity=290, quality=166, decay=102)  # as the report's 12.5T : 6.5T : 4T
BATCH, UNIT = 2048, 256  # tokens; a stage takes whole units of each pool
RATES = (2e-3, 4e-3, 8e-3)


def stages(arm: str, scale: float = 1.0, prefix: str = "") -> tuple[str, ...]:
    """An arm's table of stages: all share steps, rate and context; what differs is the units of each pool.

    prefix: of the pools' names. (b), (d) and (e) take exactly (a)'s tokens of each pool, so its documents, as often.
    """
    n = {name: max(1, round(steps * scale)) * BATCH // UNIT for name, steps in STEPS.items()}
    half = (n["warmup"] + n["diversity"]) // 2             # units of medium quality in (a)
    total = sum(n.values())
    if arm == "e":
        mixed = 2 * half                                   # units of the 1:1 part, which comes last here
        n = dict(warmup=n["warmup"], quality=total - mixed - n["warmup"], diversity=mixed - n["decay"],
                 decay=n["decay"])
    names = list(n)
    ends = np.cumsum([n[name] for name in names])
    if arm == "a":
        medium = [n["warmup"] / 2, half, half, half]       # units taken up to the end of each stage
    elif arm == "b":
        medium = half * ends / total
    elif arm == "c":
        medium = ends / 2
    elif arm == "d":
        medium = half * np.minimum(ends / ends[-2], 1)
    else:
        medium = [0, 0, n["diversity"] / 2, half]
    medium = np.diff(np.round(medium).astype(int), prepend=0)
    table = []
    for name, m in zip(names, medium):
        shares = {f"{prefix}high": int(n[name] - m) * UNIT, f"{prefix}medium": int(m) * UNIT}
        stage = dict(name=name, tokens=n[name] * UNIT, lr=[1, 1], context=128,
                     mixture={pool: tokens for pool, tokens in shares.items() if tokens})
        if name == "warmup":
            stage["lr"] = [0, 1]
        if name == "decay":
            stage |= dict(lr=[1, 1 / 300], curve="1-sqrt", context=256, rope_theta=40_000.0)
        table.append(json.dumps(stage))
    return tuple(table)


def prepare_fg_wsd() -> None:
    """The labelled pages, the filter, and the four pools: made once. The filter's shards: clean, corrupted."""
    labels = Path("out/fg_wsd/labels.jsonl")
    if not labels.is_file():
        labels.parent.mkdir(parents=True, exist_ok=True)
        texts, grades, _ = labelled_pages(4000, seed=7, families=("code",))
        common.write_atomic(labels, "".join(json.dumps({"text": text, "tags": dict(zip(DIMENSIONS, g))}) + "\n"
                                            for text, g in zip(texts, grades.tolist())))
    for step in ("data/filter/quality.py", "data/text/corpus.py"):
        call([step, "configs/fg_wsd.py"], Path("out/fg_wsd/data.log"))
    clean, corrupted = (json.loads(Path(f"out/fg_wsd/quality/judged/{shard:05d}.json").read_text())["table"]
                        for shard in (0, 1))
    high, medium, wrong = clean["high"]["documents"], clean["medium"]["documents"], corrupted["high"]["documents"]
    print(f"the filter's high pool is to {high / (high + wrong):.0%} clean, and has {high / (high + medium):.0%} of "
          "the clean pages that are no duplicates")


def fg_wsd(args, train) -> list[dict]:
    """Runs the experiment; returns all results. train: list of Runs -> their results."""
    prepare_fg_wsd()
    sweep = train([Run("fg_wsd", "sweep", "b", 100, lr, "dev", stages("b", args.scale)) for lr in RATES])
    best = best_rates(sweep)["b"]
    order = ("a", "b", "d", "e", "c")  # (c) begins as (a): by its turn that part is there
    runs = [Run("fg_wsd", table, arm, seed, best, "test", stages(arm, args.scale, prefix))
            for table, prefix in (("true", ""), ("filter", "filtered ")) for seed in range(args.seeds) for arm in order]
    results = train(runs)
    print("picture:", plot_fg_wsd(Path("out/fg_wsd/fg_wsd.png"), {
        title: [r for r in results if r["table"] == table] for title, table in FG_WSD_TABLES.items()}))
    return sweep + results


FG_WSD_TABLES = {"pools by the true label": "true", "pools by the filter": "filter"}


def fg_wsd_tables(results: list[dict]) -> str:
    """Markdown of all results, as each experiment has it: run again or read from results/."""
    sweep = [r for r in results if r["table"] == "sweep"]
    tried = ", ".join(f"{r['lr']:g}: {r['avg']:.3f}" for r in sweep)
    text = f"rate of (b) on the dev split, seed 100: {tried}; all arms take {best_rates(sweep)['b']:g}"
    for title, table in FG_WSD_TABLES.items():
        some = [r for r in results if r["table"] == table]
        text += f"\n\n### {title}\n\n{compare(some, ARMS, [('a', other) for other in 'bcde'])}"
    return text


def plot_fg_wsd(path: Path, tables: dict[str, list[dict]]) -> Path:
    """What each arm reads over its tokens, and its accuracy: a dot a seed, a bar the mean."""
    figure, axes = plt.subplots(len(ARMS), 1 + len(tables), figsize=(10, 6), sharex="col", constrained_layout=True,
                                width_ratios=[1.4] + [1] * len(tables))
    right = 1.1 * max(r["avg"] for rows in tables.values() for r in rows)
    for (arm, text), (data, *scores) in zip(ARMS.items(), axes):
        table = [json.loads(stage) for stage in stages(arm)]
        end = np.cumsum([0] + [stage["tokens"] for stage in table]) / 1e6
        high = [stage["mixture"].get("high", 0) / stage["tokens"] for stage in table]
        data.stairs(np.ones(len(high)), end, fill=True, color="0.85")
        data.stairs(high, end, fill=True, color=plots.COLORS[0])
        x = np.linspace(0, 1, 50)[1:]
        rate = np.concatenate([[0, 1], [1], 1 - np.sqrt(x)])
        data.plot(np.concatenate([[0, end[1]], [end[3]], end[3] + x * (end[4] - end[3])]), rate, color="black", lw=1)
        data.set(ylim=(0, 1.05), xlim=(0, end[-1]), yticks=[])
        data.set_title(f"({arm}) {text}", fontsize=9, loc="left")
        for axis, rows in zip(scores, tables.values()):
            each = [r["avg"] for r in rows if r["arm"] == arm]
            axis.barh(0, np.mean(each), color=plots.COLORS[0], alpha=0.5, height=0.6)
            axis.plot(each, np.zeros(len(each)), "k.")
            axis.set(xlim=(0, right or 1), ylim=(-0.6, 0.6), yticks=[])
    for axis, title in zip(axes[-1], ["million tokens (blue: high quality; line: rate)",
                                      *(f"accuracy, {title}" for title in tables)]):
        axis.set_xlabel(title, fontsize=9)
    return plots.save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# sft_data: responses to the same problems, made in several ways. (a) to (c) have all problems, (d) and (e) those whose
# reconstruction was kept: to choose (b)'s and (c)'s by that would favour (c), whose answer it confirms.

SFT_ARMS = {
    "a": "raw drafts",
    "b": "best of N under the same checks, at equal writer tokens",
    "b'": "the same, answer only",
    "c": "refined answer only",
    "d": "refined answer, the draft's old chain",
    "e": "refined answer, reconstructed chain",
    "e/4": "the same, a quarter of the rows",
    "e/16": "the same, a sixteenth",
}
SFT_RATES = (2e-3, 4e-3, 8e-3)
SFT_TOKENS, SFT_EPOCHS = 100_000, 2.0  # trained tokens of each run; in the second table epochs in their place
MIXTURE = dict(math=3, code=3, form=2, tools=2)  # as configs/tiny.py's last stage
MADE = Path("out/tiny")  # whose pretrain and refine phases the experiment starts from
ARM_FILES = Path("out/sft_data/arms")


@dataclass(frozen=True)
class SftRun(Run):
    phase = "sft"

    def settings(self) -> dict[str, object]:
        return {"init_from": str(MADE / "pretrain"), "sft.data": str(ARM_FILES / self.arm.replace("/", "-")),
                "sft.lr": self.lr, "sft.seed": self.seed, "sft.stages": [json.loads(s) for s in self.stages],
                "sft.compare": False}


def prepare_sft_data() -> dict[str, int]:
    """Writes each arm's conversations; returns its rows."""
    if not (MADE / "refine" / "report.json").is_file():
        raise UserError("there is no out/tiny/refine: run `bash speedrun.sh` first")
    best = MADE / "best"
    call(["refine.py", "configs/tiny.py", "--run=tiny", f"--refine.folder={best}", "--refine.n_drafts=2",
          "--refine.rounds=0", "--refine.completer="], Path("out/sft_data/best.log"))
    used, again = (json.loads((folder / "report.json").read_text())["usage"] for folder in (MADE / "refine", best))
    written = lambda usage, *roles: sum(usage.get(f"{name} {role} written", 0) for role in roles
                                        for name in dict.fromkeys(key.split()[0] for key in usage))
    tokens = written(used, "draft", "checklist", "evaluate", "revise")
    checklists, drafts = written(again, "checklist"), written(again, "draft", "evaluate") / 2  # of one draft a drafter
    share = (tokens - checklists) / drafts - 1  # of the problems that get a second draft of each drafter
    print(f"refinement wrote {tokens:,} tokens; for best of N that is a second draft of each drafter for {share:.1%} "
          "of the problems")
    rows = dict.fromkeys(SFT_ARMS, 0)
    for name in MIXTURE:
        read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
        kept = {record["number"]: record for record in read(MADE / "refine" / f"{name}.jsonl")}
        history = {case["number"]: case for case in read(MADE / "refine" / "history" / f"{name}.jsonl")}
        more = {case["number"]: case["attempts"] for case in read(best / "history" / f"{name}.jsonl")}
        arms = {arm: [] for arm in SFT_ARMS}
        for i, number in enumerate(n for n in history if n in more):
            attempts = history[number]["attempts"]
            first = [attempt for attempt in attempts if attempt["round"] == 0]
            seen = more[number] if (i * share) % 1 + share >= 1 else more[number][::2]
            raw, top = first[i % len(first)], max(first, key=lambda attempt: attempt["score"])
            chosen = max(seen, key=lambda attempt: attempt["score"])
            solution = {"response": split(attempts[history[number]["best"]]["response"])[1]}
            replies = {"a": reply_of(raw), "b": reply_of(chosen), "b'": reply_of(chosen, chain=""),
                       "c": reply_of(solution, chain="")}
            if number in kept:
                replies["d"] = reply_of(solution, chain=split(top["response"])[0])
                replies["e"] = kept[number]["messages"][-1]
                replies |= {f"e/{n}": replies["e"] for n in (4, 16) if len(arms["e"]) % n == 0}
            for arm, reply in replies.items():
                if reply["content"].strip():
                    arms[arm].append({"messages": [*history[number]["instruction"], reply]})
        for arm, records in arms.items():
            path = ARM_FILES / arm.replace("/", "-") / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(record) + "\n" for record in records)
            if not path.is_file() or path.read_text() != text:
                common.write_atomic(path, text)
            rows[arm] += len(records)
    return rows


def reply_of(attempt: dict, chain: str | None = None) -> dict:
    """An assistant message of a response: with its own chain of thought, another one, or none ("")."""
    own, content = split(attempt["response"])
    chain = own if chain is None else chain
    return {"role": "assistant", "content": content} | ({"reasoning": chain} if chain else {})


def sft_data(args, train) -> list[dict]:
    """Runs the experiment; returns all results."""
    rows = prepare_sft_data()
    print("rows: " + ", ".join(f"({arm}) {n:,}" for arm, n in rows.items()))
    stage = dict(name="sft", lr=[1, 0.01], curve="1-sqrt", context=256)
    by_tokens = json.dumps(stage | dict(trained_tokens=round(SFT_TOKENS * args.scale), mixture=MIXTURE))
    by_rows = json.dumps(stage | dict(epochs={name: SFT_EPOCHS * args.scale for name in MIXTURE}))
    arms = [arm for arm in SFT_ARMS if "/" not in arm]
    sweep = train([SftRun("sft_data", "sweep", arm, 100, lr, "dev", (by_tokens,)) for lr in SFT_RATES for arm in arms])
    rates = best_rates(sweep)
    runs = [SftRun("sft_data", table, arm, seed, rates[arm[0] if "/" in arm else arm], "test", (stages_,))
            for table, stages_, seeds, some in (("tokens", by_tokens, args.seeds, SFT_ARMS), ("rows", by_rows, 1, arms))
            for seed in range(seeds) for arm in some]
    return sweep + train(runs)


def sft_data_tables(results: list[dict]) -> str:
    pairs = [("c", "b'"), ("e", "d"), ("e", "b"), ("b", "a"), ("e", "a"), ("e", "e/4"), ("e/4", "e/16")]
    text = tuned(results)
    for title, table in (("the same trained tokens", "tokens"), ("the same rows and epochs, one seed", "rows")):
        some = [r for r in results if r["table"] == table]
        here = {arm: text for arm, text in SFT_ARMS.items() if any(r["arm"] == arm for r in some)}
        text += f"\n\n### {title}\n\n{compare(some, here, [pair for pair in pairs if set(pair) <= set(here)])}"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# dpd: the same pairs and steps from the same SFT checkpoint, with other parts of the loss

_NONE = dict(dpo=0.0, kl_chosen=0.0, kl_rejected=0.0)
DPD_ARMS = {  # arm -> (what it is, settings)
    "sft": ("the SFT checkpoint, not trained", dict(epochs=0.01)),
    "teacher": ("the teacher", dict(epochs=0.01)),
    "a": ("more SFT, on the teacher's answers", _NONE | dict(nll=1.0)),
    "b": ("DPO alone", _NONE | dict(dpo=0.1)),
    "c": ("distillation on y+ alone", _NONE | dict(kl_chosen=1.0)),
    "d": ("distillation on y+ and y-", _NONE | dict(kl_chosen=1.0, kl_rejected=1.0)),
    "e": ("full DPD: DPO, distillation on y+ and y-", dict(dpo=0.1, kl_chosen=1.0, kl_rejected=1.0)),
    "f": ("DPO, distillation on y+", _NONE | dict(dpo=0.1, kl_chosen=1.0)),
    "g": ("distillation on fresh samples of the student (GKD)",
          _NONE | dict(kl_rejected=1.0, refresh_every=1, negatives="any")),
}
DPD_RATES = (5e-5, 2.5e-4, 5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class DpdRun(Run):
    phase = "distill"

    def settings(self) -> dict[str, object]:
        source = MADE / ("teacher/sft" if self.arm == "teacher" else "sft")
        made = {"init_from": str(source), "distill.teacher": str(MADE / "teacher/sft"), "distill.lr": self.lr,
                "distill.seed": self.seed, "distill.compare": False, "distill.samples": "out/dpd/samples",
                "distill.keep": 1, "distill.prompts": []}
        if self.lr == 0:  # no samples of its own
            made |= {"distill.problems": {}, "distill.pairs": f"out/dpd/pairs{self.seed}/distill/pairs.jsonl"}
        return made | {f"distill.{key}": value for key, value in DPD_ARMS[self.arm][1].items()}


def dpd(args, train) -> list[dict]:
    """Runs the experiment; returns all results."""
    if not (MADE / "teacher" / "sft").is_dir():
        raise UserError("there is no out/tiny/teacher: run `bash speedrun.sh` first")
    for seed in (100, *range(args.seeds)):  # each seed its own problems, samples and pairs, the same for all arms
        call(["distill.py", "configs/tiny.py", f"--run=dpd/pairs{seed}", f"--init_from={MADE / 'sft'}", "--prepare",
              f"--distill.teacher={MADE / 'teacher/sft'}", f"--distill.seed={seed}",
              "--distill.samples=out/dpd/samples"], Path("out/dpd/pairs.log"))
    arms = [arm for arm in DPD_ARMS if len(arm) == 1]
    sweep = train([DpdRun("dpd", "sweep", arm, 100, lr, "dev", ()) for lr in DPD_RATES for arm in arms])
    rates = best_rates(sweep)
    return sweep + train([DpdRun("dpd", "arms", arm, seed, rates.get(arm, 0.0), "test", ())
                          for seed in range(args.seeds) for arm in DPD_ARMS])


def dpd_tables(results: list[dict]) -> str:
    some, names = [r for r in results if r["table"] == "arms"], {arm: text for arm, (text, _) in DPD_ARMS.items()}
    pairs = [("e", other) for other in ("sft", "a", "b", "c", "d", "f", "g")] + [("d", "c"), ("f", "c")]
    return (f"{tuned(results)}\n\n### the same pairs and steps\n\n{compare(some, names, pairs)}\n\n### by task\n\n"
            f"{by_task(some, names)}\n\n### where the answers' likelihoods end\n\n{likelihoods(some, names)}")


def likelihoods(results: list[dict], arms: dict[str, str]) -> str:
    """Markdown: where a run's last ten steps have the answers, in nats a token; and what it cost."""
    shown = {"student_chosen": "log p(y+)", "student_rejected": "log p(y-)", "margin": "margin",
             "accuracy": "pairs in order", "kl_chosen": "KL on y+", "kl_rejected": "KL on y-"}
    lines = ["| arm | " + " | ".join(shown.values()) + " | seconds |", "|---" * (2 + len(shown)) + "|"]
    for arm in arms:
        rows = [r for r in results if r["arm"] == arm]
        cells = [f"{np.mean([r['last'][key] for r in rows]):.3f}" if key in rows[0]["last"] else "" for key in shown]
        lines.append(f"| ({arm}) | {' | '.join(cells)} | {np.mean([r['seconds'] for r in rows]):.0f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# rl: what each of the three stages changes; then the first stage alone, with and without filter, and from SFT

RL_STAGES = {"dpd": "DPD", "STEM": "STEM", "coding": "coding", "preference": "preference"}
RL_ARMS = {  # arm -> (what it is, phase it starts from, steps of the first stage as a multiple, settings)
    "dpd": ("the DPD checkpoint, not trained", "distill", 0, {"filter_samples": 0}),
    "sft": ("the SFT checkpoint, not trained", "sft", 0, {"filter_samples": 0}),
    "a": ("RL from DPD", "distill", 1, {}),
    "b": ("RL from DPD, without the filter", "distill", 1, {"filter_samples": 0}),
    "c": ("RL from SFT", "sft", 1, {}),
    "d": ("RL from SFT, longer by the time of DPD", "sft", 5, {}),
}
RL_MIXED = dict(name="mixed", problems=dict(math=800, code=800, taste=600), reward="pairwise",  # shares as of the steps
                temperature=0.73)  # the stages' mean over their steps
RL_RATES = (1e-4, 2e-4)  # swept for (a) and (c); (b) takes the best of (a), (d) that of (c)


@dataclass(frozen=True)
class RlRun(Run):
    phase = "rl"

    def settings(self) -> dict[str, object]:
        _, source, times, other = RL_ARMS[self.arm]
        stages = [json.loads(stage) for stage in self.stages]
        stages[0]["steps"] = max(1, times * stages[0]["steps"])
        made = {"init_from": str(MADE / source), "rl.judge": str(MADE / "reward"), "rl.lr": self.lr,
                "rl.seed": self.seed, "rl.stages": stages, "rl.prompts": []}
        return made | {f"rl.{key}": value for key, value in other.items()}


def rl(args, train) -> list[dict]:
    """Runs the experiment; returns all results."""
    if not (MADE / "reward").is_dir():
        raise UserError("there is no out/tiny/reward: run `bash speedrun.sh` first")
    from configs.tiny import rl as recipe
    stages = tuple(json.dumps(stage | dict(steps=max(1, round(stage["steps"] * args.scale))))
                   for stage in recipe["stages"])
    sweep = train([RlRun("rl", "sweep", arm, 100, lr, "dev", stages[:1]) for arm in "ac" for lr in RL_RATES])
    rates, seeds = best_rates(sweep), range(args.seeds)
    rates |= {"b": rates["a"], "d": rates["c"]}
    chains = [RlRun("rl", "stages", "a", seed, lr, "test", stages)
              for lr in dict.fromkeys((rates["a"], recipe["lr"])) for seed in seeds]
    mixed = json.dumps(RL_MIXED | dict(steps=sum(json.loads(stage)["steps"] for stage in stages)))
    arms = [RlRun("rl", "mixed", "a", seed, recipe["lr"], "test", (mixed,)) for seed in seeds]
    arms += [RlRun("rl", "arms", arm, seed, rates[arm], "test", stages[:1]) for arm in "dcb" for seed in seeds]
    start = train([RlRun("rl", "arms", arm, 0, 0.0, "test", stages[:1]) for arm in ("dpd", "sft")])
    return sweep + [result | {"seed": seed} for result in start for seed in seeds] + train(chains + arms)


def rl_tables(results: list[dict]) -> str:
    arms = [r for r in results if r["table"] == "arms"]
    ends = [r | stage | {"arm": name} for r in results if r["table"] == "stages" for name, stage in r["stages"].items()]
    rate, start = best_rates([r for r in results if r["table"] == "sweep"])["a"], [r for r in arms if r["arm"] == "dpd"]
    chains = {lr: start + [r for r in ends if r["lr"] == lr] for lr in sorted({r["lr"] for r in ends})}
    arms += [r | {"arm": "a"} for r in chains[rate] if r["arm"] == "STEM"]  # the chain's beginning
    math = [stats.of_task(r, "math") for r in arms]
    names = {arm: about[0] for arm, about in RL_ARMS.items() if any(r["arm"] == arm for r in arms)}
    pairs = [("a", "dpd"), ("a", "b"), ("c", "sft"), ("a", "c"), ("a", "d"), ("d", "c")]
    pairs = [pair for pair in pairs if set(pair) <= set(names)]
    tables = [f"### after each stage, at a rate of {lr:g}\n\n{by_stage(chain, RL_STAGES)}\n\n"
              for lr, chain in chains.items()]
    if mixed := [r | {"arm": "mixed"} for r in results if r["table"] == "mixed"]:
        both = [r for r in chains[mixed[0]["lr"]] if r["arm"] == "preference"] + mixed
        tables.append("### all tasks in one stage, as many steps\n\n"
                      f"{by_stage(both, {'preference': 'three stages', 'mixed': 'one stage'})}\n\n")
    return (f"{tuned(results)}\n\n{''.join(tables)}### the first stage alone, in mathematics\n\n"
            f"{compare(math, names, pairs)}\n\n### the first stage alone, by task\n\n{by_task(arms, names)}")


EXPERIMENTS = {  # name: (what runs it, what makes tables of its results, config)
    "fg_wsd": (fg_wsd, fg_wsd_tables, "configs/fg_wsd.py"),
    "sft_data": (sft_data, sft_data_tables, "configs/tiny_sft_data.py"),
    "dpd": (dpd, dpd_tables, "configs/tiny_dpd.py"),
    "rl": (rl, rl_tables, "configs/tiny_rl.py"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Running

def call(command: list[str], log: Path, settings: dict[str, object] = {}) -> None:
    """Runs a script of ours with its output in a file; UserError with the last lines where it fails."""
    command = command + [f"--{k}={value if isinstance(value, str) else repr(value)}" for k, value in settings.items()]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as f:
        code = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], stdout=f, stderr=f,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise UserError(f"`{shlex.join(command)}` failed with exit code {code}; {log} ends with: {' / '.join(last)}")


def code_and_data(config: str, name: str, phase: str) -> str:
    """Hash of all that a run depends on beside its settings: the code, the config, the data."""
    ask = (f"import sys, {phase}, evaluate\n"
           "for module in [*sys.modules.values()]: print(getattr(module, '__file__', None))")
    loaded = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    code = sorted(path for path in map(Path, set(loaded.splitlines())) if ROOT in path.parents)
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (Path(config), *code)]
    for manifest in sorted(Path("out", name, "data").glob("*/manifest.json")):
        parts += [shard["sha256"] for shard in json.loads(manifest.read_text())["shards"]]
    arms = sorted([*Path("out", name, "arms").rglob("*.jsonl"), *Path("out", name).glob("pairs*/distill/pairs.jsonl")])
    parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in arms]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def inherit(run: Run, folder: Path, others: list[tuple[Run, Path]]) -> None:
    """Copies the checkpoint at which a finished run parts from this one, if there is one: pretrain.py goes on there."""
    if run.phase != "pretrain" or (folder / "pretrain").exists():
        return
    found = []
    for other, path in others:
        same = 0
        while same < len(run.stages) and other.stages[same] == run.stages[same]:
            same += 1
        if same and (other.lr, other.seed) == (run.lr, run.seed) and (path / "result.json").is_file():
            name = json.loads(run.stages[same - 1])["name"]
            found += [(same, step) for step in common.list_checkpoints(path / "pretrain")
                      if (meta := common.read_meta(step))["stage"] == name and meta["keep"]]
    if found:
        _, step = max(found, key=lambda pair: pair[0])
        shutil.copytree(step, folder / "pretrain.tmp" / step.name)
        (folder / "pretrain.tmp").rename(folder / "pretrain")


def finish(run: Run, config: str, made_by: str, others: list[tuple[Run, Path]]) -> dict:
    """Trains and evaluates a run, as far as it is not done; returns its result: one line of results/<name>.jsonl."""
    folder = run.folder(made_by)
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text()) | {"code": made_by}
    inherit(run, folder, others)
    name = str(folder.relative_to("out"))
    log = folder / "log.txt"
    call([f"{run.phase}.py", config, f"--run={name}"], log, run.settings() | {"evaluate.tasks": []})
    stages = {}
    if run.phase == "rl" and len(run.stages) > 1:  # each stage's end is a checkpoint that is kept
        for path in reversed(common.list_checkpoints(folder / "rl")):
            if (end := common.read_meta(path))["keep"]:
                stages[end["stage"]] = correct_of(config, f"{name}/{path.name}", run.split, path, log)
    found = [*stages.values()][-1] if stages else correct_of(config, name, run.split, folder / run.phase, log)
    meta = common.read_meta(common.list_checkpoints(folder / run.phase)[0])
    held_out = [line["validation"] for line in common.read_metrics(folder / run.phase) if "validation" in line]
    result = dict(table=run.table, arm=run.arm, seed=run.seed, split=run.split, lr=run.lr, commit=meta["commit"],
                  command="python " + meta["command"], config=meta["config"], machine=meta["machine"],
                  seconds=meta["seconds"], **found)
    if stages:
        result["stages"] = stages
    if run.phase == "distill":
        steps = [line for line in common.read_metrics(folder / "distill") if "loss" in line][-10:]
        result["last"] = {key: float(np.mean([line[key] for line in steps])) for key in steps[-1]
                          if isinstance(steps[-1][key], float)}
    if held_out:
        result["bits_per_byte"] = next(iter(held_out[-1].values()))["bits_per_byte"]
    for step in common.list_checkpoints(folder / run.phase):  # stage ends stay, for arms that begin alike
        if not common.read_meta(step)["keep"] or run.phase != "pretrain":
            shutil.rmtree(step)
    common.write_atomic(folder / "result.json", json.dumps(result))
    return result | {"code": made_by}


def correct_of(config: str, name: str, split: str, checkpoint: Path, log: Path) -> dict:
    """Evaluates a checkpoint: {"avg", "k", "problems", "correct" (rewards of each problem's k samples), "tasks"}."""
    call(["evaluate.py", config, f"--run={name}", f"--evaluate.split={split}", f"--evaluate.checkpoint={checkpoint}"],
         log)
    rows = [json.loads(line) for line in Path("out", name, "evaluate.jsonl").read_text().splitlines()]
    correct = {}
    for row in rows:
        key = f"{row['task']} {row['problem']}"
        correct[key] = correct.get(key, 0) + (row["reward"] or 0)
    k = len(rows) // len(correct)
    of_task = lambda task: [n for key, n in correct.items() if key.split()[0] == task]
    return dict(avg=sum(correct.values()) / len(rows), k=k, problems=len(correct),
                correct=[correct[key] for key in sorted(correct)],
                tasks={task: float(np.mean(of_task(task))) / k for task in dict.fromkeys(row["task"] for row in rows)})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, … (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each (default 2)")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every stage alike")
    parser.add_argument("--show", action="store_true", help="print the tables of the recorded results, and stop")
    args = parser.parse_args()
    experiment, tables, config = EXPERIMENTS[args.name]
    if args.show:
        return print(tables(results.recorded(args.name)))
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    started, bar = time.time(), tqdm(unit=" runs")

    def train(runs: list[Run]) -> list[dict]:
        made_by = code_and_data(config, args.name, runs[0].phase)
        folders = [(run, run.folder(made_by)) for run in runs]
        bar.total = (bar.total or 0) + len(runs)

        def one(run: Run) -> dict:
            result = finish(run, config, made_by, folders)
            tqdm.write(f"{run.table:7} ({run.arm}) seed {run.seed:3} lr {run.lr:g}: accuracy {result['avg']:.3f}, "
                       f"{result['seconds']:.0f} s")
            bar.update()
            return result

        with ThreadPoolExecutor(args.jobs) as pool:
            return list(pool.map(one, runs))

    lines = experiment(args, train)
    print(f"\n{tables(lines)}")
    if args.scale == 1:
        Path("results").mkdir(exist_ok=True)
        common.write_atomic(Path("results") / f"{args.name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    bar.close()
    print(f"\n{len(lines)} runs, {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    common.cli(main)
