"""refine.py: local models, instructions, what is kept, the audit by hand, and the whole script on a
miniature run."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import generate
import hf
import refine
from conftest import ROOT
from data.refine.refinement import Case
from data.tasks import registry
from data.tasks.problem import Problem, as_reply, document_prompt, to_chat, to_document
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from model import ModelConfig, Transformer, init_weights

QUESTIONS = [
    f"Mia has {n} pens. She buys {n + 1} more. How many pens does Mia have now?"
    for n in range(3, 9)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random tiny model that writes anything; exported, as a Hugging Face folder."""
    tokenizer = train_tokenizer([" ".join(QUESTIONS) * 9], TokenizerConfig(vocab_size=300))
    model = Transformer(ModelConfig(2, 32, 48, 2, 1, 16, vocab_size=320, init_std=0.1))
    init_weights(model, 0)
    model.lm_head.weight.data[tokenizer.im_end] *= 4  # so that it often ends
    folder = tmp_path_factory.mktemp("writer") / "export"
    hf.export(model, tokenizer, folder, torch.float32)
    return folder


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_a_local_model_is_the_sampler(checkpoint):
    """Greedy: the very tokens of generate.sample; what does not end is no answer."""
    model, tokenizer = hf.load(checkpoint)
    llm = generate.LocalLLM(str(checkpoint), max_new_tokens=12, temperature=0)
    prompts = [generate.chat_prompt(ask(q), tokenizer, "chat") for q in QUESTIONS]
    stop = (tokenizer.eot, tokenizer.im_end)
    samples = [
        s[0] for s in generate.sample(model, prompts, max_new_tokens=12, temperature=0, stop=stop)
    ]
    expected = [
        tokenizer.decode(s.tokens[:-1]) if s.finish_reason == "stop" else None for s in samples
    ]
    assert llm([ask(q) for q in QUESTIONS]) == expected and len(set(expected)) > 1


def test_a_local_model_goes_on_as_if_unbroken(checkpoint):
    """Draws belong to a conversation's number: what is known already (None) changes no other's, and
    each is told."""
    llm = generate.LocalLLM(
        str(checkpoint), max_new_tokens=40, temperature=1.0, top_p=1.0, max_rows=2
    )
    conversations, told = [ask(q) for q in QUESTIONS], {}
    whole = llm(conversations)
    assert any(whole) and len(set(whole)) > 1
    later = llm([None] * 4 + conversations[4:], lambda i, text: told.update({i: text}))
    assert later == [None] * 4 + whole[4:] and told == {4: whole[4], 5: whole[5]}


def test_a_page_becomes_a_reply():
    problem = registry.family("math").problems("train", 3, 1)[2]
    rest = to_document(problem).removeprefix(document_prompt(problem))
    reply = to_chat(problem)[1]
    assert as_reply(rest) == f"<think>\n{reply['reasoning']}\n</think>\n\n{reply['content']}"


def test_instructions(tmp_path):
    """Generated questions, prompts, and conversations up to the last user turn; bad lines are
    passed over."""
    made = refine.load_instructions({"problems": 20, "family": "math", "seed": 1}, 0.5)
    assert len({m["content"] for (m,) in made}) == 10 and all(m["role"] == "user" for (m,) in made)
    lines = [
        {"prompt": "One?"},
        {
            "messages": [
                *ask("Two?"),
                {"role": "assistant", "content": "2"},
                *ask("Three?"),
                {"role": "assistant", "content": "3"},
            ]
        },
        {"text": "none"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{torn")
    found = refine.load_instructions({"path": str(tmp_path)}, 1.0)
    assert [m[-1]["content"] for m in found] == ["One?", "Three?"] and len(found[1]) == 3


def attempt(response: str, score: float, turn: int = 0) -> dict:
    return {"response": response, "writer": "w", "round": turn, "score": score, "failed": []}


def case(problem: Problem, *attempts: dict, best: int) -> Case:
    return Case(0, to_chat(problem)[:1], [], list(attempts), best)


def test_the_audit_by_hand():
    """Four problems: right at once, mended, spoiled, wrong throughout."""
    problems = registry.family("math").problems("train", 4, 2)
    right, wrong = (
        [f"Answer: {text(p)}" for p in problems] for text in (lambda p: p.answer, lambda p: "100")
    )
    cases = [
        case(problems[0], attempt(right[0], 1), attempt(wrong[0], 0.5), best=0),
        case(problems[1], attempt(wrong[1], 0.5), attempt(right[1], 1, 1), best=1),
        case(problems[2], attempt(right[2], 0.5), attempt(wrong[2], 1, 1), best=1),
        case(problems[3], attempt(wrong[3], 0.5), attempt(wrong[3], 0.2, 1), best=0),
    ]
    assert refine.audit(cases, problems) == {
        "drafts": (0.5 + 0 + 1 + 0) / 4,
        "best draft": 0.5,
        "refined": 0.5,
        "mended": 0.5,
        "spoiled": 0.5,
    }


@pytest.mark.parametrize(
    "chain, steps, kept",
    [
        ("3 + 4 = 7.", True, True),
        ("3 + 4 = 8.", True, False),
        ("3 + 3 = 7.", True, False),
        ("3 + 3 = 7.", False, True),
    ],
)
def test_what_is_kept(chain, steps, kept):
    assert refine.chain_may_be_kept(QUESTIONS[0], chain, "Answer: 7", steps) == kept


@pytest.mark.parametrize(
    "response, own_chains, kept",
    [
        ("<think>\n3 + 4 = 7.\n</think>\n\nAnswer: 7", True, ("", "3 + 4 = 7.")),
        ("<think>\n3 + 4 = 7.\n</think>\n\nAnswer: 7", False, None),
        ("<think>\n3 + 3 = 6.\n</think>\n\nAnswer: 7", True, None),  # leads elsewhere
        ("Answer: 7", True, None),
    ],
)
def test_without_a_reconstruction_the_own_chain_may_stay(response, own_chains, kept):
    settings = refine.RefineConfig(
        models={}, instructions={}, drafters=["w"], evaluators=[], revisers=[], completer="w",
        own_chains=own_chains,
    )
    done = Case(0, ask(QUESTIONS[0]), [], [attempt(response, 1.0)], 0)
    models = {"w": lambda conversations: ["in no usable form"] * len(conversations)}
    assert refine.reconstruct_with_retries([done], models, settings, Counter(), len) == [kept]


def test_a_record_says_where_it_comes_from():
    settings = refine.RefineConfig(
        models={},
        instructions={},
        drafters=["w"],
        evaluators=[],
        revisers=[],
        completer="c",
        min_score=0.5,
    )
    done = Case(
        7, ask(QUESTIONS[0]), [], [attempt("<think>\nold\n</think>\n\nAnswer: 7", 0.75, 2)], 0
    )
    record = refine.make_record(done, ("sum", "3 + 4 = 7."), settings)
    assert record["messages"][1] == {
        "role": "assistant",
        "content": "Answer: 7",
        "reasoning": "3 + 4 = 7.",
    }
    assert (record["number"], record["rounds"], record["score"], record["summary"]) == (
        7,
        2,
        0.75,
        "sum",
    )
    assert refine.make_record(done, None, settings) is None
    done.attempts[0]["score"] = 0.25
    assert refine.make_record(done, ("sum", "3 + 4 = 7."), settings) is None


CONFIG = """
from mini import *
refine = dict(
    models=dict(base=dict(
        checkpoint="pretrain", prompt_format="document", max_new_tokens=40, temperature=1.0,
        max_rows=16)),
    drafters=["base"], n_drafts=2, checklist="base", evaluators=["base"], revisers=["best"],
    rounds=1, retries=1, completer="best", chain_attempts=1, batch_size=8,
    trial=dict(models=["base"], problems=dict(math=2, code=1), seed=3),
    instructions=dict(math=dict(problems=12, family="math", seed=1),
                      keys=dict(problems=3, family="recall", seed=1, own_answers=True)),
    practice=dict(model="base", seed=2, problems=dict(math=4, code=2), chains=dict(math=6),
                  worked=dict(form=2)))
"""


def test_the_script(base):
    """A model that can nearly nothing, in every role: all comes to an end, is counted, and a second
    time asks nothing."""
    mini = base
    (mini.folder / "mini_refine.py").write_text(CONFIG)
    command = [str(ROOT / "refine.py"), "mini_refine.py", "--run=base"]
    first = mini.run(*command)
    folder = mini.folder / "out/base/refine"
    assert "12 instructions" in first and "drafts" in first and "tokens" in first
    history = [
        json.loads(line) for line in (folder / "history/math.jsonl").read_text().splitlines()
    ]
    assert all(case["attempts"] and case["instruction"][0]["role"] == "user" for case in history)
    numbers = [case["number"] for case in history]
    assert numbers == sorted(set(numbers)) and numbers[-1] >= 8  # those of the second dozen go on
    report = json.loads((folder / "report.json").read_text())
    assert (
        report["sets"]["math"]["instructions"] == 12
        and report["usage"]["base draft requests"] == 24
        and report["trial"]["draft"]["base"] <= 1
    )
    keys = [json.loads(line) for line in (folder / "keys.jsonl").read_text().splitlines()]
    own = refine.generate_problems({"problems": 3, "family": "recall", "seed": 1}, 1.0)
    assert [talk["messages"] for talk in keys] == [
        [*to_chat(problem)[:1], {"role": "assistant", "content": f"Answer: {problem.answer}"}]
        for problem in own
    ]
    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    assert mini.run(*command).splitlines()[-5:] == first.splitlines()[-5:]
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before
    mini.run(*command, "--practice")
    practice = {
        path.stem: len(path.read_text().splitlines())
        for path in (mini.folder / "out/base/practice").rglob("*.jsonl")
    }
    assert (
        practice["draft"] == practice["chain"] == 6
        and practice["verdict"] >= 6
        and practice["revision"] >= 6
    )
    assert practice["form"] == 2
    strange = '--refine.instructions={"a": {"path": "x", "own_answers": True}}'
    assert "only generated problems have" in mini.run(*command, strange, code=2)
    assert "there is no refine.trial" in mini.run(*command, "--refine.trial={}", code=2)
    assert "no model 'nobody'; refine.models has base" in mini.run(
        *command, "--refine.completer=nobody", code=2
    )
