"""Do the checks notice a broken kernel? Each mutant is a copy of a kernel's file with one mistake
in it."""

import importlib.util
import itertools

import pytest
from triton.runtime.errors import InterpreterError

from conftest import ROOT
from kernels import INTERPRETED
from kernels.tools import check

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a broken kernel may hang a GPU")

MUTANTS = {
    check.masks: [
        ("sees = key[None, :] <= position[:, None]", "sees = key[None, :] < position[:, None] + 2"),
        ("sees &= key[None, :] >= start[:, None]", "sees &= key[None, :] >= start[:, None] - 1"),
        ("sees = key[:, None] <= (row + past)[None, :]", "sees = key[:, None] <= row[None, :]"),
        ("sees &= key[:, None] >= start[None, :]", "sees &= key[:, None] > start[None, :]"),
        ("mask=(row < n)[:, None], other=0.0", "mask=(row < n + 1)[:, None], other=0.0"),
        (
            "diagonal = tl.maximum((position + 1) // BN * BN, first)",
            "diagonal = tl.maximum(last // BN * BN, first)",
        ),
        ("tl.minimum(row0 + BM, T) - 1), BN) * BN", "row0), BN) * BN"),
        ("if (row0 < whole) | (row0 >= tail):", "if row0 >= tail:"),
        ("if (row0 < whole) | (row0 >= tail):", "if row0 < whole:"),
        ("last = tl.load(ENDS + 1)", "last = tl.load(ENDS)"),
        # scale, softmax and its correction terms
        ("m_new = tl.maximum(m, tl.max(s, 1) * scale)", "m_new = m + 1.0e30"),
        ("p = tl.exp2(s * scale - m_new[:, None])", "p = tl.exp2(s - m_new[:, None])"),
        ("l = l * shrink + tl.sum(p, 1)", "l = l + tl.sum(p, 1)"),
        ("v, acc * shrink[:, None]", "v, acc"),
        ("l = tl.where(l == 0.0, 1.0, l)", "l = l"),
        ("m + tl.log2(l), mask=inside", "m, mask=inside"),
        (" - delta[:, None])", ")"),
        (" - delta[None, :])", ")"),
        ("(dq * tl.cast(scale, tl.float32))", "(dq)"),
        ("(dk * tl.cast(scale, tl.float32))", "(dk)"),
        ("ds.to(k.dtype), k, dq,", "p.to(k.dtype), k, dq,"),
        # heads
        (
            "head_of(K, b, h // G, stride_kb, stride_kh)",
            "head_of(K, b, h % G, stride_kb, stride_kh)",
        ),
        ("h = hk * G + g", "h = hk * G"),
    ],
    check.layouts: [
        ("head_of(K, b, h // G, stride_kb, stride_kh)", "head_of(K, b, 0, stride_kb, stride_kh)"),
        ("head_of(DO, b, h, stride_dob, stride_doh)", "head_of(DO, b * T, h, H * D, D)"),
        ("map(with_last_dim_contiguous, (q, k, v, do))", "(q, k, v, do)"),
    ],
    check.visits: [
        ("first = tl.load(START + tl.cast(b, tl.int64) * T + row0) // BN * BN", "first = 0"),
        ("last = tl.minimum(position + BM, S)", "last = S"),
        ("last = tl.load(ENDS + 1)", "last = T"),
    ],
    check.specialized: [
        ("sees = key[None, :] <= (row + S - T)[:, None]", "sees = key[None, :] <= row[:, None]"),
        ("s, v_rows.load([n, 0])", "s, v_rows.load([0, 0])"),
        ("[T], [1], [BM]).load([row0])", "[T], [1], [BM]).load([0])"),
    ],
    check.decoding: [
        ("start * 0 + S - 1, start", "start * 0 + S, start"),
        ("start += tl.load(START + b)", "start += 0"),
        ("weight = tl.exp2(lse - tl.max(lse, 0))", "weight = tl.exp2(lse * 0.0)"),
    ],
    check.check_rms_norm: [
        ("tl.sum(x * x, 0) / C + tl.cast(eps, tl.float32)", "tl.sum(x * x, 0) / C"),
        ("tl.sum(x * x, 0) / C", "tl.sum(x * x, 0) / BLOCK"),
        ("x = total.to(tl.float32)", "x = total.to(tl.float32) * 2"),
        ("(normed * w)", "normed"),
        ("x = tl.load(X + row * stride_x", "x = tl.load(X + row * C"),
        ("(g - n * (tl.sum(g * n, 0) / C))", "g"),
        ("        g = dy * w", "        g = dy"),
        ("dw += dy * n", "dw += g * n"),
        ("        if ADD:\n            dx +=", "        if False:\n            dx +="),
        ("n = x * tl.load(RSTD + row)", "n = x"),
        ("dx.to(DX.dtype.element_ty), mask=inside)", "dx.to(DX.dtype.element_ty))"),
    ],
    check.check_cross_entropy: [
        (
            "total = tl.exp(drop) * total + tl.sum(tl.exp(x), 0)",
            "total = total + tl.sum(tl.exp(x), 0)",
        ),
        ("new_top = tl.maximum(top, tl.max(x, 0))", "new_top = tl.max(x, 0)"),
        (" + drop * tl.exp(drop) * total\n", "\n"),
        ("beta=0, alpha=1 / temperature)", "beta=0, alpha=1)"),
        ("tl.where(column == target, 1.0, 0.0)", "0.0"),
        ("mask=column < V, other=", "mask=column < V + 1, other="),
        ("d -= tl.load(D + R + row)", "d += tl.load(D + R + row)"),
        ("parts, s = p * log_ratio, -p", "parts, s = -q * log_ratio, -p"),  # the other KL
        ("(s - tl.exp(log_q) * s_sum)", "s"),
        ("total.addmm_(a, b)", "total.copy_(a @ b)"),
    ],
}
FILES = {
    check.check_rms_norm: "rmsnorm",
    check.check_cross_entropy: "cross_entropy",
}  # the others are attention's
numbers = itertools.count()


def load(folder, name: str, old: str, new: str):
    """kernels/<name>.py as a module of its own, the first `old` replaced, its operators in a
    namespace of theirs."""
    source = (ROOT / "kernels" / f"{name}.py").read_text()
    assert old in source, f"kernels/{name}.py has changed: the mutant's line is not there: {old}"
    file = folder / f"{name}_mutant{next(numbers)}.py"
    file.write_text(source.replace(old, new, 1).replace("nanobeige::", f"{file.stem}::"))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "checks, old, new",
    [
        pytest.param(checks, old, new, marks=pytest.mark.long if i > 1 else ())
        for checks, mutants in MUTANTS.items()
        for i, (old, new) in enumerate(mutants)
    ],
    ids=lambda x: x.__name__ if callable(x) else None,
)
def test_a_broken_kernel_is_noticed(tmp_path, checks, old, new):
    module = load(tmp_path, FILES.get(checks, "attention"), old, new)
    try:
        noticed = next((finding.what for finding in checks(module) if not finding.ok), None)
    except (AssertionError, InterpreterError) as error:  # an access outside of every tensor
        noticed = str(error)
    assert noticed, "nobody noticed"
