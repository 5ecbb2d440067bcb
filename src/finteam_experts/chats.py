# SPDX-License-Identifier: Apache-2.0
"""From a conversation to tokens, the same way in training, scoring, written answers, router calibration and the Space.

The tokens of an answer are those that the tokenizer's chat template puts after the prompt, including what the template adds:
a space before the answer, an end-of-turn token after it. The Space is uploaded with this file, so it imports nothing of the
package.
"""

import datetime
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

Turns = list[dict[str, str]]  # {"role": "user", "assistant" or, first, "system", "content": text}

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
_PROBES = (("What moves bond yields?", "positive"), ("Sales rose.\n\nIs that good? Answer No or Yes.", "No"))


class TemplateError(ValueError):
    """A chat template that can't be used. The message says what it does."""


@dataclass(frozen=True)
class Exchange:
    """The token ids of a conversation whose last turn is an answer."""

    prompt: list[int]
    answer: list[int]  # up to and including the answer's last character
    end: list[int]  # what the template puts after the answer, such as an end-of-turn token
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
        """The ids, with -100 in place of the prompt: the loss skips it."""
        return [-100] * len(self.prompt) + self.answer + self.end


@dataclass(frozen=True)
class ChatFormat:
    """How a tokenizer's chat template writes conversations with one system prompt."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    system_prompt: str
    system_turn: bool  # False: the system prompt opens the first user turn
    stop_id: int | None = None  # the token behind an answer that generation stops at

    def messages(self, turns: Turns | str) -> Turns:
        """The conversation with its system prompt, as `apply_chat_template` takes it. A string is a single question.

        A conversation that begins with a system turn keeps that one.
        """
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        system = self.system_prompt
        if turns[0]["role"] == "system":
            system, turns = turns[0]["content"], turns[1:]
        if self.system_turn:
            return [{"role": "system", "content": system}, *turns]
        return [{"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]

    def prompts(self, conversations: list[Turns] | list[str]) -> list[list[int]]:
        """The token ids of each conversation up to where the model is to answer."""
        if not conversations:
            return []
        return self.tokenizer([self._prompt(turns) for turns in conversations], add_special_tokens=False)["input_ids"]

    def texts(self, conversations: list[tuple[Turns, str]]) -> list[str]:
        """Each conversation with its answer as the template writes it, without a first token that the tokenizer adds itself."""
        bos = self.tokenizer.bos_token if self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id] else ""
        return [self._answered(turns, answer).removeprefix(bos or "") for turns, answer in conversations]

    def exchanges(self, conversations: list[tuple[Turns | str, str]]) -> list[Exchange]:
        """The token ids of each conversation with its answer, in prompt, answer and end.

        Raises `TemplateError` where the template's text or tokens of a prompt are not the beginning of those with the answer.
        """
        if not conversations:
            return []
        prompts = [self._prompt(turns) for turns, _ in conversations]
        answered = [self._answered(turns, answer) for turns, answer in conversations]
        prompt_ids = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        encoded = self.tokenizer(answered, add_special_tokens=False, return_offsets_mapping=True)
        rows = zip(prompts, answered, prompt_ids, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        found, where = [], f"(chat template of {self.tokenizer.name_or_path})"
        for (turns, answer), (prompt, text, before, ids, offsets) in zip(conversations, rows, strict=True):
            if not text.startswith(prompt):
                raise TemplateError(
                    f"it writes a prompt differently once it is answered: {prompt!r}, then {text!r} {where}"
                )
            if ids[: len(before)] != before:
                raise TemplateError(f"the tokens of {prompt!r} are other ones once {answer!r} follows {where}")
            place = text.find(answer.strip(), len(prompt))
            if place < 0:
                raise TemplateError(f"it changes the answer {answer!r} to {text[len(prompt) :]!r} {where}")
            last = place + len(answer.strip())
            end = next((at for at in range(len(before), len(ids)) if offsets[at][0] >= last), len(ids))
            asked = turns if isinstance(turns, str) else turns[-1]["content"]
            spans = _spans(text, asked.strip(), (place, last), offsets)
            found.append(Exchange(before, ids[len(before) : end], ids[end:], spans))
        return found

    def _prompt(self, turns: Turns | str) -> str:
        return self._render(self.messages(turns), add_generation_prompt=True)

    def _answered(self, turns: Turns | str, answer: str) -> str:
        return self._render([*self.messages(turns), {"role": "assistant", "content": answer}])

    def _render(self, messages: Turns, *, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **TEMPLATE_SETTINGS,
        )

    def _check(self) -> None:
        """Raise `TemplateError` if the template loses text, doubles the first token or rewrites answered prompts."""
        for (question, answer), exchange in zip(_PROBES, self.exchanges(list(_PROBES)), strict=True):
            prompt = self._prompt(question)
            for part in (self.system_prompt, question):
                if part not in prompt:
                    raise TemplateError(f"it leaves out {part!r}.")
            if not exchange.answer:
                raise TemplateError(f"it gives {answer!r} no token of its own.")
            if exchange.prompt[:2] == [self.tokenizer.bos_token_id] * 2:
                raise TemplateError(f"it begins with {self.tokenizer.bos_token!r} twice.")


def _spans(text: str, asked: str, answer: tuple[int, int], offsets: list[tuple[int, int]]) -> list[int]:
    """The place in `SPANS` of each token of a conversation, or -1; a token is where the middle of its characters is.

    `asked` is the user's last turn, `answer` and `offsets` are the characters from and to of the answer and of each token.
    """
    question = asked.rpartition("\n\n")[2]
    start, middle = (text.rfind(part, 0, answer[0]) for part in (asked, question))
    marks = ((start, middle), (middle, middle + len(question)), answer)
    return [
        next((span for span, (low, high) in enumerate(marks) if low <= (first + last) / 2 < high), -1)
        for first, last in offsets
    ]


def chat_format(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> ChatFormat:
    """How to write conversations for this tokenizer: with a system turn, or with its text in the user turn.

    Templates without a system role (Gemma, Mistral 7B v0.1) raise on one or ignore it, and some (Mistral 7B v0.3, Nemo) move
    it to the last user turn, so that it is gone once that is answered. Raises `TemplateError` if neither way works.
    """
    problems = []
    for system_turn in (True, False):
        try:
            template = tokenizer.get_chat_template()
            template = _FIXED_DATE + template if "strftime_now" in template else template
            form = ChatFormat(tokenizer, template, system_prompt, system_turn)
            form._check()
            return form
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            problems.append(f"{'with' if system_turn else 'without'} a system turn: {str(error).rstrip('.')}")
    raise TemplateError("; ".join(problems) + ".")
