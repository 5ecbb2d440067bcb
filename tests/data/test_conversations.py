# SPDX-License-Identifier: Apache-2.0
"""Conversations and TRL's formats as data: what can't be used is named, and what can be is trained on."""

import json

import pytest
import yaml
from datasets import Dataset

from conftest import REPOSITORY, ROLES, SHORT, TASKS, call, fit_router, form_of, instruct_tune, train_expert
from finteam_experts.data.conversations import chat_file, read_chats
from finteam_experts.data.files import write_rows
from finteam_experts.errors import InputError
from finteam_experts.runs import read_record
from finteam_experts.training.rows import Example, in_shares, mixed

TOPICS = {"macro": "inflation", "micro": "net sales", "quant": "the mean return"}


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def write_chats(data, role: str, *, count: int = 12, heldout: int = 4) -> None:
    topic = TOPICS.get(role, "the weather")
    rows = [
        {"messages": messages(f"What happened to {topic} in month {n}?", f"In month {n} {topic} rose by {n} percent.")}
        for n in range(count + heldout)
    ]
    write_rows(chat_file(data, role), rows[:count])
    write_rows(chat_file(data, role, heldout=True), rows[count:])


@pytest.fixture
def talking_run(copied_run):
    """A complete run whose data directory has conversations of every role and general ones, and nothing tuned yet."""
    for role in (*ROLES, "general"):
        write_chats(copied_run / "data", role)
    for tuned in ("moe-instruct", "dense-instruct"):
        (copied_run / tuned).rename(copied_run / f"old-{tuned}")
    return copied_run


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (messages("A?", "B.", "C?"), "ends with a turn of 'user'"),
        (messages("A?", " "), "turn 2 is empty"),
        (
            [*messages("A?", "B."), {"role": "system", "content": "S"}, *messages("C?", "D.")],
            "turn 3 is a system turn",
        ),
        ([*messages("A?"), *messages("B?", "C.")], "alternate between user and assistant"),
        ([{"role": "system", "content": "S"}], "ends with a turn of 'system'"),
        ("A?", "messages is 'A[?]'"),
        ([], "messages is"),
        ([{"role": "user"}], "turn 1 is empty"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(tmp_path, turns, message):
    write_rows(chat_file(tmp_path, "macro"), [{"messages": messages("A?", "B.")}, {"messages": turns}])
    with pytest.raises(InputError, match=rf"macro.jsonl, line 2: .*{message}"):
        read_chats(tmp_path, "macro")


def test_the_loss_is_on_the_last_answer_and_a_system_turn_stays(toy_base):
    form = form_of(toy_base)
    turns = [{"role": "system", "content": "You are brief."}, *messages("A?", "First.", "B?")]
    (exchange,) = form.exchanges([(turns, "Second.")])
    text = form.tokenizer.decode(exchange.prompt)
    assert "You are brief." in text
    assert "First." in text
    assert "financial analyst" not in text
    assert form.tokenizer.decode(exchange.answer) == "Second."


def test_a_share_of_the_tokens():
    tasks = [Example([0] * 10, [0] * 10, None, "task") for _ in range(20)]
    chats = [Example([0] * 30, [0] * 30, None, "chat") for _ in range(10)]
    assert len(mixed(tasks, chats, None, 0)) == 30
    for share in (0.0, 0.3, 0.6, 1.0):
        rows = mixed(tasks, chats, share, 0)
        of_chats = sum(len(row.ids) for row in rows if row.stratum == "chat")
        assert of_chats / sum(len(row.ids) for row in rows) == pytest.approx(share, abs=0.1)
        assert len(rows) >= 10
    for rows, share, message in (
        (([], chats), 0.5, "no task rows"),
        ((tasks, []), 0.5, "no chats/ROLE"),
    ):
        with pytest.raises(InputError, match=message):
            mixed(*rows, share, 0)


def test_a_team_is_tuned_on_conversations_and_answers_are_scored(talking_run, capsys):
    fit_router(talking_run, "--overwrite")
    instruct_tune(talking_run, "moe", "--chat_share", 0.5)
    record = read_record(talking_run / "moe-instruct")
    assert set(record["inputs"]["chats"]) == {*ROLES, "general"}
    call("scripts/evaluate.py", "--run_dir", talking_run, "--models", "base", "moe-instruct", "--limit", 4, "--chats", 3,
         "--name", "answers")  # fmt: skip
    printed = capsys.readouterr().out
    assert "Answers to 3 held-out conversations of macro" in printed
    report = json.loads((talking_run / "reports/answers.json").read_text())
    own = report["models"]["moe-instruct"]["answers"]["quant"]
    assert own["n"] == len(own["written"]) == 3
    assert own["nats"] < report["models"]["base"]["answers"]["quant"]["nats"]
    call("scripts/report_routing.py", "--run_dir", talking_run, "--name", "talks", "--passages", 3)
    gates = json.loads((talking_run / "reports/talks.json").read_text())["gates"]
    assert {"fitted", "fitted, conversations"} <= set(gates)


def test_a_directory_with_conversations_alone(talking_run):
    for path in (talking_run / "data/tasks").iterdir():
        path.unlink()
    instruct_tune(talking_run, "moe")
    assert read_record(talking_run / "moe-instruct")["tasks"] == []
    call(
        "scripts/evaluate.py",
        "--run_dir",
        talking_run,
        "--models",
        "base",
        "moe-instruct",
        "--name",
        "talk",
        "--chats",
        2,
    )
    report = json.loads((talking_run / "reports/talk.json").read_text())
    assert report["majority"] == report["differences"] == {}
    assert set(report["models"]["base"]["answers"]) == {*ROLES, "general"}


def test_an_expert_learns_from_its_corpus_conversations_and_tasks(talking_run, capsys):
    (talking_run / "adapters/macro").rename(talking_run / "adapters/before")
    train_expert(talking_run, "macro")
    assert {"corpus", "chats", "general", "tasks"} <= set(
        read_record(talking_run / "adapters/macro")["inputs"]["corpus"]
    )
    chat_file(talking_run / "data", "macro").unlink()
    (talking_run / "adapters/macro").rename(talking_run / "adapters/all")
    train_expert(talking_run, "macro")
    assert "has nothing for chats: macro learns from corpus, general, tasks" in capsys.readouterr().out
    (talking_run / "adapters/macro").rename(talking_run / "adapters/less")
    with pytest.raises(InputError, match="has nothing for chats of learn_from and the role macro"):
        train_expert(talking_run, "macro", "--learn_from", "{chats: 1}")


@pytest.mark.parametrize("shares", ["{poems: 1}", "{corpus: 0}", "[corpus]", "{corpus: much}", "{corpus: 0.2"])
def test_shares_that_an_expert_cannot_learn_in(new_run, shares):
    with pytest.raises(InputError, match="it gives corpus, chats, general, tasks, or some of them, a share above 0"):
        train_expert(new_run, "macro", "--learn_from", shares)


def test_rows_are_drawn_in_shares_and_a_short_part_starts_again():
    short, long = (Example([name], [name], None, "") for name in (1, 2))
    rows = in_shares({"a": [short] * 3, "b": [long] * 60}, {"a": 0.5, "b": 0.5, "c": 9.0}, 8, seed=0)["input_ids"]
    assert rows.count([2]) >= 60
    assert 0.4 < rows.count([1]) / len(rows) < 0.6


def test_conversations_of_a_role_that_the_team_does_not_have(talking_run):
    write_chats(talking_run / "data", "legal")
    with pytest.raises(InputError, match="legal.jsonl: the team has macro, micro, quant. Rename it to general.jsonl"):
        instruct_tune(talking_run, "moe")


def test_a_held_out_conversation_in_train(talking_run):
    path = chat_file(talking_run / "data", "macro", heldout=True)
    write_rows(
        path, [json.loads(line) for line in chat_file(talking_run / "data", "macro").read_text().splitlines()[:1]]
    )
    with pytest.raises(InputError, match="macro_heldout.jsonl, line 1: the same text is in .*macro.jsonl, line 1"):
        instruct_tune(talking_run, "dense")


FORMATS = {
    "messages": [{"messages": messages(f"Question {n}?", f"Answer {n}.")} for n in range(8)],
    "prompt and completion": [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(8)],
    "conversational prompt": [{"prompt": messages(f"Q {n}?"), "completion": [{"role": "assistant", "content": "A."}]} for n in range(8)],
    "text": [{"text": f"Sales of company {n} rose by {n} percent."} for n in range(8)],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_datasets_in_trls_formats(copied_run, tmp_path, name):
    Dataset.from_list(FORMATS[name]).to_json(tmp_path / "set/train.jsonl")
    (copied_run / "dense-instruct").rename(copied_run / "old")
    nothing = ("--data_dir", tmp_path / "nothing")
    instruct_tune(copied_run, "dense", "--dataset_name", tmp_path / "set", *nothing, "--num_train_epochs", 1, "--max_steps", -1,
                  "--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}")  # fmt: skip
    record = read_record(copied_run / "dense-instruct")
    assert record["results"]["rows_seen"] == 8
    assert str(tmp_path) not in json.dumps(record)


def test_a_stream_and_a_mixture_with_roles(copied_run, tmp_path):
    for name in ("messages", "text"):
        Dataset.from_list(FORMATS[name]).to_json(tmp_path / name / "train.jsonl")
    (copied_run / "moe-instruct").rename(copied_run / "old")
    recipe = tmp_path / "mixture.yaml"
    recipe.write_text(
        f"datasets:\n- path: {tmp_path}/messages\n- path: {tmp_path}/text\ndataset_roles: [micro, none]\n"
    )
    with pytest.raises(InputError, match="dataset_roles is micro, for 2 datasets"):
        call("recipes/instruct_tune.py", "--config", recipe, "--dataset_roles", "micro")
    with pytest.raises(InputError, match="set max_steps"):
        instruct_tune(
            copied_run,
            "moe",
            "--dataset_name",
            tmp_path / "messages",
            "--dataset_streaming",
            "true",
            "--max_steps",
            -1,
        )
    full = yaml.safe_load((REPOSITORY / "recipes/sample/instruct_tune_moe.yaml").read_text()) | yaml.safe_load(
        recipe.read_text()
    )
    recipe.write_text(yaml.safe_dump(full))
    call("recipes/instruct_tune.py", "--config", recipe, "--run_dir", copied_run, *SHORT)
    roles = [source["role"] for source in read_record(copied_run / "moe-instruct")["inputs"]["datasets"]]
    assert roles == ["micro", "none"]
    (copied_run / "moe-instruct").rename(copied_run / "mixture")
    instruct_tune(copied_run, "moe", "--dataset_name", tmp_path / "messages", "--dataset_streaming", "true",
                  "--dataset_roles", "micro")  # fmt: skip
    assert read_record(copied_run / "moe-instruct")["inputs"]["datasets"][0]["role"] == "micro"
    Dataset.from_dict({"question": ["A?"], "reply": ["B."]}).to_json(tmp_path / "other/train.jsonl")
    with pytest.raises(
        InputError, match="its columns are question, reply. Understood are messages, prompt and completion, or text"
    ):
        instruct_tune(copied_run, "dense", "--dataset_name", tmp_path / "other")


def test_chat_share_without_conversations(new_run):
    with pytest.raises(InputError, match="chat_share is 0.5, and the data directory has no chats/ROLE.jsonl"):
        instruct_tune(new_run, "dense", "--chat_share", 0.5)


def test_tasks_are_named(new_run):
    instruct_tune(new_run, "dense", "--tasks", "fpb", "headlines")
    assert set(read_record(new_run / "dense-instruct")["inputs"]["tasks"]) == {"fpb", "headlines"}
    with pytest.raises(InputError, match="--tasks fbp: .* has the tasks .*Did you mean 'fpb'"):
        instruct_tune(new_run, "dense", "--tasks", "fbp")
    assert TASKS["fpb"].role == "micro"
