"""How fast is a step of distill.py beside TRL? Four minutes:

    OMP_NUM_THREADS=1 python -m checks.dpd_speed

TRL has no trainer of the whole loss: its user runs DPOTrainer (reference log-probabilities
precomputed, as ours are) and GKDTrainer (forward KL, lmbda=0: nothing is sampled) over the same
pairs, so that the student goes over each sequence twice; ours goes once. The same weights, teacher,
pairs (lognormal lengths: prompts of median 24, responses of median 32, both 4 to 100 tokens),
AdamW, clipping, threads and type (fp32) in one process; the contestants take turns over 5 rounds,
each turn over the same pairs. Counted are the real tokens of both sequences of each pair, prompts
included, padding not; to TRL, too, each counts once.

TRL's steps are its own training_step on its own dataloader's batches, at the fastest of the
settings tried (1 to 64 passes a step; attention "eager" or "sdpa"). In its favour: its two trainers
share the model, and their gradients one clipping and one step of AdamW; "sorted" orders the
sequences of each step by length, for less padding; GKD's collator, which would render and tokenize
chats at every step, gives way to one that only pads; its trainers' loop, logging and saving are
left out. In ours: so are loop.py's; our clipping is in, as is packing the rows of each step. TRL
1.16 has neither DPO nor GKD without padding, and its DistillationTrainer learns only from what it
samples.
"""
import argparse
import tempfile
import time
from collections.abc import Callable
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
from data.chat.pairs import Pair, to_sequences
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from experiments import results
from model import ModelConfig, init_weights

SHAPES = [
    ModelConfig(4, 128, 352, 4, 2, 32, vocab_size=1024),
    ModelConfig(6, 256, 704, 8, 4, 32, vocab_size=1024),
]
PAIRS = 32    # of a step
CONTEXT = 256
ROUNDS = 5
STEPS = 2     # of a turn
PASSES = 8    # of each of TRL's trainers in a step


def make_pairs(n: int, seed: int) -> list[Pair]:
    """Random tokens, of uneven lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log([24, 32, 32]), 0.6, (n, 3))
    lengths = np.clip(lengths, 4, 100).astype(int)
    pairs = []
    for i, pair_lengths in enumerate(lengths):
        prompt, chosen, rejected = (rng.integers(0, 250, n).tolist() for n in pair_lengths)
        pairs.append(Pair(i, "", prompt, chosen, rejected))
    return pairs


def ours(shape: ModelConfig, teacher: Path, pairs: list[Pair], dist: Dist) -> Callable[[], None]:
    """A function that takes a step over the next pairs."""
    cfg = distill.DistillConfig(batch_pairs=PAIRS, context=CONTEXT)
    model, optimizer = loop.build_model(shape, cfg, dist)
    init_weights(model, 0, common.assign)
    kl_teacher = hf.load_frozen(dist, teacher, cfg.dtype)
    batches = np.arange(len(pairs)).reshape(-1, PAIRS)
    cached_logprobs = np.zeros((len(pairs), 2, 2))  # the teacher's half is for the log alone
    sums = distill.sequence_logprobs(model, pairs, batches, cfg, dist)
    distill.set_logprobs(cached_logprobs, distill.REFERENCE, sums)
    steps = iter(batches)

    def take_step() -> None:
        distill.train_step(model, kl_teacher, pairs, next(steps), cached_logprobs, cfg, dist)
        common.clip_grad_norm(model, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take_step


class TokenizedDPOTrainer(trl.DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        return dataset  # the parent's takes texts alone


def load_theirs(path: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager")


def preferences(pairs: list[Pair]) -> list[dict]:
    """The pairs as DPOTrainer has them."""
    return [
        {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
        for pair in pairs
    ]


def preference_length(row: dict) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def completions(pairs: list[Pair]) -> list[dict]:
    """Both responses of each pair as GKDTrainer has them."""
    return [
        {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
        for prompt, response in to_sequences(pairs)
    ]


def completion_length(row: dict) -> int:
    return len(row["input_ids"])


def make_dataset(
    rows: list[dict], n_steps: int, length: Callable[[dict], int] | None
) -> datasets.Dataset:
    """length: sorts the rows of each step."""
    rows_per_step = len(rows) // n_steps
    ordered = []
    for first in range(0, len(rows), rows_per_step):
        step = rows[first:first + rows_per_step]
        ordered += sorted(step, key=length) if length else step
    return datasets.Dataset.from_list(ordered)


def make_trainers(
    student: Path, teacher: Path, pairs: list[Pair], by_length: bool, folder: Path
) -> list[transformers.Trainer]:
    """GKDTrainer and DPOTrainer of one model, in this order: DPOTrainer needs its own head on the
    model, which GKDTrainer would replace."""
    model = load_theirs(student)
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    n_steps = len(pairs) // PAIRS
    shared = dict(
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, max_length=CONTEXT,
        learning_rate=3e-4, gradient_checkpointing=False, train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
    )
    gkd = GKDTrainer(
        model,
        load_theirs(teacher),
        GKDConfig(
            output_dir=str(folder / "gkd"), lmbda=0.0, beta=0.0,
            per_device_train_batch_size=2 * PAIRS // PASSES, **shared,
        ),
        transformers.DataCollatorForSeq2Seq(tokenizer),
        make_dataset(completions(pairs), n_steps, completion_length if by_length else None),
        processing_class=tokenizer,
    )
    dpo = TokenizedDPOTrainer(
        model,
        args=trl.DPOConfig(
            output_dir=str(folder / "dpo"), beta=0.1, precompute_ref_log_probs=True,
            per_device_train_batch_size=PAIRS // PASSES, **shared,
        ),
        train_dataset=make_dataset(
            preferences(pairs), n_steps, preference_length if by_length else None),
        processing_class=tokenizer,
    )
    return [gkd, dpo]


def theirs(
    student: Path, teacher: Path, pairs: list[Pair], by_length: bool, folder: Path
) -> Callable[[], None]:
    """As ours. by_length: sorts the sequences of each step."""
    trainers = make_trainers(student, teacher, pairs, by_length, folder)
    model = trainers[0].model
    prepared = [trainer.accelerator.prepare(trainer.model) for trainer in trainers]
    streams = [iter(trainer.get_train_dataloader()) for trainer in trainers]
    optimizer = trainers[0].create_optimizer()
    for trainer in trainers:
        trainer.current_gradient_accumulation_steps = PASSES

    def take_step() -> None:
        for trainer, wrapped, stream in zip(trainers, prepared, streams):
            batches, n_tokens = trainer.get_batch_samples(stream, PASSES, trainer.args.device)
            for inputs in batches:
                trainer.training_step(wrapped, inputs, n_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take_step


def count_tokens(pairs: list[Pair]) -> int:
    """The real tokens of both sequences of each pair."""
    return sum(len(prompt) + len(response) for prompt, response in to_sequences(pairs))


def compare(
    shape: ModelConfig, pairs: list[Pair], folder: Path, dist: Dist
) -> dict[str, list[float]]:
    """Tokens per second of each contestant, in each round."""
    tokenizer = train_tokenizer(["so it is " * 50], TokenizerConfig(vocab_size=270))
    student, teacher = folder / "student", folder / "teacher"
    for seed, export in enumerate((student, teacher)):
        model = hf.meta_model(shape).to_empty(device="cpu")
        init_weights(model, seed)
        hf.export(model, tokenizer, export, torch.float32)
    contestants = {
        "ours": ours(shape, teacher, pairs, dist),
        "TRL sorted": theirs(student, teacher, pairs, True, folder / "TRL sorted"),
        "TRL unsorted": theirs(student, teacher, pairs, False, folder / "TRL unsorted"),
    }
    speeds = {name: [] for name in contestants}
    for turn in range(ROUNDS + 1):  # the first does not count
        n_tokens = count_tokens(pairs[turn * STEPS * PAIRS:(turn + 1) * STEPS * PAIRS])
        for name, take_step in contestants.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                take_step()
            if turn:
                speeds[name].append(n_tokens / (time.perf_counter() - started))
    return speeds


def main():
    argparse.ArgumentParser(
        prog="python -m checks.dpd_speed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    dist = common.init_distributed("float32")
    pairs = make_pairs((ROUNDS + 1) * STEPS * PAIRS, 0)
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            speeds = compare(shape, pairs, Path(folder), dist)
        medians = {name: median(rounds) for name, rounds in speeds.items()}
        ratio = medians["ours"] / max(medians["TRL sorted"], medians["TRL unsorted"])
        texts = [f"{name} {speed:,.0f} tokens/s" for name, speed in medians.items()]
        print(f"{shape.n_layers} x {shape.hidden_size}: {', '.join(texts)}; "
              f"ours is {ratio:.2f} x the better", flush=True)
        origin = bench.describe_origin("checks.dpd_speed", 0, dist.device)
        results.append("dpd_speed", origin | dict(
            command="python -m checks.dpd_speed",
            layers=shape.n_layers,
            width=shape.hidden_size,
            trl=trl.__version__,
            transformers=transformers.__version__,
            tokens_per_s=speeds,
            config=common.hash_json([PAIRS, CONTEXT, ROUNDS, STEPS, PASSES]),
            ratio=ratio,
        ))


if __name__ == "__main__":
    main()
