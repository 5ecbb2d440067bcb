# SPDX-License-Identifier: Apache-2.0
"""The release layout: the names, keys and files that each reader looks for, and the same logits in all of them."""

import json
import os
import re
import subprocess
import sys

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import call
from finteam_experts import runs
from finteam_experts.errors import InputError
from finteam_experts.models import load_model
from finteam_experts.release import COMPANION_FILES, save_release

EXPERT = re.compile(r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.(w[123])\.weight")


def names(folder):
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found += tensors.keys()
    return found


@pytest.fixture(scope="module")
def released(done_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "moe-release"
    call("scripts/release.py", "--model", done_run / "moe", "--release", folder)
    return folder


def test_released_model_is_the_same(done_run, released):
    tokens = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.equal(load_model(done_run / "moe")(tokens).logits, load_model(released)(tokens).logits)
    assert runs.read_record(released)["team"] == runs.read_record(done_run / "moe")["team"]


def test_tensor_names_are_those_of_vllm_and_llama_cpp(done_run, released):
    """vLLM's Mixtral and llama.cpp's converter take one tensor an expert and matrix; the rest has Llama's names."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_blocks=2)
    for folder in (released, done_run / "moe-instruct"):
        experts = [EXPERT.fullmatch(name) for name in names(folder)]
        matrices = [match.group(1) for match in experts if match]
        assert {matrix: matrices.count(matrix) for matrix in ("w1", "w2", "w3")} == {"w1": 6, "w2": 6, "w3": 6}
        for name, match in zip(names(folder), experts, strict=True):
            if match:  # the converter stacks the experts of a matrix under this name
                name = re.sub(
                    r"model\.(layers\.\d+)\.block_sparse_moe\.experts\.\d+", r"\1.feed_forward.experts", name
                )
            assert table.get_name(name, try_suffixes=(".weight",)), name


def test_config_has_the_keys_of_both_generations(done_run, released):
    for folder in (released, done_run / "moe-instruct"):
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        assert config["torch_dtype"] == config["dtype"] == "float32"
        assert config["output_router_logits"] is False
        assert "rope_scaling" not in config


def test_scaled_rope_is_there_for_both_generations(tmp_path, make_base):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128}  # fmt: skip
    base = make_base(rope_parameters=rope)
    save_release(load_model(base), base, tmp_path / "release")
    config = json.loads((tmp_path / "release/config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "release").config.rope_parameters == rope


def test_companions_are_the_bases(done_run, released):
    for folder in (released, done_run / "moe-instruct", done_run / "dense-instruct"):
        for name in COMPANION_FILES:
            source, copy = done_run / "base" / name, folder / name
            assert source.exists() == copy.exists()
            if name != "tokenizer_config.json" and source.exists():
                assert source.read_bytes() == copy.read_bytes()
        before, after = (AutoTokenizer.from_pretrained(path) for path in (done_run / "base", folder))
        assert (
            json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
        )
        assert before.get_vocab() == after.get_vocab()
        assert before.special_tokens_map == after.special_tokens_map
        chat = [{"role": "user", "content": "Rates rose."}]
        assert before.apply_chat_template(chat, tokenize=False) == after.apply_chat_template(chat, tokenize=False)


def test_what_is_not_a_moe_is_refused(done_run, tmp_path):
    for model, message in (
        (done_run / "base", "model_type is 'llama', not a MoE"),
        (tmp_path, "not a model folder"),
    ):
        with pytest.raises(InputError, match=message):
            call("scripts/release.py", "--model", model, "--release", tmp_path / "release")
        assert not (tmp_path / "release").exists()
    with pytest.raises(InputError, match="name another folder"):
        call("scripts/release.py", "--model", done_run / "moe", "--release", done_run / "moe")


@pytest.mark.slow
def test_same_logits_in_transformers_4(done_run, released, tmp_path):
    """In a new process with transformers 4.57, installed beside this environment's torch."""
    packages = tmp_path / "packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", packages, "--no-deps", "transformers==4.57.6",
         "tokenizers==0.22.2", "huggingface-hub==0.36.2"], check=True,
    )  # fmt: skip
    code = (
        "import sys, torch, transformers; assert transformers.__version__ == '4.57.6'\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n"
        "folder, out = sys.argv[1:]; tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)\n"
        "assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), report\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Rates rose.'}], tokenize=False)\n"
        "ids = tokenizer(text, return_tensors='pt')['input_ids']\n"
        "torch.save((text, ids, model(ids).logits.detach()), out)"
    )
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    for folder in (released, done_run / "moe-instruct", done_run / "dense-instruct"):
        out = tmp_path / "logits.pt"
        ended = subprocess.run(
            [sys.executable, "-c", code, folder, out], env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        text, ids, logits = torch.load(out)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Rates rose."}], tokenize=False) == text
        assert torch.equal(tokenizer(text, return_tensors="pt")["input_ids"], ids)
        with torch.no_grad():
            assert torch.allclose(load_model(folder)(ids).logits, logits, atol=1e-6)
