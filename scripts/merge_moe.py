# SPDX-License-Identifier: Apache-2.0
"""STEP 2. Merge each role's LoRA into a dense expert and let mergekit assemble the experts into a Mixtral-style MoE.

    python scripts/merge_moe.py --run_dir outputs/quickstart

Reads RUN_DIR/adapters and moe_merge.yaml, writes RUN_DIR/experts/ROLE and RUN_DIR/moe. The router starts from the
hidden states of the prompts in moe_merge.yaml; scripts/fit_router.py fits it next.
"""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from finteam_experts import runs
from finteam_experts.data.tasks import SYSTEM_PROMPT
from finteam_experts.errors import InputError, run
from finteam_experts.files import check_disk_room, file_hash
from finteam_experts.fingerprints import fingerprint
from finteam_experts.merging.adapters import check_adapter, dense_expert
from finteam_experts.merging.assemble import assemble, check_moe
from finteam_experts.merging.config import in_run, read_merge_config, roles, trained_roles
from finteam_experts.merging.gates import GATES, read_gates
from finteam_experts.models import ADAPTER_FILE, check_base, local_folder, stored_dtype
from finteam_experts.roles import team_card
from finteam_experts.weights import size_of

MERGE_FILE = Path(__file__).parents[1] / "moe_merge.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--base", help="dense base: Hub id or folder (default: RUN_DIR/base)")
    parser.add_argument("--merge_config", type=Path, default=MERGE_FILE, help="the team")
    parser.add_argument("--experts_per_token", type=int, metavar="N", help="another number than the team's file has")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace experts and an MoE that were merged otherwise"
    )
    args = parser.parse_args()

    config = read_merge_config(args.merge_config)
    names, trained = roles(config), trained_roles(config)
    if args.experts_per_token is not None:
        if not 1 <= args.experts_per_token <= len(names):
            raise InputError(f"--experts_per_token {args.experts_per_token}: it must be 1 to {len(names)}.")
        config = config.model_copy(update={"experts_per_token": args.experts_per_token})
    base = local_folder(args.base or str(args.run_dir / "base"))
    base_config, known_base = check_base(base), fingerprint(base)
    for role in trained:
        check_adapter(args.run_dir / "adapters" / role, role, known_base)
    if not (args.run_dir / "moe").exists():
        missing = [name for name in trained if not (args.run_dir / "experts" / name).exists()]
        check_disk_room(args.run_dir, size_of(base) * (len(missing) + len(names)))

    adapters = {}
    for role in trained:
        adapter = args.run_dir / "adapters" / role
        dense_expert(base, known_base, adapter, args.run_dir / "experts" / role, overwrite=args.overwrite)
        adapters[role] = file_hash(adapter / ADAPTER_FILE)
    target = args.run_dir / "moe"
    inputs = {
        "base": known_base,
        "team": names,
        "adapters": adapters,
        "merge": config.model_dump(mode="json", exclude_none=True, exclude={"base_model"}),
    }
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
    runs.finish(
        target, {"team": team_card(names), "system_prompt": SYSTEM_PROMPT, "router": {"kind": config.gate_mode}}
    )
    used = config.experts_per_token
    print(f"{target}: {len(names)} experts, {used} per token; every tensor checked against its source")


if __name__ == "__main__":
    run(main)
