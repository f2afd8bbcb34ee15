"""What a difference between arms is worth: tables in Markdown of recorded results."""
import numpy as np


def mean(results: list[dict], key: str) -> float:
    return float(np.mean([result[key] for result in results]))


def best_rates(sweep: list[dict]) -> dict[str, float]:
    """The rate of each arm at which a sweep found it the best."""
    best = {}
    for result in sweep:
        arm = result["arm"]
        if arm not in best or result["avg"] > best[arm]["avg"]:
            best[arm] = result
    return {arm: result["lr"] for arm, result in best.items()}


def describe_rates(results: list[dict]) -> str:
    """A line of the rates that the sweep gave each arm."""
    rates = best_rates([r for r in results if r["table"] == "sweep"])
    text = ", ".join(f"({arm}) {lr:g}" for arm, lr in rates.items())
    return f"rates, tuned for each arm on the dev split with seed 100: {text}"


def paired_difference(one: list[dict], other: list[dict]) -> tuple[float, float, list[float]]:
    """Mean difference of two arms' accuracy, half its 95 % interval, and each seed's difference.

    The interval is over problems. The results hold the right samples of each problem, the same
    problems in all; a problem's difference is its mean over seeds.
    """
    by_seed = []  # of (problems,) each
    for a, b in zip(one, other, strict=True):
        by_seed.append((np.array(a["correct"]) - np.array(b["correct"])) / a["k"])
    by_problem = np.mean(by_seed, axis=0)
    half = 1.96 * float(by_problem.std(ddof=1)) / len(by_problem) ** 0.5
    each_seed = [float(differences.mean()) for differences in by_seed]
    return float(by_problem.mean()), half, each_seed


# --------------------------------------------------------------------------------------------------
# Tables

DIFFERENCE = ["accuracy", "95 % over problems", "each seed", "verdict"]  # its columns


def header(*columns: str) -> str:
    """The first two lines of a table in Markdown."""
    return row(*columns) + "\n" + "|---" * len(columns) + "|"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def describe_difference(one: list[dict], other: list[dict]) -> list[str]:
    """The cells of DIFFERENCE: a gain is claimed where the interval excludes 0 and seeds agree."""
    change, half, each_seed = paired_difference(one, other)
    seeds_agree = all(np.sign(seed) == np.sign(change) for seed in each_seed)
    if abs(change) <= half or not seeds_agree:
        verdict = "not shown"
    elif change > 0:
        verdict = "better"
    else:
        verdict = "worse"
    interval = f"{change - half:+.3f} … {change + half:+.3f}"
    seeds = " ".join(f"{seed:+.3f}" for seed in each_seed)
    return [f"{change:+.3f}", interval, seeds, verdict]


def compare(results: list[dict], arms: dict[str, str], pairs: list[tuple[str, str]]) -> str:
    """Markdown: each arm's accuracy and bits per byte, every seed; the differences and verdicts.

    arms: {arm: what it is}; pairs: of arms, whose differences are shown.
    """
    by_arm = {}
    for arm in arms:
        rows = [r for r in results if r["arm"] == arm]
        by_arm[arm] = sorted(rows, key=lambda r: r["seed"])
    has_bits = all("bits_per_byte" in r for r in results)  # where there is a held-out loss
    bits_column = ["bits a byte"] if has_bits else []
    lines = [header("arm", "accuracy", "each seed", *bits_column)]
    for arm, rows in by_arm.items():
        seeds = " ".join(f"{r['avg']:.3f}" for r in rows)
        cells = [f"({arm}) {arms[arm]}", f"{mean(rows, 'avg'):.3f}", seeds]
        if has_bits:
            cells.append(f"{mean(rows, 'bits_per_byte'):.4f}")
        lines.append(row(*cells))
    lines += ["", header("difference", *DIFFERENCE, *bits_column)]
    for one, other in pairs:
        cells = [f"({one}) - ({other})", *describe_difference(by_arm[one], by_arm[other])]
        if has_bits:
            changes = []
            for a, b in zip(by_arm[one], by_arm[other]):
                changes.append(a["bits_per_byte"] - b["bits_per_byte"])
            cells.append(f"{np.mean(changes):.4f}")
        lines.append(row(*cells))
    return "\n".join(lines)


def select_task(result: dict, task: str) -> dict:
    """A result as if it had this task alone; all tasks have equally many problems."""
    n = len(result["correct"]) // len(result["tasks"])
    place = sorted(result["tasks"]).index(task)
    correct = result["correct"][place * n:(place + 1) * n]
    return result | {"correct": correct, "avg": result["tasks"][task]}


def compare_stages(results: list[dict], names: dict[str, str]) -> str:
    """Markdown: accuracy of each task after each stage, the mean over seeds; what each changed.

    results: of the arms that stages end with, in order; names: {arm: what it is}.
    """
    tasks = list(results[0]["tasks"])
    selected = {}  # the results of an arm on a task
    for arm in names:
        for task in tasks:
            selected[arm, task] = [select_task(r, task) for r in results if r["arm"] == arm]
    lines = [header("after", *tasks)]
    for arm, name in names.items():
        cells = [f"{mean(selected[arm, task], 'avg'):.3f}" for task in tasks]
        lines.append(row(name, *cells))
    lines += ["", header("stage", "task", *DIFFERENCE)]
    arms = list(names)
    for before, arm in zip(arms, arms[1:]):
        for task in tasks:
            cells = describe_difference(selected[arm, task], selected[before, task])
            lines.append(row(names[arm], task, *cells))
    return "\n".join(lines)


def compare_tasks(results: list[dict], arms: dict[str, str]) -> str:
    """Markdown: accuracy of each task, the mean over seeds. arms: {arm: what it is}."""
    tasks = list(results[0]["tasks"])
    lines = [header("arm", *tasks)]
    for arm in arms:
        scores = [r["tasks"] for r in results if r["arm"] == arm]
        cells = [f"{mean(scores, task):.3f}" for task in tasks]
        lines.append(row(f"({arm})", *cells))
    return "\n".join(lines)
