"""Ahead-of-time compilation, with no GPU: does every form fit the chips that it may run on?"""

import re
import subprocess
import sys

import pytest

from conftest import ROOT
from kernels.tiles import CANDIDATES
from kernels.tools.aot import SHARED_KIB, Form, forms, problem


def compiled(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "kernels.tools.aot", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *lines, count = done.stdout.splitlines()
    assert count == f"{len(lines)} forms, 0 that must not run"
    return lines


@pytest.mark.long
def test_every_choice_of_the_3b_models_attention_fits():
    """bf16, head width 128, every tile that tuning may choose: no spill forward, shared memory
    below the chip's, Hopper's own products, fp32 arithmetic where Inductor passes fp64.
    results/kernels_aot.md has all forms."""
    kernels = ("attention_forward", "attention_dq", "attention_dkdv")
    lines = compiled(*kernels, "--only_bf16_128", "--arch", "sm_80", "sm_90")
    for arch in ("sm_80", "sm_90"):
        for kernel, some in CANDIDATES[arch].items():
            if kernel != "attention_decode":
                pattern = rf"{arch} +bf16 +{kernel}(_specialized)? "
                own_lines = [
                    line for line in lines if re.match(pattern, line) and "fp64" not in line
                ]
                assert len(own_lines) == 2 * len(some), (arch, kernel)  # with documents and without
    assert sum("floats as fp64" in line for line in lines) == 4
    assert any("specialized" in line and "wgmma" in line for line in lines)


def test_the_small_kernels_fit():
    assert (
        len(
            compiled(
                "rms_norm",
                "attention_decode",
                "attention_join",
                "--only_bf16_128",
                "--arch",
                "sm_90",
            )
        )
        > 12
    )


def form(kernel="attention_forward", **changes) -> Form:
    usual = dict(
        kernel=kernel, constants={}, dtype="bf16", warps=8, stages=3, chosen=True, arch="sm_90"
    )
    return Form(**usual | changes)


@pytest.mark.parametrize(
    "what, found, changes",
    [
        ("shared", dict(shared=228.0), {}),
        ("shared", dict(shared=164.0), dict(arch="sm_80")),
        ("spills", dict(spilled=8), {}),
        ("spills", dict(spilled=400), dict(kernel="attention_dkdv")),
        ("fp64", dict(fp64=True), {}),
        ("Hopper", dict(products="mma"), {}),
        ("", {}, {}),
        ("", dict(spilled=8), dict(kernel="attention_dkdv")),
    ],
)
def test_what_must_not_run_is_named(what, found, changes):
    good = dict(registers=100, spilled=0, shared=100.0, products="wgmma", fp64=False)
    said = problem(form(**changes), good | found)
    assert what in said and bool(what) == bool(said)


def test_a_form_that_is_too_large_is_found_by_compiling_it(tmp_path):
    """Triton compiles it without a word; it could not be launched."""
    code = (
        "from kernels.tools import aot; "
        "form = next(f for f in aot.forms() if f.kernel == 'attention_forward'); "
        "form.constants |= dict(BM=128, BN=128); form.stages = 4; "
        "print(aot.problem(form, aot.measure(form)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "0", "HOME": str(tmp_path)},
    )
    assert f"shared memory, sm_90 has {SHARED_KIB['sm_90']}" in done.stdout, (
        done.stdout + done.stderr[-2000:]
    )


def test_the_table_has_every_form():
    table = (ROOT / "results" / "kernels_aot.md").read_text()
    for f in forms():
        assert f"| {f.kernel} | {f.dtype} | {f'**{f}**' if f.chosen else f} |" in table, f
