# SPDX-License-Identifier: Apache-2.0
"""Conversations and TRL's formats as data: what can't be used is named, and what can be is trained on."""

import json
import re
import shutil

import pytest
from transformers import AutoTokenizer

from conftest import ROLES, TASKS, call, fit_router, form_of, instruct_tune, train_expert
from finteam_experts.chats import TEMPLATE_SETTINGS, chat_format
from finteam_experts.data.conversations import chat_file, read_chats, trl_row
from finteam_experts.data.files import write_rows
from finteam_experts.data.tasks import SYSTEM_PROMPT
from finteam_experts.errors import InputError
from finteam_experts.runs import read_record
from templates import TRL, with_template

TOPICS = {"macro": "inflation", "micro": "net sales", "quant": "the mean return"}


TOOL = {
    "type": "function",
    "function": {"name": "price", "description": "Of a share.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "price", "arguments": {"ticker": "X"}}}


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
        ([{"role": "user"}], "turn 1 has None as content"),
        (["A?"], "turn 1 is 'A[?]'; it has role and content"),
        ([{"role": "human", "content": "A?"}], "turn 1 has the role 'human'; it is system, user"),
        ([{"role": "user", "content": 5}], "turn 1 has 5 as content; it is text"),
        ([{"role": "user", "content": {"text": "A?"}}], "turn 1 has {'text': 'A[?]'} as content"),
        ([{"role": "user", "content": []}], "turn 1 is empty: its content is ''"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "turn 1 has the part {'type': 'image'"),
        ([messages("A?")[0] | {"images": ["x.png"]}], r"turn 1 has images \['x.png'\], which would not be used"),
        ([messages("A?")[0] | {"name": "Ann"}], "turn 1 has name 'Ann'"),
        ([*messages("A?"), messages("A?", "B.")[1] | {"weight": 0}], "turn 2 has weight 0"),
        ([*messages("A?"), messages("A?", "B.")[1] | {"train": False}], "turn 2 has train False"),
        (
            [*messages("A?"), messages("A?", "B.")[1] | {"reasoning_content": "Hm."}],
            "turn 2 has reasoning_content 'Hm.'",
        ),
        (
            [*messages("A?"), messages("A?", "B.")[1] | {"tool_calls": [CALL]}],
            "turn 2 has tool_calls, and the last turn",
        ),
        (
            [*messages("A?"), {"role": "assistant", "tool_calls": ["price"]}],
            r"turn 2: tool_calls is \['price'\]; it is a list",
        ),
        (
            [*messages("A?"), {"role": "tool", "content": "3"}, *messages("A?", "B.")[1:]],
            "are of user, tool, assistant",
        ),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(tmp_path, turns, message):
    write_rows(chat_file(tmp_path, "macro"), [{"messages": messages("A?", "B.")}, {"messages": turns}])
    with pytest.raises(InputError, match=rf"macro.jsonl, line 2: .*{message}"):
        read_chats(tmp_path, "macro")


@pytest.mark.parametrize(
    ("column", "value"),
    [("system", "Be brief."), ("images", ["x.png"]), ("tool_calls", [CALL]), ("reasoning_content", "Hm."), ("weight", 0),
     ("chat_template_kwargs", {"enable_thinking": True})],
)  # fmt: skip
@pytest.mark.parametrize(
    "row", [{"messages": messages("A?", "B.")}, {"prompt": "A?", "completion": "B."}, {"text": "Sales rose."}]
)
def test_a_column_that_would_not_be_used_is_named(row, column, value):
    others = {
        "source": "here",
        "tools": None,
        "videos": [],
    }  # those of a source say nothing, and neither do empty ones
    assert trl_row(row | others, "row 1") == trl_row(row, "row 1")
    with pytest.raises(InputError, match=f"row 1: column '{column}' is .*, and would not be used"):
        trl_row(row | {column: value}, "row 1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 5}, "text is 5"),
        ({"text": ["Sales rose."]}, r"text is \['Sales"),
        ({"text": " "}, "text is ' '"),
        ({"text": None, "source": "x"}, "text is None"),
        ({"prompt": "A?", "completion": None}, "completion is None"),
        ({"prompt": 5, "completion": "B."}, "turn 1 has 5 as content"),
        ({"prompt": "A?", "completion": " "}, "turn 2 is empty"),
        ({"messages": None}, "messages is None"),
        ({"question": "A?"}, "its columns are question. Understood are messages, prompt and completion, or text"),
    ],
)
def test_a_value_is_not_blamed_on_its_column(row, message):
    with pytest.raises(InputError, match=f"row 1: {message}"):
        trl_row(row, "row 1")


def test_text_in_parts_is_joined():
    parts = [{"type": "text", "text": "Sales", "image": None}, {"type": "text", "text": " rose?"}]
    row = {"messages": [{"role": "user", "content": parts}, *messages("A?", "B.")[1:]]}
    assert trl_row(row, "row 1") == trl_row({"messages": messages("Sales rose?", "B.")}, "row 1")


TOOL_TURNS = [
    *messages("What is X?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "price", "content": '{"price": "3"}'},
    {"role": "assistant", "content": "It is 3."},
]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gptoss"])
def test_tools_are_written_as_trl_writes_them(toy_base, name, tools):
    tokenizer = with_template(AutoTokenizer.from_pretrained(toy_base), TRL[name], "</s>")
    form = chat_format(tokenizer, SYSTEM_PROMPT)
    for turns in (messages("What is X?", "It is 3."), TOOL_TURNS):
        (exchange,) = form.exchanges([trl_row({"messages": turns, "tools": tools}, "row 1")])
        said = [{"role": "system", "content": SYSTEM_PROMPT}, *turns]
        whole = tokenizer.apply_chat_template(said, tools=[TOOL], chat_template=form.template, **TEMPLATE_SETTINGS)
        assert exchange.ids == whole["input_ids"]
        assert tokenizer.decode(exchange.answer).endswith("It is 3.")


def test_tools_that_a_template_leaves_out_are_named(toy_base):
    form = form_of(toy_base)
    row = trl_row({"messages": messages("What is X?", "It is 3."), "tools": [TOOL]}, "row 7")
    with pytest.raises(InputError, match="row 7: the chat template leaves out 'price'"):
        form.exchanges([row])
    with pytest.raises(InputError, match="row 7: tools is 'x'"):
        trl_row({"messages": messages("A?", "B."), "tools": "x"}, "row 7")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (messages("<|im_start|>user\nA?<|im_end|>\n", "B."), "it has '<|im_start|>' in '<|im_start|>user"),
        (messages("A?", "B.<|im_end|>"), "it has '<|im_end|>' in 'B.<|im_end|>'"),
        (
            messages("A?", "<think>\nHm.\n</think>\n\nB."),
            "the chat template writes a prompt differently once it is answered",
        ),
    ],
)
def test_a_conversation_that_a_template_cannot_write_is_named_with_its_line(toy_base, tmp_path, turns, message):
    folder = shutil.copytree(toy_base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(TRL["qwen3"])
    write_rows(chat_file(tmp_path, "macro"), [{"messages": messages("A?", "B.")}, {"messages": turns}])
    with pytest.raises(InputError, match=re.escape(f"macro.jsonl, line 2: {message}")):
        form_of(folder).exchanges(read_chats(tmp_path, "macro"))


def test_the_loss_is_on_the_last_answer_and_a_system_turn_stays(toy_base):
    form = form_of(toy_base)
    turns = [{"role": "system", "content": "You are brief."}, *messages("A?", "First.", "B?")]
    (exchange,) = form.exchanges([(turns, "Second.")])
    text = form.tokenizer.decode(exchange.prompt)
    assert "You are brief." in text
    assert "First." in text
    assert "financial analyst" not in text
    assert form.tokenizer.decode(exchange.answer) == "Second."


def test_a_team_is_tuned_on_conversations_and_answers_are_scored(talking_run, capsys):
    fit_router(talking_run, "--overwrite")
    instruct_tune(talking_run, "moe", "--chat_share", 0.5)
    record = read_record(talking_run / "moe-instruct")
    assert set(record["inputs"]["chats"]) == {*ROLES, "general"}
    call("scripts/evaluate.py", "--run_dir", talking_run, "--models", "base", "moe-instruct", "--limit", 4, "--chats", 3,
         "--name", "answers")  # fmt: skip
    printed = capsys.readouterr().out
    assert "Answers to held-out conversations" in printed and "3 of macro" in printed
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


@pytest.mark.parametrize(
    "shares",
    ["{poems: 1}", "{corpus: 0}", "[corpus]", "{corpus: much}", "{corpus: .inf}", "{corpus: true}", "{corpus: 0.2"],
)
def test_shares_that_an_expert_cannot_learn_in(new_run, shares):
    wanted = "it gives corpus, chats, general, tasks, or some of them, a share above 0|learn_from, corpus is .* it has to be"
    with pytest.raises(InputError, match=wanted):
        train_expert(new_run, "macro", "--learn_from", shares)


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


def test_chat_share_without_conversations(new_run):
    with pytest.raises(InputError, match="chat_share is 0.5, and there are no conversations"):
        instruct_tune(new_run, "dense", "--chat_share", 0.5)


def test_tasks_are_named(new_run):
    instruct_tune(new_run, "dense", "--tasks", "fpb", "headlines")
    assert set(read_record(new_run / "dense-instruct")["inputs"]["tasks"]) == {"fpb", "headlines"}
    with pytest.raises(InputError, match="--tasks fbp: .* has the tasks .*Did you mean 'fpb'"):
        instruct_tune(new_run, "dense", "--tasks", "fbp")
    assert TASKS["fpb"].role == "micro"
