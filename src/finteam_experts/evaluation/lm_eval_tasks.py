# SPDX-License-Identifier: Apache-2.0
"""Tasks that lm-eval knows, scored by lm-eval itself, in the chat format that the models are trained in."""

import hashlib
import json
from pathlib import Path

import lm_eval
from accelerate import PartialState
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from finteam_experts.chats import TEMPLATE_SETTINGS
from finteam_experts.data.tasks import SYSTEM_PROMPT
from finteam_experts.errors import InputError, nearest
from finteam_experts.evaluation.answers import greedy_settings
from finteam_experts.files import file_hash
from finteam_experts.models import as_chats, load_tokenizer
from finteam_experts.scoring import float_head

BATCH = 16  # rows at once
# Where a template has no system turn, its text opens the first user turn, as `ChatFormat` writes it.
_SYSTEM_IN_USER_TURN = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set messages = [{'role': 'user', 'content': messages[0]['content'] ~ '\\n\\n' "
    "~ messages[1]['content']}] + messages[2:] -%}{%- endif -%}"
)


def task_manager(names: list[str], path: Path | None) -> TaskManager:
    """lm-eval's manager of the tasks that it knows and of those in `path`; `InputError` if one of `names` is none of them."""
    manager = TaskManager(include_path=path and str(path))
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(f"--lm_eval_tasks {name}: lm-eval has no such task.{nearest(name, manager.all_tasks)}")
    return manager


def what_is_read(manager: TaskManager, names: list[str], path: Path | None) -> dict[str, str]:
    """A hash of the settings and rows of every task, wherever they come from, and of every file of code or YAML in `path`."""
    found = {}
    for name, task in manager.load(names)["tasks"].items():
        rows = [list(task.eval_docs), list(task.fewshot_docs()) if task.config.num_fewshot else []]
        text = json.dumps([task.dump_config(), rows], sort_keys=True, default=lambda value: type(value).__name__)
        found[name] = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    files = sorted(file for file in path.rglob("*") if file.suffix in (".yaml", ".yml", ".py")) if path else ()
    return found | {str(file.relative_to(path)): file_hash(file) for file in files}


def run_tasks(folder: Path, manager: TaskManager, names: list[str], limit: int | None) -> dict[str, dict[str, float]]:
    """lm-eval's scores of the model in `folder`, by task and metric."""
    form = as_chats(load_tokenizer(folder), folder)
    form.tokenizer.chat_template = ("" if form.system_turn else _SYSTEM_IN_USER_TURN) + form.template
    lm = HFLM(
        pretrained=str(folder), tokenizer=form.tokenizer, batch_size=BATCH, device=str(PartialState().device),
        chat_template_args=TEMPLATE_SETTINGS,
    )  # fmt: skip
    lm.model.generation_config = greedy_settings(form)  # only what the task says, not the base's penalties
    with float_head(lm.model):
        output = lm_eval.simple_evaluate(
            lm, tasks=names, task_manager=manager, limit=limit, apply_chat_template=True,
            system_instruction=SYSTEM_PROMPT, bootstrap_iters=100,
        )  # fmt: skip
    return {
        name: {key: value for key, value in result.items() if isinstance(value, float) and "," in key}
        for name, result in output["results"].items()
    }
