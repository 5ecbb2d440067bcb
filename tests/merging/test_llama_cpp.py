# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's converter takes a tuned team of each family, and llama.cpp writes with it what transformers does."""

import json
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from conftest import ROLES, call, chat, fit_router, instruct_tune, load_script, train_expert
from finteam_experts.models import load_model

pytestmark = pytest.mark.slow

# Greedy tokens of a prompt, in a process of its own: the package has to be found before this environment's.
GENERATE = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx = sys.argv[1], 512
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type(0)  # fp32: a toy's next tokens are nearly as likely as each other
params.flash_attn_type = xllamacpp.llama_flash_attn_type(0)  # off
server = xllamacpp.Server(params)
def post(place, **content):
    request = urllib.request.Request(f"{server.listening_address}/{place}", json.dumps(content).encode())
    return json.load(urllib.request.urlopen(request))
ids = post("tokenize", content=sys.argv[2], add_special=False, parse_special=True)["tokens"]
written = post("completion", prompt=ids, n_predict=40, samplers=["top_k"], top_k=1, ignore_eos=True, return_tokens=True)
print("FOUND", json.dumps([ids, written["tokens"]]), flush=True)
"""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """A folder with the sources of llama.cpp (converter) in `llama.cpp`, and with its bindings in `packages`."""
    folder = tmp_path_factory.mktemp("llama")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", folder / "packages", "xllamacpp==2026.10.11549"], check=True
    )
    subprocess.run(
        [
            *pip,
            "download",
            "--no-deps",
            "--no-binary",
            "llama-cpp-python",
            "--dest",
            folder,
            "llama-cpp-python==0.3.36",
        ],
        check=True,
    )
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    shutil.move(next(folder.glob("llama_cpp_python-*")) / "vendor/llama.cpp", folder / "llama.cpp")
    return folder


@pytest.fixture(params=[LlamaConfig, Qwen3Config], ids=["llama", "qwen3"])
def team(request, toy_data, tmp_path):
    """The run folder of a toy team with SmolLM2's tokenizer: the converter knows tokenizers by what they do."""
    source = load_script("scripts/make_base.py").model_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = request.param(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    shutil.copytree(toy_data, tmp_path / "data")
    for role in ROLES:
        train_expert(tmp_path, role)
    call("scripts/merge_moe.py", "--run_dir", tmp_path)
    fit_router(tmp_path)
    instruct_tune(tmp_path, "moe")
    return tmp_path


def test_the_same_greedy_tokens_as_transformers(team, llama_cpp, tmp_path):
    for part in ("moe", "moe-instruct"):
        gguf = tmp_path / f"{part}.gguf"
        converted = subprocess.run(
            [sys.executable, llama_cpp / "llama.cpp/convert_hf_to_gguf.py", team / part, "--outfile", gguf, "--outtype",
             "f32"], env={"PYTHONPATH": str(llama_cpp / "llama.cpp/gguf-py")}, capture_output=True, text=True,
        )  # fmt: skip
        assert converted.returncode == 0, converted.stderr[-2000:]
        tokenizer, model = AutoTokenizer.from_pretrained(team / part), load_model(team / part)
        text = tokenizer.apply_chat_template(chat("Net sales rose to EUR 235 mn from 191 mn. Is this good news?"),
                                             tokenize=False, add_generation_prompt=True)  # fmt: skip
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(40):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        ended = subprocess.run(
            [sys.executable, "-c", GENERATE, gguf, text], env={"PYTHONPATH": str(llama_cpp / "packages")},
            capture_output=True, text=True,
        )  # fmt: skip
        assert "FOUND" in ended.stdout, ended.stderr[-2000:]
        prompt, written = json.loads(ended.stdout.split("FOUND")[1])
        assert prompt + written == ids[0].tolist()
