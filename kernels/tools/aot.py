"""Compiles every kernel, in every form that may run, for GPUs that are not here: registers, spills,
shared memory.

    python -m kernels.tools.aot                       # writes results/kernels_aot.md; some minutes
    python -m kernels.tools.aot attention_dq --arch sm_90

Triton's wheel brings LLVM and NVIDIA's ptxas, so no GPU, driver or CUDA toolkit is needed. Triton
compiles what cannot be launched without a word: a form that needs more shared memory than the chip
has, or spills registers, shows here.
"""
import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

# The interpreter has nothing to compile, and Triton reads this while it is imported.
if __name__ == "__main__" and os.environ.get("TRITON_INTERPRET") != "0":
    os.execve(sys.executable, [sys.executable, "-m", "kernels.tools.aot", *sys.argv[1:]],
              os.environ | {"TRITON_INTERPRET": "0"})

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, cross_entropy, rmsnorm, tiles

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227}  # shared memory that one program may have
TABLE = Path(__file__).parents[2] / "results" / "kernels_aot.md"
MODULES = (attention, rmsnorm, cross_entropy)
INTEGERS = ("H", "G", "T", "S", "N", "C")  # arguments of the kernels
TYPES = {"START": "i32", "ENDS": "i32", "LENGTHS": "i32", "TARGETS": "i64"}
for name in ("LSE", "DELTA", "RSTD", "DW", "RESULTS", "DIVERGENCE", "D"):
    TYPES[name] = "fp32"  # whatever the other tensors are
# An instruction of each kind in PTX, the best first.
PRODUCTS = {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "fma": r"\bfma\.rn\.f32"}


@dataclass
class Form:
    """One way in which a kernel may be compiled."""
    kernel: str
    constants: dict[str, object]
    dtype: str                   # of the tensors: bf16 or fp32
    warps: int
    stages: int
    chosen: bool                 # whether it is what an untuned run takes
    arch: str
    floats: str = "fp32"         # what a Python float becomes: Inductor passes fp64

    def __str__(self):
        c = self.constants
        words = [f"D {c['D']}" if c.get("D") else f"block {c['BLOCK']}"]
        if "BM" in c:
            words.append(f"tile {c['BM']} x {c['BN']}")
        for key, word in (("DOC", "documents"), ("ADD", "add"), ("WITH_ENTROPY", "entropy")):
            if c.get(key):
                words.append(word)
        if "BETA" in c:
            words.append(f"beta {c['BETA']}")
        if "D" in c and c["D"] is None:
            words.append("no gradient")
        words.append(f"{self.warps} warps")
        if "BN" in c:
            words.append(f"{self.stages} stages")
        if self.floats == "fp64":
            words.append("floats as fp64")
        return ", ".join(words)


def forms() -> list[Form]:
    """Every kernel with every choice of tiles, head width and mask, on every chip.

    And once with floats as fp64.
    """
    all_forms = []
    for arch in tiles.CANDIDATES:
        all_forms += attention_forms(arch) + norm_forms(arch) + loss_forms(arch)
    first_forms = {}
    for form in reversed(all_forms):  # the first of each kernel is the last to be set
        if form.arch == "sm_90":
            first_forms[form.kernel] = form
    return all_forms + [replace(form, floats="fp64") for form in first_forms.values()]


def attention_forms(arch: str) -> list[Form]:
    choices = []  # (kernel, tiles, dtype, whether an untuned run takes them)
    for kernel, candidates in tiles.CANDIDATES[arch].items():
        choices += [(kernel, choice, "bf16", choice == candidates[0]) for choice in candidates]
    choices += [(kernel, choice, "fp32", True) for kernel, choice in tiles.FP32.items()]
    found = []
    for (kernel, choice, dtype, chosen), D, doc in itertools.product(
            choices, (128, 64), (True, False)):
        constants = dict(
            D=D, BM=choice.BM, BN=choice.BN, DOC=doc, RAGGED=doc, SPLIT=attention.SPLIT,
            PRECISION="ieee" if dtype == "fp32" else "tf32")
        if not doc:
            constants |= dict(START=None, ENDS=None, LENGTHS=None)
        if choice.specialized:
            kernel += "_specialized"
        found.append(Form(kernel, constants, dtype, choice.warps, choice.stages, chosen, arch))
    for D, block in itertools.product((128, 64), (1, 128)):
        found.append(Form("attention_join", dict(D=D, BLOCK=block), "bf16", 4, 3, True, arch))
    return found


def norm_forms(arch: str) -> list[Form]:
    kernels = (("rms_norm_forward", rmsnorm.FORWARD), ("rms_norm_backward", rmsnorm.BACKWARD))
    widths = (128, 2560, rmsnorm.MAX_WIDTH)
    found = []
    for (kernel, elements), C, add, dtype in itertools.product(
            kernels, widths, (True, False), ("bf16", "fp32")):
        options = rmsnorm.launch(C, elements)
        constants = dict(ADD=add, BLOCK=options["BLOCK"])
        found.append(Form(kernel, constants, dtype, options["num_warps"], 1, True, arch))
    return found


def loss_forms(arch: str) -> list[Form]:
    block = cross_entropy.BLOCK_GPU
    kernels = [("logprobs_kernel", dict(WITH_ENTROPY=False)),
               ("logprobs_kernel", dict(WITH_ENTROPY=False, D=None)),
               ("logprobs_kernel", dict(WITH_ENTROPY=True))]
    kernels += [("kl_kernel", dict(BETA=beta)) for beta in (0.0, 0.5, 1.0)]
    found = []
    for (kernel, constants), dtype in itertools.product(kernels, ("bf16", "fp32")):
        constants = constants | dict(BLOCK=block)
        found.append(Form(kernel, constants, dtype, block // 512, 1, True, arch))
    return found


def compile_form(form: Form):
    """Triton's compiled kernel.

    Pointers, strides and widths are multiples of 16, as they are in the model.
    """
    function = next(
        getattr(module, form.kernel) for module in MODULES if hasattr(module, form.kernel))
    names = function.arg_names
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(names):
        signature[name] = type_of_argument(form, name)
        if name in form.constants:
            constants[i,] = form.constants[name]
            signature[name] = "constexpr"
        is_pointer = signature[name].startswith("*")
        if is_pointer or name.startswith("stride") or name in "CV":
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", int(form.arch[3:]), 32),
                          options=dict(num_warps=form.warps, num_stages=form.stages))


def type_of_argument(form: Form, name: str) -> str:
    """As Triton's signatures write it; * marks a pointer."""
    if name in ("scale", "eps", "temperature"):
        return form.floats
    is_attention = form.kernel.startswith("attention")
    if not name.isupper() or name in INTEGERS or (name == "V" and not is_attention):
        return "i32"  # in attention V are the values, elsewhere the vocabulary
    if name == "O" and form.kernel in ("attention_decode", "attention_join"):
        return "*fp32"
    return "*" + TYPES.get(name, form.dtype)


def measure(form: Form) -> dict:
    """What a form needs, and what it does.

    registers per thread; spilled bytes (stores + loads) per thread; shared KiB per program;
    products: the instructions that make them; fp64: whether anything is computed in it.
    """
    kernel = compile_form(form)
    ptx = kernel.asm["ptx"]
    report = assemble(ptx, kernel.metadata.target.arch)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    products = [name for name, pattern in PRODUCTS.items() if re.search(pattern, ptx)]
    return dict(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled=int(spills[1]) + int(spills[2]),
        shared=kernel.metadata.shared / 1024,
        products=products[0] if products else "",
        fp64=bool(re.search(r"\b(add|sub|mul|fma|div|max)\.(rn\.)?f64", ptx)))


def assemble(ptx: str, arch) -> str:
    """What NVIDIA's ptxas, which comes with Triton, reports of a kernel."""
    # Here: only some of Triton's platforms have this back end.
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target\s+(sm_\d+a?)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", "k.ptx", "-o", "k.o"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stderr


def problem(form: Form, measured: dict) -> str:
    """Why a form must not run ('' if it may).

    A forward form of bf16 must not spill; backward forms may, a little.
    """
    limit = SHARED_KIB[form.arch]
    if measured["shared"] > limit:
        return f"needs {measured['shared']:.0f} KiB of shared memory, {form.arch} has {limit}"
    may_spill = "forward" not in form.kernel or form.dtype != "bf16"
    if measured["spilled"] > (256 if may_spill else 0):  # 192 by Triton 3.6, once
        return f"spills {measured['spilled']} bytes"
    if measured["fp64"]:
        return "computes in fp64"
    is_large = form.kernel.startswith("attention_") and form.kernel not in (
        "attention_join", "attention_decode")
    if is_large and form.arch == "sm_90" and form.dtype == "bf16":
        if measured["products"] != "wgmma":
            return "does not use Hopper's matrix instructions"
    return ""


def markdown(rows: list[tuple[Form, dict, str]]) -> str:
    """The table for results/: what every form needs, a section per chip."""
    lines = [
        f"# The kernels, compiled ahead of time by Triton {triton.__version__}", "",
        "`python -m kernels.tools.aot` writes this with no GPU. Registers are a thread's (255 at "
        "most), spills its bytes stored and loaded again, shared memory a program's; products: the "
        "instructions that make them. The form in bold is what a run takes where "
        "`python -m kernels.tools.bench --tune` has not been run.", ""]
    for arch, kib in SHARED_KIB.items():
        lines += [
            f"## {arch}: {kib} KiB of shared memory a program", "",
            "| kernel | type | form | registers | spilled, bytes | shared, KiB | products |",
            "|---|---|---|---|---|---|---|"]
        for form, measured, wrong in rows:
            if form.arch == arch:
                name = f"**{form}**" if form.chosen else str(form)
                spilled = measured["spilled"] or ""
                lines.append(
                    f"| {form.kernel} | {form.dtype} | {name} | {measured['registers']} "
                    f"| {spilled} | {measured['shared']:.1f} | {wrong or measured['products']} |")
        lines.append("")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", nargs="*",
                        help="kernels to compile, by the beginning of their names; none: all")
    parser.add_argument("--arch", nargs="*", choices=SHARED_KIB, default=list(SHARED_KIB))
    parser.add_argument("--only_bf16_128", action="store_true",
                        help="only bf16 and head width 128: the tests' share")
    return parser.parse_args()


def is_asked_for(form: Form, args: argparse.Namespace) -> bool:
    if form.arch not in args.arch:
        return False
    if args.kernel and not form.kernel.startswith(tuple(args.kernel)):
        return False
    is_usual = form.dtype == "bf16" and form.constants.get("D") != 64
    return is_usual or not args.only_bf16_128


def main():
    args = parse_args()
    jobs = [form for form in forms() if is_asked_for(form, args)]
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for form, measured in zip(jobs, pool.map(measure, jobs)):
            wrong = problem(form, measured)
            rows.append((form, measured, wrong))
            print(f"{form.arch:6} {form.dtype:5} {form.kernel:30} {str(form):68} "
                  f"{measured['registers']:4} registers {measured['spilled']:6} bytes spilled "
                  f"{measured['shared']:6.1f} KiB  {measured['products']:5} {wrong}", flush=True)
    bad = sum(bool(wrong) for _, _, wrong in rows)
    print(f"{len(rows)} forms, {bad} that must not run")
    if len(jobs) == len(forms()):
        TABLE.write_text(markdown(rows))
        print("written:", TABLE.relative_to(Path.cwd()))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
