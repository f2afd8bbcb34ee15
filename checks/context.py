"""Does the long-context stage work? `python -m checks.context`, once configs/context.py is trained.

Compares the checkpoint at the end of the stable stage (64 tokens a row) with the last one (256,
RoPE base raised: ABF): loss by position in held-out long documents, and passkeys by the distance
between the key and the question. A run's folder as argument (out/context_no_abf) compares that run;
`--record` appends the result to results/context.jsonl.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

import common
import hf
from data.tasks import recall, registry
from data.tasks.problem import document_prompt
from data.text.mixture import PoolStream
from data.text.shards import read_pool
from experiments.results import record
from generate import sample
from kernels.cross_entropy import linear_logprobs
from report import plots

FILLERS = ((0, 1), (2, 4), (6, 8), (11, 13), (16, 18), (22, 24))  # sentences between key and
                                                                  # question
BINS = np.arange(0, 257, 32)


@torch.no_grad()
def loss_by_position(model, tokenizer, folder: Path) -> list[float]:
    """Mean loss (nats per token) of held-out long documents, by position in the document, in bins
    of 32."""
    stream = PoolStream("long", read_pool(folder / "long", "val", tokenizer.hash), 0, 256)
    tokens, targets, starts = (torch.from_numpy(x) for x in stream.read(0, stream.size))
    total, count = np.zeros(8), np.zeros(8)
    for start in starts.unique():  # a document a row
        row = (starts == start).nonzero()[:, 0]
        row = row[targets[row] >= 0]
        hidden = model(tokens[row][None])[0]
        nats = -linear_logprobs(hidden, model.lm_head.weight, targets[row]).numpy()
        bins = np.digitize(np.arange(len(row)), BINS) - 1
        total += np.bincount(bins, nats, 8)
        count += np.bincount(bins, minlength=8)
    return (total / np.maximum(count, 1)).tolist()


def passkeys(model, tokenizer, n: int = 200) -> list[tuple[float, float, float]]:
    """(mean tokens from key to question, accuracy, its standard error) for each distance, on test
    problems, greedy."""
    rows = []
    for filler in FILLERS:
        problems = recall.problems("test", n, seed=0, filler=filler)
        prompts = [tokenizer.encode_prompt(document_prompt(p)) for p in problems]
        answers = sample(model, prompts, max_new_tokens=8, temperature=0, stop=(tokenizer.eot,))
        right = [
            registry.reward(p, tokenizer.decode(a[0].tokens[:-1]))
            for p, a in zip(problems, answers)
        ]
        distance = [
            len(tokenizer.encode(document_prompt(p).split(p.answer, 1)[1])) for p in problems
        ]
        rows.append(
            (float(np.mean(distance)), float(np.mean(right)), float(np.std(right) / n**0.5))
        )
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/context"))
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    folder = args.folder
    ends = [
        p
        for p in reversed(common.list_checkpoints(folder / "pretrain"))
        if common.read_meta(p).get("keep")
    ]
    if not ends or len(ends) < 2 and not common.read_meta(ends[-1])["pretrain"]["branch_from"]:
        raise common.UserError(
            "train first: `python -m data.text.corpus configs/context.py`, then `python "
            "pretrain.py "
            "configs/context.py`"
        )
    results = {}
    # a branched run has its "before" in another
    trunk = common.read_meta(ends[-1])["pretrain"]["branch_from"]
    for name, path in (("before", Path(trunk) if trunk else ends[-2]), ("after", ends[-1])):
        model, tokenizer = hf.load(path)
        model.rope_theta = common.read_meta(path)["model"]["rope_theta"]
        results[name] = (
            loss_by_position(model, tokenizer, Path("out/context/data")),
            passkeys(model, tokenizer),
        )
        print(f"{name} the context stage: {path}, RoPE base {model.rope_theta:,.0f}")
    print("\nloss by position (nats per token)\n" + f"{'position':>12}{'before':>10}{'after':>10}")
    for i in range(8):
        print(
            f"{BINS[i]:>7}-{BINS[i + 1] - 1:<4}{results['before'][0][i]:>10.3f}"
            f"{results['after'][0][i]:>10.3f}"
        )
    print(
        "\npasskey accuracy (200 test problems each, greedy)\n"
        + f"{'tokens away':>12}{'before':>16}{'after':>16}"
    )
    for before, after in zip(results["before"][1], results["after"][1]):
        print(
            f"{before[0]:>12.0f}{before[1]:>9.3f} ±{before[2]:.3f}{after[1]:>9.3f} ±{after[2]:.3f}"
        )
    if args.record:
        record(
            "context",
            common.read_meta(ends[-1]),
            **{
                name: {"loss_by_position": losses, "passkeys": rows}
                for name, (losses, rows) in results.items()
            },
        )
    figure, (loss, keys) = plots.new_figure(2, sharex=False)
    for i, (name, (losses, rows)) in enumerate(results.items()):
        loss.plot(
            BINS[:-1] + 16, losses, "o-", color=plots.COLORS[i], label=f"{name} the context stage"
        )
        distance, accuracy, error = zip(*rows)
        keys.errorbar(distance, accuracy, error, fmt="o-", capsize=3, color=plots.COLORS[i])
    loss.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
    loss.legend(frameon=False)
    keys.set(
        xlabel="tokens between key and question",
        ylabel="passkey accuracy ± s.e.",
        ylim=(-0.03, 1.03),
    )
    for axis, x in ((loss, 64), (keys, 64)):
        axis.axvline(x, color="0.6", ls=":")
    print("\npicture:", plots.save_figure(figure, folder / "context.png"))


if __name__ == "__main__":
    common.cli(main)
