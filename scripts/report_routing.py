# SPDX-License-Identifier: Apache-2.0
"""STEP 2c. Report what the router does with held-out text, and what the merge is worth before any tuning.

    python scripts/report_routing.py --run_dir outputs/quickstart

For the gates of the merge, random gates and the fitted ones: how many tokens and passages of each role go to their own
analyst, layer by layer. Beside it the ladder: held-out loss of the base, every expert, the weight average of the
experts, and the MoE with each router. Writes RUN_DIR/reports/routing.json and routing.png.
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
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from finteam_experts import runs
from finteam_experts.batches import encode
from finteam_experts.data import corpus_file, evenly_spread, read_corpus
from finteam_experts.errors import InputError, read_json, run
from finteam_experts.gates import GATES, get_gates, load_gates, random_gates, set_gates
from finteam_experts.models import fingerprint, load_model, load_tokenizer, local_folder, weight_average
from finteam_experts.perplexity import heldout_loss
from finteam_experts.routing import Routing, measure_routing

AVERAGE, ORACLE = "weight average", "oracle: own expert"


def expert_folders(run_dir: Path, base: Path, names: list[str]) -> dict[str, Path]:
    """The dense expert of each role; a generalist's is the base."""
    folders = {name: run_dir / "experts" / name for name in names}
    return {name: folder if folder.is_dir() else base for name, folder in folders.items()}


def dense_ladder(
    run_dir: Path, base: Path, names: list[str], tokenizer: PreTrainedTokenizerBase, passages: dict, max_tokens: int
) -> dict[str, dict[str, float]]:
    """Held-out loss of every role for the base, each expert, their weight average, and each role's own expert."""
    device = PartialState().device

    def losses(title: str, model: torch.nn.Module) -> dict[str, float]:
        print(f"Held-out loss: {title}")
        return {role: heldout_loss(model, tokenizer, own, max_tokens=max_tokens) for role, own in passages.items()}

    folders = expert_folders(run_dir, base, names)
    ladder = {"base": losses("base", load_model(base).to(device))}
    for name, folder in folders.items():
        if folder != base:
            ladder[f"expert: {name}"] = losses(f"expert {name}", load_model(folder).to(device))
    ladder[AVERAGE] = losses(AVERAGE, weight_average(list(folders.values())).to(device))
    # through its own expert alone a token sees exactly that dense expert: attention is the base's in both
    ladder[ORACLE] = {name: ladder.get(f"expert: {name}", ladder["base"])[name] for name in names}
    return ladder


def print_report(report: dict[str, Any]) -> None:
    """Print the routing of every gate and the ladder of held-out losses."""
    table = Table(title=f"Routing of held-out text ({report['passages']} passages, {report['tokens']} tokens)")
    columns = ("tokens to own analyst", "passages", "mean own weight", "load entropy (lowest)", "dead experts")
    for column in ("gates", *columns):
        table.add_column(column, justify="left" if column == "gates" else "right")
    for name, part in report["gates"].items():
        s = part["summary"]
        entropy = f"{s['load_entropy']:.3f} ({s['lowest_load_entropy']:.3f})"
        shares = [f"{s[key]:.3f}" for key in ("own_role_tokens", "own_role_passages", "own_role_weight")]
        table.add_row(name, *shares, entropy, str(s["dead_experts"]))
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    table = Table(title="Held-out loss in nats a token (perplexity)")
    table.add_column("model")
    for role in (*report["roles"], "mean", "above oracle"):
        table.add_column(role, justify="right")
    oracle = np.mean(list(report["ladder"][ORACLE].values()))
    for name, losses in report["ladder"].items():
        mean = np.mean(list(losses.values()))
        cells = [f"{loss:.3f} ({math.exp(loss):.1f})" for loss in losses.values()]
        table.add_row(name, *cells, f"{mean:.3f}", f"{mean / oracle - 1:+.1%}")
    console.print(table)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw, for every router: own-role share by layer and role, load by layer, and the confusion of roles."""
    gates, roles = report["gates"], report["roles"]
    figure, axes = plt.subplots(
        3, len(gates), figsize=(4.2 * len(gates), 9), layout="constrained", squeeze=False, height_ratios=(2, 2, 3)
    )
    for column, (name, part) in enumerate(gates.items()):
        own = np.array(part["own_role_tokens"]).T  # [roles, layers]
        top, middle, bottom = axes[:, column]
        image = top.imshow(own, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        top.set(
            title=f"{name}\n{part['summary']['own_role_tokens']:.0%} of tokens to their own analyst", xlabel="layer"
        )
        top.set_yticks(range(len(roles)), [f"text of {role}" for role in roles])
        load = np.array(part["load"])
        middle.stackplot(range(len(load)), load.T, labels=roles, colors=report["colors"])
        middle.set(xlabel="layer", ylabel="share of tokens", ylim=(0, 1), xlim=(0, len(load) - 1), title="load")
        confusion = np.array(part["confusion"])
        bottom.imshow(confusion, vmin=0, vmax=1, cmap="viridis")
        bottom.set_xticks(range(len(roles)), roles)
        bottom.set_yticks(range(len(roles)), [f"text of {role}" for role in roles])
        bottom.set(title="who gets whose tokens", xlabel="analyst")
        for (row, analyst), share in np.ndenumerate(confusion):
            color = "white" if share < 0.6 else "black"
            bottom.text(analyst, row, f"{share:.2f}", ha="center", va="center", color=color)
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
    parser.add_argument("--passages", type=int, default=16, help="held-out passages a role")
    parser.add_argument("--max_tokens", type=int, default=160, help="tokens of each passage")
    parser.add_argument("--name", default="routing", help="writes RUN_DIR/reports/NAME.json and NAME.png")
    args = parser.parse_args()
    if args.passages < 2 or args.max_tokens < 2:
        raise InputError("--passages and --max_tokens must be 2 or more.")

    use_available_cores()
    moe, data = args.run_dir / "moe", args.data_dir or args.run_dir / "data"
    record = runs.require(moe, "python scripts/merge_moe.py")
    base = local_folder(args.base or str(args.run_dir / "base"))
    names = [member["name"] for member in record["team"]]
    folders = {"moe": moe} | ({"moe-instruct": args.run_dir / "moe-instruct"} if args.tuned else {})
    for folder in folders.values():
        runs.require(folder, "scripts/merge_moe.py or recipes/instruct_tune.py, as the name says")
    passages = {name: evenly_spread(read_corpus(data, name, heldout=True), args.passages) for name in names}

    target = args.run_dir / "reports" / f"{args.name}.json"
    inputs = {
        "models": {name: fingerprint(folder) for name, folder in folders.items()},
        "dense": {
            name: fingerprint(folder)
            for name, folder in {"base": base, **expert_folders(args.run_dir, base, names)}.items()
        },
        "gates": {file.stem: runs.file_hash(file) for file in sorted((moe / GATES).glob("*.safetensors"))},
        "corpora": {name: runs.file_hash(corpus_file(data, name, heldout=True)) for name in names},
        "settings": {"passages": args.passages, "max_tokens": args.max_tokens},
    }
    work = runs.begin(target, "report_routing", inputs)
    if work is None:
        return
    tokenizer = load_tokenizer(moe)
    sequences = [encode(tokenizer, passages[name], args.max_tokens) for name in names]
    for name, own in zip(names, sequences, strict=True):
        if not own:
            raise InputError(
                f"{corpus_file(data, name, heldout=True)}: its passages are of one token or none, of which there is no loss. Add "
                "longer ones."
            )
    part = work / "dense.json"
    if not part.exists():
        runs.write_json(part, dense_ladder(args.run_dir, base, names, tokenizer, passages, args.max_tokens))
    ladder = read_json(part)

    gates: dict[str, Routing] = {}
    for folder_name, folder in folders.items():
        model = load_model(folder).to(PartialState().device)
        own = get_gates(model)
        if folder_name == "moe":
            merged = record["inputs"]["merge"]["gate_mode"]
            routers = {merged: load_gates(moe, merged), "random": random_gates(own.shape, seed=0)}
            if record["router"]["kind"] == "fitted":
                routers["fitted"] = own
        else:
            routers = {"tuned": own}
        for name, weights in routers.items():
            print(f"Routing: {folder_name}, {name} router")
            set_gates(model, weights)
            gates[name] = measure_routing(model, tokenizer, sequences)
            ladder[f"{folder_name}, {name} router"] = dict(zip(names, gates[name].loss(), strict=True))
        del model
    report = {
        "roles": names,
        "colors": [member["color"] for member in record["team"]],
        "passages": sum(map(len, passages.values())),
        "tokens": int(next(iter(gates.values())).tokens.sum()),
        "gates": {name: {"summary": routing.summary(), **routing.details()} for name, routing in gates.items()},
        "ladder": {name: losses for name, losses in ladder.items() if name != ORACLE} | {ORACLE: ladder[ORACLE]},
    }
    plot(report, target.with_suffix(".png"))
    runs.finish_report(target, report)
    print_report(report)
    print(f"Written to {target} and {target.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
