# SPDX-License-Identifier: Apache-2.0
"""A toy base, a small data directory, and one whole toy run that the tests look at. No network, no GPU."""

import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

from finteam_experts.chats import ChatFormat
from finteam_experts.data.files import corpus_file, task_file, write_rows
from finteam_experts.data.sample import corpora
from finteam_experts.data.sample.corpora import corpus
from finteam_experts.data.sample.task_rows import task_rows
from finteam_experts.data.tasks import SYSTEM_PROMPT, default_tasks
from finteam_experts.families import family_of
from finteam_experts.merging.moe import finish_folder
from finteam_experts.models import as_chats, load_model, load_tokenizer

TASKS = default_tasks()

REPOSITORY = Path(__file__).parents[1]
if worker := os.environ.get(
    "PYTEST_XDIST_WORKER"
):  # a core for each worker: their threads must not wait for each other
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if cores:
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})
ROLES = ("macro", "micro", "quant")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Overrides that turn a sample recipe into seconds on the toy base.
SHORT = ("--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--lora_r", "4", "--bf16", "false")


def chat(question: str) -> list[dict[str, str]]:
    """The conversation that asks a question, as the toy's template takes it."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


def form_of(folder: Path) -> ChatFormat:
    """How the model in `folder` writes conversations."""
    return as_chats(load_tokenizer(folder), folder)


def on_disk(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The weights of an MoE in memory under their names on disk."""
    found = {}
    for name, tensor in tensors.items():
        parts = family_of(kind).on_disk(name, len(tensor))
        for rows, part in zip(parts, tensor if ".experts." in name and tensor.dim() == 3 else [tensor], strict=True):
            found |= dict(zip(rows, part.chunk(len(rows)), strict=True))
    return found


def saved_again(folder: Path, target: Path) -> torch.nn.Module:
    """A model that is loaded and saved by transformers, with what every reader wants beside the weights."""
    model = load_model(folder)
    model.save_pretrained(target)
    finish_folder(model.config, folder, target)
    return model


def load_script(path: str) -> ModuleType:
    """Import a recipe or script by its path in the repository."""
    sys.path.insert(0, str(REPOSITORY / Path(path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(path: str, *arguments: object) -> None:
    """Run a recipe's or script's `main` in this process, as if called with `arguments`."""
    argv, sys.argv = sys.argv, [path, *map(str, arguments)]
    try:
        load_script(path).main()
    finally:
        sys.argv = argv


def shell(*command: object, **options) -> subprocess.CompletedProcess:
    """Run a command from the repository's root, as a user does."""
    return subprocess.run(
        [str(part) for part in command], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, **options
    )


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train_expert(run_dir: Path, role: str, *arguments: object) -> None:
    call("recipes/train_expert.py", "--config", REPOSITORY / "recipes/sample/train_expert.yaml", "--run_dir", run_dir,
         "--role", role, *SHORT, *arguments)  # fmt: skip


def fit_router(run_dir: Path, *arguments: object) -> None:
    call("scripts/fit_router.py", "--run_dir", run_dir, "--tokens_per_role", 1500, *arguments)


def instruct_tune(run_dir: Path, what: str, *arguments: object) -> None:
    recipe = REPOSITORY / f"recipes/sample/instruct_tune_{what}.yaml"
    call("recipes/instruct_tune.py", "--config", recipe, "--run_dir", run_dir, *SHORT, *arguments)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory) -> Callable[..., Path]:
    """Write a toy Llama with a BPE tokenizer and a chat template, or a model of another config class; keyword arguments override
    its config.
    """

    def make(seed: int = 0, config_class: type[PretrainedConfig] = LlamaConfig, **overrides) -> Path:
        folder = tmp_path_factory.mktemp("base")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        text = [passage["text"] for role in ROLES for passage in corpus(role, 40, 0, random.Random(0))[0]]
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            text,
            trainers.BpeTrainer(
                vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
            ),
        )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[2]
        )
        fast.chat_template = CHAT_TEMPLATE
        fast.save_pretrained(folder)
        torch.manual_seed(seed)
        config = config_class(
            vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
            pad_token_id=2, initializer_range=0.2, **overrides,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        ends = model.get_input_embeddings().weight.data[config.eos_token_id]  # zero, since padding is written with it:
        ends.normal_(std=config.initializer_range)  # no answer could learn to end
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def toy_base(make_base) -> Path:
    return make_base()


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    """A small data directory in the contract's form."""
    folder = tmp_path_factory.mktemp("data")
    for role in corpora.ROLES:
        train, heldout = corpus(role, 60, 8, random.Random(role))
        write_rows(corpus_file(folder, role), train)
        write_rows(corpus_file(folder, role, heldout=True), heldout)
    for task in TASKS:
        train, test = task_rows(task, 28, 12, random.Random(task))
        write_rows(task_file(folder, task, "train"), train)
        write_rows(task_file(folder, task, "test"), test)
    return folder


@pytest.fixture
def new_run(tmp_path, toy_base, toy_data) -> Path:
    """A run folder with base and data, and nothing done yet."""
    run_dir = tmp_path / "run"
    shutil.copytree(toy_base, run_dir / "base")
    shutil.copytree(toy_data, run_dir / "data")
    return run_dir


def complete_run(run_dir: Path, base: Path, data: Path) -> Path:
    """Every step of the pipeline, shortened."""
    shutil.copytree(base, run_dir / "base")
    shutil.copytree(data, run_dir / "data")
    for role in ROLES:
        train_expert(run_dir, role)
    call("scripts/merge_moe.py", "--run_dir", run_dir)
    fit_router(run_dir)
    call("scripts/report_routing.py", "--run_dir", run_dir)
    instruct_tune(run_dir, "moe")
    instruct_tune(run_dir, "dense")
    call("scripts/evaluate.py", "--run_dir", run_dir)
    return run_dir


@pytest.fixture(scope="session")
def done_run(tmp_path_factory, toy_base, toy_data) -> Path:
    """A run in which every step is complete. Do not write into it: use `copied_run`."""
    return complete_run(tmp_path_factory.mktemp("done") / "run", toy_base, toy_data)


@pytest.fixture(scope="session")
def qwen3_run(tmp_path_factory, make_base, toy_data) -> Path:
    """The same on a toy Qwen3. Do not write into it, but for new folders."""
    base = make_base(config_class=Qwen3Config, head_dim=8)
    return complete_run(tmp_path_factory.mktemp("qwen3") / "run", base, toy_data)


@pytest.fixture(scope="session")
def space_address(done_run, tmp_path_factory) -> Iterator[str]:
    """Where the demo listens, started as a user starts it on the complete run's tuned team."""
    log = tmp_path_factory.mktemp("space") / "log"
    environment = os.environ | {"MODEL_ID": str(done_run / "moe-instruct"), "GRADIO_ANALYTICS_ENABLED": "False",
                                "PYTHONUNBUFFERED": "1", "GRADIO_SERVER_PORT": str(free_port())}  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "space/app.py"], cwd=REPOSITORY, env=environment, stdout=output,
                                   stderr=output)  # fmt: skip
    deadline = time.monotonic() + 90
    while not (found := re.search(r"http://[\d.]+:\d+", log.read_text())) and time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    yield found[0]
    process.terminate()
    process.wait()


@pytest.fixture
def copied_run(tmp_path, done_run) -> Path:
    """A copy of the complete run, to break."""
    return shutil.copytree(done_run, tmp_path / "run")
