"""The page of a run is whole in itself, says what each phase wrote, and runs nothing of a model."""

import settings

import json
import math
import os
import re
import shutil
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import common
import loop
from conftest import ROOT
from evaluate import EvaluateConfig
from experiments import fg_wsd
from report import __main__ as report
from report import compare, samples, tables

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)> {{ run }} ]]>"
CONFIG = f'# {HOSTILE}\nevaluate = dict(tasks=["math", "code"], max_new_tokens=8)\n'


def score(avg: float, n: int = 256) -> dict:
    return dict(avg=avg, stderr=0.02, levels={}, truncated=0.0, tokens=9.0, unscored=0, n=n, k=4)


def write(path: Path, *lines: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def steps(stage: str, first: int, n: int, **more) -> list[dict]:
    return [
        dict(
            step=first + i,
            stage=stage,
            loss=2 - i / n,
            lr=1e-3,
            tokens=1000,
            seconds=6.0 * (first + i + 1),
            finite=True,
        )
        | {key: value + i / 100 for key, value in more.items()}
        for i in range(n)
    ]


def fabricate(out: Path) -> None:
    """A run with all phases, as their loops write it."""
    end = lambda step, stage, *avg, **more: (
        dict(
            step=step,
            stage=stage,
            seconds=1.0,
            samples=[HOSTILE],
            scores=dict(zip(("math", "code"), map(score, avg))),
        )
        | more
    )
    validation = {"high": dict(loss=1.2, bits_per_byte=0.4321)}
    write(
        out / "pretrain/metrics.jsonl",
        *steps("warmup", 0, 5),
        end(4, "warmup", 0.101, 0.102, validation=validation),
        *steps(HOSTILE, 5, 5),
        end(9, HOSTILE, 0.203, 0.204, validation=validation),
    )
    stages = [
        dict(name="warmup", mixture=dict(high=1, low=3)),
        dict(name=HOSTILE, epochs=dict(high=1)),
    ]
    write(
        out / "pretrain/step_00000010/meta.json",
        dict(
            phase="pretrain",
            stage=HOSTILE,
            step=10,
            files={"a": [1, 2]},
            commit="c0ffee",
            machine=HOSTILE,
            command="pretrain.py c.py",
            pretrain=dict(seed=77, stages=stages),
            resume_key=[
                77,
                ["warmup", 8, 8, 0, 5, dict(high=0, low=0)],
                [HOSTILE, 8, 8, 5, 10, dict(high=9)],
            ],
        ),
    )
    write(out / "ann/sft/metrics.jsonl", *steps("practice", 0, 3))
    for phase, avg in (("sft", 0.305), ("distill", 0.407), ("rl", 0.509)):
        write(
            out / phase / "before.json",
            {task: score(avg - 0.05) | {"prompt_format": "chat"} for task in ("math", "code")},
        )
    write(out / "sft/metrics.jsonl", *steps("sft", 0, 10), end(9, "sft", 0.305, 0.306))
    likelihoods = {
        f"{who}_{side}": -1.0
        for who in ("student", "reference", "teacher")
        for side in ("chosen", "rejected")
    }
    write(
        out / "distill/metrics.jsonl",
        *steps(
            "DPD",
            0,
            10,
            dpo=0.7,
            kl_chosen=0.1,
            kl_rejected=0.2,
            margin=0.1,
            accuracy=0.5,
            **likelihoods,
        ),
        end(9, "DPD", 0.407, 0.408),
    )
    write(out / "distill/teacher.json", {"math": score(0.911), "cost": {"step": 3}})
    write(out / "reward/metrics.jsonl", *steps("reward model", 0, 10))
    write(out / "reward/held_out.json", {"accuracy": 0.876, "pairs": 500})
    seen = dict(reward=0.5, all_right=0.1, all_wrong=0.2, entropy=0.3, length=20, truncated=0.0)
    write(
        out / "rl/metrics.jsonl",
        *steps("STEM", 0, 10, **seen),
        end(9, "STEM", 0.509, 0.510),
        *steps("coding", 10, 10, **seen),
        end(19, "coding", 0.611, 0.612),
    )
    for rank, mean in enumerate((0.5, 1.0, None)):
        write(out / f"rl/filter/STEM-abc.{rank}.jsonl", {"number": rank, "mean": mean})
    attempts = [
        dict(
            response=HOSTILE,
            writer="ann",
            round=0,
            score=0.25,
            failed=[dict(item="It adds up.", critique=HOSTILE, by="program")],
        ),
        dict(
            response="<think>\n1 + 1 = 2.\n</think>\n\nAnswer: 2",
            writer="bob",
            round=1,
            score=1.0,
            failed=[],
        ),
    ]
    case = dict(
        number=3, instruction=[dict(role="user", content="1 + 1?")], attempts=attempts, best=1
    )
    write(out / "refine/history/math.jsonl", case)
    write(
        out / "refine/math.jsonl",
        dict(
            number=3,
            summary="adds",
            messages=[
                case["instruction"][0],
                dict(role="assistant", content="Answer: 2", reasoning="So 1 + 1 is 2."),
            ],
        ),
    )
    write(
        out / "refine/report.json",
        {
            "sets": {"math": {"instructions": 1234, "kept": 0.613, "mended": 0.135}},
            "trial": {"draft": {"ann": 0.42, "bob": 0.86}, "judge": {"ann": 0.5, "bob": 0.55}},
            "usage": {"ann draft requests": 4321, "ann draft written": 98_765},
        },
    )


class Page(HTMLParser):
    """What a browser would make of it: elements in order, text; each is closed where it should."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [tag] * (tag not in ("meta", "img"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.words += [data] if self.open[-1:] != ["style"] else []


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes the folder the present one, with a config; every checkpoint answers the same."""
    patch.chdir(folder)
    Path("c.py").write_text(CONFIG)
    patch.setattr(sys, "argv", ["report.py", "c.py"])
    answer = lambda path, problems, length: [HOSTILE] * len(problems)
    patch.setattr(samples, "answer_greedily", answer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run of all phases, with its page and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, open(folder / "printed", "w") as printed:
        enter(folder, patch)
        patch.setattr(sys, "stdout", printed)
        fabricate(Path("out/c"))
        report.main()
    return folder


@pytest.fixture
def page(whole) -> Page:
    return Page((whole / "out/c/report.html").read_text())


def test_it_says_what_every_phase_wrote(whole, page):
    text, printed = page.text, (whole / "printed").read_text()
    for phase, avg in (
        ("pretrain", 0.203),
        ("sft", 0.305),
        ("distill", 0.407),
        ("rl: STEM", 0.509),
        ("rl: coding", 0.611),
    ):
        assert re.search(f"{phase} +{avg} ±0.020 +{avg + 0.001:.3f} ±0.020 +256", printed)
        assert f"{phase} {avg} ±0.020" in text and f"{avg + 0.001:.3f} ±0.020" in text
    assert "+0.102 ±0.028" in text  # of each phase against the one before; 0.02 * sqrt(2)
    for said in (
        "10 steps, 10k tokens, 1.0 min",
        "98.8k tokens written",
        "with ann: 3 steps, 3k trained tokens",
        "warmup 5 0.0 0.432 0.101 ±0.020",
        "math 0.255 ±0.020 chat 0.305 ±0.020 +0.050",
        "math 0.911 ±0.020",
        "instructions 1,234",
        "kept with a chain 0.61",
        "ann draft 4,321 98,765",
        "draft 0.42 0.86",
        "0 (drafts) 0.00 of 1",
        "1 1.00 of 1; mean score 1.00",
        "ann, score 0.25",
        "So 1 + 1 is 2.",
        "accuracy 0.876",
        "pairs 500",
        "STEM 10 1 of 2 0.500 → 0.590 0.300 → 0.390",
        "After pretrain ✗ wrong",
        "seed = 77",
        "c0ffee",
        "There are no recorded results",
    ):
        assert said in text, said
    assert "has not begun" not in text and "not run yet" not in text
    for name in ("phases", "pretrain/loss", "sft/loss", "distill/loss", "reward/loss", "rl/loss"):
        assert (whole / f"out/c/{name}.png").stat().st_size > 5000


def test_it_loads_nothing_and_is_accessible(whole, page):
    of = lambda tag: [attributes for name, attributes in page.elements if name == tag]
    links = [a[key] for _, a in page.elements for key in ("src", "href") if key in a]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(of("img")) == 6 and all(
        link.startswith(("data:image/png;base64,", "#")) for link in links
    )
    assert not re.search(r"url\(|@import", (whole / "out/c/report.html").read_text())
    assert {link[1:] for link in links if link[0] == "#"} <= set(ids) and len(set(ids)) == len(ids)
    assert (
        all(len(image["alt"]) > 20 for image in of("img"))
        and len(of("caption")) == len(of("table")) > 9
    )
    assert (
        all(a.get("scope") for a in of("th"))
        and of("html") == [{"lang": "en"}]
        and len(of("h1")) == 1
    )


def test_hostile_text_is_only_text(page):
    """In a sample, a critique, a stage's name, a machine and the config; {{ }} is text, too."""
    assert page.text.count(HOSTILE) >= 6
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "iframe", "object", "link", "base", "form"}
    )
    assert not [
        key for _, attributes in page.elements for key in attributes if key.startswith("on")
    ]
    (policy,) = [
        a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script" not in policy


def test_it_is_readable_in_light_and_dark():
    """Contrast by WCAG 2: at least 4.5 for text."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    modes = re.findall(r":root \{(.*?)\}", (ROOT / "report/base.html").read_text())
    assert len(modes) == 3  # light, dark, print
    for mode in modes:
        color = dict(
            re.findall(
                r"--(\w+): (#\w+);",
                mode.replace("#000;", "#000000;")
                .replace("#fff;", "#ffffff;")
                .replace("#444;", "#444444;")
                .replace("#bbb;", "#bbbbbb;"),
            )
        )
        for text in ("ink", "soft", "accent", "good", "bad"):
            for back in ("back", "panel"):
                light, dark = sorted((luminance(color[text]), luminance(color[back])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, back, mode)


def test_what_is_missing_or_torn_is_left_out(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)
    with pytest.raises(common.UserError, match="no evaluation in out/c/.*/metrics.jsonl yet"):
        report.main()
    fabricate(Path("out/c"))
    for name in ("sft", "distill", "refine", "reward", "ann"):
        shutil.rmtree(f"out/c/{name}")
    path = Path("out/c/rl/metrics.jsonl")
    path.write_text(
        "".join(path.read_text().splitlines(keepends=True)[:14])[:-20]
    )  # a kill in the second stage
    Path("out/c/pretrain/step_00000010/meta.json").write_text('{"phase": "pre')
    Path("results").mkdir()
    Path("results/dpd.jsonl").write_text('{"table": "arms"}\n')
    report.main()
    text = Page(Path("out/c/report.html").read_text()).text
    for said in (
        "SFT has not begun: python sft.py c.py",
        "DPD has not begun",
        "No data have been refined yet",
        "There is no reward model yet",
        "rl: STEM 0.509",
        "coding 2",
        "There is no checkpoint to ask",
        "results/dpd.jsonl cannot be shown",
    ):
        assert said in text, said
    assert "rl: coding" not in text


def test_a_run_of_pretraining_alone_has_its_pictures_and_its_plan(base, monkeypatch, capsys):
    """The plan is of the command that trained the run, though the report has no such option."""
    monkeypatch.chdir(base.folder)
    monkeypatch.setattr(sys, "argv", ["report", "mini.py", "--run=base", "--evaluate.tasks=[]"])
    for name in ("loss", "plan"):
        Path(f"out/base/pretrain/{name}.png").unlink(missing_ok=True)
    report.main()
    printed = capsys.readouterr().out
    assert "pictures: out/base/pretrain/plan.png out/base/pretrain/loss.png\n" in printed
    for name in ("loss", "plan"):
        assert Path(f"out/base/pretrain/{name}.png").stat().st_size > 5000
    Path("data").rename("elsewhere")
    try:
        report.main()
    finally:
        Path("elsewhere").rename("data")
    printed = capsys.readouterr().out
    assert "no picture of the plan: no data in data" in printed
    assert "pictures: out/base/pretrain/loss.png\n" in printed
    assert "page: out/base/report.html\n" in printed


def test_samples_are_the_checkpoints_own_and_asked_once(base, monkeypatch):
    monkeypatch.chdir(base.folder)
    cfg = EvaluateConfig(tasks=["math", "gsm8k"], max_new_tokens=8)
    (item,) = samples.collect_samples(Path("out/base"), cfg)  # of generated families alone
    ((name, mark, text),) = item["replies"]
    assert (
        (name, item["task"]) == ("pretrain", "math")
        and mark in ("right", "wrong")
        and item["question"]
    )
    command = [
        str(ROOT / "generate.py"),
        "out/base/pretrain",
        "--temperature=0",
        "--max_new_tokens=8",
    ]
    assert text in base.run(*command, f"Problem: {item['question']}\nWork:")
    monkeypatch.setattr(samples, "answer_greedily", lambda *_: pytest.fail("asked again"))
    assert samples.collect_samples(Path("out/base"), cfg) == [item]


def test_recorded_tables_are_shown_again(tmp_path, monkeypatch, capsys):
    """And the page has their very cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiments/fg_wsd.py", "--show"])
    with pytest.raises(
        common.UserError,
        match="fg_wsd.jsonl has no results .* `python -m experiments.fg_wsd` makes",
    ):
        fg_wsd.main()
    line = lambda table, arm, seed, right: dict(
        table=table,
        arm=arm,
        seed=seed,
        lr=right / 100,
        k=4,
        avg=right / 4,
        correct=[right, right - 1],
        bits_per_byte=0.25,
    )
    sweep = [line("sweep", "b", 100, right) for right in (1, 3, 2)]
    runs = [
        line(table, arm, seed, 3 - (arm > "b"))
        for table in ("true", "filter")
        for arm in "abcde"
        for seed in (0, 1)
    ]
    write(Path("results/fg_wsd.jsonl"), *sweep, *runs)
    fg_wsd.main()
    printed = capsys.readouterr().out
    assert "all arms take 0.03" in printed
    found = tables.split_blocks(printed)
    assert [kind for kind, _ in found] == [
        "text",
        "heading",
        "table",
        "table",
        "heading",
        "table",
        "table",
    ]
    assert (
        found[2][1][0] == ["arm", "accuracy", "each seed", "bits a byte"]
        and len(found[2][1]) == 1 + 5
    )
    assert found[3][1][2] == [
        "(a) - (c)",
        "+0.250",
        "+0.250 … +0.250",
        "+0.250 +0.250",
        "better",
        "0.0000",
    ]
    assert [experiment["name"] for experiment in tables.read_experiments()] == ["fg_wsd"]


def test_an_unfinished_run_says_how_far_how_fast_how_long(tmp_path):
    lines = [line | {"tokens_per_s": 2500.0} for line in steps("s", 0, 120)]
    write(tmp_path / "metrics.jsonl", *lines)  # 6 s a step
    assert tables.describe_progress(tmp_path) == ""  # of an older version: nobody knows
    for n_steps, left in ((1000, "88.0 min"), (130, "60 s"), (100_000, "6.9 days")):
        write(tmp_path / "plan.json", {"steps": n_steps})
        os.utime(tmp_path / "metrics.jsonl", (0, time.time() - 150))
        said = tables.describe_progress(tmp_path)
        assert said.startswith(f"step 120 of {n_steps:,} ({120 / n_steps:.0%}), 2.5k tokens/s; ")
        assert said.endswith(f"steps for {left} still; its last line is 2.5 min old")
    write(tmp_path / "plan.json", {"steps": 120})
    assert tables.describe_progress(tmp_path) == ""


def test_runs_are_compared_problem_by_problem(tmp_path, monkeypatch, capsys):
    """The same mean differences, of pairs that agree and of pairs that do not."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        fabricate(Path("out") / name)
    solved = np.arange(256) % 4 / 4
    gain = (np.arange(256) % 8 == 0) / 4
    for name, rewards in (("a", solved), ("b", solved + gain)):
        keyed = {f"key{i}": reward for i, reward in enumerate(rewards.tolist())}
        write(Path(f"out/{name}/sft/problems.jsonl"),
              dict(step=4, rewards={"math": {"key0": 0.0, "key1": 1.0}}),
              dict(step=9, rewards={"math": keyed}))
    meta = dict(step=10, files={}, seed=1, sft=dict(
        lr=1e-3, seed=0, stages=[dict(name="s", lr=[1, 0], problems=HOSTILE)]))
    write(Path("out/a/sft/step_00000010/meta.json"), meta)
    changed = meta | dict(sft=dict(lr=2e-3, seed=0, stages=[dict(name="s", lr=[1, 1])]))
    write(Path("out/b/sft/step_00000010/meta.json"), changed)
    monkeypatch.setattr(compare, "CURVES", {"sft": compare.CURVES["sft"]})  # one picture does
    monkeypatch.setattr(sys, "argv", ["report", "--compare", "out/a", "out/b", "out/c/"])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", report.__file__)
    settings.answer_early()  # which looks for a config in other commands
    report.main()
    printed = capsys.readouterr().out
    error = gain.std(ddof=1) / 16
    assert f"+{gain.mean():.3f} ±{error:.3f}  better; paired, 256 problems" in printed
    assert "+0.000 ±0.028  not shown; not paired, 256 and 256 problems" in printed
    for setting, one, other in (("sft.lr", "0.001", "0.002"),
                                ("sft.stages.s.lr", "[1, 0]", "[1, 1]")):
        assert re.search(rf"{re.escape(setting)} +{re.escape(one)} +{re.escape(other)} ", printed)
    assert "sft.seed" not in printed
    html = Path("out/compare-a-b-c.html").read_text()
    page = Page(html)
    assert "Each run beside “a”" in page.text and page.text.count("paired, 256 problems") == 1
    assert page.text.count(HOSTILE[:60]) == 1 and "<script" not in html
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 1
    for folders, said in ((["out/a"], "two runs or more"), (["out/a", "out"], "out is no run")):
        monkeypatch.setattr(sys, "argv", ["report", "--compare", *folders])
        with pytest.raises(common.UserError, match=said):
            report.main()


def test_gain_is_none_without_a_start(tmp_path):
    write(tmp_path / "metrics.jsonl", dict(step=0, scores={"math": score(0.5)}))
    assert loop.gain_table(tmp_path) == ""
    write(tmp_path / "before.json", {"math": score(0.25) | {"prompt_format": "document"}})
    row = loop.gain_table(tmp_path).splitlines()[1]
    assert row.split() == ["math", "0.250", "±0.020", "document", "0.500", "±0.020", "+0.250"]
    assert math.isnan(tables.mean_of_numbers([None, math.nan]))
    assert tables.mean_of_numbers([1, None, 2]) == 1.5
    counts = [tables.shorten(n) for n in (950, 1290, 3.2e6, 2.3e13)]
    assert counts == ["950", "1.29k", "3.2M", "23T"]


def test_what_a_speedrun_took_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("out/tiny")
    meta = dict(commit="abc", command="pretrain.py configs/tiny.py", config="hash", seconds=3.0,
                machine="2 CPU cores", step=10, phase="pretrain", pretrain={"seed": 0})
    write(out / "pretrain/step_00000010/meta.json", meta)
    report.record_costs(out)
    assert not Path("results").exists()  # a run that was not made by speedrun.sh
    (out / "costs.txt").write_text("15 14 corpus\n441 440 pre-training\n")
    report.record_costs(out)
    recorded = json.loads(Path("results/speedrun.jsonl").read_text())
    assert recorded["phases"] == {"corpus": {"seconds": 15, "cpu_seconds": 14},
                                  "pre-training": {"seconds": 441, "cpu_seconds": 440}}
    assert recorded["command"] == "bash speedrun.sh" and recorded["commit"] == "abc"
    assert recorded["seconds"] == 456 and recorded["cpu_minutes"] == 7.6
