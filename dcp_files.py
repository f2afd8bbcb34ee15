"""Checkpoints of torch.distributed.checkpoint (DCP) that anyone may have made, read as data.

DCP's own reader unpickles .metadata, and what is no tensor, with whatever functions the file names:
a folder would run as a program. What is wrong with one is a ValueError (or OSError) here.
"""
import enum
import io
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from untrusted import Unpickler, file_inside, read_bytes

MOST_METADATA = 1 << 28   # bytes of .metadata: some hundred for each tensor and rank

CLASSES = {  # all that DCP writes into a .metadata
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8",
              "bool"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(Unpickler):
    """Python before 3.11.4, Debian 12's, writes a member of an enum as getattr(its class, name)."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        return super().find_class(module, name)


def _enum_member(kind: type, name: str) -> enum.Enum:
    if not isinstance(kind, enum.EnumType):
        raise pickle.UnpicklingError(f"it asks {kind} for {name}: a program in place of data")
    return kind[name]


def read_metadata(folder: Path) -> Metadata:
    """A checkpoint's .metadata, checked: it places every tensor inside of the folder's files."""
    data = read_bytes(file_inside(folder, ".metadata"), MOST_METADATA)
    try:
        metadata = _Unpickler(data, CLASSES).load()
        _check(folder, metadata)
    except OSError:
        raise
    except Exception as error:  # of a broken pickle, anything
        raise ValueError(f".metadata cannot be read: {error}") from None
    return metadata


def _check(folder: Path, metadata: Metadata) -> None:
    """ValueError where a tensor does not lie, whole, in files of the folder."""
    if not isinstance(metadata, Metadata):
        raise ValueError("it is no checkpoint's")
    sizes = {}    # of the files, in bytes
    for index, place in metadata.storage_data.items():
        name = place.relative_path
        if name not in sizes:
            sizes[name] = file_inside(folder, name).stat().st_size
        if not isinstance(index, MetadataIndex) or place.transform_descriptors:
            raise ValueError(f"{name} is stored in a way that is not ours")
        if not (0 <= place.offset and 0 <= place.length <= sizes[name] - place.offset):
            raise ValueError(f"it looks for {index.fqn} behind the end of {name}")
    n_bytes = 0
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            if min(entry.size, default=0) < 0:
                raise ValueError(f"{name} has the shape {[*entry.size]}")
            n_bytes += entry.size.numel() * entry.properties.dtype.itemsize
        elif not isinstance(entry, BytesStorageMetadata):
            raise ValueError(f"{name} is of no known kind")
    if n_bytes > sum(sizes.values()):
        raise ValueError("its tensors are larger than its files")


class _Reader(dcp.FileSystemReader):
    """DCP's, with a .metadata that has been read and checked."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self.metadata


class _Planner(dcp.DefaultLoadPlanner):
    """DCP's, but what is no tensor (an optimizer's numbers) is not unpickled by any class it names,
    and does not stand where a tensor belongs."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        if isinstance(self.state_dict[name], torch.Tensor):
            raise ValueError(f"{name} is no tensor")
        plain = torch.load(value, weights_only=True)
        value = io.BytesIO()
        torch.save(plain, value)
        value.seek(0)
        super().load_bytes(read_item, value)


def load(folder: Path, state: dict) -> None:
    """Fills a state dict of tensors and plain values from a checkpoint; each rank does it alone.

    ValueError where the folder does not hold what the state dict asks for.
    """
    metadata = read_metadata(folder)
    try:
        dcp.load(state, storage_reader=_Reader(folder, metadata), planner=_Planner(), no_dist=True)
    except dcp.api.CheckpointException as failed:  # a BaseException; holds each rank's own error
        reasons = "; ".join(str(error) for error, _ in failed.failures.values())
        raise ValueError(reasons.partition("\n")[0]) from None
    except (pickle.UnpicklingError, RuntimeError, KeyError, AssertionError, TypeError) as error:
        raise ValueError(str(error).partition("\n")[0]) from None
