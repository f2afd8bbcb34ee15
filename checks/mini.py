"""The miniature run that tests and checks share: two layers, driven by the real commands.

conftest.py makes one a session; checks.kill and checks.refine make their own.
"""
import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch.distributed

import common
import pretrain

ROOT = Path(__file__).parent.parent

CONFIG = """
from configs.tiny import model
model = model | dict(n_layers=2, hidden_size=32, ffn_size=64, n_heads=2, n_kv_heads=1, head_dim=16,
                     max_context=64)
tokenizer = dict(vocab_size=400)
corpus = dict(val_fraction=0.05, shard_tokens=10_000, pools=dict(
    high=[dict(pages=250, families=dict(math=1, form=1), seed=1)],
    medium=[dict(pages=250, families=dict(math=1, form=1), seed=2, corrupt=1.0)]))
pretrain = dict(
    lr=5e-3, batch_tokens=512, eval_tokens=1000, save_every=7, prompts=["Problem:"],
    stages=[
        dict(name="warmup", tokens=2_000, lr=[0, 1], context=32, mixture=dict(high=1, medium=1)),
        dict(name="stable", tokens=10_000, lr=[1, 1], context=32, rope_theta=100.0,
             mixture=dict(high=1, medium=1)),
        dict(name="decay", tokens=6_000, lr=[1, 0.1], curve="1-sqrt", context=64,
             mixture=dict(high=1)),
    ])
evaluate = dict(tasks=["math"], n_problems=4, k=2, max_new_tokens=8)
"""


def start(command: list[str], cwd: Path, ranks: int = 0) -> subprocess.Popen:
    """Starts a Python script, or "-m" and a module; ranks: processes under torchrun."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*launcher, *command], cwd=cwd, env=os.environ | settings, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


class Mini:
    """A folder with the configuration mini.py, and the commands to run in it."""
    start = staticmethod(start)  # tests have a quicker one: checks.warm

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "mini.py").write_text(CONFIG)

    def popen(self, *command: str, ranks: int = 0) -> subprocess.Popen:
        """The running command; ranks: processes under torchrun (0: one, without)."""
        return self.start(list(command), self.folder, ranks)

    def run(self, *command: str, ranks: int = 0, code: int = 0) -> str:
        """Output of a command; asserts its exit code."""
        process = self.popen(*command, ranks=ranks)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == code, output
        return output

    def call(self, main: Callable, *argv: str) -> None:
        """A command in this process: the same main(), without another start of Python."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        # Another test's group of processes is none of ours: common.cli would end it.
        no_group = mock.patch.object(torch.distributed, "is_initialized", lambda: False)
        with contextlib.chdir(self.folder), mock.patch.object(sys, "argv", list(argv)), no_group:
            try:
                common.cli(main)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def output(self, main: Callable, *argv: str, code: int = 0) -> str:
        """What `call` prints; asserts its exit code."""
        text, found = io.StringIO(), 0
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                self.call(main, *argv)
            except SystemExit as exit:
                found = exit.code or 0
        assert found == code, text.getvalue()
        return text.getvalue()

    def prepare(self, *options: str) -> str:
        """Makes the data."""
        return self.run("-m", "data.text.corpus", "mini.py", *options)

    def pretrain(self, *options: str, ranks: int = 0, code: int = 0) -> str:
        """Pre-trains on the data in the folder `data`: in this process, or in `ranks` of them."""
        # torchrun has options of its own that begin with --run; --name is our other word for it.
        options = [option.replace("--run=", "--name=") for option in options]
        command = [str(ROOT / "pretrain.py"), "mini.py", "--corpus.folder=data", *options]
        if ranks == 0:
            return self.output(pretrain.main, *command, code=code)
        return self.run(*command, ranks=ranks, code=code)
