# SPDX-License-Identifier: Apache-2.0
"""STEP 2c. Report what the router does with held-out text, and what the merge is worth before any tuning.

    python scripts/report_routing.py --run_dir outputs/quickstart

For the gates of the merge, random gates and the fitted ones: how many tokens and passages of each role go to their own
analyst, layer by layer. Beside it, the held-out loss of the base, every expert, the weight average of the experts, and the
MoE with each router. Writes RUN_DIR/reports/routing.json and routing.png.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from finteam_experts.threads import use_available_cores  # before torch

import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import PartialState
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from finteam_experts import files, runs
from finteam_experts.chats import SPANS
from finteam_experts.data.conversations import chat_file, chat_roles, read_chats
from finteam_experts.data.files import corpus_file, evenly_spread, read_corpus, read_task, task_file, tasks_of
from finteam_experts.data.tasks import prompting, render_all
from finteam_experts.errors import InputError, check_number, run
from finteam_experts.evaluation.batches import encode
from finteam_experts.evaluation.heldout import heldout_loss
from finteam_experts.evaluation.routing import measure_routing
from finteam_experts.fingerprints import fingerprint
from finteam_experts.merging.config import BASE
from finteam_experts.merging.gates import GATES, forced_expert, get_gates, load_gates, random_gates, set_gates
from finteam_experts.models import as_chats, load_model, load_tokenizer, local_folder
from finteam_experts.screen import screen
from finteam_experts.training.experts import split_on_cpu

AVERAGE, ORACLE = "weight average", "oracle: own expert"
Losses = dict[str, dict[str, float]]  # by model, then by role


def dense_losses(
    moe: Path, base: Path, names: list[str], tokenizer: PreTrainedTokenizerBase, passages: dict, max_tokens: int
) -> Losses:
    """Held-out loss of every role for the base, each expert of the MoE, their weight average, and each role's own expert.

    Through one expert alone the MoE is that dense expert: all else in it is the trunk's.
    """
    device = PartialState().device

    def losses(title: str, model: torch.nn.Module) -> dict[str, float]:
        print(f"Held-out loss: {title}")
        return {role: heldout_loss(model, tokenizer, own, max_tokens=max_tokens) for role, own in passages.items()}

    found = {"base": losses("base", load_model(base).to(device))}
    model = load_model(moe).to(device)
    # of all experts of a layer, which share their memory with the model's once these are split
    fused = [matrix.data for name, matrix in model.named_parameters() if ".experts." in name]
    split_on_cpu(model)
    own = {}
    for place, name in enumerate(names):
        with forced_expert(model, place):
            of_expert = losses(f"expert {name}", model)
        own[name] = of_expert[name]
        if name != BASE:
            found[f"expert: {name}"] = of_expert
    for matrices in fused:
        matrices[0] = matrices.mean(0)
    with forced_expert(model, 0):
        found[AVERAGE] = losses(AVERAGE, model)
    return found | {ORACLE: own}


def print_report(report: dict[str, Any]) -> None:
    """Print the routing of every gate and the held-out losses."""
    console = screen(140)
    table = Table(
        "gates", title=f"Routing of held-out text ({report['passages']} passages, {report['tokens']} tokens)"
    )
    columns = (
        "tokens to own analyst",
        "of passage, question, answer",
        "passages",
        "load entropy (lowest)",
        "dead experts",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for name, part in report["gates"].items():
        s = part["summary"]
        entropy = f"{s['load_entropy']:.3f} ({s['lowest_load_entropy']:.3f})"
        spans = " ".join(f"{s[f'own_role_{span}']:.2f}" for span in SPANS if f"own_role_{span}" in s)
        shares = [f"{s['own_role_tokens']:.3f}", spans, f"{s['own_role_passages']:.3f}"]
        table.add_row(name, *shares, entropy, str(s["dead_experts"]))
    console.print(table)
    table = Table("model", title="Held-out loss in nats per token (perplexity)")
    for column in (*report["roles"], "mean", "above oracle"):
        table.add_column(column, justify="right")
    oracle = np.mean(list(report["ladder"][ORACLE].values()))
    for name, losses in report["ladder"].items():
        mean = np.mean(list(losses.values()))
        cells = [f"{loss:.3f} ({math.exp(loss):.1f})" for loss in losses.values()]
        table.add_row(name, *cells, f"{mean:.3f}", f"{mean / oracle - 1:+.1%}")
    console.print(table)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw, for every router: own-role share by layer and role, load by layer, and the confusion of roles.

    All routers are drawn on passages, the last one on conversations and task prompts as well.
    """
    *_, last = (name for name in report["gates"] if ", " not in name)
    gates = {name: part for name, part in report["gates"].items() if ", " not in name or name.startswith(last)}
    roles, texts = report["roles"], [f"text of {role}" for role in report["roles"]]
    figure, axes = plt.subplots(
        3, len(gates), figsize=(4.2 * len(gates), 9), layout="constrained", squeeze=False, height_ratios=(2, 2, 3)
    )
    for (top, middle, bottom), (name, part) in zip(axes.T, gates.items(), strict=True):
        own = np.array(part["own_role_tokens"]).T  # [roles, layers]
        share = part["summary"]["own_role_tokens"]
        image = top.imshow(own, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        top.set(title=f"{name}\n{share:.0%} of tokens to their own analyst", xlabel="layer")
        top.set_yticks(range(len(roles)), texts)
        load = np.array(part["load"])
        middle.stackplot(range(len(load)), load.T, labels=roles, colors=report["colors"])
        middle.set(xlabel="layer", ylabel="share of tokens", ylim=(0, 1), xlim=(0, len(load) - 1), title="load")
        confusion = np.array(part["confusion"])
        bottom.imshow(confusion, vmin=0, vmax=1, cmap="viridis")
        bottom.set_xticks(range(len(roles)), roles)
        bottom.set_yticks(range(len(roles)), texts)
        bottom.set(title="who gets whose tokens", xlabel="analyst")
        for (row, analyst), value in np.ndenumerate(confusion):
            if not confusion[row].any():  # no text of that role
                continue
            color = "white" if value < 0.6 else "black"
            bottom.text(analyst, row, f"{value:.2f}", ha="center", va="center", color=color)
    axes[1, 0].legend(loc="lower left", fontsize="small")
    figure.colorbar(image, ax=axes[0], label="share of tokens")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--data_dir", type=Path, help="data directory (default: RUN_DIR/data)")
    parser.add_argument("--base", help="dense base: Hub id or folder (default: RUN_DIR/base)")
    parser.add_argument("--tuned", action="store_true", help="report RUN_DIR/moe-instruct beside the merge as well")
    parser.add_argument(
        "--passages", type=int, default=16, help="held-out passages per role, and task prompts per task"
    )
    parser.add_argument("--chats", type=int, default=20, help="held-out conversations per role")
    parser.add_argument("--max_tokens", type=int, default=160, help="tokens of each passage")
    parser.add_argument("--name", default="routing", help="writes RUN_DIR/reports/NAME.json and NAME.png")
    args = parser.parse_args()
    for name in ("passages", "chats", "max_tokens"):
        check_number(f"--{name}", getattr(args, name), least=2)

    use_available_cores()
    data, target = args.data_dir or args.run_dir / "data", args.run_dir / "reports" / f"{args.name}.json"
    folders = {name: args.run_dir / name for name in ("moe", *(["moe-instruct"] if args.tuned else []))}
    records = {
        name: runs.require(folder, "scripts/merge_moe.py or recipes/instruct_tune.py, as the name says")
        for name, folder in folders.items()
    }
    team, moe = records["moe"]["team"], folders["moe"]
    names = [member["name"] for member in team]
    base = local_folder(args.base or str(args.run_dir / "base"))
    passages = {name: evenly_spread(read_corpus(data, name, heldout=True), args.passages) for name in names}
    talkers = [name for name in names if name in chat_roles(data, heldout=True)]
    chats = {name: evenly_spread(read_chats(data, name, heldout=True), args.chats) for name in talkers}
    tasks, asked = tasks_of(data), {name: [] for name in names}
    for task in tasks.values():
        if task.role in names:
            rows = evenly_spread(read_task(data, task, "test"), args.passages)
            labels = [row["label"] for row in rows]
            asked[task.role] += zip(render_all(task, rows, load_tokenizer(moe)), labels, strict=True)
    inputs = {
        "models": {name: fingerprint(folder) for name, folder in folders.items()},
        "dense": {"base": fingerprint(base)},
        "gates": {file.stem: files.file_hash(file) for file in sorted((moe / GATES).glob("*.safetensors"))},
        "corpora": {name: files.file_hash(corpus_file(data, name, heldout=True)) for name in names},
        "tasks": {name: files.file_hash(task_file(data, name, "test")) for name in tasks},
        "asked": prompting(tasks),
        "settings": {"passages": args.passages, "chats": args.chats, "max_tokens": args.max_tokens},
    }
    if chats:
        inputs["chats"] = {name: files.file_hash(chat_file(data, name, heldout=True)) for name in talkers}
    if runs.begin(target, "report_routing", inputs) is None:
        return

    tokenizer = load_tokenizer(moe)
    form = as_chats(tokenizer, moe)
    sequences = [encode(tokenizer, passages[name], args.max_tokens) for name in names]
    for name, own in zip(names, sequences, strict=True):
        if not own:
            found = f"{corpus_file(data, name, heldout=True)}: its passages are of one token or none"
            raise InputError(f"{found}, of which there is no loss. Add longer ones.")
    talks = {"conversations": [form.exchanges(chats.get(name, [])) for name in names]}
    talks["task prompts"] = [form.exchanges(asked[name]) for name in names]
    talks = {what: exchanges for what, exchanges in talks.items() if any(exchanges)}
    for what, exchanges in talks.items():
        if silent := [name for name, own in zip(names, exchanges, strict=True) if not own]:
            print(f"{data} has no held-out {what} of {', '.join(silent)}: measured on those of the others")
    ladder = dense_losses(moe, base, names, tokenizer, passages, args.max_tokens)
    oracle = ladder.pop(ORACLE)

    gates = {}
    for folder_name, folder in folders.items():
        model = load_model(folder).to(PartialState().device)
        split_on_cpu(model)
        routers = {"tuned": get_gates(model)}
        if folder_name == "moe":
            own = routers.pop("tuned")
            # a team that has changed was not merged as it is now, and has no gates of a merge
            merged = records["moe"]["inputs"].get("merge", {}).get("gate_mode")
            routers = {merged: load_gates(moe, merged)} if merged else {}
            routers.setdefault("random", random_gates(own.shape, seed=0))
            if (
                records["moe"].get("router", {}).get("kind") != merged
            ):  # fitted to text here, or to the sums that analysts brought
                routers["fitted"] = own
        for name, weights in routers.items():
            print(f"Routing: {folder_name}, {name} router")
            set_gates(model, weights)
            gates[name] = measure_routing(model, tokenizer, sequences)
            for what, exchanges in talks.items() if name != "random" else ():
                ids, spans = ([[getattr(e, part) for e in own] for own in exchanges] for part in ("ids", "spans"))
                gates[f"{name}, {what}"] = measure_routing(model, tokenizer, ids, losses=False, spans=spans)
            ladder[f"{folder_name}, {name} router"] = dict(zip(names, gates[name].loss(), strict=True))
        del model

    report = {
        "roles": names,
        "colors": [member["color"] for member in team],
        "passages": sum(map(len, passages.values())),
        "tokens": int(next(iter(gates.values())).tokens.sum()),
        "gates": {name: {"summary": routing.summary(), **routing.details()} for name, routing in gates.items()},
        "ladder": ladder | {ORACLE: oracle},
    }
    plot(report, target.with_suffix(".png"))
    runs.finish_report(target, report)
    print_report(report)
    print(f"Written to {target} and {target.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
