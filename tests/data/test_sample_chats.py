# SPDX-License-Identifier: Apache-2.0
"""The sample's conversations: right figures, enough questions, held-out ones unseen; and the base's own general answers."""

import json
import random
import re

import pytest

from conftest import call, load_script, shell
from finteam_experts.data.conversations import read_chats
from finteam_experts.data.sample.chats import ROLES, chats, knowledge
from finteam_experts.errors import InputError
from finteam_experts.evaluation.answers import unsupported_figures


def texts(chat):
    *asked, answer = [turn["content"] for turn in chat["messages"]]
    return "\n".join(asked), answer


@pytest.fixture(scope="module", params=ROLES)
def drawn(request):
    return chats(request.param, 500, 60, random.Random(f"7 {request.param}"))


def test_every_figure_of_an_answer_is_in_its_passage_or_follows_from_it(drawn):
    for part in drawn:
        for chat in part:
            asked, answer = texts(chat)
            # counted from the passage, not computed from two figures
            percent_only = re.sub(r"\d of \d days", "", answer)
            if chat["kind"] != "knowledge":
                assert not unsupported_figures(asked, percent_only), (asked, answer)


def test_answers_are_whole_sentences_in_which_no_label_stands_alone(drawn):
    for part in drawn:
        for chat in part:
            _, answer = texts(chat)
            assert re.fullmatch(r"[A-Z0-9].*[.\"]\.?", answer)
            assert len(answer.split()) >= 4


def test_a_macro_passage_says_which_way_its_figures_went():
    """A small model reads "fell to 2.4 percent"; that 2.4 is less than 2.8 it can't tell."""
    ways = re.compile(r"\b(rose|rising|climbed|went up|grew|widened|fell|falling|dropped|went down|shrank|narrowed)\b")
    told = [
        (asked.split("\n\n")[0], answer)
        for chat in chats("macro", 500, 0, random.Random("7 macro"))[0]
        for asked, answer in [texts(chat)]
        if chat["kind"] in ("read", "reason") and ways.search(answer)
    ]
    assert len(told) > 100
    assert [answer for passage, answer in told if not ways.search(passage)] == []


def test_a_figure_of_one_day_is_the_one_that_was_asked_for():
    verbs = {"open": "opened at", "high": "rose as high as", "low": "fell as low as", "close": "closed at"}
    asked_for = set()
    for chat in chats("quant", 500, 0, random.Random("7 quant"))[0]:
        asked, answer = texts(chat)
        if chat["kind"] == "read":
            what, figure = re.fullmatch(r"The day's (\w+) was ([\d.]+)\.", answer).groups()
            passage, question = asked.split("\n\n")
            assert what in question
            assert re.search(rf"{verbs[what]} {figure}\b", passage)
            asked_for.add(what)
    assert asked_for == set(verbs)


def test_no_question_is_in_both_splits(drawn):
    train, heldout = ({chat["messages"][0]["content"] for chat in part} for part in drawn)
    assert len(train) == 500
    assert len(heldout) == 60
    assert not train & heldout


@pytest.mark.parametrize("role", ROLES)
def test_sixty_questions_of_the_field_in_several_wordings(role):
    train, heldout = knowledge(role)
    answers = {chat["messages"][-1]["content"] for chat in train + heldout}
    assert len(answers) >= 60
    assert len(train + heldout) == 3 * len(answers)
    unseen = answers - {chat["messages"][-1]["content"] for chat in train}
    assert len(unseen) >= 6  # questions that are held out in every wording
    assert len(heldout) > 3 * len(unseen)  # and wordings of known ones
    for answer in answers:
        assert 1 <= len(re.findall(r"[.!?](?:\s|$)", answer)) <= 3


@pytest.fixture
def rehearse(new_run, monkeypatch):
    """Run the script with a base that answers with the whole sentence `answer` and the number of the question."""

    def run(answer="It is thing", *arguments):
        script = load_script("scripts/rehearse.py")
        answers = lambda model, form, questions, **_: [f"{answer} {n}. And then" for n in range(len(questions))]  # noqa: E731
        monkeypatch.setattr(script, "greedy_answers", answers)
        monkeypatch.setattr("sys.argv", ["rehearse.py", "--run_dir", str(new_run), *map(str, arguments)])
        script.main()
        return new_run / "data"

    return run


def test_the_base_answers_general_questions_itself_once(rehearse, capsys):
    data = rehearse()
    assert "general.jsonl: 80 of the base's own answers" in capsys.readouterr().out
    kept = read_chats(data, "general"), read_chats(data, "general", heldout=True)
    assert [len(part) for part in kept] == [80, 20]
    assert not any("#" in turns[0]["content"] for turns, _ in kept[0] + kept[1])  # the file begins with a comment
    before = (data / "chats/general.jsonl").read_bytes()
    rehearse("Another")
    assert "skipped" in capsys.readouterr().out
    assert (data / "chats/general.jsonl").read_bytes() == before


def test_held_out_conversations_of_the_users_own_are_kept_and_not_trained_on(rehearse, new_run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("".join(f"Why number {n}?\n" for n in range(10)))
    path = new_run / "data/chats/general_heldout.jsonl"
    turns = [{"role": "user", "content": "Why number 3?"}, {"role": "assistant", "content": "It is thing 3."}]
    path.parent.mkdir()
    path.write_text(json.dumps({"messages": turns, "mine": 1}) + "\n")
    before = path.read_bytes()
    data = rehearse("It is thing", "--questions", tmp_path / "mine.txt")
    assert path.read_bytes() == before
    assert "general_heldout.jsonl exists: kept" in capsys.readouterr().out
    answers = [answer for _, answer in read_chats(data, "general")]
    assert answers == [f"It is thing {n}." for n in range(10) if n != 3]


def test_an_interrupted_rehearsal_goes_on_with_the_same_rows(rehearse):
    data = rehearse()
    files = [data / "chats/general.jsonl", data / "chats/general_heldout.jsonl"]
    before = [path.read_bytes() for path in files]
    files[0].unlink()  # killed between the two
    rehearse()
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize(("answer", "kept"), [
    ("It is blue. It is wide. And then it", "It is blue. It is wide."),
    ("One. One. One.", ""),
    ("你好。你好。", ""),
    ("no sentence at all", ""),
    ("Three tips:\n\n1. Rest. 2. Eat well. 3.", "Three tips:\n\n1. Rest. 2. Eat well."),
    ("**Rest.** **2.**", "**Rest.**"),
    ("Небо голубое. Оно широкое. А пот", "Небо голубое. Оно широкое."),
    ("السماء زرقاء. هل تعلم لماذا؟ لأن", "السماء زرقاء. هل تعلم لماذا؟"),
    ("天空是蓝色的。它很宽！然后", "天空是蓝色的。它很宽！"),
    ("「はい。」と言った。そして", "「はい。」と言った。"),
    ("यह नीला है। यह चौड़ा", "यह नीला है।"),
    ("ท้องฟ้าเป็นสีฟ้า มันกว้างมาก แล้ว", "ท้องฟ้าเป็นสีฟ้า มันกว้างมาก"),
    ("The answer is 42.", "The answer is 42."),
    ("It rose 5 % in 2008. It fell to 3.5", "It rose 5 % in 2008."),
    ("It was 5%. The", "It was 5%."),
    ("He said “no.” Then (it ended.) And so", "He said “no.” Then (it ended.)"),
    ("Wait… It stopped... and", "Wait… It stopped..."),
])  # fmt: skip
def test_rehearsed_answers_are_cut_at_whole_sentences(answer, kept):
    assert load_script("scripts/rehearse.py").whole_sentences(answer) == kept


def test_an_answer_that_ended_is_whole_in_a_script_without_full_stops():
    whole_sentences = load_script("scripts/rehearse.py").whole_sentences
    assert whole_sentences("ท้องฟ้าเป็นสีฟ้า", ended=True) == "ท้องฟ้าเป็นสีฟ้า"
    assert whole_sentences("ท้องฟ้าเป็นสีฟ้า") == whole_sentences("a word", ended=True) == ""


@pytest.mark.parametrize(("content", "message"), [
    (None, "mine.txt: no such file"),
    (b"How long does bread keep?\nWo ist das Caf\xe9?", "mine.txt, line 2: not UTF-8"),
])  # fmt: skip
def test_questions_of_ones_own_that_cannot_be_read(new_run, tmp_path, content, message):
    if content:
        (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        call("scripts/rehearse.py", "--run_dir", new_run, "--questions", tmp_path / "mine.txt")


def test_a_directory_that_is_not_there(tmp_path):
    result = shell("python", "scripts/rehearse.py", "--run_dir", tmp_path / "none")
    assert result.returncode == 2
    assert "make_sample_data.py" in result.stderr
    assert "Traceback" not in result.stderr


def test_rows_say_their_kind(drawn):
    assert {chat["kind"] for part in drawn for chat in part} == {"knowledge", "read", "computed", "reason"}
    assert all(json.dumps(chat) for part in drawn for chat in part)
