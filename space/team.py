# SPDX-License-Identifier: Apache-2.0
"""The model behind the page: streamed answers, who carried which token, and the tasks' label probabilities."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from prices import compact_prices

MAX_NEW_TOKENS = 160
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass
class Answer:
    """What was answered to a question, complete or up to now."""

    text: str
    tokens: list[tuple[str, int]] = field(default_factory=list)  # piece of the text, place of who carried it
    layers: list[list[float]] = field(default_factory=list)  # [layers, analysts] share of the gate weight
    foreign_numbers: list[str] = field(default_factory=list)  # in the answer and not in the question

    @property
    def shares(self) -> list[float]:
        """Each analyst's share of the gate weight, the mean over layers."""
        return torch.tensor(self.layers).mean(0).tolist() if self.layers else []


class Team:
    """A model made by FinTeamExperts, from a folder or a Hub id."""

    def __init__(self, model_id: str) -> None:
        local = Path(model_id) / "finteam.json"
        card_file = local if local.is_file() else Path(hf_hub_download(model_id, "finteam.json"))
        card = json.loads(card_file.read_text())
        self.members: list[dict[str, str]] = card["team"]  # in the order of the model's experts
        self.tasks: dict[str, dict[str, Any]] = {task["name"]: task for task in card["tasks"]}
        self.system_prompt: str = card["system_prompt"]
        # the cache names a snapshot's folder after its commit
        self.revision = "local folder" if local.is_file() else card_file.parent.name
        self.tokenizer = AutoTokenizer.from_pretrained(model_id)
        self.model = AutoModelForCausalLM.from_pretrained(model_id).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(self, question: str) -> torch.Tensor:
        """The token ids [1, tokens] of a chat that asks `question`."""
        chat = [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].to(self.model.device)

    def stream(self, question: str, analyst: int | None = None) -> Iterator[Answer]:
        """The growing answer of the team, or of one analyst alone; the last one also says who carried what."""
        prompt = self.encode(question)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        made: list[torch.Tensor] = []

        def generate() -> None:
            try:
                with self.only(analyst):
                    made.append(
                        self.model.generate(
                            prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, do_sample=False,
                            max_new_tokens=MAX_NEW_TOKENS,
                        )
                    )  # fmt: skip
            finally:
                streamer.end()  # the page must not wait for text that will never come

        worker = Thread(target=generate)
        worker.start()
        text = ""
        for piece in streamer:
            text += piece
            yield Answer(text)
        worker.join()
        if not made:
            raise RuntimeError("the model stopped without an answer")
        given = set(NUMBER.findall(question))
        foreign = [number for number in dict.fromkeys(NUMBER.findall(text)) if number not in given]
        tokens, layers = self.routing(made[0], prompt.shape[1]) if analyst is None else ([], [])
        yield Answer(text, tokens, layers, foreign)

    @torch.no_grad()
    def routing(self, ids: torch.Tensor, start: int) -> tuple[list[tuple[str, int]], list[list[float]]]:
        """Who carried each piece of the answer `ids[0, start:]`, and the shares [layers, analysts], in one forward pass.

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

    @torch.no_grad()
    def classify(self, task: str, text: str) -> dict[str, float]:
        """The probability of each label of a task, among its labels, in the words that the model was tuned on."""
        about = self.tasks[task]
        labels = " or ".join([", ".join(about["labels"][:-1]), about["labels"][-1]])
        prompt = self.encode(f"{compact_prices(text)}\n\n{about['question']} Answer {labels}.")[0]
        ends = [
            self.tokenizer(label, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            for label in about["labels"]
        ]
        rows = [torch.cat([prompt, end.to(prompt.device)]) for end in ends]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # right padding: no earlier position sees it
        kept = batch.shape[1] - len(prompt) + 1
        log_probs = self.model(batch, logits_to_keep=kept).logits.float().log_softmax(-1)
        scores = [
            row[: len(end)].gather(1, end[:, None].to(row.device)).sum()
            for row, end in zip(log_probs, ends, strict=True)
        ]
        return dict(zip(about["labels"], torch.stack(scores).softmax(0).tolist(), strict=True))
