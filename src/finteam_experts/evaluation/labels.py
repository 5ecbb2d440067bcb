# SPDX-License-Identifier: Apache-2.0
"""Scoring the labels of classification prompts: by log-likelihood, as a language model for lm-eval, or in an answer."""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from finteam_experts.chats import ChatFormat, Turns
from finteam_experts.data.files import Row
from finteam_experts.data.tasks import SYSTEM_PROMPT, Tasks
from finteam_experts.errors import InputError, NotFiniteError, nearest
from finteam_experts.evaluation.batches import padded_batches

WRITTEN_BATCH = 8192  # tokens of prompts that are answered at once: each step of generation reads all weights
OTHER_BATCH = 16  # rows at once of tasks that are lm-eval's own
# it warns of every model that it did not load itself
logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
Request = tuple[tuple[str, str], list[int], list[int]]  # (texts, context tokens, continuation tokens)


class LabelScoringLM(HFLM):
    """lm-eval's `HFLM` that encodes the prompt of a row once for all of its labels (benchmarks/evaluation.py measures both).

    One forward pass gives the log-likelihood of every label that agrees with it up to the label's last token, and the
    vocabulary head runs on the label's positions only. Batches hold rows of similar length, `batch_tokens` tokens each.
    With `bf16` all but the head computes in bfloat16; the head does not, since bfloat16 logits of two labels are often equal.

    The tokens of prompt and label are those of the training, from `form`; lm-eval would concatenate the rendered prompt and
    the label as text.
    """

    def __init__(self, *args, form: ChatFormat, batch_tokens: int = 2048, bf16: bool = False, **kwargs) -> None:
        super().__init__(*args, tokenizer=form.tokenizer, **kwargs)
        self.form = form
        self.batch_tokens = batch_tokens
        self.bf16 = bf16

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The question alone: `loglikelihood` makes a conversation of it."""
        return chat_history[-1]["content"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each request's label as the answer to its question, and whether it is what would be written."""
        pairs = [request.args for request in requests]
        exchanges = self.form.exchanges(pairs)
        encoded = [(pair, e.prompt, e.answer) for pair, e in zip(pairs, exchanges, strict=True)]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool] | None] = [None] * len(requests)
        passes = sorted(_passes(requests), key=lambda p: -len(p[0]))
        with tqdm(total=len(requests), desc="scores", disable=disable_tqdm or self.rank != 0) as progress:
            while passes:
                rows = max(1, self.batch_tokens // len(passes[0][0]))
                batch, passes = passes[:rows], passes[rows:]
                first = min(len(requests[members[0]][1]) for _, members in batch) - 1  # predicts a first label token
                tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
                # Right padding needs no mask: under causal attention no earlier position sees it.
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    hidden = self.model.base_model(tokens.to(self.device), use_cache=False).last_hidden_state
                head = self.model.get_output_embeddings()
                logits = head(hidden[:, first:].to(head.weight.dtype))
                log_probs = logits.float().log_softmax(-1)  # [rows, kept positions, vocabulary]
                for row, (_, members) in zip(log_probs, batch, strict=True):
                    for index in members:
                        _, context, label = requests[index]
                        start = len(context) - 1 - first
                        own = row[start : start + len(label)]
                        target = torch.tensor(label, device=own.device)
                        total = own.gather(1, target[:, None]).sum().item()
                        if not math.isfinite(total):
                            found = f"the log-likelihood of an answer is {total}: the model's weights are not finite"
                            raise NotFiniteError(f"{found}, or overflow in their type. Look at its training log.")
                        scores[index] = (total, bool((own.argmax(-1) == target).all()))
                        progress.update()
        return scores


def _passes(requests: list[Request]) -> list[tuple[list[int], list[int]]]:
    """The token sequences to run, each with the indices of the requests that it answers."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, _) in enumerate(requests):
        by_context.setdefault(tuple(context), []).append(index)
    passes = []
    for context, members in by_context.items():
        # a label's last token is only predicted, never read; the longest go first and take shorter ones along
        open_passes: list[tuple[list[int], list[int]]] = []
        for index in sorted(members, key=lambda i: -len(requests[i][2])):
            read = requests[index][2][:-1]
            for tail, answered in open_passes:
                if tail[: len(read)] == read:
                    answered.append(index)
                    break
            else:
                open_passes.append((read, [index]))
        passes += [([*context, *tail], answered) for tail, answered in open_passes]
    return passes


def run_lm_eval(
    lm: HFLM, tasks: Tasks, prompts: dict[str, list[str]], rows: dict[str, list[Row]], work: Path
) -> dict[str, Any]:
    """lm-eval's output for the tasks, in the chat format of training; `work` takes its data files."""
    found = []
    for name, task in tasks.items():
        path = work.absolute() / f"{name}.jsonl"
        asked = zip(prompts[name], rows[name], strict=True)
        path.write_text("".join(json.dumps({"prompt": prompt, "label": row["label"]}) + "\n" for prompt, row in asked))
        definition = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "prompt",
            "doc_to_choice": list(task.labels),
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        found.append(definition)
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # of reading the rows: there is one of scoring them
    try:
        return lm_eval.simple_evaluate(
            lm,
            tasks=found,
            task_manager=TaskManager(include_defaults=False),
            apply_chat_template=True,
            system_instruction=SYSTEM_PROMPT,
            bootstrap_iters=0,  # evaluation.metrics computes errors, for all metrics alike
        )
    finally:
        if shown:
            datasets.enable_progress_bars()


def other_tasks(names: list[str], path: Path | None) -> TaskManager:
    """lm-eval's manager of the tasks that it knows and of those in `path`; `InputError` if one of `names` is none of them."""
    manager = TaskManager(include_path=path and str(path))
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(f"--lm_eval_tasks {name}: lm-eval has no such task.{nearest(name, manager.all_tasks)}")
    return manager


def run_other_tasks(
    folder: Path, names: list[str], path: Path | None, limit: int | None
) -> dict[str, dict[str, float]]:
    """lm-eval's own scores of tasks that it knows, by task and metric, in the model's chat format; `path` has more of them."""
    if not names:
        return {}
    manager = other_tasks(names, path)
    lm = HFLM(pretrained=str(folder), batch_size=OTHER_BATCH, device=str(PartialState().device))
    output = lm_eval.simple_evaluate(
        lm, tasks=names, task_manager=manager, limit=limit, apply_chat_template=True, system_instruction=SYSTEM_PROMPT,
        bootstrap_iters=100,
    )  # fmt: skip
    scores = {}
    for name, result in output["results"].items():
        scores[name] = {key: value for key, value in result.items() if isinstance(value, float) and "," in key}
    return scores


def first_label(answer: str, labels: tuple[str, ...]) -> str | None:
    """The first label that a written answer has as a word, in any case; `None` if there is none.

    A "no" in "know" is none. A label in a script without spaces may stand anywhere.
    """
    places = {}
    for label in labels:
        pattern = rf"(?<!\w){re.escape(label)}(?!\w)" if label.isascii() else re.escape(label)
        if found := re.search(pattern, answer, re.IGNORECASE):
            places[label] = found.start()
    return min(places, key=lambda label: (places[label], -len(label)), default=None)


@torch.no_grad()
def greedy_answers(
    model: torch.nn.Module, form: ChatFormat, prompts: list[str] | list[Turns], *, max_new_tokens: int = 8
) -> list[str]:
    """What the model writes in reply to each user message or conversation, always taking the likeliest token."""
    answers, tokenizer = [""] * len(prompts), form.tokenizer
    asked = form.prompts(prompts)
    for rows, batch in padded_batches(
        asked, tokenizer, batch_tokens=WRITTEN_BATCH, title="answers", padding_side="left"
    ):
        batch = batch.to(model.device)
        output = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
    return answers
