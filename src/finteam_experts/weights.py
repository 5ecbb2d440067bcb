# SPDX-License-Identifier: Apache-2.0
"""The weights of a model folder, read and written one tensor at a time, so that memory does not grow with the model.

Tensors are written with mergekit's `TensorWriter`. They are read here, since mergekit's loader tells neither shapes nor
types without reading the tensors, and does not notice a file that is cut off.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from mergekit.io import TensorWriter
from safetensors import SafetensorError, safe_open

from finteam_experts.errors import InputError, NotFiniteError
from finteam_experts.files import read_json

SHARD_BYTES = 2**29  # the writer holds one shard in memory
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPUTED = "rotary_emb.inv_freq"  # stored in Llama 2's time; models compute it, and transformers ignores it
DTYPES = ("float32", "bfloat16", "float16")  # that can be trained and merged
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load; `InputError` if there are none or one is missing.

    Other safetensors files are ignored: mistralai's repositories hold all weights a second time, consolidated.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values())) if (folder / INDEX).is_file() else []
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}, which {INDEX} lists. Download or write that folder again.")
    if names:
        return [folder / name for name in names]
    others = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))) or "no safetensors at all"
    raise InputError(
        f"{folder} has neither {SINGLE} nor a complete {INDEX}; found {others}. Convert the model's weights to "
        "safetensors, or choose another model."
    )


def size_of(folder: Path) -> int:
    """Bytes of a model's weights."""
    return sum(file.stat().st_size for file in weight_files(folder))


def open_tensors(file: Path) -> Any:
    """safetensors' handle of a file; `InputError` if the file is missing, cut off or something else."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file.") from None
    except SafetensorError as error:
        advice = "Download its folder again, or delete it and repeat the step that wrote it."
        raise InputError(f"{file} can't be read ({error}): it may be cut off. {advice}") from None


class StoredTensors(AbstractContextManager):
    """The tensors of a model folder, or of the given safetensors files, by name. Each is read when it is asked for."""

    def __init__(self, source: Path | list[Path]) -> None:
        self._stack, self._files = ExitStack(), source if isinstance(source, list) else weight_files(source)
        self._file_of: dict[str, Any] = {}
        for file in self._files:
            handle = self._stack.enter_context(open_tensors(file))
            self._file_of |= {name: handle for name in handle.keys() if not name.endswith(_COMPUTED)}  # noqa: SIM118

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._file_of:
            advice = "It is of another architecture, or an earlier version wrote it: make it again."
            raise InputError(f"{self._files[0].parent} has no tensor {name}. {advice}")
        return self._file_of[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        return self._file_of[name].get_slice(name).get_shape()

    def dtype(self) -> torch.dtype:
        """The most frequent floating-point type; `InputError` if none of the types can be trained and merged."""
        found = Counter(self._file_of[name].get_slice(name).get_dtype() for name in self)
        for name, _ in found.most_common():
            if name in _STORED:
                return _STORED[name]
        raise InputError(
            f"{self._files[0].parent}: its weights are of the types {', '.join(found)}; only {', '.join(DTYPES)} can be "
            "trained and merged. Choose weights that are not quantised."
        )


def cast(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """The tensor in that type; `NotFiniteError` if it is not finite before or after that. `what` names it."""
    found = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise NotFiniteError(f"{what} is not finite. Choose another model, or train it again.")
    if not found.isfinite().all():
        largest, name = tensor.abs().max().item(), str(dtype).removeprefix("torch.")
        raise NotFiniteError(
            f"{what} has values up to {largest:.3g}, and {name} ends at {torch.finfo(dtype).max:.3g}. Merge in bfloat16 or "
            "float32: the dtype of the base's config.json or, for an MoE, of moe_merge.yaml."
        )
    return found


def new_writer(folder: Path) -> TensorWriter:
    """mergekit's writer of shards and their index into `folder`, from which what an interrupted one left is deleted."""
    for leftover in folder.glob("model*.safetensors*"):
        leftover.unlink()
    return TensorWriter(str(folder), max_shard_size=SHARD_BYTES)
