# SPDX-License-Identifier: Apache-2.0
"""STEP 2. Merge each role's LoRA into a dense expert, and assemble the experts into one MoE.

    python scripts/merge_moe.py --run_dir outputs/quickstart

Reads RUN_DIR/adapters and moe_merge.yaml, writes RUN_DIR/experts/ROLE and RUN_DIR/moe. An expert that someone has handed over
as RUN_DIR/experts/ROLE needs no adapter. The router starts from the hidden states of the prompts in moe_merge.yaml;
scripts/fit_router.py fits it next. Where every expert has brought its router sums, --from_sums computes the router from
these, and nobody's text is needed.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from finteam_experts import runs
from finteam_experts.data.tasks import SYSTEM_PROMPT
from finteam_experts.errors import InputError, check_number, run
from finteam_experts.families import family_of
from finteam_experts.files import check_disk_room, file_hash
from finteam_experts.fingerprints import expert_fingerprint, fingerprint, trunk_fingerprint
from finteam_experts.merging.config import read_merge_config, roles, trained_roles
from finteam_experts.merging.gates import GATES
from finteam_experts.merging.lora import check_adapter, dense_expert
from finteam_experts.merging.moe import Expert, check_expert, prompt_gates, write_moe
from finteam_experts.merging.router import FIRST_SCALE
from finteam_experts.merging.sums import (
    RIDGE,
    SUMS,
    check_sums,
    load_sums,
    save_sums,
    solve_gates,
    sums_file,
)
from finteam_experts.models import ADAPTER_FILE, check_base, local_folder, stored_dtype
from finteam_experts.roles import team_card
from finteam_experts.weights import size_of

MERGE_FILE = Path(__file__).parents[1] / "moe_merge.yaml"


def check_unchanged(moe: Path) -> None:
    """Raise `InputError` if the team in `moe` has changed since it was merged: another merge would undo that."""
    if not (moe / runs.RECORD).is_file():
        return
    record = runs.read_record(moe)
    if record["step"] == "change_team":
        ((kind, role),) = record["inputs"]["change"].items()
        raise InputError(
            f"{moe} was changed after its merge, last by change_team.py {kind} {role}. Merging again would undo that, and delete "
            f"router sums that can't be made again without their owners' text. If you want that, rename or delete {moe} first."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--base", help="dense base: Hub id or folder (default: RUN_DIR/base)")
    parser.add_argument("--merge_config", type=Path, default=MERGE_FILE, help="the team")
    parser.add_argument("--experts_per_token", type=int, metavar="N", help="another number than the team's file has")
    parser.add_argument("--from_sums", action="store_true",
                        help="compute the router from the sums that every expert brings (scripts/router_sums.py)")  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace experts and an MoE that were merged otherwise"
    )
    args = parser.parse_args()

    config = read_merge_config(args.merge_config)
    names, trained = roles(config), trained_roles(config)
    check_number("--experts_per_token", args.experts_per_token, least=1, most=len(names))
    if args.experts_per_token is not None:
        config = config.model_copy(update={"experts_per_token": args.experts_per_token})
    target = args.run_dir / "moe"
    check_unchanged(target)
    base = local_folder(args.base or str(args.run_dir / "base"))
    if config.dtype == "float16" and stored_dtype(base) is not torch.float16:
        raise InputError(
            f"{args.merge_config}: dtype is float16, and the base's is another: rounded twice, experts couldn't be told apart. "
            "Choose bfloat16 or float32."
        )
    base_config, known_base = check_base(base), fingerprint(base)
    experts = {role: args.run_dir / "experts" / role for role in trained}
    adapters = {role: args.run_dir / "adapters" / role for role in trained}
    handed_over = [
        role
        for role in trained
        if experts[role].is_dir() and not adapters[role].exists() and not runs.work_folder(adapters[role]).exists()
    ]
    trunk = trunk_fingerprint(base) if handed_over or args.from_sums else ""
    for role in trained:
        if role in handed_over:
            check_expert(experts[role], base, trunk)
            print(f"{experts[role]} has no adapter in {args.run_dir}: it is taken as it was handed over")
        else:
            check_adapter(adapters[role], role, base, known_base)
    if not target.exists():
        missing = [role for role in trained if not experts[role].exists()]
        check_disk_room(args.run_dir, size_of(base) * (len(missing) + len(names)))

    from_adapters = {role: file_hash(adapters[role] / ADAPTER_FILE) for role in trained if role not in handed_over}
    for role in from_adapters:
        dense_expert(base, known_base, adapters[role], experts[role], overwrite=args.overwrite)
    inputs = {
        "base": known_base,
        "team": names,
        "adapters": from_adapters,
        "merge": config.model_dump(mode="json", exclude_none=True, exclude={"base_model"}),
    }
    if handed_over:
        inputs["experts"] = {role: fingerprint(experts[role], ["weights"]) for role in handed_over}
    brought = {name: args.run_dir / "experts" / name / SUMS for name in names} if args.from_sums else {}
    if missing := [f"{name} ({path})" for name, path in brought.items() if not path.is_file()]:
        raise InputError(
            f"--from_sums: no router sums of {', '.join(missing)}. Their owners compute them: scripts/router_sums.py --role ROLE"
        )
    if brought:
        inputs["sums"] = {name: file_hash(path) for name, path in brought.items()}
    work = runs.begin(target, "merge_moe", inputs, overwrite=args.overwrite)
    if work is None:
        return

    moe_config = family_of(base_config).moe_config(base_config, len(names), config.experts_per_token)
    moe_config.dtype = getattr(torch, config.dtype) if config.dtype else stored_dtype(base)
    folders = {name: experts.get(name, base) for name in names}
    about = {
        name: {"fingerprint": expert_fingerprint(folder), "adapter": from_adapters.get(name)}
        for name, folder in folders.items()
    }
    router: dict[str, object] = {"kind": config.gate_mode}
    gates = merged_gates = prompt_gates(config, base)
    if brought:
        sums = {name: load_sums(path) for name, path in brought.items()}
        for name, path in brought.items():
            check_sums(sums[name], path, sums[names[0]], trunk, about[name]["fingerprint"])
        router = {"kind": "sums", "scale": FIRST_SCALE, "ridge": RIDGE}
        gates = FIRST_SCALE * solve_gates(list(sums.values()), RIDGE)
    write_moe(base, [Expert(folder) for folder in folders.values()], gates, moe_config, work)
    for name in brought:
        save_sums(sums[name], sums_file(work, name))
    (work / GATES).mkdir(exist_ok=True)
    save_file({"gates": merged_gates.contiguous()}, work / GATES / f"{config.gate_mode}.safetensors")
    runs.finish(target, {"team": team_card(names), "system_prompt": SYSTEM_PROMPT, "experts": about, "router": router})
    used = config.experts_per_token
    print(f"{target}: {len(names)} experts, {used} per token; every tensor checked against its source")


if __name__ == "__main__":
    run(main)
