"""How fast is a step of rl.py beside TRL's GRPOTrainer? `OMP_NUM_THREADS=1 python -m
checks.rl_speed`, four minutes.

A step is 64 rollouts (8 groups of 8; prompts of 32 tokens), their rewards and advantages, and one
update by DAPO's loss, clipping included. The same weights, prompts, temperature (1, no top-p, no KL
term), AdamW, threads and type (fp32) in one process; the contestants take turns over 5 rounds, one
step a turn. The reward is the share of even tokens: scoring costs nothing.

Two cases. Equal: responses of 64 tokens; no stop token can be sampled, so that both do the same
work whatever they draw, and ours counts the responses as ended, or it would train none. Uneven:
each 80th token ends a response, which of untrained weights makes 80 tokens on the mean, 512 at
most; both draw for themselves, so tokens per second are compared, over all rounds.

TRL's steps are its own training_step on its own dataloader's batches, generation through
transformers included, at the fastest of the settings tried: 1, 8, 16, 32 or 64 passes an update;
attention "eager" or "sdpa"; a growing or a static cache, or continuous batching. In its favour: its
trainer's loop, logging and saving are left out; it does not keep the sampler's log-probabilities,
which ours does and compares with the update's. In ours: so are loop.py's and rl.py's loop, rollout
files and statistics; a context of just one response leaves no padding in our rows where all are
equally long (with the default of 256 a quarter would be, for attention alone), though neither is
there any in TRL's. Ours runs a prompt once for its group, TRL with each response; a pass of its
update is a group.
Prompts come to both as ids: neither renders or tokenizes them. Left out, in ours too: vLLM, which
TRL can sample with on a GPU.
"""
import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import datasets
import numpy as np
import torch
import transformers
import trl

import common
import hf
import loop
import rl
import rollouts
from checks import bench
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from experiments import results
from model import ModelConfig, count_parameters, init_weights
from sampler import Embedded, in_order

SHAPE = ModelConfig(6, 256, 704, 8, 4, 32, vocab_size=4096)
GROUPS, GROUP, PROMPT, ROUNDS = 8, 8, 32, 5
PASSES = 16  # of TRL's update


@dataclass(frozen=True)
class Case:
    name: str
    new: int                # tokens of a response at most
    stop: tuple[int, ...]   # the tokens that end one


EQUAL = Case("equal", 64, (SHAPE.vocab_size,))  # a token that cannot be sampled
UNEVEN = Case("uneven", 512, tuple(range(0, SHAPE.vocab_size, 80)))


def reward(tokens: list[int]) -> float:
    return float(np.mean([t % 2 == 0 for t in tokens]))


def ours(tokenizer, prompts: list[list[int]], case: Case, d):
    """A function that takes a step and returns its tokens, and the seconds of its parts."""
    p = rl.RlConfig(
        stages=[], group_size=GROUP, batch_groups=GROUPS, max_new_tokens=case.new,
        context=PROMPT + case.new, micro_rows=GROUP
    )
    model, optimizer = loop.build_model(SHAPE, p, d)
    init_weights(model, 0, common.assign)
    rollouts.task_prompt = lambda prompt, *_: prompt  # problems are prompts here
    stopping = SimpleNamespace(stop_ids=case.stop, decode=tokenizer.decode)
    steps = iter(range(0, len(prompts), GROUPS))

    def take() -> tuple[int, dict[str, float]]:
        first, clock = next(steps), [time.perf_counter()]
        groups = in_order(rollouts.sample_rollouts(
            Embedded(model), stopping, prompts[first : first + GROUPS], GROUP, p, seed=first
        ))
        clock.append(time.perf_counter())
        mine = [r for group in groups for r in group]
        for r in mine:
            r.reward = reward(r.tokens)
            if case == EQUAL:
                r.finish_reason = "stop"
        rl.assign_advantages(groups, p.divide_by_std)
        clock.append(time.perf_counter())
        rl.train_step(model, rl.RolloutBatch(mine), p, d)
        common.clip_grad_norm(model, p.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.append(time.perf_counter())
        parts = dict(zip(("rollout", "scoring", "update"), np.diff(clock).tolist()))
        return sum(len(r.tokens) for r in mine), parts
    return take


class IdsGRPOTrainer(trl.GRPOTrainer):
    def _tokenize_prompts(self, prompts: list[str]):
        # the parent's takes texts alone
        return [list(map(int, prompt.split())) for prompt in prompts], None, {}


def theirs(export: Path, prompts: list[list[int]], folder: Path, case: Case):
    """A function that takes a step and returns its tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, attn_implementation="sdpa")
    args = trl.GRPOConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        learning_rate=3e-4,
        optim="adamw_torch_fused",
        loss_type="dapo",
        beta=0.0,
        num_iterations=1,
        epsilon=0.2,
        epsilon_high=0.28,
        temperature=1.0,
        num_generations=GROUP,
        max_completion_length=case.new,
        shuffle_dataset=False,
        per_device_train_batch_size=GROUPS * GROUP // PASSES,
        gradient_accumulation_steps=PASSES,
        cache_implementation="static",
        generation_kwargs={"eos_token_id": [*case.stop]},
    )
    trainer = IdsGRPOTrainer(
        model, lambda completion_ids, **_: [*map(reward, completion_ids)], args,
        datasets.Dataset.from_dict({"prompt": [" ".join(map(str, prompt)) for prompt in prompts]}),
        processing_class=transformers.AutoTokenizer.from_pretrained(export))
    trainer.eos_token_ids = [*case.stop]
    model = trainer.accelerator.prepare(trainer.model)
    stream, optimizer = iter(trainer.get_train_dataloader()), trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = PASSES

    def take() -> tuple[int, dict[str, float]]:
        batches, n_items = trainer.get_batch_samples(stream, PASSES, trainer.args.device)
        for inputs in batches:
            trainer.training_step(model, inputs, n_items)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean_length = trainer._metrics["train"]["completions/mean_length"][-1]
        return round(mean_length * GROUPS * GROUP), {}
    return take


def product_rate(places: int) -> float:
    """GFLOP/s of the product at the MLP's entrance: what is there to be had."""
    x, weight = (
        torch.randn(places, SHAPE.hidden_size),
        torch.randn(SHAPE.ffn_size, SHAPE.hidden_size),
    )
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        x @ weight.T
        seconds.append(time.perf_counter() - started)
    return 2 * places * weight.numel() / median(seconds) / 1e9


def race(case: Case, tokenizer, prompts: list[list[int]], export: Path, folder: Path, d) -> dict:
    """{contestant: its rounds' (tokens, seconds, {part: seconds}), the first left out}."""
    contestants = {
        "ours": ours(tokenizer, prompts, case, d),
        "TRL": theirs(export, prompts, folder, case),
    }
    rounds = {name: [] for name in contestants}
    for turn in range(ROUNDS + 1):  # the first does not count
        for name, take in contestants.items():
            started = time.perf_counter()
            tokens, parts = take()
            if turn:
                rounds[name].append((tokens, time.perf_counter() - started, parts))
    if case == EQUAL:
        n_tokens = {tokens for taken in rounds.values() for tokens, _, _ in taken}
        assert n_tokens == {GROUPS * GROUP * case.new}
    return rounds


def describe_race(rounds: dict) -> dict:
    """What is recorded of a race: each round's tokens and seconds, and the ratio of the rates."""
    tokens, seconds, rates = {}, {}, {}
    for name, taken in rounds.items():
        tokens[name] = [n_tokens for n_tokens, _, _ in taken]
        seconds[name] = [took for _, took, _ in taken]
        rates[name] = sum(tokens[name]) / sum(seconds[name])
        print(f"{name:16}{median(seconds[name]):8.3f} s a step, {rates[name]:8,.0f} tokens/s")
    parts = [step_parts for _, _, step_parts in rounds["ours"]]
    for part in parts[0]:
        print(f"ours: {part:10}{median(step[part] for step in parts):8.3f} s a step")
    return dict(tokens=tokens, seconds=seconds, parts=parts, ratio=rates["ours"] / rates["TRL"])


def update_rates(model, parts: list[dict]) -> dict[str, float]:
    """GFLOP/s of the update where responses are equal, and of a matrix product of its shapes."""
    counts = count_parameters(model)
    # What the update runs through the model: data.chat.packing.share_prefixes
    places = GROUPS * (PROMPT + GROUP * (EQUAL.new - 1))
    flops = 6 * ((counts["attention"] + counts["mlp"]) * places  # attention's own are left out
                 + SHAPE.vocab_size * SHAPE.hidden_size * GROUPS * GROUP * EQUAL.new)
    seconds = median(step["update"] for step in parts)
    return {"update": flops / seconds / 1e9, "product": product_rate(places)}


def main():
    argparse.ArgumentParser(
        prog="python -m checks.rl_speed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    d = common.init_distributed("float32")
    tokenizer = train_tokenizer([file.read_text() for file in sorted(Path().glob("*.py"))],
                                TokenizerConfig(vocab_size=SHAPE.vocab_size))
    prompts = (
        np.random.default_rng(0)
        .integers(0, SHAPE.vocab_size, ((ROUNDS + 1) * GROUPS, PROMPT))
        .tolist()
    )
    model = hf.meta_model(SHAPE).to_empty(device="cpu")
    init_weights(model, 0)
    parameters = count_parameters(model)["total"]
    for case in (EQUAL, UNEVEN):
        with tempfile.TemporaryDirectory() as folder:
            export = Path(folder, "export")
            hf.export(model, tokenizer, export, torch.float32)
            rounds = race(case, tokenizer, prompts, export, Path(folder, "TRL"), d)
        row = describe_race(rounds)
        if case == EQUAL:
            row["gflops"] = update_rates(model, row["parts"])
            print("the update makes {update:.0f} GFLOP/s, a single product of its shapes "
                  "{product:.0f}".format(**row["gflops"]))
        print(f"{case.name} responses, {parameters / 1e6:.1f}M parameters: ours is "
              f"{row['ratio']:.2f} x as fast\n")
        settings = [case.name, GROUPS, GROUP, PROMPT, case.new, ROUNDS, PASSES]
        results.append("rl_speed", bench.describe_origin("checks.rl_speed", 0, d.device) | dict(
            case=case.name, layers=SHAPE.n_layers, width=SHAPE.hidden_size, trl=trl.__version__,
            transformers=transformers.__version__, config=common.hash_json(settings), **row))


if __name__ == "__main__":
    main()
