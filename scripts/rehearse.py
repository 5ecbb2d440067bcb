# SPDX-License-Identifier: Apache-2.0
"""Let the base answer general questions itself, so that its tuning on finance does not make it forget how to.

    python scripts/rehearse.py --run_dir outputs/quickstart

Writes chats/general.jsonl and chats/general_heldout.jsonl into the data directory: conversations that belong to no analyst. A
model that is tuned on its own earlier answers forgets less (self-synthesised rehearsal: Huang et al. 2024, arXiv:2403.01244).
The questions are the package's, or lines of `--questions`. Where the directory has general conversations already, they stay.
"""

import argparse
import re
from pathlib import Path

from finteam_experts.threads import use_available_cores  # before torch

from accelerate import PartialState

from finteam_experts.data import sample
from finteam_experts.data.conversations import GENERAL, chat_file
from finteam_experts.data.files import write_rows
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.labels import greedy_answers
from finteam_experts.files import read_text
from finteam_experts.models import as_chats, check_base, load_model, load_tokenizer, local_folder

QUESTIONS = Path(sample.__file__).parent / "knowledge/general.txt"
MAX_NEW_TOKENS = 72
HELD_OUT = 5  # every fifth conversation


def whole_sentences(answer: str) -> str:
    """The answer up to its last complete sentence, or nothing if it has none or repeats one."""
    found = re.match(r".*[a-z\"')][.!?]", answer.strip(), re.DOTALL | re.IGNORECASE)
    sentences = re.split(r"(?<=[.!?])\s+", found.group()) if found else []
    return found.group() if found and len(set(sentences)) == len(sentences) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--data_dir", type=Path, help="data directory (default: RUN_DIR/data)")
    parser.add_argument("--base", help="dense base: Hub id or folder (default: RUN_DIR/base)")
    parser.add_argument("--questions", type=Path, default=QUESTIONS,
                        help="a text file with a question per line (default: the package's 100)")  # fmt: skip
    args = parser.parse_args()
    data = args.data_dir or args.run_dir / "data"
    if not data.is_dir():
        raise InputError(
            f"{data} does not exist. Make sample data: scripts/make_sample_data.py, or name another with --data_dir"
        )
    if chat_file(data, GENERAL).is_file():
        print(f"{chat_file(data, GENERAL)} exists: skipped")
        return
    lines = map(str.strip, read_text(args.questions).splitlines())
    questions = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))

    use_available_cores()
    base = local_folder(args.base or str(args.run_dir / "base"))
    check_base(base)
    form = as_chats(load_tokenizer(base), base)
    model = load_model(base).to(PartialState().device)
    written = greedy_answers(model, form, questions, max_new_tokens=MAX_NEW_TOKENS)
    answered = [(question, whole_sentences(answer)) for question, answer in zip(questions, written, strict=True)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in answered
        if answer
    ]
    if len(rows) < HELD_OUT:
        raise InputError(
            f"{base} answered {len(rows)} of {len(questions)} questions in whole sentences: too few to rehearse."
        )
    heldout = rows[::HELD_OUT]
    write_rows(chat_file(data, GENERAL, heldout=True), heldout)
    write_rows(chat_file(data, GENERAL), [row for row in rows if row not in heldout])
    print(f"{chat_file(data, GENERAL)}: {len(rows) - len(heldout)} of the base's own answers, {len(heldout)} held out")


if __name__ == "__main__":
    run(main)
