"""What memory do the losses need? `python -m kernels.tools.memory`: plain PyTorch beside ours.

One forward and backward pass each, in a process of its own, since the peak of a process on a CPU is
that of its whole life. The largest, log p + KL in plain PyTorch, is five times the 2.7 GB of one
model's logits.

Shapes: N tokens, C width, V vocabulary.
"""
import argparse
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F

from kernels.cross_entropy import linear_cross_entropy, linear_logprobs_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=166144)
    parser.add_argument("--loss", choices=LOSSES, help="only this one, in this process")
    args = parser.parse_args()
    if args.loss:
        print(measure(args.loss, args.tokens, args.width, args.vocabulary))
    else:
        print_table(args)


def print_table(args) -> None:
    print(f"peak memory of loss + gradients, {args.tokens} tokens, width {args.width}, "
          f"vocabulary {args.vocabulary}, fp32, above inputs and weights:")
    sizes = [f"--{name}={getattr(args, name)}" for name in ("tokens", "width", "vocabulary")]
    for loss in LOSSES:
        command = [sys.executable, "-m", "kernels.tools.memory", f"--loss={loss}", *sizes]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        print(f"  {loss:28} {float(done.stdout):6.2f} GB")


def measure(loss: str, N: int, C: int, V: int) -> float:
    """Peak memory in GB, above inputs and weights, of one forward and backward pass.

    Call it in a fresh process.
    """
    hidden, weight, *teacher = (torch.randn(n, C, device=DEVICE).div_(16) for n in (N, V, N, V))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(V, (N,), device=DEVICE)
    before = peak_memory()
    LOSSES[loss](hidden, weight, targets, *teacher).backward()
    return peak_memory() - before


def peak_memory() -> float:
    """Of this process so far, in GB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def plain_cross_entropy(hidden, weight, targets, *teacher):
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def chunked_cross_entropy(hidden, weight, targets, *teacher):
    return linear_cross_entropy(hidden, weight, targets)


def plain_logprobs_kl(hidden, weight, targets, teacher_hidden, teacher_weight):
    log_q = (hidden @ weight.T).log_softmax(-1)
    log_p = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return log_q.gather(1, targets[:, None]).sum() + divergence


def chunked_logprobs_kl(hidden, weight, targets, *teacher):
    return torch.cat(linear_logprobs_kl(hidden, weight, targets, *teacher)).sum()


LOSSES = {
    "cross-entropy, plain": plain_cross_entropy,
    "cross-entropy, chunked": chunked_cross_entropy,
    "log p + forward KL, plain": plain_logprobs_kl,
    "log p + forward KL, chunked": chunked_logprobs_kl,
}


if __name__ == "__main__":
    main()
