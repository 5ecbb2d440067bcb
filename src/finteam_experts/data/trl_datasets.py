# SPDX-License-Identifier: Apache-2.0
"""Datasets as `trl sft` takes them: one by name, or a mixture, in any of TRL's formats, each of a role or of none."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from finteam_experts.data.conversations import Conversation, trl_row
from finteam_experts.errors import InputError
from finteam_experts.files import file_hash

Parts = list[tuple[list[Conversation | str], str | None]]  # the rows of a dataset, and its role


@dataclass
class DatasetArguments:
    """TRL's own arguments for datasets, and the role of each."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset to train on: Hub id or folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, where it has several."})
    dataset_train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read it while it is needed; needs max_steps."})
    datasets: list[DatasetConfig] = field(
        default_factory=list,
        metadata={"help": "A mixture of datasets, as in TRL: path, name, split, columns, fraction."},
    )
    dataset_roles: list[str] | None = field(
        default=None, metadata={"help": "The role of each dataset, in order; none for one of no analyst."}
    )

    def __post_init__(self) -> None:
        self.datasets = DatasetMixtureConfig(self.datasets or []).datasets
        if self.dataset_name and self.datasets:
            raise InputError("dataset_name and datasets are both set. Put the first one into the mixture.")
        names, roles = [source.path for source in self.sources()], self.dataset_roles
        if roles is not None and len(roles) != len(names):
            found = f"dataset_roles is {', '.join(roles)}, for {len(names)} datasets ({', '.join(names)})"
            raise InputError(f"{found}. Name one role for each, or none.")

    def sources(self) -> list[DatasetConfig]:
        named = DatasetConfig(path=self.dataset_name, name=self.dataset_config, split=self.dataset_train_split)
        return [named] if self.dataset_name else self.datasets

    def rows(self, limit: int | None = None) -> Parts:
        """The rows of each dataset, by TRL's rule for fractions; streamed ones are read up to `limit` rows.

        Raises `InputError` for a dataset that can't be read, is streamed without a limit, or has columns of another format.
        """
        sources = self.sources()
        if self.dataset_streaming and sources and limit is None:
            raise InputError("dataset_streaming is true, and a stream's end is not known: set max_steps.")
        loaded = [list(islice(self._read(source), limit if self.dataset_streaming else None)) for source in sources]
        fractions = [source.fraction for source in sources]
        if any(fraction is not None for fraction in fractions):
            if None in fractions:
                raise InputError("fraction is set for some of the datasets. Set it for all of them, or for none.")
            weights = [fraction / sum(fractions) for fraction in fractions]
            total = min(len(rows) / weight for rows, weight in zip(loaded, weights, strict=True) if weight > 0)
            loaded = [rows[: round(weight * total)] for rows, weight in zip(loaded, weights, strict=True)]
        roles = [None if role == "none" else role for role in self.dataset_roles or ["none"] * len(sources)]
        return list(zip(loaded, roles, strict=True))

    def _read(self, source: DatasetConfig) -> Iterator[Conversation | str]:
        options = {"data_dir": source.data_dir, "data_files": source.data_files, "streaming": self.dataset_streaming}
        try:
            rows = load_dataset(source.path, source.name, split=source.split, **options)
        except (DatasetsError, FileNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            raise InputError(f"dataset {source.path} can't be read: {error}") from None
        rows = rows.select_columns(source.columns) if source.columns else rows
        for number, row in enumerate(rows, start=1):
            yield trl_row(row, f"dataset {source.path}, row {number}")

    def described(self) -> list[dict[str, Any]]:
        """What a record says of the datasets: all settings and, of local ones, the content instead of the folder."""
        roles = self.dataset_roles or ["none"] * len(self.sources())
        found = []
        for source, role in zip(self.sources(), roles, strict=True):
            folder = Path(source.path)
            local = {
                str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()
            }
            where = {"path": folder.name, "content": local} if folder.is_dir() else {"path": source.path}
            found.append(vars(source) | where | {"role": role})
        return found
