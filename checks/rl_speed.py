"""How fast is a step of rl.py beside TRL's GRPOTrainer? `OMP_NUM_THREADS=1 python -m
checks.rl_speed`, one minute.

A step is 64 rollouts (8 groups of 8; prompts of 32 tokens, responses of 64), their rewards and
advantages, and one update by DAPO's loss, clipping included. The same weights, prompts, temperature
(1, no top-p, no KL term), AdamW, threads and type (fp32) in one process; the contestants take turns
over 5 rounds, one step a turn. No stop token can be sampled, so that both do the same work whatever
they draw; ours then counts the responses as ended, or it would train none. The reward is the share
of even tokens: scoring costs nothing.

TRL's steps are its own training_step on its own dataloader's batches, generation through
transformers included, at the fastest of the settings tried: 1, 8, 16, 32 or 64 passes an update;
attention "eager" or "sdpa"; a growing or a static cache, or continuous batching. In its favour: its
trainer's loop, logging and saving are left out; it does not keep the sampler's log-probabilities,
which ours does and compares with the update's. In ours: so are loop.py's and rl.py's loop, rollout
files and statistics; all responses are equally long, so that a context of just one leaves no
padding in our rows (with the default of 256 a quarter would be, for attention alone), though
neither is there any in TRL's. Ours runs a prompt once for its group, TRL with each response.
Prompts come to both as ids: neither renders or tokenizes them. Left out, in ours too: vLLM, which
TRL can sample with on a GPU.
"""
import argparse
import tempfile
import time
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
GROUPS, GROUP, PROMPT, NEW, ROUNDS = 8, 8, 32, 64, 5
PASSES = 16  # of TRL's update
NEVER = SHAPE.vocab_size  # a stop token that cannot be sampled


def reward(tokens: list[int]) -> float:
    return float(np.mean([t % 2 == 0 for t in tokens]))


def ours(tokenizer, prompts: list[list[int]], d):
    """A function that takes a step and returns the seconds of its parts."""
    p = rl.RlConfig(
        stages=[], group_size=GROUP, batch_groups=GROUPS, max_new_tokens=NEW, context=PROMPT + NEW
    )
    model, optimizer = loop.build_model(SHAPE, p, d)
    init_weights(model, 0, common.assign)
    rollouts.task_prompt = lambda prompt, *_: prompt  # problems are prompts here
    endless = SimpleNamespace(stop_ids=(NEVER,), decode=tokenizer.decode)
    steps = iter(range(0, len(prompts), GROUPS))

    def take() -> dict[str, float]:
        first, clock = next(steps), [time.perf_counter()]
        groups = in_order(rollouts.sample_rollouts(
            Embedded(model), endless, prompts[first : first + GROUPS], GROUP, p, seed=first
        ))
        clock.append(time.perf_counter())
        mine = [r for group in groups for r in group]
        for r in mine:
            r.reward, r.finish_reason = reward(r.tokens), "stop"
        rl.assign_advantages(groups, p.divide_by_std)
        clock.append(time.perf_counter())
        rl.train_step(model, rl.RolloutBatch(mine), p, d)
        common.clip_grad_norm(model, p.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.append(time.perf_counter())
        assert {len(r.tokens) for r in mine} == {NEW}
        return dict(zip(("rollout", "scoring", "update"), np.diff(clock).tolist()))
    return take


class IdsGRPOTrainer(trl.GRPOTrainer):
    def _tokenize_prompts(self, prompts: list[str]):
        # the parent's takes texts alone
        return [list(map(int, prompt.split())) for prompt in prompts], None, {}


def theirs(export: Path, prompts: list[list[int]], folder: Path):
    """A function that takes a step."""
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
        max_completion_length=NEW,
        shuffle_dataset=False,
        per_device_train_batch_size=GROUPS * GROUP // PASSES,
        gradient_accumulation_steps=PASSES,
        cache_implementation="static",
        generation_kwargs={"eos_token_id": NEVER},
    )
    trainer = IdsGRPOTrainer(
        model, lambda completion_ids, **_: [*map(reward, completion_ids)], args,
        datasets.Dataset.from_dict({"prompt": [" ".join(map(str, prompt)) for prompt in prompts]}),
        processing_class=transformers.AutoTokenizer.from_pretrained(export))
    trainer.eos_token_ids = [NEVER]
    model = trainer.accelerator.prepare(trainer.model)
    stream, optimizer = iter(trainer.get_train_dataloader()), trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = PASSES

    def take() -> None:
        batches, n_items = trainer.get_batch_samples(stream, PASSES, trainer.args.device)
        for inputs in batches:
            trainer.training_step(model, inputs, n_items)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert trainer._metrics["train"]["completions/min_length"][-1] == NEW
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
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = hf.meta_model(SHAPE).to_empty(device="cpu")
        init_weights(model, 0)
        hf.export(model, tokenizer, folder / "export", torch.float32)
        contestants = {
            "ours": ours(tokenizer, prompts, d),
            "TRL": theirs(folder / "export", prompts, folder / "TRL"),
        }
        seconds, parts = {name: [] for name in contestants}, []
        for turn in range(ROUNDS + 1):  # the first does not count
            for name, take in contestants.items():
                started = time.perf_counter()
                found = take()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
                    parts += [found] if found else []
    rows = {name: median(s) for name, s in seconds.items()}
    for part in parts[0]:
        rows[f"ours: {part}"] = median(seconds_of[part] for seconds_of in parts)
    print("\n".join(f"{name:16}{row:8.3f} s a step" for name, row in rows.items()))
    ratio, counts = rows["TRL"] / rows["ours"], count_parameters(model)
    places = GROUPS * (PROMPT + GROUP * (NEW - 1))  # that the update runs through the model:
                                                    # data.chat.packing.share_prefixes
    flops = 6 * ((counts["attention"] + counts["mlp"]) * places
                 # attention's own products left out
                 + SHAPE.vocab_size * SHAPE.hidden_size * GROUPS * GROUP * NEW)
    rates = {"update": flops / rows["ours: update"] / 1e9, "product": product_rate(places)}
    print(
        f"the update makes {rates['update']:.0f} GFLOP/s, a single product of its shapes "
        f"{rates['product']:.0f}"
    )
    print(f"{counts['total'] / 1e6:.1f}M parameters: ours is {ratio:.2f} x as fast")
    results.append(
        "rl_speed",
        bench.describe_origin("checks.rl_speed", 0, d.device)
        | dict(
            command="python -m checks.rl_speed",
            layers=SHAPE.n_layers,
            width=SHAPE.hidden_size,
            trl=trl.__version__,
            transformers=transformers.__version__,
            seconds=seconds,
            parts=parts,
            gflops=rates,
            config=common.hash_json([GROUPS, GROUP, PROMPT, NEW, ROUNDS, PASSES]),
            ratio=ratio,
        ),
    )


if __name__ == "__main__":
    main()
