"""The arms share what they must, the statistics are scipy's, runs that begin alike share that."""
from settings import from_dict, read_value

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pytest
import scipy.stats

import common
import distill
import pretrain
import rl as rl_phase
import sft
from checks import warm
from data.text.mixture import plan_stages
from data.text.shards import CorpusConfig
from experiments import dpd, fg_wsd, rl, runner, sft_data, stats, stem
from experiments.fg_wsd import ARMS, PretrainRun, make_stages


def plan(arm, scale=1.0):
    defaults = {"epochs": {}, "least_steps": 0}
    table = [SimpleNamespace(**defaults | json.loads(stage)) for stage in make_stages(arm, scale)]
    return table, plan_stages(table, {"high": 327_000, "medium": 331_000}, fg_wsd.BATCH)


@pytest.mark.parametrize("scale", [1.0, 0.37, 0.02])
def test_arms_share_rate_steps_and_context_and_documents(scale):
    def rates(arm):  # of each step
        table, plans = plan(arm, scale)
        return [
            (s.lr, s.context, p.n_steps if s.lr != [1, 1] else 0)
            for s, p in zip(table, plans)
            if s.lr != [1, 1]
        ]

    ends = {arm: plan(arm, scale)[1][-1] for arm in ARMS}
    assert len({json.dumps(rates(arm)) for arm in ARMS}) == 1
    assert len({end.end_step for end in ends.values()}) == 1
    taken = {
        arm: {
            pool: max(p.positions(p.end_step).get(pool, 0) for p in plan(arm, scale)[1])
            for pool in ("high", "medium")
        }
        for arm in ARMS
    }
    assert taken["a"] == taken["b"] == taken["d"] == taken["e"]  # so the same documents, as often
    assert abs(taken["c"]["high"] - taken["c"]["medium"]) <= fg_wsd.UNIT
    assert sum(taken["c"].values()) == sum(taken["a"].values())


def test_what_the_arms_are():
    shares = {arm: [s.mixture.get("high", 0) / s.tokens for s in plan(arm)[0]] for arm in ARMS}
    assert shares["a"] == [0.5, 0.5, 1, 1] and shares["c"] == pytest.approx([0.5] * 4, abs=0.01)
    assert np.ptp(shares["b"]) < 0.01 and shares["b"][0] == pytest.approx(0.728, abs=0.01)
    assert np.ptp(shares["d"][:3]) < 0.01 and shares["d"][3] == 1
    assert shares["e"][:2] == [1, 1] and shares["e"][2:] == pytest.approx([0.5, 0.5], abs=0.01)
    assert make_stages("a")[:2] == make_stages("c")[:2]  # what (c) need not train again


def test_paired_interval_is_scipys():
    rng = np.random.default_rng(0)
    one, other = (
        [dict(k=4, correct=rng.integers(0, 5, 200).tolist()) for _ in range(3)] for _ in range(2)
    )
    mean, half, each = stats.paired_difference(one, other)
    a, b = (np.mean([r["correct"] for r in rows], axis=0) / 4 for rows in (one, other))
    interval = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert mean == pytest.approx((interval.low + interval.high) / 2)
    # ours takes the normal for Student's t
    assert half == pytest.approx((interval.high - interval.low) / 2, rel=0.01)
    assert np.mean(each) == pytest.approx(mean)


def result(arm, seed, right):
    return dict(
        arm=arm, seed=seed, k=4, correct=right, avg=sum(right) / 4 / len(right), bits_per_byte=0.3
    )


def test_a_gain_is_claimed_only_where_all_seeds_agree():
    low, high = [1] * 50 + [0] * 50, [2] * 50 + [1] * 50
    rows = [result("a", 0, high), result("a", 1, high), result("b", 0, low), result("b", 1, low)]
    assert "| better |" in stats.compare(rows, dict(a="", b=""), [("a", "b")])
    assert "| worse |" in stats.compare(rows, dict(a="", b=""), [("b", "a")])
    rows[3] = result("b", 1, [3] + high[1:])  # one seed against it
    assert "| not shown |" in stats.compare(rows, dict(a="", b=""), [("a", "b")])


CONFIG = """
model = dict(n_layers=1, hidden_size=32, ffn_size=64, n_heads=1, n_kv_heads=1, head_dim=32,
             tie_embeddings=True)
tokenizer = dict(kind="bpe", vocab_size=300, train_mb=0.05)
corpus = dict(pools=dict(high=[dict(pages=300, families=dict(code=1))],
                         medium=[dict(pages=300, families=dict(code=1), corrupt=1.0)]),
              val_fraction=0.1)
pretrain = dict(batch_tokens=2048, stages=[], held_out=["high"], keep=1)
evaluate = dict(tasks=["code"], n_problems=4, k=2, max_new_tokens=8)
"""


def run_warm(command, output) -> int:
    """In the place of runner.run_script, which starts a new Python."""
    process = warm.start(command, Path.cwd())
    output.write(process.communicate(timeout=300)[0])
    return process.returncode


def test_a_run_goes_on_from_one_that_begins_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run_script", run_warm)
    Path("c.py").write_text(CONFIG)
    runner.call(["data/text/corpus.py", "c.py", "--corpus.folder=out/t/data"], Path("log"))
    version = runner.hash_code_and_data("c.py", "t", "pretrain")
    a, c = (PretrainRun("t", "true", arm, 0, 1e-3, "dev", make_stages(arm, 0.02)) for arm in "ac")
    alone = runner.finish(replace(c, table="alone"), "c.py", version, [])
    others = [(run, run.folder(version)) for run in (a, c)]
    killed = c.folder(version) / "pretrain.tmp"  # in the midst of the copy of what they share
    (killed / "step_00000001").mkdir(parents=True)
    first = runner.finish(a, "c.py", version, others)
    shared = runner.finish(c, "c.py", version, others)
    assert "going on from" in (c.folder(version) / "log.txt").read_text()
    assert shared["bits_per_byte"] == alone["bits_per_byte"]
    assert shared["correct"] == alone["correct"]
    metrics = common.read_metrics(a.folder(version) / "pretrain")
    held_out = [line["validation"] for line in metrics if "validation" in line]
    assert set(held_out[-1]) == {"high"}  # pretrain.held_out
    assert first["problems"] == 4 and first["k"] == 2 and len(first["correct"]) == 4
    assert first["command"].startswith("python pretrain.py c.py --run=t/runs/true-a-0-")
    before = (c.folder(version) / "log.txt").stat().st_mtime_ns
    assert runner.finish(c, "c.py", version, others) == shared  # nothing runs twice
    assert before == (c.folder(version) / "log.txt").stat().st_mtime_ns
    assert replace(c, lr=2e-3).folder(version) != c.folder(version) != c.folder("other code")
    with pytest.raises(
        common.UserError, match="failed with exit code 2; .*log.txt ends with: error"
    ):
        runner.finish(replace(a, stages=("{}",)), "c.py", version, [])


def test_a_result_is_of_the_config_and_of_the_checkpoints_it_starts_from(tmp_path, monkeypatch):
    """What the config imports counts, and what the speedrun made, beside the settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a config's folder is put in front
    Path("c.py").write_text("from parent import sft\n")
    meta = Path("out/tiny/sft/step_00000009/meta.json")
    meta.parent.mkdir(parents=True)
    hashes = set()
    for lr in (1, 2):
        for checksum in (3, 4):
            Path("parent.py").write_text(f"sft = dict(lr={lr})\n")
            meta.write_text(f'{{"files": {checksum}}}')
            monkeypatch.delitem(sys.modules, "parent", raising=False)
            importlib.invalidate_caches()
            hashes.add(runner.hash_code_and_data("c.py", "t", "sft"))
    assert len(hashes) == 4


def test_replies_of_the_sft_arms():
    draft = {"response": "<think>\n1 + 1 = 2.\n</think>\n\nAnswer: 2"}
    assert sft_data.make_reply(draft) == {
        "role": "assistant",
        "reasoning": "1 + 1 = 2.",
        "content": "Answer: 2",
    }
    assert sft_data.make_reply(draft, chain="") == {"role": "assistant", "content": "Answer: 2"}
    assert sft_data.make_reply({"response": "Answer: 3"}, chain="old") == {
        "role": "assistant",
        "reasoning": "old",
        "content": "Answer: 3",
    }
    attempts = [draft | {"score": 1.0, "round": 0}]
    reply = {"role": "assistant", "reasoning": "1 + 1 = 2.", "content": "Answer: 2"}
    kept = {"messages": [reply], "summary": "1 + 1"}
    refined = {"attempts": attempts, "best": 0}
    assert "e" in sft_data.make_replies(0, refined, attempts, kept)
    own_chain = sft_data.make_replies(0, refined, attempts, kept | {"summary": ""})
    assert own_chain.keys() == {"a", "b", "b'", "c"}  # nothing was reconstructed
    run = sft_data.SftRun("sft_data", "tokens", "e/4", 1, 1e-3, "test", ('{"name": "sft"}',))
    assert run.settings()["sft.data"] == "out/sft_data/arms/e-4"
    assert run.settings()["sft.stages"] == [{"name": "sft"}]


def test_tables_of_rl():
    """Two tasks of three problems; (a) is the first stage of the chain."""

    def scores(code, math):
        right = code + math
        return dict(
            k=2,
            problems=6,
            correct=right,
            avg=sum(right) / 12,
            tasks=dict(math=sum(math) / 6, code=sum(code) / 6),
        )

    results = []
    for seed in range(2):
        results += [
            dict(table="arms", arm=arm, seed=seed) | scores([1, 1, 0], [0, 1, 0])
            for arm in ("dpd", "sft", "b", "c")
        ]
        ends = dict(
            STEM=scores([1, 1, 0], [1, 2, 1]),
            coding=scores([2, 2, 1], [1, 1, 1]),
            preference=scores([2, 2, 1], [1, 1, 1]),
        )
        results.append(
            dict(table="stages", arm="a", seed=seed, lr=1e-4, stages=ends) | ends["preference"]
        )
    assert (
        stats.select_task(results[-1], "code")["correct"] == [2, 2, 1]
        and stats.select_task(results[-1], "math")["avg"] == 0.5
    )
    text = rl.make_tables(results)
    assert (
        "| DPD | 0.167 | 0.333 |" in text
        and "| STEM | 0.667 | 0.333 |" in text
        and "| coding | 0.500 | 0.833 |" in text
    )
    assert re.search(r"\| STEM \| math \| \+0.500 \| .* \| \+0.500 \+0.500 \| better \|", text)
    assert (
        re.search(r"\| coding \| math \| -0.167 \| ", text) and "| coding | code | +0.500 |" in text
    )
    assert text.count("### after each stage") == 1
    assert "| (a) RL from DPD | 0.667 | 0.667 0.667 |" in text and "| (a) - (c) | +0.500 |" in text


def test_arms_of_rl_differ_as_they_say():
    first = json.dumps(dict(name="STEM", problems=dict(math=4), steps=10))
    settings = {
        arm: rl.RlRun("rl", "arms", arm, 1, 1e-4, "test", (first,)).settings() for arm in rl.ARMS
    }
    steps = {arm: s["rl.stages"][0]["steps"] for arm, s in settings.items()}
    assert steps == dict(dpd=1, sft=1, a=10, b=10, c=20)
    assert settings["b"] == settings["a"] | {"rl.filter_samples": 0}
    longer = [settings["a"]["rl.stages"][0] | dict(steps=20)]
    assert settings["c"] == settings["a"] | {"init_from": "out/tiny/sft", "rl.stages": longer}


def test_arms_with_a_plus_start_from_longer_sft_and_its_own_pairs():
    longer = Path("out/dpd/sft4x/sft")
    trained = dpd.DpdRun("dpd", "arms", "e+", 1, 1e-3, "test", (), longer).settings()
    usual = dpd.DpdRun("dpd", "arms", "e", 1, 1e-3, "test", ()).settings()
    assert trained == usual | {"init_from": str(longer)}  # samples are told apart by their source
    start = dpd.DpdRun("dpd", "arms", "sft+", 1, 0.0, "test", (), longer).settings()
    assert start["init_from"] == str(longer)
    assert start["distill.pairs"] == "out/dpd/pairs1-longer/distill/pairs.jsonl"
    usual_start = dpd.DpdRun("dpd", "arms", "sft", 1, 0.0, "test", ()).settings()
    assert usual_start["distill.pairs"] == "out/dpd/pairs1/distill/pairs.jsonl"


def test_phases_know_the_settings_of_all_arms():
    """So that a setting renamed in a phase, or a value that it refuses, fails here, not in the
    middle of an experiment. An arm with the rate 0 is not trained."""
    recipe = tuple(json.dumps(stage) for stage in rl.RECIPE["stages"])
    runs = [PretrainRun("fg_wsd", "true", arm, 0, 1e-3, "test", make_stages(arm)) for arm in ARMS]
    sft_stages = (json.dumps(sft_data.STAGE | {"epochs": {"math": 2.0}}),)
    for arm in sft_data.ARMS:
        runs.append(sft_data.SftRun("sft_data", "rows", arm, 0, 1e-3, "test", sft_stages))
    for lr in (0.0, 1e-3):
        runs += [dpd.DpdRun("dpd", "arms", arm, 0, lr, "test", ()) for arm in dpd.ARMS]
        runs += [rl.RlRun("rl", "arms", arm, 0, lr, "test", recipe) for arm in rl.ARMS]
        for arm in stem.ARMS:
            runs.append(stem.StemRun("stem", "arms", arm, 0, lr, "test", recipe[:1]))
    classes = {
        "corpus": CorpusConfig,
        "pretrain": pretrain.PretrainConfig,
        "sft": sft.SftConfig,
        "distill": distill.DistillConfig,
        "rl": rl_phase.RlConfig,
    }
    stage_classes = {"pretrain": pretrain.StageConfig, "rl": rl_phase.StageConfig}
    for run in runs:
        for name, value in run.settings().items():
            section, _, key = name.partition(".")
            if key:
                hints = get_type_hints(classes[section], include_extras=True)
                assert key in hints, name
                read_value(name, value, hints[key])
            if key == "stages" and section in stage_classes:
                for stage in value:
                    from_dict(stage_classes[section], stage, name)
