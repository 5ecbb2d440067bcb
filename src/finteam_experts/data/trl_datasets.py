# SPDX-License-Identifier: Apache-2.0
"""Datasets as `trl sft` takes them, one by name or a mixture, and corpora that are streamed while they are trained on.

A dataset is resolved once: the files that it stands for are those that are read and those that the record names.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetBuilder, IterableDataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from huggingface_hub.errors import HfHubHTTPError
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from finteam_experts.data.conversations import GENERAL
from finteam_experts.errors import InputError, check_number, is_main_process, nearest
from finteam_experts.files import file_hash

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
SHUFFLED = 1000  # rows of a stream that wait to be drawn from: files are often sorted by date or source
LOOKED_AT = 100  # rows of a streamed corpus that are looked at before the training


@dataclass(frozen=True)
class TrainedDataset:
    """A dataset that was found: its rows, and what the record of a training says of it."""

    name: str
    role: str | None  # as `dataset_roles` says, `general` for one of no role; None where it says nothing
    rows: Dataset
    is_text: bool  # rows of plain text, not conversations
    record: dict[str, Any]


@dataclass
class DatasetArguments:
    """TRL's own arguments for datasets, and the role of each."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset to train on: Hub id, folder or file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, where it has several."})
    dataset_train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read no more rows than max_steps needs, in a shuffled order."}
    )
    datasets: list[DatasetConfig] = field(
        default_factory=list,
        metadata={"help": "A mixture of datasets, as in TRL: path, name, split, columns, fraction."},
    )
    dataset_roles: list[str] | None = field(
        default=None, metadata={"help": "The role of each dataset, in order; none for one of no role."}
    )

    def __post_init__(self) -> None:
        self.datasets = DatasetMixtureConfig(self.datasets or []).datasets
        if self.dataset_name and self.datasets:
            raise InputError("dataset_name and datasets are both set. Put the first one into the mixture.")
        if isinstance(self.dataset_roles, str):  # as YAML gives a list of one
            self.dataset_roles = [self.dataset_roles]
        names, roles = [source.path for source in self.sources()], self.dataset_roles
        if roles is not None:
            if len(roles) != len(names):
                found = (
                    f"dataset_roles is {', '.join(map(str, roles))}, for {len(names)} datasets ({', '.join(names)})"
                )
                raise InputError(f"{found}. Name one role for each, or none.")
            self.dataset_roles = [GENERAL if role in (None, "none") else role for role in roles]
        fractions = [source.fraction for source in self.sources()]
        if None in fractions and any(fraction is not None for fraction in fractions):
            raise InputError("fraction is set for some of the datasets. Set it for all of them, or for none.")
        for name, fraction in zip(names, fractions, strict=True):
            check_number(f"fraction of dataset {name}", fraction, above=0, most=1)
        if len(names) == 1 and fractions[0] not in (None, 1):
            raise InputError(
                f"fraction of dataset {names[0]} is {fractions[0]:g}: it is a share among several datasets, and there is one. "
                f"Take some of its rows with split: {self.sources()[0].split}[:10%]."
            )

    def sources(self) -> list[DatasetConfig]:
        named = DatasetConfig(path=self.dataset_name, name=self.dataset_config, split=self.dataset_train_split)
        return [named] if self.dataset_name else self.datasets

    def check_dataset_roles(self, known: Collection[str]) -> None:
        """Raise `InputError` if `dataset_roles` names a role that is not one of `known`, where any is."""
        for role in (self.dataset_roles or ()) if known else ():
            if role not in (GENERAL, *known):
                wanted = f"it is one of {', '.join(sorted(known))}, or none"
                raise InputError(f"dataset_roles names '{role}'; {wanted}.{nearest(str(role), known)}")

    def load(self, limit: int | None, seed: int, role: str | None = None) -> list[TrainedDataset]:
        """The datasets or, with `role`, those that are of this role, of none, or of no stated one.

        With `fraction` their first rows, by TRL's rule. Of streamed ones `limit` rows each, drawn in a shuffled order. Raises
        `InputError` for a dataset that can't be read, is empty, is streamed without a limit or, if it is named alone, is of
        another role; one of a mixture that is of another role is reported.
        """
        if self.dataset_streaming and self.sources() and limit is None:
            raise InputError("dataset_streaming is true, and a stream's end is not known: set max_steps.")
        found, fractions, paths = [], [], [source.path for source in self.sources()]
        for place, (source, whose) in enumerate(
            zip(self.sources(), self.dataset_roles or [None] * len(paths), strict=True)
        ):
            name = source.path if paths.count(source.path) == 1 else f"{source.path} ({place + 1})"
            if not role or whose in (None, GENERAL, role):
                found.append(self._load(source, name, whose, limit, seed))
                fractions.append(source.fraction)
            elif self.dataset_name:
                raise InputError(f"dataset_roles says that {name} is of {whose}, and this trains {role}.")
            elif is_main_process():
                print(f"dataset {name} is of {whose}: {role} does not learn from it")
        if None in fractions or not found:
            return found
        weights = [fraction / sum(fractions) for fraction in fractions]
        total = min(len(dataset.rows) / weight for dataset, weight in zip(found, weights, strict=True))
        for dataset, fraction, weight in zip(found, fractions, weights, strict=True):
            if not round(weight * total):
                raise InputError(f"fraction of dataset {dataset.name} is {fraction:g}: that is no row of it.")
        return [replace(dataset, rows=dataset.rows.select(range(round(weight * total))))
                for dataset, weight in zip(found, weights, strict=True)]  # fmt: skip

    def _load(
        self, source: DatasetConfig, name: str, role: str | None, limit: int | None, seed: int
    ) -> TrainedDataset:
        title = f"dataset {name}"
        with reading(title), PartialState().local_main_process_first():
            builder = _resolve(source)
            record = _record(source, builder) | {"role": role}
            if self.dataset_streaming:
                stream = builder.as_streaming_dataset(split=source.split).shuffle(seed=seed, buffer_size=SHUFFLED)
                key = Hasher.hash([record, limit, seed])
                rows = Dataset.from_generator(_first, gen_kwargs={"rows": stream, "limit": limit}, fingerprint=key)
            else:
                builder.download_and_prepare()
                rows = builder.as_dataset(split=source.split)
            rows.data.validate(full=True)  # is all of it UTF-8?
        if not len(rows):
            raise InputError(f"{title}: its split {source.split} is empty.")
        columns = [source.columns] if isinstance(source.columns, str) else source.columns
        for column in columns or ():
            if column not in rows.column_names:
                hint = nearest(str(column), rows.column_names)
                raise InputError(f"{title} has no column '{column}'; it has {', '.join(rows.column_names)}.{hint}")
        rows = rows.select_columns(columns) if columns else rows
        is_text = "text" in rows.column_names and not {"messages", "prompt"} & set(rows.column_names)
        return TrainedDataset(name, role, rows, is_text, record)


def roles_of(data_dir: Path) -> set[str]:
    """The roles that a data directory has corpora or conversations of."""
    files = [*(data_dir / "corpora").glob("*.jsonl"), *(data_dir / "chats").glob("*.jsonl")]
    return {path.stem.removesuffix("_heldout") for path in files} - {GENERAL}


@contextlib.contextmanager
def reading(title: str) -> Iterator[None]:
    """Turn what `datasets` raises for something that can't be read into an `InputError` about `title`."""
    try:
        yield
    except InputError:
        raise
    except StopIteration:  # of an empty file: nothing to tell the columns from
        raise InputError(f"{title} is empty.") from None
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, TypeError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise InputError(f"{title} can't be read: {cause}") from None


def _first(rows: IterableDataset, limit: int) -> Iterator[dict[str, Any]]:
    return islice(rows, limit)


def _resolve(source: DatasetConfig) -> DatasetBuilder:
    """What `load_dataset` would read, as a builder that knows its files."""
    path = Path(source.path)
    if path.is_file() and path.suffix in FORMATS:
        if source.name or source.data_dir or source.data_files:
            raise InputError(f"dataset {source.path} is a file: leave out name, data_dir and data_files.")
        return load_dataset_builder(FORMATS[path.suffix], data_files=str(path))
    if source.path in FORMATS.values() and not source.data_files and not source.data_dir:
        raise InputError(
            f"dataset {source.path} is a format: name its files with data_files, or a folder with data_dir."
        )
    return load_dataset_builder(source.path, source.name, data_dir=source.data_dir, data_files=source.data_files)


def _record(source: DatasetConfig, builder: DatasetBuilder) -> dict[str, Any]:
    """All settings of a dataset and what they stand for: a Hub dataset's commit, the content of local files, or the tags of
    remote ones. It names no folder of this machine.
    """
    about = {"path": source.path, "name": source.name, "split": source.split}
    about |= {"columns": source.columns, "fraction": source.fraction}
    if builder.repo_id:
        return about | {"data_dir": source.data_dir, "data_files": source.data_files, "revision": builder.hash}
    by_split = builder.config.data_files or {}
    split = source.split.partition("[")[0]
    files = by_split[split] if split in by_split else [file for files in by_split.values() for file in files]
    return about | {"path": Path(source.path).name, "files": contents(files)}


def contents(files: Collection[str]) -> dict[str, Any]:
    """The hash of each local file, by its name below the folder that all are in; remote ones with what tells their versions."""
    local = [file for file in files if Path(file).is_file()]
    folder = os.path.commonpath([Path(file).parent for file in local]) if local else ""
    found: dict[str, Any] = {os.path.relpath(file, folder): file_hash(Path(file)) for file in local}
    remote = [file for file in files if file not in local]
    if remote:
        found |= {"remote": remote, "versions": [list(tag) for tag in getattr(files, "origin_metadata", ())]}
    return found


def stream_corpus(
    files: str, column: str, seed: int, find: Callable[[str], str | None]
) -> tuple[IterableDataset, dict[str, Any]]:
    """The texts in `column` of JSON-lines or Parquet files, streamed in a shuffled order, and what the record says of them.

    `files` may have wildcards, and be on the Hub as hf://datasets/OWNER/NAME/... Rows without text and those in which
    `find` finds a scored text are left out; the screen counts them while they are read. Raises `InputError` if more than
    half of the first rows have no text.
    """
    title = f"corpus {files}"
    with reading(title):
        builder = load_dataset_builder("parquet" if files.endswith(".parquet") else "json", data_files=files)
        rows = builder.as_streaming_dataset(split="train")
        first = list(rows.take(LOOKED_AT))
    if not first:
        raise InputError(f"{title} is empty.")
    if column not in first[0]:
        hint = nearest(column, first[0])
        raise InputError(
            f"{title}: no column '{column}'; it has {', '.join(first[0])}. Name one with corpus_column.{hint}"
        )
    bad = [place for place, row in enumerate(first, start=1) if _no_text(row[column])]
    if 2 * len(bad) > len(first):
        found = f"{len(bad)} of its first {len(first)} rows have no text in column '{column}'"
        value = first[bad[0] - 1][column]
        raise InputError(f"{title}: {found}; row {bad[0]} has {value!r:.80}. Name another one with corpus_column.")
    left_out = 0

    def is_wanted(text: Any) -> bool:
        nonlocal left_out
        problem = _no_text(text) or ((place := find(text)) and f"it holds a scored text, {place}")
        if not problem:
            return True
        left_out += 1
        if left_out in (1, 10, 100, 1000, 10_000, 100_000):  # each worker counts what it reads
            print(f"{title}: {left_out} rows are left out so far; the last one: {problem}")
        return False

    texts = rows.select_columns([column]).filter(is_wanted, input_columns=column)
    texts = texts if column == "text" else texts.rename_column(column, "text")
    name = files if "://" in files else Path(files).name
    record = {"files": name, "column": column, "content": contents(builder.config.data_files["train"])}
    return texts.shuffle(
        seed=seed, buffer_size=SHUFFLED, max_buffer_input_shards=1
    ), record  # one file after the other


def _no_text(value: Any) -> str | None:
    """Why a value is no text to train on, if it is none."""
    if isinstance(value, str):
        return None if value.strip() else "it is blank"
    return f"it is {value!r:.80}, not text"
