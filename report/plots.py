"""What a phase shows of its folder: pictures of metrics.jsonl, and its gain as a table. report.py has the rest.

A picture says run and seed, and is written beside the metrics that it is of.
"""
import json
from pathlib import Path

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend that needs no screen comes first)
import numpy as np

import common

plt.rcParams |= {"font.size": 9}
# Okabe and Ito's colours first: told apart by everybody, and on paper
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#666666", "#8c510a", "#000000")


def new_figure(n: int, sharex: bool = True):
    figure, axes = plt.subplots(n, 1, figsize=(9, 2.2 * n), sharex=sharex, constrained_layout=True, squeeze=False)
    for axis in axes[:, 0]:
        _plain(axis)
    return figure, axes[:, 0]


def save_figure(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _plain(axis) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(axis) -> None:
    """Beside the axis, where it hides nothing."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def _stages(axis, spans: list[tuple[str, float, float]], names: bool = False) -> None:
    """Shades every other stage; spans: (name, from, to) on the x axis."""
    for i, (name, first, last) in enumerate(spans):
        axis.axvspan(first, last, color="0.95" if i % 2 else "none", zorder=0)  # all: the axis reaches as far as names
        if names:
            axis.annotate(name, ((first + last) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8)


def _spans(steps: list[dict]) -> list[tuple[str, int, int]]:
    """(stage, first step, end) of the stages that metrics have come to."""
    ends = {line["stage"]: line["step"] + 1 for line in steps}
    firsts = {line["stage"]: line["step"] for line in reversed(steps)}
    return [(name, firsts[name], end) for name, end in ends.items()]


def _shares(axis, spans: list[tuple[str, float, float]], shares: dict[str, dict[str, float]]) -> None:
    """The mixture of each stage, stacked; shares: {stage: {pool: weight}}."""
    pools = list(dict.fromkeys(pool for mixture in shares.values() for pool in mixture))
    for name, first, last in spans:
        bottom = 0.0
        for i, pool in enumerate(pools):
            share = shares.get(name, {}).get(pool, 0) / (sum(shares.get(name, {}).values()) or 1)
            axis.fill_between([first, last], bottom, bottom + share, color=COLORS[i % len(COLORS)], lw=0)
            bottom += share
    for i, pool in enumerate(pools):
        axis.fill_between([], [], color=COLORS[i % len(COLORS)], label=pool)
    axis.set_ylabel("share of tokens")
    _legend(axis)


def _accuracy(axis, lines: list[dict]) -> None:
    """Held-out accuracy of each task, with its standard error over problems, where it was measured."""
    scored = [line for line in lines if line.get("scores")]
    for i, task in enumerate(dict.fromkeys(task for line in scored for task in line["scores"])):
        shown = [line for line in scored if task in line["scores"]]
        axis.errorbar([line.get("step", -1) + 1 for line in shown], [line["scores"][task]["avg"] for line in shown],
                      [line["scores"][task]["stderr"] for line in shown], fmt="o-", ms=4, lw=1.2, capsize=3,
                      color=COLORS[i % len(COLORS)], label=task)
    axis.set(ylabel="accuracy (avg@k ± s.e.)", ylim=(-0.03, 1.03))
    _legend(axis)


def _title(figure, folder: Path, what: str) -> None:
    seed = origin(folder).get(folder.name, {}).get("seed")
    figure.suptitle(f"{folder.parent.name}: {what}" + (f", seed {seed}" if seed is not None else ""), fontsize=10)


def origin(folder: Path) -> dict:
    """What the newest checkpoint of a phase says of how it was made; {} without one that can be read."""
    for path in common.list_checkpoints(folder):
        try:
            return common.read_meta(path)
        except common.UserError:
            continue
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def plot_plan(path: Path, cfg, stages: list, plans: list, learning_rate) -> Path:
    """Rate, mixture, context and rotary base over the run's tokens, before any training."""
    by_name = {s.name: s for s in stages}
    figure, (rate, data, length) = new_figure(3)
    edges = np.cumsum([0] + [sum(plan.tokens.values()) for plan in plans])
    spans = [(plan.name, edges[i], edges[i + 1]) for i, plan in enumerate(plans)]
    base, theta = length.twinx(), cfg.model.rope_theta
    for plan, (name, first, last) in zip(plans, spans):
        steps = np.unique(np.linspace(plan.first_step, plan.end_step - 1, 200).astype(int))
        x = first + (steps + 1 - plan.first_step) / plan.n_steps * (last - first)
        rate.plot(x, [learning_rate(cfg.pretrain, by_name[name], plan, int(s)) for s in steps], color="black")
        theta = by_name[name].rope_theta or theta
        length.plot([first, last], [plan.context] * 2, color=COLORS[0], lw=3)
        base.plot([first, last], [theta] * 2, color=COLORS[1], lw=2, ls="--")
    _shares(data, spans, {plan.name: plan.tokens for plan in plans})
    rate.set_ylabel("learning rate")
    length.set(ylabel="context (tokens)", xlabel="tokens trained on")
    length.set_yscale("log", base=2)
    base.set_yscale("log")
    base.set_ylabel("RoPE base (dashed)", color=COLORS[1])
    for axis in (rate, data, length):
        _stages(axis, spans, names=axis is rate)
    figure.suptitle(f"{cfg.run}: plan", fontsize=10)
    return save_figure(figure, path)


def mixtures(meta: dict) -> dict[str, dict[str, float]]:
    """{stage: {pool: weight}} of a checkpoint of pre-training; a stage in epochs of several pools has none, other
    phases have no stage."""
    stages = meta.get("pretrain", {}).get("stages", ())
    return {stage["name"]: given if (given := stage.get("mixture", {})).keys() == pools.keys()
            else dict.fromkeys(pools, 1) if len(pools) == 1 else {}
            for stage, (*_, pools) in zip(stages, meta.get("history", ()))}


def plot_run(folder: Path) -> Path:
    """Draws loss.png: loss, learning rate and, where there are some, mixture and accuracy by step."""
    lines, mixture = common.read_metrics(folder), mixtures(origin(folder))
    steps, evals = [line for line in lines if "loss" in line], [line for line in lines if "validation" in line]
    has_scores, spans = any(line.get("scores") for line in lines), _spans(steps)
    figure, axes = new_figure(2 + has_scores + bool(mixture))
    loss, rate, left = axes[0], axes[1], list(axes[2:])
    loss.plot([line["step"] for line in steps], np.array([line["loss"] for line in steps], dtype=float), color="0.7",
              lw=0.8, label="training, each step")
    for i, pool in enumerate(evals[-1]["validation"] if evals else []):
        shown = [line for line in evals if pool in line["validation"]]
        loss.plot([line["step"] + 1 for line in shown], [line["validation"][pool]["loss"] for line in shown], "o-",
                  ms=4, lw=1.2, color=COLORS[i % len(COLORS)], label=f"held-out {pool}")
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    loss.set_ylabel("loss (nats a token)")
    _legend(loss)
    rate.plot([line["step"] for line in steps], [line["lr"] for line in steps], color="black")
    rate.set(ylabel="learning rate", ylim=(0, None))
    if mixture:
        _shares(left.pop(0), spans, mixture)
    if has_scores:
        _accuracy(left.pop(0), evaluations(folder))
    for axis in axes:
        _stages(axis, spans, names=axis is loss)
    axes[-1].set_xlabel("step")
    _title(figure, folder, folder.name)
    return save_figure(figure, folder / "loss.png")


def plot_distill(folder: Path) -> Path:
    """Draws loss.png of Dual Preference Distillation: the terms, the margin, and where the answers' likelihoods go."""
    steps = [line for line in common.read_metrics(folder) if "loss" in line]
    figure, (terms, margin, share, chosen, rejected) = new_figure(5)
    for i, (axis, key, label) in enumerate([
            (terms, "dpo", "preference (nats a pair)"), (terms, "kl_chosen", "KL on y+ (nats a token)"),
            (terms, "kl_rejected", "KL on y- (nats a token)"), (margin, "margin", "mean over pairs"),
            (share, "accuracy", "share of pairs")]):
        _curve(axis, steps, key, label, COLORS[i])
    for axis, side, sign in ((chosen, "chosen", "y+"), (rejected, "rejected", "y-")):
        for who, style in (("student", "-"), ("reference", "--"), ("teacher", ":")):
            _curve(axis, steps, f"{who}_{side}", who, "black", style)
        axis.set_ylabel(f"log p of {sign}\n(nats a token)")
    terms.set(ylabel="terms of the loss")
    margin.set(ylabel="margin (nats)")
    share.set(ylabel="margin above 0", ylim=(-0.03, 1.03))
    rejected.set_xlabel("step")
    for axis in (terms, margin, share, chosen, rejected):
        _legend(axis)
    _title(figure, folder, "Dual Preference Distillation")
    return save_figure(figure, folder / "loss.png")


def plot_rl(folder: Path) -> Path:
    """Draws loss.png of reinforcement learning: reward, held-out accuracy, entropy and lengths by step."""
    steps = [line for line in common.read_metrics(folder) if "reward" in line]
    figure, (reward, accuracy, entropy, length) = new_figure(4)
    for axis, curves in ((reward, {"reward": "mean reward", "all_right": "groups all right",
                                   "all_wrong": "groups all wrong", "win_rate": "win rate", "rubric": "rubric"}),
                         (entropy, {"entropy": "policy"}),
                         (length, {"length": "all", "length_right": "right", "length_wrong": "wrong"})):
        for i, (key, label) in enumerate(curves.items()):
            _curve(axis, steps, key, label, COLORS[i])
        _legend(axis)
    _accuracy(accuracy, evaluations(folder))
    reward.set(ylabel="rollouts", ylim=(-0.03, 1.03))
    entropy.set_ylabel("entropy\n(nats a token)")
    length.set(ylabel="response (tokens)", xlabel="step")
    for axis in (reward, accuracy, entropy, length):
        _stages(axis, _spans(steps), names=axis is reward)
    _title(figure, folder, "reinforcement learning")
    return save_figure(figure, folder / "loss.png")


def _curve(axis, steps: list[dict], key: str, label: str, color: str, style: str = "-") -> None:
    some = [line for line in steps if line.get(key) is not None]
    if some:
        axis.plot([line["step"] for line in some], [line[key] for line in some], style, color=color, lw=1.2,
                  label=label)


def plot_phases(path: Path, rows: dict[str, dict[str, dict]], title: str) -> Path:
    """Accuracy of each task after each phase, a panel a task; rows: {phase: {task: score}}."""
    names = list(dict.fromkeys(task for scores in rows.values() for task in scores))
    figure, axes = plt.subplots(1, len(names), figsize=(9, 1.2 + 0.32 * len(rows)), sharey=True, squeeze=False,
                                constrained_layout=True)
    y = {phase: i for i, phase in enumerate(rows)}
    for i, (task, axis) in enumerate(zip(names, axes[0])):
        shown = {phase: scores[task] for phase, scores in rows.items() if task in scores}
        axis.errorbar([s["avg"] for s in shown.values()], [y[phase] for phase in shown],
                      xerr=[s["stderr"] for s in shown.values()], fmt="o-", ms=3.5, lw=1, capsize=3.5,
                      color=COLORS[i % len(COLORS)])
        axis.set(xlim=(-0.05, 1.05), xticks=(0, 0.5, 1), xticklabels=("0", "0.5", "1"),
                 yticks=list(y.values()), yticklabels=list(y))
        axis.set_title(task, fontsize=9)
        _plain(axis)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel("held-out accuracy (avg@k ± standard error over problems)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# What a phase gained

def evaluations(folder: Path) -> list[dict]:
    """The lines of a phase's metrics, after the scores that it began with."""
    before = folder / "before.json"
    start = [{"stage": "", "scores": json.loads(before.read_text())}] if before.is_file() else []
    return start + common.read_metrics(folder)


def gain_rows(folder: Path) -> list[list[str]]:
    """A table of each task's accuracy before a phase and after it; [] where it was not evaluated before."""
    first, *lines = [line["scores"] for line in evaluations(folder) if line.get("scores")] or [{}]
    if not lines or not (folder / "before.json").is_file():
        return []
    rows = [["task", "before", "asked in", "after", "gain"]]
    for task, b in first.items():
        if a := lines[-1].get(task):
            rows.append([task, with_error(b), b["prompt_format"], with_error(a), f"{a['avg'] - b['avg']:+.3f}"])
    return rows


def gain(folder: Path) -> str:
    """gain_rows as text; "" for none."""
    rows = gain_rows(folder)
    if not rows:
        return ""
    first = next(iter(evaluations(folder)[0]["scores"].values()))
    return aligned(rows) + f"\naccuracy (avg@{first['k']} ± s.e.) on the same {first['n']} held-out problems a task"


def with_error(score: dict) -> str:
    return f"{score['avg']:.3f} ±{score['stderr']:.3f}"


def aligned(rows: list[list[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
