# SPDX-License-Identifier: Apache-2.0
"""From a conversation to tokens, the same way in training, scoring, written answers, router calibration and the Space.

The tokens of an answer are those that the tokenizer's chat template puts after the prompt, including what the template adds:
a space before the answer, an end-of-turn token after it, which is what generation stops at. The Space is uploaded with this
file, so it imports nothing of the package.
"""

import datetime
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from os.path import commonprefix
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

# {"role": "user", "assistant", "tool" or, first, "system", "content": text}; an assistant's may have "tool_calls", and the
# first one has the conversation's "tools", if there are any
Turns = list[dict[str, Any]]

# What templates let their caller decide. Reasoning is off, under each of its names. The date is fixed: otherwise a model
# would be scored on another prompt than the one it was trained on the day before.
_DATE = datetime.datetime(2024, 7, 26)
TEMPLATE_SETTINGS = {"enable_thinking": False, "thinking": False, "date_string": _DATE.strftime("%d %b %Y")}
# Templates that call strftime_now for the date get the same one from a macro of that name.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{code}', '{_DATE.strftime(f'%{code}')}')" for code in ("-d", *"dmbByYAaHMSjp"))
    + " }}{%- endmacro -%}"
)
SPANS = ("passage", "question", "answer")  # the question is the last paragraph of the user's last turn
_BATCH = 1024  # conversations that are tokenised at once: more would only take memory
# Two questions and two answers without a first or last character in common: all that two conversations share is the template's
_QUESTIONS = ("What moves bond yields?", "Sales rose.\n\nIs that good? Answer No or Yes")
_ANSWERS = ("positive", "No")


class TemplateError(ValueError):
    """A chat template that can't be used. The message says what it does."""


class Conversation(tuple[Turns | str, str]):
    """The turns up to the last answer, and that answer; `where` is the file and line that it came from, for errors."""

    where: str

    def __new__(cls, pair: tuple[Turns | str, str], where: str = "") -> "Conversation":
        conversation = super().__new__(cls, pair)
        conversation.where = where
        return conversation


@dataclass(frozen=True)
class Exchange:
    """The token ids of a conversation whose last turn is an answer."""

    prompt: list[int]
    answer: list[int]  # up to and including the answer's last character
    end: list[int]  # what the template puts after the answer, such as an end-of-turn token and a line break
    # of each token of `ids`, a place in `SPANS`, or -1 for what the template and the system turn add
    spans: list[int]
    stop: int = 1  # tokens of `end` up to the one that generation stops at, which included

    @property
    def scored(self) -> list[int]:
        """The answer and its end up to the token that generation stops at: what a model has to write to give this answer."""
        return self.answer + self.end[: self.stop]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer + self.end

    @property
    def labels(self) -> list[int]:
        """`scored`, with -100 in place of all other ids: the loss skips those."""
        return [-100] * len(self.prompt) + self.scored + [-100] * len(self.end[self.stop :])


@dataclass(frozen=True)
class ChatFormat:
    """How a tokenizer's chat template writes conversations with one system prompt."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    system_prompt: str
    system_turn: bool  # False: the system prompt opens the first user turn
    error: type[ValueError] = TemplateError  # raised for a conversation that can't be written
    header: str = ""  # what the template puts between a prompt and its answer, such as a space
    footer: str = ""  # and after the answer
    asked: str = ""  # and between a question and the answer, in a prompt
    stop_id: int | None = None  # the token of the footer that generation stops at
    marks: str = r"(?!)"  # a regular expression of what only the template writes, such as its special tokens

    def messages(self, turns: Turns | str) -> Turns:
        """The conversation with its system prompt, as `apply_chat_template` takes it. A string is a single question.

        A conversation that begins with a system turn keeps that one.
        """
        first, *others = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        system = self.system_prompt
        if first["role"] == "system":
            system, (first, *others) = first["content"], others
        if self.system_turn:
            return [{"role": "system", "content": system}, {"role": "user", "content": first["content"]}, *others]
        return [{"role": "user", "content": f"{system}\n\n{first['content']}"}, *others]

    def prompts(self, conversations: list[Turns] | list[str]) -> list[list[int]]:
        """The token ids of each conversation up to where the model is to answer."""
        return self._encode([self._render(turns) for turns in conversations])

    def texts(self, conversations: Iterable[tuple[Turns | str, str]]) -> list[str]:
        """Each conversation with its answer as the template writes it, without a first token that the tokenizer adds itself."""
        bos = self.tokenizer.bos_token if self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id] else ""
        return [self._written(conversation)[1].removeprefix(bos or "") for conversation in conversations]

    def exchanges(self, conversations: Iterable[tuple[Turns | str, str]]) -> list[Exchange]:
        """The token ids of each conversation with its answer, in prompt, answer and end.

        White space around the answer is left out. Raises `error`, with `where` of a `Conversation`, where the template can't
        write it, leaves something out or changes the answer; where text or tokens of its prompt are not the beginning of those
        with the answer; and where a turn is written by a template already.
        """
        rest, exchanges = iter(conversations), []
        while batch := list(islice(rest, _BATCH)):
            exchanges += self._exchanges(batch)
        return exchanges

    def mark(self, text: str) -> str | None:
        """The first piece of a text that only the template writes, such as a special token; `None` if it has none."""
        return match[0] if (match := re.search(self.marks, text)) else None

    def _exchanges(self, conversations: list[tuple[Turns | str, str]]) -> Iterator[Exchange]:
        written = [self._written(conversation) for conversation in conversations]
        prompts = list(dict.fromkeys(prompt for prompt, *_ in written))  # once for all labels of a question
        prompt_ids = dict(zip(prompts, self._encode(prompts), strict=True))
        texts = [text for _, text, _ in written]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        rows = zip(conversations, written, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for conversation, (prompt, text, answer), ids, offsets in rows:
            before, rest, last = prompt_ids[prompt], text[len(prompt) :], answer[1]
            if ids[: len(before)] != before:
                self._refuse(conversation, f"the tokens of {prompt[-80:]!r} are other ones once {rest!r} follows")
            end = bisect_left(offsets, last, len(before), key=lambda place: place[0])
            stop = ids.index(self.stop_id, len(before)) if self.stop_id in ids[len(before) :] else 0
            if not len(before) < end <= stop or text[last : offsets[stop][0]].strip():
                self._refuse(conversation, f"the tokens of {rest!r} are not those of an answer and its end")
            spans = self._spans(conversation[0], prompt, answer, offsets)
            yield Exchange(before, ids[len(before) : end], ids[end:], spans, stop + 1 - end)

    def _written(self, conversation: tuple[Turns | str, str]) -> tuple[str, str, tuple[int, int]]:
        """A conversation's prompt as the template writes it, prompt and answer, and from where to where that has the answer."""
        turns, answer = conversation[0], conversation[1].strip()
        for said in (*([turns] if isinstance(turns, str) else [turn["content"] for turn in turns]), answer):
            if mark := self.mark(said):
                found = f"it has {mark!r} in {said!r:.80}, and only the chat template writes that"
                self._refuse(conversation, f"{found}: give the plain text of each turn")
        try:
            prompt, text = self._render(turns), self._render(turns, answer)
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            self._refuse(conversation, f"the chat template can't write it: {error}")
        for wanted in self._wanted(turns):
            if wanted not in prompt and json.dumps(wanted, ensure_ascii=False)[1:-1] not in prompt:
                self._refuse(conversation, f"the chat template leaves out {wanted!r:.80}")
        if not text.startswith(prompt):
            self._refuse(conversation, f"the chat template {_differently(prompt, text)}")
        header, footer = self.header, self.footer
        if (
            text[len(prompt) :] != header + answer + footer
        ):  # of a single question: after several turns it may be otherwise
            before, footer = _around(self._render(turns, probe) for probe in _ANSWERS)
            header = before[len(prompt) :]
        if text[len(prompt) :] != header + answer + footer:
            self._refuse(conversation, f"the chat template changes the answer {answer!r} to {text[len(prompt) :]!r}")
        first = len(prompt) + len(header)
        return prompt, text, (first, first + len(answer))

    def _wanted(self, turns: Turns | str) -> list[str]:
        """What a prompt has to have: all but earlier answers, of which templates leave out the reasoning."""
        chat = self.messages(turns)
        functions = [*_tools(turns), *(call for turn in chat for call in turn.get("tool_calls", ()))]
        names = [function.get("function", function)["name"] for function in functions]
        return [turn["content"].strip() for turn in chat if turn["role"] != "assistant"] + names

    def _spans(
        self, turns: Turns | str, prompt: str, answer: tuple[int, int], offsets: list[tuple[int, int]]
    ) -> list[int]:
        """The place in `SPANS` of each token, or -1; a token is where the middle of its characters is."""
        asked = (turns if isinstance(turns, str) else turns[-1]["content"]).strip()
        at = prompt.rfind(asked, 0, len(prompt) - len(self.asked))
        middle, last = at + len(asked) - len(asked.rpartition("\n\n")[2]), at + len(asked)
        spans = [-1] * len(offsets)
        for span, part in enumerate(((at, middle), (middle, last), answer)):
            low, high = (bisect_left(offsets, 2 * place, key=sum) for place in part)
            spans[low:high] = [span] * (high - low)
        return spans

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return (
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
        )

    def _render(self, turns: Turns | str, answer: str | None = None) -> str:
        """A conversation with its answer or, without one, up to where the model is to answer."""
        said = [] if answer is None else [{"role": "assistant", "content": answer}]
        return self.tokenizer.apply_chat_template(
            self.messages(turns) + said,
            tools=_tools(turns) or None,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=answer is None,
            **TEMPLATE_SETTINGS,
        )

    def _refuse(self, conversation: tuple[Turns | str, str], problem: str) -> None:
        where = f"{conversation.where}: " if isinstance(conversation, Conversation) and conversation.where else ""
        raise self.error(f"{where}{problem}.")


def _tools(turns: Turns | str) -> list[dict[str, Any]]:
    return [] if isinstance(turns, str) else turns[0].get("tools") or []


def _around(texts: Iterable[str]) -> tuple[str, str]:
    """What texts have in common at their beginning and at their end."""
    texts = list(texts)
    return commonprefix(texts), commonprefix([text[::-1] for text in texts])[::-1]


def _differently(prompt: str, answered: str) -> str:
    at = len(commonprefix([prompt, answered]))
    return f"writes a prompt differently once it is answered: {answered[at:]!r:.80} in place of {prompt[at:]!r:.80}"


def _learn(form: ChatFormat) -> ChatFormat:
    """The format with what its template writes around questions and answers, found by comparing two of them.

    Raises `TemplateError` if the template loses text, doubles the first token, rewrites answered prompts, or does not end an
    answer with a token that generation can stop at.
    """
    tokenizer, question, answer = form.tokenizer, _QUESTIONS[1], _ANSWERS[0]
    prompt, text = form._render(question), form._render(question, answer)
    before, footer = _around(form._render(question, probe) for probe in _ANSWERS)
    if not before.startswith(prompt):
        raise TemplateError(f"it {_differently(prompt, before)}")
    if text != before + answer + footer:
        raise TemplateError(f"it changes the answer {answer!r} to {text[len(prompt) :]!r}")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    known = {id: token for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    places, last = encoded["offset_mapping"], len(text) - len(footer)
    ends = [(id, at) for id, (at, _) in zip(encoded["input_ids"], places, strict=True) if at >= last and id in known]
    if not ends or text[last : ends[0][1]].strip():
        found = f"it puts {footer!r} after an answer, which begins with no token that generation could stop at"
        raise TemplateError(f"{found}. Let it put one there, such as {tokenizer.eos_token!r}")
    stop_id, asked = ends[0][0], _around(map(form._render, _QUESTIONS))[1]
    marks = {token.content for id, token in known.items() if token.special or id == stop_id if token.content in text}
    if len(asked.strip()) > 3 and not any(mark in asked for mark in marks):  # such as "### Response:"
        marks.add(asked.strip())
    pattern = "|".join(map(re.escape, sorted(marks)))
    form = replace(form, header=before[len(prompt) :], footer=footer, asked=asked, stop_id=stop_id, marks=pattern)
    for exchange in form.exchanges(zip(_QUESTIONS, _ANSWERS, strict=True)):
        if exchange.prompt[:2] == [tokenizer.bos_token_id] * 2:
            raise TemplateError(f"it begins with {tokenizer.bos_token!r} twice")
    return form


def chat_format(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, error: type[ValueError] = TemplateError
) -> ChatFormat:
    """How to write conversations for this tokenizer: with a system turn, or with its text in the user turn.

    Templates without a system role (Gemma, Mistral 7B v0.1) raise on one or ignore it, and some (Mistral 7B v0.3, Nemo) move
    it to the last user turn, so that it is gone once that is answered. Raises `TemplateError` if neither way works; `error` is
    what the format raises for a single conversation.
    """
    problems = []
    for system_turn in (True, False):
        try:
            template = tokenizer.get_chat_template()
            template = _FIXED_DATE + template if "strftime_now" in template else template
            return replace(_learn(ChatFormat(tokenizer, template, system_prompt, system_turn)), error=error)
        except (ValueError, TypeError, jinja2.TemplateError) as problem:
            problems.append(str(problem).rstrip("."))
    way, other = problems
    raise TemplateError(f"{way}." if way == other else f"with a system turn: {way}; without a system turn: {other}.")
