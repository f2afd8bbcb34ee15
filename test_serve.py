"""Writers against a real OpenAI-compatible server: `transformers serve` on an exported checkpoint of ours."""
import re
from collections import Counter

import pytest
import torch

import evaluate
import hf
from checks.evaluate import serving
from common import UserError
from data.refine import checklist
from data import llm
from data.refine.refinement import refine, Settings
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from data.llm import cached, http_llm, LLMConfig
from generate import local_llm
from model import ModelConfig, Transformer, init_weights

pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
QUESTIONS = [[{"role": "user", "content": f"Mia has {n} pens. She buys 2 more. How many pens does Mia have now?"}]
             for n in range(3, 7)]


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
    """(process, settings of a writer)"""
    with serving(export) as (process, url):
        yield process, dict(url=url, model=str(export), concurrency=2, retries=1, max_tokens=24)


def test_the_server_writes_what_our_sampler_does(server, export):
    """Greedily: the same export by transformers, behind HTTP and our chat template, and by us."""
    greedy = http_llm(LLMConfig(**server[1], temperature=0.0, top_p=1.0))
    ours = local_llm(str(export), max_new_tokens=24, temperature=0)(QUESTIONS)
    theirs = greedy(QUESTIONS)
    assert theirs == ours and any(theirs)


@pytest.mark.parametrize("form", ["chat", "document"])
def test_the_same_evaluation_by_a_server_and_here(server, export, form):
    """Greedily: answers (but for control tokens, which servers leave out), tokens, rewards, and why each ended."""
    cfg = evaluate.EvaluateConfig(["math", "form"], endpoint=server[1]["url"], model=str(export), prompt_format=form, k=1,
                                  n_problems=8, temperature=0.0, top_p=1.0, max_new_tokens=24, max_rows=2)
    def results(model, tokenizer):
        return [(re.sub(r"<\|\w+\|>", "", row["response"]), row["tokens"], row["reward"], row["finish_reason"])
                for score in evaluate.evaluate(model, tokenizer, cfg).values() for row in score["rows"]]
    ours = results(*hf.load(export))
    assert results(evaluate.server_llm(cfg), None) == ours and {row[-1] for row in ours} == {"stop", "length"}


def test_refinement_runs_against_it(server, tmp_path, monkeypatch):
    """Of a random model every verdict is unparsable: counted, asked again, never trusted. A second time nobody is asked."""
    monkeypatch.setattr(llm, "BACKOFF", 0.05)
    asked, http = Counter(), http_llm(LLMConfig(**server[1], temperature=1.0, top_p=1.0))

    def counting(conversations, *on_result):
        asked["requests"] += sum(c is not None for c in conversations)
        return http(conversations, *on_result)

    team = {"tiny": cached(counting, tmp_path / "tiny.jsonl", failures=True)}
    settings = Settings(drafters=["tiny"], n_drafts=2, checklist="tiny", evaluators=["tiny"], revisers=["tiny"], rounds=1)
    cases = refine(QUESTIONS, team, settings, checklist.runnable_items)
    assert cases and sum(case.unparsable for case in cases) and all(case.attempts[0]["score"] < 1 for case in cases)
    before = asked["requests"]
    assert refine(QUESTIONS, team, settings, checklist.runnable_items) == cases and asked["requests"] == before


def test_a_server_that_is_gone(server):
    server[0].kill()
    server[0].wait()
    with pytest.raises(UserError, match="does the server run there"):
        http_llm(LLMConfig(**server[1] | {"retries": 0}))(QUESTIONS)
