"""What a difference between arms is worth: tables in Markdown, of results as experiments/runner.py records them."""
import numpy as np


def best_rates(sweep: list[dict]) -> dict[str, float]:
    """The rate of each arm that a sweep has as the best."""
    return {arm: max((r for r in sweep if r["arm"] == arm), key=lambda r: r["avg"])["lr"]
            for arm in dict.fromkeys(r["arm"] for r in sweep)}


def tuned(results: list[dict]) -> str:
    """A line of the rates that the sweep gave each arm."""
    rates = best_rates([r for r in results if r["table"] == "sweep"])
    return "rates, tuned for each arm on the dev split with seed 100: " + ", ".join(
        f"({arm}) {lr:g}" for arm, lr in rates.items())


def paired(one: list[dict], other: list[dict]) -> tuple[float, float, list[float]]:
    """Mean difference of two arms' accuracy, half its 95 % interval over problems, and the difference of each seed.

    The results hold the right samples of each problem, the same problems in all; a problem's difference is its mean
    over seeds.
    """
    rows = [(np.array(a["correct"]) - np.array(b["correct"])) / a["k"] for a, b in zip(one, other, strict=True)]
    by_problem = np.mean(rows, axis=0)
    return float(by_problem.mean()), 1.96 * float(by_problem.std(ddof=1)) / len(by_problem) ** 0.5, [
        float(r.mean()) for r in rows]


def compare(results: list[dict], arms: dict[str, str], pairs: list[tuple[str, str]]) -> str:
    """Markdown: each arm's accuracy and bits per byte, every seed, and the differences with their verdicts."""
    by_arm = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"]) for arm in arms}
    has_bits = all("bits_per_byte" in row for row in results)  # where there is a held-out loss
    mean_bits = lambda rows: f" {np.mean([row['bits_per_byte'] for row in rows]):.4f} |" if has_bits else ""
    lines = ["| arm | accuracy | each seed |" + " bits a byte |" * has_bits, "|---" * (3 + has_bits) + "|"]
    for arm, rows in by_arm.items():
        each = " ".join(f"{r['avg']:.3f}" for r in rows)
        lines.append(f"| ({arm}) {arms[arm]} | {np.mean([r['avg'] for r in rows]):.3f} | {each} |" + mean_bits(rows))
    lines += ["", "| difference | accuracy | 95 % over problems | each seed | verdict |" + " bits a byte |" * has_bits,
              "|---" * (5 + has_bits) + "|"]
    for one, other in pairs:
        change = [{"bits_per_byte": a["bits_per_byte"] - b["bits_per_byte"]}
                  for a, b in zip(by_arm[one], by_arm[other])] if has_bits else []
        lines.append(f"| ({one}) - ({other}) | {difference(by_arm[one], by_arm[other])} |" + mean_bits(change))
    return "\n".join(lines)


def difference(one: list[dict], other: list[dict]) -> str:
    """Cells: accuracy, its interval over problems, each seed, verdict."""
    mean, half, each = paired(one, other)
    sure = abs(mean) > half and all(np.sign(e) == np.sign(mean) for e in each)
    verdict = ("better" if mean > 0 else "worse") if sure else "not shown"
    each = " ".join(f"{e:+.3f}" for e in each)
    return f"{mean:+.3f} | {mean - half:+.3f} … {mean + half:+.3f} | {each} | {verdict}"


def of_task(result: dict, task: str) -> dict:
    """A result as if it had this task alone; all tasks have equally many problems."""
    n, place = len(result["correct"]) // len(result["tasks"]), sorted(result["tasks"]).index(task)
    return result | {"correct": result["correct"][place * n:(place + 1) * n], "avg": result["tasks"][task]}


def by_stage(results: list[dict], names: dict[str, str]) -> str:
    """Markdown: accuracy of each task after each stage, the mean over seeds, then what each stage changed.

    results: of the arms that stages end with, in order; names: {arm: what it is}.
    """
    arms, tasks = list(names), list(results[0]["tasks"])
    of_arm = lambda arm, task: [of_task(r, task) for r in results if r["arm"] == arm]
    lines = ["| after | " + " | ".join(tasks) + " |", "|---" * (1 + len(tasks)) + "|"]
    for arm in arms:
        cells = (np.mean([r["avg"] for r in of_arm(arm, task)]) for task in tasks)
        lines.append(f"| {names[arm]} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    lines += ["", "| stage | task | accuracy | 95 % over problems | each seed | verdict |", "|---" * 6 + "|"]
    lines += [f"| {names[arm]} | {task} | {difference(of_arm(arm, task), of_arm(before, task))} |"
              for before, arm in zip(arms, arms[1:]) for task in tasks]
    return "\n".join(lines)


def by_task(results: list[dict], arms: dict[str, str]) -> str:
    """Markdown: accuracy of each task, the mean over seeds."""
    tasks = list(results[0]["tasks"])
    lines = ["| arm | " + " | ".join(tasks) + " |", "|---" * (1 + len(tasks)) + "|"]
    for arm in arms:
        rows = [r["tasks"] for r in results if r["arm"] == arm]
        lines.append(f"| ({arm}) | " + " | ".join(f"{np.mean([r[task] for r in rows]):.3f}" for task in tasks) + " |")
    return "\n".join(lines)
