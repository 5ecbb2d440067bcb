# SPDX-License-Identifier: Apache-2.0
"""One way from a conversation to tokens: with every kind of chat template, training, scoring and answers use the same."""

import json
import math
import shutil

import pytest
import torch
from gguf import SpecialVocab
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedTokenizerFast

from conftest import ROLES, call, form_of, instruct_tune, train_expert
from finteam_experts.chats import TEMPLATE_SETTINGS, ChatFormat, TemplateError, chat_format
from finteam_experts.data.files import task_file, write_rows
from finteam_experts.data.tasks import SYSTEM_PROMPT, default_tasks, render_all
from finteam_experts.errors import InputError
from finteam_experts.evaluation.answers import first_label, greedy_answers
from finteam_experts.evaluation.heldout import answer_scores
from finteam_experts.merging.moe import finish_folder
from finteam_experts.models import check_base, load_model, load_tokenizer, read_config
from templates import BROKEN, SPECIAL, SYSTEM_TURN, TEMPLATES, TRL, WELL_KNOWN, alike, with_template

TASKS = default_tasks()


def save_model(model, source, target):
    model.save_pretrained(target)
    finish_folder(model.config, source, target)


MEMORISE = ("--max_steps", 150, "--learning_rate", "2e-2", "--lora_r", 16, "--save_steps", 1000)
QUESTION = "Sales rose.\n\nIs that good? Answer No or Yes."


@pytest.fixture
def base_with(toy_base, tmp_path):
    """A copy of the toy base with another chat template, and a tokenizer that knows its special tokens."""

    def make(template, eos="<|im_end|>", bos="<|im_start|>", *, special=True):
        folder = shutil.copytree(toy_base, tmp_path / "base", dirs_exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not special:
            tokenizer.add_tokens(sorted(set(SPECIAL.findall(template)) - {eos, bos}))
        tokenizer = with_template(tokenizer, template, eos, bos, special=special)
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(max(len(tokenizer), 500))
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(params=["bytes", "metaspace", "llama"])
def tokenizer(request, toy_base):
    """The toy's tokenizer, one that marks spaces as SentencePiece does, and one that also begins each text with a space."""
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    if request.param == "bytes":
        return tokenizer
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if request.param == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *(f"<0x{n:02X}>" for n in range(256))],
                                  show_progress=False)  # fmt: skip
    made.train_from_iterator([*f"{QUESTION} {SYSTEM_PROMPT} positive".split(), *"AB<|>:#[]{}()\n-1/"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


ASKED = [
    {"role": "user", "content": "A?"},
    {"role": "assistant", "content": "Yes\n"},
    {"role": "user", "content": QUESTION},
]
ANSWERED = [
    *((QUESTION, answer) for answer in ("No", "A", "USER", "I", "ASSISTANT A\n\n1", " \n Yes\n\n", QUESTION, "assistant")),
    (ASKED, "Yes"),
    ([{"role": "system", "content": "Be brief."}, *ASKED], "  - Yes\n  - No "),
]  # fmt: skip


def check_exchanges(form, conversations):
    """What is trained begins after the prompt that is answered, has the answer, and ends with what generation stops at."""
    tokenizer = form.tokenizer
    for (turns, answer), exchange in zip(conversations, form.exchanges(conversations), strict=True):
        chat = form.messages(turns)
        asked = tokenizer.apply_chat_template(
            chat, chat_template=form.template, tokenize=False, add_generation_prompt=True, **TEMPLATE_SETTINGS
        )
        assert exchange.prompt == tokenizer(asked, add_special_tokens=False)["input_ids"] == form.prompts([turns])[0]
        said = [*chat, {"role": "assistant", "content": answer.strip()}]
        whole = tokenizer.apply_chat_template(said, chat_template=form.template, **TEMPLATE_SETTINGS)["input_ids"]
        assert exchange.ids == whole
        trained = [label for label in exchange.labels if label != -100]
        assert trained == exchange.scored == whole[len(exchange.prompt) :][: len(trained)]
        assert trained[-1] == form.stop_id
        assert form.stop_id not in trained[:-1]
        told = tokenizer.decode([id for id, span in zip(exchange.ids, exchange.spans, strict=True) if span == 2])
        assert told.strip() == answer.strip()
        told = tokenizer.decode([id for id, span in zip(exchange.ids, exchange.spans, strict=True) if span == 1])
        assert told.strip() == "Is that good? Answer No or Yes."
        assert exchange.ids[:2] != [tokenizer.bos_token_id] * 2


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_training_ends_with_what_generation_stops_at(tokenizer, name):
    template, eos, stop = WELL_KNOWN[name]
    tokenizer = with_template(tokenizer, template, eos)
    if stop is None:
        with pytest.raises(TemplateError, match="no token that generation could stop at"):
            chat_format(tokenizer, SYSTEM_PROMPT)
        return
    form = chat_format(tokenizer, SYSTEM_PROMPT)
    assert tokenizer.convert_ids_to_tokens(form.stop_id) == stop
    check_exchanges(form, ANSWERED)


REFUSED = {
    "deepseek": "'' in place of '<think>",
    "glm4moe": "no token that generation could stop at",
    "idefics3": "changes the answer",
    "smolvlm": "changes the answer",
    "llava": "no attribute 'text'",
}


@pytest.mark.parametrize("name", TRL)
def test_trls_templates(toy_base, name):
    tokenizer = with_template(AutoTokenizer.from_pretrained(toy_base), TRL[name], "</s>")
    problem = next((REFUSED[start] for start in REFUSED if name.startswith(start)), None)
    if problem and name != "glm4moe_training":
        with pytest.raises(TemplateError, match=problem):
            chat_format(tokenizer, SYSTEM_PROMPT)
    else:
        check_exchanges(chat_format(tokenizer, SYSTEM_PROMPT), ANSWERED)


@pytest.mark.parametrize("name", TEMPLATES)
def test_where_the_system_prompt_goes(base_with, name):
    form = form_of(base_with(TEMPLATES[name]))
    assert form.system_turn == (name in SYSTEM_TURN)
    assert (form.template == TEMPLATES[name]) == (name not in ("smollm3", "llama-3.1"))  # which ask for the date
    check_exchanges(form, ANSWERED)
    text = form.tokenizer.decode(form.prompts([QUESTION])[0])
    assert text.count(SYSTEM_PROMPT) == text.count(QUESTION) == 1
    assert "think>" not in text.replace("<think>\n\n</think>", "")


@pytest.mark.parametrize("name", ["mistral-v0.1", "llama-2", "qwen3", "mistral-v0.3"])
def test_a_score_is_the_log_likelihood_of_what_is_trained(base_with, name):
    """Recomputed by a plain forward pass over the conversation that transformers writes."""
    folder = base_with(TEMPLATES[name])
    form, model = form_of(folder), load_model(folder)
    exchanges = form.exchanges([(QUESTION, "No"), (QUESTION, "Yes")])
    for (score, _), exchange in zip(answer_scores(model, exchanges), exchanges, strict=True):
        ids = torch.tensor([exchange.prompt + exchange.scored])
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        start = len(exchange.prompt)
        expected = sum(log_probs[start + place - 1, token] for place, token in enumerate(exchange.scored))
        assert score == pytest.approx(expected.item(), abs=1e-4)


def test_the_date_of_a_prompt_does_not_change(base_with, monkeypatch):
    form = form_of(base_with(TEMPLATES["smollm3"]))
    assert "Today Date: 26 July 2024" in form.tokenizer.decode(form.prompts(["Why?"])[0])


@pytest.mark.parametrize("case", BROKEN)
def test_a_template_that_cannot_be_used_is_named_before_any_training(base_with, toy_data, tmp_path, case):
    template, message = BROKEN[case]
    folder = base_with(template)
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


class Writes(LogitsProcessor):
    """Lets a model write these tokens, whatever it would write."""

    def __init__(self, ids, start):
        self.ids, self.start = ids, start

    def __call__(self, input_ids, scores):
        wanted = self.ids[min(input_ids.shape[1] - self.start, len(self.ids) - 1)]
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([wanted]), 0.0)


ANOTHER_EOS = alike("<|im_start|>ROLE\nX<|stop|>\n")  # of a base whose tokenizer ends texts with <|im_end|>


@pytest.mark.parametrize(
    "generation", [{}, {"eos_token_id": None}, {"eos_token_id": 2}, {"eos_token_id": [7, 2], "top_p": 0.9}, None]
)
@pytest.mark.parametrize("special", [True, False])
def test_what_is_derived_from_a_base_stops_where_an_answer_ends(base_with, tmp_path, generation, special):
    base = base_with(ANOTHER_EOS, special=special)
    path = base / "generation_config.json"
    path.unlink() if generation is None else path.write_text(json.dumps(generation))
    model, target = load_model(base), tmp_path / "tuned"
    save_model(model, base, target)
    form, tokenizer = form_of(target), AutoTokenizer.from_pretrained(target)
    given = (generation or {}).get("eos_token_id") or []
    ends = json.loads((target / "generation_config.json").read_text())
    assert ends["eos_token_id"] == list(
        dict.fromkeys([form.stop_id, 2, *(given if isinstance(given, list) else [given])])
    )
    assert ends.get("top_p") == (generation or {}).get("top_p")
    assert read_config(target).eos_token_id == form.stop_id != 2
    assert SpecialVocab(target).special_token_ids["eos"] == form.stop_id  # what llama.cpp's converter reads
    # the README's snippet
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True,
                                           return_tensors="pt")  # fmt: skip
    start = inputs["input_ids"].shape[1]
    (exchange,) = form.exchanges([(QUESTION, "Yes")])
    written = AutoModelForCausalLM.from_pretrained(target).generate(
        **inputs, max_new_tokens=20, do_sample=False, logits_processor=[Writes(exchange.scored, start)]
    )[0, start:]
    assert written.tolist() == exchange.scored
    assert tokenizer.decode(written, skip_special_tokens=True) == "Yes"
    assert form.exchanges(ANSWERED) == form_of(base).exchanges(ANSWERED)
    # what is derived from that has the same files
    save_model(model, target, tmp_path / "again")
    for name in ("generation_config.json", "config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (target / name).read_bytes()


def test_a_base_that_stops_there_already_keeps_its_files(toy_base, tmp_path):
    save_model(load_model(toy_base), toy_base, tmp_path / "tuned")
    assert (tmp_path / "tuned/generation_config.json").read_bytes() == (
        toy_base / "generation_config.json"
    ).read_bytes()
    assert form_of(tmp_path / "tuned").tokenizer.eos_token == "<|im_end|>"


def test_a_template_that_writes_the_eos_token_elsewhere_keeps_it(base_with, tmp_path):
    base = base_with(ANOTHER_EOS + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    save_model(load_model(base), base, tmp_path / "tuned")
    form = form_of(tmp_path / "tuned")
    assert form.tokenizer.eos_token == "<|im_end|>"
    assert form.exchanges(ANSWERED) == form_of(base).exchanges(ANSWERED)
    ends = json.loads((tmp_path / "tuned/generation_config.json").read_text())["eos_token_id"]
    assert ends == [form.stop_id, 2]


@pytest.mark.parametrize("value", ["</s>", -1, 501, True, 2.0, [2, None], [[2]], {"a": 2}])
def test_an_eos_that_is_no_token_is_named_before_any_training(base_with, value):
    base = base_with(TEMPLATES["chatml"])
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        InputError, match=r"generation_config.json: eos_token_id is .*; it is the number of a token below 501"
    ):
        check_base(base)


def test_the_merged_team_and_its_experts_stop_where_an_answer_ends(base_with, toy_data, tmp_path):
    shutil.copytree(base_with(ANOTHER_EOS), tmp_path / "run/base")
    shutil.copytree(toy_data, tmp_path / "run/data")
    for role in ROLES:
        train_expert(tmp_path / "run", role)
    call("scripts/merge_moe.py", "--run_dir", tmp_path / "run")
    instruct_tune(tmp_path / "run", "moe")
    for folder in ("experts/macro", "moe", "moe-instruct"):
        ends = json.loads((tmp_path / "run" / folder / "generation_config.json").read_text())["eos_token_id"]
        assert form_of(tmp_path / "run" / folder).stop_id in ends


def test_a_conversation_is_rendered_once_with_and_once_without_its_answer(toy_base, monkeypatch):
    form, rendered, render = form_of(toy_base), [], ChatFormat._render

    def recorded(*about):
        rendered.append(about)
        return render(*about)

    monkeypatch.setattr(ChatFormat, "_render", recorded)
    rows = [(f"Is {n} much?", label) for n in range(1500) for label in ("No", "Yes")]
    exchanges = form.exchanges(iter(rows))
    assert len(rendered) == 2 * len(rows)  # the prompt and the answered prompt, each once
    assert [form.tokenizer.decode(exchange.answer) for exchange in exchanges] == [label for _, label in rows]


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
    for prompt, row in zip(prompts, rows, strict=True):
        exchanges = form.exchanges([(prompt, label) for label in ("No", "Yes")])
        scores = dict(zip(("No", "Yes"), answer_scores(model, exchanges), strict=True))
        best = max(scores, key=scores.get)
        assert (best, scores[best][1]) == (row["label"], True)  # the likeliest, token by token
