# SPDX-License-Identifier: Apache-2.0
"""The check of a data directory: what a run would train and measure, and every problem that would end one."""

import json
import shutil

import pytest

from conftest import REPOSITORY, call
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
    path = new_run / "data/corpora/macro.jsonl"
    path.write_text(path.read_text().replace('"text": "', '"text": "' + token, 2))
    check(new_run)
    noted = f"Note: 2 texts of corpora/macro.jsonl hold {token}, which this base takes for a special token"
    assert noted in capsys.readouterr().out
    path = new_run / "data/tasks/fpb_train.jsonl"
    path.write_text(path.read_text().replace('"text": "', '"text": "' + token, 1))
    with pytest.raises(
        InputError, match=r"fpb_train.jsonl, line 1: it has '<\|im_end\|>' in .* only the chat template writes that"
    ):
        check(new_run)
    path.write_text(path.read_text().replace(token, ""))
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": f"Costs.{token}"}]
    write_rows(chat_file(new_run / "data", "macro"), [{"messages": turns}])
    with pytest.raises(InputError, match=r"chats/macro.jsonl, line 1: it has '<\|im_end\|>'"):
        check(new_run)


LONG = " and so on" * 300  # more than the 512 positions of the toy base


def talk(question, answer="Yes, it did."):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def plant(data, name, row):
    (data / name).parent.mkdir(exist_ok=True)
    with (data / name).open("a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.mark.parametrize(("name", "row", "message"), [
    ("tasks/fpb_test.jsonl", {"text": "Up.", "label": "neutral", "question": f"Up{LONG}?"}, "fpb_test.jsonl, line 13: with its answer it has"),
    ("tasks/fpb_valid.jsonl", {"text": "Up.", "label": "neutral", "question": f"Up{LONG}?"}, "fpb_valid.jsonl, line 1: with its answer it has"),
    ("chats/macro_heldout.jsonl", talk(f"Up{LONG}?"), "macro_heldout.jsonl, line 1: with its answer it has"),
    ("chats/general_heldout.jsonl", talk("Up?", f"Yes{LONG}."), "general_heldout.jsonl, line 1: with its answer it has"),
    ("chats/general.jsonl", talk(f"Up{LONG}?"), "general.jsonl, line 1: with its answer it has"),  # all that there is to train on
    ("chats/legal.jsonl", talk("Up?"), "legal.jsonl: the team has macro, micro, quant"),
    ("chats/macro_heldout.jsonl", {"messages": []}, "macro_heldout.jsonl, line 1: messages is"),
    ("tasks/fpb_valid.jsonl", {"text": "Up.", "label": "up"}, "fpb_valid.jsonl, line 1: unknown label 'up'"),
    ("tasks/fpb_dev.jsonl", {"text": "Up.", "label": "neutral"}, "fpb_dev.jsonl: no step reads a file of this name"),
])  # fmt: skip
def test_a_row_that_would_end_a_step(new_run, name, row, message):
    plant(new_run / "data", name, row)
    with pytest.raises(InputError, match=message):
        check(new_run)


def test_held_out_passages_that_have_no_loss_and_corpora_that_are_missing(new_run):
    team = new_run / "team.yaml"
    team.write_text(
        (REPOSITORY / "moe_merge.yaml").read_text()
        + "  - source_model: base\n    positive_prompts: ['What is new?']\n"
    )
    (new_run / "data/corpora/base.jsonl").unlink()
    check(new_run)
    with pytest.raises(InputError, match="base.jsonl does not exist"):
        check(new_run, "--merge_config", team)
    path = new_run / "data/corpora/macro_heldout.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="macro_heldout.jsonl: its passages are of one token or none"):
        check(new_run)
    path.unlink()
    with pytest.raises(InputError, match="macro_heldout.jsonl does not exist"):
        check(new_run)


def test_a_directory_with_nothing_to_evaluate(new_run):
    shutil.rmtree(new_run / "data/tasks")
    plant(new_run / "data", "chats/macro.jsonl", talk("Up?"))
    with pytest.raises(
        InputError, match="nothing to evaluate: no tasks/TASK_test.jsonl and no chats/ROLE_heldout.jsonl"
    ):
        check(new_run)


def test_long_rows_that_no_training_takes_are_counted(new_run, capsys):
    for _ in range(3):
        plant(new_run / "data", "tasks/fpb_train.jsonl", {"text": "Up.", "label": "neutral", "question": f"Up{LONG}?"})
    check(new_run)
    assert "fpb_train.jsonl, line 29 and 2 others have more than 512 tokens" in capsys.readouterr().out


def test_without_a_base_all_but_tokens_is_checked(new_run, monkeypatch, capsys):
    monkeypatch.chdir(new_run)
    call("scripts/check_data.py", "data")
    printed = capsys.readouterr().out
    assert "outputs/quickstart/base is not there and no --base was named" in printed
    assert "no text is both trained on and scored" in printed
    plant(
        new_run / "data",
        "tasks/fpb_train.jsonl",
        json.loads((new_run / "data/tasks/fpb_test.jsonl").read_text().splitlines()[2]),
    )
    with pytest.raises(
        InputError, match="fpb_test.jsonl, line 3: the same text is in data/tasks/fpb_train.jsonl, line 29"
    ):
        call("scripts/check_data.py", "data")


def test_problems_end_it(new_run):
    path = new_run / "data/tasks/fpb_train.jsonl"
    path.write_text(path.read_text() + (new_run / "data/tasks/fpb_test.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="fpb_test.jsonl, line 1: the same text is in"):
        check(new_run)
    with pytest.raises(InputError, match="no such folder"):
        call("scripts/check_data.py", new_run / "nowhere")
