"""Reading a checkpoint as data: torch's own reader unpickles the index and all that is no tensor, which can run code.

Torch reads tensors as data already. Here the index is unpickled with the classes of an index alone, and other values go
through `torch.load(weights_only=True)` first.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.planner import ReadItem

INDEX = ".metadata"

_OF_AN_INDEX = {
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),  # Python 3.13's name for it
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


class NotData(Exception):
    """Something in a checkpoint is no plain data; the text says what."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        name = (module_name, global_name)
        if name in _OF_AN_INDEX or (module_name == "torch" and _is_dtype(global_name)):
            return super().find_class(*name)
        raise NotData(f"{INDEX} names {module_name}.{global_name}")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def read_index(folder: Path, files: Iterable[str]) -> Metadata:
    """The index of a checkpoint: which tensors it has, and where in which of ``files`` they are.

    Raises:
        NotData: it has other things in it, or leads to other files.
    """
    if INDEX not in files:
        raise NotData(f"{INDEX} is not among its files")
    try:
        with (folder / INDEX).open("rb") as opened:
            index = _Unpickler(opened).load()
        led_to = {where.relative_path for where in index.storage_data.values()}
        alien = sorted(led_to - set(files))
    except NotData:
        raise
    except Exception as error:  # a pickle that somebody made up can raise anything
        raise NotData(f"{INDEX} is no index") from error
    if not isinstance(index, Metadata) or alien:
        raise NotData(f"{INDEX} leads to {alien[0]}" if alien else f"{INDEX} is no index")
    return index


class Reader(FileSystemReader):
    """Torch's reader, with an index that was read as data."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class Planner(DefaultLoadPlanner):
    """Torch's planner, which gets plain data only where it would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            data = torch.load(value, weights_only=True)
        except Exception as error:
            raise NotData(f"{name} is no plain data") from error
        if type(data) is not type(self.state_dict[name]):
            raise NotData(
                f"{name} is of type {type(data).__name__}, not {type(self.state_dict[name]).__name__}"
            )
        clean = io.BytesIO()
        torch.save(data, clean)  # what torch unpickles is our own bytes
        clean.seek(0)
        super().load_bytes(read_item, clean)
