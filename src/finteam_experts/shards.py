# SPDX-License-Identifier: Apache-2.0
"""The weights of a model folder, read and written one tensor at a time: memory for one tensor, whatever the model's size."""

import json
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

from finteam_experts.errors import InputError
from finteam_experts.runs import write_json

SHARD_BYTES = 2 * 10**9
INDEX = "model.safetensors.index.json"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no *.safetensors. Convert the model's weights, or choose another one.")
    return files


class StoredTensors(AbstractContextManager):
    """All tensors of the safetensors `files`, by name, each read when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._stack = ExitStack()
        opened = [self._stack.enter_context(safe_open(file, framework="pt")) for file in files]
        self._file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def meta(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its shape on the meta device."""
        return torch.empty(self.slice(name).get_shape(), dtype=dtype, device="meta")

    def slice(self, name: str) -> Any:
        """The tensor as safetensors' slice, which is not read before it is indexed."""
        return self._file_of[name].get_slice(name)


class ShardWriter:
    """Writes safetensors shards and their index, tensor after tensor, in the order of `layout`.

    `layout` holds every tensor of the model on the meta device: its name, shape and dtype. A shard appears under its name
    once it is whole, and one that is there already is not written again: `missing` says what is left.
    """

    def __init__(self, folder: Path, layout: dict[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.layout = folder, layout
        folder.mkdir(parents=True, exist_ok=True)
        self._split = split_torch_state_dict_into_shards(layout, max_shard_size=shard_bytes)
        self._shards = [
            (folder / name, names)
            for name, names in self._split.filename_to_tensors.items()
            if not (folder / name).exists()
        ]
        self._left = [name for _, names in self._shards for name in names]
        self._file: BinaryIO | None = None

    def missing(self, name: str) -> bool:
        """Whether the tensor is still to be written."""
        return name in self._left

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor, as the layout has it; `ValueError` if it is not that one."""
        wanted = self.layout[name]
        if name != self._left[0] or tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} is not the next tensor, {self._left[0]}")
        path, names = self._shards[0]
        partial = path.with_name(f"{path.name}.partial")
        if self._file is None:
            self._file = partial.open("wb")
            self._file.write(_header({name: self.layout[name] for name in names}))
        self._file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        self._left.pop(0)
        if name == names[-1]:
            self._file.close()
            partial.replace(path)
            self._shards.pop(0)
            self._file = None

    def finish(self) -> None:
        """Write the index, where there is more than one shard; `ValueError` if tensors are missing."""
        if self._left:
            raise ValueError(f"{self._left[0]} and {len(self._left) - 1} more tensors were not written")
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            write_json(self.folder / INDEX, index)


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    """What a safetensors file of these tensors begins with: its length, then JSON (github.com/huggingface/safetensors)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
