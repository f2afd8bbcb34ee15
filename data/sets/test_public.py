"""Public sets: rows of their own form, in every kind of file, and as data sets of the hub (folders
laid out so).
"""

import gzip
import json
from collections import Counter
from dataclasses import replace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from common import UserError
from data.sets import public
from data.tasks import registry
from data.tasks.problem import Problem, assign_split, document_prompt, to_chat, to_document

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    "Remember to put your answer on "
    'its own line after "Answer:".'
)
PROGRAM = dict(
    question="Write f(x).",
    solution="def f(x):\n    return x",
    level=1,
    name="f",
    split="test",
    tests=[[{"tuple": [1]}, 1]],
)
ROWS = {  # set: (a row, the problem's raw text, its answer, the work, its level)
    "gsm8k": (
        dict(
            question="Ann has 999\napples.",
            answer="She buys <<999*2=1998>>1,998.\n\nSo 999 + 999 = 1998.\n#### 1,998",
        ),
        "Ann has 999\napples.",
        "1998",
        ("She buys 1,998.", "So 999 + 999 = 1998."),
        0,
    ),
    "hendrycks_math": (
        dict(
            problem="Halve $1$.",
            level="Level 5",
            type="Algebra",
            solution="Not $\\boxed{2}$, but $\\boxed{\\frac{1}{2}}$.",
        ),
        "Halve $1$.",
        "\\frac{1}{2}",
        ("Not $\\boxed{2}$, but $\\boxed{\\frac{1}{2}}$.",),
        5,
    ),
    "math500": (
        dict(
            problem="Halve $1$.",
            solution="It is $\\boxed{0.5}$.",
            answer="0.5",
            subject="Algebra",
            level=2,
            unique_id="test/1.json",
        ),
        "Halve $1$.",
        "0.5",
        ("It is $\\boxed{0.5}$.",),
        2,
    ),
    "aime24": (
        dict(id=60, problem="Find $x$.", solution="...", answer="073", url="x", year="2024"),
        "Find $x$.",
        "73",
        (),
        0,
    ),
    "aime25": (dict(ID="2025-I-1", Problem=" Find $y$. ", Answer=70), "Find $y$.", "70", (), 0),
    "dapo": (
        dict(
            data_source="math_dapo",
            prompt=[dict(role="user", content=DAPO.format("Find $z$.\n\nIt is even."))],
            ability="MATH",
            reward_model=dict(ground_truth="34", style="rule"),
            extra_info=dict(index="x"),
        ),
        "Find $z$.\n\nIt is even.",
        "34",
        (),
        0,
    ),
    "gpqa": (
        {
            "Question": "Which?",
            "Correct Answer": "one",
            "Incorrect Answer 1": "two",
            "Incorrect Answer 2": "three ",
            "Incorrect Answer 3": "four",
            "Subdomain": "x",
        },
        "Which?\n\n(A) one\n(B) three\n(C) two\n(D) four\n\nYour answer is one letter.",
        "A",
        (),
        0,
    ),
    "bigmath": (
        dict(
            problem="Add 1 and 1.",
            answer="2",
            source="orca",
            domain=["Algebra"],
            llama8b_solve_rate=0.5,
        ),
        "Add 1 and 1.",
        "2",
        (),
        0,
    ),
}
math_sets = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(autouse=True)
def fresh():
    public.load.cache_clear()


def write(path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return str(path)


def problems(spec: str, split: str = "test", n: int = 10**6, seed: int = 0) -> list[Problem]:
    return registry.family(spec).problems(split, n, seed)


def gsm8k_rows(n: int) -> list[dict]:
    return [
        dict(question=f"What is {i} + 1?", answer=f"{i} + 1 = {i + 1}\n#### {i + 1}")
        for i in range(n)
    ]


# ---- rows


@math_sets
def test_rows_become_problems(name, tmp_path):
    row, text, answer, steps, level = ROWS[name]
    (problem,) = problems(f"{name}={write(tmp_path / 'a.jsonl', [row])}")
    assert (problem.family, problem.question, problem.answer) == (name, text + INSTRUCTION, answer)
    assert (problem.steps, problem.level) == (steps, level) and json.loads(
        json.dumps(problem.extra)
    ) == problem.extra
    right = to_chat(problem)[-1]["content"]
    assert right == f"\\boxed{{{answer}}}"
    page = to_document(problem).removeprefix(document_prompt(problem))
    for response in (
        f"<think>\\boxed{{no}}</think>So it is ${right}$.",
        f"So:\nAnswer: {answer}",
        page if steps else right,
        f"So:\nAnswer: {answer}\nProblem: Add.\n\nUse \\boxed{{}}.\nWork: so.\nAnswer: 12345",
        f"<think>\nAnswer: 1\nProblem: hard\n</think>\nProblem: {text}\n{right}",
    ):
        assert registry.reward(problem, response) == 1.0, response
    for response in (
        "",
        "\\boxed{}",
        "\\boxed{12345}",
        f"<think>{right}",
        f"{right} or \\boxed{{12345}}",
    ):
        assert registry.reward(problem, response) == 0.0, response


def test_other_columns_that_sets_have_had(tmp_path):
    def only(name, row):
        return problems(
            f"{name}={write(tmp_path / f'{len(list(tmp_path.iterdir()))}.jsonl', [row])}"
        )[0]

    assert only("aime24", dict(problem="Find $x$.", expected_answer="5")).answer == "5"
    assert only("dapo", dict(prompt="Find $z$.", solution="34")) == only(
        "dapo",
        dict(prompt=[dict(content=DAPO.format("Find $z$."))], reward_model=dict(ground_truth="34")),
    )
    assert only("hendrycks_math", ROWS["hendrycks_math"][0] | {"level": "Level ?"}).level == 0
    assert only("bigmath", ROWS["bigmath"][0]).extra["solve_rate"] == 0.5


def test_gpqa_in_the_same_order_each_time_and_everywhere(tmp_path):
    """The letters are spread over the questions, and no two choices are lost."""
    rows = [ROWS["gpqa"][0] | {"Question": f"Which of {i}?"} for i in range(200)]
    found = problems(f"gpqa={write(tmp_path / 'a.jsonl', rows)}")
    letters = Counter(problem.answer for problem in found)
    assert letters.keys() == set("ABCD") and min(letters.values()) > 30
    assert all(f"({problem.answer}) one\n" in problem.question for problem in found)
    assert (
        problems(f"gpqa={write(tmp_path / 'b.jsonl', rows[::-1])}") != found
    )  # another file, another shuffle …
    assert {p.question: p.answer for p in problems(f"gpqa={tmp_path / 'b.jsonl'}")} == {
        p.question: p.answer for p in found
    }  # … of the same problems


def test_what_is_offered_and_what_is_the_same():
    math, code = registry.family("gsm8k"), registry.family("humaneval")
    assert (
        math.offered("<think>\\boxed{1}</think>It is \\boxed{2}.") == "2"
        and math.offered("I pass.") is None
    )
    assert math.offered("So.\nAnswer: 3\nProblem: x\nAnswer: 4") == "3"
    assert math.same("1/2", "0.5") and not math.same("x", "y") and code.same is None
    assert (
        code.offered("<think>...") is None
        and code.offered("<think></think> \n") is None
        and code.offered(" a ") == "a"
    )


def test_the_other_sets_are_wired(tmp_path):
    constraint = dict(
        key=1, prompt="No comma.", instruction_id_list=["punctuation:no_comma"], kwargs=[{}]
    )
    for name, row, right, wrong in (
        ("ifeval", constraint, "None here", "One, here"),
        (
            "synthetic",
            PROGRAM,
            "```python\ndef f(x): return x\n```",
            "```python\ndef f(x): return -x\n```",
        ),
        (
            "mbpp",
            dict(
                prompt="Same.",
                code="def f(x): return x",
                test_imports=[],
                test_list=["assert f(1) == 1"],
            ),
            "```python\ndef f(x): return x\n```",
            "```python\ndef f(x): return -x\n```",
        ),
    ):
        (problem,) = problems(f"{name}={write(tmp_path / f'{name}.jsonl', [row])}")
        assert problem.family == name and (
            registry.reward(problem, right),
            registry.reward(problem, wrong),
        ) == (1.0, 0.0)
        assert name == "ifeval" or registry.reward(problem, to_chat(problem)[-1]["content"]) == 1.0
    function = dict(
        name="add",
        description="",
        parameters=dict(type="dict", properties=dict(a=dict(type="integer")), required=["a"]),
    )
    questions = write(
        tmp_path / "bfcl.jsonl",
        [
            dict(
                id="simple_python_0",
                function=[function],
                question=[[dict(role="user", content="Add 1.")]],
            )
        ],
    )
    write(
        tmp_path / "bfcl_answer.jsonl",
        [dict(id="simple_python_0", ground_truth=[dict(add=dict(a=[1]))])],
    )
    (problem,) = problems(f"bfcl={questions}")
    assert (registry.reward(problem, "[add(a=1)]"), registry.reward(problem, "[add(a=2)]")) == (
        1.0,
        0.0,
    )


def test_rows_that_are_no_problems_are_left_out_and_counted(tmp_path, capsys):
    good = gsm8k_rows(3)
    spaced = dict(good[0], question="  What is\n0  + 1? ")
    rows = [
        *good,
        spaced,
        "{broken",
        dict(question="Why?", answer=""),
        dict(question="Why?"),
        dict(question=None, answer="#### 1"),
        dict(question="Why?", answer="7"),
        dict(question="Why?", answer="#### \\frac{1"),
        dict(answer="#### 3"),
    ]
    found = problems(f"gsm8k={write(tmp_path / 'a.jsonl', rows)}")
    assert sorted(p.answer for p in found) == ["1", "2", "3"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("gsm8k: 3 problems; rows left out: ")
    for reason in (
        "1 there twice",
        "1 not JSON",
        "1 empty answer",
        "1 without 'answer'",
        "1 empty question",
        "1 answer without ####",
        "1 gold cannot be read",
        "1 without 'question'",
    ):
        assert reason in said, (reason, said)
    problems(f"gsm8k={write(tmp_path / 'b.jsonl', good)}")
    assert capsys.readouterr().err == ""


def test_malformed_rows_never_stop_a_load(tmp_path):
    odd = [
        [],
        7,
        None,
        "text",
        {},
        dict(prompt=[]),
        dict(prompt=[7], solution="1"),
        dict(prompt=None, solution="1"),
        dict(prompt="a", reward_model=None),
        dict(prompt="a", solution="1" * 10**6),
        dict(prompt="\ud800", solution="1"),
        dict(prompt="b" * 10**6, solution="2"),
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([dict(prompt="good", solution="1"), *odd]))
    assert len(problems(f"dapo={path}")) == 3


def test_a_wrong_file_is_said_at_once(tmp_path):
    def fails(spec, match):
        with pytest.raises(UserError, match=match):
            problems(spec)

    row = write(tmp_path / "a.jsonl", [dict(question="Why?", gold="1")])
    fails(f"gsm8k={row}", r"a\.jsonl:1: no column 'answer' for gsm8k; found question, gold$")
    fails(f"math500={row}", "no column 'problem' for math500")
    fails(f"gsm8k={write(tmp_path / 'empty.jsonl', [])}", "no problems for gsm8k: no rows")
    bad = write(tmp_path / "b.jsonl", [dict(question="a", answer="b")])
    fails(f"gsm8k={bad}", r"b\.jsonl: no problems for gsm8k: 1 answer without ####")
    fails(f"gsm8k={tmp_path / 'nothing.jsonl'}", "no .jsonl, .json or .parquet file")
    (tmp_path / "c.json").write_text("[1, 2")
    fails(f"gsm8k={tmp_path / 'c.json'}", "c.json cannot be read")
    (tmp_path / "d.json.gz").write_bytes(b"[1, 2]")
    fails(f"gsm8k={tmp_path / 'd.json.gz'}", "d.json.gz cannot be read")
    fails("gms8k", "no task 'gms8k'; there are math, code, .* gsm8k, .* humaneval, .* as name=PATH")
    fails("synthetic", "synthetic wants files: synthetic=PATH")


def test_files_of_every_kind_hold_the_same_problems(tmp_path):
    rows = gsm8k_rows(5)
    for name in ("jsonl", "gz", "both"):
        write(tmp_path / name / "a.jsonl", rows)
    with gzip.open(tmp_path / "gz" / "a.jsonl.gz", "wt") as f:
        f.write((tmp_path / "gz" / "a.jsonl").read_text())
    (tmp_path / "gz" / "a.jsonl").unlink()
    write(tmp_path / "both" / "info.json", [dict(splits=3)])  # as the hub's downloads have
    (tmp_path / "both" / "README.txt").write_text("no rows")
    for name, text in {
        "array": json.dumps(rows),
        "lines": "\n".join(map(json.dumps, rows)),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_text("\ufeff" + text)
    for i, row in enumerate(rows):  # as MATH's original folder
        write(tmp_path / "objects" / f"{i}.json", [row])
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet" / "a.parquet")
    paths = [*tmp_path.iterdir(), *(tmp_path / "gz").iterdir(), *(tmp_path / "array").iterdir()]
    assert len(paths) == 9
    wanted = {
        problem.question: problem for problem in problems(f"gsm8k={tmp_path / 'jsonl' / 'a.jsonl'}")
    }
    for path in paths:
        assert {
            problem.question: problem for problem in problems(f"gsm8k={path}")
        } == wanted and len(wanted) == 5, path


# ---- which problems


def test_n_and_seed(tmp_path):
    spec = f"gsm8k={write(tmp_path / 'a.jsonl', gsm8k_rows(30))}"
    everything = problems(spec)
    assert len(everything) == 30 and problems(spec, n=7) == everything[:7] == problems(
        spec, "train", 7
    )
    other = problems(spec, seed=1)
    assert other != everything and {p.key for p in other} == {p.key for p in everything}
    with pytest.raises(ValueError, match="'valid'"):
        problems(spec, "valid")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """gsm8k has both splits of a data set, dapo only train, math500 only test; they are folders
    here.
    """
    rows = gsm8k_rows(400)
    write(tmp_path / "gsm8k" / "train.jsonl", rows[:300])
    write(tmp_path / "gsm8k" / "test.jsonl", rows[300:])
    write(
        tmp_path / "dapo" / "train.jsonl",
        [dict(prompt=row["question"], solution="1") for row in rows],
    )
    write(tmp_path / "math500" / "test.jsonl", [ROWS["math500"][0]])
    for name in ("gsm8k", "dapo", "math500"):
        official = {
            split: {"hf": str(tmp_path / name), "split": split}
            for split in ("train", "test")
            if getattr(public.SETS[name], split)
        }
        monkeypatch.setitem(public.SETS, name, replace(public.SETS[name], **official))


def test_splits_by_name(hub):
    given = {
        split: {p.question for p in problems("gsm8k", split)} for split in ("train", "dev", "test")
    }
    assert given["test"] == {row["question"] + INSTRUCTION for row in gsm8k_rows(400)[300:]}
    assert given["train"] | given["dev"] == {
        row["question"] + INSTRUCTION for row in gsm8k_rows(300)
    }
    assert not given["train"] & given["dev"] and 15 <= len(given["dev"]) <= 45
    cut = {
        split: {p.question for p in problems("dapo", split)} for split in ("train", "dev", "test")
    }
    assert sum(map(len, cut.values())) == 400 == len(cut["train"] | cut["dev"] | cut["test"])
    assert 20 <= len(cut["dev"]) <= 60 and 20 <= len(cut["test"]) <= 60
    assert len(problems("math500", "test")) == 1
    with pytest.raises(UserError, match='math500 has only the split "test"'):
        problems("math500", "dev")


def test_a_problem_of_two_sets_is_on_one_side(hub):
    both = {name: {public.digest(p) for p in problems(name, "dev")} for name in ("gsm8k", "dapo")}
    assert both["gsm8k"] and both["gsm8k"] <= both["dapo"]
    assert all(assign_split(digest) == "dev" for digest in both["dapo"])
    assert not both["dapo"] & {public.digest(p) for p in problems("gsm8k", "train")}
    spaced = replace(problems("math500")[0], family="gsm8k")
    assert spaced.key.startswith("math500 ") and len(public.digest(spaced)) == 16


def test_a_set_that_repeats_itself_is_read_until_it_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(public, "REPEATS", 5)
    rows = [dict(prompt=f"{i}?", solution="1") for i in range(10)]
    for text, n, twice in (
        (rows * 100, 10, 10),  # copies of the whole
        ([row for row in rows for _ in range(5)], 10, 40),  # of each: fewer in a row than REPEATS
        (rows[:3] * 2 + rows[3:], 10, 3),
    ):
        assert len(problems(f"dapo={write(tmp_path / f'{n}-{twice}.jsonl', text)}")) == n
        assert f" {twice} there twice" in capsys.readouterr().err


def test_offline_the_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(
        public.SETS, "gsm8k", replace(public.SETS["gsm8k"], test={"hf": "a/b", "split": "test"})
    )
    with pytest.raises(
        UserError, match="reach 'a/b' on the Hub .*hf download .*; as a task that is gsm8k=PATH$"
    ):
        problems("gsm8k")


def test_a_gated_set_says_how_to_get_it(monkeypatch):
    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub."
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", gated)
    with pytest.raises(
        UserError,
        match="gated.*Accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa, then "
        "`hf auth login`; as a task that is gpqa=PATH$",
    ):
        problems("gpqa")


def test_the_table_names_sources():
    for name, row in public.SETS.items():
        assert not (row.test or row.train) == (name in ("synthetic", "bfcl"))
        for source in filter(None, (row.train, row.test)):
            assert public.sources.invalid_reason(source) == "" and "/" in source["hf"]


def test_requests_have_no_rule(tmp_path):
    """One turn of a user, as HelpSteer3 and UltraFeedback have it; what has more turns is
    left out.
    """
    ask = dict(role="user", content="Write a poem.")
    (tmp_path / "h.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                dict(context=[ask], response1="a", response2="b", overall_preference=1),
                dict(
                    context=[ask, dict(role="assistant", content="No."), ask],
                    response1="a",
                    response2="b",
                ),
            )
        )
    )
    (tmp_path / "u.jsonl").write_text(
        json.dumps(dict(prompt="Write a poem.", chosen=[], rejected=[]))
    )
    for name, file in (("helpsteer3", "h"), ("ultrafeedback", "u")):
        (problem,) = registry.family(f"{name}={tmp_path}/{file}.jsonl").problems("train", 9, 0)
        assert (
            problem.question == "Write a poem."
            and to_chat(problem)[0]["content"] == "Write a poem."
        )
        assert registry.reward(problem, "Roses are red.") is None
