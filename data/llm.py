"""Writers: models that write or judge text for us (teacher, evaluator, reviser, verifier, labeller), of one shape.

`http_llm` asks any OpenAI-compatible server (vLLM, SGLang, `transformers serve`, llama.cpp); `cached`
keeps every answer in a file, so that a killed run pays for none twice; `first_json` finds the label in an answer.
"""
import asyncio
import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from tqdm import tqdm

from common import UserError
from progress import progress_bar

# writer(conversations[, on_result]): a text for each conversation (a list of {"role", "content"}), in their order. It
# is None where there was no usable answer, and where None stands in a conversation's place: the others keep their
# numbers, on which the random draws depend. on_result(number, text) is called with each as it comes.
LLM = Callable[..., list[str | None]]

MAX_BODY = 16 << 20  # bytes of an answer: one without end must not fill the memory
BACKOFF = 1.0        # seconds before the first retry, twice as many before each further one


@dataclass
class LLMConfig:
    """An OpenAI-compatible endpoint and how it is asked."""
    url: str = "http://localhost:8000/v1"  # of the server; /chat/completions and /models follow it
    model: str = ""              # its name on the server (default: the first that the server has)
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; never the key itself
    temperature: float = 0.6     # of sampling
    top_p: float = 0.95          # nucleus
    max_tokens: int = 4096       # of an answer; one that is cut off there is none
    timeout: float = 600.0       # seconds for one try, from the connection to the last byte
    retries: int = 4             # further tries after what may pass: lost connections, timeouts, 429, 5xx, nonsense
    concurrency: int = 16        # requests in flight
    seed: int = 0                # a conversation is sent this plus its number, so that drafts of one prompt differ
    extra: dict = field(default_factory=dict)  # further fields of a request

    def __post_init__(self):
        self.url = self.url.strip().rstrip("/").removesuffix("/chat/completions")
        if not re.fullmatch(r"https?://[!-~]+", self.url):
            raise ValueError(f"url must be like http://localhost:8000/v1, not {self.url!r}")
        if min(self.timeout, self.max_tokens, self.concurrency) <= 0 or self.retries < 0:
            raise ValueError("timeout, max_tokens and concurrency must be above 0, retries at least 0")


class NoAnswer(UserError):
    """Why a request got no usable answer. kind: "passing" (asked again), "down", "refused" or "truncated"."""

    def __init__(self, why: str, kind: str = "passing", wait: int = 0):
        super().__init__(why)
        self.kind, self.wait = kind, wait  # wait: seconds that the server wants between


def http_llm(cfg: LLMConfig, read: Callable | None = None) -> LLM:
    """A writer that asks an endpoint, many requests at a time, and counts failed answers on stderr, with some reasons.

    In a conversation's place may stand a text to be continued. read(answer): another result than the text of it all.

    UserError: it is down, refuses key, model or url, or fails with 8 more than it answers (or all, but by truncation).
    """
    return lambda conversations, on_result=lambda i, text: None: asyncio.run(
        _write(cfg, conversations, on_result, read or _text))


async def _write(cfg: LLMConfig, conversations: list, on_result: Callable, read: Callable) -> list[str | None]:
    asked = [i for i, conversation in enumerate(conversations) if conversation is not None]
    texts, failed, slots = [None] * len(conversations), [], asyncio.Semaphore(cfg.concurrency)

    async def work(i):
        plain = isinstance(conversations[i], str)
        body = {"model": model, "prompt" if plain else "messages": conversations[i]} | dict(
            temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens, seed=cfg.seed + i) | cfg.extra
        async with slots:
            try:
                return i, await _ask(cfg, client, "/completions" if plain else "/chat/completions", read, body), None
            except Exception as error:  # for the loop below
                return i, None, error

    async with httpx2.AsyncClient(timeout=httpx2.Timeout(None, connect=10),
                                  limits=httpx2.Limits(max_connections=None)) as client:
        model = cfg.model or asked and await _ask(cfg, client, "/models", lambda answer: answer["data"][0]["id"])
        tasks = asyncio.as_completed([asyncio.create_task(work(i)) for i in asked])
        for n, task in enumerate(progress_bar(tasks, desc="writer", total=len(asked), unit=" texts", delay=5), 1):
            i, texts[i], error = await task
            if isinstance(error, NoAnswer) and error.kind != "down":
                failed.append(error)
                if len(failed) <= 3:
                    tqdm.write(f"no answer to conversation {i}: {error}", file=sys.stderr)
            elif error:
                raise error  # and asyncio.run cancels the other tasks
            on_result(i, texts[i])
            if 2 * len(failed) - n >= 8 or len(failed) == len(asked) and failed[0].kind != "truncated":
                raise UserError(f"{len(failed)} of {n} conversations got no usable answer, the first: {failed[0]}")
    if failed:
        tqdm.write(f"warning: {len(failed)} of {n} conversations got no usable answer", file=sys.stderr)
    return texts


async def _ask(cfg: LLMConfig, client: httpx2.AsyncClient, path: str, read: Callable, body: dict | None = None):
    """What `read` makes of the endpoint's JSON, asked again while that may help. NoAnswer, or UserError for all."""
    key = "".join(os.environ.get(cfg.api_key_env, "").split())
    for attempt in range(cfg.retries + 1):
        try:
            return _judge(cfg, key, read, *await _request(cfg, client, key, path, body))
        except NoAnswer as error:
            if error.kind in ("refused", "truncated") or attempt == cfg.retries:
                raise
            await asyncio.sleep(max(error.wait, min(60, BACKOFF * 2 ** attempt) * random.uniform(0.5, 1.5)))


async def _request(cfg: LLMConfig, client: httpx2.AsyncClient, key: str, path: str, body: dict | None):
    """(status, headers, first MAX_BODY bytes) of one HTTP request."""
    headers, received = {"Authorization": f"Bearer {key}"} if key else {}, bytearray()
    try:
        async with asyncio.timeout(cfg.timeout):  # of it all: a server that dribbles never exceeds a read's
            async with client.stream("POST" if body else "GET", cfg.url + path, json=body, headers=headers) as response:
                async for piece in response.aiter_bytes(1 << 16):
                    received += piece
                    if len(received) > MAX_BODY:
                        break
                return response.status_code, response.headers, bytes(received)
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise NoAnswer(f"cannot connect to {cfg.url} ({error!r}): does the server run there?", "down") from None
    except TimeoutError:
        raise NoAnswer(f"{cfg.url}: no whole answer in {cfg.timeout:g} s (timeout)") from None
    except (httpx2.HTTPError, OSError) as error:
        raise NoAnswer(f"{cfg.url}: lost the connection ({error!r})") from None


def _judge(cfg: LLMConfig, key: str, read: Callable, status: int, headers: dict, answer: bytes):
    """What `read` makes of an answer; NoAnswer or UserError for what else its HTTP status means."""
    text = answer.decode("utf-8", "replace").replace(key or "\0", "***")  # keys get echoed
    said = f"HTTP {status} from {cfg.url}: {' '.join(text.split())[:300]!r}"
    if status // 100 == 2:
        with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return read(json.loads(answer))
        raise NoAnswer(f"nothing usable in {said}")
    if status in (408, 409, 429) or status >= 500:
        wait = headers.get("Retry-After", "")
        raise NoAnswer(said, wait=int(wait) if re.fullmatch("[0-9]{1,4}", wait) else 0)
    if status in (400, 413, 422):  # one conversation may be too long
        raise NoAnswer(said, "refused")
    raise UserError(f"{said}; check the url (most end in /v1), the model (`curl {cfg.url}/models` lists them) and the "
                    f"key in the environment variable {cfg.api_key_env}")


def _text(answer) -> str:
    """The text of a chat completion that came to its end."""
    choice = answer["choices"][0]
    if choice.get("finish_reason") == "length":  # half a chain of thought is nothing to train on
        raise NoAnswer("truncated at max_tokens", "truncated")
    if not choice["message"]["content"].strip():
        raise ValueError("empty")
    return chat_form(choice["message"])


def chat_form(message: dict) -> str:
    """The text of an answer in our chat form: a chain of thought that the server split off is put back."""
    text, thought = message["content"] or "", message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str):
        text = "<think>\n" + thought.strip("\n") + ("\n</think>\n\n" + text.lstrip("\n") if text.strip() else "")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates are no text


def cached(writer: LLM, path: Path, failures: bool = False) -> LLM:
    """The writer, with each answer kept in a JSON Lines file as it comes, and never asked for again.

    The key is the conversation and how many equal ones stand before it in the batch: each of n drafts has its own. The
    writer's settings are not in it: give each its own file. None (an answer that was cut off) is only kept with
    failures, and asked for again without. UserError for a file of something else.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data[:data.rfind(b"\n") + 1]
    try:
        texts = {line["key"]: line["text"] for line in map(json.loads, whole.splitlines())}
    except (ValueError, TypeError, KeyError):
        texts = {}
    if data and not texts:
        raise UserError(f"{path} is damaged, or no file of a writer's answers: move it away")
    if whole != data:  # a kill tore the last line
        os.truncate(path, len(whole))

    def write(conversations, on_result=lambda i, text: None):
        seen = defaultdict(itertools.count)
        digests = [hashlib.sha256(json.dumps(c, sort_keys=True).encode()).hexdigest() for c in conversations]
        keys = [f"{digest}-{next(seen[digest])}" for digest in digests]

        def keep(i, text):
            if text is not None or failures:
                texts[keys[i]] = text
                file.write(json.dumps({"key": keys[i], "text": text}) + "\n")
            on_result(i, text)

        missing = [None if key in texts else c for key, c in zip(keys, conversations)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", buffering=1) as file:  # each line is written at once
            writer(missing, keep)
        return [texts.get(key) for key in keys]

    return write


def first_json(text: str) -> dict | list | None:
    """The first JSON object or array in an answer, behind its chain of thought; None if there is none."""
    decoder, end, thought = json.JSONDecoder(strict=False), 0, text.find("</think>")  # models write raw line breaks
    with suppress(RecursionError):  # what is nested so deep is no label
        for bracket in re.finditer(r"[\[{]", text):
            with suppress(ValueError):
                if bracket.start() >= end:
                    value, end = decoder.raw_decode(text, bracket.start())
                    if end > thought:  # a "</think>" inside of the value is a quotation
                        return value
    return None
