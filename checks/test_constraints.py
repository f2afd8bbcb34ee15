"""Scores of IFEval by prompt and by constraint, against figures by hand."""
import json

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
    by_prompt, loosely, by_constraint, _ = constraints.score_rows(runs)
    # 0 and 2 of 3 prompts; of their changes 1, 0, 1 the deviation is 0.577, by the root of 3
    assert by_prompt.split() == ["by", "prompt", "strict", "0.000", "±0.000", "0.667", "±0.333",
                                 "0.667", "±0.333"]
    assert loosely.split()[3:] == by_prompt.split()[3:]
    # 1 and 3 of 4; changes 1, 0, 1 of 1, 1, 2 asked, less half of these: 0.5, -0.5, 0
    assert by_constraint.split()[3::2] == ["0.250", "0.750", "0.500"]
    assert by_constraint.split()[8] == "±0.217"
    rows = [line.split() for line in constraints.type_rows(runs)]
    assert rows == [[TITLE, "2", "0.500", "0.500"], [COMMA, "2", "0.000", "1.000"]]


def test_a_folder_without_evaluations_is_named(folders, tmp_path):
    with pytest.raises(UserError, match="no evaluate.json"):
        constraints.read_verdicts(tmp_path)
