# SPDX-License-Identifier: Apache-2.0
"""Datasets on the Hub as data: the table that says where texts, labels and questions are, and rows read by it.

Every way in which a set can't be read (gated, moved, several configurations, a loading script, a Hub out of service) is an
`InputError` with what to do about it.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from pydantic import BaseModel, ConfigDict, ValidationError

from finteam_experts.data.tasks import FOLDER, Tasks, read_task_file
from finteam_experts.errors import InputError, nearest
from finteam_experts.files import read_yaml

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
SHUFFLED = 10_000  # rows that wait to be drawn from, where not all of a set are taken: sets are often sorted by date
OPTIONS = ("data_dir", "data_files", "revision")
_FAILURES = (DatasetsError, HfHubHTTPError, ConnectionError, OSError, RuntimeError, httpx2.HTTPError)


class Column(BaseModel):
    """A part of a column: what the first group of a regular expression matches (dots match line breaks)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    column: str
    pattern: str

    def read(self, value: str) -> str:
        found = re.search(self.pattern, value, flags=re.DOTALL)
        return found[1].strip() if found else ""


class Source(BaseModel):
    """Where text comes from: scripts/data_sources.yaml says what each field means."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    dataset: str
    text: tuple[str | Column, ...]
    licence: str
    config: str | None = None
    options: dict[str, Any] = {}

    @property
    def page(self) -> str:
        return f"https://huggingface.co/datasets/{self.dataset}"

    def text_of(self, row: dict[str, Any]) -> str:
        """The text of a row, empty if it has none."""
        return "\n\n".join(filter(None, (self.read(row, part) for part in self.text)))

    def read(self, row: dict[str, Any], part: str | Column) -> str:
        """The text of a column or of a part of it; `InputError` if there is no such column."""
        value = _flat(self.value(row, part if isinstance(part, str) else part.column))
        return value if isinstance(part, str) else part.read(value)

    def value(self, row: dict[str, Any], column: str) -> Any:
        if column not in row:
            raise InputError(f"{self.dataset} has no column '{column}'; it has {', '.join(row)}.")
        return row[column]

    def unreadable(self, error: Exception) -> InputError:
        """What is wrong with a set that can't be read, and what to do."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = str(error)
        if isinstance(error, GatedRepoError) or "gated" in text.lower() or status in (401, 403):
            advice = f"Accept its terms at {self.page} and log in with 'hf auth login'."
        elif isinstance(error, RuntimeError) and "script" in text:
            advice = "It has a loading script. Read its Parquet copy: options: {revision: refs/convert/parquet}"
        elif isinstance(error, UnicodeDecodeError) or "decode" in text:
            advice = "Its files are not UTF-8. Convert a copy of them, and name that folder as dataset."
        elif status and status >= 500:
            advice = "The Hub is out of service. Run the same command again later: what is fetched stays."
        elif isinstance(error, DatasetNotFoundError) or status == 404:
            advice = f"If it has moved, correct its id in the table of sources; if it is gated, accept its terms at {self.page}."
        elif isinstance(error, ConnectionError | httpx2.HTTPError):
            advice = "The connection broke off. Run the same command again: what is fetched stays."
        else:
            advice = "Correct the table of sources, or leave it out with --tasks or --roles."
        return InputError(f"{self.dataset} can't be read: {text or type(error).__name__}\n{advice}")


class TaskSource(Source):
    label: str
    labels: dict[str | int, str] = {}
    question: str | Column | None = None

    def label_of(self, row: dict[str, Any], names: Iterable[str]) -> str | None:
        """The task's label of a row, by `labels` or by its name in any case; `None` if it is none of `names`."""
        found = self.value(row, self.label)
        mapped = self.labels.get(found, self.labels.get(str(found), found))
        return {name.lower(): name for name in names}.get(str(mapped).strip().lower())


class ChatSource(Source):
    """Conversations: a column of messages, or a question and its answer, after the passages of `text`."""

    text: tuple[str | Column, ...] = ()
    messages: str | None = None
    question: str | Column | None = None
    answer: str | Column | None = None

    def messages_of(self, row: dict[str, Any]) -> Any:
        """The row in TRL's conversational format, not yet checked."""
        if self.messages:
            return self.value(row, self.messages)
        asked = "\n\n".join(filter(None, (self.text_of(row), self.read(row, self.question))))
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": self.read(row, self.answer)}]


class Sources(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tasks: dict[str, TaskSource] = {}
    roles: dict[str, list[Source]] = {}
    chats: dict[str, list[ChatSource]] = {}

    def listed(self) -> list[tuple[str, Source]]:
        """Every source, with the file of the data directory that it is for."""
        found = [(f"tasks/{name}", source) for name, source in self.tasks.items()]
        for folder, by_role in (("corpora", self.roles), ("chats", self.chats)):
            found += [(f"{folder}/{role}", source) for role, own in by_role.items() for source in own]
        return found


def read_sources(path: Path) -> Sources:
    """Read the table of sources; `InputError` for a wrong key, a wrong pattern or an unknown task or label."""
    try:
        sources = Sources.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}.") from None
    for name, task in task_definitions(path, sources).items():
        for label in sources.tasks[name].labels.values():
            if label not in task.labels:
                known = nearest(label, task.labels)
                raise InputError(f"{path}: tasks.{name}.labels: {name} has no label '{label}'.{known}")
    for role, source in ((role, source) for role, own in sources.chats.items() for source in own):
        if bool(source.messages) == bool(source.question and source.answer):
            raise InputError(f"{path}: chats.{role}: {source.dataset}: name messages, or both question and answer.")
    for _, source in sources.listed():
        for part in (part for part in source.text if isinstance(part, Column)):
            try:
                groups = re.compile(part.pattern).groups
            except re.error as error:
                raise InputError(f"{path}: {source.dataset}: the pattern {part.pattern!r} is none: {error}.") from None
            if groups < 1:
                advice = "has no group. Put the text in ( )."
                raise InputError(f"{path}: {source.dataset}: the pattern {part.pattern!r} {advice}")
        for key in source.options:
            if key not in OPTIONS:
                advice = "Name the configuration with config." if key == "name" else f"Known: {', '.join(OPTIONS)}."
                raise InputError(f"{path}: {source.dataset}: options can't have '{key}'. {advice}")
    return sources


def definition_file(table: Path, name: str) -> Path:
    """The lm-eval task file of a task in the table of sources: tasks/NAME.yaml beside the table, or the package's own."""
    own, packaged = table.parent / "tasks" / f"{name}.yaml", FOLDER / f"{name}.yaml"
    if not own.is_file() and not packaged.is_file():
        hint = nearest(name, [path.stem for path in FOLDER.glob("*.yaml")])
        raise InputError(f"{table}: unknown task '{name}'.{hint} Describe another one in {own}, an lm-eval task file.")
    return own if own.is_file() else packaged


def task_definitions(table: Path, sources: Sources) -> Tasks:
    """The tasks of the table of sources."""
    return {name: read_task_file(definition_file(table, name)) for name in sources.tasks}


def splits_of(source: Source, revision: str | None = None) -> list[str]:
    """The splits of a set; `InputError` if it can't be read, or if rows of a task are not split into train and test."""
    options = _options(source, revision)
    try:
        splits = get_dataset_split_names(source.dataset, config_name=source.config, **options)
    except ValueError as error:
        if "onfig" not in str(error):
            raise source.unreadable(error) from None
        names = ", ".join(get_dataset_config_names(source.dataset, **options))
        advice = "Name one with config in the table of sources."
        raise InputError(
            f"{source.dataset} has the configurations {names}; found config: {source.config}. {advice}"
        ) from None
    except _FAILURES as error:
        raise source.unreadable(error) from None
    for kind in ("train", "test") if isinstance(source, TaskSource) else ("train",):
        if not set(SPLITS[kind]) & set(splits):
            raise InputError(f"{source.dataset} has no {kind} split; it has {', '.join(splits)}.")
    return splits


def revision_of(source: Source) -> str | None:
    """The commit of the set on the Hub that its revision stands for; `None` for a folder."""
    if Path(source.dataset).exists():
        return None
    try:
        return HfApi().dataset_info(source.dataset, revision=source.options.get("revision")).sha
    except _FAILURES as error:
        raise source.unreadable(error) from None


def rows(
    source: Source, kind: str, max_rows: int | None, seed: int, revision: str | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of the split of that kind, train, valid or test, or `max_rows` of them, drawn at random.

    None for a set without that split. Rows are streamed, so that `max_rows` bounds the download.
    """
    split = next((name for name in SPLITS[kind] if name in splits_of(source, revision)), None)
    if split is None:
        return
    try:
        options = _options(source, revision)
        stream = load_dataset(source.dataset, source.config, split=split, streaming=True, **options)
        if max_rows is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLED).take(max_rows)
        yield from stream
    except (*_FAILURES, ValueError) as error:
        raise source.unreadable(error) from None


def _options(source: Source, revision: str | None) -> dict[str, Any]:
    return source.options | ({"revision": revision} if revision else {})


def _flat(value: Any) -> str:
    """Text of a column that may be a list of sentences, or a table as a list of rows."""
    if isinstance(value, list):
        return "\n".join(" | ".join(map(str, part)) if isinstance(part, list) else str(part) for part in value).strip()
    return "" if value is None else str(value).strip()
