# SPDX-License-Identifier: Apache-2.0
"""Bases as they lie on the Hub: right, or refused by the first command with what is wrong. The slow test takes them all the way."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import CHAT_TEMPLATE, REPOSITORY, call, form_of, instruct_tune, train_expert
from finteam_experts import runs
from finteam_experts.data.files import read_task
from finteam_experts.data.tasks import default_tasks, render_all
from finteam_experts.errors import InputError
from finteam_experts.evaluation.answers import greedy_answers
from finteam_experts.evaluation.heldout import answer_scores
from finteam_experts.files import write_json
from finteam_experts.fingerprints import PLAIN_TEXT_PARTS, fingerprint
from finteam_experts.models import check_base, load_model, stored_dtype
from finteam_experts.runs import read_record
from templates import TEMPLATES, with_template

TASKS = default_tasks()

SIZE = {
    "vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip

MERGE = REPOSITORY / "moe_merge.yaml"


def change_json(path, **changes):
    content = json.loads(path.read_text())
    content = {key: value for key, value in (content | changes).items() if value != "remove"}
    path.write_text(json.dumps(content))


def change_weights(base, change):
    path = base / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def add_consolidated(base):
    """All weights once more under other names, as in mistralai's repositories."""
    tensors = {
        name.replace("model.", "").replace("self_attn", "attention"): t
        for name, t in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "consolidated.safetensors")


def add_inv_freq(base):
    """As in Llama 2's weights."""
    change_weights(
        base, lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    )


def shard(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="40KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2


def add_variant(base):
    shutil.copy(base / "model.safetensors", base / "model.fp16.safetensors")


def bare_config(base):
    """As few keys as old configs have."""
    for key in (
        "head_dim",
        "dtype",
        "attention_bias",
        "mlp_bias",
        "rms_norm_eps",
        "use_cache",
        "pretraining_tp",
        "hidden_act",
    ):
        change_json(base / "config.json", **{key: "remove"})


@pytest.mark.parametrize("change", [add_consolidated, add_inv_freq, shard, add_variant, bare_config])
def test_a_base_with_more_or_less_than_it_needs(new_run, change):
    base = new_run / "base"
    size = (base / "model.safetensors").stat().st_size
    change(base)
    check_base(base)
    for role in ("macro", "micro", "quant"):
        train_expert(new_run, role)
    call("scripts/merge_moe.py", "--run_dir", new_run)
    instruct_tune(new_run, "dense")
    load_model(new_run / "moe")
    load_model(new_run / "dense-instruct")
    for part in ("dense-instruct", "experts/macro"):  # nothing is there twice
        assert sum(path.stat().st_size for path in (new_run / part).glob("*.safetensors")) < 1.2 * size


def test_the_head_of_tied_weights(new_run):
    base = new_run / "base"
    change_weights(base, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    check_base(base)
    change_weights(base, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(
        InputError, match="lm_head.weight differs from model.embed_tokens.weight.*Set tie_word_embeddings to false"
    ):
        check_base(base)


BAD = {
    "adapter": (lambda base: change_weights(base, lambda t: {f"base_model.{name}": v for name, v in t.items()}), "its weights lack model"),
    "one tensor missing": (
        lambda base: change_weights(base, lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k}),
        r"lack model.layers.1.mlp.up_proj.weight \(1 in all\)",
    ),
    "one too many": (lambda base: change_weights(base, lambda t: t | {"model.vision.weight": torch.ones(2)}), "have, unlike its architecture, model.vision.weight"),
    "another shape": (lambda base: change_json(base / "config.json", intermediate_size=64), r"gate_proj.weight is \[48, 32\], and by config.json \[64, 32\]"),
    "biases": (lambda base: change_json(base / "config.json", attention_bias=True), "attention_bias is true"),
    "quantised": (lambda base: change_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "quantised"),
    "another type": (lambda base: change_json(base / "config.json", model_type="gemma2"), "model_type is 'gemma2'"),
    "an unknown type": (lambda base: change_json(base / "config.json", model_type="llamma"), "config.json: transformers can't read it"),
    "a config that is cut off": (lambda base: (base / "config.json").write_text('{"model_type": "lla'), "config.json, line 1: not JSON .* cut off"),
    "weights that are cut off": (lambda base: (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000]), "model.safetensors can't be read .*cut off"),
    "a shard that is missing": (
        lambda base: (shard(base), sorted(base.glob("model-*.safetensors"))[1].unlink()),
        r"has no model-00002-of-.*which model.safetensors.index.json lists",
    ),
    "other files alone": (
        lambda base: (add_consolidated(base), (base / "model.safetensors").unlink()),
        "has neither model.safetensors nor .*; found consolidated.safetensors",
    ),
    "a tokenizer of another size": (lambda base: add_tokens(base), r"the tokenizer has 503 tokens and the model's vocabulary 500"),
    "no end of text": (lambda base: change_json(base / "tokenizer_config.json", eos_token="remove"), "has no eos_token"),
    "no template": (lambda base: (base / "chat_template.jinja").unlink(), "has no chat template"),
    "a tokenizer that is cut off": (lambda base: (base / "tokenizer.json").write_text('{"version"'), "its tokenizer can't be loaded"),
}  # fmt: skip


def add_tokens(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize("case", BAD)
def test_a_base_that_cannot_be_used_is_refused_by_the_first_command(new_run, case):
    damage, message = BAD[case]
    damage(new_run / "base")
    with pytest.raises(InputError, match=message):
        train_expert(new_run, "macro")
    with pytest.raises(InputError, match=message):
        instruct_tune(new_run, "dense")
    assert not (new_run / "adapters").exists()


@pytest.mark.parametrize("case", ["biases", "quantised", "another type", "an unknown type"])
def test_no_plan_is_made_for_such_a_base(new_run, case):
    damage, message = BAD[case]
    damage(new_run / "base")
    with pytest.raises(InputError, match=message):
        call("scripts/plan.py", "--recipes", "recipes/sample", "--base", new_run / "base", "--cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", 0), "--gpus is 0; it has to be above 0"),
        (("--recipes", "nowhere"), "--recipes nowhere: no such folder"),
    ],
)
def test_bad_arguments_of_a_plan(toy_base, arguments, message):
    with pytest.raises(InputError, match=message):
        call("scripts/plan.py", "--base", toy_base, *arguments)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("dtype: bf16", "dtype 'bf16' is unknown. Known: float32, bfloat16, float16"),
        ("architecture: qwen", "'architecture' can't be set here"),
        ("shared_experts: []", "'shared_experts' can't be set here"),
        ("    residual_scale: 0.1", "'experts.2..residual_scale' can't be set here"),
        ("    noise_scale: 0.1", "'experts.2..noise_scale' can't be set here"),
    ],
)
def test_keys_of_mergekit_that_this_merge_has_no_use_for(done_run, tmp_path, lines, message):
    path = tmp_path / "merge.yaml"
    path.write_text(f"{(REPOSITORY / 'moe_merge.yaml').read_text()}{lines}\n")
    with pytest.raises(InputError, match=message):
        call("scripts/merge_moe.py", "--run_dir", done_run, "--merge_config", path)


@pytest.mark.parametrize("base_model", ["meta-llama/Llama-3.1-8B-Instruct", "./other"])
def test_another_base_in_the_merge_file(done_run, tmp_path, base_model):
    path = tmp_path / "merge.yaml"
    path.write_text(MERGE.read_text().replace("base_model: base", f"base_model: {base_model}"))
    with pytest.raises(InputError, match="base_model is .*It has to be 'base'.*--base"):
        call("scripts/merge_moe.py", "--run_dir", done_run, "--merge_config", path)


def test_a_merge_file_that_is_not_utf8(done_run, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_bytes(MERGE.read_text().encode() + "# größer".encode("latin1"))
    with pytest.raises(InputError, match="merge.yaml, line 26: not UTF-8"):
        call("scripts/merge_moe.py", "--run_dir", done_run, "--merge_config", path)


def test_the_merge_has_the_type_that_its_file_says(copied_run, tmp_path):
    shutil.rmtree(copied_run / "moe")
    path = tmp_path / "merge.yaml"
    path.write_text(MERGE.read_text() + "dtype: bfloat16\n")
    call("scripts/merge_moe.py", "--run_dir", copied_run, "--merge_config", path)
    assert stored_dtype(copied_run / "moe") == torch.bfloat16
    call("scripts/fit_router.py", "--run_dir", copied_run, "--tokens_per_role", 600)


# --- the matrix: bases x templates through the whole pipeline

BASES = {
    "tied-fp32": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}, torch.float32, ()),
    "untied-bf16": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}, torch.bfloat16, ()),
    "no-dtype-bf16": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}, torch.bfloat16, (bare_config,)),
    "sharded-with-extras": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}, torch.float32, (add_inv_freq, add_consolidated, shard)),
    "head-dim-16": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": False}, torch.float32, ()),
    "rope-llama3": (
        LlamaForCausalLM, LlamaConfig,
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 128}}, torch.float32, (),
    ),
    "rope-linear": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, torch.float32, ()),
    "rope-yarn-bf16": (
        LlamaForCausalLM, LlamaConfig,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}},
        torch.bfloat16, (),
    ),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 16, "head_dim": 8}, torch.float32, ()),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}, torch.float32, ()),
    "qwen3-untied-bf16": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": False}, torch.bfloat16, (shard,)),
    "mistral-no-window": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 8}, torch.float32, (shard,)),
}  # fmt: skip
# Every base once and every template once, each pair another mixture
PAIRS = [(base, list(TEMPLATES)[place % len(TEMPLATES)]) for place, base in enumerate(BASES)]
PAIRS += [("tied-fp32", name) for name in list(TEMPLATES)[len(BASES) :]]


def build(run_dir, toy_base, name, template):
    model, config, options, dtype, changes = BASES[name]
    base = run_dir / "base"
    shutil.copytree(
        toy_base, base, ignore=shutil.ignore_patterns("model*", "config.json", "generation*"), dirs_exist_ok=True
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer = with_template(tokenizer, TEMPLATES.get(template, CHAT_TEMPLATE), "<|im_end|>", "<|im_start|>")
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    size = SIZE | options | {"vocab_size": max(SIZE["vocab_size"], len(tokenizer))}
    model(config(**size)).to(dtype).save_pretrained(base)
    for change in changes:
        change(base)
    return base


@pytest.mark.parametrize("name", BASES)
def test_three_experts_that_are_the_base_give_its_logits(toy_base, tmp_path, name):
    """What config and weights say is carried over: rope, head dimension, key heads, window, ties, type."""
    base = build(tmp_path, toy_base, name, "chatml")
    adapted = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
    for role in ("macro", "micro", "quant"):  # a fresh LoRA changes nothing
        folder = tmp_path / f"adapters/{role}"
        adapted.save_pretrained(folder)
        write_json(
            folder / runs.RECORD, {"step": "train_expert", "inputs": {"base": fingerprint(base, PLAIN_TEXT_PARTS)}}
        )
    call("scripts/merge_moe.py", "--run_dir", tmp_path)
    probe = torch.arange(5, 105)[None]
    with torch.no_grad():
        expected, found = load_model(base)(probe).logits.float(), load_model(tmp_path / "moe")(probe).logits.float()
    close = {"atol": 1e-4, "rtol": 1e-4} if BASES[name][3] == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(found, expected, **close)
    assert stored_dtype(tmp_path / "moe") == BASES[name][3]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_a_base_goes_all_the_way(toy_base, toy_data, tmp_path, name, template):
    """Train, merge, router, report, tuning of team and dense model, evaluation, and both saved models loaded again."""
    build(tmp_path, toy_base, name, template)
    data = ("--data_dir", toy_data)
    for role in ("macro", "micro", "quant"):
        train_expert(tmp_path, role, *data)
    call("scripts/merge_moe.py", "--run_dir", tmp_path)
    call("scripts/fit_router.py", "--run_dir", tmp_path, "--tokens_per_role", 600, *data)
    call("scripts/report_routing.py", "--run_dir", tmp_path, "--passages", 2, "--max_tokens", 40, *data)
    hard = ("--max_steps", 100, "--learning_rate", "1e-2", "--lora_r", 16, "--save_steps", 200, *data)
    instruct_tune(tmp_path, "moe", *hard, "--routing_steps", 0)
    instruct_tune(tmp_path, "dense", *hard)
    call("scripts/evaluate.py", "--run_dir", tmp_path, *data)
    for name in ("dense-instruct", "moe-instruct"):
        form, model = (
            form_of(tmp_path / name),
            load_model(tmp_path / name, torch.float32),
        )  # bfloat16 logits are often equal
        assert read_record(tmp_path / name)["results"]["merge_difference"] < 1e-2
        task = TASKS["headlines"]
        prompts = render_all(task, read_task(toy_data, task, "train"), form.tokenizer)
        asked = [(prompt, label) for prompt in prompts for label in task.labels]
        scores = answer_scores(model, exchanges := form.exchanges(asked))
        answers = dict(zip(prompts, greedy_answers(model, form, prompts), strict=True))
        for (prompt, label), exchange, score in zip(asked, exchanges, scores, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([exchange.prompt + exchange.scored])).logits[0, :-1].float()
            assert score.is_greedy == (logits[-len(exchange.scored) :].argmax(-1).tolist() == exchange.scored)
            assert (
                not score.is_greedy or answers[prompt].strip() == label
            )  # what is likeliest, token by token, is written
