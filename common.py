"""Infrastructure shared by all phases: processes, FSDP, AdamW, checkpoints, metrics.

Two things hold for every phase script:
* A run lives in out/<run>/<phase>/: step_<n>/ folders (whole or absent), metrics.jsonl, samples and
  plots.
* All randomness is drawn from (seed, step): a checkpoint needs no random state, a resumed run
  repeats an unbroken one.
"""
from settings import UserError

import ctypes
import dataclasses
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

# Read when CUDA starts. Without it, batches of many sizes leave the allocator's cache in pieces.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import untrusted

# What dcp.save says each time where one process saves without a group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Interrupted(SystemExit):
    """A signal has ended work that is kept as it comes: nothing is left to be saved."""


on_exit = []  # functions of the exit code, which cli() calls before it ends the process


def cli(main) -> None:
    """Runs a script's main(); a UserError becomes one line and exit code 2."""
    code = 0
    try:
        main()
    except BrokenPipeError:  # `… | head`
        os._exit(0)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = explain(error)
        if not message:
            raise
        print(f"error: {untrusted.mask_secrets(message)}", file=sys.stderr)
        code = 2
    except SystemExit as leave:
        code = leave.code
        if isinstance(leave, Interrupted) and os.environ.get("RANK", "0") == "0":
            print("stopped by signal; what was done is kept: the same command goes on from here")
    while on_exit:
        on_exit.pop()(code or 0)
    if not torch.distributed.is_initialized():
        return sys.exit(code) if code else None
    # With processes: no rank waits for others that failed, and gloo's threads may abort Python's
    # own way out.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Connection refused")
AGAIN = "what was saved is kept: the same command goes on from there"


def explain(error: Exception) -> str:
    """What went wrong and what to do, in a line; "" for what is no user's business but a bug."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or text}; mend that, and go on: {AGAIN}"
    if isinstance(error, MemoryError) or any(words in text.lower() for words in OUT_OF_MEMORY):
        first_line = text.partition("\n")[0][:200]
        return (f"out of memory ({first_line}); take a smaller model, fewer tokens or rows in one "
                f"pass (micro_*), or more processes; {AGAIN}")
    if any(words in text for words in LOST_PEER):
        return f"another process of this run has ended, see its own message; {AGAIN}"
    return ""


def config_hash(cfg: SimpleNamespace, *sections: str) -> str:
    """12 hex digits over the named sections: what a result was made with."""
    return hash_json({name: dataclasses.asdict(getattr(cfg, name)) for name in sections})


def hash_json(value) -> str:
    """12 hex digits over a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------
# Processes and sharding

PATIENCE = timedelta(days=14)  # of ranks for each other while each works alone


@dataclass
class Dist:
    """Who this process is, and how it meets the others.

    The model's collectives and `sum` are those of training: who is some minutes late has failed,
    and all end. Before them, after work that takes the ranks unequal times, stands a `wait`: it,
    `gather`, `from_main` and `hand_out` have patience for days, in a group of their own.
    """
    rank: int
    world: int
    device: torch.device
    mesh: object | None          # None where the model is plain (one CPU process in fp32)
    patient_group: object = None  # gloo, with PATIENCE
    store: object = None         # counts which pieces of work are handed out, for all ranks
    n_queues: int = 0            # that were handed out
    stop_signal: "StopSignal | None" = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums of the numbers over all ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Until all ranks are here. Signals are heard meanwhile: no call sleeps for long."""
        if self.world == 1:
            return
        arrival = torch.distributed.barrier(self.patient_group, async_op=True)
        pause = 0.001
        while not arrival.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        arrival.wait()  # raises where a rank has gone

    def gather(self, mine: dict) -> dict:
        """The union of every rank's dict (distinct keys, picklable values), on every rank."""
        if self.world == 1:
            return mine
        parts = [None] * self.world
        torch.distributed.all_gather_object(parts, mine, group=self.patient_group)
        return {key: value for part in parts for key, value in part.items()}

    def from_main(self, make: Callable[[], object]):
        """What make() returns on the first rank, on every rank; or the UserError that it raises.

        For what one process should do for all (a request to a hub, a look at a file that may be
        there): the others neither do it again nor see another state of the disk.
        """
        made = error = None
        if self.is_main:
            try:
                made = make()
            except UserError as refusal:
                error = refusal
        if self.world > 1:
            self.wait()
            message = [made, error]
            torch.distributed.broadcast_object_list(message, src=0, group=self.patient_group)
            made, error = message
        if error is not None:
            raise error
        return made

    def hand_out(self, pieces: Sequence, desc: str) -> Iterator:
        """Yields each piece of some work on one rank alone: the next one to whoever is free.

        All ranks call it with the same pieces, and leave it together. The work on a piece is
        without collectives, and it is kept (`keep_lines`) before the next one is asked for, because
        a signal ends the process at once.
        """
        self.n_queues += 1
        name = f"queue {self.n_queues}"
        bar = progress_bar(total=len(pieces), desc=desc, unit="piece", delay=10,
                           disable=not self.is_main)
        with self.leaving_at_once(), bar:
            for count in range(len(pieces)):
                # alone we take them in order; else the store counts the turns of all ranks
                turn = count if self.world == 1 else self.store.add(name, 1) - 1
                if turn >= len(pieces):
                    break
                bar.update(turn - bar.n)  # what all ranks have done, but for those at work
                yield pieces[turn]
            self.wait()

    def piece_size(self, n_problems: int, n_samples: int, max_rows: int) -> int:
        """Problems of a piece of sampling: max_rows samples at most, all pieces about as large, and
        one for each rank."""
        n_pieces = max(self.world, math.ceil(n_problems / max(1, max_rows // n_samples)))
        return max(1, math.ceil(n_problems / n_pieces))

    def leaving_at_once(self):
        """Within it a signal ends this process where it stands; see StopSignal."""
        return self.stop_signal.at_once() if self.stop_signal else nullcontext()


def init_distributed(dtype: str, shard_size: int = 0, minutes: float = 10.0) -> Dist:
    """Joins torchrun's process group, or makes one of one process where FSDP's precision is wanted.

    dtype: compute type, "float32" or "bfloat16"; shard_size: ranks that one copy of the weights is
    spread over (0: all of them); fewer than the world size gives a hybrid mesh (HSDP): replicas of
    shards, for many nodes. minutes: after which a rank that does not come to a collective of
    training has failed.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    dist = Dist(rank, world, device, None)
    if world == 1 and dtype == "float32" and not cuda:
        return dist
    if not torch.distributed.is_initialized():
        _join_processes(dist, "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(minutes=minutes))
    shard = shard_size or world
    if world % shard:
        raise UserError(f"shard_size={shard} does not divide the {world} processes")
    if shard == world:
        dist.mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    else:
        dist.mesh = init_device_mesh(
            device.type, (world // shard, shard), mesh_dim_names=("replicate", "shard")
        )
    return dist


def keep_freed_memory() -> None:
    """The process keeps memory that it frees, up to 2 GB; does nothing where libc is not glibc.

    Otherwise glibc gives the tensors of a step back to the kernel, which clears each page again
    when the next step asks for it: up to a sixth of a step's time on a CPU (docs/SPEED.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt(trim_threshold, 2**31 - 1)  # bytes at the heap's end: the most that an int can say
    mallopt(mmap_threshold, 2**25)      # larger blocks are mapped for themselves: the most it takes


def _join_processes(dist: Dist, backend: str, timeout: timedelta) -> None:
    """Makes the group of training; with several processes also what they wait and share work by."""
    if dist.world == 1:
        store = torch.distributed.HashStore()
    else:
        store, _, _ = next(torch.distributed.rendezvous("env://", dist.rank, dist.world))
    torch.distributed.init_process_group(
        backend, store=torch.distributed.PrefixStore("groups", store), rank=dist.rank,
        world_size=dist.world, timeout=timeout)
    if dist.world > 1:
        dist.store = torch.distributed.PrefixStore("work", store)
        dist.patient_group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def shard_model(model, dist: Dist, dtype: str, compile: bool):
    """Compiles and shards a model of the meta device, block by block, and gives it memory.

    Weights are kept in fp32 and gathered in `dtype` for compute; gradients are reduced in fp32. The
    root unit holds embeddings, last norm and lm_head, and stays gathered from the forward to the
    end of the backward pass, because the loss uses lm_head's weight outside of forward(). Gradients
    come out averaged over ranks.
    """
    # A block has a graph for each of: packed or not, evaluated or trained, recomputed or not, one
    # row or more; each for one shape and for any. At dynamo's limit of 8 it would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for block in model.layers:
        if compile:
            block.compile()
        if dist.mesh is not None:
            fully_shard(block, mesh=dist.mesh, mp_policy=_precision(dtype))
    if dist.mesh is not None:
        fully_shard(model, mesh=dist.mesh, mp_policy=_precision(dtype), reshard_after_forward=False)
    model.to_empty(device=dist.device)
    return model


def _precision(dtype: str) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)


@torch.no_grad()
def assign(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Copies a full tensor, the same on every rank, into a parameter, sharded or not."""
    if isinstance(parameter, DTensor):
        full = full.to(device=parameter.device, dtype=parameter.dtype)
        full = distribute_tensor(
            full, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(full)


@torch.no_grad()
def unsharded_copy(model, replica=None):
    """A plain module with the present weights, for sampling: no collective runs while it decodes.

    A model that is not sharded is its own. Else its weights are gathered, one tensor at a time on
    every rank, into `replica`: a plain module of the same shape that the caller makes once and
    passes in again each time.
    """
    if not isinstance(model, FSDPModule):
        return model
    model.reshard()  # after a forward without backward the root unit is still gathered (pytorch
                     # #131965)
    for source, target in zip(model.parameters(), replica.parameters(), strict=True):
        target.copy_(source.full_tensor())
    return replica


def set_gradient_sync(model, last_micro_batch: bool) -> None:
    """Has gradients reduced once per step, after the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last_micro_batch)


def adamw(model, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on norms and embeddings (our choice)."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "embed_tokens" in name:
            no_decay.append(parameter)
        else:
            decay.append(parameter)
    groups = [
        dict(params=decay, weight_decay=weight_decay),
        dict(params=no_decay, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def clip_grad_norm(model, max_norm: float) -> float:
    """Clips the gradients to a global norm over all ranks; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# --------------------------------------------------------------------------------------------------
# Checkpoints: <phase folder>/step_<n>/, written aside, then renamed; whole or absent

def save_checkpoint(
    dist: Dist,
    folder: Path,
    step: int,
    model,
    optimizer,
    meta: dict,
    tokenizer: Path,
    keep: int = 2,
) -> Path | None:
    """Writes folder/step_<n>/; deletes older ones but the newest `keep`, this one in any case, and
    those kept for good.

    meta: JSON values, saved beside the tensors in meta.json, which also holds size and checksum of
    every file and is written last; with `"keep": true` the checkpoint is kept for good. The
    tokenizer's file is copied in, so that the folder stands alone. Returns None, with the reason
    printed and nothing lost, where it could not be written (disk full).
    """
    final, aside = folder / f"step_{step:08d}", folder / f".step_{step:08d}.tmp"
    has_state = bool(optimizer.state)
    state = _state(model, optimizer if has_state else None)
    meta = meta | {"step": step, "optimizer": has_state}
    parts = (
        lambda: _begin_checkpoint(dist, aside, tokenizer),
        lambda: dcp.save(state, checkpoint_id=aside, no_dist=dist.mesh is None),
        lambda: _finish_checkpoint(dist, aside, meta),
    )
    for part in parts:  # after each, the ranks agree whether all of them could do it
        error = _try(part)
        dist.wait()
        if dist.sum(float(bool(error)))[0]:
            if error:
                _warn_of_failed_checkpoint(final, error)
            dist.wait()
            if dist.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            return None
    if dist.is_main:
        _put_in_place(aside, final)
        found = list_checkpoints(folder)  # newer ones are damaged, or the run would go on from them
        for path in found[found.index(final) + max(1, keep):]:
            if not _is_kept_for_good(path):
                shutil.rmtree(path, ignore_errors=True)
    dist.wait()
    return final


def _is_kept_for_good(path: Path) -> bool:
    """Whether a checkpoint stays whatever `keep` says; one whose meta.json is damaged does not."""
    try:
        return bool(read_meta(path).get("keep"))
    except UserError:
        return False


def _state(model, optimizer) -> dict:
    """What a checkpoint holds; optimizer: None where it has no state, for then get_state_dict would
    make one, by a step that the run never took (pytorch #164929)."""
    if optimizer is None:
        return {"model": get_model_state_dict(model)}
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _put_in_place(aside: Path, final: Path) -> None:
    """Renames a checkpoint that is whole; one of the same step is there until the new one is."""
    old = final.with_name(final.name + ".old")  # list_checkpoints finds it, too
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(aside, final)
    _fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _begin_checkpoint(dist: Dist, aside: Path, tokenizer: Path) -> None:
    """Makes the folder, with the tokenizer in it."""
    if dist.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        shutil.copyfile(tokenizer, aside / "tokenizer.json")


def _finish_checkpoint(dist: Dist, aside: Path, meta: dict) -> None:
    """Writes meta.json, with size and checksum of what each rank has written."""
    names = [file.name for file in aside.glob(f"__{dist.rank}_*")]
    if dist.is_main:
        names += [".metadata", "tokenizer.json"]
    files = dist.gather({name: _fingerprint(aside / name) for name in names})
    if dist.is_main:
        shown = untrusted.mask_values(meta | {"files": files})
        if "chat_template" in meta:  # another's text, which must stay as it is
            shown["chat_template"] = meta["chat_template"]
        write_atomic(aside / "meta.json", json.dumps(shown, indent=1))


def _try(part: Callable[[], object]) -> str:
    """Runs a part of saving; returns what went wrong, or ""."""
    try:
        part()
    except dcp.api.CheckpointException as failed:  # a BaseException; holds each rank's own error
        return "; ".join(str(error) for error, _ in failed.failures.values())
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


def _warn_of_failed_checkpoint(final: Path, error: str) -> None:
    folder = final.parent
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if free < 1e6 or "inline_container" in error:  # torch does not say why it could not write
        error = f"no space left, or a limit of the file system: {free:,} bytes free"
    print(
        f"warning: checkpoint {final} could not be written ({error}); older ones are untouched",
        flush=True,
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """step_<n> folders, newest first; whether they are whole is for find_checkpoint to say.

    Also step_<n>.old, which a kill leaves behind while step_<n> is replaced. Other names are a
    person's.
    """
    def place(path: Path) -> tuple[int, bool]:
        step = path.name.removeprefix("step_")
        return int(step.removesuffix(".old")), not step.endswith(".old")

    ours = [path for path in folder.glob("step_*")
            if re.fullmatch(r"step_[0-9]{1,18}(\.old)?", path.name)]
    return sorted(ours, key=place, reverse=True)


def find_checkpoint(dist: Dist, folder: Path) -> Path | None:
    """The newest whole checkpoint, by every file's size and checksum; damaged ones are named."""
    for path in list_checkpoints(folder):
        problem = find_damage(dist, path)
        if not problem:
            return path
        if dist.is_main:
            print(f"warning: passing over a damaged checkpoint: {problem}", flush=True)
    return None


def find_damage(dist: Dist, path: Path) -> str:
    """What is wrong with a checkpoint ('' if nothing); the ranks share the reading."""
    try:
        meta = read_meta(path)
    except UserError as error:
        return str(error)
    files = meta.get("files")
    if not isinstance(files, dict) or not {".metadata", "tokenizer.json"} <= files.keys():
        return f"{path} is not a whole checkpoint: meta.json does not name its files"
    if type(meta.get("step")) is not int:
        return f"{path} is not a whole checkpoint: meta.json does not say its step"
    problems = {}
    for name, fingerprint in list(files.items())[dist.rank::dist.world]:
        try:
            if _fingerprint(untrusted.file_inside(path, name)) != fingerprint:
                problems[name] = (
                    f"{path / name} does not have the size and checksum that it was written with"
                )
        except FileNotFoundError:
            problems[name] = f"{path / name} is missing"
        except (OSError, ValueError) as error:
            problems[name] = f"{path}: {untrusted.printable(str(error))}"
    return next(iter(dist.gather(problems).values()), "")


def read_meta(path: Path) -> dict:
    """meta.json of a checkpoint; UserError where it is missing or torn."""
    try:
        meta = untrusted.read_json(path, "meta.json")
        for key in ("model", "tokenizer_ids", "reward"):
            if not isinstance(meta.get(key, {}), dict):
                raise ValueError(f"its {key} is no object")
    except (OSError, ValueError) as error:
        reason = untrusted.printable(str(error))
        raise UserError(f"{path} is not a whole checkpoint: meta.json: {reason}") from error
    return meta


def load_checkpoint(dist: Dist, path: Path, model, optimizer=None, checked: bool = False) -> dict:
    """Loads a checkpoint, saved at any world size, into model (and optimizer); returns its meta.

    checked: find_checkpoint has just read the files against their checksums. Else UserError names a
    damaged one.
    """
    import dcp_files  # only where a checkpoint is read

    if not checked and (problem := find_damage(dist, path)):
        raise UserError(f"cannot load a damaged checkpoint: {problem}")
    meta = read_meta(path)
    if not meta.get("optimizer", True):  # saved before the first step: it has none yet, nor will
        optimizer = None                 # this one
    state = _state(model, optimizer)
    try:
        dcp_files.load(path, state)  # each rank by itself: some may load alone
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {path}: {untrusted.printable(str(error))}") from error
    if optimizer is None:
        set_model_state_dict(model, state["model"])
    else:
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
    return meta


def _fingerprint(path: Path) -> list[int]:
    """[size, crc32] of a file, read in pieces of 16 MB."""
    crc = 0
    with open(path, "rb") as f:
        while piece := f.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return [path.stat().st_size, crc]


# --------------------------------------------------------------------------------------------------
# Files: locks, whole writes, lines that are kept

@contextmanager
def naming(path: Path):
    """Gives errors of writing to a file its name, which the system says of opening alone."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def lock_folder(folder: Path) -> None:
    """Keeps a folder to this command until it ends; UserError says who else has it.

    The file `lock` in it is held by flock: the system lets go of it when a process ends, however
    that happens, so none is ever stale. What stands in it is for the message alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with naming(path):
        file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, or "
            "choose another --run") from None
    except OSError as error:  # a file system that knows no locks
        print(f"warning: {path} cannot be locked ({error.strerror}): start no second command there")
    on_exit.append(lambda code: file.close())
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%F %T')}\n")
    file.flush()


def write_atomic(path: Path, text: str) -> None:
    """Writes a file aside and renames it: a reader sees the old one or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with naming(path), open(aside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def list_files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time (ns) of each file: other weights of the same name are told apart."""
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def cut(items: Sequence, size: int) -> list[Sequence]:
    """Pieces of `size` items, and one of what is left."""
    return [items[first:first + size] for first in range(0, len(items), size)]


def keep_lines(path: Path, rows: list[dict]) -> None:
    """Adds rows to a file of JSON lines, in one write; what a kill had torn there goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with naming(path), open(path, "ab+") as file:
        size = file.tell()
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(text.encode())


def read_kept_lines(folder: Path, name: str) -> Iterator[dict]:
    """The rows of all folder/<name>.<rank>.jsonl; a last line torn by a kill is left out.

    Raises UserError for a file of something else.
    """
    for path in sorted(folder.glob(f"{glob.escape(name)}.*.jsonl")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    break
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise UserError(f"{path} is damaged, or no file of samples: move it away")
                yield row


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# --------------------------------------------------------------------------------------------------
# Signals, progress bars, metrics, the machine

class StopSignal:
    """Notes SIGTERM or SIGINT: the loop asks, saves, and leaves with exit code 128 + signal."""

    def __init__(self, dist: Dist):
        self.dist = dist
        self.number = 0
        self.is_at_once = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        dist.stop_signal = self

    def _note(self, number, frame):
        if self.number == number == signal.SIGINT:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.number = number
        if self.is_at_once:
            raise Interrupted(128 + number)

    @contextmanager
    def at_once(self):
        """Within it a signal raises Interrupted: for hours of work that is kept as it comes.

        No collective stands in it, for the other ranks may never come to it.
        """
        self.is_at_once = True
        try:
            if self.number:
                raise Interrupted(128 + self.number)
            yield
        finally:
            self.is_at_once = False

    def on_any_rank(self) -> bool:
        """Whether a signal wants this run to end; all ranks agree."""
        return self.dist.sum(float(self.number))[0] > 0

    def leave(self, step: int) -> None:
        """Ends this process, after the checkpoint of `step` steps has been written."""
        if self.dist.is_main:
            print(
                f"stopped by signal at step {step}; the same command goes on from here", flush=True
            )
        sys.exit(128 + (self.number or signal.SIGTERM))


BAR_SECONDS = 30  # between two lines of a progress bar in a log file


def progress_bar(iterable=None, **options) -> tqdm:
    """A progress bar, tqdm(iterable, **options): on a terminal tqdm's own, in a log file a line now
    and then."""
    kind = tqdm if sys.stderr.isatty() else ProgressLines
    return kind(iterable, **options)


class ProgressLines(tqdm):
    """A bar for a log file: each state is a line of its own, every BAR_SECONDS at most and at
    the end."""

    def __init__(self, iterable=None, **options):
        self.next_line = time.monotonic() + BAR_SECONDS
        super().__init__(iterable, mininterval=BAR_SECONDS, **options)

    def display(self, msg=None, pos=None) -> None:
        if self.disable:  # close() sets it before it calls; it ends the line itself
            self.fp.write(str(self) if msg is None else msg)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + BAR_SECONDS
            self.fp.write(f"{self}\n")

    def clear(self, nolock: bool = False) -> None:
        """Nothing: tqdm.write() would have the bar out of its way, but here no line is
        overwritten."""


class Metrics:
    """One JSON line per step in <folder>/metrics.jsonl; a resumed run drops those it will repeat.

    Lines that a full disk refuses wait in memory for the next ones.
    """

    def __init__(self, dist: Dist, folder: Path, first_step: int):
        self.path = folder / "metrics.jsonl" if dist.is_main else None
        self.pending = ""
        if self.path:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_metrics(folder) if line["step"] < first_step]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **line) -> None:
        if not self.path:
            return
        self.pending += json.dumps(line) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # it may have vanished
            with open(self.path, "a") as f:
                f.write(self.pending)
            self.pending = ""
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)  # no torn line
            if self.pending.count("\n") == 1:  # said once, not at each step
                print(
                    f"warning: {self.path} could not be written ({error.strerror}); its lines wait "
                    "in memory",
                    flush=True,
                )


def read_metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The metrics of a run, one dict a line; a last line torn by a kill is left out."""
    lines = []
    if (folder / name).is_file():
        for text in (folder / name).read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


# Dense bf16 peak in FLOP/s of devices by their whole names, from the makers' data sheets. Unknown
# devices have no MFU: 'n/a' beats a wrong number.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200 120GB": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of a CUDA device in bfloat16; None in another type, or where it is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def computes_bfloat16_slowly(device: torch.device) -> bool:
    """Whether it is a CPU without instructions for bfloat16: a product takes eight times as long as
    in float32 (measured)."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def total_memory(device: torch.device) -> float:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that a tensor may yet take: free, or kept by PyTorch but empty. On the CPU no
    bound: what runs beside us must not decide what we compute."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


_caveats: list[str] = []


def add_caveat(text: str) -> None:
    """From now on describe_machine, and so each result of this process, says this too."""
    if text not in _caveats:
        _caveats.append(text)


def describe_machine(device: torch.device) -> str:
    """What a result was measured on, in a few words.

    Python's version is among them, for its library is in the tiny recipe's text.
    """
    python = f"Python {platform.python_version()}"
    if device.type == "cuda":
        machine = [f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}", python]
    else:
        machine = [f"{os.cpu_count()} CPU cores ({platform.machine()})", python,
                   f"{torch.get_num_threads()} threads"]
    return ", ".join([*machine, *_caveats])


def current_commit() -> str:
    """The commit that the code runs from, marked where the code differs; '' outside a checkout."""
    if not shutil.which("git"):  # as in most containers
        return ""

    def git(*command: str) -> str:
        where = ["git", "-C", Path(__file__).parent]
        return subprocess.run([*where, *command], capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    texts = (":!README.md", ":!docs", ":!assets", ":!results")  # which no run reads
    if head and git("status", "--porcelain", "-uno", "--", ".", *texts):
        head += "+changes"
    return head
