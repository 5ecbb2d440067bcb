# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of scripts/merge_moe.py for a base of random weights, beside a plain copy of what it wrote.

    python benchmarks/merge.py --tokenizer outputs/quickstart/base --shape 1b

Memory is what the process holds for itself (anonymous pages): pages of the files that it reads are in the system's cache,
which gives them up when others need the room.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from finteam_experts import runs
from finteam_experts.errors import run
from finteam_experts.fingerprints import fingerprint
from finteam_experts.merging.config import read_merge_config, trained_roles
from finteam_experts.merging.moe import finish_folder
from finteam_experts.models import ADAPTER_FILE, MLP_MODULES, empty_model
from finteam_experts.weights import StoredTensors, new_writer, size_of
from shapes import SHAPES

REPOSITORY = Path(__file__).parents[1]
MIB = 2**20


def make_base(folder: Path, tokenizer: Path, shape: str) -> None:
    """A dense base of that shape in bf16, with random weights and the tokenizer of another model."""
    ids = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        **SHAPES[shape], dtype="bfloat16", bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id
    )
    writer = new_writer(folder)
    for name, tensor in empty_model(config).state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.save_tensor(name, (0.02 * torch.randn(tensor.shape)).to(torch.bfloat16))
    writer.finalize()
    finish_folder(config, tokenizer, folder)


def make_adapter(run_dir: Path, role: str) -> None:
    """A LoRA of rank 16 on the MLPs with random weights, as scripts/merge_moe.py takes it."""
    base = run_dir / "base"
    config = LoraConfig(r=16, lora_alpha=32, target_modules=list(MLP_MODULES))
    model = get_peft_model(empty_model(LlamaConfig.from_pretrained(base)), config)
    weights = {
        name.replace(".default", ""): 0.01 * torch.randn(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    target = run_dir / "adapters" / role
    work = runs.begin(target, "train_expert", {"base": fingerprint(base)})
    if work:
        save_file(weights, work / ADAPTER_FILE, metadata={"format": "pt"})
        config.save_pretrained(work)
        runs.finish(target, {})


def watched(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds, its peak of own memory and its peak of resident pages, both in MiB (Linux)."""
    process, start, own, resident = subprocess.Popen(command, stdout=subprocess.DEVNULL), time.monotonic(), 0, 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
            now = [int(re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)[1]) for key in ("RssAnon", "VmRSS")]
        except (OSError, TypeError):  # it has just ended
            break
        own, resident = max(own, now[0]), max(resident, now[1])
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return time.monotonic() - start, own / 1024, resident / 1024


def copy_seconds(folders: list[Path], to: Path) -> float:
    start = time.monotonic()
    for folder in folders:
        shutil.copytree(folder, to / folder.name)
    seconds = time.monotonic() - start
    shutil.rmtree(to)
    return seconds


def largest_layer(folder: Path) -> int:
    """Bytes of the largest decoder layer."""
    sizes: dict[str, int] = {}
    with StoredTensors(folder) as stored:
        for name in stored:
            if layer := re.search(r"layers\.\d+\.", name):
                sizes[layer[0]] = sizes.get(layer[0], 0) + stored[name].nbytes
    return max(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/benchmark_merge"), help="is deleted at the end")
    parser.add_argument("--tokenizer", type=Path, default=Path("outputs/quickstart/base"), help="a base's folder")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    args = parser.parse_args()

    roles = trained_roles(read_merge_config(REPOSITORY / "moe_merge.yaml"))
    make_base(args.run_dir / "base", args.tokenizer, args.shape)
    for role in roles:
        make_adapter(args.run_dir, role)
    command = [sys.executable, str(REPOSITORY / "scripts/merge_moe.py"), "--run_dir", str(args.run_dir)]
    seconds, own, resident = watched(command)

    written = [args.run_dir / "moe", *(args.run_dir / "experts" / role for role in roles)]
    copying = copy_seconds(written, args.run_dir / "copy")
    size, layer = sum(map(size_of, written)) / 1e9, largest_layer(args.run_dir / "moe") / MIB
    print(f"{args.shape}: wrote {size:.2f} GB in {seconds:.1f} s; a copy of it takes {copying:.1f} s")
    bound = f"a layer of the MoE is {layer:.0f} MiB: the bound, three of them and 1 GiB, is {3 * layer + 1024:.0f}"
    print(f"peak of its own memory {own:.0f} MiB (with the cached pages of files {resident:.0f}); {bound}")
    shutil.rmtree(args.run_dir)


if __name__ == "__main__":
    run(main)
