"""Compiles every kernel, in every form that may run, for GPUs that are not here: registers, spills, shared memory.

    python -m kernels.tools.aot                       # writes results/kernels_aot.md; some minutes
    python -m kernels.tools.aot attention_dq --arch sm_90

Triton's wheel brings LLVM and NVIDIA's ptxas, so no GPU, driver or CUDA toolkit is needed. Triton compiles what cannot
be launched without a word: a form that needs more shared memory than the chip has, or spills registers, shows here.
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

if __name__ == "__main__" and os.environ.get("TRITON_INTERPRET") != "0":  # the interpreter has nothing to compile
    os.execve(sys.executable, [sys.executable, "-m", "kernels.tools.aot", *sys.argv[1:]],
              os.environ | {"TRITON_INTERPRET": "0"})

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, cross_entropy, rmsnorm, tiles

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227}  # shared memory that one program may have
TABLE = Path(__file__).parent.parent / "results" / "kernels_aot.md"


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
        what = f"D {c['D']}" if c.get("D") else f"block {c['BLOCK']}"
        what += f", tile {c['BM']} x {c['BN']}" if "BM" in c else ""
        what += ", documents" * bool(c.get("DOC")) + ", add" * bool(c.get("ADD"))
        what += ", entropy" * bool(c.get("WITH_ENTROPY")) + (f", beta {c['BETA']}" if "BETA" in c else "")
        what += ", no gradient" * ("D" in c and c["D"] is None)
        what += f", {self.warps} warps" + f", {self.stages} stages" * ("BN" in c)
        return what + ", floats as fp64" * (self.floats == "fp64")


MODULES = (attention, rmsnorm, cross_entropy)
TYPES = {"START": "i32", "ENDS": "i32", "TARGETS": "i64"} | dict.fromkeys(  # fp32 whatever the others are:
    ("LSE", "DELTA", "RSTD", "DW", "RESULTS", "DIVERGENCE", "D"), "fp32")


def forms() -> list[Form]:
    """Every kernel with every choice of tiles, head width and mask, on every chip that may run it."""
    found = []
    for arch, kernels in tiles.CANDIDATES.items():
        choices = [(kernel, choice, "bf16", choice == some[0]) for kernel, some in kernels.items() for choice in some]
        choices += [(kernel, choice, "fp32", True) for kernel, choice in tiles.FP32.items()]
        for (kernel, choice, dtype, chosen), D, doc in itertools.product(choices, (128, 64), (True, False)):
            constants = dict(D=D, BM=choice.BM, BN=choice.BN, DOC=doc, PRECISION="ieee" if dtype == "fp32" else "tf32",
                             SPLIT=attention.SPLIT) | ({} if doc else dict(START=None, ENDS=None))
            found.append(Form(kernel + "_specialized" * choice.specialized, constants, dtype, choice.warps,
                              choice.stages, chosen, arch))
        for D, block in itertools.product((128, 64), (1, 128)):
            found.append(Form("attention_join", dict(D=D, BLOCK=block), "bf16", 4, 3, True, arch))
        for (kernel, elements), C, add, dtype in itertools.product(
                (("rms_norm_forward", rmsnorm.FORWARD), ("rms_norm_backward", rmsnorm.BACKWARD)),
                (128, 2560, rmsnorm.MAX_WIDTH), (True, False), ("bf16", "fp32")):
            options = rmsnorm.launch(C, elements)
            constants = dict(ADD=add, BLOCK=options["BLOCK"])
            found.append(Form(kernel, constants, dtype, options["num_warps"], 1, True, arch))
        block = cross_entropy.BLOCK_GPU
        for constants, dtype in itertools.product(
                (dict(WITH_ENTROPY=False), dict(WITH_ENTROPY=False, D=None), dict(WITH_ENTROPY=True),
                 dict(BETA=0.0), dict(BETA=0.5), dict(BETA=1.0)), ("bf16", "fp32")):
            kernel = "kl_kernel" if "BETA" in constants else "logprobs_kernel"
            found.append(Form(kernel, constants | dict(BLOCK=block), dtype, block // 512, 1, True, arch))
    first = {form.kernel: form for form in reversed(found) if form.arch == "sm_90"}
    return found + [replace(form, floats="fp64") for form in first.values()]


def compile_form(form: Form):
    """Triton's compiled kernel. Pointers, strides and widths are multiples of 16, as they are in the model."""
    function = next(getattr(module, form.kernel) for module in MODULES if hasattr(module, form.kernel))
    constants = {name: value for name, value in form.constants.items() if name in function.arg_names}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("scale", "eps", "temperature"):
            return form.floats
        vocabulary = name == "V" and not form.kernel.startswith("attention")  # there V are the values
        if not name.isupper() or name in ("H", "G", "T", "S", "N", "C") or vocabulary:
            return "i32"
        fp32 = form.kernel in ("attention_decode", "attention_join") and name == "O"
        return "*fp32" if fp32 else "*" + TYPES.get(name, form.dtype)

    signature = {name: type_of(name) for name in function.arg_names}
    place = {name: (i,) for i, name in enumerate(function.arg_names)}
    aligned = {place[name]: [["tt.divisibility", 16]] for name, kind in signature.items()
               if kind[0] == "*" or name.startswith("stride") or name in "CV"}
    source = ASTSource(fn=function, signature=signature, constexprs={place[n]: v for n, v in constants.items()},
                       attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", int(form.arch[3:]), 32),
                          options=dict(num_warps=form.warps, num_stages=form.stages))


def measure(form: Form) -> dict:
    """Registers and spilled bytes (stores + loads) a thread, shared KiB a program, matrix instructions, any fp64."""
    from triton.backends.nvidia.compiler import get_ptxas
    kernel = compile_form(form)
    ptx = kernel.asm["ptx"]
    target = re.search(r"\.target\s+(sm_\d+a?)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(ptx)
        said = subprocess.run([get_ptxas(kernel.metadata.target.arch).path, "-v", f"--gpu-name={target}", "k.ptx", "-o",
                               "k.o"], cwd=folder, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    products = {name: len(re.findall(pattern, ptx)) for name, pattern in
                {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "fma": r"\bfma\.rn\.f32"}.items()}
    return dict(registers=int(re.search(r"Used (\d+) registers", said)[1]), spilled=int(spilled[1]) + int(spilled[2]),
                shared=kernel.metadata.shared / 1024, products=next((n for n, count in products.items() if count), ""),
                fp64=bool(re.search(r"\b(add|sub|mul|fma|div|max)\.(rn\.)?f64", ptx)))


def problem(form: Form, found: dict) -> str:
    """Why a form must not run ('' if it may). A forward form of bf16 must not spill; backward forms may, a little."""
    if found["shared"] > SHARED_KIB[form.arch]:
        return f"needs {found['shared']:.0f} KiB of shared memory, {form.arch} has {SHARED_KIB[form.arch]}"
    if found["spilled"] > (0 if "forward" in form.kernel and form.dtype == "bf16" else 256):  # 192 by Triton 3.6, once
        return f"spills {found['spilled']} bytes"
    if found["fp64"]:
        return "computes in fp64"
    if form.arch == "sm_90" and form.kernel.startswith("attention_") and form.dtype == "bf16" \
            and form.kernel not in ("attention_join", "attention_decode") and found["products"] != "wgmma":
        return "does not use Hopper's matrix instructions"
    return ""


def markdown(rows: list[tuple[Form, dict, str]]) -> str:
    """The table for results/: what every form needs, forms that differ in their chip only side by side."""
    lines = [f"# The kernels, compiled ahead of time by Triton {triton.__version__}", "",
             "`python -m kernels.tools.aot` writes this with no GPU. Registers are a thread's (255 at most), spills its "
             "bytes stored and loaded again, shared memory a program's; products: the instructions that make them. "
             "The form in bold is what a run takes where `python -m kernels.tools.bench --tune` has not been run.", ""]
    for arch, kib in SHARED_KIB.items():
        lines += [f"## {arch}: {kib} KiB of shared memory a program", "",
                  "| kernel | type | form | registers | spilled, bytes | shared, KiB | products |",
                  "|---|---|---|---|---|---|---|"]
        for form, found, wrong in rows:
            if form.arch == arch:
                name = f"**{form}**" if form.chosen else str(form)
                lines.append(f"| {form.kernel} | {form.dtype} | {name} | {found['registers']} "
                             f"| {found['spilled'] or ''} | {found['shared']:.1f} | {wrong or found['products']} |")
        lines.append("")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", nargs="*", help="kernels to compile, by the beginning of their names; none: all")
    parser.add_argument("--arch", nargs="*", choices=SHARED_KIB, default=list(SHARED_KIB))
    parser.add_argument("--only_bf16_128", action="store_true", help="only bf16 and head width 128: the tests' share")
    args = parser.parse_args()
    jobs = [form for form in forms() if form.arch in args.arch
            and (not args.kernel or form.kernel.startswith(tuple(args.kernel)))
            and not (args.only_bf16_128 and (form.dtype != "bf16" or form.constants.get("D") == 64))]
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for form, found in zip(jobs, pool.map(measure, jobs)):
            rows.append((form, found, wrong := problem(form, found)))
            print(f"{form.arch:6} {form.dtype:5} {form.kernel:30} {str(form):68} {found['registers']:4} registers "
                  f"{found['spilled']:6} bytes spilled {found['shared']:6.1f} KiB  {found['products']:5} {wrong}",
                  flush=True)
    bad = sum(bool(wrong) for _, _, wrong in rows)
    print(f"{len(rows)} forms, {bad} that must not run")
    if len(jobs) == len(forms()):
        TABLE.write_text(markdown(rows))
        print("written:", TABLE.relative_to(Path.cwd()))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
