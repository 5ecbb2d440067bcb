# SPDX-License-Identifier: Apache-2.0
"""STEP 3b. Join experts that were instruct-tuned apart: their MLPs side by side, all else averaged, with the MoE's router.

    python scripts/join_experts.py --run_dir outputs/quickstart
    python scripts/join_experts.py --run_dir outputs/quickstart --average

Reads RUN_DIR/experts-instruct and the router of RUN_DIR/moe, writes RUN_DIR/moe-instruct. With `--average` the MLPs are
averaged as well: RUN_DIR/average-instruct, a dense model of the base's size to compare with.
"""

import argparse
from pathlib import Path

from finteam_experts import runs
from finteam_experts.errors import InputError, run
from finteam_experts.files import check_disk_room
from finteam_experts.fingerprints import fingerprint, is_model
from finteam_experts.merging.gates import read_gates
from finteam_experts.merging.join import join
from finteam_experts.weights import size_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--average", action="store_true", help="average the MLPs too, into a dense model")
    args = parser.parse_args()

    moe = args.run_dir / "moe"
    record = runs.require(moe, "python scripts/merge_moe.py")
    tasks: dict[str, dict] = {}
    folders = {member["name"]: args.run_dir / "experts-instruct" / member["name"] for member in record["team"]}
    for name, folder in folders.items():
        tuned = runs.require(folder, f"recipes/instruct_tune.py --start_from expert --role {name}")
        if not is_model(args.run_dir / "experts" / name, tuned["inputs"]["model"]):
            found = f"{folder} was tuned from another expert than {args.run_dir}/experts/{name}"
            raise InputError(f"{found}. Delete it and tune it again.")
        tasks |= {key: value for key, value in tuned["inputs"]["asked"].items() if isinstance(value, dict)}

    target = args.run_dir / ("average-instruct" if args.average else "moe-instruct")
    experts = list(folders.values())
    inputs = {
        "experts": {name: fingerprint(folder) for name, folder in folders.items()},
        "router": None if args.average else fingerprint(moe),
    }
    inputs |= runs.recorded_inputs(target, "asked")  # earlier versions recorded it; joining asks no task
    work = runs.begin(target, "join_experts", inputs)
    if work is None:
        return
    check_disk_room(target, sum(map(size_of, experts[:1] if args.average else experts)))
    join(experts, None if args.average else read_gates(moe), experts[0] if args.average else moe, work)
    about = {"system_prompt": record["system_prompt"], "tasks": list(tasks.values())}
    runs.finish(target, about | ({} if args.average else {"team": record["team"]}))
    print(
        f"{target}: {len(experts)} experts, "
        + ("averaged" if args.average else f"side by side, with the router of {moe}")
    )


if __name__ == "__main__":
    run(main)
