# SPDX-License-Identifier: Apache-2.0
"""Answers to held-out conversations: likelihood, figures that follow from the question, and bare labels."""

import pytest
import torch

from conftest import form_of
from finteam_experts.evaluation.answers import answer_losses, repeats_itself, score_answers, unsupported_figures
from finteam_experts.evaluation.labels import LabelScoringLM
from finteam_experts.models import load_model


def scorer(folder):
    return LabelScoringLM(pretrained=load_model(folder), form=form_of(folder))


@pytest.mark.parametrize(
    ("question", "answer", "unsupported"),
    [
        ("Sales rose to 235 from 191.", "Sales rose by 44, or 23.0 %, to 235.", []),
        ("2,515 and 1,310", "The average is 1,912.5, the sum 3,825.", []),
        ("10 of 40", "That is 25 % or 0.25.", []),
        ("Rates are 5.25 %.", "Rates are at 5.25 % and will reach 6.1 %.", ["6.1"]),
        ("No figure.", "It was 7.", ["7"]),
        ("A is 3 and B is 0.", "A over B is not defined, A is 3.", []),
        ("Sales of 1,234,567", "About 1,234,567", []),
    ],
)
def test_figures_that_do_not_follow(question, answer, unsupported):
    assert unsupported_figures(question, answer) == unsupported


def test_nats_per_token_of_an_answer(done_run):
    lm = scorer(done_run / "dense-instruct")
    conversations = [([{"role": "user", "content": f"What {n}?"}], "Net sales rose " * (n + 1)) for n in range(3)]
    found = answer_losses(lm, conversations)
    for (exchange,), loss in zip((lm.form.exchanges([one]) for one in conversations), found, strict=True):
        ids, labels = torch.tensor([exchange.ids]), torch.tensor([exchange.labels])
        with torch.no_grad():
            assert loss == pytest.approx(lm.model(ids, labels=labels).loss.item(), rel=1e-4)


def test_scores_are_means_with_standard_errors(done_run, monkeypatch):
    lm = scorer(done_run / "base")
    written = ["Sales rose by 44.", "Positive.", "", "Sales rose to 99."]
    monkeypatch.setattr("finteam_experts.evaluation.answers.greedy_answers", lambda *_, **__: written)
    conversations = [([{"role": "user", "content": "Sales rose to 235 from 191."}], "Sales rose by 44.")] * 4
    scores = score_answers(lm, {"micro": conversations}, ["positive", "negative"])["micro"]
    assert (scores["n"], scores["bare"], scores["unsupported"]) == (4, 0.5, 0.25)
    assert (scores["read"], scores["computed"], scores["repeats"]) == (None, 0.25, 0)  # 44 is in no question
    assert scores["words"] == (4 + 1 + 0 + 4) / 4
    assert scores["rouge_l"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)  # of four words, "Sales rose" is common
    assert scores["bare_stderr"] == pytest.approx(((4 * 0.25) / 3) ** 0.5 / 2)
    assert scores["nats_stderr"] == pytest.approx(0, abs=1e-6)


def test_figures_of_the_question_are_to_be_read_and_others_computed(done_run, monkeypatch):
    lm = scorer(done_run / "base")
    written = ["Sales of 1,235 are above 191 by 1,044.", "To 1235 from 200, or 1044.", "They rose."]
    monkeypatch.setattr("finteam_experts.evaluation.answers.greedy_answers", lambda *_, **__: written)
    asked = [{"role": "user", "content": "Sales rose to 1,235 from 191."}]
    given = ["To 1,235 from 191, that is by 1,044.", "To 1,235 from 191.", "They rose."]
    scores = score_answers(lm, {"micro": [(asked, one) for one in given]}, [])["micro"]
    assert scores["read"] == (2 / 2 + 1 / 2) / 2
    assert scores["computed"] == 1
    assert scores["computed_stderr"] == 0


def test_each_role_has_the_scores_of_its_own_answers(done_run):
    lm = scorer(done_run / "dense-instruct")
    asked = {"macro": ["Rates rose.", "Prices fell by 2."], "micro": ["Sales rose to 235.", "No news.", "Costs fell."]}
    chats = {
        role: [([{"role": "user", "content": text}], f"{text} That is all.") for text in own]
        for role, own in asked.items()
    }
    together = score_answers(lm, chats, [])
    assert list(together) == ["macro", "micro"]
    for role, own in chats.items():
        alone = score_answers(lm, {role: own}, [])[role]
        assert together[role].pop("written") == alone.pop("written")
        assert together[role].pop("computed") is alone.pop("computed") is None  # every figure is in the question
        assert together[role] == pytest.approx(alone, rel=1e-4)
    assert score_answers(lm, {}, []) == {}


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        ("A beta above one moves more than the market.", False),
        ("The share rose by 3 percent. The index rose by 2 percent.", False),
        ("It moves more than the market. It moves more than the market does.", True),
        ("up up up up up up up", True),
        ("", False),
    ],
)
def test_an_answer_that_repeats_itself(answer, repeats):
    assert repeats_itself(answer) == repeats
