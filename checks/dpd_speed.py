"""How fast is a step of distill.py beside TRL? `OMP_NUM_THREADS=1 python -m checks.dpd_speed`, three minutes.

TRL has no trainer of both parts of the loss: its user runs DPOTrainer (reference log-probabilities precomputed, as
ours) and GKDTrainer (forward KL, lmbda=0: nothing is sampled) over the same pairs, so that the student goes over each
sequence twice. Ours goes over it once. The same weights, teacher, pairs (lognormal lengths: prompts of median 24,
responses of median 32, both at most 100 tokens), AdamW, clipping, threads and type (fp32) in one process; the
contestants take turns over 5 rounds, at each turn with the same pairs. Counted are the real tokens of both sequences of
each pair, prompts included, not padding; to TRL each counts once, not twice.

TRL's steps are its own training_step on its own dataloader's batches. In its favour: its two trainers share the model,
and their gradients one clipping and one step of AdamW (run one after the other they would be two); "sorted" puts the
sequences of a step in order of length, for less padding; its collator for GKD, which would render and tokenize chats
anew at every step, gives way to one that only pads; its trainers' loop, logging and saving are left out. In ours: it
computes its batch's packed rows within the step, but does not read the log-probabilities from disk.
TRL 1.16 has no padding-free DPO or GKD, and its DistillationTrainer samples all it learns from.
"""
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
from trl.experimental.gkd import GKDConfig, GKDTrainer

import bench
import common
import distill
import hf
import loop
import report
from data.pairs import Pair
from data.tokenizer import TokenizerConfig, train_tokenizer
from model import ModelConfig, init_weights

SHAPES = [ModelConfig(4, 128, 352, 4, 2, 32, vocab_size=1024), ModelConfig(6, 256, 704, 8, 4, 32, vocab_size=1024)]
PAIRS, CONTEXT, ROUNDS, STEPS = 32, 256, 5, 2


def make_pairs(n: int, seed: int) -> list[Pair]:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log([24, 32, 32]), 0.6, (n, 3)), 4, 100).astype(int)
    return [Pair(i, "", *(rng.integers(0, 250, length).tolist() for length in of)) for i, of in enumerate(lengths)]


def n_tokens(pairs: list[Pair]) -> int:
    return sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)


def ours(shape: ModelConfig, teacher: Path, pairs: list[Pair], d):
    """A function that takes a step over the next pairs."""
    p = distill.DistillConfig(batch_pairs=PAIRS, context=CONTEXT)
    model, optimizer = loop.build(shape, p, d)
    init_weights(model, 0, common.assign)
    guide, batches = hf.frozen(d, teacher, p.dtype), np.arange(len(pairs)).reshape(-1, PAIRS)
    frozen = np.zeros((len(pairs), 2, 2))
    for i, values in distill.score(model, pairs, batches, p, d).items():
        frozen[i, 0] = values
    steps = iter(batches)

    def take() -> None:
        distill.train_step(model, guide, pairs, next(steps), frozen, p, d)
        common.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return take


class TokenizedDPOTrainer(trl.DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        return dataset  # it takes only texts


def theirs(student: Path, teacher: Path, pairs: list[Pair], n_passes: tuple[int, int], by_length: bool, folder: Path):
    """n_passes: forward passes of a step, of distillation and of DPO; by_length: sorts the sequences of each step."""
    load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa")
    model, tokenizer = load(student), transformers.AutoTokenizer.from_pretrained(student)

    def rows(of_step, length) -> datasets.Dataset:
        steps = [of_step(pairs[i:i + PAIRS]) for i in range(0, len(pairs), PAIRS)]
        return datasets.Dataset.from_list([row for step in steps for row in (
            sorted(step, key=length) if by_length else step)])

    preferences = rows(lambda step: [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen,
                                      "rejected_ids": pair.rejected} for pair in step],
                       lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))
    completions = rows(lambda step: [{"input_ids": pair.prompt + response,
                                      "labels": [-100] * len(pair.prompt) + response}
                                     for pair in step for response in (pair.chosen, pair.rejected)],
                       lambda row: len(row["input_ids"]))
    common_args = dict(
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, max_length=CONTEXT, learning_rate=3e-4,
        gradient_checkpointing=False, train_sampling_strategy="sequential", optim="adamw_torch_fused")
    trainers = [
        GKDTrainer(model, load(teacher), args=GKDConfig(
            output_dir=str(folder / "gkd"), lmbda=0.0, beta=0.0,
            per_device_train_batch_size=2 * PAIRS // n_passes[0], **common_args),
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer), train_dataset=completions,
            processing_class=tokenizer),
        TokenizedDPOTrainer(model, args=trl.DPOConfig(
            output_dir=str(folder / "dpo"), beta=0.1, precompute_ref_log_probs=True,
            per_device_train_batch_size=PAIRS // n_passes[1], **common_args),
            train_dataset=preferences, processing_class=tokenizer)]
    models = [trainer.accelerator.prepare(trainer.model) for trainer in trainers]
    streams, optimizer = [iter(trainer.get_train_dataloader()) for trainer in trainers], trainers[0].create_optimizer()
    for trainer, n in zip(trainers, n_passes):
        trainer.current_gradient_accumulation_steps = n

    def take() -> None:
        for trainer, prepared, stream, n in zip(trainers, models, streams, n_passes):
            batches, n_items = trainer.get_batch_samples(stream, n, trainer.args.device)
            for inputs in batches:
                trainer.training_step(prepared, inputs, n_items)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return take
