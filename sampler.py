"""Who answers prompts of token ids: generate.py in this process, or vLLM servers beside it.

A phase has one sampler: `update(model, step)` gives it the weights of now, and `sample(prompts, …)`
yields {place of a prompt: its n Samples} as they come; `pieces(…)` cuts work for the ranks. Servers
are sent token ids and return ids, so that nothing is decoded and encoded again; docs/SCALING.md
says how they are started.

Shapes: K likeliest tokens of the probe, V vocabulary.
"""
from settings import from_dict

import asyncio
import itertools
import queue
import shutil
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import generate
import hf
from common import UserError, progress_bar
from generate import Sample

# A row that ends is taken by the next sample of its piece, and only a piece's last rows are left
# alone; but a run that is killed loses the piece that it was at. Our choice
PIECE_FILLS = 4  # how often a piece fills the rows that are decoded together


class Embedded:
    """generate.sample with a plain copy of the weights, in this process: the default."""

    def __init__(self, model=None):
        self.model = model  # a plain module (common.unsharded_copy)

    def update(self, model, step: int) -> None:
        """Answers are by this model from now on: the policy after `step` steps."""
        self.model = model

    def pieces(self, items: Sequence[int], done: Collection[int], n: int, max_rows: int,
               dist: common.Dist) -> list[Sequence[int]]:
        """What the ranks are handed out: pieces of the items, but for those that are all done."""
        return fixed_pieces(items, done, n, PIECE_FILLS * max_rows, dist)

    def sample(self, prompts: list[list[int]], n: int = 1, *, max_rows: int = 256,
               numbers: Sequence[int] | None = None,
               **settings) -> Iterator[dict[int, list[Sample]]]:
        """Yields {place of a prompt: its n Samples}, max_rows // n prompts at a time, as they end.

        The arguments are those of generate.sample.
        """
        if numbers is None:
            numbers = range(len(prompts))
        places = {number: place for place, number in enumerate(numbers)}
        answers = generate.sample_as_completed(
            self.model, zip(numbers, prompts, strict=True), n, max_rows=max_rows, **settings)
        whole = {}
        bar = progress_bar(total=len(prompts) * n, desc="samples", unit=" answers", delay=10,
                           leave=False)
        with bar:
            for number, samples in answers:
                bar.update(n)
                whole[places[number]] = samples
                if len(whole) == max(1, max_rows // n):
                    yield whole
                    whole = {}
            if whole:
                yield whole


def fixed_pieces(items: Sequence[int], done: Collection[int], n: int, max_rows: int,
                 dist: common.Dist) -> list[Sequence[int]]:
    """What is handed out to the ranks: pieces of some problems, without those that are done.

    A problem's piece is the same whatever is done, since what is decoded together is rounded
    together. n: samples of each problem; max_rows: of a piece.
    """
    size = dist.piece_size(len(items), n, max_rows)
    return [piece for piece in common.cut(items, size) if not set(piece).issubset(done)]


def share_missing(items: Sequence[int], done: Collection[int],
                  dist: common.Dist) -> list[list[int]]:
    """A piece for each rank, of the problems that are not done."""
    missing = [item for item in items if item not in done]
    return [missing[rank::dist.world] for rank in range(min(dist.world, len(missing)))]


def in_order(batches: Iterable[dict]) -> list:
    """What batches of {place: value} hold, by place."""
    values = {}
    for batch in batches:
        values |= batch
    return [values[place] for place in sorted(values)]


def open_sampler(urls: list[str], run, folder: str = ""):
    """The sampler of a phase's run (loop.Run): servers at these URLs or, without any, Embedded.

    folder: for the weights that the servers get (default: in the run's).
    """
    if not urls:
        return Embedded()
    weights = Path(folder or run.folder / "served")
    return Served(urls, run.dist, run.tokenizer, weights, getattr(torch, run.cfg.dtype))


def open_checkpoint(source: Path, urls: list[str], dist: common.Dist, dtype: torch.dtype,
                    folder: Path | None = None):
    """(sampler, tokenizer) of a checkpoint: its model in this process, or servers at these URLs.

    folder: for its weights, which the servers get; without it they must have them, or UserError.
    All ranks call it.
    """
    if not urls:
        model, tokenizer = hf.load(source, dist.device, dtype, checked=True)
        return Embedded(model), tokenizer
    tokenizer = hf.load_tokenizer(source)
    sampler = Served(urls, dist, tokenizer, folder, dtype)
    model = hf.load(source, "cpu", dtype, checked=True)[0] if dist.is_main else None
    if folder is None:
        sampler.expect(model)
    else:
        sampler.update(model, 0)
    return sampler, tokenizer


# --------------------------------------------------------------------------------------------------
# vLLM servers

TIMEOUT = 7200.0      # seconds of one answer: it may have 32,000 tokens, and many before it in line
SAME_REQUEST = 5      # failures of one request, by servers that run, at which a phase stops
LONGEST_PAUSE = 60.0  # seconds between two looks at a server that is away
PROBE_TOKENS = 1024   # of the prompt that weights are checked with: some blocks of a prefix cache
PROBE_TOP = 20        # likeliest next tokens of it that are compared: vLLM gives no more unasked
PROBE_TEMPERATURE = 0.5  # not 1: so that log-probabilities before temperature show
# The largest mean difference of the probe's log-probabilities that is rounding: our choice
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass
class Server:
    """A server as one process sees it."""
    url: str
    cfg: object           # data.llm.LLMConfig: how it is asked
    model: str = ""       # its name there
    n_asked: int = 0      # requests in flight
    was_reached: bool = False
    return_of: asyncio.Task | None = None  # until when nothing is asked of it


class Served:
    """vLLM servers: one answer a request, `max_rows` of them in flight from each process.

    The draws of an answer depend on (seed, prompt's number, sample's number); that they give the
    same tokens again no server promises. A server that goes away is waited for, gets the present
    weights, and what it owed is asked again; what came is never asked twice.
    """

    def __init__(self, urls: list[str], dist: common.Dist, tokenizer=None,
                 folder: Path | None = None, dtype: torch.dtype = torch.bfloat16):
        """folder: for weights, which the servers must see under the same path; dtype: theirs."""
        from data import llm  # only who asks a server waits for its client

        self.llm = llm
        self.dist, self.tokenizer, self.folder, self.dtype = dist, tokenizer, folder, dtype
        self.servers = []
        for url in urls:
            settings = {"url": url.rstrip("/").removesuffix("/v1"), "retries": 0,
                        "timeout": TIMEOUT}
            cfg = from_dict(llm.LLMConfig, settings, "servers")
            self.servers.append(Server(cfg.url, cfg))
        self.step = None      # whose weights the servers have; None: those that they started with
        self.weights = None   # folder of them
        self.probe = None     # what the trainer says of them

    # ---- weights

    def update(self, model, step: int) -> None:
        """Gives all servers these weights, of the policy after `step` steps; all ranks call it.

        UserError where a server's log-probabilities are not the model's afterwards.
        """
        if step == self.step:
            return
        self.dist.wait()  # for the answers that others still wait for
        self.step = step
        self.weights = (self.folder / f"weights_{step:08d}").resolve()
        self.probe = self.dist.from_main(lambda: self._publish(model))

    def _publish(self, model) -> "Probe":
        shutil.rmtree(self.weights, ignore_errors=True)  # of a run that was killed
        hf.export(hf.untie(model), self.tokenizer, self.weights, self.dtype)
        self.probe = make_probe(model, self.tokenizer.n_vocab, TOLERANCE[self.dtype])
        asyncio.run(self._on_all(self._load))
        for path in self.weights.parent.glob("weights_*"):
            if path != self.weights:
                shutil.rmtree(path)
        return self.probe

    def expect(self, model) -> None:
        """UserError where the servers have other weights than the model; all ranks call it."""
        def check() -> Probe:
            self.probe = make_probe(model, self.tokenizer.n_vocab, TOLERANCE[self.dtype])
            asyncio.run(self._on_all(self._check))
            return self.probe

        self.probe = self.dist.from_main(check)

    async def _on_all(self, do) -> None:
        """do(server, client) with each server; one that is away is waited for."""
        async with self._client() as client:
            for server in self.servers:
                try:
                    await do(server, client)
                except self.llm.NoAnswer as error:
                    self._lose(server, client, error)
                    await server.return_of

    async def _load(self, server: Server, client) -> None:
        """Puts the present weights into a server, and checks that it has them.

        Between pause and resume, which also empties the cache of prefixes: what is in it was
        computed by the weights before.
        """
        await self._command(server, client, "/pause?mode=wait", {})
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights)}}
        await self._command(server, client, "/collective_rpc", order)
        await self._command(server, client, "/reset_prefix_cache", {})
        version = {"new_version": str(self.weights)}
        await self._command(server, client, "/update_weight_version", version)
        await self._command(server, client, "/resume", {})
        await self._check(server, client)

    async def _command(self, server: Server, client, path: str, body: dict) -> None:
        try:
            await self.llm.ask(server.cfg, client, path, read_nothing, body)
        except self.llm.NoAnswer:
            raise
        except UserError as error:
            raise UserError(f"{error}. Weights are sent to servers that were started with "
                            "VLLM_SERVER_DEV_MODE=1 in the environment") from None

    async def _check(self, server: Server, client) -> None:
        """UserError where a server's log-probabilities are not those of the trainer."""
        difference = await self._difference(server, client)
        if difference > self.probe.tolerance:
            of_step = "" if self.step is None else f" of step {self.step}"
            raise UserError(
                f"{server.url} has other weights than the policy{of_step}: its log-probabilities "
                f"differ by {difference:.3g} on the mean ({self.probe.tolerance:g} would be "
                "rounding). Does it run with --logprobs-mode processed_logprobs, this model's "
                f"shape, and --dtype {str(self.dtype).removeprefix('torch.')}; can it read "
                f"{self.weights or 'this checkpoint'}?")

    async def _difference(self, server: Server, client) -> float:
        """The mean difference of the probe's log-probabilities: a server's to the trainer's."""
        body = request(self.probe.prompt, 1, PROBE_TEMPERATURE)
        body |= {"logprobs": PROBE_TOP, "return_tokens_as_token_ids": True}
        found = await self._complete(server, client, body, read_top)
        differences = [abs(logprob - self.probe.logprobs[i]) for i, logprob in found.items()]
        return float(np.mean(differences))

    # ---- answers

    def pieces(self, items: Sequence[int], done: Collection[int], n: int, max_rows: int,
               dist: common.Dist) -> list[Sequence[int]]:
        """One piece for each rank: all that is not done is asked at once."""
        return share_missing(items, done, dist)

    def sample(self, prompts: list[list[int]], n: int = 1, *, max_new_tokens: int = 128,
               temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
               stop: tuple[int, ...] = (), seed: int = 0, max_rows: int = 256,
               numbers: Sequence[int] | None = None) -> Iterator[dict[int, list[Sample]]]:
        """Yields {place of a prompt: its n Samples}, max_rows // n prompts at a time, as they come.

        All is asked for at once, by a thread of its own, before this returns. The arguments are
        those of generate.sample.
        """
        if numbers is None:
            numbers = range(len(prompts))

        def requests() -> Iterator[tuple]:
            for place, j in itertools.product(range(len(prompts)), range(n)):
                draw = np.random.default_rng([seed, numbers[place], j]).integers(2**31)
                body = request(prompts[place], max_new_tokens, temperature)
                body |= {"top_p": top_p, "top_k": top_k or -1, "stop_token_ids": list(stop)}
                yield place, j, body | {"seed": int(draw)}, read_sample(max_new_tokens, stop)

        return self._ask(requests(), len(prompts), n, max_rows)

    def score(self, sequences: list[tuple[list[int], list[int]]], k: int,
              max_rows: int = 256) -> Iterator[dict[int, list["Scores"]]]:
        """Yields {place of a (prompt, response): [Scores of the response's tokens]}, as they come.

        k: likeliest tokens of each place; more than 20 need `vllm serve --max-logprobs`.
        """
        def requests() -> Iterator[tuple]:
            for place, (prompt, response) in enumerate(sequences):
                body = request(prompt + response, 1, 1.0) | {"prompt_logprobs": k}
                yield place, 0, body, read_scores(response, k)

        return self._ask(requests(), len(sequences), 1, max_rows)

    def _ask(self, requests: Iterator[tuple], n_prompts: int, n: int,
             max_rows: int) -> Iterator[dict[int, list]]:
        """The answers to requests, each (place, sample's number, body, how it is read)."""
        answers, ended = queue.SimpleQueue(), threading.Event()
        work = self._ask_all(requests, max_rows, answers, ended)
        threading.Thread(target=asyncio.run, args=(work,), daemon=True).start()
        return arrivals(answers, ended, n_prompts, n, max(1, max_rows // n))

    async def _ask_all(self, requests: Iterator[tuple], n_workers: int,
                       answers: queue.SimpleQueue, ended: threading.Event) -> None:
        """Puts (place, sample's number, answer) of each request, or an exception, into `answers`.
        """
        async def work(client) -> None:
            for place, j, body, read in requests:
                answers.put((place, j, await self._answer(client, body, read)))
                if ended.is_set():
                    return

        try:
            async with self._client() as client, asyncio.TaskGroup() as group:
                for _ in range(n_workers):
                    group.create_task(work(client))
        except* Exception as errors:
            answers.put(errors.exceptions[0])

    async def _answer(self, client, body: dict, read):
        """The answer to one request, from whichever server has least to do."""
        n_failures = 0
        while True:
            server = await self._free_server()
            server.n_asked += 1
            try:
                return await self._complete(server, client, body, read)
            except self.llm.NoAnswer as error:
                if server.return_of is None and error.kind != "down":  # the server runs
                    n_failures += 1
                if n_failures == SAME_REQUEST:
                    raise UserError(str(error)) from None
                self._lose(server, client, error)
            finally:
                server.n_asked -= 1

    async def _free_server(self) -> Server:
        """The server with the fewest requests; where all are away, the first that is back."""
        while True:
            away = [server.return_of for server in self.servers if server.return_of]
            for task in away:
                if task.done():  # it did not come back
                    task.result()
            here = [server for server in self.servers if not server.return_of]
            if here:
                return min(here, key=lambda server: server.n_asked)
            await asyncio.wait(away, return_when=asyncio.FIRST_COMPLETED)

    async def _complete(self, server: Server, client, body: dict, read):
        if not server.model:
            server.model = await self.llm.ask(
                server.cfg, client, "/v1/models", self.llm.first_model)
            server.was_reached = True
        body = {"model": server.model} | body
        return await self.llm.ask(server.cfg, client, "/v1/completions", read, body)

    # ---- servers that go away

    @asynccontextmanager
    async def _client(self):
        """A client; at its end nobody waits for a server any more."""
        async with self.llm.open_client() as client:
            try:
                yield client
            finally:
                for server in self.servers:
                    if server.return_of:
                        server.return_of.cancel()
                    server.return_of = None

    def _lose(self, server: Server, client, error: Exception) -> None:
        """Asks nothing more of a server that failed, until it is back with the present weights."""
        if error.kind == "refused" or not server.was_reached:  # waiting would not help
            raise UserError(str(error)) from None
        if server.return_of is None:
            server.return_of = asyncio.create_task(self._return(server, client))

    async def _return(self, server: Server, client) -> None:
        """Waits until a server is there again, and gives it the present weights if it needs them.
        """
        pause = self.llm.BACKOFF
        is_first = True
        while True:
            await asyncio.sleep(pause)
            try:
                if await self._has_other_weights(server, client):
                    await self._load(server, client)
                break
            except self.llm.NoAnswer as error:
                if error.kind == "refused":
                    raise UserError(str(error)) from None
                if is_first:
                    say(f"waiting for {server.url}: {error}")
                is_first = False
                pause = min(LONGEST_PAUSE, 2 * pause)
        if not is_first:
            say(f"{server.url} is back; what it owed is asked again")
        server.return_of = None

    async def _has_other_weights(self, server: Server, client) -> bool:
        if self.probe is None:  # nobody knows, and nobody has sent it others
            await self.llm.ask(server.cfg, client, "/v1/models", self.llm.first_model)
            return False
        if self.weights is None:  # sent by nobody: what it started with must be right
            await self._check(server, client)
            return False
        version = await self.llm.ask(server.cfg, client, "/weight_info", read_version)
        if version != str(self.weights):  # by one small step they differ less than by rounding
            return True
        return await self._difference(server, client) > self.probe.tolerance


def say(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# What is asked, and what comes


def request(prompt: list[int], max_new_tokens: int, temperature: float) -> dict:
    """The fields of a request, of which nothing is left to the server's generation config."""
    return {
        "prompt": prompt,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,  # stop_token_ids say what ends an answer
        "logprobs": 0,       # of the token that was drawn alone
        "return_token_ids": True,
    }


def read_sample(max_new_tokens: int, stop: Collection[int]):
    """How the answer to a request is read: a Sample, or ValueError for one that was cut."""
    def read(answer: dict) -> Sample:
        choice = answer["choices"][0]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        end = "stop" if tokens[-1] in stop else "length"
        if not len(tokens) == len(logprobs) <= max_new_tokens or choice["finish_reason"] != end:
            raise ValueError("cut")
        return Sample(tokens, [float(logprob) for logprob in logprobs], end)

    return read


@dataclass
class Scores:
    """What a server says of the N tokens of a response."""
    ids: np.ndarray        # (N, K) of the likeliest tokens in each place, the first the likeliest
    logprobs: np.ndarray   # (N, K) theirs
    total: float           # the sum of those of the response's own tokens


def read_scores(response: list[int], k: int):
    """How the answer to a request for Scores is read."""
    def read(answer: dict) -> Scores:
        places = answer["choices"][0]["prompt_logprobs"][-len(response):]
        ids, logprobs, total = [], [], 0.0
        for token, place in zip(response, places, strict=True):
            ranked = sorted(place.items(), key=lambda item: item[1]["rank"])[:k]
            ids.append([int(i) for i, _ in ranked])
            logprobs.append([entry["logprob"] for _, entry in ranked])
            total += place[str(token)]["logprob"]
        return Scores(np.array(ids), np.array(logprobs), total)

    return read


def read_top(answer: dict) -> dict[int, float]:
    """{id: log-probability} of the likeliest tokens in the first place of an answer."""
    (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    return {int(name.removeprefix("token_id:")): logprob for name, logprob in top.items()}


def read_version(answer: dict) -> str:
    """What a server calls its weights."""
    return answer["weight_version"]


def read_nothing(answer: object) -> None:
    """A command's answer, whatever it is."""


def arrivals(answers: queue.SimpleQueue, ended: threading.Event, n_prompts: int, n: int,
             batch: int) -> Iterator[dict[int, list[Sample]]]:
    """Yields {place of a prompt: its n Samples}, `batch` at a time, of what `answers` gets.

    ended: is set when nobody waits for more.
    """
    waiting, whole = {}, {}
    bar = progress_bar(total=n_prompts * n, desc="servers", unit=" answers", delay=10)
    try:
        for _ in range(n_prompts * n):
            answer = answers.get()
            if isinstance(answer, Exception):
                raise answer
            place, j, sample = answer
            bar.update()
            samples = waiting.setdefault(place, {})
            samples[j] = sample
            if len(samples) == n:
                whole[place] = [samples[j] for j in range(n)]
                del waiting[place]
            if len(whole) == batch:
                yield whole
                whole = {}
        if whole:
            yield whole
    finally:
        ended.set()
        bar.close()


@dataclass
class Probe:
    """A prompt, and what the trainer says of the token after it."""
    prompt: list[int]
    logprobs: list[float]  # (V,), at PROBE_TEMPERATURE
    tolerance: float       # of their mean difference to another program's


@torch.no_grad()
def make_probe(model, n_vocab: int, tolerance: float) -> Probe:
    """A prompt of random tokens, long enough for a prefix cache, under a plain module."""
    length = min(PROBE_TOKENS, model.cfg.max_context - 8)
    prompt = np.random.default_rng(0).integers(n_vocab, size=length).tolist()
    head = model.lm_head.weight
    hidden = model(torch.tensor([prompt], device=head.device))[0, -1]
    logits = (head @ hidden).float() / PROBE_TEMPERATURE
    return Probe(prompt, logits.log_softmax(-1).tolist(), tolerance)
