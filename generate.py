"""Sampling with a KV cache, in batches: `sample()` for the phases, and a command line to complete or chat.

    python generate.py out/tiny/pretrain "Problem: "          # continue a text
    python generate.py out/tiny/pretrain                      # a prompt to type at; --chat for chat form

Shapes: R rows of the batch (prompts x samples), T time, V vocabulary.
"""
import argparse
import sys
import time
from dataclasses import dataclass, field
from typing import Iterator

import numpy as np
import torch

import common
import hf
from data.chat import template
from data.tasks.problem import as_reply
from data.llm import LLM
from model import KVCache, Transformer


@dataclass
class Sample:
    """One answer. tokens ends with the stop token where finish_reason is "stop" (the model chose it, so it is trained too).

    logprobs: log-probability of each token under the policy that it was drawn from, so after temperature, top-k and
    top-p; under the untempered model at temperature 0 (greedy).
    """
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"  # or "stop"


@torch.inference_mode()
def sample(model: Transformer, prompts: list[list[int]], n: int = 1, max_new_tokens: int = 128,
           temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, stop: tuple[int, ...] = (), seed: int = 0,
           max_rows: int = 256, numbers: list[int] | None = None) -> list[list[Sample]]:
    """n samples for each prompt (lists of token ids, of any lengths): a list of n Samples a prompt.

    model: a plain, unsharded module (common.unsharded_copy). temperature 0 is greedy; top_p 1 and top_k 0 are off. Training
    rollouts leave both off: only then is the distribution sampled from the one in the loss. The draws of a row depend
    on (seed, prompt's number, sample's number) alone, not on what it is batched with. max_rows bounds the memory;
    numbers: of the prompts, where these are a part of more (default: their places here).
    """
    assert all(prompts), "an empty prompt: begin with the bos token"
    results = [[Sample() for _ in range(n)] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
    per_wave = max(1, max_rows // n)
    for wave in (order[i:i + per_wave] for i in range(0, len(order), per_wave)):
        rows = [(i, j) for i in wave for j in range(n)]
        streams = [(numbers[i] if numbers else i, j) for i, j in rows]
        steps = decode(model, [prompts[i] for i in wave], n, max_new_tokens, temperature, top_p, top_k, stop,
                       uniforms(seed, streams, max_new_tokens))
        for active, tokens, logprobs in steps:
            for row, token, logprob in zip(active, tokens, logprobs):
                i, j = rows[row]
                results[i][j].tokens.append(token)
                results[i][j].logprobs.append(logprob)
                if token in stop:
                    results[i][j].finish_reason = "stop"
    return results


def stop_ids(tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the end of a document, and of a turn where the tokenizer is made for chats."""
    return tuple({tokenizer.eot, tokenizer.special.get("<|im_end|>", tokenizer.eot)})


def uniforms(seed: int, rows: list[tuple[int, int]], max_new_tokens: int) -> torch.Tensor:
    """The random numbers of each row (R, max_new_tokens), in [0, 1), float64: one a token, by inverting the CDF."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, *row]).random(max_new_tokens) for row in rows]))


def decode(model: Transformer, prompts: list[list[int]], n: int, max_new_tokens: int, temperature: float,
           top_p: float, top_k: int, stop: tuple[int, ...],
           draws: torch.Tensor) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """Yields, a step at a time, the rows that are still going, their new tokens and log-probabilities.

    Prompts are padded on the left, and doc_start says where each begins: attention and positions start there. So all
    rows have their last token in the same column. Finished rows leave the batch once they are an eighth of it.
    """
    device = model.embed_tokens.weight.device
    T = max(map(len, prompts))
    tokens = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    pad = torch.tensor([[T - len(p)] for p in prompts], device=device, dtype=torch.int32)
    column = torch.arange(T, device=device, dtype=torch.int32)
    padded = bool(pad.any())
    doc_start = torch.where(column < pad, column, pad) if padded else None  # a padding token is a document of its own
    cache = KVCache(model.cfg, len(prompts), T + max_new_tokens, device, model.embed_tokens.weight.dtype)
    hidden = model(tokens, doc_start, cache)[:, -1:]
    rows = torch.arange(len(prompts), device=device).repeat_interleave(n)
    if n > 1:  # the prompts' forward pass is shared by their samples
        cache.keep(rows)
        hidden, pad = hidden[rows], pad[rows]
    active, draws = list(range(len(rows))), draws.to(device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    stop_ids = torch.tensor(list(stop), device=device, dtype=torch.int64)
    for t in range(max_new_tokens):
        logits = (hidden[:, 0] @ model.lm_head.weight.T).float()
        token, logprob = choose(logits, temperature, top_p, top_k, draws[:, t])
        going = alive.tolist()
        yield ([r for r, a in zip(active, going) if a], token[alive].tolist(), logprob[alive].tolist())
        alive &= ~torch.isin(token, stop_ids)
        n_alive = int(alive.sum())
        if n_alive == 0 or t == max_new_tokens - 1:
            return
        if n_alive <= len(active) * 7 // 8:
            kept = alive.nonzero()[:, 0]
            cache.keep(kept)
            active = [active[i] for i in kept.tolist()]
            token, pad, draws, alive = token[kept], pad[kept], draws[kept], alive[kept]
        hidden = model(token[:, None], pad if padded else None, cache)


def choose(logits: torch.Tensor, temperature: float, top_p: float, top_k: int,
           draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R,) and their log-probabilities (R,) from logits (R, V) and uniform draws (R,).

    Order as in transformers and vLLM: temperature, then top-k, then top-p (nucleus, arXiv 1904.09751: the smallest set
    of most likely tokens whose probability reaches top_p).
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        probs = ranked.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the tokens before it reach top_p already
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    probs = logits.softmax(-1)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
    return token[:, 0], probs.gather(1, token)[:, 0].log()


def local_llm(path: str, max_new_tokens: int = 256, temperature: float = 0.6, top_p: float = 0.95, seed: int = 0,
                 max_rows: int = 256, prompt_format: str = "chat") -> LLM:
    """A writer (data/llm.py) that is a checkpoint on this machine.

    path: as in hf.load; it is loaded when first asked. prompt_format "document": a base model, which is given the last message
    as the beginning of a page (data/tasks). An answer that does not end is None. Draws depend on (seed, number of the
    conversation), and conversations are decoded in fixed groups of max_rows numbers: a resumed batch repeats itself.
    """
    loaded = []

    def write(conversations: list, on_result=lambda number, text: None) -> list[str | None]:
        if not loaded:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            loaded.extend(hf.load(path, device, torch.bfloat16 if device == "cuda" else torch.float32))
        model, tokenizer = loaded
        stop, texts = stop_ids(tokenizer), [None] * len(conversations)
        for first in range(0, len(conversations), max_rows):
            asked = [i for i in range(first, min(first + max_rows, len(conversations))) if conversations[i] is not None]
            answers = [[] for _ in asked]
            with torch.inference_mode():
                for rows, tokens, _ in asked and decode(
                        model, [chat_prompt(conversations[i], tokenizer, prompt_format) for i in asked], 1, max_new_tokens,
                        temperature, top_p, 0, stop, uniforms(seed, [(i, 0) for i in asked], max_new_tokens)):
                    for row, token in zip(rows, tokens):
                        answers[row].append(token)
            for i, answer in zip(asked, answers):
                if answer[-1] in stop:
                    text = tokenizer.decode(answer[:-1])
                    texts[i] = as_reply(text) if prompt_format == "document" else text
                on_result(i, texts[i])
        return texts

    return write


def chat_prompt(messages: list[dict], tokenizer, prompt_format: str) -> list[int]:
    if prompt_format == "document":
        return [tokenizer.bos, *tokenizer.encode(f"Problem: {messages[-1]['content']}\nWork:")]
    return template.render(messages, tokenizer, add_generation_prompt=True)


def stream(model: Transformer, tokenizer, prompt: list[int], stop: tuple[int, ...], args) -> list[int]:
    """Prints an answer as it is made; a character that is not whole yet waits for its last byte."""
    answer, shown, start = [], 0, time.time()
    draws = uniforms(args.seed, [(0, 0)], args.max_new_tokens)
    with torch.inference_mode():
        for _, (token,), _ in decode(model, [prompt], 1, args.max_new_tokens, args.temperature, args.top_p, args.top_k,
                                     stop, draws):
            answer.append(token)
            text = tokenizer.decode(answer if token not in stop else answer[:-1])
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                print(text[shown:], end="", flush=True)
                shown = len(text)
    print(f"\n[{len(answer)} tokens, {len(answer) / (time.time() - start):.0f} tokens/s]", file=sys.stderr)
    return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a phase's folder, a checkpoint in it, or a Hugging Face folder")
    parser.add_argument("prompt", nargs="?", help="text to continue; without it you are asked, again and again")
    parser.add_argument("--chat", action="store_true", help="chat form (for checkpoints after SFT)")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default 0.6)")
    parser.add_argument("--top_p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--top_k", type=int, default=0, help="0 is off (default)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()  # the prompt may stand after the options
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = hf.load(args.checkpoint, device, torch.bfloat16 if device == "cuda" else torch.float32)
    stop = stop_ids(tokenizer)
    messages = []
    while True:
        try:
            text = args.prompt if args.prompt is not None else input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        if args.chat:
            messages.append({"role": "user", "content": text})
            prompt = template.render(messages, tokenizer, add_generation_prompt=True)
            answer = stream(model, tokenizer, prompt, stop, args)
            messages.append(template.parse([t for t in answer if t not in stop], tokenizer))
        else:
            stream(model, tokenizer, [tokenizer.bos, *tokenizer.encode(text)], stop, args)
        if args.prompt is not None:
            return
        args.seed += 1


if __name__ == "__main__":
    common.cli(main)
