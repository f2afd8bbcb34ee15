"""Pictures and tables of a run: `python report.py configs/tiny.py` prints those of its phases."""
import json
from pathlib import Path

import matplotlib
import matplotlib.ticker
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend that needs no screen comes first)
import numpy as np

import common

COLORS = plt.get_cmap("tab10").colors


def new_figure(n: int, sharex: bool = True):
    figure, axes = plt.subplots(n, 1, figsize=(9, 2.2 * n), sharex=sharex, constrained_layout=True, squeeze=False)
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:, 0]


def save_figure(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _stages(axis, spans: list[tuple[str, float, float]], names: bool = False) -> None:
    """Shades every other stage; spans: (name, from, to) on the x axis."""
    for i, (name, first, last) in enumerate(spans):
        if i % 2:
            axis.axvspan(first, last, color="0.95", zorder=0)
        if names:
            axis.annotate(name, ((first + last) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=9)


def plot_plan(path: Path, cfg, stages: list, plans: list, learning_rate) -> Path:
    """Rate, mixture, context and rotary base over the run's tokens, before any training."""
    by_name = {s.name: s for s in stages}
    figure, (rate, data, length) = new_figure(3)
    pools = list(dict.fromkeys(pool for plan in plans for pool in plan.tokens))
    edges = np.cumsum([0] + [sum(plan.tokens.values()) for plan in plans])
    spans = [(plan.name, edges[i], edges[i + 1]) for i, plan in enumerate(plans)]
    base, theta = length.twinx(), cfg.model.rope_theta
    for plan, (name, first, last) in zip(plans, spans):
        steps = np.unique(np.linspace(plan.first_step, plan.end_step - 1, 200).astype(int))
        x = first + (steps + 1 - plan.first_step) / plan.n_steps * (last - first)
        rate.plot(x, [learning_rate(cfg.pretrain, by_name[name], plan, int(s)) for s in steps], color="black")
        bottom = 0.0
        for i, pool in enumerate(pools):
            share = plan.tokens.get(pool, 0) / sum(plan.tokens.values())
            data.fill_between([first, last], bottom, bottom + share, color=COLORS[i], lw=0)
            bottom += share
        theta = by_name[name].rope_theta or theta
        length.plot([first, last], [plan.context] * 2, color=COLORS[0], lw=3)
        base.plot([first, last], [theta] * 2, color=COLORS[3], lw=2, ls="--")
    for i, pool in enumerate(pools):
        data.fill_between([], [], color=COLORS[i], label=pool)
    data.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    rate.set_ylabel("learning rate")
    data.set_ylabel("share of tokens")
    length.set(ylabel="context (tokens)", xlabel="tokens trained on")
    length.set_yscale("log", base=2)
    base.set_yscale("log")
    base.set_ylabel("RoPE base (dashed)", color=COLORS[3])
    for axis in (rate, data, length):
        _stages(axis, spans, names=axis is rate)
    figure.suptitle(f"{cfg.run}: plan")
    return save_figure(figure, path)


def plot_run(folder: Path, name: str, seed: int, plans: list) -> Path:
    """Draws loss.png: training and held-out loss, accuracy and rate by step, from metrics.jsonl."""
    lines = common.read_metrics(folder)
    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "scores" in line]
    spans = [(plan.name, plan.first_step, plan.end_step) for plan in plans]
    scored = [line for line in evals if line["scores"]]
    figure, (loss, accuracy, rate) = new_figure(3)
    values = np.array([line["loss"] for line in steps], dtype=float)
    loss.plot([line["step"] for line in steps], values, color="0.75", lw=0.8, label="training, each step")
    for i, pool in enumerate(evals[-1].get("validation", []) if evals else []):
        loss.plot([line["step"] for line in evals], [line["validation"][pool]["loss"] for line in evals], "o-",
                  color=COLORS[i], label=f"held-out {pool}")
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    loss.set_ylabel("loss (nats a token)")
    loss.legend(frameon=False, fontsize=8)
    for i, task in enumerate(scored[-1]["scores"] if scored else []):
        shown = [line for line in scored if task in line["scores"]]
        accuracy.errorbar([line["step"] for line in shown], [line["scores"][task]["avg"] for line in shown],
                          [line["scores"][task]["stderr"] for line in shown], fmt="o-", capsize=3, color=COLORS[i],
                          label=task)
    accuracy.set(ylabel="accuracy (avg@k ± s.e.)", ylim=(-0.02, 1.02))
    if scored:
        accuracy.legend(frameon=False, fontsize=8, ncols=3)
    rate.plot([line["step"] for line in steps], [line["lr"] for line in steps], color="black")
    rate.set(ylabel="learning rate", xlabel="step")
    for axis in (loss, accuracy, rate):
        _stages(axis, spans, names=axis is loss)
    figure.suptitle(f"{name}, seed {seed}")
    return save_figure(figure, folder / "loss.png")


def plot_distill(folder: Path, name: str, seed: int) -> Path:
    """Draws loss.png of Dual Preference Distillation: the terms, the margin, and where the answers' likelihoods go."""
    steps = [line for line in common.read_metrics(folder) if "loss" in line]
    x = [line["step"] for line in steps]
    figure, (terms, margin, chosen, rejected) = new_figure(4)
    for i, (axis, key, label) in enumerate([
            (terms, "dpo", "preference (nats a pair)"), (terms, "kl_chosen", "KL on y+ (nats a token)"),
            (terms, "kl_rejected", "KL on y- (nats a token)"), (margin, "margin", "margin (nats)"),
            (margin, "accuracy", "share of pairs with a margin above 0")]):
        if key in steps[-1]:
            axis.plot(x, [line[key] for line in steps], color=COLORS[i], label=label)
    for axis, side, sign in ((chosen, "chosen", "y+"), (rejected, "rejected", "y-")):
        for who, style in (("student", "-"), ("reference", "--"), ("teacher", ":")):
            axis.plot(x, [line[f"{who}_{side}"] for line in steps], style, color="black", label=who)
        axis.set_ylabel(f"log p of {sign}\n(nats a token)")
    terms.set(ylabel="terms of the loss")
    rejected.set_xlabel("step")
    for axis in (terms, margin, chosen, rejected):
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name}, seed {seed}: Dual Preference Distillation")
    return save_figure(figure, folder / "loss.png")


def plot_rl(folder: Path, name: str, seed: int, plans: list) -> Path:
    """Draws loss.png of reinforcement learning: reward, entropy, lengths and held-out accuracy by step."""
    lines = common.read_metrics(folder)
    steps, scored = [line for line in lines if "reward" in line], [line for line in lines if line.get("scores")]
    spans = [(plan.name, plan.first_step, plan.end_step) for plan in plans]
    figure, (reward, accuracy, entropy, length) = new_figure(4)
    for i, (axis, key, label) in enumerate([
            (reward, "reward", "mean reward"), (reward, "all_right", "groups all right"),
            (reward, "all_wrong", "groups all wrong"), (reward, "win_rate", "win rate"), (reward, "rubric", "rubric"),
            (entropy, "entropy", "entropy (nats a token)"), (length, "length", "all"),
            (length, "length_right", "right"), (length, "length_wrong", "wrong")]):
        some = [line for line in steps if line.get(key) is not None]
        if some:
            axis.plot([line["step"] for line in some], [line[key] for line in some], color=COLORS[i], label=label)
    for i, task in enumerate(scored[-1]["scores"] if scored else []):
        accuracy.errorbar([line["step"] for line in scored], [line["scores"][task]["avg"] for line in scored],
                          [line["scores"][task]["stderr"] for line in scored], fmt="o-", capsize=3, color=COLORS[i],
                          label=task)
    reward.set(ylabel="rollouts", ylim=(-0.02, 1.02))
    accuracy.set(ylabel="held-out score (avg@k ± s.e.)", ylim=(-0.02, 1.02))
    length.set(ylabel="tokens a response", xlabel="step")
    for axis in (reward, accuracy, entropy, length):
        _stages(axis, spans, names=axis is reward)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name}, seed {seed}: reinforcement learning")
    return save_figure(figure, folder / "loss.png")


def run_table(folder: Path) -> str:
    """Held-out loss and accuracy at each evaluation of a phase, as text."""
    evals = [line for line in common.read_metrics(folder) if "validation" in line]
    pools = list(evals[-1]["validation"])
    tasks = list(evals[-1]["scores"])
    rows = [f"{'stage':16}{'step':>6}{'min':>6}" + "".join(f"{'bpb ' + pool:>13}" for pool in pools)
            + "".join(f"{task:>14}" for task in tasks)]
    for line in evals:
        cells = "".join(f"{line['validation'][pool]['bits_per_byte']:13.3f}" for pool in pools)
        for task in tasks:
            score = line["scores"].get(task)
            cells += f"{score['avg']:7.3f} ±{score['stderr']:.3f}" if score else f"{'':>14}"
        rows.append(f"{line['stage']:16}{line['step'] + 1:6}{line['seconds'] / 60:6.1f}" + cells)
    first = next(iter(evals[-1]["scores"].values()), None)
    note = f" and accuracy (avg@{first['k']} ± s.e., {first['n']} held-out problems a task)" if first else ""
    return "held-out bits per byte" + note + "\n" + "\n".join(rows)


def evaluations(folder: Path) -> list[dict]:
    """The lines of a phase's metrics, after the scores that it began with."""
    before = folder / "before.json"
    start = [{"stage": "", "scores": json.loads(before.read_text())}] if before.is_file() else []
    return start + common.read_metrics(folder)


def gain(folder: Path) -> str:
    """Accuracy of each task before a phase and after it, as text; "" where it was not evaluated before."""
    after = [line["scores"] for line in common.read_metrics(folder) if line.get("scores")]
    if not after or not (folder / "before.json").is_file():
        return ""
    before, after = json.loads((folder / "before.json").read_text()), after[-1]
    rows = [f"{'task':10}{'before':>16}  {'asked in':10}{'after':>16}{'gain':>8}"]
    for task, b in before.items():
        a = after[task]
        rows.append(f"{task:10}{b['avg']:10.3f} ±{b['stderr']:.3f}  {b['form']:10}{a['avg']:10.3f} ±{a['stderr']:.3f}"
                    f"{a['avg'] - b['avg']:+8.3f}")
    first = next(iter(before.values()))
    return "\n".join(rows) + f"\naccuracy (avg@{first['k']} ± s.e.) on the same {first['n']} held-out problems a task"


def pipeline(out: Path) -> str:
    """Accuracy of each task after each phase and each stage of RL, as text: what was gained, and what forgotten."""
    rows = {}
    for phase in ("pretrain", "sft", "distill", "rl"):
        for line in common.read_metrics(out / phase):
            if line.get("scores"):
                rows[f"rl: {line['stage']}" if phase == "rl" else phase] = line["scores"]
    names = list(dict.fromkeys(task for scores in rows.values() for task in scores))
    text = [f"{'after':16}" + "".join(f"{task:>15}" for task in names) + "   problems"]
    for phase, scores in rows.items():
        cells = (f"{scores[t]['avg']:8.3f} ±{scores[t]['stderr']:.3f}" if t in scores else "" for t in names)
        text.append(f"{phase:16}" + "".join(f"{cell:>15}" for cell in cells) + f"{next(iter(scores.values()))['n']:11}")
    return "\n".join(text)


def append(name: str, *lines: dict) -> None:
    """Appends lines to results/<name>.jsonl."""
    Path("results").mkdir(exist_ok=True)
    with open(f"results/{name}.jsonl", "a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def record(name: str, meta: dict, **result) -> None:
    """Appends a result to results/<name>.jsonl, with what its checkpoint says of how it was made."""
    line = {key: meta[key] for key in ("commit", "command", "config", "machine", "seconds", "step")}
    line |= {"seed": meta[meta["phase"]]["seed"]} | result
    append(name, line)


def main():
    cfg = common.load_config(__doc__, flags={"record": "append each phase's last evaluation to results/<phase>.jsonl"})
    phases = {"pretrain": run_table, "sft": gain, "distill": gain, "rl": gain}
    evaluated = {phase: [line for line in common.read_metrics(cfg.out / phase) if "scores" in line] for phase in phases}
    if not any(evaluated.values()):
        raise common.UserError(f"no evaluation in {cfg.out}/*/metrics.jsonl yet")
    print(pipeline(cfg.out))
    for phase, lines in evaluated.items():
        folder = cfg.out / phase
        if lines:
            print(f"{phase}\n{phases[phase](folder)}")
        if lines and cfg.record:
            result = {key: lines[-1][key] for key in ("validation", "scores") if key in lines[-1]}
            for key in ("before", "teacher"):
                if (folder / f"{key}.json").is_file():
                    result[key] = json.loads((folder / f"{key}.json").read_text())
            record(phase, common.read_meta(common.checkpoints(folder)[0]), **result)


if __name__ == "__main__":
    common.cli(main)
