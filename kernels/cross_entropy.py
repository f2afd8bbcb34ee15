"""Losses from hidden states and the output matrix, without the (N, V) logits.

At V = 166144 the fp32 logits of 4096 tokens are 2.7 GB, and autograd holds them more than once. So tokens go through
in chunks: logits of one chunk, what is needed of them, next chunk. `python -m kernels.cross_entropy` shows the memory.

Shapes: N tokens (B * T), C width, V vocabulary. Statistics and the weight's gradient add up in fp32.
"""
import sys

import torch

CHUNK = 1 << 21  # logits held at once on the CPU: 8 MB in fp32, about what stays in its caches
CHUNK_GPU = 1 << 28  # 1 GB: chunks large enough that a matrix product fills the device


def _chunks(hidden: torch.Tensor, weight: torch.Tensor):
    """Slices of tokens whose logits are about a chunk; never so few that the matrix products starve."""
    size = max(128, (CHUNK_GPU if hidden.is_cuda else CHUNK) // weight.shape[0])
    return [slice(i, i + size) for i in range(0, hidden.shape[0], size)]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is made in the forward pass, while a chunk's logits are at hand: they are never made twice."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index):
        losses = torch.zeros(hidden.shape[0], dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        need_grad = any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if need_grad else None
        d_weight = torch.zeros_like(weight, dtype=losses.dtype) if need_grad else None
        for rows in _chunks(hidden, weight):
            h, target = hidden[rows], targets[rows]
            kept = target != ignore_index
            index = target.clamp(min=0)[:, None]
            logits = _wide(h @ weight.T)
            log_z = logits.logsumexp(-1)
            losses[rows] = (log_z - logits.gather(1, index)[:, 0]) * kept
            if need_grad:  # d loss / d logits = softmax - onehot, for the tokens that count
                d_logits = logits.sub_(log_z[:, None]).exp_()
                d_logits.scatter_add_(1, index, torch.full_like(d_logits[:, :1], -1.0))
                d_logits = d_logits.mul_(kept[:, None]).to(h.dtype)
                d_hidden[rows] = d_logits @ weight
                d_weight += d_logits.T @ h
        if need_grad:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss.to(d_weight.dtype), None, None


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                         ignore_index: int = -100) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats; a scalar, fp32.

    hidden (N, C), weight (V, C), targets (N,) int64. Tokens whose target is ignore_index do not count. The sum, not
    the mean: the caller divides by the global number of trained tokens, over ranks and micro-batches alike.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index)


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities may be used non-linearly (ratios, margins), so the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        logprobs = torch.empty(hidden.shape[0], dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        for rows in _chunks(hidden, weight):
            logits = _wide(hidden[rows] @ weight.T).div_(temperature)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - logits.logsumexp(-1)
        return logprobs

    @staticmethod
    def backward(ctx, d_logprobs):
        hidden, weight, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=d_logprobs.dtype)
        for rows in _chunks(hidden, weight):
            d = d_logprobs[rows, None] / ctx.temperature
            d_logits = _wide(hidden[rows] @ weight.T).div_(ctx.temperature).softmax(-1).mul_(-d)
            d_logits = d_logits.scatter_add_(1, targets[rows, None], d).to(hidden.dtype)
            d_hidden[rows] = d_logits @ weight
            d_weight += d_logits.T @ hidden[rows]
        return d_hidden, d_weight.to(weight.dtype), None, None


def linear_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                    temperature: float = 1.0) -> torch.Tensor:
    """log softmax(hidden @ weight.T / temperature)[target] of each token: (N,) fp32, in nats.

    hidden (N, C), weight (V, C), targets (N,) int64, all valid.
    """
    return _LinearLogprobs.apply(hidden, weight, targets, temperature)


def _peak_memory(kind: str, N: int, C: int, V: int) -> float:
    """Peak memory in GB, above inputs and weight, of one forward and backward pass; call it in a fresh process."""
    import resource
    device = "cuda" if torch.cuda.is_available() else "cpu"
    def peak():
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    hidden = torch.randn(N, C, device=device).requires_grad_()
    weight = torch.randn(V, C, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    before = peak()
    if kind == "plain":
        torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    else:
        linear_cross_entropy(hidden, weight, targets).backward()
    return peak() - before


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(_peak_memory(sys.argv[1], *map(int, sys.argv[2:])))
    else:
        import subprocess
        N, C, V = 4096, 256, 166144
        print(f"peak memory of loss + gradients, {N} tokens, width {C}, vocabulary {V}, fp32, above inputs and weight:")
        for kind in ("plain", "chunked"):
            command = [sys.executable, "-m", "kernels.cross_entropy", kind, str(N), str(C), str(V)]
            output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            print(f"  {kind:8} {float(output):6.2f} GB")
