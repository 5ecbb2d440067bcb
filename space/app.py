# SPDX-License-Identifier: Apache-2.0
"""Ask the team: a question, the answer streamed, and the share of each analyst in it.

    MODEL_ID=outputs/quickstart/moe-instruct python space/app.py

MODEL_ID is a folder or a Hub id of a model made by FinTeamExperts; roles and examples come from its finteam.json.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import gradio as gr
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

MODEL_ID = os.environ.get("MODEL_ID", "outputs/quickstart/moe-instruct")
MAX_CHARACTERS = 4000
MAX_NEW_TOKENS = 160
EXAMPLES = [
    "How do bond yields respond when a central bank fights inflation?",
    "Net sales of Kelvik Foods rose to EUR 235 mn from 191 mn.\n\nWhat does this mean for the company? "
    "Answer negative, neutral or positive.",
    "Daily returns in %: 0.42, -1.17, 0.08, 2.31, -0.64. How volatile is this share?",
]


def read_card() -> dict:
    """The record that travels with the model: the team in the order of its experts."""
    local = Path(MODEL_ID) / "finteam.json"
    return json.loads((local if local.is_file() else Path(hf_hub_download(MODEL_ID, "finteam.json"))).read_text())


CARD = read_card()
TEAM = CARD["team"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)
model = AutoModelForCausalLM.from_pretrained(MODEL_ID).to(DEVICE).eval()


@torch.no_grad()
def analyst_shares(token_ids: torch.Tensor) -> dict[str, float]:
    """The share of the gate weight each analyst got, mean over layers and tokens [1, tokens] but the first."""
    totals = torch.zeros(len(TEAM))
    logits_by_layer = model(token_ids, output_router_logits=True, logits_to_keep=1).router_logits
    for logits in logits_by_layer:
        top = logits[1:].float().softmax(-1).topk(model.config.num_experts_per_tok, dim=-1)
        weights = top.values / top.values.sum(-1, keepdim=True)
        totals += torch.zeros(len(weights), len(TEAM)).scatter(1, top.indices.cpu(), weights.cpu()).mean(0)
    shares = (totals / len(logits_by_layer)).tolist()
    return {member["title"]: share for member, share in zip(TEAM, shares, strict=True)}


def answer(question: str) -> Iterator[tuple[str, dict[str, float] | object]]:
    """Stream the answer to `question`; the last item carries the analysts' shares as well."""
    question = question.strip()
    if not question:
        raise gr.Error("Please type a question.")
    if len(question) > MAX_CHARACTERS:
        raise gr.Error(f"Please keep the question below {MAX_CHARACTERS} characters; this one has {len(question)}.")
    chat = [{"role": "system", "content": CARD["system_prompt"]}, {"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(
        DEVICE
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output: list[torch.Tensor] = []

    def generate() -> None:
        try:
            output.append(model.generate(**inputs, streamer=streamer, max_new_tokens=MAX_NEW_TOKENS, do_sample=False))
        finally:
            streamer.end()  # the page must not wait for text that will never come

    worker = Thread(target=generate)
    worker.start()
    text = ""
    for piece in streamer:
        text += piece
        yield text, gr.skip()
    worker.join()
    if not output:
        raise gr.Error("The model could not answer this. Please try again.")
    yield text, analyst_shares(output[0])


with gr.Blocks(title="FinTeamExperts", analytics_enabled=False) as demo:
    gr.Markdown(
        "# FinTeamExperts\nThree analysts in one model. An AI answers here, and it is **not financial advice**."
    )
    question_box = gr.Textbox(label="Your question", lines=3, max_length=MAX_CHARACTERS, autofocus=True)
    ask = gr.Button("Ask the team", variant="primary")
    answer_box = gr.Textbox(label="Answer", lines=6, interactive=False)
    shares_box = gr.Label(label="Who carried it: share of the gate weight, not the chance of being right")
    gr.Examples(EXAMPLES, question_box)
    for trigger in (ask.click, question_box.submit):
        trigger(answer, question_box, [answer_box, shares_box], api_name="answer", concurrency_id="model")

if __name__ == "__main__":
    demo.queue(max_size=32, default_concurrency_limit=1).launch(show_error=True)
