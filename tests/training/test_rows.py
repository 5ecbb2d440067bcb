# SPDX-License-Identifier: Apache-2.0
"""Rows: the same tokens and order as a plain computation has, kept on disk, drawn in their shares."""

import json
import random
from dataclasses import replace

import pytest
from datasets import Dataset, Features, List, Value, interleave_datasets
from trl import SFTConfig

from conftest import TASKS, form_of
from finteam_experts.chats import ChatFormat
from finteam_experts.data.conversations import chat_file, read_chats
from finteam_experts.data.files import read_corpus, write_rows
from finteam_experts.data.mixture import tuning_rows
from finteam_experts.data.tasks import render
from finteam_experts.errors import InputError
from finteam_experts.training import rows as rows_module
from finteam_experts.training.rows import (
    Source,
    chat_source,
    corpus_source,
    in_shares,
    mixed,
    reads,
    task_source,
    tokenise,
)

LIMITS = dict.fromkeys(TASKS)


@pytest.fixture
def data(toy_data, new_run):
    """A data directory with conversations of a role and of none."""
    for role in ("general", "macro"):
        turns = [
            [{"role": "user", "content": f"{role} {n}?"}, {"role": "assistant", "content": f"Yes, {n}."}]
            for n in range(9)
        ]
        write_rows(chat_file(new_run / "data", role), [{"messages": talk} for talk in turns])
    return new_run / "data"


@pytest.fixture
def form(toy_base):
    return form_of(toy_base)


@pytest.fixture
def config(tmp_path):
    return SFTConfig(str(tmp_path / "work"), use_cpu=True, bf16=False, max_steps=4, per_device_train_batch_size=8)


def texts(name, passages, part="chats"):
    """A source of plain texts."""
    rows = Dataset.from_dict({"row": [json.dumps(passage) for passage in passages]})
    return Source(name, part, f"texts: {name}", rows, {})


def part_of(number: int, count: int, length: int) -> Dataset:
    """So many rows of so many tokens, all of them this number."""
    return Dataset.from_dict(
        {"input_ids": [[number] * length] * count}, features=Features({"input_ids": List(Value("int32"))})
    )


def test_a_tuning_has_the_tokens_of_the_chat_format_in_the_order_of_its_seed(data, form, config):
    sources = [
        task_source(data, TASKS, form, 3, LIMITS, hold_out=False),
        *(chat_source(data, role) for role in ("general", "macro")),
    ]
    found = mixed(tokenise(sources, form, config, 512, cut=512), None, 3)

    drawn = tuning_rows(data, TASKS, 3, LIMITS, hold_out=False)
    asked = form.exchanges([(render(TASKS[task], row, form.tokenizer), row["label"]) for task, row in drawn])
    talks = form.exchanges(read_chats(data, "general") + read_chats(data, "macro"))
    random.Random(3).shuffle(talks)
    expected = random.Random(3).sample(asked + talks, len(asked + talks))
    assert found["input_ids"][:] == [exchange.ids for exchange in expected]
    assert found["labels"][:] == [exchange.labels for exchange in expected]
    assert found["stratum"][:].count("fpb: positive") == [task == "fpb" and row["label"] == "positive" for task, row in drawn].count(True)  # fmt: skip


def test_an_expert_has_the_order_of_its_seed(data, form, config):
    shares = {"corpus": 0.2, "chats": 0.8}
    sources = [corpus_source(data, "macro"), chat_source(data, "macro")]
    found = in_shares(tokenise(sources, form, config, 512, cut=40, shares=shares), shares, 3)["input_ids"][:]

    texts = [[*ids, form.tokenizer.eos_token_id] for ids in form.tokenizer(read_corpus(data, "macro"))["input_ids"]]
    pieces = [ids[at : at + 40] for ids in texts for at in range(0, len(ids), 40)]
    parts = [pieces, [exchange.ids for exchange in form.exchanges(read_chats(data, "macro"))]]
    shuffled = [Dataset.from_dict({"ids": random.Random(3).sample(part, len(part))}) for part in parts]
    assert found == interleave_datasets(shuffled, [0.2, 0.8], 3, stopping_strategy="all_exhausted")["ids"][:]


def test_tokens_are_made_once_and_stay_on_disk(data, form, config, monkeypatch):
    def make(form=form):
        return tokenise([chat_source(data, "macro")], form, config, 512, cut=512)["chats"]

    made = make()
    assert made.cache_files  # mapped into memory, not held in it
    assert str(made.features["input_ids"]) == "List(Value('int32'))"
    assert make(replace(form, system_prompt="You are brief."))["input_ids"][:] != made["input_ids"][:]
    monkeypatch.setattr(ChatFormat, "exchanges", lambda form, talks: pytest.fail("tokenised again"))
    assert make()["input_ids"][:] == made["input_ids"][:]
    chat_file(data, "macro").open("a").write(chat_file(data, "macro").read_text().splitlines()[0] + "\n")
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        make()


def test_several_workers_make_the_same_tokens(data, form, config):
    one = tokenise([corpus_source(data, "macro")], form, config, None, cut=32)["corpus"]["input_ids"][:]
    config.dataset_num_proc = 2
    two = tokenise([corpus_source(data, "macro")], form, config, None, cut=33)["corpus"]["input_ids"][:]
    assert [token for ids in one for token in ids] == [token for ids in two for token in ids]


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_large_part_with_a_small_share_stays_small(form, config, monkeypatch, share):
    """50,000 passages at 0.05 are not a million rows, of which a hundred are read."""
    monkeypatch.setattr(rows_module, "POOL", 100)
    shares = {"corpus": share, "chats": 1 - share, "tasks": 3.0}  # there are no tasks
    sources = [
        texts("macro", [f"Rates rose in year {n}." for n in range(3000)], "corpus"),
        texts("micro", ["Sales rose."] * 5),
    ]
    parts = tokenise(sources, form, config, 512, cut=512, shares=shares)
    assert len(parts["corpus"]) == 100 * share
    rows = in_shares(parts, shares, 0)
    assert len(rows) < 300
    assert len({tuple(ids) for ids in rows["input_ids"]}) == 100 * share + 1
    assert "of the 3,000 of macro" in reads(rows, sources, config)
    config.max_steps = -1  # by epochs: all
    assert len(tokenise(sources, form, config, 512, cut=512, shares=shares)["corpus"]) == 3000


def test_a_tuning_of_few_steps_tokenises_as_many_rows_as_it_can_need(form, config, monkeypatch):
    monkeypatch.setattr(rows_module, "POOL", 100)
    sources = [texts(name, [f"{name} {n}." for n in range(count)], name) for name, count in (("a", 600), ("b", 400))]
    found = tokenise(sources, form, config, 512, cut=512)
    assert [len(found[part]) for part in "ab"] == [60, 40]
    config.max_steps = 50
    assert sum(map(len, tokenise(sources, form, config, 512, cut=512).values())) == 800


def test_rows_are_drawn_in_shares_and_a_short_part_starts_again():
    parts = {"a": part_of(1, 3, 1), "b": part_of(2, 60, 1)}
    rows = in_shares(parts, {"a": 0.5, "b": 0.5, "c": 9.0}, seed=0)["input_ids"][:]
    assert rows.count([2]) >= 60
    assert 0.4 < rows.count([1]) / len(rows) < 0.6


def test_a_share_of_the_tokens():
    parts = {"tasks": part_of(1, 20, 10), "chats": part_of(2, 10, 30)}
    assert len(mixed(parts, None, 0)) == 30
    for share in (0.0, 0.3, 0.6, 1.0):
        rows = mixed(parts, share, 0)["input_ids"][:]
        assert sum(len(ids) for ids in rows if ids[0] == 2) / sum(map(len, rows)) == pytest.approx(share, abs=0.1)
        assert len(rows) >= 10
    for part, message in (("chats", "no task rows"), ("tasks", "no conversations")):
        with pytest.raises(InputError, match=f"chat_share is 0.5, and there are {message}"):
            mixed({part: parts[part]}, 0.5, 0)


def test_a_long_text_is_cut_and_a_long_conversation_left_out(data, form, config, capsys):
    text = "Rates rose. " * 300
    chat_file(data, "macro").open("a").write(
        f'{{"messages": [{{"role": "user", "content": "{text}"}}, {{"role": "assistant", "content": "Yes."}}]}}\n'
    )
    parts = tokenise([chat_source(data, "macro"), texts("macro", [text], "corpus")], form, config, 200, cut=200)
    assert "chats/macro.jsonl: 1 of 10 rows are left out: they have more than 200 tokens" in capsys.readouterr().out
    assert len(parts["chats"]) == 9
    ids = [token for ids in parts["corpus"]["input_ids"] for token in ids]
    assert ids == [*form.tokenizer(text)["input_ids"], form.tokenizer.eos_token_id]
