# SPDX-License-Identifier: Apache-2.0
"""The check of a data directory: what a run would train and measure, and every problem that would end one."""

import pytest

from conftest import call
from finteam_experts.data.conversations import chat_file
from finteam_experts.data.files import write_rows
from finteam_experts.errors import InputError
from finteam_experts.models import load_tokenizer


def check(run_dir, *arguments):
    call("scripts/check_data.py", run_dir / "data", "--base", run_dir / "base", *arguments)


def test_what_a_run_would_train(new_run, capsys):
    rows = [
        {"messages": [{"role": "user", "content": f"Q {n}?"}, {"role": "assistant", "content": f"A {n}."}]}
        for n in range(5)
    ]
    write_rows(chat_file(new_run / "data", "macro"), rows[:4])
    write_rows(chat_file(new_run / "data", "macro", heldout=True), rows[4:])
    check(new_run)
    printed = capsys.readouterr().out
    for part in ("Corpora", "Tasks", "Conversations", "fiqasa", "headlines", "no text is both trained on and scored"):
        assert part in printed


def test_a_task_that_drowns_the_others_is_noted(new_run, capsys):
    check(new_run)
    assert "Training will see mostly" not in capsys.readouterr().out
    path = new_run / "data/tasks/headlines_train.jsonl"
    rows = path.read_text().splitlines()
    path.write_text(
        "\n".join(rows + [row.replace('"text": "', f'"text": "{n} ') for n in range(20) for row in rows]) + "\n"
    )
    check(new_run)
    assert f"Note: headlines has {21 * len(rows):,} train rows" in (printed := capsys.readouterr().out)
    assert "--rows_per_task" in printed


def test_special_tokens_in_texts_are_noted(new_run, capsys):
    token = load_tokenizer(new_run / "base").eos_token
    check(new_run)
    assert "special token" not in capsys.readouterr().out
    for file in ("tasks/fpb_train.jsonl", "corpora/macro.jsonl"):
        path = new_run / "data" / file
        path.write_text(path.read_text().replace('"text": "', '"text": "' + token, 2))
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": f"Costs.{token}"}]
    write_rows(chat_file(new_run / "data", "macro"), [{"messages": turns}])
    check(new_run)
    printed = capsys.readouterr().out
    for count, file in ((2, "tasks/fpb_train.jsonl"), (2, "corpora/macro.jsonl"), (1, "chats/macro.jsonl")):
        assert f"Note: {count} texts of {file} hold {token}, which this base takes for a special token" in printed


def test_problems_end_it(new_run):
    path = new_run / "data/tasks/fpb_train.jsonl"
    path.write_text(path.read_text() + (new_run / "data/tasks/fpb_test.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="fpb_test.jsonl, line 1: the same text is in"):
        check(new_run)
    with pytest.raises(InputError, match="no such folder"):
        call("scripts/check_data.py", new_run / "nowhere")
