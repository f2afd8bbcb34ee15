"""Sampling with a KV cache, in batches: `sample()` for the phases; a command to complete or chat.

    python generate.py out/tiny/pretrain "Problem: "     # continue a text
    python generate.py out/tiny/pretrain                 # a prompt to type at; --chat for chat form

Shapes: R rows of the batch (prompts x samples), T time, V vocabulary.
"""
from settings import Count, NonNegativeFloat, NonNegativeInt, Seed, TopP, from_dict, option

import argparse
import collections
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import common
import hf
from data.chat import template
from data.tasks.problem import as_reply
from kernels.cross_entropy import wide_logits_of
from model import DecodeStep, KVCache, ModelConfig, Transformer

PASS_TOKENS = 2048  # of one pass of prompts, but for their padding: our choice
FREE_SHARE = 0.8  # of the free memory that `sample` gives to rows: our choice


@dataclass
class Sample:
    """One answer.

    tokens ends with the stop token where finish_reason is "stop" (the model chose it, so it is
    trained too). logprobs: log-probability of each token under the policy that it was drawn from,
    so after temperature, top-k and top-p; under the untempered model at temperature 0 (greedy).
    """
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"  # or "stop"


@dataclass
class Prompt:
    """A prompt whose samples are drawn."""
    number: int
    tokens: list[int]
    samples: list[Sample]
    n_running: int         # of its samples: those that have not ended
    prefix: tuple | None = None  # of its forward pass: (cache, row there, last hidden state (C,))


@dataclass
class Row:
    """Sample j of a prompt: a row of the batch while it is being drawn."""
    prompt: Prompt
    j: int
    draws: np.ndarray | None = None  # a random number for each token that it may get
    place: int = -1                  # in the cache; -1: not begun
    has_ended: bool = False

    @property
    def sample(self) -> Sample:
        return self.prompt.samples[self.j]

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.sample.tokens)

    @property
    def next_draw(self) -> float:
        if self.has_ended:
            return 0.0  # nobody looks at what is drawn
        return self.draws[len(self.sample.tokens)]

    def append(self, token: int, logprob: float, is_stop: bool) -> None:
        self.sample.tokens.append(token)
        self.sample.logprobs.append(logprob)
        if is_stop:
            self.sample.finish_reason = "stop"
        self.has_ended = is_stop or len(self.sample.tokens) == len(self.draws)


def sample(model: Transformer, prompts: list[list[int]], n: int = 1, max_new_tokens: int = 128,
           temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
           stop: tuple[int, ...] = (), seed: int = 0, max_rows: int = 256,
           numbers: list[int] | None = None) -> list[list[Sample]]:
    """A list of n Samples for each prompt; prompts are lists of token ids, of any lengths.

    numbers: of the prompts, where these are a part of more (default: their places here). The rest
    as in sample_as_completed.
    """
    if numbers is None:
        numbers = range(len(prompts))
    requests = zip(numbers, prompts, strict=True)
    samples = dict(sample_as_completed(
        model, requests, n, max_new_tokens, temperature, top_p, top_k, stop=stop, seed=seed,
        max_rows=max_rows))
    return [samples[number] for number in numbers]


def sample_as_completed(
        model: Transformer, requests: Iterable[tuple[int, list[int]]], n: int = 1,
        max_new_tokens: int = 128, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
        stop: tuple[int, ...] = (), seed: int = 0,
        max_rows: int = 256) -> Iterator[tuple[int, list[Sample]]]:
    """Yields (number, n Samples) of each prompt as soon as all n have ended.

    model: a plain, unsharded module (common.unsharded_copy). requests: (number, prompt as token
    ids), each number once. temperature 0 is greedy; top_p 1 and top_k 0 are off. Training rollouts
    leave both off: only then is the distribution sampled from the one in the loss. The draws of a
    row depend on (seed, prompt's number, sample's number) alone, not on what it is batched with.
    max_rows: decoded together at most, or as many as fit into the memory that is free.
    """
    prompts = []
    for number, tokens in requests:
        prompts.append(Prompt(number, tokens, [Sample() for _ in range(n)], n))
    longest = max((len(prompt.tokens) for prompt in prompts), default=0)
    if longest + max_new_tokens > model.cfg.max_context:
        warnings.warn("prompt and answer may be longer than the model's context, max_context = "
                      f"{model.cfg.max_context} tokens: what it writes beyond may make no sense")
    steps = decode(
        model, prompts, max_new_tokens, temperature, top_p, top_k, stop, seed, max_rows)
    for rows in steps:
        for row in rows:
            row.prompt.n_running -= row.has_ended
            if row.prompt.n_running == 0:
                yield row.prompt.number, row.prompt.samples


@torch.inference_mode()
def decode(model: Transformer, prompts: list[Prompt], max_new_tokens: int, temperature: float,
           top_p: float, top_k: int, stop: tuple[int, ...], seed: int,
           max_rows: int) -> Iterator[list[Row]]:
    """Fills the prompts' samples; yields at each step the rows that got a token.

    Continuous batching (Orca, OSDI 2022): each row has a length of its own, and rows that have
    ended give their places to the next ones as soon as they are an eighth of the batch.
    """
    check_settings(prompts, max_new_tokens, temperature, top_p, top_k)
    prompts = sorted(prompts, key=lambda prompt: -len(prompt.tokens))  # like lengths: less padding
    longest = max((len(prompt.tokens) for prompt in prompts), default=1)
    n_rows = count_rows(model, max_rows, longest, max_new_tokens)
    weight = model.embed_tokens.weight
    cache = KVCache(model.cfg, 0, longest + max_new_tokens, weight.device, weight.dtype)
    next_hidden = DecodeGraphs(model) if weight.is_cuda and cache.by_kernel else model.decode
    waiting = collections.deque(
        Row(prompt, j) for prompt in prompts for j in range(len(prompt.samples)))
    n_rows = min(n_rows, len(waiting))
    cache.reserve(n_rows, longest)
    rows = []                                                # by their places in the cache
    hidden = weight.new_empty(0, model.cfg.hidden_size)      # of each row's last token
    while True:
        running = [row for row in rows if not row.has_ended]
        n_places = n_rows if waiting else len(rows)  # with none waiting the batch only shrinks
        if len(running) <= n_places * 7 // 8:
            new = take_rows(waiting, n_rows - len(running), seed, max_new_tokens)
            run_prompts(model, [row.prompt for row in new])
            rows, hidden = rearrange(cache, running, new, hidden)
            running = rows
        if not rows:
            return

        logits = wide_logits_of(hidden, model.lm_head.weight).float()
        draws = torch.tensor([row.next_draw for row in rows]).to(logits.device)
        tokens, logprobs = sample_tokens(logits, temperature, top_p, top_k, draws)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            if not row.has_ended:
                row.append(token, logprob, token in stop)
        for row in running:
            if row.has_ended:
                cache.lengths[row.place] = 0
        yield running
        if not all(row.has_ended for row in rows):
            hidden = next_hidden(tokens[:, None], cache.next_step())[:, 0]


def check_settings(prompts: list[Prompt], max_new_tokens: int, temperature: float,
                   top_p: float, top_k: int) -> None:
    """Raises UserError for what cannot be sampled."""
    for name, value, is_right, needed in (
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
        ("top_k", top_k, top_k >= 0, "at least 0 (off)"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
    ):
        if not is_right:
            raise common.UserError(f"{name} must be {needed}, not {value}")
    if not all(prompt.tokens for prompt in prompts):
        raise common.UserError("an empty prompt cannot be continued: begin with the bos token")


def take_rows(waiting: collections.deque, n: int, seed: int, max_new_tokens: int) -> list[Row]:
    """The next rows: at most n, and no more than one pass of their prompts can take."""
    rows, n_tokens, prompt = [], 0, None
    while waiting and len(rows) < n:
        row = waiting[0]
        if row.prompt is not prompt and row.prompt.prefix is None:
            n_tokens += len(row.prompt.tokens)
        if rows and n_tokens > PASS_TOKENS:
            break
        prompt = row.prompt
        row.draws = uniforms(seed, prompt.number, row.j, max_new_tokens)
        rows.append(waiting.popleft())
    return rows


def uniforms(seed: int, number: int, j: int, n: int) -> np.ndarray:
    """The n random numbers, in [0, 1), of sample j of a prompt; number: the prompt's.

    One per token, which is drawn by inverting the CDF.
    """
    return np.random.default_rng([seed, number, j]).random(n)


def run_prompts(model: Transformer, prompts: list[Prompt]) -> None:
    """Fills in `prefix` where it is missing: one pass of each prompt for all its samples."""
    missing = {prompt.number: prompt for prompt in prompts if prompt.prefix is None}
    if not missing:
        return
    longest = max(len(prompt.tokens) for prompt in missing.values())
    weight = model.embed_tokens.weight
    cache = KVCache(model.cfg, 0, longest, weight.device, weight.dtype)
    padded = [prompt.tokens + [0] * (longest - len(prompt.tokens)) for prompt in missing.values()]
    hidden = model(torch.tensor(padded, device=weight.device), cache=cache)
    for i, prompt in enumerate(missing.values()):
        prompt.prefix = cache, i, hidden[i, len(prompt.tokens) - 1]


def rearrange(cache: KVCache, running: list[Row], new: list[Row],
              hidden: torch.Tensor) -> tuple[list[Row], torch.Tensor]:
    """(the rows by their new places, their hidden states): the cache holds these rows alone."""
    rows = place_rows(running, new, cache.PART)
    states, moved, begun = [], [], {}
    for place, row in enumerate(rows):
        if row.place < 0:
            prefix, i, state = row.prompt.prefix
            begun.setdefault(prefix, []).append((i, place))
        else:
            state = hidden[row.place]
            if row.place != place:
                moved.append((row.place, place))
        states.append(state)
    lengths = [row.length for row in rows]
    cache.reserve(max(len(rows), len(cache.lengths)), max(lengths, default=0))
    cache.copy(cache, moved)
    for prefix, copies in begun.items():
        cache.copy(prefix, copies)
    cache.lengths = lengths
    for place, row in enumerate(rows):
        row.place = place
        if row.j == len(row.prompt.samples) - 1:  # all of the prompt's samples have begun
            row.prompt.prefix = None
    return rows, torch.stack(states) if states else hidden


def place_rows(running: list[Row], new: list[Row], part: int) -> list[Row]:
    """The rows by new places: the longest `part` rows first, then the next ones, and so on.

    Attention reads each part to the length of its longest. A row that is in its part already stays
    where it is: so few have to be moved.
    """
    by_length = sorted(running + new, key=lambda row: -row.length)
    placed = []
    for first in range(0, len(by_length), part):
        members = by_length[first:first + part]
        places = range(first, first + len(members))
        stay = {row.place: row for row in members if row.place in places}
        come = [row for row in members if row.place not in places]
        placed += [stay[place] if place in stay else come.pop(0) for place in places]
    return placed


class DecodeGraphs:
    """model.decode on a GPU: a step of all layers is launched as one CUDA graph.

    A graph is captured for each number of rows in SIZES, anew where the cache has grown; other
    numbers are filled up with rows that nobody reads.
    """

    SIZES = 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256

    def __init__(self, model: Transformer):
        self.model, self.graphs, self.n_moves = model, {}, 0

    def __call__(self, tokens: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        n, cache = len(tokens), step.cache
        size = next((size for size in self.SIZES if size >= n), n)
        cache.reserve(size, 0)
        if cache.n_moves != self.n_moves:  # the graphs are of a cache that stood elsewhere
            self.graphs, self.n_moves = {}, cache.n_moves
        if size not in self.graphs:
            self.graphs[size] = self._capture(size, cache)
        graph, all_tokens, positions, hidden = self.graphs[size]
        all_tokens[:n], positions[:n] = tokens, step.positions
        graph.replay()
        return hidden[:n]

    def _capture(self, size: int, cache: KVCache) -> tuple:
        """(graph, its inputs tokens (size, 1) and positions (size,), its result (size, 1, C))."""
        device = cache.layers[0].device
        tokens = torch.zeros(size, 1, dtype=torch.int64, device=device)
        positions = torch.zeros(size, dtype=torch.int64, device=device)
        step = DecodeStep(cache, positions, [(slice(0, size), cache.layers[0].shape[3], None)])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.model.decode(tokens, step)  # compiles the kernels; capturing must not
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self.model.decode(tokens, step)
        return graph, tokens, positions, hidden


def row_bytes(cfg: ModelConfig, dtype: torch.dtype, prompt: int, new: int) -> int:
    """What a row of the batch takes at most: its cache, its part of a prompt's pass, its logits.

    prompt, new: tokens. logits: as sample_tokens has them at once, its float64 CDF and what top-p
    sorts.
    """
    cache = (prompt + new) * KVCache.bytes_per_token(cfg, dtype)
    return cache + prompt * pass_bytes_per_token(cfg, dtype) + 40 * cfg.vocab_size


def pass_bytes_per_token(cfg: ModelConfig, dtype: torch.dtype) -> int:
    """What a forward pass without gradients holds at its widest place, the MLP of a block."""
    return (3 * cfg.ffn_size + 4 * cfg.hidden_size) * dtype.itemsize


def rows_that_fit(model: Transformer, prompt: int, new: int) -> float:
    """How many rows fit into all the memory that is free; prompt, new: tokens of each."""
    weight = model.embed_tokens.weight
    return common.free_memory(weight.device) / row_bytes(model.cfg, weight.dtype, prompt, new)


def count_rows(model: Transformer, max_rows: int, prompt: int, new: int) -> int:
    """How many rows are decoded together; UserError where the memory is too small for one."""
    fitting = rows_that_fit(model, prompt, new)
    if fitting < 1:
        size = row_bytes(model.cfg, model.embed_tokens.weight.dtype, prompt, new) / 1e9
        raise common.UserError(
            f"a row of {prompt} + {new} tokens needs {size:.2f} GB, more than the GPU has free: "
            "lower max_new_tokens")
    return int(min(max_rows, max(1, FREE_SHARE * fitting)))


def decode_answer(tokens: list[int], tokenizer, prompt: Sequence[int] = ()) -> str:
    """The text of a sample's tokens, without those that end it.

    Behind a prompt that ends with <think>, as some chat templates do, it begins with <think>.
    """
    stop = tokenizer.stop_ids
    text = tokenizer.decode([token for token in tokens if token not in stop])
    end_of_prompt = tokenizer.decode(list(prompt[-16:]))
    return template.reopen_thoughts(end_of_prompt, text)


def sample_tokens(logits: torch.Tensor, temperature: float, top_p: float, top_k: int,
                  draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R,) and their log-probabilities (R,) from logits (R, V) and uniform draws (R,).

    Order as in transformers and vLLM: temperature, then top-k, then top-p (nucleus, arXiv
    1904.09751: the smallest set of most likely tokens whose probability reaches top_p).
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    vocab_size = logits.shape[-1]
    logits = logits / temperature
    if 0 < top_k < vocab_size:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        probs = ranked.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the tokens before it reach top_p already
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    probs = logits.softmax(-1)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    targets = draws[:, None] * cdf[:, -1:]          # the CDF's end is 1 but for rounding
    token = torch.searchsorted(cdf, targets, right=True).clamp_(max=vocab_size - 1)
    return token[:, 0], probs.gather(1, token)[:, 0].log()


@dataclass
class LocalLLM:
    """A language model on this machine that answers conversations, as data.llm.LLM says.

    It is loaded when first asked. An answer that does not end is None. Draws depend on (seed,
    number of the conversation) alone: a resumed batch repeats itself.
    """
    path: str                    # as in hf.load
    max_new_tokens: Count = 256
    temperature: NonNegativeFloat = 0.6
    top_p: TopP = 0.95
    seed: Seed = 0
    max_rows: Count = 256
    prompt_format: Literal["chat", "document"] = "chat"  # document: a base model, which gets the
                                                         # last message as a page

    def __post_init__(self):
        self._loaded = None      # (model, tokenizer)

    def __call__(self, conversations: list,
                 on_result: Callable[[int, str | None], None] | None = None) -> list[str | None]:
        if self._loaded is None:
            self._loaded = load_for_sampling(self.path)
        model, tokenizer = self._loaded
        stop = tokenizer.stop_ids
        prompts = {}
        for i, conversation in enumerate(conversations):
            if conversation is not None:
                prompts[i] = chat_prompt(conversation, tokenizer, self.prompt_format)
        texts = [None] * len(conversations)
        for i, (answer,) in sample_as_completed(
                model, prompts.items(), 1, self.max_new_tokens, self.temperature, self.top_p,
                stop=stop, seed=self.seed, max_rows=self.max_rows):
            if answer.finish_reason == "stop":
                texts[i] = decode_answer(answer.tokens, tokenizer, prompts[i])
                if self.prompt_format == "document":
                    texts[i] = as_reply(texts[i])
            if on_result is not None:
                on_result(i, texts[i])
        return texts


def open_llm(
        spec: dict, where: str, out: Path, init_from: str = "") -> tuple[Callable, dict]:
    """A language model of a config, as data.llm.LLM says, and what decides its answers, as JSON.

    spec: {"checkpoint": a phase of the run or a path, and fields of LocalLLM}, or {"url": of an
    OpenAI-compatible endpoint, and fields of data.llm.LLMConfig}. where: its name in messages; out,
    init_from: where a phase is sought (hf.resolve_checkpoint).
    """
    spec = dict(spec)
    if "checkpoint" not in spec:
        from data import llm  # only who asks a server waits for its client

        return llm.http_llm(from_dict(llm.LLMConfig, spec, where)), spec
    one_process = common.Dist(0, 1, torch.device("cpu"), None)
    folder = hf.resolve_checkpoint(one_process, spec.pop("checkpoint"), out, init_from)
    model = from_dict(LocalLLM, {"path": str(folder)} | spec, where)
    spec["weights"] = common.list_files(folder)
    return model, spec


def load_for_sampling(path: str | Path, checked: bool = False) -> tuple[Transformer, object]:
    """Model and tokenizer of a checkpoint: on a GPU in bf16, or on the CPU in fp32.

    checked: as in hf.load.
    """
    if torch.cuda.is_available():
        return hf.load(path, "cuda", torch.bfloat16, checked)
    return hf.load(path, "cpu", torch.float32, checked)


def chat_prompt(messages: list[dict], tokenizer, prompt_format: str) -> list[int]:
    """Token ids of a conversation to be answered; "document": of its last message, as a page."""
    if prompt_format == "document":
        text = f"Problem: {messages[-1]['content']}\nWork:"
        return tokenizer.encode_prompt(text)
    return template.render(messages, tokenizer, add_generation_prompt=True)


# --------------------------------------------------------------------------------------------------
# The command

DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "top_k": 0}


def stream(model: Transformer, tokenizer, prompt: list[int], stop: tuple[int, ...],
           args: argparse.Namespace) -> list[int]:
    """Prints an answer as it is drawn, and returns its tokens.

    A character that is not whole yet waits for its last byte.
    """
    if len(prompt) + args.max_new_tokens > model.cfg.max_context:
        print(f"note: the prompt has {len(prompt):,} tokens; with its answer that may be more than "
              f"the {model.cfg.max_context:,} that the model was trained on", file=sys.stderr)
    sample, n_shown, started = Sample(), 0, time.time()
    answer = sample.tokens
    steps = decode(model, [Prompt(0, prompt, [sample], 1)], args.max_new_tokens, args.temperature,
                   args.top_p, args.top_k, stop, args.seed, 1)
    for _ in steps:
        text = tokenizer.decode(answer if answer[-1] not in stop else answer[:-1])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[n_shown:], end="", flush=True)
            n_shown = len(text)
    tokens_per_s = len(answer) / (time.time() - started)
    print(f"\n[{len(answer)} tokens, {tokens_per_s:.0f} tokens/s]", file=sys.stderr)
    return answer


def read_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", help="a phase's folder, a checkpoint in it, or a Hugging Face folder")
    parser.add_argument(
        "prompt", nargs="?", help="text to continue; without it you are asked, again and again")
    parser.add_argument(
        "--chat", action="store_true", help="chat form (for checkpoints after SFT)")
    parser.add_argument(
        "--system", default="", help='what the system says first; "released": Nanbeige4\'s own')
    parser.add_argument(
        "--max_new_tokens", type=option(Count), default=256, help="at least 1 (default 256)")
    parser.add_argument("--temperature", type=option(NonNegativeFloat),
                        help="0 is greedy (default: a Hugging Face folder's own, or 0.6)")
    parser.add_argument("--top_p", type=option(TopP),
                        help="above 0, up to 1 (default: the folder's own, or 0.95)")
    parser.add_argument("--top_k", type=option(NonNegativeInt),
                        help="0 is off (default: the folder's own, or 0)")
    parser.add_argument(
        "--seed", type=option(Seed), default=0, help="of the draws, from 0 (default)")
    return parser.parse_intermixed_args()  # the prompt may stand after the options


def fill_in_sampling(args: argparse.Namespace, folder: Path) -> None:
    """Takes what no option says from the folder's generation_config.json, and shows it."""
    defaults, undone = hf.sampling_defaults(folder)
    for name, value in (DEFAULTS | defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if defaults:
        shown = ", ".join(f"{name} {getattr(args, name):g}" for name in DEFAULTS)
        print(f"note: {shown}, where no option says otherwise as in "
              f"{folder / 'generation_config.json'}", file=sys.stderr)
    if undone:
        print(f"note: not done, though the same file says it: {', '.join(undone)}",
              file=sys.stderr)


def main():
    args = read_options()
    one_process = common.Dist(0, 1, torch.device("cpu"), None)
    folder = hf.resolve_checkpoint(one_process, args.checkpoint)
    fill_in_sampling(args, folder)
    model, tokenizer = load_for_sampling(folder, checked=True)
    stop = tokenizer.stop_ids
    if args.chat:
        for line in hf.notes_on(folder, tokenizer):
            print(f"note: {line}", file=sys.stderr)
    messages = []
    while True:
        try:
            text = args.prompt if args.prompt is not None else input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        if args.chat:
            messages.append({"role": "user", "content": text})
            prompt = template.render(messages, tokenizer, True, system=args.system)
            answer = stream(model, tokenizer, prompt, stop, args)
            answer = [token for token in answer if token not in stop]
            messages.append(template.parse(answer, tokenizer))
        else:
            stream(model, tokenizer, tokenizer.encode_prompt(text), stop, args)
        if args.prompt is not None:
            return
        args.seed += 1


if __name__ == "__main__":
    common.cli(main)
