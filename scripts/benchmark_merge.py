# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of scripts/merge_moe.py for a base of random weights, beside a plain copy of what it wrote.

    python scripts/benchmark_merge.py --tokenizer outputs/quickstart/base --shape 1b

Memory is what the process holds for itself (anonymous pages): pages of the files that it reads lie in the system's cache,
which gives them up when others need the room. The curve goes to the folder as merge_memory.png.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finteam_experts import runs
from finteam_experts.errors import run
from finteam_experts.merge_config import MERGE_FILE, read_merge_config, trained_roles
from finteam_experts.models import MLP_MODULES, fingerprint
from finteam_experts.release import copy_companions
from finteam_experts.shards import ShardWriter, StoredTensors, weight_files

SHAPES = {  # SmolLM2-135M's, Llama-3.2-1B's and Llama-3.1-8B's
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
MIB = 2**20


def make_base(folder: Path, tokenizer: Path, shape: str) -> None:
    """A dense base of that shape in bf16, with random weights and the tokenizer of another model."""
    config = LlamaConfig(**SHAPES[shape], dtype="bfloat16")
    ids = AutoTokenizer.from_pretrained(tokenizer)
    config.bos_token_id, config.eos_token_id = ids.bos_token_id, ids.eos_token_id
    with init_empty_weights():
        names = {name: tensor.to(torch.bfloat16) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del names["lm_head.weight"]
    writer = ShardWriter(folder, names)
    for name, tensor in names.items():
        writer.write(name, (0.02 * torch.randn(tensor.shape)).to(torch.bfloat16))
    writer.finish()
    config.save_pretrained(folder)
    copy_companions(tokenizer, folder)


def make_adapter(run_dir: Path, role: str) -> None:
    """A LoRA of rank 16 on the MLPs with random weights, as scripts/merge_moe.py takes it."""
    base = run_dir / "base"
    config = LoraConfig(r=16, lora_alpha=32, target_modules=list(MLP_MODULES))
    with init_empty_weights():
        model = get_peft_model(LlamaForCausalLM(LlamaConfig.from_pretrained(base)), config)
    weights = {
        name.replace(".default", ""): 0.01 * torch.randn(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    target = run_dir / "adapters" / role
    work = runs.begin(target, "train_expert", {"base": fingerprint(base)})
    if work:
        save_file(weights, work / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(work)
        runs.finish(target, {})


def memory(process: int) -> tuple[float, float]:
    """What a process holds for itself, and all that is resident of it with the files it reads, in MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    own, resident = (re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)[1] for key in ("RssAnon", "VmRSS"))
    return int(own) / 1024, int(resident) / 1024


def watched(command: list[str]) -> tuple[list[tuple[float, float]], float]:
    """Run a command; return its own memory over time, (seconds, MiB), and its peak of resident pages."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    start, curve, resident = time.monotonic(), [], 0.0
    while process.poll() is None:
        try:
            own, all_pages = memory(process.pid)
        except (OSError, TypeError):  # it has just ended
            break
        curve.append((time.monotonic() - start, own))
        resident = max(resident, all_pages)
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    curve.append((time.monotonic() - start, curve[-1][1]))
    return curve, resident


def copy_seconds(folders: list[Path], to: Path) -> float:
    start = time.monotonic()
    for folder in folders:
        shutil.copytree(folder, to / folder.name, dirs_exist_ok=True)
    seconds = time.monotonic() - start
    shutil.rmtree(to)
    return seconds


def largest_layer(folder: Path) -> int:
    """Bytes of the largest decoder layer."""
    sizes: dict[str, int] = {}
    with StoredTensors(weight_files(folder)) as stored:
        for name in stored:
            if layer := re.search(r"layers\.\d+\.", name):
                sizes[layer[0]] = sizes.get(layer[0], 0) + stored[name].nbytes
    return max(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/benchmark_merge"), help="is deleted at the end")
    parser.add_argument("--tokenizer", type=Path, default=Path("outputs/quickstart/base"), help="a base's folder")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--plot", type=Path, help="where to draw memory over time")
    args = parser.parse_args()

    roles = trained_roles(read_merge_config(MERGE_FILE))
    make_base(args.run_dir / "base", args.tokenizer, args.shape)
    for role in roles:
        make_adapter(args.run_dir, role)
    curve, resident = watched([sys.executable, "scripts/merge_moe.py", "--run_dir", str(args.run_dir)])
    written = [args.run_dir / "moe", *(args.run_dir / "experts" / role for role in roles)]
    copying = copy_seconds(written, args.run_dir / "copy")
    size = sum(file.stat().st_size for folder in written for file in weight_files(folder))
    layer = largest_layer(args.run_dir / "moe") / MIB
    seconds, peak = curve[-1][0], max(own for _, own in curve)
    print(
        f"{args.shape}: wrote {size / 1e9:.2f} GB in {seconds:.1f} s; a copy of it takes {copying:.1f} s\n"
        f"peak of its own memory {peak:.0f} MiB (with the cached pages of files {resident:.0f}); a layer of the MoE is "
        f"{layer:.0f} MiB: the bound, three of them and 1 GiB, is {3 * layer + 1024:.0f}"
    )
    if args.plot:
        plt.figure(figsize=(7, 3))
        plt.plot(*zip(*curve, strict=True))
        plt.axhline(3 * layer + 1024, linestyle=":", color="gray")
        plt.gca().set(xlabel="seconds", ylabel="MiB", ylim=0, title=f"scripts/merge_moe.py, {args.shape}")
        plt.tight_layout()
        plt.savefig(args.plot, dpi=120)
    shutil.rmtree(args.run_dir)


if __name__ == "__main__":
    run(main)
