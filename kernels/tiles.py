"""The tiles that attention's kernels work on, for each kind of chip.

Large tiles use each number that they load more often; too large ones do not fit the registers (and
spill to memory) or the shared memory (and cannot be launched). `python -m kernels.tools.aot`
compiles every choice and says what it needs, with no GPU; `python -m kernels.tools.bench --tune`
measures them on one.
"""
import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import INTERPRETED


class Tiles(NamedTuple):
    """Rows of a tile of queries and of keys, warps of a program, stages of its software pipeline,
    and which form."""
    BM: int
    BN: int
    warps: int
    stages: int
    specialized: bool = False  # attention_forward_specialized

    def options(self) -> dict:
        return dict(BM=self.BM, BN=self.BN, num_warps=self.warps, num_stages=self.stages)


# What `python -m kernels.tools.bench --tune` chooses from, by chip: the first is taken where that
# has not been run. For each, results/kernels_aot.md has registers, spills and shared memory; not
# one was left in that spills in the forward pass.
CANDIDATES = {
    "sm_90": {  # Hopper and later: 227 KiB of shared memory
        "attention_forward": [
            Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 3),
            Tiles(128, 128, 4, 2, True), Tiles(128, 64, 4, 3, True)],
        "attention_dq": [Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 3)],
        "attention_dkdv": [
            Tiles(64, 128, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 3), Tiles(32, 128, 8, 3)],
        "attention_decode": [Tiles(16, 64, 4, 3), Tiles(16, 128, 4, 2)]},
    "sm_80": {  # A100: 163 KiB
        "attention_forward": [Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 3)],
        "attention_dq": [Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)],
        "attention_dkdv": [Tiles(32, 64, 4, 2), Tiles(64, 32, 4, 2)],
        "attention_decode": [Tiles(16, 64, 4, 3)]},
    "sm_86": {  # the GPUs of desktops: 99 KiB
        "attention_forward": [Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2)],
        "attention_dq": [Tiles(64, 32, 4, 2), Tiles(64, 64, 8, 2)],
        "attention_dkdv": [Tiles(32, 64, 4, 2), Tiles(64, 32, 4, 2)],
        "attention_decode": [Tiles(16, 64, 4, 2)]},
}
FP32 = {  # right, not fast, on any chip
    "attention_forward": Tiles(32, 16, 8, 2),
    "attention_dq": Tiles(16, 16, 8, 1),
    "attention_dkdv": Tiles(32, 32, 8, 2),
    "attention_decode": Tiles(16, 16, 4, 2),
}
# {GPU: {kernel and head width: tiles}}, by kernels.tools.bench --tune
TUNED = Path(__file__).with_name("tuned.json")


@functools.cache
def tiles_for(kernel: str, D: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """A kernel's tiles on a device: the same every time on one machine.

    Tuning is a command, not part of a run, so that a run can be repeated.
    """
    if INTERPRETED:
        return Tiles(16, 16, 1, 1)
    if dtype == torch.float32:
        return FP32[kernel]
    tuned = json.loads(TUNED.read_text()) if TUNED.is_file() else {}
    tiles = tuned.get(torch.cuda.get_device_name(device), {}).get(f"{kernel} {D}")
    return Tiles(*tiles) if tiles else CANDIDATES[chip(device)][kernel][0]


def chip(device: torch.device) -> str:
    """Which of CANDIDATES: by the shared memory that a program may have."""
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return "sm_90" if shared >= 227 * 1024 else "sm_80" if shared >= 163 * 1024 else "sm_86"
