# SPDX-License-Identifier: Apache-2.0
"""Ask the team: a streamed answer, and which analyst carried which part of it.

    MODEL_ID=outputs/quickstart/moe-instruct python space/app.py

MODEL_ID is a folder or a Hub id of a model made by FinTeamExperts; roles, colours and tasks come from its finteam.json.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TypedDict

import gradio as gr

import panels
from examples import PASSAGES, QUESTIONS
from gpu import on_gpu  # before what imports torch
from team import MAX_NEW_TOKENS, Answer, ModelError, Team, Turns

MODEL_ID = os.environ.get("MODEL_ID", "outputs/quickstart/moe-instruct")
MAX_CHARACTERS = 4000
MAX_VISITORS = 32  # waiting, before the page says to come back later
ALL = "The team"
NOTICE = (
    "An AI answers here. It can be wrong and it can invent figures: **nothing it says is financial advice.** What you type "
    "is sent to the machine that runs this page, and is not kept."
)
PERCENTAGES = (
    "A percentage is an analyst's share of the gate weight, the mean over layers: how much of the answer it computed. It is "
    "not a chance of being right."
)

try:
    team = Team(MODEL_ID)
except ModelError as error:
    sys.exit(f"error: {error}")
names = [member["title"] for member in team.members]


class Reply(TypedDict):
    """An answer as data. `shares` and `layers` are empty for one analyst alone."""

    question: str
    answered_by: str
    answer: str
    shares: dict[str, float]
    tokens: list[tuple[str, str]]  # piece of the answer, analyst that carried it
    layers: list[list[float]]
    numbers_not_in_the_question: list[str]
    model: str
    revision: str
    settings: dict[str, str | int | bool]
    notice: str


def checked(text: object, what: str) -> str:
    """The text, stripped; a `gr.Error` if it is empty, too long, written by a template or, over the API, no text."""
    # half a character, which no tokenizer takes, becomes a question mark
    text = text.encode(errors="replace").decode().strip() if isinstance(text, str) else ""
    if not text:
        raise gr.Error(f"Please type {what}.", print_exception=False)
    if len(text) > MAX_CHARACTERS:
        raise gr.Error(
            f"Please keep {what} below {MAX_CHARACTERS} characters; this one has {len(text)}.", print_exception=False
        )
    if mark := team.form.mark(text):
        raise gr.Error(f"Please leave out {mark}: only the chat template writes that.", print_exception=False)
    return text


def checked_question(text: str) -> str:
    """The question, stripped; a `gr.Error` if it is empty, or more than the model reads at once."""
    text = checked(text, "a question")
    if (tokens := len(team.prompt([{"role": "user", "content": text}]))) > team.longest_prompt:
        found = f"This question has {tokens} tokens, and the model reads {team.longest_prompt} at once"
        advice = "Please shorten it: a short word is a token, and so is a digit. Other scripts and emoji take more."
        raise gr.Error(f"{found}. {advice}", print_exception=False)
    return text


def place_of(analyst: str) -> int | None:
    """The place of an analyst in the team, `None` for the whole team; a `gr.Error` for a name it does not have."""
    if analyst == ALL:
        return None
    if analyst not in names:
        raise gr.Error(f"No analyst is called '{analyst!s:.40}': {ALL}, {', '.join(names)}.", print_exception=False)
    return names.index(analyst)


def as_data(question: str, analyst: str, answer: Answer) -> Reply:
    return {
        "question": question,
        "answered_by": analyst,
        "answer": answer.text,
        "shares": dict(zip(names, answer.shares, strict=False)),
        "tokens": [(piece, names[carrier]) for piece, carrier in answer.tokens],
        "layers": answer.layers,
        "numbers_not_in_the_question": answer.foreign_numbers,
        "model": MODEL_ID,
        "revision": team.revision,
        "settings": {
            "max_new_tokens": MAX_NEW_TOKENS,
            "do_sample": False,
            "system_prompt": team.system_prompt,
            "transformers": importlib.metadata.version("transformers"),
        },
        "notice": "From an AI. Not financial advice.",
    }


@on_gpu
def ask(question: str, analyst: str, earlier: Turns = ()) -> Iterator[tuple[str, object, object, object, Answer]]:
    """Stream the answer as HTML; the last item also fills the panels and the record."""
    question, place = checked_question(question), place_of(analyst)
    answer = Answer("")
    turns = [*earlier, {"role": "user", "content": question}]
    with closing(team.stream(turns, place)) as answers:  # when the visitor leaves, the model stops
        for answer in answers:
            yield panels.answer_html(answer, team.members), gr.skip(), gr.skip(), gr.skip(), answer
    record = as_data(question, analyst, answer)
    shown = json.dumps(
        {key: record[key] for key in record if key not in ("tokens", "layers")}, indent=2, ensure_ascii=False
    )
    alone = f"<p>{analyst} answered alone: every gate was given to it.</p>"
    shares = panels.shares_html(answer.shares, team.members) if place is None else alone
    layers = panels.layers_html(answer.layers, team.members) if place is None else ""
    yield panels.answer_html(answer, team.members, done=True), shares, layers, shown, answer


@on_gpu
def ask_all(question: str) -> Iterator[str]:
    """The team's answer and each analyst's own, side by side."""
    question, found = checked_question(question), []
    for title, color, place in [(ALL, "", None), *((m["title"], m["color"], i) for i, m in enumerate(team.members))]:
        with closing(team.stream(question, place)) as answers:
            *_, answer = answers
        found.append((title, color, answer.text))
        yield panels.columns_html(found)


@on_gpu
def ask_for_data(question: str, analyst: str = ALL) -> Reply:
    """Ask the team, or one analyst alone by its title, and get the answer with its routing as JSON."""
    question, place = checked_question(question), place_of(analyst)
    *_, answer = team.stream(question, place)
    return as_data(question, analyst, answer)


@on_gpu
def classify(task: str, text: str) -> dict[str, float]:
    """The probability of each label of a task for a passage, as JSON."""
    if task not in list(team.tasks):
        raise gr.Error(f"No task is called '{task!s:.40}': {', '.join(team.tasks)}.", print_exception=False)
    return team.classify(task, checked(text, "a passage"))


def classify_for_page(task: str, text: str) -> str:
    return panels.probabilities_html(classify(task, text))


def box(label: str, html: str = "", *, visible: bool = True) -> gr.HTML:
    return gr.HTML(html, label=label, show_label=True, container=True, visible=visible)


with gr.Blocks(title="FinTeamExperts", analytics_enabled=False) as demo:
    gr.Markdown(f"# FinTeamExperts\nA team of financial analysts in one model, and you see who answers.\n\n{NOTICE}")
    with gr.Tab("Ask"):
        earlier_state = gr.State([])
        earlier_box = gr.HTML()
        question_box = gr.Textbox(label="Your question", lines=3, max_length=MAX_CHARACTERS, autofocus=True)
        with gr.Row():
            analyst_box = gr.Radio([ALL, *names], value=ALL, label="Who answers", scale=3)
            ask_button = gr.Button("Ask", variant="primary", scale=1)
        with gr.Row():
            follow_button = gr.Button("Ask as a follow-up", size="sm")
            all_button = gr.Button("Ask every analyst", size="sm")
            link_button = gr.Button("Copy a link to this question", size="sm")
        with gr.Row():
            with gr.Column(scale=3):
                answer_box = box("The team's answer", panels.answer_html(Answer(""), team.members))
            with gr.Column(scale=2, visible=False) as alone_column:
                alone_box = box("One analyst alone", panels.answer_html(Answer(""), team.members))
        columns_box = box("Everybody's answer; words that the team does not use are marked", visible=False)
        shares_box = box("Who carried the team's answer")
        gr.Markdown(PERCENTAGES)
        with gr.Accordion("Layer by layer", open=False):
            layers_box = gr.HTML()
        with gr.Accordion("Record of the last answer", open=False):
            record_box = gr.Code(
                language="json", label="Question, model, settings and routing, to copy", interactive=False
            )
            download_button = gr.Button("Download as JSON", size="sm")
        if questions := [[question] for role in team.members for question in QUESTIONS.get(role["name"], ())]:
            gr.Examples(questions, [question_box], label="Examples")
    with gr.Tab("Tasks", visible=bool(team.tasks)):
        gr.Markdown("The tasks that the team was tuned on. It reads the passage and weighs the task's labels.")
        task_box = gr.Dropdown(
            [(task["title"], name) for name, task in team.tasks.items()],
            value=next(iter(team.tasks), None),
            label="Task",
        )
        passage_box = gr.Textbox(label="Passage", lines=4, max_length=MAX_CHARACTERS)
        classify_button = gr.Button("Weigh the labels", variant="primary")
        labels_box = box("Probability of each label, among the task's labels")
        known_box = gr.Textbox(label="Known label", interactive=False, visible=False)
        if passages := [[name, *row] for name in team.tasks for row in PASSAGES.get(name, ())]:
            gr.Examples(passages, [task_box, passage_box, known_box], label="Passages with their known label")

    # the team's answer and a single analyst's are side by side: each question fills its own box
    def ask_on_page(question: str, analyst: str, earlier: Turns | None = None) -> Iterator[tuple]:
        earlier, asked = earlier or [], {"role": "user", "content": question.strip()}
        with closing(ask(question, analyst, earlier)) as answers:
            for html, shares, layers, record, answer in answers:
                if analyst == ALL:
                    kept = [*earlier, asked, {"role": "assistant", "content": answer.text}]
                    yield html, gr.skip(), gr.skip(), shares, layers, record, panels.earlier_html(earlier), kept
                else:
                    shown = gr.Column(visible=True)
                    yield gr.skip(), html, shown, gr.skip(), gr.skip(), record, gr.skip(), gr.skip()

    def ask_all_on_page(question: str) -> Iterator[object]:
        for html in ask_all(question):
            yield gr.HTML(html, visible=True)

    def question_of_link(request: gr.Request) -> object:
        asked = request.query_params.get("q", "")[:MAX_CHARACTERS]
        return asked or gr.skip()  # without one, what a visitor has typed by now stays

    alone = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private", "trigger_mode": "once"}
    outputs = [answer_box, alone_box, alone_column, shares_box, layers_box, record_box, earlier_box, earlier_state]
    for trigger in (ask_button.click, question_box.submit):
        trigger(ask_on_page, [question_box, analyst_box], outputs, **alone)
    follow_button.click(ask_on_page, [question_box, analyst_box, earlier_state], outputs, **alone)
    all_button.click(ask_all_on_page, question_box, columns_box, **alone)
    link_button.click(None, question_box, None, js=panels.LINK)
    download_button.click(None, record_box, None, js=panels.DOWNLOAD)
    demo.load(question_of_link, None, question_box, api_visibility="private")
    classify_button.click(classify_for_page, [task_box, passage_box], labels_box, **alone)
    gr.api(ask_for_data, api_name="ask", concurrency_id="model", concurrency_limit=1)
    gr.api(classify, api_name="classify", concurrency_id="model", concurrency_limit=1)

if __name__ == "__main__":
    demo.queue(max_size=MAX_VISITORS).launch(
        show_error=True, css=panels.CSS, theme=gr.themes.Default(), ssr_mode=False
    )
