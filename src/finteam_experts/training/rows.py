# SPDX-License-Identifier: Apache-2.0
"""The rows of a training: tokenised once, by `datasets` into its cache, and drawn from there by index."""

import inspect
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import transformers
from accelerate import PartialState
from datasets import Dataset, Features, List, Value, concatenate_datasets, interleave_datasets
from datasets.fingerprint import Hasher
from transformers import PretrainedConfig
from trl import SFTConfig

from finteam_experts import chats
from finteam_experts.chats import ChatFormat, Conversation
from finteam_experts.data import conversations, leaks
from finteam_experts.data.conversations import chat_file, iter_chats, trl_row
from finteam_experts.data.files import check_passages, corpus_file, read_corpus, task_file
from finteam_experts.data.mixture import tuning_rows
from finteam_experts.data.tasks import Tasks, render_all
from finteam_experts.data.trl_datasets import TrainedDataset
from finteam_experts.errors import InputError, is_main_process
from finteam_experts.files import file_hash
from finteam_experts.training.sampler import STRATUM

POOL = 2**15  # rows that a training's rows are drawn from, if it reads fewer than half as many
CHUNK = 10_000  # rows that are Python objects at a time
_IDS, _SOURCE, _PROBLEM = List(Value("int32")), "source", "problem"
_TEXT = Value("string")
_COLUMNS = Features({"input_ids": _IDS, "labels": _IDS, STRATUM: _TEXT, _SOURCE: _TEXT, _PROBLEM: _TEXT})
Labelled = tuple[list[int], list[int]]  # the token ids of a row, and its labels


@dataclass(frozen=True)
class Source:
    """Rows of one origin, not tokenised yet: of the data directory, as JSON, or of a dataset in one of TRL's formats."""

    name: str
    part: str  # what the shares of a training are of
    stratum: str | None  # what `StratifiedSampler` spreads; None where the rows have a column that says it
    rows: Dataset | None
    record: dict[str, Any]  # what the rows stand for: the content of their files, or a dataset's record
    of_dataset: bool = False
    scored: leaks.ScoredTexts | None = None  # texts to look a dataset's rows up in


def task_source(
    data_dir: Path, tasks: Tasks, form: ChatFormat, seed: int, limits: dict[str, int | None], *, hold_out: bool
) -> Source:
    """The train rows of the tasks, shuffled. The loss is on the label."""
    rows, asked = tuning_rows(data_dir, tasks, seed, limits, hold_out=hold_out), {}
    for name in dict.fromkeys(task for task, _ in rows):
        asked[name] = iter(render_all(tasks[name], [row for task, row in rows if task == name], form.tokenizer))
    talks = (Conversation((next(asked[task]), row["label"]), task_file(data_dir, task, "train")) for task, row in rows)
    stored = _stored(talks).add_column(STRATUM, [f"{task}: {row['label']}" for task, row in rows])
    record = {name: file_hash(task_file(data_dir, name, "train")) for name in tasks}
    return Source(f"tasks ({', '.join(asked)})", "tasks", None, stored, record)


def chat_source(data_dir: Path, role: str, part: str = "chats") -> Source:
    """The conversations of a role. The loss is on the last answer."""
    rows, record = _stored(iter_chats(data_dir, role)), {role: file_hash(chat_file(data_dir, role))}
    return Source(f"chats/{role}.jsonl", part, f"conversations: {role}", rows, record)


def corpus_source(data_dir: Path, role: str, part: str = "corpus") -> Source:
    """The passages of a role's corpus, each ended by the tokenizer's end token. The loss is on all of it."""
    passages, record = read_corpus(data_dir, role), {role: file_hash(corpus_file(data_dir, role))}
    check_passages(data_dir, role, passages)
    return Source(f"corpora/{role}.jsonl", part, f"texts: {role}", _stored(passages), record)


def dataset_source(dataset: TrainedDataset, part: str, role: str, scored: leaks.ScoredTexts | None) -> Source:
    """The rows of a dataset: the loss is on the last answer of a conversation, and on all of a plain text."""
    stratum = f"{'texts' if dataset.is_text else 'conversations'}: {role}"
    return Source(
        f"dataset {dataset.name}", part, stratum, dataset.rows, dataset.record, of_dataset=True, scored=scored
    )


def recorded(sources: list[Source]) -> dict[str, dict[str, Any]]:
    """What a training's record says of its rows, by part."""
    record: dict[str, dict[str, Any]] = {}
    for source in sources:
        own = record.setdefault(source.part, {})
        own.update({f"dataset {len(own)}": source.record} if source.of_dataset else source.record)
    return record


def _stored(rows: Iterable[Conversation | str]) -> Dataset:
    texts = (json.dumps(row if isinstance(row, str) else [*row, str(row.where)]) for row in rows)
    return concatenate_datasets(
        [Dataset.from_dict({"row": chunk}) for chunk in iter(lambda: [*islice(texts, CHUNK)], [])]
    )


def tokenise(
    sources: list[Source], form: ChatFormat, training_args: SFTConfig, longest: int | None, *, cut: int | None,
    shares: dict[str, float] | None = None,
) -> dict[str, Dataset]:  # fmt: skip
    """Token ids and labels of the rows of each part, by `ChatFormat.exchanges`: the tokens that are scored.

    Plain texts are cut into pieces of `cut` tokens. Conversations of more than `longest` tokens would lose their answer, and are
    left out; so are rows of datasets that can't be used or have a scored text. The screen counts them and names the first. Of a
    part with many more rows than `max_steps` needs of it, by its share of the rows in `shares` or in proportion, some are drawn.

    Raises `InputError` if more than half of a dataset's rows can't be used, or no row is short enough.
    """
    parts: dict[str, list[Dataset]] = {}
    lengths = Counter[str]()
    for source in sources:
        lengths[source.part] += len(source.rows)
    weights = lengths if shares is None else {part: shares[part] for part in lengths}
    wanted = None if training_args.packing else rows_of_run(training_args)
    pool = math.inf if wanted is None else max(POOL, 2 * wanted) / sum(weights.values())
    longest = longest or math.inf
    for source in sources:
        there = len(source.rows)
        count = math.ceil(there * min(1, pool * weights[source.part] / lengths[source.part]))
        numbers = np.sort(random.Random(training_args.seed).sample(range(there), count))
        rows = _mapped(source, numbers, form, cut, training_args.dataset_num_proc)
        tokens, usable = _lengths(rows), np.array([problem is None for problem in rows[_PROBLEM][:]])
        if bad := int((~usable).sum()):
            found = f"The first is {rows[int(usable.argmin())][_PROBLEM]}"
            if 2 * bad > count:
                raise InputError(f"{source.name}: {bad} of {count} rows can't be used. {found}")
            _print(f"{source.name}: {bad} of {count} rows are left out. {found}")
        if too_long := int((tokens > longest).sum()):
            _print(f"{source.name}: {too_long} of {count} rows are left out: they have more than {longest} tokens")
        if not len(places := np.flatnonzero(usable & (tokens <= longest))):
            advice = "shorten them, raise max_length, or leave them out"
            raise InputError(f"{source.name}: none of its {count} rows has {longest} tokens or fewer: {advice}.")
        parts.setdefault(source.part, []).append(rows.remove_columns(_PROBLEM).select(places))
    return {part: concatenate_datasets(found) for part, found in parts.items()}


def _mapped(source: Source, numbers: np.ndarray, form: ChatFormat, cut: int | None, workers: int | None) -> Dataset:
    """The rows with these numbers through `_tokens`, from the cache of `datasets` if it has them; the main process goes first.

    The key has all that decides the tokens, this package's code among it: a cache must not outlive a change of it.
    """
    code = [inspect.getsource(module) for module in (chats, conversations, leaks, sys.modules[__name__])]
    tokenizer = [
        form.tokenizer.backend_tokenizer.to_str(),
        form.tokenizer.special_tokens_map,
        transformers.__version__,
    ]
    settings = [
        replace(source, rows=None, record={}, scored=None),
        source.scored and source.scored.digest,
        numbers,
        cut,
    ]
    key = Hasher.hash([source.rows._fingerprint, settings, replace(form, tokenizer=None), tokenizer, code])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "finteam_experts"
    rows = source.rows if len(numbers) == len(source.rows) else source.rows.select(numbers)
    with PartialState().local_main_process_first():
        folder.mkdir(parents=True, exist_ok=True)
        return rows.map(
            _tokens, batched=True, with_indices=True, remove_columns=rows.column_names, features=_COLUMNS,
            fn_kwargs={"source": replace(source, rows=None, record={}), "numbers": numbers, "form": form, "cut": cut}, num_proc=workers,
            new_fingerprint=key, cache_file_name=str(folder / f"{key}.arrow"), desc=f"Tokenising {source.name}",
        )  # fmt: skip


def _tokens(
    batch: dict[str, list], places: list[int], source: Source, numbers: np.ndarray, form: ChatFormat, cut: int | None
) -> dict[str, list]:
    """Tokens and labels of each row, of several pieces for a long text, or an empty one that says what is wrong with it."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    titles = [f"row {numbers[place] + 1}" for place in places]
    problems = [None] * len(rows)
    try:
        made = _pieces(source, rows, titles, form, cut)
    except form.error:
        if not source.of_dataset:
            raise
        made = []
        for number, (row, title) in enumerate(zip(rows, titles, strict=True)):  # one by one: which can't be used?
            try:
                made += _pieces(source, [row], [title], form, cut)
            except form.error as error:
                made.append([([], [])])
                problems[number] = str(error)
    strata = batch[STRATUM] if source.stratum is None else [source.stratum] * len(rows)
    out = [
        (*piece, stratum, source.name, problem)
        for pieces, stratum, problem in zip(made, strata, problems, strict=True)
        for piece in pieces
    ]
    return dict(zip(_COLUMNS, map(list, zip(*out, strict=True)), strict=True))


def _pieces(
    source: Source, rows: list[dict], titles: list[str], form: ChatFormat, cut: int | None
) -> list[list[Labelled]]:
    """Token ids and labels of each row; an `InputError` for one of a dataset that can't be used or has a scored text."""
    made: list[Any] = []
    for row, title in zip(rows, titles, strict=True):
        if source.of_dataset:
            made.append(found := trl_row(row, title))
            scored = source.scored
            if scored and (
                place := scored.find(found) if isinstance(found, str) else scored.find_conversation(*found)
            ):
                raise InputError(f"{title}: it has a scored text, {place}")
        else:
            stored = json.loads(row["row"])
            made.append(stored if isinstance(stored, str) else Conversation(stored[:2], stored[2]))
    exchanges = iter(form.exchanges([row for row in made if not isinstance(row, str)]))
    texts, end = [row for row in made if isinstance(row, str)], form.tokenizer.eos_token_id
    encoded = iter(form.tokenizer(texts)["input_ids"] if texts else ())
    for at, row in enumerate(made):
        if isinstance(row, str):
            ids = next(encoded)
            ids = ids if ids[-1:] == [end] else [*ids, end]
            length = cut or len(ids)
            made[at] = [(ids[start : start + length],) * 2 for start in range(0, len(ids), length)]
        else:
            exchange = next(exchanges)
            made[at] = [(exchange.ids, exchange.labels)]
    return made


def mixed(parts: dict[str, Dataset], chat_share: float | None, seed: int) -> Dataset:
    """The rows of `tasks` and `chats`, shuffled: all, or so many of the larger part that `chat_share` of all tokens are of chats.

    Raises `InputError` for a share without conversations or without task rows.
    """
    if chats := parts.get("chats"):
        order = list(range(len(chats)))
        random.Random(seed).shuffle(order)
        parts = parts | {"chats": chats.select(order)}
    if chat_share is None:
        return shuffled(concatenate_datasets([*parts.values()]), seed) if chats else parts["tasks"]
    shares = {name: share for name, share in {"tasks": 1 - chat_share, "chats": chat_share}.items() if share}
    if missing := shares.keys() - parts:
        found = {"tasks": "there are no task rows beside the conversations", "chats": "there are no conversations"}
        raise InputError(f"chat_share is {chat_share:g}, and {found[missing.pop()]}. Add some, or leave it out.")
    tokens = {name: _lengths(parts[name]) for name in shares}
    total = min(tokens[name].sum() / share for name, share in shares.items())
    rooms = {name: tokens[name].cumsum() - tokens[name] < round(total * share) for name, share in shares.items()}
    return shuffled(
        concatenate_datasets([parts[name].select(range(room.sum())) for name, room in rooms.items()]), seed
    )


def in_shares(parts: dict[str, Dataset], shares: dict[str, float], seed: int) -> Dataset:
    """The rows of all parts, drawn in these shares until each part is through; a short one starts again."""
    named = [part for part in shares if part in parts]
    probabilities = [shares[part] / sum(shares[name] for name in named) for part in named]
    rows = [shuffled(parts[part], seed) for part in named]
    return interleave_datasets(rows, probabilities, seed, stopping_strategy="all_exhausted")


def shuffled(rows: Dataset, seed: int) -> Dataset:
    return rows.select(random.Random(seed).sample(range(len(rows)), len(rows)))


def _lengths(rows: Dataset) -> np.ndarray:
    """The number of tokens of each row."""
    return pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_numpy()


def reads(rows: Dataset, sources: list[Source], training_args: SFTConfig) -> str:
    """Lines for the screen: how many rows of each source a training on `rows` reads, and how often."""
    read = rows_of_run(training_args) or len(rows) * training_args.num_train_epochs
    if training_args.packing and training_args.max_steps > 0:  # sequences of many rows
        read *= (training_args.max_length or 0) * len(rows) / _lengths(rows).sum()
    counts, lines = Counter(rows[_SOURCE][:]), ["This training reads about"]
    for source in sources:
        count, there = counts[source.name] * read / len(rows), len(source.rows)
        again = f", each {count / there:.1f} times" if count > there else ""
        lines.append(f"  {count:,.0f} rows of the {there:,} of {source.name}{again}")
    return "\n".join(lines)


def _print(text: str) -> None:
    if is_main_process():
        print(text)


def check_length(tokens: int | None, config: PretrainedConfig) -> None:
    """Raise `InputError` if that many tokens are more than the model has positions for."""
    if tokens and tokens > (positions := config.max_position_embeddings):
        found = f"max_length is {tokens} tokens, and the model has {positions} positions (max_position_embeddings)"
        raise InputError(f"{found}. Set it to that or less.")


def rows_of_run(training_args: SFTConfig) -> int | None:
    """How many rows a training of `max_steps` reads, in all processes; `None` if it goes by epochs."""
    steps, rows = training_args.max_steps, training_args.per_device_train_batch_size
    each = rows * training_args.gradient_accumulation_steps * PartialState().num_processes
    return steps * each if steps > 0 else None
