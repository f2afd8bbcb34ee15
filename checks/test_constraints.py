"""Scores of IFEval by prompt and by constraint, against figures by hand."""
import json

import numpy as np
import pytest

from checks import constraints
from common import UserError

COMMA, TITLE = "punctuation:no_comma", "detectable_format:title"
PROBLEMS = [  # two prompts with one constraint, one with two
    {"key": 1, "prompt": "A.", "instruction_id_list": [COMMA], "kwargs": [{}]},
    {"key": 2, "prompt": "B.", "instruction_id_list": [TITLE], "kwargs": [{}]},
    {"key": 3, "prompt": "C.", "instruction_id_list": [COMMA, TITLE], "kwargs": [{}, {}]},
]
RUNS = {"before": {"A.": "a, b", "B.": "x", "C.": "<<c>>, d"},
        "after": {"A.": "a", "B.": "x", "C.": "<<c>>"}}


@pytest.fixture
def folders(tmp_path) -> list:
    path = tmp_path / "ifeval.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    settings = {"tasks": [f"ifeval={path}", "math"], "split": "test", "n_problems": 10, "seed": 0}
    problems = constraints.registry.family(settings["tasks"][0]).problems("test", 10, 0)
    for name, responses in RUNS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "evaluate.json").write_text(json.dumps({"settings": settings}))
        rows = [{"task": "math", "problem": 0, "sample": 0, "response": "4"}]
        for i, problem in enumerate(problems):
            rows.append({"task": settings["tasks"][0], "problem": i, "sample": 0,
                         "response": responses[problem.question]})
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "evaluate.jsonl").write_text("".join(lines))
    return [tmp_path / name for name in RUNS]


def test_scores_and_types(folders):
    runs = []
    for folder in folders:
        [verdicts] = constraints.read_verdicts(folder).values()
        runs.append(verdicts)
    scores = constraints.score_runs(runs)
    # 0 and 2 of 3 prompts; of their changes 1, 0, 1 the deviation is 0.577, by the root of 3
    by_prompt = [(0, 0), (2 / 3, 1 / 3), (2 / 3, 1 / 3)]
    for how in ("strict", "loose"):
        assert np.allclose(scores[f"by prompt, {how}"], by_prompt)
    # 1 and 3 of 4; changes 1, 0, 1 of 1, 1, 2 asked, less half of these: 0.5, -0.5, 0
    means, errors = zip(*scores["by constraint, strict"])
    assert means == (0.25, 0.75, 0.5) and errors[2] == pytest.approx(0.5 * 3 ** 0.5 / 4)
    assert constraints.score_types(runs) == {TITLE: (2, [0.5, 0.5]), COMMA: (2, [0, 1])}


def test_a_folder_without_evaluations_is_named(folders, tmp_path):
    with pytest.raises(UserError, match="no evaluate.json"):
        constraints.read_verdicts(tmp_path)
