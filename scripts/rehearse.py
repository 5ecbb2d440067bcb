# SPDX-License-Identifier: Apache-2.0
"""Let the base answer general questions itself, so that its tuning on finance does not make it forget how to.

    python scripts/rehearse.py --run_dir outputs/quickstart

Writes chats/general.jsonl and chats/general_heldout.jsonl into the data directory: conversations that belong to no analyst. A
model that is tuned on its own earlier answers forgets less (self-synthesised rehearsal: Huang et al. 2024, arXiv:2403.01244).
The questions are the package's, or lines of `--questions`. Where the directory has general conversations already, held-out ones among them, they stay.
"""

import argparse
from itertools import pairwise
from pathlib import Path

from finteam_experts.threads import use_available_cores  # before torch

import regex
from accelerate import PartialState

from finteam_experts.data import sample
from finteam_experts.data.conversations import GENERAL, chat_file, conversation_of
from finteam_experts.data.files import write_rows
from finteam_experts.data.leaks import ScoredTexts
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.answers import greedy_answers
from finteam_experts.files import read_text
from finteam_experts.models import as_chats, check_base, load_model, load_tokenizer, local_folder

QUESTIONS = Path(sample.__file__).parent / "knowledge/general.txt"
MAX_NEW_TOKENS = 72
HELD_OUT = 5  # every fifth conversation
UNMARKED = regex.compile(r"[\p{Thai}\p{Lao}]")  # scripts that part sentences with a space alone
_CLOSED = r"[\p{Pe}\p{Pf}\"'*]*"
# The mark of any script that ends a sentence, with what closes a quotation. A full stop inside a number or a name ends none, and
# neither does one behind the number of a list's item.
SENTENCE_END = regex.compile(
    rf"(?<!(?:^|\n|\p{{STerm}}{_CLOSED}\s+)[\s*#]*\d{{1,2}})(?:\p{{STerm}}|…)+{_CLOSED}(?=\s|$|(?<=[。！？｡]{_CLOSED}))"
    r"|(?<=[\p{Thai}\p{Lao}])(?=\s)"
)


def whole_sentences(answer: str, *, ended: bool = False) -> str:
    """The answer up to its last complete sentence, or nothing if it has none or repeats one.

    `ended` tells that the model ended the answer itself: in scripts without a mark for it the last sentence is complete then.
    """
    text = answer.strip()
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if ended and UNMARKED.search(text):
        ends.append(len(text))
    sentences = [text[start:end].strip() for start, end in pairwise([0, *ends])]
    return text[: ends[-1]] if ends and len(set(sentences)) == len(sentences) else ""


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
    rows = []
    for question, answer in zip(questions, written, strict=True):
        ended = len(form.tokenizer(answer, add_special_tokens=False)["input_ids"]) < MAX_NEW_TOKENS
        if answer := whole_sentences(answer, ended=ended):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": turns})
    if len(rows) < HELD_OUT:
        raise InputError(
            f"{base} answered {len(rows)} of {len(questions)} questions in whole sentences: too few to rehearse."
        )
    heldout_file = chat_file(data, GENERAL, heldout=True)
    if heldout_file.is_file():
        print(f"{heldout_file} exists: kept")
    else:
        write_rows(heldout_file, rows[::HELD_OUT])
    scored = ScoredTexts(data)
    trained = [row for row in rows if not scored.find_conversation(*conversation_of(row["messages"], "an answer"))]
    write_rows(chat_file(data, GENERAL), trained)
    held = f"{len(rows) - len(trained)} held out, since they are in a scored file"
    print(f"{chat_file(data, GENERAL)}: {len(trained)} of the base's own answers, {held}")


if __name__ == "__main__":
    run(main)
