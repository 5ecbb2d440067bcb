# SPDX-License-Identifier: Apache-2.0
"""The one layout of an MoE: the names, keys and files that each reader looks for, and the same logits in all of them."""

import json
import os
import re
import subprocess
import sys

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import call, saved_again
from finteam_experts.errors import InputError
from finteam_experts.models import COMPANION_FILES, load_model

EXPERT = re.compile(r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.(w[123])\.weight")


def names(folder):
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found += tensors.keys()
    return found


def test_an_moe_that_is_loaded_and_saved_keeps_its_layout(done_run, tmp_path):
    model, tokens = saved_again(done_run / "moe", tmp_path), torch.arange(5, 60)[None]
    assert sorted(names(tmp_path)) == sorted(names(done_run / "moe"))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens).logits, model(tokens).logits)


def test_an_moe_of_fused_experts_says_that_it_has_to_be_made_again(copied_run):
    file = copied_run / "moe/model.safetensors"
    save_file({"model.layers.0.mlp.gate.weight": torch.zeros(3, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="moe has no tensor model.layers.0.block_sparse_moe.*make it again"):
        call("scripts/fit_router.py", "--run_dir", copied_run)


def test_tensor_names_are_those_of_vllm_and_llama_cpp(done_run):
    """vLLM's Mixtral and llama.cpp's converter take one tensor per expert and matrix; the rest has Llama's names."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_blocks=2)
    for folder in (done_run / "moe", done_run / "moe-instruct"):
        experts = [EXPERT.fullmatch(name) for name in names(folder)]
        matrices = [match.group(1) for match in experts if match]
        assert {matrix: matrices.count(matrix) for matrix in ("w1", "w2", "w3")} == {"w1": 6, "w2": 6, "w3": 6}
        for name, match in zip(names(folder), experts, strict=True):
            if match:  # the converter stacks the experts of a matrix under this name
                name = re.sub(
                    r"model\.(layers\.\d+)\.block_sparse_moe\.experts\.\d+", r"\1.feed_forward.experts", name
                )
            assert table.get_name(name, try_suffixes=(".weight",)), name


def test_config_has_the_keys_of_both_generations(done_run):
    for folder in (done_run / "moe", done_run / "moe-instruct"):
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        assert config["torch_dtype"] == config["dtype"] == "float32"
        assert config["output_router_logits"] is False
        assert "rope_scaling" not in config


def test_scaled_rope_is_there_for_both_generations(tmp_path, make_base):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128}  # fmt: skip
    base = make_base(rope_parameters=rope)
    saved_again(base, tmp_path / "release")
    config = json.loads((tmp_path / "release/config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "release").config.rope_parameters == rope


def test_companions_are_the_bases(done_run):
    for folder in (done_run / "moe", done_run / "moe-instruct", done_run / "dense-instruct"):
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


@pytest.mark.slow
def test_same_logits_in_transformers_4(done_run, qwen3_run, tmp_path):
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
    folders = [done_run / part for part in ("moe", "moe-instruct", "dense-instruct")]
    for folder in (*folders, qwen3_run / "moe", qwen3_run / "moe-instruct"):
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
