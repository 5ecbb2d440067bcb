# SPDX-License-Identifier: Apache-2.0
"""Corpora that are read while they are trained on: files of any size, here or on the Hub, of which nothing is kept."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from datasets.data_files import DataFilesList
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from finteam_experts.data import text_key
from finteam_experts.errors import InputError
from finteam_experts.runs import file_hash

SHUFFLED = 1000  # texts that wait to be drawn from: files are often sorted by date or source


def stream_corpus(files: str, column: str, seed: int, holds_test_text: Callable[[str], str | None]) -> IterableDataset:
    """The texts in `column` of JSON-lines or Parquet files, read as they are needed, in a shuffled order.

    `files` may have wildcards, and be on the Hub as hf://datasets/OWNER/NAME/... Rows without text are left out, and so are
    texts that hold that of a test row. Raises `InputError` if no text is found there.
    """

    def is_wanted(text: Any) -> bool:
        if text is not None and not isinstance(text, str):
            raise InputError(
                f"corpus {files}: column '{column}' holds {type(text).__name__}, not text. Name one with corpus_column."
            )
        return bool(text and text.strip()) and holds_test_text(text_key({"text": text})) is None

    kind = "parquet" if files.endswith(".parquet") else "json"
    try:
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
    """What a record says of a streamed corpus: the names of its files, without the folders of this machine, and what is in them."""
    found = DataFilesList.from_patterns([files])
    local = [Path(path) for path in found if Path(path).is_file()]
    content = [file_hash(path) for path in local] if local else [*found, *found.origin_metadata]
    return {
        "files": files if "://" in files else Path(files).name,
        "column": column,
        "content": hashlib.sha256(repr(content).encode()).hexdigest()[:16],
    }
