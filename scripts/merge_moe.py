# SPDX-License-Identifier: Apache-2.0
"""STEP 2. Merge each role's LoRA into a dense expert and let mergekit assemble the experts to a Mixtral-style MoE.

    python scripts/merge_moe.py --run_dir outputs/quickstart

Reads RUN_DIR/adapters and moe_merge.yaml, writes RUN_DIR/experts/ROLE and RUN_DIR/moe. The router starts from the
hidden states of the prompts in moe_merge.yaml.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from mergekit.moe.config import MoEMergeConfig
from mergekit.options import MergeOptions
from mergekit.scripts.moe import build
from safetensors import safe_open

from finteam_experts import runs
from finteam_experts.errors import InputError, run
from finteam_experts.merge_config import MERGE_FILE, in_run, read_merge_config, roles
from finteam_experts.models import (
    MLP_MODULES,
    check_base,
    copy_companions,
    fingerprint,
    load_model,
    load_tokenizer,
    local_folder,
    merge_adapter,
    weight_files,
)
from finteam_experts.roles import team_card
from finteam_experts.tasks import SYSTEM_PROMPT, task_cards


def check_adapter(folder: Path, role: str, base_fingerprint: str) -> None:
    """Raise `InputError` unless the adapter belongs to this base and changes nothing but the MLP."""
    record = runs.require(folder, f"accelerate launch recipes/train_expert.py --config YAML --role {role}")
    trained_on = record["inputs"].get("base")
    if trained_on != base_fingerprint:
        raise InputError(
            f"{folder} was trained on another base (fingerprint {trained_on}; this base has {base_fingerprint}). "
            "Train the role again on this base, or name its base with --base."
        )
    settings = json.loads((folder / "adapter_config.json").read_text())
    if settings.get("bias", "none") != "none" or settings.get("modules_to_save"):
        raise InputError(
            f"{folder}/adapter_config.json: trains biases or whole modules, which a merge can't take over."
        )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            if not any(f".mlp.{module}." in name for module in MLP_MODULES):
                raise InputError(
                    f"{folder}/adapter_model.safetensors changes {name}. The merge takes everything but the MLP from "
                    f"the base, so that change would be lost: train {', '.join(MLP_MODULES)} only."
                )


def merge_experts(base: Path, base_fingerprint: str, run_dir: Path, names: list[str]) -> dict[str, str]:
    """Write RUN_DIR/experts/ROLE for every role; return the hash of each adapter."""
    hashes = {}
    for role in names:
        adapter, target = run_dir / "adapters" / role, run_dir / "experts" / role
        hashes[role] = runs.file_hash(adapter / "adapter_model.safetensors")
        work = runs.begin(target, "merge_expert", {"base": base_fingerprint, "adapter": hashes[role]})
        if work:
            difference = merge_adapter(base, adapter, work)
            runs.finish(target, {"results": {"logit_difference": difference}})
            print(f"{target}: adapter merged, logits agree to {difference:.0e}")
    return hashes


def check_moe(moe: Path, base: Path, config: MoEMergeConfig) -> None:
    """Raise unless the MoE loads exactly, its experts equal their sources, the rest the base, and its logits are finite."""
    model = load_model(moe)
    tensors = dict(model.state_dict())
    experts = [dict(_tensors(Path(expert.source_model.model.path))) for expert in config.experts]
    for name, source in _tensors(base):
        if ".mlp." not in name and not torch.equal(tensors[name], source):
            raise InputError(f"{moe}: {name} differs from the base's. Delete the folder and merge again.")
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp"
        for position, expert in enumerate(experts):
            gate, up, down = (expert[f"{prefix}.{module}.weight"] for module in MLP_MODULES)
            fused = (
                tensors[f"{prefix}.experts.gate_up_proj"][position],
                tensors[f"{prefix}.experts.down_proj"][position],
            )
            if not (torch.equal(fused[0], torch.cat([gate, up])) and torch.equal(fused[1], down)):
                raise InputError(f"{moe}: expert {position} of layer {layer} differs from its source. Merge again.")
    with torch.no_grad():
        if not model(torch.arange(5, 21)[None]).logits.isfinite().all():
            raise InputError(f"{moe}: its logits are not finite. Look for NaN in the adapters.")


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--base", help="dense base: Hub id or folder (default: RUN_DIR/base)")
    parser.add_argument("--merge_config", type=Path, default=MERGE_FILE)
    args = parser.parse_args()

    config = read_merge_config(args.merge_config)
    names = roles(config)
    base = local_folder(args.base or str(args.run_dir / "base"))
    vocabulary = check_base(base).vocab_size
    if len(load_tokenizer(base)) > vocabulary:
        raise InputError(f"{base}: the tokenizer has more tokens than the model's vocabulary of {vocabulary}.")
    base_fingerprint = fingerprint(base)
    for role in names:
        check_adapter(args.run_dir / "adapters" / role, role, base_fingerprint)
    base_bytes = sum(file.stat().st_size for file in weight_files(base))
    missing = [name for name in names if not (args.run_dir / "experts" / name).exists()]
    if not (args.run_dir / "moe").exists():
        runs.check_disk_room(args.run_dir, base_bytes * (len(missing) + len(names)))
    adapters = merge_experts(base, base_fingerprint, args.run_dir, names)

    target = args.run_dir / "moe"
    prompts = {name: expert.positive_prompts for name, expert in zip(names, config.experts, strict=True)}
    gate = {"gate_mode": config.gate_mode, "experts_per_token": config.experts_per_token, "prompts": prompts}
    work = runs.begin(target, "merge_moe", {"base": base_fingerprint, "adapters": adapters, **gate})
    if work is None:
        return
    runs.remove_all_but(work, (runs.RECORD,))
    config = in_run(config, base, args.run_dir)
    build(config, str(work), MergeOptions(copy_tokenizer=False))
    copy_companions(base, work)
    check_moe(work, base, config)
    runs.finish(target, {"team": team_card(names), "system_prompt": SYSTEM_PROMPT, "tasks": task_cards()})
    print(
        f"{target}: {len(names)} experts, {config.experts_per_token} a token; every tensor checked against its source"
    )


if __name__ == "__main__":
    run(main)
