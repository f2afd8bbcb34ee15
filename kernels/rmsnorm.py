"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), alone and with the residual add before it."""
import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x (..., C) of any float type; weight (C,). Statistics in fp32 (float64 for float64 x), result in x's type.
    """
    x32 = x if x.dtype == torch.float64 else x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normed.type_as(x) * weight


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """(rms_norm(x + residual), x + residual): the pair that a pre-norm block needs; all (..., C)."""
    total = x + residual
    return rms_norm(total, weight, eps), total
