# SPDX-License-Identifier: Apache-2.0
"""One way from a conversation to tokens: with every kind of chat template, training, scoring and answers use the same."""

import json
import shutil

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from conftest import call, form_of, instruct_tune, load_script
from finteam_experts.chats import TEMPLATE_SETTINGS, ChatFormat, chat_format
from finteam_experts.data.files import task_file, write_rows
from finteam_experts.data.tasks import SYSTEM_PROMPT, default_tasks, render, render_all
from finteam_experts.errors import InputError
from finteam_experts.evaluation.labels import LabelScoringLM, first_label, greedy_answers
from finteam_experts.models import load_model, load_tokenizer, read_config
from templates import BROKEN, SYSTEM_TURN, TEMPLATES

TASKS = default_tasks()

MEMORISE = ("--max_steps", 150, "--learning_rate", "2e-2", "--lora_r", 16, "--save_steps", 1000)
QUESTION = "Sales rose.\n\nIs that good? Answer No or Yes."


@pytest.fixture
def with_template(toy_base, tmp_path):
    """A copy of the toy base with another chat template."""

    def make(template):
        folder = shutil.copytree(toy_base, tmp_path / "base", dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_answer_and_end(with_template, name):
    folder = with_template(TEMPLATES[name])
    form = form_of(folder)
    assert form.system_turn == (name in SYSTEM_TURN)
    [exchange] = form.exchanges([(QUESTION, "Yes")])
    [prompt] = form.prompts([QUESTION])
    assert exchange.prompt == prompt
    tokenizer = form.tokenizer
    text = tokenizer.decode(prompt)
    assert text.count(SYSTEM_PROMPT) == text.count(QUESTION) == 1
    assert tokenizer.decode(exchange.answer).strip().endswith("Yes")
    assert "Yes" not in tokenizer.decode(exchange.end)
    assert exchange.labels == [-100] * len(prompt) + exchange.answer + exchange.end
    # what transformers writes for the answered conversation, with the settings that the package gives
    chat = [*form.messages(QUESTION), {"role": "assistant", "content": "Yes"}]
    whole = tokenizer.apply_chat_template(chat, chat_template=form.template, **TEMPLATE_SETTINGS)["input_ids"]
    assert exchange.ids == whole
    assert (form.template == TEMPLATES[name]) == (name not in ("smollm3", "llama-3.1"))  # which ask for the date
    bos = tokenizer.bos_token_id
    assert exchange.ids[:2] != [bos, bos]
    assert "think>" not in tokenizer.decode(exchange.ids).replace("<think>\n\n</think>", "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_scoring_and_answers_use_the_same_tokens(with_template, toy_data, name):
    """The rows that the recipe trains on, the requests that the evaluation scores, and the prompts that are answered."""
    folder = with_template(TEMPLATES[name])
    form = form_of(folder)
    script = load_script("recipes/instruct_tune.py")
    args = SFTConfig(output_dir="x", use_cpu=True, bf16=False, report_to="none", max_length=None)
    rows = script.tuning_dataset(
        script.TuneArguments(data_dir=str(toy_data), rows_per_task=2), TASKS, args, form, [], read_config(folder)
    )
    assert len(rows) == 8
    scored = []

    class Recorded(LabelScoringLM):
        def _loglikelihood_tokens(self, requests, **_):
            scored.append(requests)

    lm = Recorded(pretrained=AutoModelForCausalLM.from_pretrained(folder), form=form)
    for row in rows:
        answered = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        prompt = row["input_ids"][: len(row["input_ids"]) - len(answered)]
        text = form.tokenizer.decode(prompt)
        label = next(
            label for task in TASKS.values() for label in task.labels if label in form.tokenizer.decode(answered)
        )
        asked = text[text.index(SYSTEM_PROMPT) :]
        assert "Answer " in asked  # question and labels are in the prompt, not in what the loss reads
        assert not any(word in form.tokenizer.decode(answered) for word in ("Answer", "financial"))
    for task in TASKS.values():
        prompt = render(task, {"text": "Net sales rose."}, form.tokenizer)
        for label in task.labels:
            [exchange] = form.exchanges([(prompt, label)])
            asked = lm.apply_chat_template([{"role": "system", "content": "x"}, {"role": "user", "content": prompt}])
            lm.loglikelihood([Instance("loglikelihood", {}, (asked, label), 0, ("", 0, 1))])
            [(_, context, target)] = scored.pop()
            assert (context, target) == (exchange.prompt, exchange.answer)
            assert context == form.prompts([prompt])[0]


@pytest.mark.parametrize("name", ["mistral-v0.1", "llama-2", "qwen3", "mistral-v0.3"])
def test_a_score_is_the_log_likelihood_of_what_is_trained(with_template, name):
    """Recomputed by a plain forward pass over the conversation that transformers writes."""
    folder = with_template(TEMPLATES[name])
    form, model = form_of(folder), load_model(folder)
    lm = LabelScoringLM(pretrained=model, form=form)
    requests = [Instance("loglikelihood", {}, (QUESTION, label), 0, ("", 0, 1)) for label in ("No", "Yes")]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for (score, _), label in zip(found, ("No", "Yes"), strict=True):
        [exchange] = form.exchanges([(QUESTION, label)])
        ids = torch.tensor([exchange.prompt + exchange.answer])
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        start = len(exchange.prompt)
        expected = sum(log_probs[start + place - 1, token] for place, token in enumerate(exchange.answer))
        assert score == pytest.approx(expected.item(), abs=1e-4)


def test_the_date_of_a_prompt_does_not_change(with_template, monkeypatch):
    form = form_of(with_template(TEMPLATES["smollm3"]))
    assert "Today Date: 26 July 2024" in form.tokenizer.decode(form.prompts(["Why?"])[0])


@pytest.mark.parametrize("case", BROKEN)
def test_a_template_that_cannot_be_used_is_named_before_any_training(with_template, toy_data, tmp_path, case):
    template, message = BROKEN[case]
    folder = with_template(template)
    with pytest.raises(InputError, match=rf"base: its chat template can't be used: (?s:.*)({message})"):
        load_tokenizer(folder)
    with pytest.raises(InputError, match="chat template can't be used"):
        call("recipes/train_expert.py", "--config", "recipes/sample/train_expert.yaml", "--run_dir", tmp_path, "--role", "macro",
             "--data_dir", toy_data)  # fmt: skip
    assert not (tmp_path / "adapters").exists()


def test_a_named_list_of_templates_needs_a_default(toy_base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    tokenizer.chat_template = {"tool_use": TEMPLATES["chatml"], "rag": TEMPLATES["chatml"]}
    folder = shutil.copytree(toy_base, tmp_path / "named")
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"chat template can't be used: .*default"):
        load_tokenizer(folder)


def test_several_turns(toy_base):
    form: ChatFormat = chat_format(load_tokenizer(toy_base), SYSTEM_PROMPT)
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "C?"},
    ]
    [exchange] = form.exchanges([(turns, "d")])
    assert form.tokenizer.decode(exchange.ids).count("<|im_start|>") == 5
    assert form.prompts([turns]) == [exchange.prompt]
    assert form.exchanges([]) == form.prompts([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral-v0.3", "mistral-v0.1"])
def test_label_scores_and_written_answers_of_a_tuned_model_agree(new_run, name):
    """The toy learns a few rows by heart; it would not if it were trained on other tokens than it is asked with."""
    (new_run / "base/chat_template.jinja").write_text(TEMPLATES[name])
    rows = [
        {"text": f"Gold {word}.", "label": label} for word, label in (("rose", "Yes"), ("fell", "No"), ("sank", "No"))
    ]
    for split in ("train", "test"):
        path = task_file(new_run / "data", "headlines", split)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for other in set(TASKS) - {"headlines"}:
        for split in ("train", "test"):
            task_file(new_run / "data", other, split).unlink()
    with pytest.raises(InputError, match="the same text is in"):
        instruct_tune(new_run, "dense")
    write_rows(task_file(new_run / "data", "headlines", "test"), [{"text": "Oil was flat.", "label": "No"}] * 2)
    instruct_tune(new_run, "dense", *MEMORISE)
    folder = new_run / "dense-instruct"
    form, model = form_of(folder), load_model(folder)
    prompts = render_all(TASKS["headlines"], rows, form.tokenizer)
    written = [first_label(answer, ("No", "Yes")) for answer in greedy_answers(model, form, prompts)]
    assert written == [row["label"] for row in rows]
    lm = LabelScoringLM(pretrained=model, form=form)
    for prompt, row in zip(prompts, rows, strict=True):
        requests = [Instance("loglikelihood", {}, (prompt, label), 0, ("", 0, 1)) for label in ("No", "Yes")]
        scores = dict(zip(("No", "Yes"), lm.loglikelihood(requests, disable_tqdm=True), strict=True))
        best = max(scores, key=scores.get)
        assert (best, scores[best][1]) == (row["label"], True)  # the likeliest, token by token
