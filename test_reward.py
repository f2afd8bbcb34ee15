"""The pairwise reward model: reward.py by its real command, its judge beside transformers, and wins
by hand."""
import contextlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

import common
import hf
import reward
from common import UserError
from conftest import ROOT
from data.chat import template
from data.tasks import taste
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from model import ModelConfig, Transformer, init_weights
from reward import (
    BradleyTerry,
    RewardConfig,
    RewardModel,
    both_orders,
    grade,
    group_rewards,
    parse_preference,
    read_preferences,
    train_step,
    win_rates,
)

ONE = common.Dist(0, 1, torch.device("cpu"), None)
PAIRS = taste.pairs("train", 12, 0)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [
        pair[key]
        for pair in taste.pairs("train", 200, 0)
        for key in ("question", "better", "worse")
    ]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=380))


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    model = Transformer(
        ModelConfig(
            2, 32, 48, 2, 1, 16, vocab_size=tokenizer.n_vocab, init_std=0.2, max_context=256
        )
    )
    init_weights(model, 0)
    return model


# ---- the question and the verdict

def test_a_verdict_is_one_token_in_its_context(tokenizer):
    """The prompt with the verdict is, token by token, the conversation in which the assistant says
    A or B."""
    question, a, b = "Which?", "one", "two"
    prompt = reward.comparison_prompt(question, a, b, tokenizer)
    asked = {"role": "user", "content": "Which?\nA: one\nB: two\nBetter:"}
    assert "A: one\nB: two" in tokenizer.decode(prompt)
    for letter, token in zip("AB", reward.verdict_tokens(tokenizer)):
        said = template.render([asked, {"role": "assistant", "content": letter}], tokenizer)
        assert said[:len(prompt) + 1] == [*prompt, token] and tokenizer.decode([token]) == letter


def test_swapping_the_texts_flips_the_verdict(tokenizer):
    first, second = reward.verdict_tokens(tokenizer)
    pair = {"question": "Which?", "better": "one", "worse": "two"}
    assert both_orders(pair, tokenizer) == [
        (reward.comparison_prompt("Which?", "one", "two", tokenizer), [first]),
        (reward.comparison_prompt("Which?", "two", "one", tokenizer), [second])]
    assert first != second


def test_a_tokenizer_without_the_letters():
    other = SimpleNamespace(name="other.json", encode=lambda text: [1, 2])
    with pytest.raises(UserError, match="other.json has no single token for each of A and B"):
        reward.verdict_tokens(other)


# ---- the judge

ASKED = [(pair["question"], *texts) for pair in PAIRS
         for texts in ((pair["better"], pair["worse"]), (pair["worse"], pair["better"]))]


def test_the_judge_is_what_transformers_computes(model, tokenizer, tmp_path):
    """Softmax over the two letters of the logits at the last position, from the exported folder and
    the messages."""
    hf.export(model, tokenizer, tmp_path, torch.float32)
    theirs, their_tokenizer = (
        kind.from_pretrained(tmp_path) for kind in (LlamaForCausalLM, AutoTokenizer)
    )
    letters, expected = their_tokenizer.convert_tokens_to_ids(["A", "B"]), []
    for question, a, b in ASKED:
        message = {"role": "user", "content": f"{question}\nA: {a}\nB: {b}\nBetter:"}
        ids = their_tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            expected.append(theirs(**ids).logits[0, -1, letters].softmax(-1)[0].item())
    found = RewardModel(model, tokenizer, 192, max_rows=4)(ASKED)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.std() > 0.01


def test_each_question_is_asked_once(model, tokenizer):
    """In whatever order and company: the answers are the same."""
    judge, n = RewardModel(model, tokenizer, 192, max_rows=1), []
    hook = model.register_forward_pre_hook(lambda model, arguments: n.append(1))
    found = judge(ASKED + ASKED[:3])
    assert len(n) > 1 and (found[-3:] == found[:3]).all()
    n.clear()
    assert (judge(ASKED[::-1]) == found[:-3][::-1]).all() and not n
    hook.remove()
    assert RewardModel(model, tokenizer, 220, max_rows=32)(ASKED[::-1])[::-1] == pytest.approx(
        found[:-3], abs=1e-6
    )
    assert judge([]).shape == (0,)


def test_what_is_too_long_is_counted(model, tokenizer):
    """Such a pair gets 0.5, and the others what they get without it."""
    long = ("Which?", "one " * 200, "two")
    judge = RewardModel(model, tokenizer, 192)
    found = judge([ASKED[0], long, ASKED[1]])
    assert found[1] == 0.5 and judge.too_long == 1
    assert found[[0, 2]] == pytest.approx(RewardModel(model, tokenizer, 192)(ASKED[:2]), abs=1e-6)
    judge([long])
    assert judge.too_long == 1
    assert RewardModel(model, tokenizer, 192)([long]).tolist() == [0.5]


def test_equal_texts_are_a_tie(model, tokenizer):
    """Without being asked for, so that the judge's leaning to a place is no disagreement of its
    own."""
    judge = RewardModel(model, tokenizer, 192)
    assert (
        judge([("Which?", "one", "one")]).tolist()
        == [0.5]
        != judge([("Which?", "one", "two")]).tolist()
    )
    found, = group_rewards(judge, [("Which?", ["one"] * 3)], 0, 0)
    assert found.rewards.tolist() == [0.5] * 3 and found.disagreement == 0


@pytest.fixture(scope="module")
def scores_of(model, tokenizer):
    """What transformers would compute is test_the_judge's; here by the full logits of single
    prompts."""
    first, second = reward.verdict_tokens(tokenizer)

    def score(question, reply) -> torch.Tensor:
        message = {"role": "user", "content": f"{question}\nReply: {reply}\nGood:"}
        prompt = template.render([message], tokenizer, add_generation_prompt=True)
        logits = model(torch.tensor([prompt]))[0, -1] @ model.lm_head.weight.T
        return logits[first] - logits[second]
    return score


def test_a_bradley_terry_judge_compares_scores(model, tokenizer, scores_of):
    """Each text is scored once; the orders agree; what is too long gets 0.5."""
    judge, long = BradleyTerry(model, tokenizer, 192, max_rows=4), ("Which?", "one " * 200, "two")
    found = judge([*ASKED, long])
    with torch.no_grad():
        expected = [torch.sigmoid(scores_of(q, a) - scores_of(q, b)).item() for q, a, b in ASKED]
    np.testing.assert_allclose(found[:-1], expected, atol=1e-5)
    np.testing.assert_allclose(found[:-1:2] + found[1:-1:2], 1, atol=1e-12)
    assert found[-1] == 0.5 and judge.too_long == 1 and found.std() > 0.01
    assert len(judge.known) == len({(q, text) for q, *texts in [*ASKED, long] for text in texts})
    verdict, = group_rewards(judge, [("Which?", ["one", "two", "one"])], 0, 0)
    assert (
        verdict.disagreement == pytest.approx(0, abs=1e-12)
        and verdict.rewards[0] == verdict.rewards[2]
    )


# ---- wins

def judge_of(chances: dict[str, float], asked: list):
    """By table: {"ab": P(a is better, asked in this order)}."""
    return lambda pairs: asked.extend(pairs) or np.array([chances[a + b] for _, a, b in pairs])


TABLE = {"ab": 0.9, "ba": 0.3, "ac": 0.8, "ca": 0.2, "bc": 0.6, "cb": 0.2}


def test_rewards_are_wins_against_all_others():
    """Each order counts half; the mean of a group is one half, whatever the judge says."""
    asked = []
    (found, alone) = group_rewards(
        judge_of(TABLE, asked), [("q", ["a", "b", "c"]), ("r", ["a"])], 0, 0
    )
    ab, ac, bc = (0.9 + 0.7) / 2, 0.8, (0.6 + 0.8) / 2
    assert found.rewards == pytest.approx([(ab + ac) / 2, (1 - ab + bc) / 2, (2 - ac - bc) / 2])
    assert found.rewards.mean() == pytest.approx(0.5)
    # whichever place it leans to
    assert found.disagreement == pytest.approx(np.mean([0.2, 0, 0.2]))
    assert alone.rewards.tolist() == [0.5]
    assert {question for question, *_ in asked} == {"q"} and len(asked) == 12


def test_a_few_opponents_are_drawn():
    """Without replacement, never oneself, by the seed; their mean is about one half."""
    texts, strength = list("abcdefgh"), dict(zip("abcdefgh", range(8)))

    def draw(seed):
        asked = []
        judge = lambda pairs: asked.extend(pairs) or np.array(
            [1 / (1 + np.exp(strength[b] - strength[a])) for _, a, b in pairs])
        found, = group_rewards(judge, [("q", texts)], 3, seed)
        return found.rewards, [(a, b) for _, a, b in asked[:24]]

    rewards, matches = draw(0)
    assert all(a != b for a, b in matches) and len(set(matches)) == 24
    assert [a for a, _ in matches] == [text for text in texts for _ in range(3)]
    assert (draw(0)[0] == rewards).all() and draw(1)[1] != matches
    assert rewards[:2].max() < rewards[-2:].min()
    assert np.mean([draw(seed)[0].mean() for seed in range(50)]) == pytest.approx(0.5, abs=0.03)


def test_win_rates_by_hand():
    found = win_rates(judge_of(TABLE, []), [("q", "a", "b"), ("q", "b", "a"), ("q", "b", "c")])
    assert found == pytest.approx([0.8, 0.2, 0.7])


# ---- preferences

ASK = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"},
       {"role": "user", "content": "2+2?"}]
HELPSTEER = {"context": ASK, "response1": "4", "response2": "5"}
ULTRA = {
    "prompt": "2+2?",
    "chosen": [ASK[2], {"role": "assistant", "content": "4"}],
    "rejected": [ASK[2], {"role": "assistant", "content": "5"}],
    "score_chosen": 8.0,
    "score_rejected": 3.5,
}


@pytest.mark.parametrize("record, expected", [
    ({"question": "q", "better": "4", "worse": "5"}, {"question": "q", "better": "4",
                                                      "worse": "5"}),
    (HELPSTEER | {"overall_preference": -2}, {"question": "Hi.\nYes?\n2+2?", "better": "4",
                                              "worse": "5", "gap": 2}),
    (HELPSTEER | {"overall_preference": 3}, {"question": "Hi.\nYes?\n2+2?", "better": "5",
                                             "worse": "4", "gap": 3}),
    (HELPSTEER | {"overall_preference": 0}, None),
    (HELPSTEER | {"overall_preference": 2, "response2": "4"}, None),
    ({"question": "q", "better": "4", "worse": "4"}, None),
    (ULTRA, {"question": "2+2?", "better": "4", "worse": "5", "gap": 4.5}),
    (ULTRA | {"score_rejected": 8.0}, None),
    (ULTRA | {"rejected": ULTRA["chosen"]}, None),
    ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {"question": "2+2?", "better": "4",
                                                          "worse": "5", "gap": 0}),
])
def test_preferences_of_known_forms(record, expected):
    """Plain, HelpSteer3's (a negative number prefers the first), UltraFeedback's; ties are none."""
    assert parse_preference(record) == expected


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="no preference: it has text, label"):
        parse_preference({"text": "a", "label": 1})


def test_preferences_of_several_sources(tmp_path):
    """What is left out is counted; "documents" is of one source, over all of its files."""
    good, tie = HELPSTEER | {"overall_preference": 1}, HELPSTEER | {"overall_preference": 0}
    (tmp_path / "files").mkdir()
    for name in ("1", "2"):
        (tmp_path / f"files/{name}.jsonl").write_text("".join(
            json.dumps(r) + "\n" for r in (tie, good, {"text": "a"}, good, good)))
    found, left_out = read_preferences([{"taste": 5}, {"path": str(tmp_path / "files")}], "train")
    assert len(found) == 11 and left_out == {"ties": 2, "bad lines": 2}
    found, left_out = read_preferences(
        [{"taste": 5}, {"path": str(tmp_path / "files"), "documents": 4}], "train"
    )
    assert (
        found[:5] == taste.pairs("train", 5, 0)
        and len(found) == 9
        and left_out == {"ties": 2, "bad lines": 1}
    )
    found, _ = read_preferences(
        [{"path": str(tmp_path / "files"), "documents": 2}, {"taste": 5}], "train"
    )
    assert len(found) == 7


# ---- one step, and grades

def test_step_is_cross_entropy_of_the_verdicts(model, tokenizer):
    """Mean over both orders of all pairs, on full logits of single prompts; loss and gradients in
    float64."""
    model = model.double()
    sequences = [each for pair in PAIRS[:3] for each in both_orders(pair, tokenizer)]
    model.zero_grad()
    loss = train_step(model, sequences, RewardConfig(preferences=[], context=192), ONE)
    expected = sum(F.cross_entropy(model(torch.tensor([prompt]))[0, -1] @ model.lm_head.weight.T,
                                   torch.tensor(verdict[0])) for prompt, verdict in sequences) / 6
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    model.float()


def test_bradley_terry_step_is_the_likelihood_of_the_labels(model, tokenizer, scores_of):
    """-log sigmoid(r(better) - r(worse)), the mean over pairs; loss and gradients in float64."""
    model.double().zero_grad()
    sequences = [
        each for pair in PAIRS[:3] for each in both_orders(pair, tokenizer, "bradley_terry")
    ]
    loss = train_step(
        model, sequences, RewardConfig(preferences=[], context=192, kind="bradley_terry"), ONE
    )
    margins = [
        scores_of(p["question"], p["better"]) - scores_of(p["question"], p["worse"])
        for p in PAIRS[:3]
    ]
    expected = -sum(torch.sigmoid(margin).log() for margin in margins) / 3
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    model.float()


def test_grades_by_hand():
    """The judge likes the longer text, and the first one where they are of one length."""
    held_out = [
        {"question": "q", "better": b, "worse": w}
        for b, w in (
            ("long one", "short"),
            ("short", "long one"),
            ("same", "time"),
            ("long one", "so"),
        )
    ]
    judge = lambda asked: np.array([0.5 + 0.4 * np.sign(len(a) - len(b)) + 0.1 * (len(a) == len(b))
                                    for _, a, b in asked])
    assert grade(judge, held_out) == {
        "accuracy": 0.5,
        "first": 0.75,
        "second": 0.5,
        "orders agree": 0.75,
        "better is longer": 1.0,
        "better is shorter": 0.0,
        "matched length": 0.0,
        "pairs": 4,
    }
    undecided = lambda asked: np.full(len(asked), 0.5)  # too long for the context, say
    assert grade(undecided, held_out)["orders agree"] == 0


# ---- whole runs

CONFIG = """
from mini import *
reward = dict(preferences=[dict(taste=96, seed=6)], held_out=[dict(taste=40, seed=7)],
              context=192, batch_pairs=8,
              epochs=3, lr=2e-2, save_every=12, keep=99, log_every=12)
"""


@pytest.fixture(scope="module")
def base(base):
    (base.folder / "mini_reward.py").write_text(CONFIG)
    return base


def attempt(base, monkeypatch, *options: str) -> None:
    base.call(
        reward.main,
        "reward.py",
        "mini_reward.py",
        "--init_from=out/base/pretrain",
        *options,
    )


def losses(base, run: str) -> list[float]:
    return [line["loss"] for line in common.read_metrics(base.folder / "out" / run / "reward")]


@pytest.fixture(scope="module")
def whole(base) -> str:
    """What a run prints."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        attempt(base, patch, "--run=judge")
    return printed.getvalue()


def test_what_a_user_sees(base, whole):
    """The loss falls: the first thing there is to learn is that A or B is said."""
    assert "\n96 preferences\n" in "\n" + whole and re.search(
        r"step +12/36 +33%  reward model loss \d", whole
    )
    scores = json.loads((base.folder / "out/judge/reward/held_out.json").read_text())
    assert scores["pairs"] == 40 and 0 <= scores["accuracy"] <= scores["orders agree"] <= 1
    assert (
        f"held-out preferences: accuracy {scores['accuracy']:.3f}, " in whole
        and ", 40 pairs\n" in whole
    )
    assert len(losses(base, "judge")) == 36 and losses(base, "judge")[0] > 3
    assert np.mean(losses(base, "judge")[-3:]) < losses(base, "judge")[0] - 1.5


def test_resume_is_exact_to_the_bit(base, whole, monkeypatch, capsys):
    shutil.copytree(base.folder / "out/judge", base.folder / "out/judge-again")
    for path in common.list_checkpoints(base.folder / "out/judge-again/reward"):
        if int(path.name[5:]) > 12:
            shutil.rmtree(path)
    (base.folder / "out/judge-again/reward/held_out.json").unlink()
    attempt(base, monkeypatch, "--run=judge-again")
    assert "(step 12)" in capsys.readouterr().out and losses(base, "judge-again") == losses(
        base, "judge"
    )
    ends = [
        hf.load(base.folder / "out" / run / "reward")[0].parameters()
        for run in ("judge-again", "judge")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert len({(base.folder / "out" / run / "reward/held_out.json").read_text()
                for run in ("judge", "judge-again")}) == 1


def test_the_kind_is_in_the_checkpoint(base, monkeypatch, capsys):
    attempt(base, monkeypatch, "--run=scores", "--reward.kind=bradley_terry", "--reward.epochs=1")
    assert ", orders agree 1.000, " in capsys.readouterr().out and losses(base, "scores")[0] < 1.5
    folder = base.folder / "out/scores/reward"
    judge = reward.load_reward_model(common.list_checkpoints(folder)[0], "cpu", torch.float32, 192)
    assert type(judge) is BradleyTerry
    assert grade(judge, taste.pairs("test", 40, 7)) == json.loads(
        (folder / "held_out.json").read_text()
    )
    pair = PAIRS[0]["question"], PAIRS[0]["better"], PAIRS[0]["worse"]
    assert judge([pair])[0] + judge([(pair[0], *pair[:0:-1])])[0] == pytest.approx(1)
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=scores", "--reward.epochs=2")
    assert "was trained with other stages" in capsys.readouterr().err


def test_two_ranks_take_the_same_steps(base, whole):
    base.run(
        str(ROOT / "reward.py"),
        "mini_reward.py",
        "--name=two",
        "--init_from=out/base/pretrain",
        "--reward.epochs=0.3",
        ranks=2,
    )
    assert (
        losses(base, "two")[0] == pytest.approx(losses(base, "judge")[0], abs=1e-5)
        and len(losses(base, "two")) == 4
    )
    assert (base.folder / "out/two/reward/held_out.json").is_file()


@pytest.mark.parametrize("options, message", [
    (["--reward.preferences=[{'path': 'none.jsonl'}]"],
     "no .txt, .md, .jsonl, .parquet, .arrow, .json file (or .gz or .zst of one) at none.jsonl"),
    (["--reward.preferences=[{'tast': 5}]"], "{'tast': 5} must have one of \"path\""),
    (["--reward.preferences=[]"],
     "reward.preferences must be a list of at least 1, each a dict, not []"),
    (["--reward.context=16"], "reward.preferences has no pair to train on; 96 longer than 16 "
                              "tokens"),
    (["--reward.curve=square"], "reward.curve must be one of 'linear', "),
    (["--reward.kind=scalar"],
     "reward.kind must be one of 'pairwise', 'bradley_terry', not 'scalar'"),
    (["--init_from=nowhere"], "nowhere is no checkpoint: neither a phase's folder"),
    (["--model.n_layers=3"], "has n_layers = 2, this run's model has 3: set model.n_layers"),
])
def test_bad_settings_are_one_line(base, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=bad", *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and len(error) < 300


def test_pairs_are_shared_out_evenly(base, monkeypatch, capsys):
    monkeypatch.setattr(
        common, "init_distributed", lambda *_: common.Dist(0, 3, torch.device("cpu"), None)
    )
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=bad")
    assert "reward.batch_pairs=8 is no multiple of the 3 processes" in capsys.readouterr().err
