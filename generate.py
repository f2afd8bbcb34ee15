"""Sampling with a KV cache, in batches: `sample()` for the phases; a command to complete or chat.

    python generate.py out/tiny/pretrain "Problem: "     # continue a text
    python generate.py out/tiny/pretrain                 # a prompt to type at; --chat for chat form

Shapes: R rows of the batch (prompts x samples), T time, V vocabulary.
"""
from settings import Count, NonNegativeFloat, NonNegativeInt, Seed, TopP, from_dict, option

import argparse
import sys
import time
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
from model import KVCache, ModelConfig, Transformer


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
        model, requests, n, max_new_tokens, temperature, top_p, top_k, stop, seed, max_rows))
    return [samples[number] for number in numbers]


@torch.inference_mode()
def sample_as_completed(
        model: Transformer, requests: Iterable[tuple[int, list[int]]], n: int = 1,
        max_new_tokens: int = 128, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
        stop: tuple[int, ...] = (), seed: int = 0,
        max_rows: int = 256) -> Iterator[tuple[int, list[Sample]]]:
    """Yields (number, n Samples) of each prompt as soon as all n have ended.

    model: a plain, unsharded module (common.unsharded_copy). requests: (number, prompt as token
    ids), each number once; the next one is asked for when there is room for it. temperature 0 is
    greedy; top_p 1 and top_k 0 are off. Training rollouts leave both off: only then is the
    distribution sampled from the one in the loss. The draws of a row depend on (seed, prompt's
    number, sample's number) alone, not on what it is batched with. max_rows: decoded together at
    most, or as many as fit into the memory that is free.
    """
    requests = list(requests)
    numbers, prompts = [number for number, _ in requests], [prompt for _, prompt in requests]
    assert all(prompts), "an empty prompt: begin with the bos token"
    samples = []
    for _ in prompts:
        samples.append([Sample() for _ in range(n)])
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths: less padding
    longest = max(map(len, prompts), default=1)
    fitting = FREE_SHARE * rows_that_fit(model, longest, max_new_tokens)
    n_rows = int(min(max_rows, max(1, fitting)))
    for wave, wave_samples in waves(order, n, n_rows):
        rows = [(i, j) for i in wave for j in wave_samples]
        draws = uniforms(seed, [(numbers[i], j) for i, j in rows], max_new_tokens)
        steps = decode(model, [prompts[i] for i in wave], len(wave_samples), max_new_tokens,
                       temperature, top_p, top_k, stop, draws)
        for active, tokens, logprobs in steps:
            for row, token, logprob in zip(active, tokens, logprobs):
                i, j = rows[row]
                answer = samples[i][j]
                answer.tokens.append(token)
                answer.logprobs.append(logprob)
                if token in stop:
                    answer.finish_reason = "stop"
        if wave_samples.stop == n:
            for i in wave:
                yield numbers[i], samples[i]


def waves(prompts: list[int], n: int, rows: int) -> Iterator[tuple[list[int], range]]:
    """(prompts, which of their n samples) of at most `rows` rows each."""
    per_wave = max(1, rows // n)
    for first in range(0, len(prompts), per_wave):
        for begin in range(0, n, rows):
            yield prompts[first:first + per_wave], range(begin, min(begin + rows, n))


FREE_SHARE = 0.8  # of the free memory that `sample` gives to rows: our choice


def row_bytes(cfg: ModelConfig, dtype: torch.dtype, prompt: int, new: int) -> int:
    """What a row of the batch takes at most: its cache, its prompt's pass, its logits.

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


def check_rows_fit(model: Transformer, n_rows: int, prompt: int, new: int) -> None:
    """Raises UserError, with how many rows would fit, where these do not."""
    fitting = rows_that_fit(model, prompt, new)
    if n_rows > fitting:
        size = row_bytes(model.cfg, model.embed_tokens.weight.dtype, prompt, new) / 1e9
        raise common.UserError(
            f"{n_rows} rows of {prompt} + {new} tokens need {n_rows * size:.1f} GB of the GPU's "
            f"memory, {size:.2f} each; {int(fitting)} would fit: lower max_rows, or max_new_tokens")


def stop_ids(tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer.

    The end of a document, of a turn where the tokenizer is made for chats, and what else the
    checkpoint's configs name.
    """
    turn_end = tokenizer.special.get("<|im_end|>", tokenizer.eot)
    return tuple({tokenizer.eot, turn_end, *tokenizer.eos})


def decode_answer(tokens: list[int], tokenizer, prompt: Sequence[int] = ()) -> str:
    """The text of a sample's tokens, without those that end it.

    Behind a prompt that ends with <think>, as some chat templates do, it begins with <think>.
    """
    stop = stop_ids(tokenizer)
    text = tokenizer.decode([token for token in tokens if token not in stop])
    end_of_prompt = tokenizer.decode(list(prompt[-16:]))
    return template.reopen_thoughts(end_of_prompt, text)


def uniforms(seed: int, rows: list[tuple[int, int]], max_new_tokens: int) -> torch.Tensor:
    """The random numbers of each row (R, max_new_tokens), in [0, 1), float64.

    One per token, which is drawn by inverting the CDF. rows: (prompt's number, sample's number).
    """
    draws = [np.random.default_rng([seed, *row]).random(max_new_tokens) for row in rows]
    return torch.from_numpy(np.stack(draws))


def decode(model: Transformer, prompts: list[list[int]], n: int, max_new_tokens: int,
           temperature: float, top_p: float, top_k: int, stop: tuple[int, ...],
           draws: torch.Tensor) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """Yields at each step the rows that are not finished, their new tokens and log-probabilities.

    draws (R, max_new_tokens): as `uniforms` makes them. Prompts are padded on the left, and
    doc_start says where each begins: attention and positions start there. So all rows have their
    last token in the same column. Finished rows leave the batch once they are an eighth of it.
    """
    weight = model.embed_tokens.weight
    device = weight.device
    longest = max(map(len, prompts))
    check_rows_fit(model, len(prompts) * n, longest, max_new_tokens)
    tokens, pad, doc_start = pad_left(prompts, device)
    is_padded = doc_start is not None
    cache = KVCache(model.cfg, len(prompts), longest + max_new_tokens, device, weight.dtype)
    hidden = model(tokens, doc_start, cache)[:, -1:]
    if n > 1:                               # the prompts' forward pass is shared by their samples
        copies = torch.arange(len(prompts), device=device).repeat_interleave(n)
        cache.keep(copies)
        hidden, pad = hidden[copies], pad[copies]

    active = list(range(len(prompts) * n))  # the rows that are still in the batch
    alive = torch.ones(len(active), dtype=torch.bool, device=device)  # those that are not finished
    draws = draws.to(device)
    stop_tokens = torch.tensor(list(stop), device=device, dtype=torch.int64)
    for t in range(max_new_tokens):
        logits = (hidden[:, 0] @ model.lm_head.weight.T).float()
        token, logprob = sample_tokens(logits, temperature, top_p, top_k, draws[:, t])
        unfinished = [row for row, is_alive in zip(active, alive.tolist()) if is_alive]
        yield unfinished, token[alive].tolist(), logprob[alive].tolist()

        alive &= ~torch.isin(token, stop_tokens)
        n_alive = int(alive.sum())
        if n_alive == 0 or t == max_new_tokens - 1:
            return
        if n_alive <= len(active) * 7 // 8:
            kept = alive.nonzero()[:, 0]
            cache.keep(kept)
            active = [active[i] for i in kept.tolist()]
            token, pad, draws, alive = token[kept], pad[kept], draws[kept], alive[kept]
        hidden = model(token[:, None], pad if is_padded else None, cache)


def pad_left(prompts: list[list[int]], device) -> tuple:
    """(tokens (R, T), pad (R, 1), doc_start (R, T)): prompts that end in the same column.

    pad: how many tokens of padding each has before it, int32. doc_start is None where none has any;
    each padding token is a document of its own.
    """
    T = max(map(len, prompts))
    tokens = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    pad = torch.tensor([[T - len(p)] for p in prompts], device=device, dtype=torch.int32)
    if not pad.any():
        return tokens, pad, None
    column = torch.arange(T, device=device, dtype=torch.int32)
    return tokens, pad, torch.where(column < pad, column, pad)


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
    number of the conversation), and conversations are decoded in fixed groups of max_rows numbers:
    a resumed batch repeats itself.
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
        texts = [None] * len(conversations)
        for first in range(0, len(conversations), self.max_rows):
            last = min(first + self.max_rows, len(conversations))
            numbers = [i for i in range(first, last) if conversations[i] is not None]
            if not numbers:
                continue
            answers = self._answer([conversations[i] for i in numbers], numbers)
            for i, text in zip(numbers, answers):
                texts[i] = text
                if on_result is not None:
                    on_result(i, text)
        return texts

    def _answer(self, conversations: list, numbers: list[int]) -> list[str | None]:
        """The answers to one group of conversations, whose draws are those of the numbers."""
        if self._loaded is None:
            self._loaded = load_for_sampling(self.path)
        model, tokenizer = self._loaded
        stop = stop_ids(tokenizer)
        prompts = [chat_prompt(conversation, tokenizer, self.prompt_format)
                   for conversation in conversations]
        draws = uniforms(self.seed, [(i, 0) for i in numbers], self.max_new_tokens)
        answers = [[] for _ in prompts]
        with torch.inference_mode():
            for active, tokens, _ in decode(model, prompts, 1, self.max_new_tokens,
                                            self.temperature, self.top_p, 0, stop, draws):
                for row, token in zip(active, tokens):
                    answers[row].append(token)
        texts = []
        for prompt, answer in zip(prompts, answers):
            text = decode_answer(answer, tokenizer, prompt) if answer[-1] in stop else None
            if text is not None and self.prompt_format == "document":
                text = as_reply(text)
            texts.append(text)
        return texts


def open_llm(spec: dict, where: str, out: Path) -> tuple[Callable, dict]:
    """A language model of a config, as data.llm.LLM says, and what decides its answers, as JSON.

    spec: {"checkpoint": a phase of the run or a path, and fields of LocalLLM}, or {"url": of an
    OpenAI-compatible endpoint, and fields of data.llm.LLMConfig}. where: its name in messages.
    """
    spec = dict(spec)
    if "checkpoint" not in spec:
        from data import llm  # only who asks a server waits for its client

        return llm.http_llm(from_dict(llm.LLMConfig, spec, where)), spec
    one_process = common.Dist(0, 1, torch.device("cpu"), None)
    folder = hf.resolve_checkpoint(one_process, spec.pop("checkpoint"), out)
    model = from_dict(LocalLLM, {"path": str(folder)} | spec, where)
    spec["weights"] = common.list_files(folder)
    return model, spec


def load_for_sampling(path: str) -> tuple[Transformer, object]:
    """Model and tokenizer of a checkpoint: on a GPU in bf16, or on the CPU in fp32."""
    if torch.cuda.is_available():
        return hf.load(path, "cuda", torch.bfloat16)
    return hf.load(path, "cpu", torch.float32)


def chat_prompt(messages: list[dict], tokenizer, prompt_format: str) -> list[int]:
    """Token ids of a conversation to be answered; "document": of its last message, as a page."""
    if prompt_format == "document":
        text = f"Problem: {messages[-1]['content']}\nWork:"
        return [tokenizer.bos, *tokenizer.encode(text)]
    return template.render(messages, tokenizer, add_generation_prompt=True)


# --------------------------------------------------------------------------------------------------
# The command

def stream(model: Transformer, tokenizer, prompt: list[int], stop: tuple[int, ...],
           args: argparse.Namespace) -> list[int]:
    """Prints an answer as it is drawn, and returns its tokens.

    A character that is not whole yet waits for its last byte.
    """
    if len(prompt) + args.max_new_tokens > model.cfg.max_context:
        print(f"note: the prompt has {len(prompt):,} tokens; with its answer that may be more than "
              f"the {model.cfg.max_context:,} that the model was trained on", file=sys.stderr)
    answer, n_shown, started = [], 0, time.time()
    draws = uniforms(args.seed, [(0, 0)], args.max_new_tokens)
    steps = decode(model, [prompt], 1, args.max_new_tokens, args.temperature, args.top_p,
                   args.top_k, stop, draws)
    with torch.inference_mode():
        for _, (token,), _ in steps:
            answer.append(token)
            text = tokenizer.decode(answer if token not in stop else answer[:-1])
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
    parser.add_argument("--temperature", type=option(NonNegativeFloat), default=0.6,
                        help="0 is greedy (default 0.6)")
    parser.add_argument(
        "--top_p", type=option(TopP), default=0.95, help="above 0, up to 1 (default 0.95)")
    parser.add_argument(
        "--top_k", type=option(NonNegativeInt), default=0, help="0 is off (default)")
    parser.add_argument(
        "--seed", type=option(Seed), default=0, help="of the draws, from 0 (default)")
    return parser.parse_intermixed_args()  # the prompt may stand after the options


def main():
    args = read_options()
    model, tokenizer = load_for_sampling(args.checkpoint)
    stop = stop_ids(tokenizer)
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
            stream(model, tokenizer, [tokenizer.bos, *tokenizer.encode(text)], stop, args)
        if args.prompt is not None:
            return
        args.seed += 1


if __name__ == "__main__":
    common.cli(main)
