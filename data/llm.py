"""Language models that write or grade text for us, as functions of one shape (`LLM`).

They serve as teacher, evaluator, reviser, verifier, labeller. `http_llm` asks any OpenAI-compatible
server (vLLM, SGLang, `transformers serve`, llama.cpp); `cached` keeps every answer in a file, so
that a killed run pays for none twice; `first_json` finds the label in an answer.
"""
from settings import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, Seed, TopP

import asyncio
import functools
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated

import httpx2
from tqdm import tqdm

from common import UserError, progress_bar
from untrusted import mask_secrets, printable

# llm(conversations[, on_result]): a text for each conversation (a list of {"role", "content"}), in
# their order. It is None where there was no usable answer, and where None stands in a
# conversation's place: the others keep their numbers, on which the random draws depend.
# on_result(number, text) is called with each as it comes.
LLM = Callable[..., list[str | None]]

# Bytes of an answer, and so many more for each token that it may have: one without end must not
# fill the memory, in which parsed JSON takes 28 times its length.
MAX_BODY, TOKEN_BYTES = 4 << 20, 256
MAX_WAIT = 120       # seconds before a retry, whatever the server asks for
SECRET_LENGTH = 8    # of a key, from which it is one: "EMPTY" and the like are words of texts
BACKOFF = 1.0        # seconds before the first retry, twice as many before each further one
N_REASONS = 3        # failed answers of which the reason is shown
MAX_FAILED = 8       # failed answers, beyond as many as come, at which a run stops


@dataclass
class LLMConfig:
    """An OpenAI-compatible endpoint and how it is asked."""
    url: str = "http://localhost:8000/v1"  # of the server; /chat/completions and /models follow it
    model: str = ""              # its name on the server (default: the first that the server has)
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; never the key
    temperature: NonNegativeFloat = 0.6  # of sampling
    top_p: TopP = 0.95           # nucleus
    max_tokens: PositiveInt = 4096  # of an answer; one that is cut off there is none
    timeout: PositiveFloat = 600.0  # seconds for one try, from the connection to the last byte
    retries: Annotated[int, Bounds(0, 100)] = 4  # further tries after what may pass: lost
                                 # connections, timeouts, 429, 5xx, nonsense
    concurrency: Annotated[int, Bounds(1, 10_000)] = 16  # requests in flight
    seed: Seed = 0               # a conversation is sent this plus its number, so that drafts of
                                 # one prompt differ
    extra: dict = field(default_factory=dict)  # further fields of a request

    def __post_init__(self):
        self.url = self.url.strip().rstrip("/").removesuffix("/chat/completions")
        if re.search("[@?]", self.url):
            raise ValueError("url must not hold a password or a key, which would be saved with the "
                             "settings: put the key in the environment variable that api_key_env "
                             "names")
        if not re.fullmatch(r"https?://[!-~]+", self.url):
            raise ValueError(f"url must be like http://localhost:8000/v1, not {self.url!r}")


class NoAnswer(UserError):
    """Why a request got no usable answer.

    kind: "passing" (asked again), "down", "refused" or "truncated". wait: seconds that the server
    wants between this try and the next.
    """

    def __init__(self, why: str, kind: str = "passing", wait: float = 0.0):
        super().__init__(why)
        self.kind, self.wait = kind, wait


def ignore_result(number: int, text: str | None) -> None:
    """The on_result of one who waits for all texts."""


# --------------------------------------------------------------------------------------------------
# An endpoint

def http_llm(cfg: LLMConfig, read: Callable | None = None) -> LLM:
    """A model behind an endpoint, which is sent many requests at a time.

    In a conversation's place may stand a text to be continued. read(answer): another result than
    the text of it all. Failed answers are counted on stderr, with some reasons.

    UserError: it is down, refuses key, model or url, or fails with 8 more than it answers (or all,
    but by truncation).
    """
    def llm(conversations: list, on_result: Callable = ignore_result) -> list[str | None]:
        return asyncio.run(_ask_all(cfg, conversations, on_result, read or _text))

    return llm


async def _ask_all(cfg: LLMConfig, conversations: list, on_result: Callable,
                   read: Callable) -> list[str | None]:
    """What `read` makes of the answer to each conversation, None for those without."""
    numbers = [i for i, conversation in enumerate(conversations) if conversation is not None]
    texts = [None] * len(conversations)
    failures = []
    slots = asyncio.Semaphore(cfg.concurrency)

    async def answer(i: int):
        """(i, text, error), of which one is None."""
        path = "/completions" if isinstance(conversations[i], str) else "/chat/completions"
        body = _request_body(cfg, model, i, conversations[i])
        async with slots:
            try:
                return i, await ask(cfg, client, path, read, body), None
            except Exception as error:  # for the loop below
                return i, None, error

    async with open_client() as client:
        model = cfg.model
        if numbers and not model:
            model = await ask(cfg, client, "/models", first_model)
        tasks = [asyncio.create_task(answer(i)) for i in numbers]
        answers = progress_bar(asyncio.as_completed(tasks), desc="llm", total=len(tasks),
                               unit=" texts", delay=5)
        for n_done, finished in enumerate(answers, 1):
            i, text, error = await finished
            if isinstance(error, NoAnswer) and error.kind != "down":
                failures.append(error)
                if len(failures) <= N_REASONS:
                    tqdm.write(f"no answer to conversation {i}: {error}", file=sys.stderr)
            elif error:
                raise error  # and asyncio.run cancels the other tasks
            texts[i] = text
            on_result(i, text)
            _check_failures(failures, n_done, len(tasks))
    if failures:
        tqdm.write(f"warning: {len(failures)} of {len(tasks)} conversations got no usable answer",
                   file=sys.stderr)
    return texts


def _check_failures(failures: list[NoAnswer], n_done: int, n_asked: int) -> None:
    """UserError where most or all of the answers fail."""
    n_good = n_done - len(failures)
    all_failed = len(failures) == n_asked and failures[0].kind != "truncated"
    if all_failed or len(failures) - n_good >= MAX_FAILED:
        raise UserError(f"{len(failures)} of {n_done} conversations got no usable answer, "
                        f"the first: {failures[0]}")


def _request_body(cfg: LLMConfig, model: str, number: int, conversation: list | str) -> dict:
    """The JSON of a request for one conversation, or for a text to be continued."""
    body = {"model": model}
    if isinstance(conversation, str):
        body["prompt"] = conversation
    else:
        body["messages"] = conversation
    body["temperature"] = cfg.temperature
    body["top_p"] = cfg.top_p
    body["max_tokens"] = cfg.max_tokens
    body["seed"] = cfg.seed + number
    return body | cfg.extra


def open_client() -> httpx2.AsyncClient:
    """For many requests at a time; how long one may take is for `ask`."""
    timeout = httpx2.Timeout(None, connect=10)
    return httpx2.AsyncClient(timeout=timeout, limits=httpx2.Limits(max_connections=None))


async def ask(cfg: LLMConfig, client: httpx2.AsyncClient, path: str, read: Callable,
              body: dict | None = None):
    """What `read` makes of the endpoint's JSON, asked again while that may help.

    NoAnswer for this request, or UserError for all. Without body it is a GET.
    """
    key = _read_key(cfg)
    for attempt in range(cfg.retries + 1):
        try:
            status, headers, answer = await _request(cfg, client, key, path, body)
            return _read_answer(cfg, key, read, status, headers, answer)
        except NoAnswer as error:
            if error.kind in ("refused", "truncated") or attempt == cfg.retries:
                raise
            backoff = min(60, BACKOFF * 2 ** attempt) * random.uniform(0.5, 1.5)
            if error.wait > 10:
                asked_for = f"{cfg.url} asks for a pause of {error.wait:,.0f} s"
                _say_once(f"{asked_for}; trying again after {min(error.wait, MAX_WAIT):,.0f} s")
            await asyncio.sleep(max(min(error.wait, MAX_WAIT), backoff))


def _read_key(cfg: LLMConfig) -> str:
    """The key in the environment, "" for none; UserError, without it, where no header can hold
    it."""
    key = "".join(os.environ.get(cfg.api_key_env, "").split())
    for number, sign in enumerate(key, 1):
        if not "!" <= sign <= "~":
            raise UserError(f"the key in the environment variable {cfg.api_key_env} is no key: its "
                            f"sign number {number} is U+{ord(sign):04X}, which keys do not have; "
                            "copy it again")
    return key


@functools.cache
def _say_once(line: str) -> None:
    """Says a line on stderr, unless it has been said."""
    tqdm.write(line, file=sys.stderr)


def _count_tokens(body: dict) -> int:
    """How many an answer may have, those of the prompt that it tells the likeliest of included."""
    return body.get("max_tokens", 0) + body.get("prompt_logprobs", 0) * len(body.get("prompt", ""))


async def _request(cfg: LLMConfig, client: httpx2.AsyncClient, key: str, path: str,
                   body: dict | None) -> tuple[int, dict, bytes]:
    """(status, headers, body, or its beginning where it is too long) of one HTTP request."""
    url = cfg.url + path
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    method = "GET" if body is None else "POST"
    most = MAX_BODY + TOKEN_BYTES * _count_tokens(body or {})
    received = bytearray()
    try:
        async with asyncio.timeout(cfg.timeout):  # of it all: a dribble never exceeds a read's
            async with client.stream(method, url, json=body, headers=headers) as response:
                async for piece in response.aiter_bytes(1 << 16):
                    received += piece
                    if len(received) > most:
                        break
                return response.status_code, response.headers, bytes(received)
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL,
            httpx2.UnsupportedProtocol) as error:
        raise NoAnswer(f"cannot connect to {cfg.url} ({_shown(error)}): does the server run there?",
                       "down") from None
    except TimeoutError:
        raise NoAnswer(f"{cfg.url}: no whole answer in {cfg.timeout:g} s (timeout)") from None
    except (httpx2.HTTPError, OSError) as error:
        raise NoAnswer(f"{cfg.url}: lost the connection ({_shown(error)})") from None


def _shown(error: Exception) -> str:
    """An error that may quote what a server said, or the address of a proxy with its password."""
    return printable(mask_secrets(repr(error)))


def _read_answer(cfg: LLMConfig, key: str, read: Callable, status: int, headers: dict,
                 answer: bytes):
    """What `read` makes of an answer; NoAnswer or UserError where it is none."""
    if len(key) >= SECRET_LENGTH:
        answer = answer.replace(key.encode(), b"***")  # keys get echoed
    shown = f"HTTP {status} from {cfg.url}: {printable(answer.decode('utf-8', 'replace'))!r}"
    _check_status(cfg, status, headers, shown)
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return read(json.loads(answer or b"null"))
    raise NoAnswer(f"nothing usable in {shown}")


def _check_status(cfg: LLMConfig, status: int, headers: dict, shown: str) -> None:
    """NoAnswer or UserError for what an HTTP status beyond 200 to 299 means."""
    if 200 <= status < 300:
        return
    if status in (408, 409, 429) or status >= 500:
        raise NoAnswer(shown, wait=_seconds_of(headers.get("Retry-After", "")))
    if status in (400, 413, 422):  # one conversation may be too long
        raise NoAnswer(shown, "refused")
    raise UserError(f"{shown}; check the url (most end in /v1), the model "
                    f"(`curl {cfg.url}/models` lists them) and the key in the environment "
                    f"variable {cfg.api_key_env}")


def _seconds_of(retry_after: str) -> float:
    """What a Retry-After header asks for: seconds, or a date; 0 where it is neither."""
    if re.fullmatch("[0-9]{1,9}", retry_after):
        return int(retry_after)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def first_model(answer: dict) -> str:
    """The name of the first model that a server lists."""
    name = answer["data"][0]["id"]
    if not isinstance(name, str) or name != printable(name):
        raise ValueError("no name")
    return name


def _text(answer: dict) -> str:
    """The text of a chat completion that came to its end."""
    choice = answer["choices"][0]
    if choice.get("finish_reason") == "length":  # half a chain of thought is nothing to train on
        raise NoAnswer("truncated at max_tokens", "truncated")
    if not choice["message"]["content"].strip():
        raise ValueError("empty")
    return chat_form(choice["message"])


def chat_form(message: dict) -> str:
    """The text of an answer in our chat form.

    A chain of thought that the server split off is put back.
    """
    text = message["content"] or ""
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str):
        reply = text.lstrip("\n")
        text = "<think>\n" + thought.strip("\n")
        if reply.strip():
            text += "\n</think>\n\n" + reply
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # no lone surrogates


# --------------------------------------------------------------------------------------------------
# Answers on disk, and what stands in them

def cached(llm: LLM, path: Path, failures: bool = False) -> LLM:
    """The model, with each answer kept in a JSON Lines file as it comes, and never asked for again.

    The key is the conversation and how many equal ones stand before it in the batch: each of n
    drafts has its own. The model's settings are not in it: give each model its own file. None (an
    answer that was cut off) is only kept with failures, and asked for again without. UserError for
    a file of something else.
    """
    texts = _read_cache(path)

    def cached_llm(conversations: list, on_result: Callable = ignore_result) -> list[str | None]:
        keys = _cache_keys(conversations)

        def keep(i: int, text: str | None) -> None:
            if text is not None or failures:
                texts[keys[i]] = text
                file.write(json.dumps({"key": keys[i], "text": text}) + "\n")
            on_result(i, text)

        missing = [None if key in texts else conversation
                   for key, conversation in zip(keys, conversations)]
        path.parent.mkdir(parents=True, exist_ok=True)
        # each line is written at once; what was asked and said is nobody else's
        with open(path, "a", buffering=1, opener=_private) as file:
            llm(missing, keep)
        return [texts.get(key) for key in keys]

    return cached_llm


def _private(path: str, flags: int) -> int:
    """An opener for open(): a new file is for its owner alone."""
    return os.open(path, flags, 0o600)


def _read_cache(path: Path) -> dict[str, str | None]:
    """{key: text} of a file of answers, without a last line that a kill tore, which is cut off."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[:data.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        texts = {line["key"]: line["text"] for line in lines}
    except (ValueError, TypeError, KeyError):
        texts = {}
    is_ours = b'{"key": '.startswith(data[:8])  # a torn first line is all of it
    if not is_ours or (whole and not texts):
        raise UserError(f"{path} is damaged, or no file of a model's answers: move it away")
    if whole != data:
        os.truncate(path, len(whole))
    return texts


def _cache_keys(conversations: list) -> list[str]:
    """Of each conversation its hash, and how many equal ones stand before it."""
    n_before = Counter()
    keys = []
    for conversation in conversations:
        text = json.dumps(conversation, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        keys.append(f"{digest}-{n_before[digest]}")
        n_before[digest] += 1
    return keys


def first_json(text: str) -> dict | list | None:
    """The first JSON object or array in an answer, behind its chain of thought; None without."""
    decoder = json.JSONDecoder(strict=False)  # models write raw line breaks
    thought_end = text.find("</think>")
    value_end = 0
    for bracket in re.finditer(r"[\[{]", text):
        if bracket.start() < value_end:  # inside of the last value
            continue
        try:
            value, value_end = decoder.raw_decode(text, bracket.start())
        except ValueError:
            continue
        except RecursionError:  # what is nested so deep is no label
            return None
        if value_end > thought_end:  # a "</think>" inside of the value is a quotation
            return value
    return None
