# SPDX-License-Identifier: Apache-2.0
"""Who may join a team, and what later steps know of it: an expert like the trunk in all that acts, with its own sums."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Qwen3Config

from conftest import ROLES, call, fit_router, train_expert
from finteam_experts import runs
from finteam_experts.data.files import corpus_file, read_corpus
from finteam_experts.errors import InputError
from finteam_experts.evaluation.heldout import heldout_loss
from finteam_experts.families import config_difference, family_of
from finteam_experts.files import read_json, write_json
from finteam_experts.fingerprints import expert_fingerprint, trunk_fingerprint
from finteam_experts.merging.gates import load_gates, read_gates
from finteam_experts.merging.moe import changed_team, check_expert
from finteam_experts.merging.sums import load_sums, save_sums, solve_gates
from finteam_experts.models import load_model, load_tokenizer, read_config
from finteam_experts.publishing.repositories import PublishedRun

SUMS = "router_sums.safetensors"


def change(run, kind, role, *arguments):
    call("scripts/change_team.py", kind, role, "--run_dir", run, "--base", run / "base", "--limit", 0, *arguments)


@pytest.fixture(scope="module")
def with_credit(done_run, tmp_path_factory):
    """A copy of the toy run with a credit expert that was trained from its base, and its sums; the team is as it was."""
    run = tmp_path_factory.mktemp("credit") / "run"
    shutil.copytree(done_run, run, symlinks=True)
    train_expert(run, "credit", "--learning_rate", "3e-3")
    call(
        "scripts/router_sums.py",
        "--run_dir",
        run,
        "--base",
        run / "base",
        "--role",
        "credit",
        "--tokens_per_role",
        1500,
    )
    return run


@pytest.fixture
def joining(with_credit, tmp_path):
    return shutil.copytree(with_credit, tmp_path / "run", symlinks=True)


def set_config(**keys):
    def damage(expert):
        write_json(expert / "config.json", read_json(expert / "config.json") | keys)

    return damage


def swap_tokens(expert):
    content = read_json(expert / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    (one, a), (other, b) = list(vocabulary.items())[300:302]
    vocabulary |= {one: b, other: a}
    write_json(expert / "tokenizer.json", content)


def drop_a_merge(expert):
    content = read_json(expert / "tokenizer.json")
    content["model"]["merges"].pop()
    write_json(expert / "tokenizer.json", content)


def normalise(expert):
    write_json(expert / "tokenizer.json", read_json(expert / "tokenizer.json") | {"normalizer": {"type": "Lowercase"}})


def another_end(expert):
    write_json(
        expert / "tokenizer_config.json", read_json(expert / "tokenizer_config.json") | {"eos_token": "<|endoftext|>"}
    )


def another_template(expert):
    path = expert / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_end|> "))


def rope(**keys):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | keys}


DAMAGES = {
    "rope theta": (set_config(**rope(rope_theta=500000.0)), "rope_parameters.rope_theta is 500000.0 and not 10000.0 as in"),
    "older rope theta": (set_config(rope_parameters=None, rope_theta=7.0), "rope_parameters.rope_theta is 7.0 and not 10000.0"),
    "rope type": (set_config(**rope(rope_type="linear", factor=2.0)), "rope_parameters.factor is 2.0 and not None"),
    "epsilon": (set_config(rms_norm_eps=1e-3), "rms_norm_eps is 0.001 and not 1e-06"),
    "activation": (set_config(hidden_act="gelu"), "hidden_act is gelu and not silu"),
    "positions": (set_config(max_position_embeddings=128), "max_position_embeddings is 128 and not 512"),
    "a window": (set_config(model_type="mistral", sliding_window=16, architectures=["MistralForCausalLM"]), "sliding_window is 16 and not None"),
    "family": (set_config(model_type="qwen3"), "are not of one model"),
    "tokens": (swap_tokens, "the token '.*' of its tokenizer is 30. and not 30."),
    "merges": (drop_a_merge, "the merges of its tokenizer is"),
    "normaliser": (normalise, "the normalizer of its tokenizer is .*Lowercase"),
    "template": (another_template, "the chat_template of its tokenizer is"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_an_expert_that_computes_or_reads_otherwise_is_refused(done_run, tmp_path, what):
    damage, message = DAMAGES[what]
    expert = shutil.copytree(done_run / "experts/macro", tmp_path / "expert")
    check_expert(expert, done_run / "base", trunk_fingerprint(done_run / "base"))
    damage(expert)
    for like in ("base", "moe"):
        with pytest.raises(InputError, match=message):
            check_expert(expert, done_run / like, trunk_fingerprint(done_run / "base"))


def test_what_does_not_act_may_differ(done_run, qwen3_run, tmp_path):
    for run in (done_run, qwen3_run):
        expert = shutil.copytree(run / "experts/macro", tmp_path / run.parent.name)
        keys = {"use_cache": False, "_name_or_path": "elsewhere", "transformers_version": "4.57.6", "initializer_range": 0.5,
                "attention_dropout": 0.1, "pad_token_id": 0, "sliding_window": 16}  # fmt: skip
        set_config(**keys)(expert)
        settings = read_json(expert / "tokenizer_config.json")
        write_json(expert / "tokenizer_config.json", settings | {"pad_token": "<|endoftext|>", "padding_side": "left"})
        another_end(expert)
        for like in ("base", "moe"):
            check_expert(expert, run / like, trunk_fingerprint(run / "base"))


def test_every_step_that_lets_an_expert_in_compares_it(joining):
    set_config(**rope(rope_theta=500000.0))(joining / "experts/credit")
    with pytest.raises(InputError, match="rope_theta is 500000.0 and not 10000.0"):
        change(joining, "add", "credit")
    with pytest.raises(InputError, match="rope_theta is 500000.0 and not 10000.0"):
        change(joining, "replace", "macro", "--expert", joining / "experts/credit")
    assert not list(joining.glob("moe-*-*"))
    shutil.rmtree(joining / "adapters/quant")  # it is handed over
    swap_tokens(joining / "experts/quant")
    with pytest.raises(InputError, match="experts/quant: the token '.*' of its tokenizer is 30."):
        call("scripts/merge_moe.py", "--run_dir", joining, "--overwrite")


def test_an_adapter_with_another_tokenizer_beside_it_is_refused(joining):
    adapter = joining / "adapters/credit"
    (adapter / runs.RECORD).unlink()  # as TRL saves one
    for path in (joining / "base").glob("*token*"):
        shutil.copy(path, adapter / path.name)
    shutil.copy(joining / "base/chat_template.jinja", adapter)
    shutil.copyfile(joining / "experts/credit" / SUMS, adapter / SUMS)
    shutil.copytree(joining / "experts/credit", joining / "experts/before")
    change(joining, "replace", "macro", "--expert", adapter)
    swap_tokens(adapter)
    with pytest.raises(InputError, match="adapters/credit: the token '.*' of its tokenizer is 30."):
        change(joining, "replace", "micro", "--expert", adapter)


def test_a_copy_in_another_type_is_called_one(joining):
    expert = joining / "experts/credit"
    tensors = {name: tensor.half() for name, tensor in load_file(expert / "model.safetensors").items()}
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    set_config(dtype="float16", torch_dtype="float16")(expert)
    with pytest.raises(InputError, match="It is a copy in float16 of one in float32: take that"):
        change(joining, "add", "credit")


@pytest.mark.parametrize("dtype", ["auto", "torch.bfloat16", "bf16", 3])
def test_a_type_that_transformers_cannot_read_is_named(joining, dtype):
    set_config(dtype=dtype)(joining / "experts/credit")
    with pytest.raises(InputError, match="experts/credit/config.json: dtype is .*, which transformers can't read"):
        change(joining, "add", "credit")


def test_folders_that_hold_no_expert_say_what_they_hold(joining, tmp_path):
    around = tmp_path / "around"
    shutil.copytree(joining / "adapters/credit", around / "checkpoint-4")
    with pytest.raises(
        InputError, match=r"around has no adapter_model.safetensors, but a folder in it has. Name that: .*checkpoint-4"
    ):
        change(joining, "add", "credit2", "--expert", around)
    torch.save(load_file(around / "checkpoint-4/adapter_model.safetensors"), around / "checkpoint-4/adapter_model.bin")
    (around / "checkpoint-4/adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="only adapter_model.bin, which can run code when it is read"):
        change(joining, "add", "credit2", "--expert", around / "checkpoint-4")


# --- sums


def negated(sums):
    return replace(sums, inputs=-sums.inputs)


def indefinite(sums):
    inputs = sums.inputs.clone()
    inputs[1, 0, 1] = inputs[1, 1, 0] = 10 * inputs[1].diagonal().max()
    return replace(sums, inputs=inputs)


@pytest.mark.parametrize(
    ("change_sums", "message"),
    [
        (
            lambda own: replace(own, inputs=own.inputs * 0, targets=own.targets * 0),
            "layer 0 that are not those of any text",
        ),
        (lambda own: replace(own, targets=own.targets * 0), "layer 0 that are not those of any text"),
        (lambda own: replace(own, targets=own.targets * 10), "layer 0 that are not those of any text"),
        (negated, "layer 0 that are not those of any text"),
        (indefinite, "layer 1 that are not those of any text"),
        (lambda own: replace(own, expert="0" * 16), "has the sums of another expert .0000"),
        (lambda own: replace(own, trunk="0" * 16), "was computed with a model of another trunk"),
        (lambda own: replace(own, tokens=-3), "doesn't say which expert and how many tokens"),
        (
            lambda own: replace(own, inputs=own.inputs.bfloat16(), targets=own.targets.bfloat16()),
            "has sums in torch.bfloat16 and torch.bfloat16, which have to be torch.float32",
        ),
    ],
)
def test_sums_that_are_not_those_of_the_expert_are_refused(joining, tmp_path, change_sums, message):
    source = tmp_path / "sums.safetensors"
    save_sums(change_sums(load_sums(joining / "experts/credit" / SUMS)), source)
    with pytest.raises(InputError, match=message):
        change(joining, "add", "credit", "--sums", source)
    assert not (joining / "moe-add-credit").exists()


def test_sums_of_another_role_or_of_an_earlier_adapter_are_refused(joining):
    credit = joining / "experts/credit" / SUMS
    with pytest.raises(InputError, match=r"router_sums/macro.safetensors has the sums of another expert"):
        change(joining, "add", "credit", "--sums", joining / "moe/router_sums/macro.safetensors")
    path = joining / "adapters/credit/adapter_model.safetensors"  # trained again, with its earlier sums beside it
    save_file({name: 1.1 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"router_sums.safetensors has the sums of another expert .* of an earlier training"
    ):
        change(joining, "replace", "macro", "--expert", joining / "adapters/credit", "--sums", credit)
    save_sums(load_sums(credit), joining / "moe/router_sums/quant.safetensors")  # of one who is in the team
    with pytest.raises(InputError, match=r"moe/router_sums/quant.safetensors has the sums of another expert"):
        change(joining, "remove", "macro")
    for role in ROLES:
        shutil.copyfile(credit, joining / "experts" / role / SUMS)
    with pytest.raises(InputError, match=r"experts/macro/router_sums.safetensors has the sums of another expert"):
        call("scripts/merge_moe.py", "--run_dir", joining, "--from_sums", "--overwrite")


# --- after a change


def add_corpora(run, role):
    for heldout in (False, True):
        source = corpus_file(run / "data", "macro", heldout=heldout)
        shutil.copyfile(source, corpus_file(run / "data", role, heldout=heldout))


def test_after_a_replacement_in_place_every_step_uses_the_new_expert(joining, capsys):
    run, new = joining, joining / "experts/credit"
    change(run, "replace", "macro", "--expert", new, "--output", "moe")
    assert runs.read_record(run / "moe")["experts"]["macro"]["fingerprint"] == expert_fingerprint(new)
    call("scripts/report_routing.py", "--run_dir", run, "--name", "after")
    ladder = read_json(run / "reports/after.json")["ladder"]
    tokenizer, texts = load_tokenizer(run / "moe"), read_corpus(run / "data", "micro", heldout=True)
    losses = {
        name: heldout_loss(load_model(run / "experts" / name), tokenizer, texts, max_tokens=160)
        for name in ("macro", "credit")
    }
    assert abs(losses["macro"] - losses["credit"]) > 1e-3
    assert ladder["expert: macro"]["micro"] == pytest.approx(losses["credit"], abs=1e-5)

    matrix = family_of("mixtral").expert_tensor(1, 0, "down_proj")
    expected = load_file(new / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    fit_router(run, "--overwrite")
    assert torch.equal(load_file(run / "moe/model.safetensors")[matrix], expected)
    assert load_sums(run / "moe/router_sums/macro.safetensors").expert == expert_fingerprint(new)
    sums = (run / "moe/router_sums/macro.safetensors").read_bytes()
    for options in ((), ("--overwrite",)):
        with pytest.raises(
            InputError, match=r"was changed after its merge, last by change_team.py replace macro. .* undo that"
        ):
            call("scripts/merge_moe.py", "--run_dir", run, *options)
    assert (run / "moe/router_sums/macro.safetensors").read_bytes() == sums
    assert PublishedRun(run, "me", "Team", "me/base").roles == [
        "micro",
        "quant",
    ]  # the macro adapter is not in the team
    change(run, "remove", "micro")
    assert expert_fingerprint(run / "moe-remove-micro", 0) == expert_fingerprint(new)


def test_published_adapters_are_those_of_the_team(done_run):
    assert PublishedRun(done_run, "me", "Team", "me/base").roles == list(ROLES)


def test_a_weight_that_someone_changed_is_not_fitted(joining):
    path = joining / "moe/model.safetensors"
    tensors = load_file(path)
    tensors[family_of("mixtral").expert_tensor(1, 2, "up_proj")] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="gives 'quant' another expert than the weights at its place, .* no expert"):
        fit_router(joining, "--overwrite")


def test_a_change_solves_with_the_penalty_of_the_record(joining):
    fit_router(joining, "--overwrite", "--ridge", 0.3)
    change(joining, "add", "credit")
    after = joining / "moe-add-credit"
    team = [load_sums(after / f"router_sums/{name}.safetensors") for name in (*ROLES, "credit")]
    scale = runs.read_record(joining / "moe")["router"]["results"]["scale"]
    assert torch.allclose(read_gates(after), scale * solve_gates(team, 0.3), rtol=1e-5)
    change(joining, "remove", "credit", "--model", "moe-add-credit", "--output", "again")  # and the change after that
    assert torch.allclose(read_gates(joining / "again"), read_gates(joining / "moe"), rtol=1e-4, atol=1e-6)
    assert runs.read_record(joining / "again")["router"]["ridge"] == 0.3
    change(joining, "remove", "credit", "--model", "moe-add-credit", "--output", "other", "--ridge", 0.01)
    assert not torch.allclose(read_gates(joining / "other"), read_gates(joining / "moe"), rtol=1e-2)


def test_the_expert_that_joins_must_be_finite_in_the_type_of_the_team(done_run, tmp_path):
    from finteam_experts.merging.moe import Expert, write_moe

    config = read_config(done_run / "moe")
    config.dtype = torch.float16
    expert = shutil.copytree(done_run / "experts/macro", tmp_path / "expert")
    tensors = load_file(expert / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    members = [Expert(done_run / "moe", 0), Expert(expert), Expert(done_run / "moe", 2)]
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight has values up to 1e\+06, and float16 ends at"):
        write_moe(done_run / "moe", members, read_gates(done_run / "moe"), config, tmp_path / "moe")


def test_names_of_a_changed_team():
    assert changed_team(["a", "b"], "add", "c") == ["a", "b", "c"]


# --- the merge's config and gates


def merged(run, tmp_path, **keys):
    from conftest import REPOSITORY

    text = (REPOSITORY / "moe_merge.yaml").read_text()
    path = tmp_path / "merge.yaml"
    path.write_text(text.replace("gate_mode: hidden", f"gate_mode: {keys['gate_mode']}"))
    call("scripts/merge_moe.py", "--run_dir", run, "--merge_config", path, "--overwrite")
    return run / "moe"


def test_random_gates_are_reported_as_they_are_on_disk(copied_run, tmp_path):
    moe = merged(copied_run, tmp_path, gate_mode="random")
    gates, report = read_gates(moe), copied_run / "reports/random.json"
    assert torch.equal(gates, load_gates(moe, "random"))
    call("scripts/report_routing.py", "--run_dir", copied_run, "--name", "random")
    found = json.loads(report.read_text())
    assert [name for name in found["gates"] if ", " not in name] == ["random"]
    model, tokenizer = load_model(moe), load_tokenizer(moe)
    texts = read_corpus(copied_run / "data", "quant", heldout=True)
    own = heldout_loss(model, tokenizer, texts, max_tokens=160)  # with the gates that are on disk
    assert found["ladder"]["moe, random router"]["quant"] == pytest.approx(own, abs=1e-5)
    shutil.rmtree(moe)
    assert torch.equal(read_gates(merged(copied_run, tmp_path, gate_mode="random")), gates)


def test_averaged_gates_do_not_average_padding(copied_run, tmp_path):
    gates = load_gates(merged(copied_run, tmp_path, gate_mode="hidden_avg"), "hidden_avg")
    base, tokenizer = (
        load_model(copied_run / "base", torch.bfloat16),
        AutoTokenizer.from_pretrained(copied_run / "base"),
    )
    from conftest import REPOSITORY
    from finteam_experts.merging.config import read_merge_config

    for place, expert in enumerate(read_merge_config(REPOSITORY / "moe_merge.yaml").experts):
        means = []
        for prompt in expert.positive_prompts:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
            with torch.no_grad():
                states = base(ids, output_hidden_states=True).hidden_states[:-1]
            means.append(torch.stack(states)[:, 0].float().mean(1))
        expected = torch.nn.functional.normalize(torch.stack(means).mean(0), dim=-1)
        assert torch.nn.functional.cosine_similarity(gates[:, place], expected, dim=-1).min() > 0.999


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (LlamaConfig, {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
        (LlamaConfig, {"hidden_act": "gelu", "head_dim": 16, "attention_dropout": 0.1}),
        (MistralConfig, {"sliding_window": 16, "head_dim": 8, "hidden_act": "relu"}),
        (Qwen3Config, {"head_dim": 16, "rms_norm_eps": 1e-4, "hidden_act": "gelu"}),
    ],
)
def test_all_that_acts_in_the_base_acts_in_the_moe(make_base, config_class, options, tmp_path):
    """With a key that is left over from another model, which does not act in the base."""
    base = make_base(config_class=config_class, **options)
    leftovers = {"sliding_window": 7} if config_class is LlamaConfig else {}
    set_config(router_jitter_noise=0.5, num_experts_per_tok=2, output_router_logits=True, **leftovers)(base)
    from finteam_experts.merging.moe import Expert, write_moe

    config = read_config(base)
    moe_config = family_of(config).moe_config(config, 2, 1)
    gates = torch.randn(2, 2, 32)
    write_moe(base, [Expert(base), Expert(base)], gates, moe_config, tmp_path / "moe")
    tokens = torch.arange(5, 105)[None]
    with torch.no_grad():
        expected, found = load_model(base)(tokens).logits, load_model(tmp_path / "moe")(tokens).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    written = read_config(tmp_path / "moe")
    assert config_difference(config, written) is None
    assert (written.num_local_experts, written.num_experts_per_tok) == (2, 1)
