# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of training and generation at the shapes of real bases, with random weights, beside the plan's memory.

    python benchmarks/gpu.py --shapes 135m 1b 8b --tflops 989

Trains an expert and a team of three with the LoRA of recipes/llama3-8b on random tokens in bfloat16, and measures a forward
pass and the generation of the team with one, two and three experts per token. MFU is the share of --tflops, the device's bfloat16
peak. benchmarks/gpu.sh runs it after the pipeline itself.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from finteam_experts.errors import run
from finteam_experts.families import family_of
from finteam_experts.models import MLP_MODULES
from finteam_experts.screen import screen
from finteam_experts.training import planning
from finteam_experts.training.planning import GIB, Devices, Training
from shapes import SHAPES

EXPERT_LORA = {"r": 64, "lora_alpha": 128, "target_modules": list(MLP_MODULES)}
TEAM_LORA = {
    "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}  # fmt: skip
WARMUP = 2  # steps that are not counted
LARGE = 1024**3  # parameters above which activations are recomputed


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], count: int) -> float:
    """Seconds that a step takes, the mean of `count` after the warm-up."""
    for _ in range(WARMUP):
        step()
    synchronize()
    start = time.monotonic()
    for _ in range(count):
        step()
    synchronize()
    return (time.monotonic() - start) / count


def random_model(config: PretrainedConfig) -> torch.nn.Module:
    """A model of that config in bfloat16, made on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with PartialState().device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def train(config: PretrainedConfig, lora: dict, args: argparse.Namespace) -> Iterator[str]:
    """The cells of a training's row: tokens per second, MFU, GiB measured and planned."""
    shape, device = planning.shape(config, lora), PartialState().device
    large = shape.active > LARGE
    model = get_peft_model(random_model(config), LoraConfig(**lora)).train()
    if large:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    tokens = torch.randint(config.vocab_size, (args.sequences, args.tokens), device=device)
    labels = tokens[:, -args.labelled - 1 :].clone()  # of the kept logits: the first one's own token has none
    labels[:, 0] = -100

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            model(tokens, labels=labels, use_cache=False, logits_to_keep=args.labelled + 1).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    speed = tokens.numel() / seconds_of(step, args.steps)
    flops = planning.flops_per_token(shape, args.tokens, checkpointing=large)
    training = Training(
        sequences=args.sequences, tokens=args.tokens, labelled=args.labelled, accumulation=1, steps=args.steps,
        checkpointing=large, weight_bytes=2, activation_bytes=2, sharded=False, lora=lora, whole_logits=False,
    )  # fmt: skip
    planned = planning.memory(shape, training, Devices(1, 80, args.tflops, 1.0, device.type))
    del planned["process"]  # the allocator does not see it
    yield f"{speed:,.0f}"
    yield f"{speed * flops / (1e12 * args.tflops):.0%}"
    yield f"{torch.cuda.max_memory_allocated() / GIB:.1f}" if torch.cuda.is_available() else "-"
    yield f"{sum(planned.values()):.1f}"


@torch.no_grad()
def generate(config: PretrainedConfig, args: argparse.Namespace) -> Iterator[list[str]]:
    """A row for each number of experts per token: tokens per second of a forward pass, and of generation."""
    model = random_model(config).eval()
    tokens = torch.randint(config.vocab_size, (args.sequences, args.tokens), device=model.device)
    options = {
        "max_new_tokens": args.new_tokens,
        "min_new_tokens": args.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    for used in range(1, config.num_local_experts + 1):
        for layer in model.model.layers:
            layer.mlp.gate.top_k = used
        forward = seconds_of(lambda: model(tokens, use_cache=False, logits_to_keep=1), args.steps)
        writing = seconds_of(lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **options), 1)
        yield [f"{used}", f"{tokens.numel() / forward:,.0f}", f"{args.sequences * args.new_tokens / writing:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["135m", "1b", "8b"])
    add("--tflops", type=float, default=989, help="bfloat16 of the device at its best; an H100's by default")
    add("--sequences", type=int, default=4)
    add("--tokens", type=int, default=1024, help="of a sequence")
    add("--labelled", type=int, default=64, help="tokens of a sequence that carry a label")
    add("--new_tokens", type=int, default=64, help="that are generated for each sequence")
    add("--steps", type=int, default=5, help="steps that are measured")
    args = parser.parse_args()

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    size = f"{args.sequences} sequences of {args.tokens} tokens"
    training = Table("shape", "step", title=f"Training, {device}, {size}")
    for column in ("tokens/s", "MFU", "GiB", "GiB planned"):
        training.add_column(column, justify="right")
    use = Table("shape", "experts per token", title=f"The team, {device}, {size}")
    for column in ("tokens/s forward", "tokens/s generated"):
        use.add_column(column, justify="right")
    for name in args.shapes:
        dense = LlamaConfig(**SHAPES[name])
        team = family_of(dense).moe_config(dense, experts=3, used=1)
        training.add_row(name, "expert", *train(dense, EXPERT_LORA, args))
        training.add_row(name, "team", *train(team, TEAM_LORA, args))
        for row in generate(team, args):
            use.add_row(name, *row)
        print(f"{name}: measured", flush=True)
    screen(120).print(training, use)


if __name__ == "__main__":
    run(main)
