"""How fast is a step of distill.py beside TRL? `OMP_NUM_THREADS=1 python -m checks.dpd_speed`, four minutes.

TRL has no trainer of the whole loss: its user runs DPOTrainer (reference log-probabilities precomputed, as ours are)
and GKDTrainer (forward KL, lmbda=0: nothing is sampled) over the same pairs, so that the student goes over each
sequence twice; ours goes once. The same weights, teacher, pairs (lognormal lengths: prompts of median 24, responses of
median 32, both 4 to 100 tokens), AdamW, clipping, threads and type (fp32) in one process; the contestants take turns
over 5 rounds, each turn over the same pairs. Counted are the real tokens of both sequences of each pair, prompts
included, padding not; to TRL, too, each counts once.

TRL's steps are its own training_step on its own dataloader's batches, at the fastest of the settings tried (1 to 64
passes a step; attention "eager" or "sdpa"). In its favour: its two trainers share the model, and their gradients one
clipping and one step of AdamW; "sorted" orders the sequences of each step by length, for less padding; GKD's collator,
which would render and tokenize chats at every step, gives way to one that only pads; its trainers' loop, logging and
saving are left out. In ours: so are loop.py's; our clipping is in, as is packing the rows of each step.
TRL 1.16 has neither DPO nor GKD without padding, and its DistillationTrainer learns only from what it samples.
"""
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

import common
import distill
import hf
import loop
from checks import bench
from common import Dist
from data.chat.pairs import Pair
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from experiments import results
from model import ModelConfig, init_weights

SHAPES = [ModelConfig(4, 128, 352, 4, 2, 32, vocab_size=1024), ModelConfig(6, 256, 704, 8, 4, 32, vocab_size=1024)]
PAIRS, CONTEXT, ROUNDS, STEPS = 32, 256, 5, 2
PASSES = 8  # of each of TRL's trainers in a step


def make_pairs(n: int, seed: int) -> list[Pair]:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log([24, 32, 32]), 0.6, (n, 3)), 4, 100).astype(int)
    return [Pair(i, "", *(rng.integers(0, 250, length).tolist() for length in each)) for i, each in enumerate(lengths)]


def ours(shape: ModelConfig, teacher: Path, pairs: list[Pair], dist: Dist):
    """A function that takes a step over the next pairs."""
    cfg = distill.DistillConfig(batch_pairs=PAIRS, context=CONTEXT)
    model, optimizer = loop.build_model(shape, cfg, dist)
    init_weights(model, 0, common.assign)
    kl_teacher = hf.load_frozen(dist, teacher, cfg.dtype)
    batches = np.arange(len(pairs)).reshape(-1, PAIRS)
    logprobs = np.zeros((len(pairs), 2, 2))  # the teacher's half is for the log alone
    distill.set_logprobs(
        logprobs, 0, distill.sequence_logprobs(model, pairs, batches, cfg, dist))
    steps = iter(batches)

    def take() -> None:
        distill.train_step(model, kl_teacher, pairs, next(steps), logprobs, cfg, dist)
        common.clip_grad_norm(model, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return take


class TokenizedDPOTrainer(trl.DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        return dataset  # the parent's takes texts alone


def theirs(student: Path, teacher: Path, pairs: list[Pair], by_length: bool, folder: Path):
    """As ours. by_length: sorts the sequences of each step."""
    load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager")
    model, tokenizer = load(student), transformers.AutoTokenizer.from_pretrained(student)

    def dataset(rows: list[dict], length) -> datasets.Dataset:
        size = len(rows) * PAIRS // len(pairs)  # of a step
        steps = [rows[i:i + size] for i in range(0, len(rows), size)]
        return datasets.Dataset.from_list([row for step in steps
                                           for row in (sorted(step, key=length) if by_length else step)])

    preferences = dataset([{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
                           for pair in pairs],
                          lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))
    completions = dataset([{"input_ids": pair.prompt + response, "labels": [-100] * len(pair.prompt) + response}
                           for pair in pairs for response in (pair.chosen, pair.rejected)],
                          lambda row: len(row["input_ids"]))
    both = dict(report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, max_length=CONTEXT, learning_rate=3e-4,
                gradient_checkpointing=False, train_sampling_strategy="sequential", optim="adamw_torch_fused")
    trainers = [  # in this order: DPOTrainer needs its own head on the model, which GKDTrainer would replace
        GKDTrainer(model, load(teacher), GKDConfig(
            output_dir=str(folder / "gkd"), lmbda=0.0, beta=0.0, per_device_train_batch_size=2 * PAIRS // PASSES,
            **both), transformers.DataCollatorForSeq2Seq(tokenizer), completions, processing_class=tokenizer),
        TokenizedDPOTrainer(model, args=trl.DPOConfig(
            output_dir=str(folder / "dpo"), beta=0.1, precompute_ref_log_probs=True,
            per_device_train_batch_size=PAIRS // PASSES, **both),
            train_dataset=preferences, processing_class=tokenizer)]
    prepared = [trainer.accelerator.prepare(trainer.model) for trainer in trainers]
    streams, optimizer = [iter(trainer.get_train_dataloader()) for trainer in trainers], trainers[0].create_optimizer()
    for trainer in trainers:
        trainer.current_gradient_accumulation_steps = PASSES

    def take() -> None:
        for trainer, wrapped, stream in zip(trainers, prepared, streams):
            batches, n_tokens = trainer.get_batch_samples(stream, PASSES, trainer.args.device)
            for inputs in batches:
                trainer.training_step(wrapped, inputs, n_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return take


def compare(shape: ModelConfig, pairs: list[Pair], folder: Path, d) -> dict[str, list[float]]:
    """Tokens a second of each contestant, in each round."""
    tokenizer = train_tokenizer(["so it is " * 50], TokenizerConfig(vocab_size=270))
    for seed, who in enumerate(("student", "teacher")):
        model = hf.meta_model(shape).to_empty(device="cpu")
        init_weights(model, seed)
        hf.export(model, tokenizer, folder / who, torch.float32)
    contestants = {"ours": ours(shape, folder / "teacher", pairs, d), **{
        name: theirs(folder / "student", folder / "teacher", pairs, by_length, folder / name)
        for name, by_length in (("TRL sorted", True), ("TRL unsorted", False))}}
    speeds = {name: [] for name in contestants}
    for turn in range(ROUNDS + 1):  # the first does not count
        real = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
                   for pair in pairs[turn * STEPS * PAIRS:(turn + 1) * STEPS * PAIRS])
        for name, take in contestants.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                take()
            if turn:
                speeds[name].append(real / (time.perf_counter() - started))
    return speeds


def main():
    d, pairs = common.init_distributed("float32"), make_pairs((ROUNDS + 1) * STEPS * PAIRS, 0)
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            speeds = compare(shape, pairs, Path(folder), d)
        ratio = median(speeds["ours"]) / max(median(s) for name, s in speeds.items() if name != "ours")
        print(f"{shape.n_layers} x {shape.hidden_size}: " + ", ".join(
            f"{name} {median(s):,.0f} tokens/s" for name, s in speeds.items())
              + f"; ours is {ratio:.2f} x the better", flush=True)
        results.append("dpd_speed", bench.describe_origin("checks.dpd_speed", 0, d.device) | dict(
            command="python -m checks.dpd_speed", layers=shape.n_layers, width=shape.hidden_size,
            trl=trl.__version__, transformers=transformers.__version__, tokens_per_s=speeds,
            config=common.hash_json([PAIRS, CONTEXT, ROUNDS, STEPS, PASSES]), ratio=ratio))


if __name__ == "__main__":
    main()
