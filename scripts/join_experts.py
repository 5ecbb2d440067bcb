# SPDX-License-Identifier: Apache-2.0
"""STEP 3b. Join experts that were instruct-tuned apart: their MLPs side by side, all else averaged, routed as the MoE was.

    python scripts/join_experts.py --run_dir outputs/quickstart
    python scripts/join_experts.py --run_dir outputs/quickstart --average

Reads RUN_DIR/experts-instruct and the router of RUN_DIR/moe, writes RUN_DIR/moe-instruct. It is the mixing of
Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv:2403.07816). With `--average` the MLPs are averaged as well, a model soup
(Wortsman et al. 2022, arXiv:2203.05482): RUN_DIR/average-instruct, a dense model of the base's size to compare with.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig

from finteam_experts import runs
from finteam_experts.errors import InputError, NotFiniteError, run
from finteam_experts.gates import read_gates
from finteam_experts.models import fingerprint, is_model, stored_dtype
from finteam_experts.release import finish_release, released_tensors
from finteam_experts.shards import ShardWriter, StoredTensors, weight_files
from finteam_experts.tasks import SYSTEM_PROMPT, prompting, task_cards

Parts = dict[str, torch.Tensor]  # by name


def joined(experts: list[Parts | StoredTensors], gates: torch.Tensor | None) -> Iterator[Parts]:
    """The joined model's tensors by name, a few at a time; `gates` [layers, experts, hidden] or `None` for the average.

    Raises `InputError` if the experts have not the same tensors.
    """
    names = list(experts[0])
    for expert in experts[1:]:
        if set(expert) != set(names):
            raise InputError(
                f"the experts have different tensors: {sorted(set(expert) ^ set(names))[0]} is not in all."
            )
    for name in names:
        own = [expert[name] for expert in experts]
        if gates is None or ".mlp." not in name:
            yield {name: torch.stack([tensor.float() for tensor in own]).mean(0).to(own[0].dtype)}
        elif name.endswith(".down_proj.weight"):
            yield {name.replace("mlp.down_proj.weight", "mlp.experts.down_proj"): torch.stack(own)}
        elif name.endswith(".gate_proj.weight"):
            pairs = [
                torch.cat([tensor, expert[name.replace("gate_proj", "up_proj")]])
                for tensor, expert in zip(own, experts, strict=True)
            ]
            gate = gates[int(name.split(".")[2])]  # model.layers.N.mlp.gate_proj.weight
            prefix = name.removesuffix("gate_proj.weight")
            yield {f"{prefix}experts.gate_up_proj": torch.stack(pairs), f"{prefix}gate.weight": gate.to(own[0].dtype)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--average", action="store_true", help="average the MLPs too, into a dense model")
    args = parser.parse_args()

    moe = args.run_dir / "moe"
    record = runs.require(moe, "python scripts/merge_moe.py")
    names = [member["name"] for member in record["team"]]
    folders = [args.run_dir / "experts-instruct" / name for name in names]
    for name, folder in zip(names, folders, strict=True):
        tuned = runs.require(folder, f"recipes/instruct_tune.py --start_from expert --role {name}")
        if not is_model(args.run_dir / "experts" / name, tuned["inputs"]["model"]):
            raise InputError(
                f"{folder} was tuned from another expert than {args.run_dir}/experts/{name}. Delete it and tune it again."
            )
    target = args.run_dir / ("average-instruct" if args.average else "moe-instruct")
    gates = None if args.average else read_gates(moe)
    inputs = {
        "experts": {name: fingerprint(folder) for name, folder in zip(names, folders, strict=True)},
        "router": None if args.average else fingerprint(moe),
        "asked": prompting(),
    }
    work = runs.begin(target, "join_experts", inputs)
    if work is None:
        return
    like = folders[0] if args.average else moe
    runs.check_disk_room(
        target,
        sum(
            file.stat().st_size
            for folder in (folders[:1] if args.average else folders)
            for file in weight_files(folder)
        ),
    )
    with contextlib.ExitStack() as stack:
        experts = [stack.enter_context(StoredTensors(weight_files(folder))) for folder in folders]
        dtype = stored_dtype(folders[0])
        shapes = [{name: expert.meta(name, dtype) for name in expert} for expert in experts]
        layout = {
            name: tensor.to("meta")
            for part in joined(shapes, gates)
            for name, tensor in released_tensors(part).items()
        }
        writer = ShardWriter(work, layout)
        for part in tqdm(joined(experts, gates), desc="joining", leave=False):
            for name, tensor in released_tensors(part).items():
                if not tensor.isfinite().all():
                    raise NotFiniteError(
                        f"{name} of the joined model is not finite: look at the experts' training logs."
                    )
                if writer.missing(name):
                    writer.write(name, tensor)
        writer.finish()
    finish_release(AutoConfig.from_pretrained(like), like, work)
    about = {"system_prompt": SYSTEM_PROMPT, "tasks": task_cards()}
    runs.finish(target, about if args.average else about | {"team": record["team"]})
    print(
        f"{target}: {len(names)} experts, "
        + ("averaged" if args.average else "side by side, routed as in " + str(moe))
    )


if __name__ == "__main__":
    run(main)
