"""A real server on this machine, that answers as each test tells it: what is sent, what comes back,
what is said."""
from settings import from_dict

import itertools
import json
import os
import re
import signal
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common import UserError
from data import llm
from data.llm import LLMConfig, cached, first_json, http_llm


def ask(*texts: str) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in texts]


def reply(text, finish: str = "stop", **message) -> dict:
    return {
        "choices": [
            {"message": {"role": "assistant", "content": text} | message, "finish_reason": finish}
        ]
    }


class Server(ThreadingHTTPServer):
    """answer(question) says what is sent: a dict (JSON), bytes, (status, body[, headers]), or a
    generator of bytes."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.url = (
            lambda text: reply(text.upper()),
            f"http://127.0.0.1:{self.server_port}/v1",
        )
        self.seen, self.headers, self.paths, self.lost = [], [], [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        self.lost.set()  # the client went away


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.paths.append(self.path)
        self.send({"data": [{"id": "first"}, {"id": "second"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.paths.append(self.path)
        self.server.seen.append(body)
        self.server.headers.append(self.headers)
        self.send(self.server.answer(body["messages"][-1]["content"]))

    def send(self, answer):
        if hasattr(answer, "__next__"):
            for piece in answer:
                self.wfile.write(piece)
            return
        status, body, headers = (
            (*answer, {})[:3] if isinstance(answer, tuple) else (200, answer, {})
        )
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(llm, "BACKOFF", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def make(server, **settings) -> llm.LLM:
    return http_llm(LLMConfig(**dict(url=server.url, model="m", timeout=5) | settings))


def flaky(times: int, bad):
    """An answer that is bad so many times for each question, then good."""
    asked = []

    def answer(text):
        asked.append(text)
        return bad if asked.count(text) <= times else reply(text.upper())

    return answer


def test_order_concurrency_and_what_is_sent(server):
    open_requests, most = [], [0]

    def answer(text):
        open_requests.append(text)
        time.sleep(0.1 - 0.004 * int(text))  # the first one comes last
        most[0] = max(most[0], len(open_requests))
        open_requests.remove(text)
        return reply(text + "!")

    server.answer, told, texts = answer, [], [str(i) for i in range(24)]
    write = make(server, concurrency=8, seed=100, temperature=1, extra=dict(top_k=20))
    assert write(ask(*texts), lambda i, text: told.append((i, text))) == [
        text + "!" for text in texts
    ]
    assert 2 <= most[0] <= 8  # side by side, and no more than may be
    assert sorted(told) == [(i, f"{i}!") for i in range(24)] and told != sorted(told)
    assert {body["messages"][0]["content"]: body["seed"] for body in server.seen} == {
        t: 100 + int(t) for t in texts
    }
    sent = dict(
        model="m",
        messages=ask("3")[0],
        temperature=1,
        top_p=0.95,
        max_tokens=4096,
        seed=103,
        top_k=20,
    )
    assert sent in server.seen and set(server.paths) == {"/v1/chat/completions"}


def test_a_conversation_that_is_none_is_not_asked_and_the_others_keep_their_numbers(server):
    a, b = ask("a", "b")
    assert make(server, model="")([None, a, None, b]) == [None, "A", None, "B"]
    assert {(body["seed"], body["model"]) for body in server.seen} == {(1, "first"), (3, "first")}
    assert (
        make(server)([]) == []
        and make(server, model="")([None]) == [None]
        and len(server.paths) == 3
    )


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_chain_of_thought_is_put_back(server, name):
    server.answer = lambda text: reply("\n\n42.", **{name: "\n6 * 7\n"})
    assert make(server)(ask("?")) == ["<think>\n6 * 7\n</think>\n\n42."]
    for nothing in ("", None):  # cut off in the midst of them
        assert llm.chat_form({"content": nothing, name: "\n6 * 7"}) == "<think>\n6 * 7"


@pytest.mark.parametrize("status", [408, 409, 429, 503])
def test_what_may_pass_is_tried_again(server, status):
    server.answer = flaky(2, (status, b"busy"))
    assert make(server)(ask("a", "b", "c")) == ["A", "B", "C"] and len(server.seen) == 9
    with pytest.raises(UserError, match=f"3 of 3 .* HTTP {status} .*busy"):
        make(server, retries=1)(ask("d", "e", "f"))


def test_retry_after_is_honoured(server):
    server.answer = flaky(1, (429, b"", {"Retry-After": "1"}))
    start = time.monotonic()
    assert make(server)(ask("a")) == ["A"] and 1 <= time.monotonic() - start < 2


NONSENSE = [
    b"<html>",
    {"error": "no"},
    {"choices": []},
    reply(None),
    reply([{"text": "x"}]),
    reply(" \n"),
    [1],
    b"[" * 100_000,
    b'{"choices": "\xff"}',
    b"",
    (200, json.dumps(reply("x" * 99)).encode()[:-9], {"Content-Length": "9999"}),
    (200, b"zz\r\nhello", {"Transfer-Encoding": "chunked", "Content-Length": "9"}),
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_tried_again_then_none_and_counted(server, nonsense, capsys):
    server.answer = lambda text: nonsense if text == "bad" else reply(text.upper())
    assert (
        make(server, retries=1)(ask("a", "bad", "c")) == ["A", None, "C"] and len(server.seen) == 4
    )
    said = capsys.readouterr().err
    assert (
        "no answer to conversation 1: " in said
        and "1 of 3 conversations got no usable answer" in said
    )
    server.answer = flaky(1, nonsense)
    assert make(server, retries=1)(ask("x")) == ["X"]


def test_all_or_most_nonsense_is_an_error_and_ends_early(server):
    write = make(server, retries=0, concurrency=2)
    server.answer = lambda text: b"<html>Welcome to nginx!</html>"
    with pytest.raises(UserError, match="2 of 2 conversations.*Welcome to nginx"):
        write(ask("a", "b"))
    server.seen.clear()
    with pytest.raises(UserError, match="8 of 8 conversations.*Welcome to nginx"):
        write(ask(*map(str, range(1000))))
    assert len(server.seen) < 20
    server.answer = lambda text: reply("ok") if int(text) % 5 < 2 else b""
    with pytest.raises(UserError, match="got no usable answer"):
        write(ask(*map(str, range(60))))
    server.answer = lambda text: reply("ok") if int(text) % 2 else b""
    assert write(ask(*map(str, range(20)))).count(None) == 10


def test_a_truncated_answer_is_none_and_not_asked_for_again(server, capsys):
    server.answer = lambda text: (
        reply(None, "length", reasoning="so much") if text == "a" else reply("b")
    )
    assert make(server)(ask("a", "b")) == [None, "b"] and len(server.seen) == 2
    assert "truncated at max_tokens" in capsys.readouterr().err
    assert make(server)(ask("a")) == [
        None
    ]  # the last of a pipeline's stragglers is no reason to stop it
    with pytest.raises(UserError, match="8 of 8.*truncated at max_tokens"):
        make(server)(ask(*"a" * 8))


def test_a_conversation_that_the_server_refuses_is_none(server):
    server.answer = lambda text: (
        (400, {"error": {"message": "maximum context"}}) if text == "a" else reply("b")
    )
    assert make(server)(ask("a", "b")) == [None, "b"] and len(server.seen) == 2
    with pytest.raises(UserError, match="HTTP 400 .*maximum context"):
        make(server)(ask("a"))


@pytest.mark.parametrize("status", [401, 403, 404, 301, 405])
def test_what_will_not_pass_ends_the_run_at_once(server, status):
    server.answer = lambda text: (status, b"<h1>No\n</h1>\n", {"Location": "http://127.0.0.1:1/v1"})
    with pytest.raises(
        UserError, match=f"HTTP {status} .*No.*check the url.*model.*key.* OPENAI_API_KEY"
    ) as caught:
        make(server, concurrency=2)(ask(*map(str, range(100))))
    assert "\n" not in str(caught.value) and len(server.seen) < 20


def test_the_key_is_sent_and_never_shown(server, monkeypatch, capsys):
    key = "sk-a-very-secret-key"
    monkeypatch.setenv("MY_KEY", key + "\n")
    write = make(server, api_key_env="MY_KEY", retries=0)
    assert write(ask("a")) == ["A"] and server.headers[0]["Authorization"] == f"Bearer {key}"
    for answer in (
        (401, {"error": f"Incorrect key {key}"}),
        (500, key.encode()),
        reply([key]),
    ):  # echoes of it
        server.answer = lambda text: answer
        with pytest.raises(UserError, match=r"\*\*\*") as caught:
            write(ask("a"))
        assert key not in f"{caught.value} {capsys.readouterr()}"


@pytest.mark.parametrize("key, sign", [("sk-a\u200bsecret", "5 is U+200B"), ("sk-ä", "4 is U+00E4"),
                                       ("sk-\x01", "4 is U+0001")])
def test_a_key_that_no_header_can_hold_is_named_and_not_shown(server, monkeypatch, key, sign):
    monkeypatch.setenv("MY_KEY", key)
    said = re.escape(f"MY_KEY is no key: its sign number {sign}")
    with pytest.raises(UserError, match=said) as caught:
        make(server, api_key_env="MY_KEY")(ask("a"))
    assert "secret" not in str(caught.value) and not server.seen


def test_an_echoed_key_is_not_kept(server, monkeypatch, tmp_path):
    key = "sk-a-very-secret-key"
    monkeypatch.setenv("MY_KEY", key)
    server.answer = lambda text: reply(f"your key is {key}")
    write = cached(make(server, api_key_env="MY_KEY"), tmp_path / "kept.jsonl")
    assert write(ask("a")) == ["your key is ***"]
    assert key not in (tmp_path / "kept.jsonl").read_text()
    assert (tmp_path / "kept.jsonl").stat().st_mode & 0o077 == 0


def test_what_a_server_says_is_cut_and_printable(server, capsys):
    server.answer = lambda text: (500, b"\x1b[2J\x1b]0;gone\x07\n" + b"x" * 10**6)
    with pytest.raises(UserError) as caught:
        make(server, retries=0)(ask("a"))
    said = str(caught.value)
    assert said.isprintable() and len(said) < 600 and "x1b[2J" in said
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())


def test_a_long_pause_is_said_and_capped(server, monkeypatch, capsys):
    monkeypatch.setattr(llm, "MAX_WAIT", 0.05)
    server.answer = flaky(1, (429, b"", {"Retry-After": "9999"}))
    assert make(server)(ask("a", "b")) == ["A", "B"]
    assert capsys.readouterr().err.count("asks for a pause of 9,999 s; trying again after") == 1


def test_forms_of_retry_after():
    tomorrow = formatdate(time.time() + 86400, usegmt=True)
    assert 86000 < llm._seconds_of(tomorrow) < 87000
    for nonsense in ("", "-1", "soon", "1e9", "9" * 50, "Thu, 99 Foo 2020"):
        assert llm._seconds_of(nonsense) == 0
    assert llm._seconds_of(formatdate(0)) == 0


def test_an_endpoint_that_is_down(server):
    server.shutdown()
    server.server_close()
    start = time.monotonic()
    with pytest.raises(UserError, match=f"cannot connect to {server.url} .*does the server run"):
        make(server, retries=2)(ask(*map(str, range(100))))
    for settings in (dict(model=""), dict(url="http://a..b/v1"), dict(url="http://h:99999/v1")):
        with pytest.raises(UserError, match="cannot connect"):
            make(server, **dict(retries=1) | settings)(ask("a"))
    assert time.monotonic() - start < 3


def dribble(head: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"):
    yield head
    while True:
        time.sleep(0.02)
        yield b" "


def test_a_fatal_answer_calls_the_others_off(server):
    server.answer = lambda text: (time.sleep(0.3), (401, b""))[1] if text == "0" else dribble()
    start = time.monotonic()
    with pytest.raises(UserError, match="401"):
        make(server, timeout=60, concurrency=4)(ask(*map(str, range(500))))
    assert time.monotonic() - start < 5  # of the 60 seconds that one answer may take
    assert server.lost.wait(5)  # the server sees it, too, and can stop generating
    assert len(server.seen) == 4


def test_the_timeout_holds_for_a_server_that_dribbles(server, capsys):
    heads = {
        "length": b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n",
        "until closed": b"HTTP/1.1 200 OK\r\n\r\n",
        "headers": b"HTTP/1.1 200 OK\r\nX: ",
        "status": b"",
    }
    server.answer = lambda text: dribble(heads[text]) if text in heads else reply("b")
    start = time.monotonic()
    assert make(server, timeout=0.4, retries=0)(ask(*heads, *"abcd")) == [None] * 4 + ["b"] * 4
    assert 0.4 <= time.monotonic() - start < 4
    assert (
        capsys.readouterr().err.count("no whole answer in 0.4 s (timeout)") >= 2
    )  # of the first three reasons


def test_an_endless_answer_is_cut(server, monkeypatch):
    monkeypatch.setattr(llm, "MAX_BODY", 1 << 16)
    server.answer = lambda text: itertools.chain(
        [b"HTTP/1.1 200 OK\r\n\r\n"], itertools.repeat(b" " * 4096)
    )
    with pytest.raises(UserError, match="nothing usable"):
        make(server, retries=0)(ask("a"))
    assert server.lost.wait(2)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(url="localhost:8000/v1"), "w: url must be like http"),
        (dict(url="ftp://x"), "url"),
        (dict(url=""), "url"),
        (dict(url="http://h/v1\r\nX: y"), "url"),
        (dict(url="http://me:pass@h/v1"), "^(?!.*pass@).*must not hold a password"),
        (dict(url="http://h/v1?key=pass"), "^(?!.*=pass).*must not hold a password"),
        (dict(concurrency=0), "from 1 to"),
        (dict(retries=-1), "from 0 to"),
    ],
)
def test_a_wrong_config_is_named(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(LLMConfig, values, "w")
    assert LLMConfig(url=" http://h:1/v1/chat/completions").url == "http://h:1/v1"


def test_cached_asks_for_nothing_twice(server, tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    server.answer = lambda text: b"" if text == "bad" else reply(f"{text} {len(server.seen)}")
    batch, told = ask("a", "bad", "b", "a", "a"), []
    first = cached(make(server, retries=0), path)(batch)
    assert (
        first[1] is None
        and len({first[0], first[3], first[4]}) == 3
        and path.read_bytes().count(b"\n") == 4
    )
    server.answer, again = lambda text: reply("good"), cached(make(server), path)
    assert (
        again(batch, lambda i, text: told.append((i, text)))
        == again(batch)
        == [first[0], "good", *first[2:]]
    )
    assert told == [(1, "good")] and len(server.seen) == 6
    assert (
        cached(make(server, model="", url="http://127.0.0.1:1"), path)(batch[::-1])[0] == first[0]
    )
    assert (
        again(ask("a", "a", "a", "a"))[3] == "good" and server.seen[-1]["seed"] == 3
    )  # one more draft


def test_cached_cuts_a_torn_line(server, tmp_path):
    path = tmp_path / "answers.jsonl"
    texts = cached(make(server), path)(ask("a", "é\n大", "c"))
    whole = path.read_bytes()
    for cut in (1, 5, 60):
        path.write_bytes(whole[:-cut])
        server.seen.clear()
        assert cached(make(server), path)(ask("a", "é\n大", "c")) == texts and len(server.seen) == 1
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_cached_cuts_a_first_line_that_is_torn(server, tmp_path):
    """Killed, or a full disk, at the very first answer."""
    for torn in ('{"key": "3f', '{"k', '{"key": "3f", "text": "é'):
        path = tmp_path / "answers.jsonl"
        path.write_text(torn)
        assert len(cached(make(server), path)(ask("a"))) == 1
        assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "content", ["hello", '{"key": 1}\n', "[1]\n", '{"key": "a", "text": "b"}\nx\n', "\0" * 9]
)
def test_cached_leaves_a_foreign_file_alone(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match="mine.json is damaged, or no file"):
        cached(None, path)
    assert path.read_text() == content


def test_cached_keeps_each_answer_at_once(tmp_path):
    path, kept = tmp_path / "answers.jsonl", []

    def stub(conversations, on_result):
        for i, text in enumerate(["a", None, "b"]):
            on_result(i, text)
            kept.append([json.loads(line)["text"] for line in path.read_text().splitlines()])

    assert cached(stub, path)(ask("1", "2", "3")) == ["a", None, "b"] and kept == [
        ["a"],
        ["a"],
        ["a", "b"],
    ]


def test_ctrl_c_ends_it_at_once(server, tmp_path):
    path = tmp_path / "answers.jsonl"
    server.answer = lambda text: reply(text) if text == "a" else dribble()
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a test in the background ignores it

    def interrupt():
        while len(server.seen) < 4 or not path.read_bytes():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    path.touch()
    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            cached(make(server, timeout=60), path)(ask(*"abcd"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (
        time.monotonic() - start < 5 and server.lost.wait(5) and path.read_bytes().count(b"\n") == 1
    )


@pytest.mark.parametrize(
    "text, value",
    [
        (
            'Sure! Here it is:\n```json\n{"a": {"b": [1, 2]}}\n```\nAnything else?',
            {"a": {"b": [1, 2]}},
        ),
        ('[1, {"a": "]"}] {"later": 1}', [1, {"a": "]"}]),
        (
            '{"why": "a } and a { and \\"]\\" in it", "ok": true} }',
            {"why": 'a } and a { and "]" in it', "ok": True},
        ),
        ('In {braces} and [brackets): {"a": 1}', {"a": 1}),
        ('{"two": "lines\nof text"}', {"two": "lines\nof text"}),
        ('<think>\nmaybe {"score": 1}\n</think>\n\n{"score": 2}', {"score": 2}),
        ('<think>{"score": 1}</think> I cannot say.', None),
        ('so {"score": 1}</think>{"score": 2}', {"score": 2}),
        ('{"quote": "it lacks </think> at the end"}', {"quote": "it lacks </think> at the end"}),
        ("{'single': 1}", None),
        ("", None),
        ("3", None),
        ('{"torn": "', None),
        ("{}", {}),
        ("[" * 100_000, None),
    ],
)
def test_first_json(text, value):
    assert first_json(text) == value
