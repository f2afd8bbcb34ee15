"""Servers that sample for a phase: a real one on this machine, which speaks as vLLM does and
answers with our model, or fails as the test wants. checks/vllm.py does the same with vLLM.
"""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import common
import distill
import evaluate
import generate
import hf
import rl
import sample_pairs
import sampler
from checks import mini_rl
from common import UserError
from data import llm
from data.chat.pairs import Pair, TopK
from data.tasks import registry
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from generate import Sample
from kernels.cross_entropy import linear_logprobs
from model import ModelConfig, Transformer, init_weights
from sampler import Served, in_order

ONE = common.Dist(0, 1, torch.device("cpu"), None)
TOKENIZER = train_tokenizer(["1 + 1 = 2"], TokenizerConfig(vocab_size=300))
SHAPE = ModelConfig(1, 16, 24, 2, 1, 8, vocab_size=320, init_std=0.3, max_context=64)
PROMPTS = [[TOKENIZER.bos, *TOKENIZER.encode(text)] for text in ("1 + 1", "2", "3 + 3 + 3 =")]
STOP = tuple(range(0, 320, 4))  # a random model ends soon


def new_model(seed: int) -> Transformer:
    model = Transformer(SHAPE).requires_grad_(False)
    init_weights(model, seed)
    return model


class Vllm(ThreadingHTTPServer):
    """What sampler.Served asks of vLLM, and its faults.

    fault(number of the request): what is sent in place of an answer, or None. forgets: how an
    update of weights empties the cache of prefixes; what is in it answers by the weights before.
    """
    daemon_threads, request_queue_size, allow_reuse_address = True, 64, True

    def __init__(self, model: Transformer, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.version, self.cache, self.lock = model, "", {}, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fault, self.forgets, self.mode = lambda number: None, True, "processed"
        self.asked, self.commands = [], []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # the client went away

    def command(self, path: str, body: dict) -> dict:
        self.commands.append(path.partition("?")[0])
        if path == "/collective_rpc":
            self.model = hf.load(body["kwargs"]["weights_path"])[0]
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path in ("/pause?mode=wait", "/reset_prefix_cache") and self.forgets:
            self.cache.clear()
        return {}

    def complete(self, body: dict) -> dict:
        with self.lock:
            self.asked.append(body)
            if (answer := self.fault(len(self.asked))) is not None:
                return answer
            model = self.cache.setdefault(tuple(body["prompt"]), self.model)
            raw = self.mode == "raw"
            if "prompt_logprobs" in body:
                return scores_answer(model, body)
            if "seed" not in body:
                return probe_answer(model, body, raw)
            ((answer,),) = generate.sample(
                model, [body["prompt"]], 1, body["max_tokens"], body["temperature"],
                stop=tuple(body["stop_token_ids"]), seed=body["seed"])
        return completion(answer.tokens, answer.logprobs, answer.finish_reason)


def completion(tokens, logprobs, finish_reason: str) -> dict:
    choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
    return {"choices": [choice | {"finish_reason": finish_reason}]}


def probe_answer(model, body: dict, raw: bool) -> dict:
    hidden = model(torch.tensor([body["prompt"]]))[0, -1]
    logits = model.lm_head.weight @ hidden / (1 if raw else body["temperature"])
    top = logits.log_softmax(-1).topk(body["logprobs"])
    names = [f"token_id:{i}" for i in top.indices.tolist()]
    return {"choices": [{"logprobs": {"top_logprobs": [dict(zip(names, top.values.tolist()))]}}]}


def scores_answer(model, body: dict) -> dict:
    """The likeliest tokens of each place, and the one that is there, as vLLM writes them."""
    prompt = body["prompt"]
    logprobs = (model(torch.tensor([prompt]))[0] @ model.lm_head.weight.T).log_softmax(-1)
    places = [None]
    for row, token in zip(logprobs, prompt[1:]):
        order = row.argsort(descending=True).tolist()
        shown = {*order[:body["prompt_logprobs"]], token}
        places.append({str(i): {"logprob": row[i].item(), "rank": order.index(i) + 1}
                       for i in sorted(shown)})
    return {"choices": [{"prompt_logprobs": places}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        answers = {"/v1/models": {"data": [{"id": "ours"}]},
                   "/weight_info": {"weight_version": self.server.version}}
        self.send(answers[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self.send(self.server.complete(body))
        else:
            self.send(self.server.command(self.path, body))

    def send(self, answer: dict | int | bytes):
        """An answer, a status, or the beginning of an answer."""
        status = answer if isinstance(answer, int) else 200
        data = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + 99 * isinstance(answer, bytes)))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = isinstance(answer, bytes)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(llm, "BACKOFF", 0.02)
    monkeypatch.setattr(sampler, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def server():
    server = Vllm(new_model(0))
    yield server
    server.shutdown()
    server.server_close()


def served(*servers: Vllm, folder=None) -> Served:
    return Served([server.url for server in servers], ONE, TOKENIZER, folder, torch.float32)


def ask(who: Served, n: int = 4, **settings) -> list[list[Sample]]:
    options = dict(max_new_tokens=8, temperature=0.7, stop=STOP, seed=3, max_rows=8)
    return in_order(who.sample(PROMPTS, n, **options | settings))


def check_logprobs(model, groups: list[list[Sample]], temperature: float = 0.7) -> None:
    """They are the trainer's, to 1e-5."""
    for prompt, group in zip(PROMPTS, groups):
        for answer in group:
            hidden = model(torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1:-1]
            found = linear_logprobs(
                hidden, model.lm_head.weight, torch.tensor(answer.tokens), temperature)
            torch.testing.assert_close(found, torch.tensor(answer.logprobs), rtol=0, atol=1e-5)


def test_what_is_asked_and_what_comes(server):
    """A request for each sample, ids both ways, nothing left to the generation config."""
    groups = ask(served(server))
    check_logprobs(server.model, groups)
    assert [len(group) for group in groups] == [4, 4, 4]
    assert {answer.finish_reason for group in groups for answer in group} == {"stop", "length"}
    for group in groups:
        for answer in group:
            assert (answer.tokens[-1] in STOP) == (answer.finish_reason == "stop")
    assert len({body["seed"] for body in server.asked}) == 12
    config = hf._json_files(server.model, TOKENIZER, torch.float32)["generation_config.json"]
    assert config["top_p"] == 0.95  # which vLLM would take where a request does not say
    sent = dict(top_p=1.0, top_k=-1, temperature=0.7, ignore_eos=True, logprobs=0, model="ours")
    assert all(body.items() >= sent.items() for body in server.asked)
    again = ask(served(server), numbers=[0, 1, 2])
    assert [[answer.tokens for answer in group] for group in again] == [
        [answer.tokens for answer in group] for group in groups]


def test_new_weights_reach_the_servers(server, tmp_path):
    """They are reloaded between pause and resume, once for each step, and the old folder goes."""
    who = served(server, folder=tmp_path)
    for step in (1, 2, 2):
        who.update(new_model(step), step)
        check_logprobs(new_model(step), ask(who))
    commands = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
                "/resume"]
    assert server.commands == 2 * commands
    assert [path.name for path in tmp_path.iterdir()] == ["weights_00000002"]


@pytest.mark.parametrize("fault", ["stale prefixes", "raw log-probabilities", "other weights"])
def test_other_weights_stop_the_run(server, tmp_path, fault):
    who = served(server, folder=tmp_path)
    who.update(new_model(1), 1)
    if fault == "stale prefixes":
        server.forgets = False
    elif fault == "raw log-probabilities":
        server.mode = "raw"
    else:
        server.command = lambda path, body: {}
    with pytest.raises(UserError, match="has other weights than the policy of step 2: its log-pro"):
        who.update(new_model(2), 2)


def test_a_checkpoint_is_held_against_the_servers(server):
    served(server).expect(new_model(0))
    with pytest.raises(UserError, match="has other weights than the policy: its log-prob"):
        served(server).expect(new_model(1))


def test_the_likeliest_tokens_of_a_served_teacher(server, tmp_path):
    """They and the responses' sums are those of distill.sequence_logprobs with a model."""
    pairs = [Pair(0, "", [1, 2], [3, 4, 5], [6]), Pair(1, "", [7], [8, 9], [10, 11], [12, 13])]
    cfg = distill.DistillConfig(context=16)
    batches = [np.array([1]), np.array([0, 1])]
    found = {}
    for who in ("here", "served"):
        (tmp_path / who).mkdir()
        top_k = TopK(tmp_path / who, pairs, 5, new=True)
        if who == "here":
            sums = distill.sequence_logprobs(
                server.model, pairs, batches, cfg, ONE, top_k, is_teacher=True)
        else:
            sums = sample_pairs.served_logprobs(served(server), pairs, batches, 8, ONE, top_k)
        found[who] = (sums, *top_k.read(np.array([0, 1])))
    assert found["here"][0].keys() == {0, 1}
    for pair, sums in found["here"][0].items():
        assert found["served"][0][pair] == pytest.approx(sums, abs=1e-4)
    np.testing.assert_array_equal(found["here"][1], found["served"][1])
    np.testing.assert_allclose(found["here"][2], found["served"][2], atol=2e-3)


@pytest.mark.parametrize("fault", [
    503,
    429,
    b'{"choices": [',
    {"choices": []},
    completion([5, 6], [-1.0, -1.0], "abort"),
    completion([5, 6], [-1.0], "length"),
    completion([5, 6], [-1.0, -1.0], "stop"),
], ids=["busy", "too many", "cut", "empty", "aborted", "too short", "no stop token"])
def test_what_fails_is_asked_again_and_nothing_comes_twice(server, fault):
    whole = ask(served(server))
    who = served(server)
    n_before = len(server.asked)
    server.fault = lambda number: fault if number - n_before in (2, 5, 6) else None
    assert ask(who) == whole
    draws = [body["seed"] for body in server.asked[n_before:] if "seed" in body]
    assert len(draws) == 12 + 3 and len(set(draws)) == 12


def test_a_request_that_always_fails_stops_the_run(server):
    server.fault = lambda number: 500
    with pytest.raises(UserError, match="HTTP 500 from"):
        ask(served(server))
    server.fault = lambda number: 400
    with pytest.raises(UserError, match="HTTP 400 from"):
        ask(served(server))


def test_a_server_that_dies_is_waited_for(server, tmp_path, capsys):
    """It comes back with the weights that it was started with, gets those of now, and all it owed
    is asked again."""
    who = served(server, folder=tmp_path)
    who.update(new_model(1), 1)
    whole = ask(who)
    reborn, n_before = [], len(server.asked)

    def die() -> None:
        server.shutdown()
        server.server_close()
        time.sleep(0.3)
        reborn.append(Vllm(new_model(0), server.server_port))

    def fault(number: int) -> bytes | None:
        if number == n_before + 5:
            threading.Thread(target=die).start()
        return b"{" if number >= n_before + 5 else None  # what it owes then never comes whole

    server.fault = fault
    assert ask(who) == whole
    check_logprobs(new_model(1), whole)
    said = capsys.readouterr().err
    assert f"waiting for {server.url}" in said and f"{server.url} is back" in said
    reborn[0].shutdown()
    reborn[0].server_close()


def test_the_others_go_on_meanwhile(server):
    other = Vllm(server.model)
    who = served(server, other)
    whole = ask(who)
    other.shutdown()
    other.server_close()
    assert ask(who) == whole
    assert len(server.asked) >= 12


def test_a_server_that_never_was_there(tmp_path):
    who = Served(["http://127.0.0.1:9"], ONE, TOKENIZER, tmp_path, torch.float32)
    with pytest.raises(UserError, match="cannot connect to http://127.0.0.1:9 .*does the server"):
        who.update(new_model(1), 1)
    with pytest.raises(UserError, match="cannot connect"):
        ask(who)


# ---- RL, and an evaluation, by a server


@pytest.fixture
def trained(base, server, monkeypatch):
    """A miniature run whose server has the weights that RL starts from; any text may earn a reward,
    and many tokens end a response."""
    (base.folder / "mini_rl.py").write_text(mini_rl.CONFIG)
    server.model = hf.load(base.folder / "out/base/pretrain")[0]
    monkeypatch.setattr(registry, "judge", mini_rl.judge_by_length)
    monkeypatch.setattr(Tokenizer, "stop_ids", mini_rl.END_TOKENS)
    return base


def run_rl(mini, server: Vllm, name: str, *options: str) -> list[dict]:
    stages = [{"name": "STEM", "problems": {"math": 10}, "steps": 3}]
    mini.call(rl.main, "rl.py", "mini_rl.py", "--init_from=out/base/pretrain", f"--run={name}",
              f"--rl.stages={stages}", f"--rl.servers=['{server.url}']", "--rl.prompts=[]",
              "--evaluate.tasks=[]", "--rl.updates=1", "--rl.save_every=99", *options)
    lines = common.read_metrics(mini.folder / "out" / name / "rl")
    return [line for line in lines if "loss" in line]


def test_rl_by_a_server(trained, server):
    """The filter and each step by the weights of now; each answer is asked for once."""
    lines = run_rl(trained, server, "served")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert max(line.get("logprob_mismatch", 0.0) for line in lines) < 1e-5
    assert any(line["grad_norm"] for line in lines)
    assert server.commands.count("/collective_rpc") == 3  # the filter's are the first step's
    n_answers = sum("seed" in body for body in server.asked)
    assert n_answers == 10 * 4 + 3 * 2 * 4


def test_rl_one_step_ahead(trained, server):
    """From the second step on its rollouts are by the weights before the last update."""
    lines = run_rl(
        trained, server, "ahead", "--rl.ahead=1", "--rl.tis=2.0", "--rl.filter_samples=0")
    mismatches = [line.get("logprob_mismatch", 0.0) for line in lines]
    assert mismatches[0] < 1e-5 < max(mismatches[1:])
    assert server.commands.count("/collective_rpc") == 2  # the last step asks for no other


def test_ahead_needs_servers_and_a_correction(trained, server, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_rl(trained, server, "bad", "--rl.ahead=1")
    assert "error: rl.ahead=1 needs rl.servers, which" in capsys.readouterr().err


def test_an_evaluation_by_servers(trained, server, capsys):
    """By our own prompts and token ids, of the checkpoint that the servers must have."""
    command = ("evaluate.py", "mini.py", "--run=scores", "--evaluate.checkpoint=out/base/pretrain",
               f"--evaluate.servers=['{server.url}']", "--evaluate.max_rows=3")
    trained.call(evaluate.main, *command)
    assert " 4\n" in capsys.readouterr().out  # problems
    rows = (trained.folder / "out/scores/evaluate.jsonl").read_text().splitlines()
    assert len(rows) == 4 * 2 == sum("seed" in body for body in server.asked)
