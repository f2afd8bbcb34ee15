"""Does the filter tell clean pages from corrupted ones? ROC AUC by kind of fault.

    python -m checks.quality          # the table: tags (0-9 and yes/no), retrieval, hybrid, chance
    python -m checks.quality --write    # and a line a seed in results/quality.jsonl

Pages are those of data/tasks, half of them with a fault. The filter learns from 4,000 that a
labeller with the answer key has graded 0-9 on five dimensions (`grade`), and is tested on 6,000
others.
"""
import argparse
import time

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import common
from data.filter.classifier import fit
from data.tasks import pages
from experiments import results
from experiments.labels import DIMENSIONS, labelled_pages

SEEDS = (0, 1, 2)


def aucs(scores: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Chance that a clean page scores above a corrupted one, by kind of fault and over all."""
    clean = kinds == ""
    result = {kind: roc_auc_score(clean[clean | (kinds == kind)], scores[clean | (kinds == kind)])
              for kind in pages.CORRUPTIONS}
    return result | {"all": roc_auc_score(clean, scores)}


def measure(seed: int) -> dict[str, dict[str, float]]:
    """AUC of each score by kind of fault: learned from 4,000 labelled pages, on 6,000 others less
    those among them."""
    texts, grades, _ = labelled_pages(4000, 2 * seed)
    held_out, _, kinds = labelled_pages(6000, 2 * seed + 1)
    seen = set(texts)
    keep = [i for i, text in enumerate(held_out) if text not in seen]
    held_out, kinds = [held_out[i] for i in keep], np.array(kinds)[keep]
    tags, hybrid, found = fit(texts, grades, DIMENSIONS).scores(held_out)
    tags_yes_no, hybrid_yes_no, _ = fit(texts, 9.0 * (grades >= 5), DIMENSIONS).scores(held_out)
    scores = {
        "tags 0-9": tags[:, -1],
        "tags yes/no": tags_yes_no[:, -1],
        "lexical": found[:, 0],
        "vector": found[:, 1],
        "retrieval": found.mean(1),
        "hybrid": hybrid,
        "hybrid, yes/no": hybrid_yes_no,
        "random": np.random.default_rng(seed).random(len(held_out)),
    }
    return {name: aucs(score, kinds) for name, score in scores.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    columns, tables = (*pages.CORRUPTIONS, "all"), []
    for seed in SEEDS:
        started = time.time()
        tables.append(measure(seed))
        if args.write:
            results.append(
                "quality",
                dict(
                    commit=common.current_commit(),
                    command="python -m checks.quality --write",
                    seed=seed,
                    auc=tables[-1],
                    machine=common.describe_machine(torch.device("cpu")),
                    seconds=time.time() - started,
                ),
            )
    print(
        f"ROC AUC of clean pages against each fault, mean of {len(SEEDS)} seeds\n\n| | "
        f"{' | '.join(columns)} | each "
        f"seed |\n{'|---' * (len(columns) + 2)}|"
    )
    for name in tables[0]:
        cells = []
        for kind in columns:
            mean = np.mean([table[name][kind] for table in tables])
            cells.append(f"{mean:.3f}")
        each = " ".join(f"{table[name]['all']:.3f}" for table in tables)
        print(f"| {name} | {' | '.join(cells)} | {each} |")


if __name__ == "__main__":
    common.cli(main)
