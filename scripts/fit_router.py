# SPDX-License-Identifier: Apache-2.0
"""STEP 2b. Fit the router of the merged MoE in closed form to what its gates read: a minute on 2 cores at 135M.

    python scripts/fit_router.py --run_dir outputs/quickstart
    python scripts/fit_router.py --run_dir outputs/quickstart --model moe-instruct --chat_share 0.5

Reads RUN_DIR/moe and RUN_DIR/data: each role's corpus, as plain text and in the chat format, with the task questions
that the role owns. Replaces the gates in RUN_DIR/moe and nothing else; the merge's own gates stay in RUN_DIR/moe/gates.
Writes the sums that the fit needs of each analyst to RUN_DIR/moe/router_sums: with them scripts/change_team.py can add and
remove analysts, and needs nobody's text again.
The method and its sources: src/finteam_experts/merging/router.py.
"""

import argparse
from pathlib import Path

from finteam_experts.threads import use_available_cores  # before torch

from accelerate import PartialState
from safetensors.torch import save_file

from finteam_experts import runs
from finteam_experts.data.calibration import CHAT_SHARE, GENERAL_SHARE, general_text, role_text
from finteam_experts.data.conversations import GENERAL, chat_file, chat_roles, check_chat_roles
from finteam_experts.data.files import check_roles, corpus_file, task_file, tasks_of
from finteam_experts.data.tasks import prompting
from finteam_experts.errors import InputError, check_number, run
from finteam_experts.files import check_disk_room, file_hash
from finteam_experts.fingerprints import PARTS, expert_fingerprint, fingerprint, trunk_fingerprint
from finteam_experts.merging.config import BASE
from finteam_experts.merging.gates import GATES, write_gates
from finteam_experts.merging.router import fit, team_sums
from finteam_experts.merging.sums import FEWEST_TOKENS, RIDGE, TOKENS_PER_ROLE, save_sums, sums_file
from finteam_experts.models import as_chats, load_model, load_tokenizer, read_config, reading_dtype
from finteam_experts.training.experts import split_on_cpu
from finteam_experts.weights import weight_files


def check_experts(moe: Path, record: dict) -> dict[str, str]:
    """The fingerprints of the MoE's experts by name; `InputError` unless they are those of its record."""
    names = [member["name"] for member in record["team"]]
    if (count := read_config(moe).num_local_experts) != len(names):
        raise InputError(f"{moe} has {count} experts, but its {runs.RECORD} names {len(names)}: {', '.join(names)}.")
    found = {name: expert_fingerprint(moe, place) for place, name in enumerate(names)}
    recorded = {name: about["fingerprint"] for name, about in record.get("experts", {}).items()}
    for name, own in found.items():
        if recorded.get(name, own) != own:
            same = " or ".join(other for other, known in recorded.items() if known == own) or "no expert"
            raise InputError(
                f"{moe}/{runs.RECORD} gives '{name}' another expert than the weights at its place, which are those of {same} that "
                "it knows. One of them was changed by hand: put it back."
            )
    return found


def is_fitted(moe: Path, record: dict, inputs: dict, *, overwrite: bool) -> bool:
    """Whether the MoE has the router of these inputs; `InputError` if it has another fitted one that is not to be replaced."""
    router = record.get("router", {})
    if router.get("kind") != "fitted" or runs.is_unfinished(record) or overwrite:
        return False
    recorded, now = ({"weights": router.get("weights")}, fingerprint(moe, ("weights",)))
    runs.check_same_inputs(
        f"{moe}'s router", recorded | router["inputs"], now | inputs, "Pass --overwrite to fit it again."
    )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--data_dir", type=Path, help="data directory (default: RUN_DIR/data)")
    parser.add_argument("--model", choices=("moe", "moe-instruct"), default="moe", help="whose router")
    parser.add_argument("--tokens_per_role", type=int, default=TOKENS_PER_ROLE, help="calibration tokens of each role")
    parser.add_argument("--chat_share", type=float, default=CHAT_SHARE,
                        help="share of them in the chat format: more for a team that answers tasks")  # fmt: skip
    parser.add_argument("--ridge", type=float, default=RIDGE, help="penalty, as a share of the mean diagonal of X'X")
    parser.add_argument(
        "--scale", type=float, help="how sharply the gates mix (default: by the held-back text's loss)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which passages are drawn")
    parser.add_argument("--overwrite", action="store_true", help="replace a router fitted with other settings")
    args = parser.parse_args()
    check_number("--tokens_per_role", args.tokens_per_role, least=FEWEST_TOKENS)
    check_number("--chat_share", args.chat_share, least=0, most=1)
    check_number("--ridge", args.ridge, above=0)
    check_number("--scale", args.scale, above=0)  # at 0 all experts count alike, below it the wrong ones count most

    use_available_cores()
    moe, data, merged = args.run_dir / args.model, args.data_dir or args.run_dir / "data", args.model == "moe"
    made_by = "python scripts/merge_moe.py" if merged else "recipes/instruct_tune.py"
    record = runs.require(moe, made_by, unfinished=True)
    names = [member["name"] for member in record["team"]]
    check_roles(data, tasks_of(data), names)
    check_chat_roles(data, names)
    experts = check_experts(moe, record)
    tokenizer = load_tokenizer(moe)
    form = as_chats(tokenizer, moe)
    text = [role_text(data, name, form, args.tokens_per_role, args.seed, args.chat_share) for name in names]
    tasks = {name: task for name, task in tasks_of(data).items() if task.role in names}
    # a generalist gets the general text, which is no analyst's otherwise
    general = [] if BASE in names else general_text(data, form, round(GENERAL_SHARE * args.tokens_per_role))
    talkers = {name: file_hash(chat_file(data, name)) for name in (*names, GENERAL) if name in chat_roles(data)}
    settings = {key: getattr(args, key) for key in ("tokens_per_role", "chat_share", "ridge", "seed")}
    inputs = {
        "model": fingerprint(moe, PARTS[1:]),
        "corpora": {name: file_hash(corpus_file(data, name)) for name in names},
        "tasks": {name: file_hash(task_file(data, name, "train")) for name in tasks},
        "asked": prompting(tasks),
        **({"chats": talkers} if talkers else {}),
        "settings": settings | ({} if args.scale is None else {"scale": args.scale}),
    }
    if is_fitted(moe, record, inputs, overwrite=args.overwrite):
        print(f"{moe} has its fitted router: skipped")
        return

    device = PartialState().device
    model = load_model(moe, reading_dtype(device)).to(device)  # bfloat16 takes half as long, and the gates are as good
    split_on_cpu(model)
    trunk = trunk_fingerprint(moe)
    passages = [own for own, _ in text]
    sums = team_sums(
        model, tokenizer, passages, general, args.ridge, trunk=trunk, experts=[experts[name] for name in names]
    )
    gates, results = fit(model, tokenizer, sums, [held_back for _, held_back in text], args.ridge, args.scale)
    del model  # room for the files below

    check_disk_room(moe, max(file.stat().st_size for file in weight_files(moe)))
    record["router"] = {"kind": "fitted", "ridge": args.ridge, "inputs": inputs, "results": results}
    advice = f"its router was being replaced when that was interrupted. Run again: scripts/fit_router.py --model {args.model}"
    with runs.changed_in_place(moe, record, advice):
        write_gates(moe, gates)
        for name, own in zip(names, sums, strict=True):
            save_sums(own, sums_file(moe, name))
        if merged:  # beside those it was merged with
            (moe / GATES).mkdir(exist_ok=True)  # a team that has changed has none
            save_file({"gates": gates}, moe / GATES / "fitted.safetensors")
        record["router"] |= fingerprint(moe, ("weights",))  # of the model with these gates
    read = {name: sum(len(part.ids) for part in own) for name, (own, _) in zip(names, text, strict=True)}
    tokens = ", ".join(f"{n} tokens of {name}" for name, n in read.items())
    print(f"{moe}: router fitted on {tokens}; scale {results['scale']:g}")
    if few := [name for name, n in read.items() if n < args.tokens_per_role]:
        print(
            f"The data has no more than that of {', '.join(few)}: --tokens_per_role asked for {args.tokens_per_role}"
        )


if __name__ == "__main__":
    run(main)
