# SPDX-License-Identifier: Apache-2.0
"""The model behind the page: streamed answers, which analyst carried which token, and label probabilities of tasks."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from chats import ChatFormat, Turns, chat_format
from prompts import task_prompt
from scoring import log_likelihoods, stop_ids

MAX_NEW_TOKENS = 160
MAX_PROMPT_TOKENS = 2048  # of a conversation: earlier turns are left out beyond that, and a longer question is refused
LONGEST_TEXT = 256  # tokens of a passage, for a model whose tasks do not say
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))")


@dataclass
class Answer:
    """An answer, complete or so far."""

    text: str
    # piece of the text, place of the analyst that carried it
    tokens: list[tuple[str, int]] = field(default_factory=list)
    layers: list[list[float]] = field(default_factory=list)  # [layers, analysts] share of the gate weight
    foreign_numbers: list[str] = field(default_factory=list)  # in the answer and not in the question

    @property
    def shares(self) -> list[float]:
        """Each analyst's share of the gate weight, the mean over layers."""
        return torch.tensor(self.layers).mean(0).tolist() if self.layers else []


class ModelError(ValueError):
    """The model can't be shown. The message says why, and what to do."""


def foreign_figures(answer: str, asked: str) -> list[str]:
    """The figures of an answer that the text it was asked about does not have, as written; 1,200.50 is the same as 1200.5."""

    def value(number: str) -> Decimal | str:
        try:
            return Decimal(_THOUSANDS.sub("", number))
        except InvalidOperation:  # such as a date
            return number

    given = set(map(value, NUMBER.findall(asked)))
    return [number for number in dict.fromkeys(NUMBER.findall(answer)) if value(number) not in given]


class _StopOnce(StoppingCriteria):
    """Stops a generation at its next token once the event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def _card_file(model_id: str) -> Path:
    """The model's finteam.json, fetched from the Hub unless `model_id` is a folder."""
    if Path(model_id).is_dir():
        path = Path(model_id) / "finteam.json"
        if not path.is_file():
            raise ModelError(
                f"MODEL_ID {model_id}: that folder has no finteam.json, so it is no model of FinTeamExperts."
            )
        return path
    try:
        return Path(hf_hub_download(model_id, "finteam.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"MODEL_ID {model_id}: there is no such folder here, and finteam.json can't be fetched from the Hub: {error}"
        ) from None


class Team:
    """A model made by FinTeamExperts, from a folder or a Hub id."""

    def __init__(self, model_id: str) -> None:
        card_file = _card_file(model_id)
        try:
            card = json.loads(card_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(
                f"MODEL_ID {model_id}: its finteam.json can't be read ({error}). Fetch it again."
            ) from None
        missing = [key for key in ("team", "system_prompt") if key not in card]
        if missing:
            raise ModelError(
                f"MODEL_ID {model_id}: its finteam.json has no {' and no '.join(missing)}, so it is no team. Name a folder or Hub id "
                "of one, such as RUN_DIR/moe-instruct."
            )
        self.members: list[dict[str, str]] = card["team"]  # in the order of the model's experts
        self.tasks: dict[str, dict[str, Any]] = {task["name"]: task for task in card.get("tasks", ())}
        self.system_prompt: str = card["system_prompt"]
        # the cache names a snapshot's folder after its commit
        self.revision = "local folder" if Path(model_id).is_dir() else card_file.parent.name
        self.form: ChatFormat = chat_format(AutoTokenizer.from_pretrained(model_id), self.system_prompt)
        self.tokenizer = self.form.tokenizer
        self.model = AutoModelForCausalLM.from_pretrained(model_id).eval()
        self._one_at_a_time = Lock()  # a forced analyst holds all gates of the model
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def stream(self, asked: str | Turns, analyst: int | None = None) -> Iterator[Answer]:
        """The growing answer to a question or to the last turn of a conversation, of the team or of one analyst alone.

        The last one also says which analyst carried what.
        """
        with self._one_at_a_time:
            yield from self._stream([{"role": "user", "content": asked}] if isinstance(asked, str) else asked, analyst)

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that leaves room for an answer."""
        return min(MAX_PROMPT_TOKENS, self.model.config.max_position_embeddings - MAX_NEW_TOKENS)

    def prompt(self, turns: Turns) -> list[int]:
        """The tokens of a conversation; its oldest exchanges are left out while it is too long."""
        (ids,) = self.form.prompts([turns])
        return self.prompt(turns[2:]) if len(ids) > self.longest_prompt and len(turns) > 2 else ids

    def _stream(self, turns: Turns, analyst: int | None) -> Iterator[Answer]:
        prompt = torch.tensor([self.prompt(turns)], device=self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        made: list[torch.Tensor] = []
        gone = Event()

        def generate() -> None:
            try:
                with self.only(analyst):
                    made.append(
                        self.model.generate(
                            prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, do_sample=False,
                            max_new_tokens=MAX_NEW_TOKENS, stopping_criteria=StoppingCriteriaList([_StopOnce(gone)]),
                            eos_token_id=stop_ids(self.form),
                        )
                    )  # fmt: skip
            finally:
                streamer.end()  # the page must not wait for text that will never come

        worker = Thread(target=generate)
        worker.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield Answer(text)
        finally:
            # Runs when the visitor leaves, too (that closes this generator): the next one must not find the gates forced
            gone.set()
            worker.join()
        if not made:
            raise RuntimeError("the model stopped without an answer")
        foreign = foreign_figures(text, "\n".join(turn["content"] for turn in turns))
        tokens, layers = self.routing(made[0], prompt.shape[1]) if analyst is None else ([], [])
        yield Answer(text, tokens, layers, foreign)

    @torch.no_grad()
    def routing(self, ids: torch.Tensor, start: int) -> tuple[list[tuple[str, int]], list[list[float]]]:
        """Which analyst carried each piece of the answer `ids[0, start:]`, and the shares [layers, analysts], in one forward pass.

        A token is carried by the analyst with most of the gate weight at the position that predicts it.
        """
        logits = self.model(ids[:, :-1], output_router_logits=True, logits_to_keep=1).router_logits
        probabilities = torch.stack([layer[start - 1 :].float().softmax(-1) for layer in logits])
        top = probabilities.topk(self.model.config.num_experts_per_tok, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(-1, top.indices, top.values)
        weights = weights / weights.sum(-1, keepdim=True)  # [layers, answer tokens, analysts]
        carriers = weights.mean(0).argmax(-1).tolist()
        pieces, done = [], ""
        for place, carrier in enumerate(carriers, start=1):  # a letter may be several tokens: decode from the start
            text = self.tokenizer.decode(ids[0, start : start + place], skip_special_tokens=True)
            if text != done and not text.endswith("�"):
                pieces.append((text[len(done) :], carrier))
                done = text
        return pieces, weights.mean(1).tolist()

    @contextmanager
    def only(self, analyst: int | None) -> Iterator[None]:
        """All of every gate to one analyst, for as long as the context lasts; `None` leaves the router as it is."""

        def to_one(gate, inputs, output):
            logits, weights, indices = output
            return logits, torch.ones_like(weights[:, :1]), torch.full_like(indices[:, :1], analyst)

        gates = [layer.mlp.gate for layer in self.model.model.layers] if analyst is not None else []
        hooks = [gate.register_forward_hook(to_one) for gate in gates]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def classify(self, task: str, text: str) -> dict[str, float]:
        """The probability of each label of a task, among its labels, in the words that the model was tuned on."""
        about = self.tasks[task]
        prompt, _ = task_prompt(
            text, about["question"], about["labels"], about.get("max_text_tokens", LONGEST_TEXT), self.tokenizer
        )
        exchanges = self.form.exchanges([(prompt, label) for label in about["labels"]])
        with self._one_at_a_time:
            scores = log_likelihoods(self.model, [(exchange.prompt, exchange.scored) for exchange in exchanges])
        probabilities = torch.tensor([score.log_likelihood for score in scores]).softmax(0)
        return dict(zip(about["labels"], probabilities.tolist(), strict=True))
