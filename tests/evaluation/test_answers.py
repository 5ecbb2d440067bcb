# SPDX-License-Identifier: Apache-2.0
"""Answers to held-out conversations: likelihood, figures that follow from the question, and bare labels."""

import dataclasses
import unicodedata

import pytest
import torch
from transformers import GenerationConfig

from conftest import form_of
from finteam_experts.evaluation.answers import (
    SCORES,
    answer_losses,
    first_label,
    greedy_answers,
    repeats_itself,
    score_answers,
    unsupported_by_chance,
    unsupported_figures,
    words,
)
from finteam_experts.models import load_model


def loaded(folder):
    return load_model(folder), form_of(folder)


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
    model, form = loaded(done_run / "dense-instruct")
    conversations = [([{"role": "user", "content": f"What {n}?"}], "Net sales rose " * (n + 1)) for n in range(3)]
    found = answer_losses(model, form, conversations)
    for (exchange,), loss in zip((form.exchanges([one]) for one in conversations), found, strict=True):
        ids = torch.tensor([exchange.prompt + exchange.scored])
        labels = ids.where(torch.arange(ids.shape[1]) >= len(exchange.prompt), -100)
        with torch.no_grad():
            assert loss == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-4)


def test_scores_are_means_with_standard_errors(done_run, monkeypatch):
    model, form = loaded(done_run / "base")
    written = ["Sales rose by 44.", "Positive.", "", "Sales rose to 99."]
    monkeypatch.setattr("finteam_experts.evaluation.answers.greedy_answers", lambda *_, **__: written)
    conversations = [([{"role": "user", "content": "Sales rose to 235 from 191."}], "Sales rose by 44.")] * 4
    scores = score_answers(model, form, {"micro": conversations}, ["positive", "negative"])["micro"]
    assert (scores["n"], scores["bare"], scores["unsupported"]) == (4, 0.5, 0.25)
    assert (scores["read"], scores["computed"], scores["repeats"]) == (None, 0.25, 0)  # 44 is in no question
    assert scores["words"] == (4 + 1 + 0 + 4) / 4
    assert scores["rouge_l"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)  # of four words, "Sales rose" is common
    assert scores["bare_stderr"] == pytest.approx(((4 * 0.25) / 3) ** 0.5 / 2)
    assert scores["nats_stderr"] == pytest.approx(0, abs=1e-6)


def test_figures_of_the_question_are_to_be_read_and_others_computed(done_run, monkeypatch):
    model, form = loaded(done_run / "base")
    written = ["Sales of 1,235 are above 191 by 1,044.", "To 1235 from 200, or 1044.", "They rose."]
    monkeypatch.setattr("finteam_experts.evaluation.answers.greedy_answers", lambda *_, **__: written)
    asked = [{"role": "user", "content": "Sales rose to 1,235 from 191."}]
    given = ["To 1,235 from 191, that is by 1,044.", "To 1,235 from 191.", "They rose."]
    scores = score_answers(model, form, {"micro": [(asked, one) for one in given]}, [])["micro"]
    assert scores["read"] == (2 / 2 + 1 / 2) / 2
    assert scores["computed"] == 1
    assert scores["computed_stderr"] == 0


def test_each_role_has_the_scores_of_its_own_answers(done_run):
    model, form = loaded(done_run / "dense-instruct")
    asked = {"macro": ["Rates rose.", "Prices fell by 2."], "micro": ["Sales rose to 235.", "No news.", "Costs fell."]}
    chats = {
        role: [([{"role": "user", "content": text}], f"{text} That is all.") for text in own]
        for role, own in asked.items()
    }
    together = score_answers(model, form, chats, [])
    assert list(together) == ["macro", "micro"]
    for role, own in chats.items():
        alone = score_answers(model, form, {role: own}, [])[role]
        assert together[role].pop("written") == alone.pop("written")
        assert together[role].pop("computed") is alone.pop("computed") is None  # every figure is in the question
        assert together[role] == pytest.approx(alone, rel=1e-4)
    assert score_answers(model, form, {}, []) == {}


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


GIVEN = {
    "Chinese": "利率上升会压低债券价格，因为新债券的票息更高。",
    "Japanese": "金利が上がると、債券の価格は0.5％下がります。",
    "Thai": "กำไรสุทธิเพิ่มขึ้นร้อยละ 12 ในไตรมาสนี้",
    "Russian": "Прибыль выросла на 3,5 %, потому что расходы снизились.",
    "Arabic": "ارتفعت الأرباح بنسبة ٣٫٥٪ بسبب انخفاض التكاليف.",
    "Hindi": "ब्याज दरें बढ़ने पर बॉन्ड की कीमतें गिरती हैं।",
    "Greek": "Τα κέρδη αυξήθηκαν.",
    "English": "Profit rose because costs fell, by 3.5 %.",
    "a symbol": "👍",
}


@pytest.mark.parametrize("language", GIVEN)
def test_the_given_answer_itself_scores_one_in_any_script(done_run, monkeypatch, language):
    model, form = loaded(done_run / "base")
    given = GIVEN[language]
    written = [given, unicodedata.normalize("NFD", given), "Something else."]
    monkeypatch.setattr("finteam_experts.evaluation.answers.greedy_answers", lambda *_, **__: written)
    monkeypatch.setattr("finteam_experts.evaluation.answers.answer_losses", lambda *_, **__: [1.0] * 3)
    scores = score_answers(model, form, {"micro": [([{"role": "user", "content": "?"}], given)] * 3}, [])["micro"]
    assert scores["rouge_l"] == pytest.approx(2 / 3, abs=0.05)
    assert len(words(given)) > 2 or language == "a symbol"
    assert not repeats_itself(given)
    assert repeats_itself(given * 3) == (language != "a symbol")


def test_characters_count_as_words_where_a_script_has_no_spaces(done_run, monkeypatch):
    model, form = loaded(done_run / "base")
    monkeypatch.setattr("finteam_experts.evaluation.answers.greedy_answers", lambda *_, **__: ["利率上升 3 %", "涨。"])
    chats = {"macro": [([{"role": "user", "content": "利率?"}], "涨")] * 2}
    scores = score_answers(model, form, chats, ["涨", "跌"])["macro"]
    assert scores["words"] == ((4 + 1 + 1) + 1) / 2
    assert scores["bare"] == 0.5


def test_figures_of_any_script():
    assert unsupported_figures("الأرباح ٢٣٥ بعد ١٩١", "بزيادة ٤٤ إلى ٢٣٥، لا ٤٥٫٥") == ["٤٥.٥"]
    assert unsupported_figures("利润从１９１升至２３５", "上升44，即23.0％") == []


def test_what_chance_supports():
    """Of the figures 0 to 99, those that are in the question or follow from two of its figures."""
    question, answer = "Eight: 3, 8, 14, 21, 34, 47, 65, 88.", "It is 50."
    supported = [n for n in range(100) if not unsupported_figures(question, str(n).zfill(2))]
    assert unsupported_by_chance(question, answer) == pytest.approx(1 - len(supported) / 100, abs=1e-9)
    assert unsupported_by_chance(question, answer) < 0.5  # most two-digit figures pass
    assert unsupported_by_chance(question, "It is 50 or 60.") == pytest.approx(
        1 - (1 - unsupported_by_chance(question, answer)) ** 2
    )
    assert unsupported_by_chance("No figure.", "It is 7.") == 1
    assert unsupported_by_chance(question, "No figure.") == 0
    assert "unsupported_by_chance" in SCORES


def test_a_label_in_an_answer_of_another_script():
    assert first_label("答案是Yes。", ("No", "Yes")) == "Yes"
    assert first_label("会上涨的", ("涨", "跌")) == "涨"
    assert first_label("Переростком, но рост.", ("спад", "рост")) == "рост"
    assert first_label("подрост", ("спад", "рост")) is None
    assert first_label(unicodedata.normalize("NFD", "Fällt"), ("steigt", "fällt")) == "fällt"
    assert first_label("BBB", ("BB", "BBB")) == "BBB" and first_label("BB", ("BB", "BBB")) == "BB"
    assert first_label("A-", ("A", "A-")) == "A-" and first_label("buy more", ("buy", "buy more")) == "buy more"
    assert first_label("1/10", ("1", "1/10", "10")) == "1/10"


SETTINGS = {
    "repetition_penalty": 5.0, "num_beams": 3, "no_repeat_ngram_size": 1, "min_new_tokens": 6, "max_length": 4,
    "suppress_tokens": [30, 31, 32], "forced_eos_token_id": 5, "begin_suppress_tokens": list(range(3, 400)),
    "do_sample": True, "temperature": 5.0, "eos_token_id": 7, "bad_words_ids": [[n] for n in range(3, 300)],
    "sequence_bias": [[[40], 50.0]], "exponential_decay_length_penalty": [1, 3.0], "renormalize_logits": True,
}  # fmt: skip


def test_written_answers_do_not_depend_on_the_models_generation_config(done_run):
    model, form = loaded(done_run / "moe-instruct")
    prompts = ["Why do prices rise?", "Net sales rose.", "Who pays?"]
    expected = greedy_answers(model, form, prompts, max_new_tokens=12)
    for name, value in SETTINGS.items():
        model.generation_config = changed = GenerationConfig(eos_token_id=2)
        setattr(changed, name, value)
        assert greedy_answers(model, form, prompts, max_new_tokens=12) == expected, name
        assert model.generation_config is changed


def test_an_answer_stops_at_the_token_that_ends_it_in_training_and_at_the_tokenizers_own(done_run):
    model, form = loaded(done_run / "moe-instruct")
    [ids] = form.prompts(["Why do prices rise?"])
    [whole] = greedy_answers(model, form, ["Why do prices rise?"], max_new_tokens=12)
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    stopped = dataclasses.replace(form, stop_id=first)
    assert greedy_answers(model, stopped, ["Why do prices rise?"], max_new_tokens=12)[0] == form.tokenizer.decode(
        [first]
    )
    assert whole.startswith(form.tokenizer.decode([first])) and len(whole) > 1
