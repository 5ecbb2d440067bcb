# SPDX-License-Identifier: Apache-2.0
"""Step 2: the MoE is its experts and nothing else, and what can't be merged is refused before anything is written."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MixtralForCausalLM

from conftest import REPOSITORY, ROLES, call, on_disk, shell
from finteam_experts import runs
from finteam_experts.errors import InputError
from finteam_experts.families import family_of
from finteam_experts.merging.config import read_merge_config, roles
from finteam_experts.merging.gates import load_gates
from finteam_experts.models import COMPANION_FILES, load_model

MERGE = REPOSITORY / "moe_merge.yaml"


@pytest.fixture
def unmerged(copied_run):
    """A run with trained adapters and no merge."""
    for name in ("experts", "moe", "moe-instruct"):
        shutil.rmtree(copied_run / name)
    return copied_run


def merge(run_dir, *arguments):
    call("scripts/merge_moe.py", "--run_dir", run_dir, *arguments)


def test_what_the_merge_writes(done_run):
    model = load_model(done_run / "moe")
    assert isinstance(model, MixtralForCausalLM)
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (3, 1)
    base = load_file(done_run / "base/model.safetensors")
    state = model.state_dict()
    assert torch.equal(state["model.layers.1.self_attn.q_proj.weight"], base["model.layers.1.self_attn.q_proj.weight"])
    for position, role in enumerate(ROLES):
        expert = load_file(done_run / "experts" / role / "model.safetensors")
        down = state["model.layers.0.mlp.experts.down_proj"][position]
        assert torch.equal(down, expert["model.layers.0.mlp.down_proj.weight"])
        assert not torch.equal(down, base["model.layers.0.mlp.down_proj.weight"])
    for name in COMPANION_FILES:
        source, copy = done_run / "base" / name, done_run / "moe" / name
        assert source.exists() == copy.exists()
        if source.exists() and name != "tokenizer_config.json":  # whose class is one that older readers know
            assert source.read_bytes() == copy.read_bytes()
    record = runs.read_record(done_run / "moe")
    assert [member["name"] for member in record["team"]] == list(ROLES)
    assert str(done_run) not in json.dumps(record)


def test_three_identical_experts_are_the_base(unmerged):
    """With all LoRA deltas at zero, whatever the router does, the logits are the base's: fp32, 1e-6 of the largest."""
    for role in ROLES:
        path = unmerged / "adapters" / role / "adapter_model.safetensors"
        save_file({name: torch.zeros_like(t) for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    # mergekit calls identical experts a mistake unless their folders differ, as they do here
    merge(unmerged)
    tokens = torch.arange(5, 60)[None]
    with torch.no_grad():
        expected, found = (load_model(unmerged / name)(tokens).logits for name in ("base", "moe"))
    assert (expected - found).abs().max() <= 1e-6 * expected.abs().max()


def test_plain_mergekit_reads_the_same_file_inside_a_run(done_run, tmp_path):
    run_dir = shutil.copytree(done_run, tmp_path / "run")
    ended = shell("bash", "-c", f"cd {run_dir} && mergekit-moe {MERGE} by-mergekit --device cpu")
    assert ended.returncode == 0, ended.stderr[-2000:]
    ours, theirs = (load_file(run_dir / name / "model.safetensors") for name in ("moe", "by-mergekit"))
    theirs = on_disk(theirs, "mixtral")  # its experts are fused
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.endswith("gate.weight"))
    # the gates it starts from are kept beside the fitted ones: they agree but for the pad side of mergekit's tokenizer
    hidden = load_gates(run_dir / "moe", "hidden")
    for layer in range(2):
        assert torch.allclose(hidden[layer], theirs[family_of("mixtral").gate_tensor(layer)], atol=1e-2)


def test_complete_merge_is_skipped_and_new_adapters_are_refused(copied_run, capsys):
    merge(copied_run)
    assert "moe is complete: skipped" in capsys.readouterr().out
    path = copied_run / "adapters/quant/adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(InputError, match=r"experts/quant was made with other inputs:\n  adapter: recorded"):
        merge(copied_run)


def test_half_written_merge_is_not_taken_for_a_finished_one(copied_run):
    moe = copied_run / "moe"
    work = moe.rename(runs.work_folder(moe))
    (work / "model.safetensors").write_bytes(b"half")
    (work / runs.RECORD).write_text(
        json.dumps({k: v for k, v in runs.read_record(work).items() if k in ("step", "inputs")})
    )
    with pytest.raises(InputError, match="moe is not finished. Run this step first"):
        call(
            "recipes/instruct_tune.py",
            "--config",
            REPOSITORY / "recipes/sample/instruct_tune_moe.yaml",
            "--run_dir",
            copied_run,
        )
    merge(copied_run)
    assert load_model(moe)
    assert not work.exists()


def test_adapter_of_another_base(unmerged, make_base):
    with pytest.raises(InputError, match="adapters/macro was trained on another base"):
        merge(unmerged, "--base", make_base(seed=1))
    assert not (unmerged / "experts").exists()


def test_adapter_with_attention_deltas(unmerged):
    path = unmerged / "adapters/micro/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors)).replace(".mlp.", ".self_attn.").replace("down_proj", "q_proj")
    save_file(tensors | {name: torch.ones(4, 32), name.replace("lora_A", "lora_B"): torch.ones(32, 4)}, path)
    settings = path.with_name("adapter_config.json")
    content = json.loads(settings.read_text())
    settings.write_text(
        json.dumps(content | {"target_modules": [*content["target_modules"], "layers.0.self_attn.q_proj"]})
    )
    with pytest.raises(InputError, match=r"changes .*self_attn.*train gate_proj, up_proj, down_proj only"):
        merge(unmerged)
    assert not (unmerged / "experts").exists()


def test_missing_adapter(unmerged):
    shutil.rmtree(unmerged / "adapters/quant")
    with pytest.raises(InputError, match="adapters/quant does not exist. Run this step first: .*train_expert"):
        merge(unmerged)


def test_another_number_of_experts_a_token(unmerged):
    with pytest.raises(InputError, match="--experts_per_token is 4; it has to be 1 or more and 3 or less"):
        merge(unmerged, "--experts_per_token", 4)
    merge(unmerged, "--experts_per_token", 3)
    assert load_model(unmerged / "moe").config.num_experts_per_tok == 3


def test_no_room_on_the_disk(unmerged, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="needs 0.0 GB, and its disk has 0.0 GB free"):
        merge(unmerged)
    assert not (unmerged / "experts").exists()


def team_of(*names: str) -> dict:
    return {"experts": [{"source_model": f"experts/{name}", "positive_prompts": [name]} for name in names]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_mod": "random"}, "unknown key 'gate_mod'. Did you mean 'gate_mode'"),
        ({"gate_mode": "hiden"}, "gate_mode 'hiden' is unknown.*Did you mean 'hidden'"),
        ({"experts_per_token": 4}, "experts_per_token is 4; it must be 1 to 3"),
        (
            {"experts": [{"source_model": "experts/macro", "positive_prompts": ["a"], "promts": 1}]},
            "'experts.0..promts'",
        ),
        (
            {"experts": [{"source_model": f"experts/{r}", "positive_prompts": ["a"]} for r in "ab"]},
            "same positive_prompts",
        ),
        ({"experts": [{"source_model": "experts/a"}, {"source_model": "experts/b"}]}, "'a' has no positive_prompts"),
        ({"experts": [{"source_model": "experts/a", "positive_prompts": ["a"]}] * 2}, "two or more different roles"),
        ({"base_model": None}, "base_model"),
        (team_of("a", "shared"), "no analyst can be called 'shared': that is the trunk"),
        (team_of("a", "general"), "no analyst can be called 'general': chats/general.jsonl is of no analyst"),
        (team_of("a", "b_heldout"), "no analyst can be called 'b_heldout'. It is of letters"),
        (team_of("a", "b c"), "no analyst can be called 'b c'. It is of letters"),
        (team_of("a", "-b"), "no analyst can be called '-b'. It is of letters"),
    ],
)
def test_bad_merge_config(tmp_path, change, message):
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(MERGE.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_merge_config(path)


def test_the_shipped_merge_lists_the_three_roles():
    assert roles(read_merge_config(MERGE)) == list(ROLES)


def test_saved_model_reloads_alike_in_a_new_process(done_run, tmp_path):
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder, out = sys.argv[1:]; tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Rates rose.'}], return_tensors='pt',"
        " add_generation_prompt=True)['input_ids']\n"
        "torch.save(AutoModelForCausalLM.from_pretrained(folder)(ids).logits.detach(), out)"
    )
    for name in ("moe", "moe-instruct", "dense-instruct"):
        ended = shell(sys.executable, "-c", code, done_run / name, tmp_path / "logits.pt")
        assert ended.returncode == 0, ended.stderr[-2000:]
        tokenizer = AutoTokenizer.from_pretrained(done_run / name)
        chat = [{"role": "user", "content": "Rates rose."}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            here = load_model(Path(done_run / name))(ids).logits
        assert torch.equal(here, torch.load(tmp_path / "logits.pt"))
