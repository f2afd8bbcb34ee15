"""pass@k and maj@k equal enumeration, the standard error simulation; a perfect model scores 1.

Nothing is lost. A real OpenAI-compatible server (`transformers serve`) on an exported checkpoint
answers as our sampler does, and refinement runs against it.
"""

import json
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations, product

import jinja2
import numpy as np
import pytest
import torch

import evaluate
import hf
import rollouts
import sampler
from checks.evaluate import serving
from common import Dist, UserError
from conftest import ROOT, Mini
from data import llm
from data.llm import LLMConfig, cached, http_llm
from data.refine import checklist
from data.refine.refinement import Settings, refine
from data.sets import bfcl
from data.tasks import pages, registry
from data.tasks.problem import document_prompt, to_document
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from evaluate import EvaluateConfig, majority, pass_at_k, summarize
from generate import LocalLLM, Sample
from model import ModelConfig, Transformer, init_weights
from rl import RlConfig
from sampler import Embedded, in_order


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in (1, 3, 6):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([1] * correct + [0] * (n - correct), k))
                assert pass_at_k(n, correct, k) == pytest.approx(np.mean([max(s) for s in subsets]))


def test_majority_is_what_a_vote_in_random_order_gives():
    """Over all orders of the samples, the first of the most frequent answers wins: the mean of its
    reward.
    """
    reward = {"a": 1.0, "b": 0.0, "c": 0.0, None: 0.0}
    for answers in product(reward, repeat=4):
        won = []
        for order in permutations(answers):
            votes = Counter(answer for answer in order if answer is not None)
            won.append(reward[votes.most_common(1)[0][0]] if votes else 0.0)
        assert majority([(a, reward[a]) for a in answers], str.__eq__) == pytest.approx(
            np.mean(won)
        ), answers


def test_majority_knows_other_spellings():
    half, math = registry.family("math500").same, registry.family("math").same
    assert majority([("3", 0.0), ("1/2", 1.0), ("\\frac{1}{2}", 1.0)], half) == 1.0
    assert majority([("8 apples.", 0.0), ("Mia has 9.", 1.0), ("9", 1.0)], math) == 1.0
    assert (
        getattr(registry.family("code"), "same", None) is registry.family("humaneval").same is None
    )


def rows_of(rewards):
    return [
        dict(problem=p, level=1, reward=float(x), finish_reason="stop", tokens=3, offered=str(x))
        for p, r in enumerate(rewards)
        for x in r
    ]


def test_standard_error_equals_simulation():
    """Over fresh sets of 60 problems of random difficulty, the spread of avg@4 is what one set's
    stderr says.
    """
    rng = np.random.default_rng(0)
    results = [summarize(rows_of(rng.random((60, 4)) < rng.random((60, 1))), 4) for _ in range(400)]
    assert np.std([r["avg"] for r in results]) == pytest.approx(
        np.mean([r["stderr"] for r in results]), rel=0.1
    )


def test_summary_by_hand():
    rows = rows_of([[1, 0, 0], [0, 0, 0], [1, 1, 0]])
    rows[0] |= dict(finish_reason="length", tokens=9)
    rows[3] |= dict(offered=None, tokens=0)
    score = summarize(rows, 3, str.__eq__)
    assert score["avg"] == pytest.approx(1 / 3) and score["maj"] == pytest.approx(1 / 3)  # 0, 0, 1
    assert (
        score["pass_at"] == pytest.approx({1: 1 / 3, 2: 5 / 9, 3: 2 / 3})
        and score["pass"] == score["pass_at"][3]
    )
    assert (score["truncated"], score["no_answer"]) == (1 / 9, 1 / 9) and score["tokens_used"] == 30
    assert summarize(rows, 3)["maj"] is None and "0.33 0.56 0.67" in evaluate.format_table(
        {"x": score}
    )


def test_unscored_answers_are_not_wrong_answers():
    rows = rows_of([[1, 1], [0, 1]])
    rows[2]["reward"] = None
    score = summarize(rows, 2)
    assert (
        score["avg"] == 1.0
        and score["unscored"] == 1
        and "1 answers could not" in evaluate.format_table({"x": score})
    )
    assert np.isnan(summarize([rows[2]], 1)["avg"])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Problem: 1"], TokenizerConfig(kind="char"))


def test_scores_of_gold_and_of_nothing(monkeypatch, tokenizer):
    """The sampler replaced by one that copies the gold work, and by one that says nothing."""
    cfg = EvaluateConfig(tasks=["math", "tools"], n_problems=20, k=2)
    problems = {name: pages.FAMILIES[name].problems("dev", 20, 0) for name in cfg.tasks}
    texts = {
        tuple([tokenizer.bos, *tokenizer.encode(document_prompt(p))]): to_document(p).removeprefix(
            document_prompt(p)
        )
        for group in problems.values()
        for p in group
    }

    def gold(model, requests, n, *args, **kwargs):
        for number, prompt in requests:
            answer = tokenizer.encode(texts[tuple(prompt)]) + [tokenizer.eot]
            yield number, [Sample(answer, [], "stop")] * n

    monkeypatch.setattr(evaluate.generate, "sample_as_completed", gold)
    scores = evaluate.evaluate(Embedded(), tokenizer, cfg)
    assert all(
        s["avg"] == s["pass"] == 1.0 and s["truncated"] == 0 and s["n"] == 20
        for s in scores.values()
    )
    assert scores["math"]["rows"][0]["response"] and set(scores["math"]["levels"]) == {1, 2, 3}
    assert (
        scores["math"]["maj"] == 1.0
        and scores["tools"]["maj"] is None
        and "math" in evaluate.format_table(scores)
    )
    monkeypatch.setattr(
        evaluate.generate,
        "sample_as_completed",
        lambda m, requests, n, *a, **k: [(i, [Sample([], [], "length")] * n) for i, _ in requests],
    )
    scores = evaluate.evaluate(Embedded(), tokenizer, cfg)
    assert all(s["avg"] == 0.0 and s["truncated"] == s["no_answer"] == 1 for s in scores.values())
    with pytest.raises(UserError, match="no task 'meth'"):
        evaluate.evaluate(Embedded(), tokenizer, EvaluateConfig(tasks=["meth"]))


def test_a_verifier_scores_what_rules_leave_open(monkeypatch, tokenizer, tmp_path):
    """Held out problems whose gold is a phrase; its model and words are part of a file's name."""
    problems = registry.family("phrases").problems("dev", 2, 0)
    value = problems[0].extra["value"]
    answers = {(0, 0): (f"Answer: {value}", "stop", 3), (0, 1): ("Answer: -1", "stop", 3),
               (1, 0): ("", "stop", 1), (1, 1): (f"Answer: {problems[1].answer}", "stop", 5)}

    def llm(conversations):
        texts = [messages[0]["content"] for messages in conversations]
        return [f"Verdict: {'equivalent' if value in text else 'different'}" for text in texts]

    monkeypatch.setattr(evaluate.generate, "open_llm", lambda spec, where, *_: (llm, spec))
    spec = dict(model=dict(checkpoint="verifier/sft"), prompts=dict(system="", case="{answer}"))
    one = Dist(0, 1, torch.device("cpu"), None)
    assert evaluate.open_verifier(spec, ["math", "code"], tmp_path, one) is None
    assert evaluate.open_verifier({}, ["phrases"], tmp_path, one) is None
    verifier = evaluate.open_verifier(spec, ["math", "phrases"], tmp_path, one)
    prompts = [evaluate.task_prompt(problem, tokenizer, "chat") for problem in problems]
    rows = evaluate.score_batch("phrases", problems, prompts, answers, tokenizer, verifier)
    assert [row["reward"] for row in rows.values()] == [1, 0, 0, 1]
    assert [row["by_verifier"] for row in rows.values()] == [True, True, False, False]
    assert len(list((tmp_path / "verdicts").iterdir())) == 1
    by_rules = evaluate.score_batch("phrases", problems, prompts, answers, tokenizer)
    assert [row["reward"] for row in by_rules.values()] == [0, 0, 0, 1]
    other_model = spec | {"model": {"checkpoint": "another run's, under the same name"}}
    (tmp_path / "p.jsonl").write_text("")
    without_a_judge = f"humaneval={tmp_path / 'p.jsonl'}"
    names = {"phrases": set(), "math": set(), without_a_judge: set()}
    for verifier_spec in ({}, spec, spec | {"turns": 2}, spec | {"seconds": 1.0}, other_model):
        judge = evaluate.open_verifier(verifier_spec, ["phrases"], tmp_path, one)
        for task, found in names.items():
            found.add(evaluate.sample_file_name(
                task, problems, prompts, EvaluateConfig(), "", judge))
    assert [len(found) for found in names.values()] == [5, 1, 1]  # no verifier sees the others
    for wrong, message in (
        ({"modle": {}}, "unknown key 'modle'"),
        ({"turns": 2}, "model is missing"),
        ({"model": {}, "turns": 0}, "turns must be a whole number from 1 to 100, not 0"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.open_verifier(wrong, ["phrases"], tmp_path, one)


def test_the_prompt_holds_the_tools():
    function = dict(
        name="add", description="", parameters=dict(type="dict", properties={}, required=[])
    )
    problem = bfcl.read(
        dict(id="irrelevance_0", function=[function], question=[[dict(role="user", content="Hi")]]),
        [],
    )
    tokenizer = train_tokenizer(["Problem: 1"], TokenizerConfig(vocab_size=300))
    ours = tokenizer.decode(evaluate.task_prompt(problem, tokenizer, "chat"))
    system, user = evaluate.task_prompt(problem, None, "chat")
    assert '"name": "add"' in system["content"] and user == dict(role="user", content="Hi")
    assert ours.startswith(
        f"<|im_start|>system\n{system['content']}<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
    )


# ---- thoughts that the chat template opens in the prompt

# of Qwen3-4B-Thinking-2507, without its tools
THINKING = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}"""
ANSWERS = {  # of a model with that template, whose gold is 5
    "We get \\boxed{5} so far, but": 0.0,
    "We get 4, no.\n</think>\n\n\\boxed{5}": 1.0,
    "We get 5.\n</think>\n\n\\boxed{4}": 0.0,
    "<think>\nWe get 5.\n</think>\n\n\\boxed{5}": 1.0,
}


@pytest.fixture
def five(tmp_path) -> str:
    """A task whose answers are all 5."""
    rows = [{"question": f"{i} + {5 - i}?", "answer": "#### 5"} for i in range(len(ANSWERS))]
    path = tmp_path / "five.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"gsm8k={path}"


def thinking_prompt(problem, tokenizer, prompt_format, system="") -> list[int]:
    message = {"role": "user", "content": problem.question}
    text = jinja2.Template(THINKING).render(messages=[message], add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n<think>\n")
    ids = []
    for part in re.split("(<[^<> ]+>)", text):
        control = tokenizer.special.get(part)
        ids += tokenizer.encode(part) if control is None else [control]
    return ids


def test_thoughts_that_the_prompt_opened_are_no_answer(monkeypatch, five):
    """In evaluation and in rollouts, by tokens."""
    tokenizer = train_tokenizer(["Problem: 1"], TokenizerConfig(vocab_size=300))

    def thinker(model, requests, n, *args, **kwargs):
        for (number, _), text in zip(requests, ANSWERS, strict=True):
            yield number, [Sample(tokenizer.encode(text), [], "length")]

    for module in (evaluate, rollouts):
        monkeypatch.setattr(module, "task_prompt", thinking_prompt)
    monkeypatch.setattr(evaluate.generate, "sample_as_completed", thinker)
    cfg = EvaluateConfig(tasks=[five], k=1, prompt_format="chat")
    score = evaluate.evaluate(Embedded(), tokenizer, cfg)[five]
    rewards = {row["response"].removeprefix("<think>\n"): row["reward"] for row in score["rows"]}
    assert rewards == {text.removeprefix("<think>\n"): ANSWERS[text] for text in ANSWERS}

    problems = registry.family(five).problems("train", len(ANSWERS), 0)
    cfg = RlConfig(stages=[], lr=0.0)
    groups = in_order(rollouts.sample_rollouts(Embedded(), tokenizer, problems, 1, cfg, 0))
    scores = rollouts.verified_scores(rollouts.flatten(groups), rollouts.Judges(), cfg)
    assert [score.reward for score in scores] == list(ANSWERS.values())


def test_thoughts_that_a_server_opened_are_no_answer(five):
    """Its prompts are not seen; that it opens them shows in the answers that end."""
    cfg = EvaluateConfig(tasks=[five], k=1, prompt_format="chat", max_rows=2)

    def server(texts):
        return lambda asked: [
            (text, "length", 9) if messages else None for text, messages in zip(texts, asked)]

    def rewards(texts):
        rows = evaluate.evaluate(server(texts), None, cfg)[five]["rows"]
        return [row["reward"] for row in rows], [row["offered"] for row in rows]

    assert rewards(ANSWERS) == (list(ANSWERS.values()), [None, "5", "4", "5"])
    plain = ["\\boxed{5} so far", "<think>\nx", "<think>\nx\n</think>\n\\boxed{5}", "</think"]
    assert rewards(plain)[0] == [1.0, 0.0, 1.0, 0.0]


# ---- what is kept


@pytest.fixture(scope="module")
def model(tokenizer):
    model = Transformer(ModelConfig(1, 16, 24, 2, 1, 8, vocab_size=tokenizer.n_vocab, init_std=0.3))
    init_weights(model, 0)
    return model


CFG = EvaluateConfig(
    tasks=["math", "code"],
    n_problems=9,
    k=2,
    max_new_tokens=6,
    max_rows=4,
    prompt_format="document",
)


def lines(folder) -> list[str]:
    return sorted(line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines())


def test_a_killed_run_goes_on(model, tokenizer, tmp_path, monkeypatch):
    """Cut off after any batch, or in the midst of a line: the same rows, and what was done is not
    done again.
    """
    monkeypatch.setattr(sampler, "PIECE_FILLS", 1)
    whole = evaluate.evaluate(Embedded(model), tokenizer, CFG)
    sample, asked = evaluate.generate.sample_as_completed, []

    def until(most):
        def some(*args, **kwargs):
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append(1)
            return sample(*args, **kwargs)

        return some

    for most in (0, 1, 4, 7):
        folder = tmp_path / str(most)
        monkeypatch.setattr(evaluate.generate, "sample_as_completed", until(most))
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(Embedded(model), tokenizer, CFG, None, folder, "me")
        for path in folder.glob("*.jsonl"):
            path.write_bytes(path.read_bytes()[:-20])
        torn = sum(1 for _ in folder.glob("*.jsonl"))
        monkeypatch.setattr(evaluate.generate, "sample_as_completed", until(-1))
        del asked[:]
        assert evaluate.evaluate(Embedded(model), tokenizer, CFG, None, folder, "me") == whole
        assert len(asked) == 10 - most + torn  # 5 batches a task
        del asked[:]
        assert evaluate.evaluate(Embedded(model), tokenizer, CFG, None, folder, "me") == whole
        assert not asked


def test_other_settings_and_other_models_never_mix(model, tokenizer, tmp_path):
    ways = [
        (CFG, "me"),
        (CFG, "you"),
        (replace(CFG, temperature=0.0), "me"),
        (replace(CFG, seed=1), "me"),
        (replace(CFG, k=1), "me"),
        (replace(CFG, max_new_tokens=5), "me"),
        (replace(CFG, n_problems=8), "me"),
        (replace(CFG, top_p=0.9), "me"),
        (replace(CFG, split="test"), "me"),
    ]
    for n, (cfg, made_by) in enumerate(ways, 1):
        assert evaluate.evaluate(
            Embedded(model), tokenizer, cfg, None, tmp_path, made_by
        ) == evaluate.evaluate(Embedded(model), tokenizer, cfg)
        assert len(list(tmp_path.iterdir())) == 2 * n


def test_batches_draw_what_one_call_draws(model, tokenizer):
    """Also all in one batch: what the sampler gives for all prompts at once, in order."""
    problems = pages.FAMILIES["math"].problems("dev", 9, 0)
    prompts = [evaluate.task_prompt(problem, tokenizer, "document") for problem in problems]
    stop = tokenizer.stop_ids
    whole = evaluate.generate.sample(model, prompts, 2, 6, 0.6, 0.95, stop=stop)
    texts = [
        tokenizer.decode([t for t in one.tokens if t not in stop])
        for group in whole
        for one in group
    ]
    for cfg in (CFG, replace(CFG, max_rows=256)):
        rows = evaluate.evaluate(Embedded(model), tokenizer, cfg)["math"]["rows"]
        assert [row["response"] for row in rows] == texts


def test_any_number_of_ranks_gives_the_same_rows(model, tokenizer, tmp_path):
    """Two ranks, one after the other (each leaves the other's batches alone), then one process that
    finds all done.
    """
    whole = evaluate.evaluate(Embedded(model), tokenizer, CFG, None, tmp_path / "one", "me")

    class Rank(Dist):
        def gather(self, mine):
            return mine

        def wait(self):
            pass

        def from_main(self, make):
            return make()

        def hand_out(self, pieces, desc):
            return iter(pieces[self.rank :: 2])

    parts = [
        [
            r
            for s in evaluate.evaluate(
                Embedded(model),
                tokenizer,
                CFG,
                Rank(rank, 2, torch.device("cpu"), None),
                tmp_path / f"r{rank}",
                "me",
            ).values()
            for r in s["rows"]
        ]
        for rank in (0, 1)
    ]
    assert min(map(len, parts)) >= 16 and sum(map(len, parts)) == 36
    assert sorted(lines(tmp_path / "r0") + lines(tmp_path / "r1")) == lines(tmp_path / "one")
    for path in (tmp_path / "r0").iterdir():
        shutil.copy(path, tmp_path / "r1")
    assert evaluate.evaluate(Embedded(), tokenizer, CFG, None, tmp_path / "r1", "me") == whole


def test_a_file_of_something_else_is_left_alone(model, tokenizer, tmp_path):
    evaluate.evaluate(Embedded(model), tokenizer, CFG, None, tmp_path, "me")
    path = next(tmp_path.glob("code*"))
    path.write_text("mine\n" + path.read_text())
    with pytest.raises(UserError, match=r"code-.*\.0\.jsonl is damaged, or no file of samples"):
        evaluate.evaluate(Embedded(model), tokenizer, CFG, None, tmp_path, "me")


def test_a_server_that_gives_no_answer_is_asked_again(tmp_path):
    """Places stay the same, so seeds do; what got no answer is unscored and not kept."""
    cfg, seen = replace(CFG, tasks=["math"], prompt_format="chat"), []

    def writer(asked):
        seen.append([i for i, messages in enumerate(asked) if messages])
        return [
            messages and (f"Answer: {i}", "stop", 3) if i != 5 else None
            for i, messages in enumerate(asked)
        ]

    score = evaluate.evaluate(writer, None, cfg, None, tmp_path, "it")["math"]
    assert (
        score["unscored"] == 1
        and score["rows"][5]["response"] is None
        and score["rows"][17]["response"] == "Answer: 17"
    )
    assert (
        sorted(i for batch in seen for i in batch) == list(range(18)) and len(lines(tmp_path)) == 17
    )
    del seen[:]
    evaluate.evaluate(writer, None, cfg, None, tmp_path, "it")
    assert seen == [[4, 5, 6, 7]]


# ---- the command


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """With a config and an exported checkpoint."""
    mini = Mini(tmp_path_factory.mktemp("evaluate"))
    tokenizer = train_tokenizer(["Problem: 1"], TokenizerConfig(vocab_size=300))
    larger = Transformer(
        ModelConfig(1, 16, 24, 2, 1, 8, vocab_size=tokenizer.n_vocab, init_std=0.3)
    )
    init_weights(larger, 0)
    hf.export(larger, tokenizer, mini.folder / "exported", torch.float32)
    return mini


COMMAND = (
    "mini.py",
    "--evaluate.checkpoint=exported",
    "--evaluate.n_problems=24",
    "--evaluate.tasks=['math', 'form']",
    "--evaluate.max_rows=8",
    "--evaluate.max_new_tokens=60",
)


def test_only_others_are_asked_behind_a_system_turn(folder, monkeypatch):
    """A folder with another chat template than ours was not trained here."""
    other = folder.folder / "other"
    shutil.copytree(folder.folder / "exported", other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ '' }}" + settings["chat_template"]
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, begin in (("exported", "<|im_start|>user"), ("other", "<|im_start|>system\nBe")):
        folder.call(
            evaluate.main, "evaluate.py", "mini.py", f"--run={name}",
            f"--evaluate.checkpoint={name}", "--evaluate.system=Be kind.", "--evaluate.k=1",
            "--evaluate.n_problems=2", "--evaluate.max_new_tokens=3",
        )  # fmt: skip
        rows = (folder.folder / "out" / name / "evaluate.jsonl").read_text().splitlines()
        assert len(rows) == 2 and all(json.loads(row)["prompt"].startswith(begin) for row in rows)


def test_two_processes_and_a_kill_end_with_the_same_file(folder, monkeypatch, capsys):
    folder.call(evaluate.main, "evaluate.py", *COMMAND, "--run=one")
    assert "math" in capsys.readouterr().out
    whole = (folder.folder / "out/one/evaluate.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert (
        len(rows) == 96
        and rows[0]["task"] == "math"
        and rows[0].keys() >= {"problem", "sample", "prompt", "reward"}
    )
    summary = json.loads((folder.folder / "out/one/evaluate.json").read_text())
    assert summary["scores"]["form"]["n"] == 24 and summary["settings"]["prompt_format"] == "chat"
    command = (str(ROOT / "evaluate.py"), *COMMAND, "--name=two")
    process, parts = folder.popen(*command, ranks=2), folder.folder / "out/two/evaluate"
    while process.poll() is None and not list(parts.glob("*.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    folder.run(*command, ranks=2)
    assert (folder.folder / "out/two/evaluate.jsonl").read_bytes() == whole
    assert {path.name[-8:] for path in parts.iterdir()} == {".0.jsonl", ".1.jsonl", "lock"}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--evaluate.tasks=['meth']"],
            "no task 'meth'; there are math, code, .* gsm8k, .*gpqa, .*livecodebench",
        ),
        (
            ["--evaluate.tasks=['gsm8k=gone.jsonl']"],
            "no .jsonl, .json or .parquet file at gone.jsonl",
        ),
        (
            ["--evaluate.tasks=['math500=wrong.jsonl']"],
            "wrong.jsonl:1: no column 'problem' for math500; found question, gold",
        ),
        (["--evaluate.tasks=[]"], "no tasks: set evaluate.tasks to some of math, code"),
        (
            ["--evaluate.checkpoint=bare"],
            "no tokenizer bare/tokenizer.json .*give a Hugging Face tokenizer.json",
        ),
        (["--evaluate.checkpoint=gone"], "gone is no checkpoint"),
        (["--evaluate.split=valid"], "evaluate.split must be one of .*, not 'valid'"),
        (["--evaluate.k=0"], "evaluate.k must be a whole number from 1"),
        (["--evaluate.endpoint=http://localhost:1/v1"], "are both set"),
        (
            ["--evaluate.endpoint=localhost", "--evaluate.checkpoint="],
            "evaluate.endpoint: url must be like http",
        ),
        (
            ["--evaluate.endpoint=http://localhost:1/v1", "--evaluate.checkpoint="],
            "does the server run there",
        ),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, capsys, options, message):
    if not (folder.folder / "bare").exists():
        shutil.copytree(folder.folder / "exported", folder.folder / "bare")
        (folder.folder / "bare/tokenizer.json").unlink()
    (folder.folder / "wrong.jsonl").write_text('{"question": "Why?", "gold": "1"}\n')
    monkeypatch.setattr(llm, "BACKOFF", 0.01)
    with pytest.raises(SystemExit) as left:
        folder.call(evaluate.main, "evaluate.py", *COMMAND, "--run=bad", *options)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1
    assert re.search(message, said), said


# ---- a real OpenAI-compatible server: `transformers serve` on an exported checkpoint of ours

QUESTIONS = [
    [
        {
            "role": "user",
            "content": f"Mia has {n} pens. She buys 2 more. How many pens does Mia have now?",
        }
    ]
    for n in range(3, 7)
]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A random tiny model, which ends its answers early."""
    tokenizer = train_tokenizer([QUESTIONS[0][0]["content"] * 20], TokenizerConfig(vocab_size=300))
    model = Transformer(ModelConfig(2, 32, 48, 2, 1, 16, vocab_size=320, init_std=0.1))
    init_weights(model, 0)
    model.lm_head.weight.data[tokenizer.im_end] *= 4
    folder = tmp_path_factory.mktemp("serve") / "export"
    hf.export(model, tokenizer, folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def server(export):
    """(process, settings of an LLM); skips where transformers cannot serve."""
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    with serving(export) as (process, url):
        yield process, dict(url=url, model=str(export), concurrency=2, retries=1, max_tokens=24)


def test_the_server_writes_what_our_sampler_does(server, export):
    """Greedily: the same export by transformers, behind HTTP and our chat template, and by us."""
    greedy = http_llm(LLMConfig(**server[1], temperature=0.0, top_p=1.0))
    ours = LocalLLM(str(export), max_new_tokens=24, temperature=0)(QUESTIONS)
    theirs = greedy(QUESTIONS)
    assert theirs == ours and any(theirs)


@pytest.mark.parametrize("prompt_format", ["chat", "document"])
def test_the_same_evaluation_by_a_server_and_here(server, export, prompt_format):
    """Greedily: answers (but for control tokens, which servers leave out), tokens, rewards, and why
    each ended.
    """
    cfg = evaluate.EvaluateConfig(
        ["math", "form"],
        endpoint=server[1]["url"],
        model=str(export),
        prompt_format=prompt_format,
        k=1,
        n_problems=8,
        temperature=0.0,
        top_p=1.0,
        max_new_tokens=24,
        max_rows=2,
    )

    def results(sampler, tokenizer):
        return [
            (
                re.sub(r"<\|\w+\|>", "", row["response"]),
                row["tokens"],
                row["reward"],
                row["finish_reason"],
            )
            for score in evaluate.evaluate(sampler, tokenizer, cfg).values()
            for row in score["rows"]
        ]

    model, tokenizer = hf.load(export)
    ours = results(Embedded(model), tokenizer)
    assert results(evaluate.server_llm(cfg), None) == ours and {row[-1] for row in ours} == {
        "stop",
        "length",
    }


def test_refinement_runs_against_it(server, tmp_path, monkeypatch):
    """Of a random model every verdict is unparsable: counted, asked again, never trusted. A second
    time nobody is asked.
    """
    monkeypatch.setattr(llm, "BACKOFF", 0.05)
    asked, http = Counter(), http_llm(LLMConfig(**server[1], temperature=1.0, top_p=1.0))

    def counting(conversations, *on_result):
        asked["requests"] += sum(c is not None for c in conversations)
        return http(conversations, *on_result)

    team = {"tiny": cached(counting, tmp_path / "tiny.jsonl", failures=True)}
    settings = Settings(
        drafters=["tiny"],
        n_drafts=2,
        checklist="tiny",
        evaluators=["tiny"],
        revisers=["tiny"],
        rounds=1,
    )
    cases = refine(QUESTIONS, team, settings, checklist.runnable_items)
    assert (
        cases
        and sum(case.unparsable for case in cases)
        and all(case.attempts[0]["score"] < 1 for case in cases)
    )
    before = asked["requests"]
    assert (
        refine(QUESTIONS, team, settings, checklist.runnable_items) == cases
        and asked["requests"] == before
    )


def test_a_server_that_is_gone(server):
    server[0].kill()
    server[0].wait()
    with pytest.raises(UserError, match="does the server run there"):
        http_llm(LLMConfig(**server[1] | {"retries": 0}))(QUESTIONS)
