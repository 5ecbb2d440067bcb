# SPDX-License-Identifier: Apache-2.0
"""Corpora that are read while they are trained on: files of any size, here or on the Hub, without a copy on this disk."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from datasets.data_files import DataFilesList
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from finteam_experts.data.files import text_key
from finteam_experts.errors import InputError
from finteam_experts.files import file_hash

SHUFFLED = 1000  # texts that wait to be drawn from: files are often sorted by date or source


def stream_corpus(files: str, column: str, seed: int, holds_test_text: Callable[[str], str | None]) -> IterableDataset:
    """The texts in `column` of JSON-lines or Parquet files, streamed by `datasets` in a shuffled order.

    `files` may have wildcards, and be on the Hub as hf://datasets/OWNER/NAME/... Rows without text are left out, and so are
    texts that hold that of a test row. Raises `InputError` if no text is found there.
    """

    def is_wanted(text: Any) -> bool:
        if text is not None and not isinstance(text, str):
            found = f"column '{column}' holds {type(text).__name__}, not text"
            raise InputError(f"corpus {files}: {found}. Name one with corpus_column.")
        return bool(text and text.strip()) and holds_test_text(text_key({"text": text})) is None

    try:
        kind = "parquet" if files.endswith(".parquet") else "json"
        rows = load_dataset(kind, data_files=files, split="train", streaming=True)
        first = next(iter(rows), None)
        if first is None:
            raise InputError(f"corpus {files} is empty.")
        if column not in first:
            raise InputError(
                f"corpus {files}: no column '{column}'; it has {', '.join(first)}. Name one with corpus_column."
            )
        texts = rows.select_columns([column]).filter(is_wanted, input_columns=column)
        texts = texts if column == "text" else texts.rename_column(column, "text")
        if next(iter(texts), None) is None:
            raise InputError(f"corpus {files}: no row has text in column '{column}'.")
    except InputError:
        raise
    except (DatasetsError, FileNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"corpus {files}: can't be read: {error}") from None
    return texts.shuffle(seed=seed, buffer_size=SHUFFLED, max_buffer_input_shards=1)  # one file after the other


def describe(files: str, column: str) -> dict[str, Any]:
    """What a record says of a streamed corpus: the names of its files, without this machine's folders, and their content."""
    found = DataFilesList.from_patterns([files])
    local = [Path(path) for path in found if Path(path).is_file()]
    content = [file_hash(path) for path in local] if local else [*found, *found.origin_metadata]
    name, digest = files if "://" in files else Path(files).name, hashlib.sha256(repr(content).encode()).hexdigest()
    return {"files": name, "column": column, "content": digest[:16]}
