# SPDX-License-Identifier: Apache-2.0
"""STEP 2. Merge each role's LoRA into a dense expert and let mergekit assemble the experts to a Mixtral-style MoE.

    python scripts/merge_moe.py --run_dir outputs/quickstart

Reads RUN_DIR/adapters and moe_merge.yaml, writes RUN_DIR/experts/ROLE and RUN_DIR/moe. The router starts from the
hidden states of the prompts in moe_merge.yaml; scripts/fit_router.py fits it next.
"""

import argparse
import logging
from pathlib import Path

import torch
from mergekit.merge import MergeOptions
from mergekit.moe.config import MoEMergeConfig
from mergekit.moe.mixtral import MixtralMoE
from mergekit.moe.router import get_gate_params, get_hidden_states, tokenize_prompts
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from finteam_experts import runs
from finteam_experts.adapter_merge import merge_adapter
from finteam_experts.errors import InputError, NotFiniteError, read_json, run
from finteam_experts.gates import GATES, read_gates
from finteam_experts.merge_config import MERGE_FILE, in_run, read_merge_config, roles, trained_roles
from finteam_experts.models import (
    ADAPTER_FILE,
    MLP_MODULES,
    check_base,
    fingerprint,
    local_folder,
    read_config,
    stored_dtype,
    stored_tensors,
)
from finteam_experts.release import copy_companions
from finteam_experts.roles import team_card
from finteam_experts.shards import SHARD_BYTES, StoredTensors, weight_files
from finteam_experts.tasks import SYSTEM_PROMPT, prompting, task_cards


def check_adapter(folder: Path, role: str, base_fingerprint: dict[str, str]) -> None:
    """Raise `InputError` unless the adapter belongs to this base and changes nothing but the MLP."""
    record = runs.require(folder, f"accelerate launch recipes/train_expert.py --config YAML --role {role}")
    trained_on = record["inputs"].get("base")
    if not isinstance(trained_on, dict) or any(base_fingerprint.get(part) != trained_on[part] for part in trained_on):
        raise InputError(
            f"{folder} was trained on another base (fingerprint {trained_on}; this base has {base_fingerprint}). "
            "Train the role again on this base, or name its base with --base."
        )
    settings = read_json(folder / "adapter_config.json")
    if settings.get("bias", "none") != "none" or settings.get("modules_to_save"):
        raise InputError(
            f"{folder}/adapter_config.json: trains biases or whole modules, which a merge can't take over."
        )
    with StoredTensors([folder / ADAPTER_FILE]) as tensors:
        for name in tensors:
            if not tensors[name].isfinite().all():
                raise NotFiniteError(
                    f"{folder}/{ADAPTER_FILE}: {name} is not finite: its training diverged. Train it again."
                )
            if not any(f".mlp.{module}." in name for module in MLP_MODULES):
                raise InputError(
                    f"{folder}/{ADAPTER_FILE} changes {name}. The merge takes everything but the MLP from "
                    f"the base, so that change would be lost: train {', '.join(MLP_MODULES)} only."
                )


def merge_experts(
    base: Path, base_fingerprint: dict[str, str], run_dir: Path, names: list[str], overwrite: bool
) -> dict[str, str]:
    """Write RUN_DIR/experts/ROLE for every role; return the hash of each adapter."""
    hashes = {}
    for role in names:
        adapter, target = run_dir / "adapters" / role, run_dir / "experts" / role
        hashes[role] = runs.file_hash(adapter / ADAPTER_FILE)
        inputs = {"base": base_fingerprint, "adapter": hashes[role]}
        work = runs.begin(target, "merge_expert", inputs, overwrite=overwrite)
        if work:
            difference = merge_adapter(base, adapter, work)
            runs.finish(target, {"results": {"merge_difference": difference}})
            print(f"{target}: adapter merged, its layers' outputs agree to {difference:.0e}")
    return hashes


class DecoderOnDisk:
    """A model's decoder whose weights are read layer by layer at every call, as mergekit's `get_hidden_states` calls it."""

    device = "cpu"

    def __init__(self, folder: Path) -> None:
        self._decoder = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": "disk"}
        ).model

    def __call__(self, **inputs: object) -> BaseModelOutputWithPast:
        return self._decoder(**inputs)


def prompt_gates(base: Path, config: MoEMergeConfig) -> torch.Tensor:
    """mergekit's gates from the experts' prompts, [layers, experts, hidden], without the base in memory.

    mergekit itself loads it whole for the modes that need hidden states, unless on a GPU.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")  # prompts end together, as in mergekit
    tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    if not config.gate_mode.startswith("hidden") or torch.cuda.is_available():
        return get_gate_params(config.base_model, tokenizer, config.experts, mode=config.gate_mode)
    decoder, average = DecoderOnDisk(base), config.gate_mode == "hidden_avg"

    def mean_state(prompts: list[str]) -> torch.Tensor:
        tokens: BatchEncoding = tokenize_prompts(prompts, tokenizer)
        return get_hidden_states(decoder, tokens, average=average)

    gates = []
    for expert in tqdm(config.experts, desc="router prompts", leave=False):
        states = mean_state(expert.positive_prompts)
        if expert.negative_prompts:
            states = states - mean_state(expert.negative_prompts)
        gates.append(torch.nn.functional.normalize(states, dim=-1, eps=1e-8))
    return torch.stack(gates, dim=1)


def check_moe(moe: Path, base: Path, config: MoEMergeConfig, dtype: torch.dtype) -> None:
    """Raise unless every tensor of the MoE is its source's: the experts', the base's, or finite gates. Nothing is loaded."""
    with StoredTensors(weight_files(moe)) as merged:
        expected = set()

        def compare(name: str, source: torch.Tensor, origin: Path, part: tuple = ()) -> None:
            expected.add(name)
            if not source.isfinite().all():
                raise NotFiniteError(
                    f"{origin} has weights in {name} that are not finite. Choose another, or train it again."
                )
            if name not in merged or not torch.equal(merged.slice(name)[(*part, ...)], source.to(dtype)):
                raise InputError(f"{moe}: {name} is not what it was merged from. Please report this as a bug.")

        for name, tensor in stored_tensors(base):
            if ".mlp." not in name:
                compare(name, tensor, base)
        for position, expert in enumerate(config.experts):
            folder = Path(expert.source_model.model.path)
            for name, tensor in stored_tensors(folder):
                if ".mlp." not in name:
                    continue
                experts = name.rpartition(".mlp.")[0] + ".mlp.experts."
                if "down_proj" in name:
                    compare(experts + "down_proj", tensor, folder, (position,))
                else:  # fused: the rows of gate_proj above those of up_proj
                    rows = slice(0, len(tensor)) if "gate_proj" in name else slice(len(tensor), 2 * len(tensor))
                    compare(experts + "gate_up_proj", tensor, folder, (position, rows))
        gates = {name for name in merged if name.endswith(".mlp.gate.weight")}
        if gates | expected != set(merged) or not all(merged[name].isfinite().all() for name in gates):
            raise InputError(f"{moe}: it has other tensors than its sources, or gates that are not finite.")


def keep_attention_window(moe: Path, base: PretrainedConfig) -> None:
    """Write the base's sliding attention window into the MoE's config, which mergekit leaves out."""
    config = read_config(moe)
    config.sliding_window = getattr(base, "sliding_window", None)
    config.save_pretrained(moe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--base", help="dense base: Hub id or folder (default: RUN_DIR/base)")
    parser.add_argument("--merge_config", type=Path, default=MERGE_FILE, help="the team")
    parser.add_argument("--experts_per_token", type=int, metavar="N", help="another number than the team's file has")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace experts and a MoE that were merged otherwise"
    )
    args = parser.parse_args()

    config = read_merge_config(args.merge_config)
    names = roles(config)
    if args.experts_per_token is not None:
        if not 1 <= args.experts_per_token <= len(names):
            raise InputError(f"--experts_per_token {args.experts_per_token}: it must be 1 to {len(names)}.")
        config = config.model_copy(update={"experts_per_token": args.experts_per_token})
    base = local_folder(args.base or str(args.run_dir / "base"))
    base_config, dtype = check_base(base), stored_dtype(base)
    base_fingerprint = fingerprint(base)
    trained = trained_roles(config)
    for role in trained:
        check_adapter(args.run_dir / "adapters" / role, role, base_fingerprint)
    base_bytes = sum(file.stat().st_size for file in weight_files(base))
    missing = [name for name in trained if not (args.run_dir / "experts" / name).exists()]
    if not (args.run_dir / "moe").exists():
        runs.check_disk_room(args.run_dir, base_bytes * (len(missing) + len(names)))
    adapters = merge_experts(base, base_fingerprint, args.run_dir, trained, args.overwrite)

    target = args.run_dir / "moe"
    inputs = {
        "base": base_fingerprint,
        "team": names,
        "adapters": adapters,
        "merge": config.model_dump(mode="json", exclude_none=True, exclude={"base_model"}),
        "tasks": prompting(),
    }
    work = runs.begin(target, "merge_moe", inputs, overwrite=args.overwrite)
    if work is None:
        return
    runs.remove_all_but(work, (runs.RECORD,))
    dtype = dtype if config.dtype is None else getattr(torch, config.dtype)
    config = in_run(config, base, args.run_dir).model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    # mergekit holds a whole shard in memory
    options = MergeOptions(copy_tokenizer=False, out_shard_size=min(SHARD_BYTES, max(2**28, base_bytes // 5)))
    gates = prompt_gates(base, config)
    logging.disable(logging.WARNING)  # any number of experts runs in llama.cpp by now
    MixtralMoE().write_model(str(work), config, options, router_weights=list(gates))
    logging.disable(logging.NOTSET)
    keep_attention_window(work, base_config)
    copy_companions(base, work)
    check_moe(work, base, config, dtype)
    (work / GATES).mkdir()
    save_file({"gates": read_gates(work)}, work / GATES / f"{config.gate_mode}.safetensors")
    about = {"team": team_card(names), "system_prompt": SYSTEM_PROMPT, "tasks": task_cards()}
    runs.finish(target, {**about, "router": {"kind": config.gate_mode}})
    print(
        f"{target}: {len(names)} experts, {config.experts_per_token} a token; every tensor checked against its source"
    )


if __name__ == "__main__":
    run(main)
