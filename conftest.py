"""Shared by the tests: the miniature run of checks/mini.py, with its data and a checkpoint."""
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # as the runs in processes of their own, to the bit

from checks import warm  # noqa: E402  (torch reads that when it is loaded)
from checks.mini import ROOT, Mini  # noqa: E402, F401

Mini.start = staticmethod(warm.start)


@pytest.fixture(scope="session")
def base(mini) -> Mini:
    """With a pre-trained checkpoint, out/base/pretrain, for later phases to start from."""
    mini.pretrain("--run=base", "--pretrain.eval_problems=0", "--evaluate.tasks=[]")
    return mini


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Mini:
    mini = Mini(tmp_path_factory.mktemp("mini"))
    mini.prepare("--corpus.folder=data")
    return mini
