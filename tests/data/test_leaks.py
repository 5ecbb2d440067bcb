# SPDX-License-Identifier: Apache-2.0
"""What is trained on is not measured with, in whatever file and form it is written; repetitions are counted."""

import html
import json
import re
import shutil
import unicodedata

import numpy as np
import pytest

from finteam_experts.data import leaks
from finteam_experts.data.conversations import chat_file
from finteam_experts.data.files import corpus_file, read_corpus, read_task, task_file, text_key, write_rows
from finteam_experts.data.leaks import ScoredTexts, check_data_dir, repetitions
from finteam_experts.data.tasks import default_tasks
from finteam_experts.errors import InputError
from finteam_experts.evaluation.metrics import scores_with_errors, text_units

TASKS = default_tasks()

TEXT = "Café Fiduciaire’s “net” profit – before tax – rose by +3.2 % to EUR 13.1 mn (8.7), from 1,250 & more."
SHORT = "AT&T: up 3 %"
QUESTION, ANSWER = (
    "How did Fiduciaire’s profit develop in that year?",
    "It rose – by 3.2 % – to EUR 13.1 mn, says the café’s report.",
)
TWINS = {
    "exact": str,
    "case": str.upper,
    "white space": lambda text: "  " + text.replace(" ", " \n\t"),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "entities": html.escape,
    "entities twice": lambda text: html.escape(html.escape(text)),
    "named entities": lambda text: text.replace("é", "&eacute;").replace("’", "&#8217;").replace(" ", "&nbsp;"),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "NFKC": lambda text: unicodedata.normalize("NFKC", text.replace("fi", "ﬁ")),
    "zero width": lambda text: "\ufeff" + "\u200b".join(text),
    "soft hyphens": lambda text: text.replace("profit", "pro\u00adfit"),
    "plain quotes and dashes": lambda text: text.translate(str.maketrans("’“”–", '\'""-')),
    "other quotes and dashes": lambda text: text.translate(str.maketrans("’“”–", "´«»—")),
}


def messages(*turns):
    return [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]


@pytest.fixture
def data(tmp_path, toy_data):
    """The toy data, with conversations and one scored text of each kind."""
    folder = shutil.copytree(toy_data, tmp_path / "data")
    for role in ("macro", "general"):
        chat_file(folder, role).parent.mkdir(exist_ok=True)
        write_rows(chat_file(folder, role), [{"messages": messages(f"Question {role}?", "Answer.")}])
    write_rows(
        chat_file(folder, "macro", heldout=True), [{"messages": messages("What is a bond?", "A loan that is traded.")}]
    )
    return folder


def add(path, **row):
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


ROADS = {
    "corpus": lambda data, text: add(corpus_file(data, "micro"), text=text),
    "passage": lambda data, text: add(corpus_file(data, "credit"), text=f"They wrote: {text} And so on, they added."),
    "train": lambda data, text: add(task_file(data, "headlines", "train"), text=text, label="Yes"),
    "chat": lambda data, text: add(chat_file(data, "macro"), messages=messages(f"{text}\n\nWhat follows?", "neutral")),
    "general chat": lambda data, text: add(chat_file(data, "general"), messages=messages("Say it.", text)),
    "earlier turn": lambda data, text: add(
        chat_file(data, "macro"), messages=messages(text, "Yes.", "Why?", "Sales.")
    ),
    "system turn": lambda data, text: add(
        chat_file(data, "macro"),
        messages=[{"role": "system", "content": f"Read: {text}"}, *messages("Well?", "It is.")],
    ),
}
SCORED = {
    "test": lambda data, text: add(task_file(data, "fpb", "test"), text=text, label="neutral"),
    "valid": lambda data, text: add(task_file(data, "fpb", "valid"), text=text, label="neutral"),
    "heldout": lambda data, text: add(corpus_file(data, "macro", heldout=True), text=text),
}


def found(data):
    """The leaks of a directory, as its check names them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaks, "SHOWN", 1000)
        try:
            check_data_dir(data)
        except InputError as error:
            return (
                str(error)
                .removesuffix(". A score on a training text means nothing: remove it from one of them.")
                .split("; ")
            )
    return []


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("scored", SCORED)
def test_a_scored_text_on_any_road_in_any_form(data, scored, road):
    SCORED[scored](data, TEXT)
    assert found(data) == []
    for twin in TWINS.values():
        ROADS[road](data, twin(TEXT))
    assert len(found(data)) == len(TWINS)
    assert all(
        re.search(rf"_{scored}\.jsonl, line \d+: the same text is in .*\.jsonl, line \d+$", leak)
        for leak in found(data)
    )


@pytest.mark.parametrize("road", ["corpus", "train", "chat", "earlier turn"])
def test_a_short_scored_text_as_a_whole(data, road):
    SCORED["test"](data, SHORT)
    ROADS["passage"](data, SHORT)  # says too little to be known inside another text
    assert found(data) == []
    for twin in TWINS.values():
        ROADS[road](data, twin(SHORT))
    assert len(found(data)) == len(TWINS)


OTHERS = [
    ("+3.2 %", "-3.2 %"), ("+3.2 %", "−3.2 %"), ("+3.2 %", "3.2 %"), ("+3.2 %", "+32 %"), ("+3.2 %", "+.32 %"), ("(8.7)", "8.7"),
    ("(8.7)", "(87)"), ("13.1", "1.31"), ("1,250", "1.250"), ("1,250", "12,50"), ("EUR 13.1", "EUR -13.1"), ("1,250", "$1,250"),
]  # fmt: skip


@pytest.mark.parametrize("road", ROADS)
def test_another_figure_makes_another_text(data, road):
    for scored in SCORED:
        SCORED[scored](data, f"In {scored}: {TEXT}")
        for figure, other in OTHERS:
            assert figure in TEXT
            ROADS[road](data, f"In {scored}: {TEXT.replace(figure, other)}")
    assert found(data) == []


@pytest.mark.parametrize(("one", "other"), [
    ("Up 🚀", "Up 📉"), ("Rated A+", "Rated A-"), ("Rated BBB-", "Rated BBB"), ("12 5", "125"), ("Split 3:1", "Split 31"), ("≤ 3", "≥ 3"),
    ("1,25", "125"), ("1.25", "12.5"), ("a gain of .5", "a gain of 5"), ("-$3", "$3"), ("-EUR 3", "EUR 3"), ("$5", "€5"), ("?", "!"),
    ("&lt; 3", "&gt; 3"), ("कि", "की"), ("3.2-", "3.2"),
])  # fmt: skip
def test_keys_that_differ(one, other):
    assert text_key({"text": one}) != text_key({"text": other})


@pytest.mark.parametrize(("one", "other"), [
    ("1,250,000", "1250000"), ("- 3.2", "−3.2"), ("10-12", "10 – 12"), ("＋３．２％", "+3.2%"), ("EUR13.1mn", "EUR 13.1 mn"), ("( 3 )", "(3)"),
    ("“Yes”, he said", "'yes' he said."), ("No. 5", "No.5"), ("COVID-19", "covid‑19"),
])  # fmt: skip
def test_keys_that_are_the_same(one, other):
    assert text_key({"text": one}) == text_key({"text": other})


TALK = messages(f"{TEXT}\n\n{QUESTION}", ANSWER)
TALKS = {
    "itself": TALK,
    "another answer": messages(TALK[0]["content"], "It grew."),
    "passage and question apart": messages(f"Context: {TEXT}\n\nPlease answer. {QUESTION}", ANSWER),
    "more turns": [*TALK, *messages("Thanks.", "You are welcome.")],
    "a system turn": [{"role": "system", "content": "Be brief."}, *TALK],
    "as one turn": messages("Repeat: " + "\n".join(turn["content"] for turn in TALK), "I did."),
}


@pytest.mark.parametrize("name", TALKS)
def test_a_held_out_conversation_in_chats(data, name):
    add(chat_file(data, "macro", heldout=True), messages=TALK)
    for twin in TWINS.values():
        turns = [turn | {"content": "\n\n".join(map(twin, turn["content"].split("\n\n")))} for turn in TALKS[name]]
        add(chat_file(data, "general"), messages=turns)
    assert len(found(data)) == len(TWINS)


def test_a_held_out_conversation_as_plain_text(data):
    add(chat_file(data, "macro", heldout=True), messages=messages(QUESTION, ANSWER))
    add(corpus_file(data, "quant"), text=f"Q: {QUESTION.upper()}\nA: {ANSWER}")
    with pytest.raises(InputError, match="macro_heldout.jsonl, line 2: the same text is in .*quant.jsonl, line 61"):
        check_data_dir(data)


def test_a_short_held_out_conversation(data):
    """The fixture's "What is a bond?": by itself, within a longer one, under another system turn."""
    bond, system = TWINS["case"]("What is a bond?"), {"role": "system", "content": "Be brief."}
    for turns in (
        [bond, "A loan that is traded."],
        ["Hello!", "Good day.", bond, "A loan – that is traded!", "Thanks.", "Welcome."],
    ):
        add(chat_file(data, "general"), messages=[system, *messages(*turns)])
    assert len(found(data)) == 2


def test_what_a_conversation_may_share_with_a_held_out_one(data):
    add(chat_file(data, "macro", heldout=True), messages=TALK)
    add(
        chat_file(data, "macro", heldout=True),
        messages=messages("Why?", "Because its costs rose by 7 % in the second quarter."),
    )
    for talk in (
        messages(f"{TEXT}\n\nWhat was the profit before?", "EUR 8.7 mn."),  # another question on the passage
        messages("How did the profit of the café Fiduciaire change?", ANSWER),  # another wording of the question
        messages(
            "What is a bond?", "Debt that has a price."
        ),  # a question that anybody asks, with an answer of one's own
        messages("What are bonds?", "A loan that is traded."),
        messages("Why?", "Because its costs fell by 7 % in the second quarter."),
        messages(f"{TEXT.replace('+', '-')}\n\n{QUESTION}", ANSWER.replace("3.2", "-3.2")),
    ):
        add(chat_file(data, "macro"), messages=talk)
    add(corpus_file(data, "micro"), text=TEXT)  # reading a passage tells nobody the answer
    assert found(data) == []


def test_a_cut_passage(data):
    """Three quarters of a scored passage up to a cut are found; half of it is not: standing phrases reach that."""
    passage = " ".join(read_corpus(data, "micro", heldout=True)[:4])
    write_rows(corpus_file(data, "micro", heldout=True), [{"text": passage}])
    scored, n = ScoredTexts(data), len(passage)
    for piece in (passage[: 4 * n // 5], passage[n // 5 :], passage[n // 10 : 9 * n // 10]):
        assert scored.find(piece)
    assert scored.find(f"Before that it was known. {passage[: 4 * n // 5]}")
    assert scored.find(f"{passage[n // 5 :]} Nothing else was said.")
    for other in (passage[: n // 2], f"{passage[n // 2 :]} Nothing else was said."):
        assert not scored.find(other)


def test_windows_of_a_series_may_overlap_between_rows_of_tasks(data):
    days = [f"2015-06-{day:02},0.{day},1.{day},-0.{day},9.9" for day in range(1, 13)]
    add(task_file(data, "stock_movement", "train"), text="\n".join(days[:-1]), label="Rise")
    add(task_file(data, "stock_movement", "test"), text="\n".join(days[1:]), label="Rise")
    check_data_dir(data)


def test_all_leaks_are_counted(data):
    for line in task_file(data, "fpb", "test").read_text().splitlines():
        ROADS["chat"](data, json.loads(line)["text"])
    with pytest.raises(
        InputError, match=r"fpb_test.jsonl, line 1: .*; .*line 2: .*; .*line 3: .*macro.jsonl, line 4 \(9 more\)\."
    ):
        check_data_dir(data)


def test_validation_rows_are_no_test_rows(data):
    SCORED["test"](data, TEXT)
    SCORED["valid"](data, TEXT.upper())
    with pytest.raises(InputError, match="fpb_test.jsonl, line 13: the same text is in .*fpb_valid.jsonl, line 1"):
        check_data_dir(data)


def test_rows_of_a_dataset_are_looked_up_alike(data):
    SCORED["test"](data, TEXT)
    add(chat_file(data, "macro", heldout=True), messages=messages(QUESTION, ANSWER))
    scored = ScoredTexts(data)
    assert scored.find(f"{TEXT} neutral").endswith("fpb_test.jsonl, line 13")
    assert scored.find_conversation(messages(f"{TEXT}\n\nUp?"), "neutral").endswith("fpb_test.jsonl, line 13")
    assert scored.find_conversation(messages(QUESTION), ANSWER).endswith("macro_heldout.jsonl, line 2")
    assert scored.find("Something else.") is scored.find_conversation(messages("Why?"), "Sales.") is None


def test_a_directory_that_is_being_written(tmp_path):
    (tmp_path / "tasks").mkdir()
    assert ScoredTexts(tmp_path).find(TEXT) is None
    with pytest.raises(InputError, match="nowhere: no such folder. A data directory has"):
        check_data_dir(tmp_path / "nowhere")


def test_repetitions_are_counted_and_count_once():
    rows = [{"text": "Up.", "label": "a"}, {"text": "UP", "label": "a"}, {"text": "up", "label": "b"},
            {"text": "Up.", "label": "b", "question": "Other?"}]  # fmt: skip
    assert repetitions(rows) == {"repeated": 1, "contradicting": 1}
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(2, size=(2, 60))
    once = scores_with_errors(true, predicted)
    rows = [{"text": f"Row {n}", "label": "a"} for n in range(60)]
    twice = scores_with_errors(np.tile(true, 2), np.tile(predicted, 2), text_units(rows * 2))
    assert twice["accuracy"] == once["accuracy"]
    assert twice["accuracy_stderr"] == pytest.approx(once["accuracy_stderr"], rel=0.05)


@pytest.mark.parametrize(
    ("question", "expected"), [(None, {}), ("", {}), ("  ", {}), ("Up or down?", {"question": "Up or down?"})]
)
def test_a_question_that_is_not_asked(data, question, expected):
    task_file(data, "fpb", "test").write_text(
        json.dumps({"text": "x", "label": "neutral", "question": question}) + "\n"
    )
    assert read_task(data, TASKS["fpb"], "test") == [{"text": "x", "label": "neutral", **expected}]


@pytest.mark.parametrize("question", [7, ["Up?"], True])
def test_a_question_that_is_no_text(data, question):
    add(task_file(data, "fpb", "test"), text="x", label="neutral", question=question)
    with pytest.raises(InputError, match=r"fpb_test\.jsonl, line 13: the question is .*Write text, or null"):
        read_task(data, TASKS["fpb"], "test")
