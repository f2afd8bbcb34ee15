"""How fast is a step of sft.py beside TRL's SFTTrainer? `OMP_NUM_THREADS=1 python -m
checks.sft_speed`, three minutes.

The same weights, conversations (lognormal lengths, median 64, at most 256 tokens; the latter half
is trained), AdamW, clipping, threads and type (fp32) in one process; the contestants take turns
over 5 rounds. TRL is shown packed ("bfd", its data collator without padding) and unpacked (rows
padded to the longest of their batch). Counted are real tokens, not padding. TRL's steps are its own
training_step on its own dataloader's batches; its trainer's loop, logging and saving are left out,
in its favour.
"""
import argparse
import itertools
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import torch
import transformers
import trl

import common
import hf
import loop
import sft
from checks import bench
from data.chat.conversations import Pool
from data.chat.packing import build_batch, plan_stages
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from experiments import results
from model import ModelConfig, init_weights

SHAPES = [
    ModelConfig(4, 128, 352, 4, 2, 32, vocab_size=1024),
    ModelConfig(6, 256, 704, 8, 4, 32, vocab_size=1024),
]
CONTEXT, ROWS, ROUNDS, STEPS = 256, 8, 5, 2


def conversations(n: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(CONTEXT / 4), 0.6, n), 8, CONTEXT).astype(int)
    tokens = [rng.integers(0, 250, length) for length in lengths]
    masks = [(np.arange(length) >= length // 2).astype(np.int64) for length in lengths]
    return tokens, masks


def ours(shape: ModelConfig, tokens: list, masks: list, d):
    """A function that takes a step and returns its real tokens."""
    p = sft.SftConfig(stages=[], batch_tokens=ROWS * CONTEXT)
    model, optimizer = loop.build_model(shape, p, d)
    init_weights(model, 0, common.assign)
    ends = np.cumsum([*map(len, tokens)])
    pools = {"all": Pool(np.concatenate(tokens), np.concatenate(masks).astype(np.float16), ends)}
    (plan,) = plan_stages(
        [sft.StageConfig("all", [1, 1], CONTEXT, epochs={"all": 1})], pools, p.batch_tokens, 0
    )
    of_rows = np.diff(
        np.cumsum(np.array([*map(len, tokens)])[plan.conversation])[plan.ends - 1], prepend=0
    )
    steps = itertools.cycle(range(plan.n_steps))

    def take() -> int:
        step = next(steps)
        sft.train_step(model, build_batch(plan, pools, step), p, d)
        common.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return int(of_rows[step * plan.rows:(step + 1) * plan.rows].sum())
    return take


def theirs(export: Path, tokens: list, masks: list, packing: bool, rows: int, folder: Path):
    """rows: of a forward pass; packed ones that are joined attend to a mask of their joined
    length."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, attn_implementation="sdpa"
    )
    ids = [row.tolist() for row in tokens]
    columns = {"input_ids": ids, "completion_mask": [mask.tolist() for mask in masks]}
    data = datasets.Dataset.from_dict(columns)
    args = trl.SFTConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        max_length=CONTEXT,
        packing=packing,
        packing_strategy="bfd",
        completion_only_loss=True,
        learning_rate=3e-4,
        per_device_train_batch_size=rows,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
    )
    trainer = trl.SFTTrainer(model, args, train_dataset=data,
                             processing_class=transformers.AutoTokenizer.from_pretrained(export))
    model = trainer.accelerator.prepare(trainer.model)
    passes = (
        ROWS // rows if packing else round(ROWS * CONTEXT / np.mean([*map(len, tokens)]) / rows)
    )
    optimizer, trainer.current_gradient_accumulation_steps = trainer.create_optimizer(), passes

    def batches():
        while True:
            yield from trainer.get_train_dataloader()
    stream = batches()

    def take() -> int:
        real = 0
        for _ in range(passes):
            inputs = next(stream)
            real += (
                int(inputs["attention_mask"].sum())
                if "attention_mask" in inputs
                else inputs["input_ids"].numel()
            )
            trainer.training_step(model, inputs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return real
    return take


def main():
    argparse.ArgumentParser(
        prog="python -m checks.sft_speed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    d, folder = common.init_distributed("float32"), Path(tempfile.mkdtemp())
    tokenizer = train_tokenizer(["so it is " * 50], TokenizerConfig(vocab_size=270))
    for shape in SHAPES:
        model = hf.meta_model(shape).to_empty(device="cpu")
        init_weights(model, 0)
        hf.export(model, tokenizer, folder / "export", torch.float32)
        tokens, masks = conversations(2000, 0)
        contestants = {
            "ours": ours(shape, tokens, masks, d),
            **{
                f"TRL {name}": theirs(
                    folder / "export", tokens, masks, name.startswith("packed"), rows, folder / name
                )
                for name, rows in (("packed", ROWS), ("packed, a row a pass", 1), ("unpacked", 8))
            },
        }
        speeds = {name: [] for name in contestants}
        for turn in range(ROUNDS + 1):  # the first does not count
            for name, take in contestants.items():
                started = time.perf_counter()
                real = sum(take() for _ in range(STEPS))
                if turn:
                    speeds[name].append(real / (time.perf_counter() - started))
        best = max(median(s) for name, s in speeds.items() if name != "ours")
        print(f"{shape.n_layers} x {shape.hidden_size}: " + ", ".join(
            f"{name} {median(s):,.0f} tokens/s" for name, s in speeds.items())
              + f"; ours is {median(speeds['ours']) / best:.2f} x the better", flush=True)
        results.append(
            "sft_speed",
            bench.describe_origin("checks.sft_speed", 0, d.device)
            | dict(
                command="python -m checks.sft_speed",
                layers=shape.n_layers,
                width=shape.hidden_size,
                trl=trl.__version__,
                transformers=transformers.__version__,
                tokens_per_s=speeds,
                config=common.hash_json([CONTEXT, ROWS, ROUNDS, STEPS]),
                ratio=median(speeds["ours"]) / best,
            ),
        )
        shutil.rmtree(folder / "export")


if __name__ == "__main__":
    main()
