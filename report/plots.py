"""Pictures of a run: its plan, its metrics, and its accuracy after each phase.

A picture says run and seed, and is written beside the metrics that it is of. `steps` are the lines
of metrics.jsonl that training steps wrote; `spans` are stages on the x axis, (name, from, to).
"""
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

import common
from data.text.mixture import MixtureStage
from loop import read_evaluations, task_title
from schedule import learning_rate

plt.switch_backend("Agg")  # which needs no screen
plt.rcParams |= {"font.size": 9}
# Okabe and Ito's colours first: told apart by everybody, and on paper
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#666666",
          "#8c510a", "#000000")

Spans = list[tuple[str, float, float]]


def color_at(i: int) -> str:
    return COLORS[i % len(COLORS)]


# --------------------------------------------------------------------------------------------------
# Figures and axes

def new_figure(n: int, sharex: bool = True):
    """A figure of n panels, one above the other: (figure, axes)."""
    figure, axes = plt.subplots(n, 1, figsize=(9, 2.2 * n), sharex=sharex, squeeze=False,
                                constrained_layout=True)
    for axis in axes[:, 0]:
        simplify(axis)
    return figure, axes[:, 0]


def save_figure(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def simplify(axis) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def set_log_scale(axis) -> None:
    """A logarithmic axis with 1, 2 and 5 of each power of ten, written out."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def place_legend(axis) -> None:
    """Beside the axis, where it hides nothing."""
    handles, _ = axis.get_legend_handles_labels()
    if handles:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def set_title(figure, folder: Path, what: str) -> None:
    title = f"{folder.parent.name}: {what}"
    seed = read_newest_meta(folder).get(folder.name, {}).get("seed")
    if seed is not None:
        title += f", seed {seed}"
    figure.suptitle(title, fontsize=10)


def read_newest_meta(folder: Path) -> dict:
    """How the newest checkpoint of a phase was made; {} without one that can be read."""
    for path in common.list_checkpoints(folder):
        try:
            return common.read_meta(path)
        except common.UserError:
            continue
    return {}


# --------------------------------------------------------------------------------------------------
# What goes into a panel

def shade_stages(axis, spans: Spans, names: bool = False) -> None:
    """Shades every other stage; names: writes the stages' names above."""
    for i, (name, first, last) in enumerate(spans):
        color = "0.95" if i % 2 else "none"  # also without color: the axis reaches as far as names
        axis.axvspan(first, last, color=color, zorder=0)
        if names:
            axis.annotate(name, ((first + last) / 2, 1.02), xycoords=("data", "axes fraction"),
                          ha="center", fontsize=8)


def find_spans(steps: list[dict]) -> Spans:
    """The stages that metrics have come to: (name, first step, end)."""
    firsts, ends = {}, {}
    for line in steps:
        firsts.setdefault(line["stage"], line["step"])
        ends[line["stage"]] = line["step"] + 1
    return [(name, firsts[name], end) for name, end in ends.items()]


def plot_curve(axis, steps: list[dict], key: str, label: str | None, color: str,
               style: str = "-", width: float = 1.2) -> None:
    """One of the metrics by step, where it was measured."""
    measured = [line for line in steps if line.get(key) is not None]
    if measured:
        x = [line["step"] for line in measured]
        y = [line[key] for line in measured]
        axis.plot(x, y, style, color=color, lw=width, label=label)


def plot_shares(axis, spans: Spans, mixtures: dict[str, dict[str, float]]) -> None:
    """The mixture of each stage, stacked; mixtures: {stage: {pool: weight}}."""
    pools = {}  # in order, each once
    for mixture in mixtures.values():
        pools |= dict.fromkeys(mixture)
    for name, first, last in spans:
        mixture = mixtures.get(name, {})
        total = sum(mixture.values()) or 1
        bottom = 0.0
        for i, pool in enumerate(pools):
            share = mixture.get(pool, 0) / total
            axis.fill_between([first, last], bottom, bottom + share, color=color_at(i), lw=0)
            bottom += share
    for i, pool in enumerate(pools):
        axis.fill_between([], [], color=color_at(i), label=pool)
    axis.set_ylabel("share of tokens")
    place_legend(axis)


def plot_accuracy(axis, lines: list[dict]) -> None:
    """Held-out accuracy of each task, with its standard error over problems, where measured."""
    scored = [line for line in lines if line.get("scores")]
    tasks = {}  # in order, each once
    for line in scored:
        tasks |= dict.fromkeys(line["scores"])
    for i, task in enumerate(tasks):
        asked = [line for line in scored if task in line["scores"]]
        x = [line.get("step", -1) + 1 for line in asked]
        scores = [line["scores"][task] for line in asked]
        y = [score["avg"] for score in scores]
        error = [score["stderr"] for score in scores]
        axis.errorbar(x, y, error, fmt="o-", ms=4, lw=1.2, capsize=3, color=color_at(i),
                      label=task_title(task))
    axis.set(ylabel="accuracy (avg@k ± s.e.)", ylim=(-0.03, 1.03))
    place_legend(axis)


def plot_loss(axis, steps: list[dict], evaluations: list[dict]) -> None:
    """Loss of each training step, and of each held-out pool at each evaluation."""
    x = [line["step"] for line in steps]
    y = np.array([line["loss"] for line in steps], dtype=float)
    axis.plot(x, y, color="0.7", lw=0.8, label="training, each step")
    pools = evaluations[-1]["validation"] if evaluations else {}
    for i, pool in enumerate(pools):
        measured = [line for line in evaluations if pool in line["validation"]]
        x = [line["step"] + 1 for line in measured]
        y = [line["validation"][pool]["loss"] for line in measured]
        axis.plot(x, y, "o-", ms=4, lw=1.2, color=color_at(i), label=f"held-out {pool}")
    set_log_scale(axis)
    axis.set_ylabel("loss (nats per token)")
    place_legend(axis)


# --------------------------------------------------------------------------------------------------
# Pictures

def plot_plan(path: Path, config: SimpleNamespace, plan: list[MixtureStage]) -> Path:
    """Rate, mixture, context and rotary base over the run's tokens, before any training."""
    figure, axes = new_figure(3)
    rate, data, length = axes
    base = length.twinx()
    theta = config.model.rope_theta
    spans, mixtures = [], {}
    first = 0
    for stage in plan:
        taken = stage.taken()
        last = first + sum(taken.values())
        spans.append((stage.name, first, last))
        mixtures[stage.name] = taken
        steps = np.unique(np.linspace(stage.first_step, stage.end_step - 1, 200).astype(int))
        x = first + (steps + 1 - stage.first_step) / stage.n_steps * (last - first)
        rates = [learning_rate(config.pretrain.lr, stage, int(step)) for step in steps]
        rate.plot(x, rates, color="black")
        theta = stage.settings.rope_theta or theta
        length.plot([first, last], [stage.context] * 2, color=COLORS[0], lw=3)
        base.plot([first, last], [theta] * 2, color=COLORS[1], lw=2, ls="--")
        first = last
    plot_shares(data, spans, mixtures)
    rate.set_ylabel("learning rate")
    length.set(ylabel="context (tokens)", xlabel="tokens trained on")
    length.set_yscale("log", base=2)
    base.set_yscale("log")
    base.set_ylabel("RoPE base (dashed)", color=COLORS[1])
    for axis in axes:
        shade_stages(axis, spans, names=axis is rate)
    figure.suptitle(f"{config.run}: plan", fontsize=10)
    return save_figure(figure, path)


def read_mixtures(meta: dict) -> dict[str, dict[str, float]]:
    """{stage: {pool: weight}} of a checkpoint of pre-training; other phases have no stage.

    A stage in epochs of several pools has no weights.
    """
    stages = {stage["name"]: stage for stage in meta.get("pretrain", {}).get("stages", ())}
    mixtures = {}
    if not stages:
        return mixtures
    past = [entry for entry in meta["resume_key"] if isinstance(entry, list)]  # the seed is none
    for name, *_, pools in past:  # pools: {pool: tokens that were read before}
        mixture = stages[name].get("mixture", {})
        if mixture.keys() != pools.keys():
            mixture = dict.fromkeys(pools, 1) if len(pools) == 1 else {}
        mixtures[name] = mixture
    return mixtures


def plot_run(folder: Path) -> Path:
    """Draws loss.png: loss, rate and, where there are some, mixture and accuracy by step."""
    lines = common.read_metrics(folder)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "validation" in line]
    mixtures = read_mixtures(read_newest_meta(folder))
    has_scores = any(line.get("scores") for line in lines)
    spans = find_spans(steps)
    figure, axes = new_figure(2 + has_scores + bool(mixtures))
    loss, rate, *others = axes
    plot_loss(loss, steps, evaluations)
    plot_curve(rate, steps, "lr", None, "black", width=1.5)
    rate.set(ylabel="learning rate", ylim=(0, None))
    if mixtures:
        plot_shares(others[0], spans, mixtures)
    if has_scores:
        plot_accuracy(others[-1], read_evaluations(folder))
    for axis in axes:
        shade_stages(axis, spans, names=axis is loss)
    axes[-1].set_xlabel("step")
    set_title(figure, folder, folder.name)
    return save_figure(figure, folder / "loss.png")


def plot_distill(folder: Path) -> Path:
    """Draws loss.png of Dual Preference Distillation.

    The terms of the loss, the margin, and where the answers' likelihoods go, by step.
    """
    steps = [line for line in common.read_metrics(folder) if "loss" in line]
    figure, axes = new_figure(5)
    terms, margin, share, chosen, rejected = axes
    plot_curve(terms, steps, "dpo", "preference (nats per pair)", COLORS[0])
    plot_curve(terms, steps, "kl_chosen", "KL on y+ (nats per token)", COLORS[1])
    plot_curve(terms, steps, "kl_rejected", "KL on y- (nats per token)", COLORS[2])
    plot_curve(margin, steps, "margin", "mean over pairs", COLORS[3])
    plot_curve(share, steps, "accuracy", "share of pairs", COLORS[4])
    for who, style in (("student", "-"), ("reference", "--"), ("teacher", ":")):
        plot_curve(chosen, steps, f"{who}_chosen", who, "black", style)
        plot_curve(rejected, steps, f"{who}_rejected", who, "black", style)
    terms.set(ylabel="terms of the loss")
    margin.set(ylabel="margin (nats)")
    share.set(ylabel="margin above 0", ylim=(-0.03, 1.03))
    chosen.set_ylabel("log p of y+\n(nats per token)")
    rejected.set_ylabel("log p of y-\n(nats per token)")
    rejected.set_xlabel("step")
    for axis in axes:
        place_legend(axis)
    set_title(figure, folder, "Dual Preference Distillation")
    return save_figure(figure, folder / "loss.png")


def plot_rl(folder: Path) -> Path:
    """Draws loss.png of RL: reward, held-out accuracy, entropy and lengths by step."""
    steps = [line for line in common.read_metrics(folder) if "reward" in line]
    figure, axes = new_figure(4)
    reward, accuracy, entropy, length = axes
    plot_curve(reward, steps, "reward", "mean reward", COLORS[0])
    plot_curve(reward, steps, "all_right", "groups all right", COLORS[1])
    plot_curve(reward, steps, "all_wrong", "groups all wrong", COLORS[2])
    plot_curve(reward, steps, "win_rate", "win rate", COLORS[3])
    plot_curve(reward, steps, "rubric", "rubric", COLORS[4])
    plot_accuracy(accuracy, read_evaluations(folder))
    plot_curve(entropy, steps, "entropy", "policy", COLORS[0])
    plot_curve(length, steps, "length", "all", COLORS[0])
    plot_curve(length, steps, "length_right", "right", COLORS[1])
    plot_curve(length, steps, "length_wrong", "wrong", COLORS[2])
    reward.set(ylabel="rollouts", ylim=(-0.03, 1.03))
    entropy.set_ylabel("entropy\n(nats per token)")
    length.set(ylabel="response (tokens)", xlabel="step")
    for axis in (reward, entropy, length):
        place_legend(axis)
    spans = find_spans(steps)
    for axis in axes:
        shade_stages(axis, spans, names=axis is reward)
    set_title(figure, folder, "reinforcement learning")
    return save_figure(figure, folder / "loss.png")


def plot_phases(path: Path, scores: dict[str, dict[str, dict]], title: str) -> Path:
    """Accuracy of each task after each phase, a panel a task; scores: {phase: {task: score}}."""
    tasks = {}  # in order, each once
    for by_task in scores.values():
        tasks |= dict.fromkeys(by_task)
    n_rows = -(-len(tasks) // 5)
    n_columns = -(-len(tasks) // n_rows)
    height = 0.5 + n_rows * (0.6 + 0.32 * len(scores))
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(9, height), sharey=True, squeeze=False,
                                constrained_layout=True)
    for axis in axes.flat[len(tasks):]:
        axis.set_axis_off()
    for i, (task, axis) in enumerate(zip(tasks, axes.flat)):
        y, asked = [], []
        for row, by_task in enumerate(scores.values()):
            if task in by_task:
                y.append(row)
                asked.append(by_task[task])
        x = [score["avg"] for score in asked]
        error = [score["stderr"] for score in asked]
        axis.errorbar(x, y, xerr=error, fmt="o-", ms=3.5, lw=1, capsize=3.5, color=color_at(i))
        axis.set(xlim=(-0.05, 1.05), xticks=(0, 0.5, 1), xticklabels=("0", "0.5", "1"))
        axis.set(yticks=range(len(scores)), yticklabels=list(scores))
        axis.set_title(task, fontsize=9)
        simplify(axis)
    axes[0, 0].set_ylim(len(scores) - 0.5, -0.5)
    figure.supxlabel("held-out accuracy (avg@k ± standard error over problems)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)
