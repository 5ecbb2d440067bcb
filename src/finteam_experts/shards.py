# SPDX-License-Identifier: Apache-2.0
"""The weights of a model folder, read and written one tensor at a time: memory for one tensor, whatever the model's size."""

import json
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from finteam_experts.errors import InputError, read_json
from finteam_experts.runs import write_json

SHARD_BYTES = 2 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPUTED = (
    "rotary_emb.inv_freq"  # in weights of Llama 2's time; models compute it, and transformers ignores what is stored
)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, as transformers finds them; `InputError` if there are none or one is missing.

    Repositories hold other safetensors beside them (mistralai's a consolidated copy of all weights), which are not read.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        for name in names:
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no {name}, which {INDEX} lists. Download or write that folder again.")
        if names:
            return [folder / name for name in names]
    others = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))) or "no safetensors at all"
    raise InputError(
        f"{folder} has neither {SINGLE} nor a complete {INDEX}; found {others}. Convert the model's weights to safetensors, or "
        "choose another model."
    )


def open_tensors(file: Path) -> Any:
    """safetensors' handle of a file; an `InputError` for a file that is cut off or is something else."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file.") from None
    except SafetensorError as error:
        raise InputError(
            f"{file} can't be read ({error}): it may be cut off. Download its folder again, or delete it and repeat the step "
            "that wrote it."
        ) from None


class StoredTensors(AbstractContextManager):
    """All tensors of the safetensors `files`, by name, each read when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._stack, self._files = ExitStack(), files
        opened = [self._stack.enter_context(open_tensors(file)) for file in files]
        self._file_of = {
            name: file
            for file in opened
            for name in file.keys()  # noqa: SIM118 (not a dict)
            if not name.endswith(_COMPUTED)
        }

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def meta(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its shape on the meta device."""
        return torch.empty(self.slice(name).get_shape(), dtype=dtype, device="meta")

    def dtype(self) -> torch.dtype:
        """The most frequent floating-point type of the tensors."""
        found = Counter(self.slice(name).get_dtype() for name in self)
        for name, _ in found.most_common():
            for dtype, stored in _DTYPES.items():
                if stored == name:
                    return dtype
        raise InputError(
            f"{self._files[0].parent}: its weights are of the types {', '.join(found)}; only "
            f"{', '.join(_DTYPES.values())} can be trained and merged. Choose weights that are not quantised."
        )

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
