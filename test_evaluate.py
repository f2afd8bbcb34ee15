"""pass@k equals enumeration; the standard error of avg@k equals simulation; a perfect model scores 1."""
from itertools import combinations

import numpy as np
import pytest

import evaluate
from common import UserError
from data import tasks
from evaluate import EvaluateConfig, pass_at_k, summarize


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in (1, 3, 6):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([1] * correct + [0] * (n - correct), k))
                assert pass_at_k(n, correct, k) == pytest.approx(np.mean([max(s) for s in subsets]))


def rows_of(rewards):
    return [dict(problem=p, level=1, reward=float(x), finish="stop", tokens=3) for p, r in enumerate(rewards) for x in r]


def test_standard_error_equals_simulation():
    """Over fresh sets of 60 problems of random difficulty, the spread of avg@4 is what one set's stderr says."""
    rng = np.random.default_rng(0)
    results = [summarize(rows_of(rng.random((60, 4)) < rng.random((60, 1))), 4) for _ in range(400)]
    assert np.std([r["avg"] for r in results]) == pytest.approx(np.mean([r["stderr"] for r in results]), rel=0.1)


def test_unscored_answers_are_not_wrong_answers():
    rows = rows_of([[1, 1], [0, 1]])
    rows[2]["reward"] = None
    score = summarize(rows, 2)
    assert score["avg"] == 1.0 and score["unscored"] == 1


def test_scores_of_gold_and_of_nothing(monkeypatch):
    """The sampler replaced by one that copies the gold work, and by one that says nothing."""
    from data.tokenizer import TokenizerConfig, train_tokenizer
    from generate import Sample
    tokenizer = train_tokenizer(["Problem: 1"], TokenizerConfig(kind="char"))
    cfg = EvaluateConfig(tasks=["math", "tools"], n_problems=20, k=2)
    problems = {name: tasks.FAMILIES[name].problems("dev", 20, 0) for name in cfg.tasks}
    texts = {tuple([tokenizer.bos, *tokenizer.encode(tasks.prompt(p))]): tasks.document(p).removeprefix(tasks.prompt(p))
             for group in problems.values() for p in group}
    def gold(model, prompts, n, *args, **kwargs):
        return [[Sample(tokenizer.encode(texts[tuple(p)]) + [tokenizer.eot], [], "stop")] * n for p in prompts]
    monkeypatch.setattr(evaluate.generate, "sample", gold)
    scores = evaluate.evaluate(None, tokenizer, cfg)
    assert all(s["avg"] == s["pass"] == 1.0 and s["truncated"] == 0 and s["n"] == 20 for s in scores.values())
    assert scores["math"]["rows"][0]["response"] and set(scores["math"]["levels"]) == {1, 2, 3}
    assert "math" in evaluate.table(scores)
    monkeypatch.setattr(evaluate.generate, "sample", lambda m, prompts, n, *a, **k: [[Sample([], [], "length")] * n for _ in prompts])
    assert all(s["avg"] == 0.0 and s["truncated"] == 1 for s in evaluate.evaluate(None, tokenizer, cfg).values())
    with pytest.raises(UserError, match="no task 'meth'"):
        evaluate.evaluate(None, tokenizer, EvaluateConfig(tasks=["meth"]))
