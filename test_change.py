"""The exercises of docs/CHANGE.md, by its very lines: each runs, and nothing of it is ignored."""
import importlib.util
import json
import re
import sys
from pathlib import Path

import common
import data.tasks
import pretrain
import rl
from checks.mini_rl import CONFIG, toy
from conftest import ROOT
from data.tasks import registry
from data.text import corpus

TEXT = (ROOT / "docs/CHANGE.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def changed(name: str) -> str:
    """A file of ours with the lines that the page adds and takes away; each place is found once."""
    [diff] = [diff for diff in blocks("diff") if diff.startswith(f"--- {name}\n")]
    text = (ROOT / name).read_text(encoding="utf-8")
    for hunk in diff.partition("\n")[2].split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1 and old != new, old
        text = text.replace(old, new)
    return text


def load(source: str, path: Path):
    """The module of a source text, beside those that are loaded."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_exercise_touches_two_files_at_most():
    """And all that it tells to write is in one of these tests."""
    exercises = TEXT.split("\n## ")[1:]
    assert len(exercises) == 3
    for exercise in exercises:
        files = re.findall(r"^--- (\S+)$|^A new file, `|, `(\S+\.py)`:$", exercise, re.MULTILINE)
        assert 1 <= len(files) <= 2
    assert len(blocks("diff")) == 3 and len(blocks("python")) == 1


def options(*more: str) -> list[str]:
    return ["mini_rl.py", "--init_from=out/base/pretrain", "--rl.filter_samples=0",
            "--rl.updates=1", "--rl.kl=0", "--rl.prompts=[]", *more]


def test_a_term_of_the_loss(base, tmp_path, monkeypatch):
    """At the same weights and rollouts, the loss is larger by the new term."""
    module = load(changed("rl.py"), tmp_path / "rl_changed.py")
    (base.folder / "mini_rl.py").write_text(CONFIG)
    toy(monkeypatch.setattr)
    first = {}
    for weight in (0.0, 0.5):
        base.call(module.main, "rl.py", *options(
            f"--run=imitation-{weight}", f"--rl.imitation={weight}", "--evaluate.tasks=[]",
            "--rl.stages=[{'name': 'a', 'problems': {'math': 10}, 'steps': 1}]"))
        [first[weight]] = common.read_metrics(base.folder / f"out/imitation-{weight}/rl")[:1]
    assert first[0.0]["reward"] == first[0.5]["reward"]
    assert first[0.5]["loss"] > first[0.0]["loss"] + 0.5 * first[0.5]["groups_with_signal"] / 100
    assert "--rl.imitation" in base.output(module.main, "rl.py", "--help")
    monkeypatch.delitem(sys.modules, "rl_changed")


def test_a_task_with_a_reward_of_its_own(base, tmp_path, monkeypatch):
    """RL and evaluations ask its problems, and pay what its reward says, some of them in part."""
    problem = load(changed("data/tasks/problem.py"), tmp_path / "problem_changed.py")
    monkeypatch.setattr(registry, "GENERATED", problem.GENERATED)
    monkeypatch.setattr(data.tasks, "__path__", [*data.tasks.__path__, str(tmp_path)])
    (tmp_path / "count.py").write_text(blocks("python")[0])
    (base.folder / "mini_rl.py").write_text(CONFIG)
    base.call(rl.main, "rl.py", *options(
        "--run=count", "--evaluate.tasks=['count', 'math']", "--rl.max_new_tokens=24",
        "--rl.stages=[{'name': 'counting', 'problems': {'count': 40}, 'steps': 3}]"))
    out = base.folder / "out/count/rl"
    rows = []
    for path in sorted((out / "rollouts").glob("*.jsonl")):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    count = registry.family("count")
    known = {p.question: p for p in count.problems("train", 200, 0)}
    assert rows and any(0 < row["reward"] < 1 for row in rows), rows[:3]
    assert {"count", "math"} == common.read_metrics(out)[-1]["scores"].keys()
    [example] = [p for p in count.problems("dev", 1, 0)]
    assert count.reward(example, f"Answer: {example.answer}") == 1.0
    every_number = " ".join(map(str, range(100)))
    assert 0 < count.reward(example, f"Answer: {every_number}") < 0.1
    assert len(known) == 200 and example.question not in known
    monkeypatch.delitem(sys.modules, "data.tasks.count")
    monkeypatch.delitem(sys.modules, "problem_changed")


SMALL = """
import changed_tiny
from mini import evaluate, model, tokenizer
corpus, pretrain = changed_tiny.corpus, changed_tiny.pretrain
_pools = {}
for _name, _sources in corpus["pools"].items():
    _pools[_name] = [_s | dict(pages=60) if "pages" in _s else _s for _s in _sources]
_pools["medium"].pop()  # the text of this Python
corpus = corpus | dict(pools=_pools)
model = model | dict(max_context=256)
pretrain = pretrain | dict(batch_tokens=512, eval_problems=0, prompts=[], eval_tokens=500)
evaluate = evaluate | dict(tasks=[])
"""


def test_a_stage_of_data(mini):
    folder = mini.folder
    (folder / "changed_tiny.py").write_text(changed("configs/tiny.py"))
    (folder / "stage.py").write_text(SMALL)
    (folder / "notes.txt").write_text("\n\n".join(f"Note {i}: it rains." for i in range(400)))
    mini.output(corpus.main, "corpus.py", "stage.py")
    plan = mini.output(pretrain.main, "pretrain.py", "stage.py", "--scale=0.004", "--plan")
    assert re.search(r"^notes .* high 50%.*, notes 50%", plan, re.MULTILINE), plan
    mini.output(pretrain.main, "pretrain.py", "stage.py", "--scale=0.004")
    lines = common.read_metrics(folder / "out/stage/pretrain")
    steps = [line for line in lines if line["stage"] == "notes" and "loss" in line]
    assert steps and len({line["lr"] for line in steps}) == 1
    before, after = [line["validation"]["notes"]["loss"] for line in lines
                     if line["stage"] in ("high quality", "notes") and "validation" in line]
    assert after < before - 0.3


