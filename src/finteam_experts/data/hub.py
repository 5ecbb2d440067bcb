# SPDX-License-Identifier: Apache-2.0
"""Datasets on the Hub, or in local folders: the table that says where texts, labels and questions are, and rows read by it.

Only text is text. A number, a date or a struct where text should be makes a row unusable (`UnusableRow`), and the columns of
CSV files are read as they are written. A set that can't be read is an `InputError` with what to do about it.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from datasets import Features, Value, get_dataset_split_names, load_dataset_builder
from datasets.packaged_modules.csv.csv import Csv
from huggingface_hub import HfApi
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from finteam_experts.data.tasks import FOLDER, Tasks, plain, read_task_file
from finteam_experts.errors import InputError, nearest
from finteam_experts.files import read_yaml

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
SHUFFLED = 10_000  # rows that wait to be drawn from, where not all of a set are taken: sets are often sorted by date
ADVICE = {  # by what an error says; the last one is for all others
    "is a gated": "Accept its terms at https://huggingface.co/datasets/{0.dataset} and log in with 'hf auth login'.",
    "NotFound": "If it has moved, correct its id in the table of sources; if it is private, log in with 'hf auth login'.",
    "onfig": "Name its configuration with config in the table of sources; found config: {0.config}.",
    "Dataset scripts": "It has a loading script. Read its Parquet copy: options: {{revision: refs/convert/parquet}}",
    "codec can't decode": "Its files are not UTF-8. Convert a copy of them, and name that folder as dataset.",
    "Connect": (later := "Run the same command again later: what is fetched stays."),
    "Server Error": later,
    "": "Correct the table of sources, or leave it out with --tasks, --roles or --chats.",
}


@dataclass(frozen=True)
class Draw:
    """Which rows are taken of each dataset and split, and how long a passage may be."""

    max_rows: int | None = None
    seed: int = 0
    max_characters: int = 6000


class UnusableRow(ValueError):
    """Why a row can't be used, and what it holds instead."""


class UnknownLabel(ValueError):
    """A label that the task does not have."""


def _with_a_group(pattern: re.Pattern[str]) -> re.Pattern[str]:
    if not pattern.groups:
        raise ValueError(f"{pattern.pattern!r} has no group; put the text in ( )")
    return re.compile(pattern.pattern, re.DOTALL)


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Column(Fields):
    """A part of a column: what the first group of a regular expression matches (dots match line breaks)."""

    column: str
    pattern: Annotated[re.Pattern[str], AfterValidator(_with_a_group)]


class Source(Fields):
    """Where text comes from: scripts/data_sources.yaml says what each field means."""

    dataset: str
    text: tuple[str | Column, ...]
    licence: str
    config: str | None = None
    options: dict[Literal["revision", "data_dir", "data_files"], Any] = {}
    splits: dict[Literal["train", "valid", "test"], str] = {}

    def text_of(self, row: dict[str, Any]) -> str:
        """The text of a row, empty if it has none; `UnusableRow` if one of its columns holds something else."""
        return "\n\n".join(filter(None, (self.read(row, column) for column in self.text)))

    def read(self, row: dict[str, Any], column: str | Column) -> str:
        """The text of a column or of a part of it."""
        if isinstance(column, str):
            return _text(column, self.value(row, column))
        match = column.pattern.search(self.read(row, column.column))
        return (match[1] or "").strip() if match else ""

    def value(self, row: dict[str, Any], column: str) -> Any:
        if column not in row:
            raise InputError(f"{self.dataset} has no column '{column}'; it has {', '.join(row)}.")
        return row[column]

    def rows(self, split: str, draw: Draw) -> tuple[Iterator[dict[str, Any]], list[str]]:
        """The rows of a split, or those that are drawn of it, and the names of its labels where these are numbered classes.

        Rows are streamed, so that `draw.max_rows` bounds the download. Those of CSV files are text, whatever they look like.
        """
        options, label = dict(self.options), getattr(self, "label", None)
        with self._reading():
            builder = load_dataset_builder(self.dataset, self.config, **options)
            stream = builder.as_streaming_dataset(split)
            classes = getattr((stream.features or {}).get(label), "names", [])
            if isinstance(builder, Csv) and (columns := next(iter(stream), None)):
                strings = Features({column: Value("string") for column in columns})
                options |= {"features": strings, "keep_default_na": False}
                stream = load_dataset_builder(self.dataset, self.config, **options).as_streaming_dataset(split)
        if draw.max_rows is not None:
            stream = stream.shuffle(seed=draw.seed, buffer_size=SHUFFLED).take(draw.max_rows)

        def rows() -> Iterator[dict[str, Any]]:
            with self._reading():
                yield from stream

        return rows(), classes

    def kinds(self) -> dict[str, str]:
        """The set's splits that serve as train, valid and test; `InputError` if it can't be read or has none to train on."""
        with self._reading():
            present = get_dataset_split_names(self.dataset, config_name=self.config, **self.options)
        kinds = {}
        for kind, names in SPLITS.items():
            names = (self.splits[kind],) if kind in self.splits else names
            if split := next((name for name in names if name in present), None):
                kinds[kind] = split
            elif kind in self.splits or kind == "train":
                advice = "Name another with splits in the table of sources, such as splits: {train: NAME}."
                raise InputError(f"{self.dataset} has no split '{names[0]}'; it has {', '.join(present)}. {advice}")
        return kinds

    def commit(self) -> str | None:
        """The commit of the Hub that the set's revision stands for now; `None` for a folder."""
        if Path(self.dataset).exists():
            return None
        with self._reading():
            return HfApi().dataset_info(self.dataset, revision=self.options.get("revision")).sha

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Say what is wrong with a set that can't be read, and what to do."""
        try:
            yield
        except Exception as error:  # of the libraries and the network, which have many kinds
            text = f"{type(error).__name__}: {error}"
            advice = next(advice for sign, advice in ADVICE.items() if sign in text)
            raise InputError(f"{self.dataset} can't be read: {text}\n{advice.format(self)}") from None


class TaskSource(Source):
    label: str
    labels: dict[str | int | float | bool, str | None] = {}
    question: str | Column | None = None

    def label_of(self, row: dict[str, Any], names: Collection[str], classes: list[str]) -> str:
        """The task's label of a row: by `labels`, by the name of its class in the set's `classes`, or by its own name.

        Case, spaces and the form of Unicode don't matter. `UnusableRow` if the row has no label (null, blank or -1, or one
        that `labels` maps to null), `UnknownLabel` if the task does not have it.
        """
        value = self.value(row, self.label)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of whole numbers with gaps
        if value is None or value != value or (isinstance(value, str) and not _label_key(value)):
            raise UnusableRow("have no label", value)
        if not isinstance(value, str | int | float):
            raise UnknownLabel(f"{value!r:.60} ({type(value).__name__})")
        mapped = {_label_key(key): name for key, name in self.labels.items()}
        known = {_label_key(name): name for name in names}
        key = _label_key(value)
        if key not in mapped and key.isdecimal() and int(key) < len(classes):
            key = _label_key(classes[int(key)])
        if mapped.get(key, "") is None:
            raise UnusableRow("have a label that the table of sources leaves out", value)
        if (key := _label_key(mapped.get(key, key))) in known:
            return known[key]
        if key == "-1":
            raise UnusableRow("have no label", value)
        raise UnknownLabel(f"{value!r:.60}")


class ChatSource(Source):
    """Conversations: a column of messages, or a question and its answer, after the passages of `text`."""

    text: tuple[str | Column, ...] = ()
    messages: str | None = None
    question: str | Column | None = None
    answer: str | Column | None = None

    @model_validator(mode="after")
    def _says_where_they_are(self) -> Self:
        if bool(self.messages) == bool(self.question and self.answer):
            raise ValueError("name messages, or both question and answer")
        return self

    def messages_of(self, row: dict[str, Any]) -> Any:
        """The row in TRL's conversational format, not yet checked."""
        if self.messages:
            return self.value(row, self.messages)
        asked = "\n\n".join(filter(None, (self.text_of(row), self.read(row, self.question))))
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": self.read(row, self.answer)}]


class Sources(Fields):
    tasks: dict[str, TaskSource] = {}
    roles: dict[str, list[Source]] = {}
    chats: dict[str, list[ChatSource]] = {}

    def listed(self) -> list[tuple[str, Source]]:
        """Every source, with the file of the data directory that it is for."""
        listed = [(f"tasks/{name}", source) for name, source in self.tasks.items()]
        for folder, by_role in (("corpora", self.roles), ("chats", self.chats)):
            listed += [(f"{folder}/{role}", source) for role, sources in by_role.items() for source in sources]
        return listed


def read_sources(path: Path) -> Sources:
    """Read the table of sources; `InputError` for a wrong key, a wrong pattern or an unknown task or label."""
    try:
        sources = Sources.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}.") from None
    for name, task in task_definitions(path, sources).items():
        for label in filter(None, sources.tasks[name].labels.values()):
            if label not in task.labels:
                known = nearest(label, task.labels)
                raise InputError(f"{path}: tasks.{name}.labels: {name} has no label '{label}'.{known}")
    return sources


def definition_file(table: Path, name: str) -> Path:
    """The lm-eval task file of a task in the table of sources: tasks/NAME.yaml beside the table, or the package's own."""
    beside, packaged = table.parent / "tasks" / f"{name}.yaml", FOLDER / f"{name}.yaml"
    if not beside.is_file() and not packaged.is_file():
        hint = nearest(name, [path.stem for path in FOLDER.glob("*.yaml")])
        raise InputError(
            f"{table}: unknown task '{name}'.{hint} Describe another one in {beside}, an lm-eval task file."
        )
    return beside if beside.is_file() else packaged


def task_definitions(table: Path, sources: Sources) -> Tasks:
    """The tasks of the table of sources."""
    return {name: read_task_file(definition_file(table, name)) for name in sources.tasks}


def _text(column: str, value: Any) -> str:
    """A text, the lines of a list of texts, or a table with ` | ` between the cells of a row; empty for what is missing."""
    if not isinstance(value, list):
        return _plain(column, value)
    lines = (
        " | ".join(_plain(column, cell) for cell in line) if isinstance(line, list) else _plain(column, line)
        for line in value
    )
    return "\n".join(filter(None, lines)).strip()


def _plain(column: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return (value or "").strip()
    raise UnusableRow(f"hold a value of type {type(value).__name__} in column '{column}', which is no text", value)


def _label_key(label: Any) -> str:
    """What two spellings of a label share, in any case and form of Unicode."""
    return unicodedata.normalize("NFKC", plain(str(label))).casefold()
