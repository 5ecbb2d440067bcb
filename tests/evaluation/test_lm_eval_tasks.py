# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own tasks: asked as the model was tuned, and recorded by all that is read for them."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from conftest import call, form_of
from finteam_experts.data.files import write_rows
from finteam_experts.data.tasks import SYSTEM_PROMPT
from finteam_experts.errors import InputError
from finteam_experts.evaluation import lm_eval_tasks
from finteam_experts.models import load_model
from finteam_experts.scoring import stop_ids
from templates import TEMPLATES, with_template

QUESTION = "Sales rose.\n\nIs that good? Answer No or Yes."


@pytest.mark.parametrize("name", TEMPLATES)
def test_they_are_asked_in_the_chat_format_of_training(toy_base, tmp_path, monkeypatch, name):
    """Without a template's thinking, on the date of the training, and with the system prompt where the template can't have one."""
    folder = shutil.copytree(toy_base, tmp_path / "base")
    tokenizer = with_template(AutoTokenizer.from_pretrained(folder), TEMPLATES[name], "<|im_end|>", "<|im_start|>")
    tokenizer.save_pretrained(folder)
    model = load_model(folder)
    model.resize_token_embeddings(max(len(tokenizer), 500))
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 2.0, "eos_token_id": 7}))
    used = []
    monkeypatch.setattr(lm_eval_tasks.lm_eval, "simple_evaluate", lambda lm, **_: used.append(lm) or {"results": {}})
    lm_eval_tasks.run_tasks(folder, None, [], None)
    [lm], form = used, form_of(folder)
    asked = lm.apply_chat_template(
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": QUESTION}]
    )
    assert lm.tok_encode(asked, add_special_tokens=False) == form.prompts([QUESTION])[0]
    assert lm.model.generation_config.repetition_penalty is None
    assert lm.model.generation_config.eos_token_id == stop_ids(form)


def test_their_logits_are_fp32(toy_base, tmp_path, monkeypatch):
    load_model(toy_base, torch.bfloat16).save_pretrained(folder := shutil.copytree(toy_base, tmp_path / "base"))
    found = []

    def evaluated(lm, **_):
        found.append(lm.model(torch.tensor([[1, 5, 9]])).logits)
        return {"results": {}}

    monkeypatch.setattr(lm_eval_tasks.lm_eval, "simple_evaluate", evaluated)
    lm_eval_tasks.run_tasks(folder, None, [], None)
    assert found[0].dtype == torch.float32
    assert len(set(found[0][0, -1].tolist())) == 500  # in bfloat16 many would be equal


def write_local_task(folder, rows, choices):
    write_rows(folder / "rows.jsonl", [{"q": f"Up {n}?", "a": "Yes"} for n in range(rows)])
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks/local.yaml").write_text(yaml.safe_dump({
        "task": "local_finance", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "q", "doc_to_choice": choices,
        "doc_to_target": "a", "metric_list": [{"metric": "acc"}],
    }))  # fmt: skip


def test_rows_and_choices_that_change_are_other_inputs(copied_run, tmp_path, capsys):
    write_local_task(tmp_path, 6, ["No", "Yes"])
    common = ("--run_dir", copied_run, "--models", "base", "--limit", 4, "--lm_eval_path", tmp_path / "tasks", "--name", "more",
              "--chats", 0, "--tasks", "fpb")  # fmt: skip
    with pytest.raises(
        InputError, match="--lm_eval_tasks local_finanse: lm-eval has no such task. Did you mean 'local_finance'"
    ):
        call("scripts/evaluate.py", *common, "--lm_eval_tasks", "local_finanse")
    common += ("--lm_eval_tasks", "local_finance")
    call("scripts/evaluate.py", *common)
    scores = json.loads((copied_run / "reports/more.json").read_text())["models"]["base"]["lm_eval"]["local_finance"]
    assert 0 <= scores["acc,none"] <= 1
    assert "base, local_finance: acc,none" in capsys.readouterr().out
    call("scripts/evaluate.py", *common)
    assert "more.json is complete: skipped" in capsys.readouterr().out
    write_local_task(tmp_path, 7, ["No", "Yes"])
    with pytest.raises(InputError, match="lm_eval_tasks.local_finance: recorded"):
        call("scripts/evaluate.py", *common)
    write_local_task(tmp_path, 6, ["Yes", "No"])
    with pytest.raises(InputError, match="lm_eval_tasks.local.yaml: recorded"):
        call("scripts/evaluate.py", *common)
    write_local_task(tmp_path, 6, ["No", "Yes"])
    (tmp_path / "tasks/utils.py").write_text("def docs(rows): return rows\n")
    with pytest.raises(InputError, match="lm_eval_tasks.utils.py: recorded unset"):
        call("scripts/evaluate.py", *common)
