# SPDX-License-Identifier: Apache-2.0
"""How fast the demo is: start, first words, streaming beside plain `generate`, many visitors, memory over many questions.

python benchmarks/space.py --model outputs/quickstart/moe-instruct
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from gradio_client import Client

from finteam_experts.errors import InputError, run

SPACE = Path(__file__).parents[1] / "space"
QUESTION = "How do bond yields respond when a central bank fights inflation?"


def streaming(model: Path, rounds: int) -> None:
    """Seconds of the demo's stream and of plain `generate`, alternating in this process; the answers have to be equal."""
    sys.path.insert(0, str(SPACE))
    from team import MAX_NEW_TOKENS, Team

    team = Team(str(model))
    prompt = torch.tensor(team.form.prompts([QUESTION]), device=team.model.device)
    fixed = {"max_new_tokens": MAX_NEW_TOKENS, "min_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    team.model.generation_config.min_new_tokens = MAX_NEW_TOKENS  # a short answer measures little
    for number in range(rounds + 1):
        began = time.monotonic()
        pieces = [(time.monotonic() - began, answer) for answer in team.stream(QUESTION)]
        first, streamed, text = pieces[0][0], pieces[-2][0], pieces[-1][1].text  # the last one waits for the routing
        began = time.monotonic()
        made = team.model.generate(prompt, attention_mask=torch.ones_like(prompt), **fixed)
        plain = time.monotonic() - began
        if team.tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True) != text:
            raise InputError("the streamed answer is not that of generate. Please report this as a bug.")
        if number:  # the first round warms up
            print(
                f"round {number}: first words after {first:.2f} s, streamed {MAX_NEW_TOKENS / streamed:.1f} tokens/s, "
                f"plain {MAX_NEW_TOKENS / plain:.1f} tokens/s, ratio {plain / streamed:.2f}"
            )


def resident_mib(process: subprocess.Popen) -> float:
    """Resident memory of a process, MiB (Linux)."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def server(model: Path, visitors: int, questions: int) -> None:
    """Start the demo as a user does, and ask it over its API."""
    environment = os.environ | {"MODEL_ID": str(model), "PYTHONUNBUFFERED": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    with tempfile.NamedTemporaryFile("r") as log:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, SPACE / "app.py"], env=environment, stdout=log.fileno(), stderr=log.fileno()
        )
        while not (found := re.search(r"http://[\d.]+:\d+", Path(log.name).read_text())):
            if process.poll() is not None:
                raise InputError(f"the demo did not start:\n{Path(log.name).read_text()[-2000:]}")
            time.sleep(0.1)
        print(f"page ready after {time.monotonic() - began:.1f} s")
        try:
            client = Client(found[0], verbose=False)
            began = time.monotonic()
            client.predict(QUESTION, api_name="/ask")
            print(f"first whole answer, with its routing, after {time.monotonic() - began:.1f} s")

            def visit(number: int) -> float:
                own, began = Client(found[0], verbose=False), time.monotonic()
                own.predict(f"{number}. {QUESTION}", api_name="/ask")
                return time.monotonic() - began

            with ThreadPoolExecutor(visitors) as pool:
                waited = sorted(pool.map(visit, range(visitors)))
            print(f"{visitors} visitors at once: all served, the last after {waited[-1]:.1f} s")
            before = resident_mib(process)
            for number in range(questions):
                client.predict("fpb", f"Sales of company {number} rose.", api_name="/classify")
                if number % 10 == 0:
                    client.predict(f"{number}. {QUESTION}", api_name="/ask")
            print(f"{questions} questions later: {resident_mib(process):.0f} MiB, before {before:.0f} MiB")
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/quickstart/moe-instruct"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        raise InputError(f"--model {args.model}: not a model folder, it has no config.json.")
    streaming(args.model, args.rounds)
    server(args.model, args.visitors, args.questions)


if __name__ == "__main__":
    run(main)
