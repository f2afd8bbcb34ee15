"""The report of a run: its tables on the screen, and one page with everything: out/<run>/report.html.

    python -m report configs/tiny.py                 # at any time: what is not there yet is left out

The page is report/page.html, filled in by Jinja, which escapes whatever it is given: text of models is hostile. It
loads nothing: pictures are in it, and no script is. A table here is a list of rows, the first of them its head; a cell
is a text, or a pair of a text and a remark on it.
"""
import base64
import json
import math
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import jinja2
import numpy as np
import torch

import common
import hf
from common import UserError
from data.tasks import pages, registry
from data.tasks.problem import Problem
from evaluate import EvaluateConfig, task_prompt
from experiments import results
from experiments.all import EXPERIMENTS
from generate import sample, stop_ids
from report import plots

PHASES = ("pretrain", "sft", "distill", "rl")  # what is evaluated, in order
UNITS = {"pretrain": "tokens", "refine": "tokens written", "sft": "trained tokens", "distill": "tokens of answers",
         "reward": "verdicts", "rl": "tokens of rollouts"}  # of the pipeline's steps, in order
READ = 20_000          # histories of each set of instructions, at most
SHOWN = 2_000          # characters of a text, at most
ON_A_CPU = 4e9         # bytes of a checkpoint that is still asked for samples without a GPU


# ---------------------------------------------------------------------------------------------------------------------
# What all phases have

def after_each(out: Path) -> dict[str, dict]:
    """{phase, or stage of RL: {task: score}}, as each was evaluated at its end."""
    found = {}
    for phase in PHASES:
        for line in common.read_metrics(out / phase):
            if line.get("scores"):
                found[f"rl: {line['stage']}" if phase == "rl" else phase] = line["scores"]
    return found


def accuracy_rows(found: dict[str, dict], gains: bool = False) -> list[list]:
    """Accuracy of each task after each phase: what was gained, and what forgotten; gains: over the row above, with the
    standard errors of both added in quadrature."""
    names = list(dict.fromkeys(task for scores in found.values() for task in scores))
    rows, above = [["after", *names, "problems"]], {}
    for phase, scores in found.items():
        cells = []
        for task in names:
            now, before = scores.get(task), above.get(task)
            text = plots.with_error(now) if now else ""
            change = now and before and (f"{now['avg'] - before['avg']:+.3f} "
                                         f"±{math.hypot(now['stderr'], before['stderr']):.3f}")
            cells.append((text, change) if gains else text)
        rows.append([phase, *cells, str(next(iter(scores.values()))["n"])])
        above |= scores
    return rows


def stage_rows(folder: Path) -> list[list[str]]:
    """Held-out loss and accuracy at each evaluation of pre-training; [] before the first."""
    evals = [line for line in common.read_metrics(folder) if "validation" in line]
    if not evals:
        return []
    pools, names = list(evals[-1]["validation"]), list(evals[-1]["scores"])
    rows = [["end of", "steps", "minutes", *(f"bpb {pool}" for pool in pools), *names]]
    for line in evals:
        bits = [f"{line['validation'][pool]['bits_per_byte']:.3f}" for pool in pools]
        scores = [plots.with_error(line["scores"][task]) if task in line["scores"] else "" for task in names]
        rows.append([line["stage"], str(line["step"] + 1), f"{line['seconds'] / 60:.1f}", *bits, *scores])
    return rows


def short(n: float) -> str:
    """A count in few characters: 950, 1.29k, 3.20M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def cost(folder: Path, unit: str = "trained tokens") -> str:
    """Steps, tokens and time of a phase's training so far; "" before it begins."""
    steps = [line for line in common.read_metrics(folder) if "loss" in line]
    return (f"{len(steps):,} steps, {short(sum(line['tokens'] for line in steps))} {unit}, "
            f"{steps[-1]['seconds'] / 60:.1f} min") if steps else ""


def pipeline(out: Path) -> list[tuple]:
    """(phase, its cost or "" where it has not run, costs of the models that were trained for it) in order."""
    costs = {phase: cost(out / phase, unit) for phase, unit in UNITS.items()}
    if usage := load(out / "refine/report.json").get("usage"):
        costs["refine"] = f"{short(sum(n for key, n in usage.items() if key.endswith(' written')))} {UNITS['refine']}"
    beside = {path.parent.parent.name: cost(path.parent) for path in sorted(out.glob("*/sft/metrics.jsonl"))}
    helpers = {"distill": {name: beside.pop(name) for name in ("teacher",) if name in beside}, "refine": beside}
    return [(phase, text, helpers.get(phase, {})) for phase, text in costs.items()]


def load(path: Path) -> dict:
    """A JSON file; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def mean(values: Iterable) -> float:
    """Of the numbers among them; nan without any."""
    return float(np.mean([value for value in values if value is not None and value == value] or [math.nan]))


# ---------------------------------------------------------------------------------------------------------------------
# Refinement, reward model and RL

def refinement(folder: Path) -> dict:
    """Tables of how drafts were mended, and an example of each set; {} before refine.py has run."""
    made = load(folder / "report.json")
    if not made:
        return {}
    names, sets, asked = list(made["sets"]), made["sets"].values(), made["usage"]
    number = lambda value: f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
    results = [["", *names]] + [[key, *(number(column[key]) if key in column else "" for column in sets)]
                                for key in dict.fromkeys(key for column in sets for key in column)]
    usage = [["writer and role", "requests", "tokens written"]] + [
        [role, *(f"{asked.get(f'{role} {what}', 0):,}" for what in ("requests", "written"))]
        for role in dict.fromkeys(key.rpartition(" ")[0] for key in asked)]
    counts, examples = defaultdict(Counter), []
    for name in names:
        histories = read(folder / "history" / f"{name}.jsonl")
        for attempt in (attempt for case in histories for attempt in case["attempts"]):
            counts[attempt["round"], name].update(n=1, score=attempt["score"], passed=not attempt["failed"])
        examples += example(name, histories, {kept["number"]: kept for kept in read(folder / f"{name}.jsonl")})
    rounds = [["round", *names]]
    for turn in sorted({turn for turn, _ in counts}):
        cells = [(f"{c['passed'] / c['n']:.2f}", f"of {c['n']:,}; mean score {c['score'] / c['n']:.2f}")
                 if (c := counts[turn, name]) else "" for name in names]
        rounds.append([f"{turn}" if turn else "0 (drafts)", *cells])
    return dict(results=results, usage=usage, rounds=rounds, examples=examples[:3])


def read(path: Path) -> list[dict]:
    with open(path if path.is_file() else os.devnull, encoding="utf-8") as f:
        return [json.loads(line) for line in islice(f, READ)]


def example(name: str, histories: list[dict], kept: dict[int, dict]) -> list[dict]:
    """The case of a set that one revision raised most and whose reconstruction was kept, as it went; [] without any."""
    best = lambda case, number: max((attempt for attempt in case["attempts"] if attempt["round"] == number),
                                    key=lambda attempt: attempt["score"])
    revised = [case for case in histories if case["number"] in kept and case["attempts"][case["best"]]["round"] == 1]
    if not revised:
        return []
    case = max(revised, key=lambda case: best(case, 1)["score"] - best(case, 0)["score"])
    (draft, revision), record = (best(case, 0), best(case, 1)), kept[case["number"]]
    by = lambda attempt: f"{attempt['writer']}, score {attempt['score']:.2f}"
    critique = "\n".join(f"{failed['item']} {failed['critique']} ({failed['by']})" for failed in draft["failed"])
    parts = [("Instruction", "", case["instruction"][-1]["content"]), ("Draft", by(draft), draft["response"]),
             ("Critique", "", critique), ("Revision", by(revision), revision["response"]),
             ("Reconstructed chain", record["summary"], record["messages"][-1].get("reasoning", ""))]
    return [dict(title=name, parts=[(title, note[:SHOWN], text[:SHOWN]) for title, note, text in parts])]


def rl_rows(folder: Path) -> list[list[str]]:
    """What each stage of RL was like, in its first tenth and its last; [] before the first step."""
    steps = [line for line in common.read_metrics(folder) if "reward" in line]
    low, high = plots.origin(folder).get("rl", {}).get("keep_between", (0, 1))
    rows = [["stage", "steps", "problems kept", "reward", "entropy (nats a token)", "tokens a response", "cut off"]]
    for stage in dict.fromkeys(line["stage"] for line in steps):
        mine = [line for line in steps if line["stage"] == stage]
        few = max(1, len(mine) // 10)
        ends = lambda key, form: " → ".join(format(mean(line.get(key) for line in part), form)
                                            for part in (mine[:few], mine[-few:]))
        tried = []
        for path in folder.glob(f"filter/{stage.replace(' ', '_')}-*.json"):
            tried = [m for m in load(path)["means"].values() if m is not None]
        kept = f"{sum(low < m < high for m in tried):,} of {len(tried):,}" if tried else ""
        rows.append([stage, f"{len(mine):,}", kept, ends("reward", ".3f"), ends("entropy", ".3f"),
                     ends("length", ".1f"), ends("truncated", ".1%")])
    return rows if steps else []


# ---------------------------------------------------------------------------------------------------------------------
# Samples: the same problems, answered greedily by the checkpoint after each phase

def checkpoints(out: Path) -> dict[str, Path]:
    """{as in after_each(): the checkpoint at its end}, or the newest one of a phase that is still running."""
    found = {}
    for phase in PHASES:
        for path in reversed(common.list_checkpoints(out / phase)):
            try:
                meta = common.read_meta(path)
            except UserError:
                continue
            if phase != "rl" or meta["keep"]:
                found[f"rl: {meta['stage']}" if phase == "rl" else phase] = path
    return found


def samples(out: Path, cfg: EvaluateConfig) -> list[dict]:
    """A held-out problem of each generated family with the answers of all phases; kept in samples.json, by checkpoint.

    Level 2 of 1 to 3 where there is one. Right or wrong is computed anew each time.
    """
    names = [name for name in cfg.tasks if name in (*pages.FAMILIES, "taste")]
    problems = [registry.family(name).problems(cfg.split, 2, cfg.seed)[-1] for name in names]
    asked = dict(questions=[problem.question for problem in problems], length=cfg.max_new_tokens)
    known, answers = load(out / "samples.json"), {}
    for name, path in checkpoints(out).items() if problems else ():
        key = f"{path.relative_to(out)} {common.hash_json([common.read_meta(path)['files'], asked])}"
        try:
            answers[name] = key, known.get(key) or greedy(path, problems, cfg.max_new_tokens)
        except UserError as error:
            print(f"warning: no samples of {path}: {error}", flush=True)
    if answers:
        common.write_atomic(out / "samples.json", json.dumps(dict(answers.values())))
    found = []
    for i, problem in enumerate(problems):
        phases_of = {}
        for name, (_, texts) in answers.items():
            phases_of.setdefault(texts[i], []).append(name)
        marks = [{None: "not scored", 1: "right", 0: "wrong"}.get(reward, f"score {reward}")
                 for reward in registry.rewards([problem] * len(phases_of), list(phases_of))]
        replies = [(", ".join(phases), mark, text.strip()[:SHOWN])
                   for (text, phases), mark in zip(phases_of.items(), marks)]
        found.append(dict(task=names[i], question=problem.question, answer=problem.answer, replies=replies))
    return found if answers else []


def greedy(path: Path, problems: list[Problem], length: int) -> list[str]:
    """A checkpoint's answer to each problem, asked in the form that it was trained on."""
    meta, cuda = common.read_meta(path), torch.cuda.is_available()
    if not cuda and sum(size for size, _ in meta["files"].values()) > ON_A_CPU:
        raise UserError("it is too large to be asked on a CPU")
    model, tokenizer = hf.load(path, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    stop, form = stop_ids(tokenizer), "document" if meta["phase"] == "pretrain" else "chat"
    prompts = [task_prompt(problem, tokenizer, form) for problem in problems]
    drawn = sample(model, prompts, max_new_tokens=length, temperature=0, stop=stop)
    return [tokenizer.decode([t for t in each[0].tokens if t not in stop]) for each in drawn]


# ---------------------------------------------------------------------------------------------------------------------
# The page

def ablations() -> list[dict]:
    """The recorded tables of each experiment; those that cannot be read say so."""
    found = []
    for name, experiment in EXPERIMENTS.items():
        if Path(f"results/{name}.jsonl").is_file():
            try:
                found.append(dict(name=name, blocks=blocks(experiment.tables(results.read(name)))))
            except (UserError, ArithmeticError, LookupError, TypeError, ValueError) as error:
                found.append(dict(name=name, blocks=[("text", f"results/{name}.jsonl cannot be shown: {error!r}")]))
    return found


def blocks(markdown: str) -> list[tuple]:
    """The parts of what experiments print: ("heading", text), ("text", text) and ("table", rows)."""
    found = []
    for part in markdown.split("\n\n"):
        if part.startswith("|"):
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
            found.append(("table", [row for row in rows if not all(cell and not cell.strip("-:") for cell in row)]))
        elif part.startswith("### "):
            found.append(("heading", part[4:]))
        else:
            found.append(("text", part))
    return found


def origins(out: Path) -> list[list[str]]:
    """What each phase says of how it was made."""
    rows = [["phase", "step", "seed", "commit", "config", "machine", "command"]]
    for path in sorted(out.rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime):
        if meta := plots.origin(path.parent):
            rows.append([str(path.parent.relative_to(out)), str(meta["step"]), str(meta[meta["phase"]]["seed"]),
                         *(meta.get(key, "") for key in rows[0][3:])])
    return rows


def draw(out: Path) -> dict[str, str]:
    """Draws the pictures of the phases that have begun; {phase: address for an <img>}."""
    drawn, found = {}, after_each(out)
    for phase in UNITS:
        if cost(out / phase):
            plot = {"distill": plots.plot_distill, "rl": plots.plot_rl}.get(phase, plots.plot_run)
            drawn[phase] = plot(out / phase)
    if found:
        drawn["phases"] = plots.plot_phases(out / "phases.png", found, out.name)
    return {name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            for name, path in drawn.items()}


def write_page(cfg) -> Path:
    """Draws the pictures anew, and writes report.html beside them."""
    out, found = cfg.out, after_each(cfg.out)
    teacher, held_out = load(out / "distill/teacher.json"), load(out / "reward/held_out.json")
    made = dict(
        run=cfg.run, made=time.strftime("%Y-%m-%d %H:%M"), pictures=draw(out), accuracy=accuracy_rows(found, True),
        k=next((score["k"] for scores in found.values() for score in scores.values()), 0),
        pipeline=pipeline(out), stages=stage_rows(out / "pretrain"), refinement=refinement(out / "refine"),
        gains={phase: plots.gain_rows(out / phase) for phase in ("sft", "distill", "rl")},
        teacher=[["task", "accuracy"], *([task, plots.with_error(s)] for task, s in teacher.items() if "avg" in s)],
        held_out=[["", "share"], *([key, f"{value:.3f}" if key != "pairs" else f"{value:,}"]
                                   for key, value in held_out.items())],
        rl=rl_rows(out / "rl"), samples=samples(out, cfg.evaluate), ablations=ablations(),
        config_path=cfg.path, config=Path(cfg.path).read_text(), origins=origins(out),
        settings={phase: "\n".join(f"{key} = {value!r}" for key, value in meta[phase].items()) for phase in UNITS
                  if (meta := plots.origin(out / phase)).get(phase)},
        versions=[["", "version"], ["Python", platform.python_version()], ["PyTorch", torch.__version__],
                  ["NumPy", np.__version__], ["commit", common.current_commit()], ["system", platform.platform()],
                  ["machine", common.describe_machine(torch.device("cpu"))]])
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    common.write_atomic(out / "report.html", environment.get_template("page.html").render(made))
    return out / "report.html"


def main():
    cfg = common.load_config(__doc__, flags={"record": "append last evaluations to results/<phase>.jsonl (rl: rl_run)"},
                             evaluate=EvaluateConfig)
    evaluated = {phase: [line for line in common.read_metrics(cfg.out / phase) if "scores" in line] for phase in PHASES}
    if not any(evaluated.values()):
        raise UserError(f"no evaluation in {cfg.out}/*/metrics.jsonl yet")
    print(plots.aligned(accuracy_rows(after_each(cfg.out))))
    for phase, lines in evaluated.items():
        folder = cfg.out / phase
        if lines:
            print(f"\n{phase}\n{plots.aligned(stage_rows(folder)) if phase == 'pretrain' else plots.gain(folder)}")
        if lines and cfg.record:
            result = {key: lines[-1][key] for key in ("validation", "scores") if key in lines[-1]}
            result |= {key: found for key in ("before", "teacher") if (found := load(folder / f"{key}.json"))}
            if phase == "rl":  # each of its stages; results/rl.jsonl is of experiments/rl.py
                result["stages"] = {line["stage"]: line["scores"] for line in lines if line["scores"]}
            results.record("rl_run" if phase == "rl" else phase, common.read_meta(common.list_checkpoints(folder)[0]), **result)
    print(f"\npage: {write_page(cfg)}")


if __name__ == "__main__":
    common.cli(main)
