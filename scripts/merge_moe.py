# SPDX-License-Identifier: Apache-2.0
"""STEP 2. Merge each role's LoRA into a dense expert and let mergekit assemble the experts into one MoE.

    python scripts/merge_moe.py --run_dir outputs/quickstart

Reads RUN_DIR/adapters and moe_merge.yaml, writes RUN_DIR/experts/ROLE and RUN_DIR/moe. An expert that someone has handed over
as RUN_DIR/experts/ROLE needs no adapter. The router starts from the hidden states of the prompts in moe_merge.yaml;
scripts/fit_router.py fits it next. Where every expert has brought its router sums, --from_sums computes the router from
these, and nobody's text is needed.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from finteam_experts import runs
from finteam_experts.data.tasks import SYSTEM_PROMPT
from finteam_experts.errors import InputError, check_number, run
from finteam_experts.files import check_disk_room, file_hash
from finteam_experts.fingerprints import fingerprint, trunk_fingerprint
from finteam_experts.merging.adapters import check_adapter, dense_expert
from finteam_experts.merging.assemble import assemble, check_moe
from finteam_experts.merging.change import check_expert, check_sums
from finteam_experts.merging.config import in_run, read_merge_config, roles, trained_roles
from finteam_experts.merging.gates import GATES, read_gates, write_gates
from finteam_experts.merging.router import FIRST_SCALE
from finteam_experts.merging.sums import RIDGE, SUMS, load_sums, save_sums, solve_gates, sums_file
from finteam_experts.models import ADAPTER_FILE, check_base, local_folder, stored_dtype
from finteam_experts.roles import team_card
from finteam_experts.weights import size_of

MERGE_FILE = Path(__file__).parents[1] / "moe_merge.yaml"


def router_from_sums(moe: Path, files: dict[str, Path]) -> None:
    """Replace the gates of the MoE in `moe` by those that follow from its analysts' sums, and keep these with it."""
    trunk = trunk_fingerprint(moe)
    sums = {name: load_sums(path) for name, path in files.items()}
    like = replace(next(iter(sums.values())), trunk=trunk)
    for name, own in sums.items():
        check_sums(own, files[name], like)
        save_sums(own, sums_file(moe, name))
    write_gates(moe, FIRST_SCALE * solve_gates(list(sums.values()), RIDGE))


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
    base = local_folder(args.base or str(args.run_dir / "base"))
    base_config, known_base = check_base(base), fingerprint(base)
    experts = {role: args.run_dir / "experts" / role for role in trained}
    adapters = {role: args.run_dir / "adapters" / role for role in trained}
    handed_over = [
        role
        for role in trained
        if experts[role].is_dir() and not adapters[role].exists() and not runs.work_folder(adapters[role]).exists()
    ]
    trunk = trunk_fingerprint(base) if handed_over else ""
    for role in trained:
        if role in handed_over:
            check_expert(experts[role], base, trunk)
            print(f"{experts[role]} has no adapter in {args.run_dir}: it is taken as it was handed over")
        else:
            check_adapter(adapters[role], role, known_base)
    if not (args.run_dir / "moe").exists():
        missing = [role for role in trained if not experts[role].exists()]
        check_disk_room(args.run_dir, size_of(base) * (len(missing) + len(names)))

    from_adapters = [role for role in trained if role not in handed_over]
    for role in from_adapters:
        dense_expert(base, known_base, adapters[role], experts[role], overwrite=args.overwrite)
    target = args.run_dir / "moe"
    inputs = {
        "base": known_base,
        "team": names,
        "adapters": {role: file_hash(adapters[role] / ADAPTER_FILE) for role in from_adapters},
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
    inputs |= runs.recorded_inputs(target, "tasks")  # earlier versions recorded them; a merge asks no task
    work = runs.begin(target, "merge_moe", inputs, overwrite=args.overwrite)
    if work is None:
        return

    dtype = config.dtype or str(stored_dtype(base)).removeprefix("torch.")
    config = in_run(config, base, args.run_dir).model_copy(update={"dtype": dtype})
    assemble(config, base, base_config, work)
    check_moe(work, base, config)
    (work / GATES).mkdir(exist_ok=True)
    save_file({"gates": read_gates(work)}, work / GATES / f"{config.gate_mode}.safetensors")
    if brought:
        router_from_sums(work, brought)
    router = {"kind": "sums" if brought else config.gate_mode}
    runs.finish(target, {"team": team_card(names), "system_prompt": SYSTEM_PROMPT, "router": router})
    used = config.experts_per_token
    print(f"{target}: {len(names)} experts, {used} per token; every tensor checked against its source")


if __name__ == "__main__":
    run(main)
