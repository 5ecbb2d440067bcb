# SPDX-License-Identifier: Apache-2.0
"""Copy any MoE folder into the layout that transformers 4 and 5, vLLM and llama.cpp read alike.

    python scripts/release.py --model outputs/quickstart/moe --release outputs/quickstart/moe-release

What recipes/instruct_tune.py writes has that layout already: src/finteam_experts/release.py says what it is.
"""

import argparse
import json
from pathlib import Path

import torch

from finteam_experts import runs
from finteam_experts.errors import InputError, run
from finteam_experts.models import fingerprint, load_model
from finteam_experts.release import save_release
from finteam_experts.shards import weight_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the MoE")
    parser.add_argument("--release", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        raise InputError(f"--model {args.model}: not a model folder, it has no config.json.")
    model_type = json.loads((args.model / "config.json").read_text())["model_type"]
    if model_type != "mixtral":
        raise InputError(f"{args.model}/config.json: model_type is '{model_type}', not a MoE of this package.")
    if args.release.absolute() == args.model.absolute():
        raise InputError(f"--release {args.release}: name another folder than the model's own.")

    work = runs.begin(args.release, "release", {"model": fingerprint(args.model)})
    if work is None:
        return
    runs.check_disk_room(args.release, sum(file.stat().st_size for file in weight_files(args.model)))
    model = load_model(args.model)
    probe = torch.arange(5, 37).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        expected = model(probe).logits
        save_release(model, args.model, work)
        del model
        if not torch.equal(load_model(work)(probe).logits, expected):
            raise InputError(f"{work}: its logits differ from those of {args.model}. Please report this as a bug.")
    record = runs.read_record(args.model) if (args.model / runs.RECORD).is_file() else {}
    about = {key: record[key] for key in ("team", "system_prompt", "tasks", "router") if key in record}
    runs.finish(args.release, about)
    print(f"{args.release}: same logits as {args.model}, in the release layout")


if __name__ == "__main__":
    run(main)
