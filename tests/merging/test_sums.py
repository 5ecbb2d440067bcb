# SPDX-License-Identifier: Apache-2.0
"""Router sums: they are those of a ridge regression, an analyst's own model suffices for them, and bad files are refused."""

import shutil
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge

from conftest import ROLES, call, form_of
from finteam_experts import runs
from finteam_experts.data.calibration import GENERAL_SHARE, excerpt, general_text, halves, role_text
from finteam_experts.errors import InputError
from finteam_experts.files import read_json
from finteam_experts.fingerprints import trunk_fingerprint
from finteam_experts.merging.gates import read_gates
from finteam_experts.merging.router import team_sums
from finteam_experts.merging.sums import (
    GENERAL_WEIGHT,
    RouterSums,
    compute_sums,
    gate_inputs,
    load_sums,
    mean_of,
    save_sums,
    solve_gates,
)  # fmt: skip
from finteam_experts.models import load_model, reading_dtype


def sums_of(x: torch.Tensor, general: torch.Tensor | None = None) -> RouterSums:
    """Of one layer, from gate inputs [tokens, hidden]."""
    inputs = x.T @ x / len(x)
    if general is not None:
        inputs = inputs + GENERAL_WEIGHT * general.T @ general / len(general)
    return RouterSums(inputs[None], x.mean(0)[None], len(x), "trunk", "expert")


def test_gates_are_ridge_regression_with_analysts_that_count_alike():
    x = [torch.randn(tokens, 12, dtype=torch.double) + place for place, tokens in enumerate((400, 150, 80))]
    general = torch.randn(60, 12, dtype=torch.double)
    gates = solve_gates([sums_of(own, general) for own in x], 0.1)[0]
    rows = torch.cat([*x, general])
    weights = torch.cat(
        [torch.full((len(own),), 1 / len(own)) for own in x] + [torch.full((60,), 3 * GENERAL_WEIGHT / 60)]
    )
    expert = torch.tensor([place for place, own in enumerate(x) for _ in own] + [3] * 60)
    alpha = 0.1 * (rows * weights[:, None] * rows).sum(0).mean().item()
    ridge = Ridge(alpha=alpha, fit_intercept=False).fit(rows, torch.eye(4)[expert][:, :3], sample_weight=weights)
    assert torch.allclose(gates, torch.tensor(ridge.coef_).float(), atol=1e-5)


def test_a_team_in_any_order_has_the_same_gates_to_nine_digits():
    team = [sums_of(torch.randn(90, 12) + place) for place in range(4)]
    gates = solve_gates(team, 0.01)
    for order in permutations(range(4)):
        found = solve_gates([team[place] for place in order], 0.01)
        assert (found - gates[:, list(order)]).abs().max() <= 1e-9 * gates.abs().max()


def test_the_dense_expert_has_the_sums_of_its_place_in_the_team(done_run):
    moe, form = done_run / "moe", form_of(done_run / "moe")
    general = general_text(done_run / "data", form, 300) or role_text(done_run / "data", "micro", form, 300, seed=1)[0]
    for place, role in enumerate(ROLES):
        own, _ = role_text(done_run / "data", role, form, 600, seed=0)
        expert = done_run / "experts" / role
        assert trunk_fingerprint(expert) == trunk_fingerprint(moe) == trunk_fingerprint(done_run / "base")
        alone = compute_sums(load_model(expert), form.tokenizer, own, general, trunk="", belongs_to="")
        inside = compute_sums(load_model(moe), form.tokenizer, own, general, trunk="", belongs_to="", expert=place)
        assert alone.tokens == inside.tokens == sum(sum(part.telling) for part in own)
        torch.testing.assert_close(alone.inputs, inside.inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.targets, inside.targets, rtol=1e-4, atol=1e-5)


def test_what_is_read_in_bf16_is_summed_in_fp32(done_run):
    form = form_of(done_run / "experts/micro")
    text, _ = role_text(done_run / "data", "micro", form, 600, seed=0)
    model, seen = load_model(done_run / "experts/micro"), []
    with torch.autocast("cpu", torch.bfloat16):
        sums = compute_sums(model, form.tokenizer, text, trunk="", belongs_to="")
        gate_inputs(
            model, form.tokenizer, text, lambda layer, x, rows: seen.append((layer, x, rows)), expert=None, title=""
        )
    states, rows = (torch.cat(part) for part in zip(*((x, of) for layer, x, of in seen if layer == 0), strict=True))
    assert rows.unique().tolist() == list(range(len(text)))
    texts = [states[rows == row] for row in range(len(text))]  # long and short, which count alike
    assert [len(own) for own in texts] == [sum(part.telling) for part in text]
    assert len({len(own) for own in texts}) > 3
    expected = sum(own.T @ own / len(own) for own in texts) / len(texts)
    torch.testing.assert_close(sums.inputs[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.targets[0], sum(own.mean(0) for own in texts) / len(texts), rtol=1e-5, atol=1e-6)


def test_the_template_and_the_system_turn_tell_nobodys_text(done_run):
    form = form_of(done_run / "moe")
    text, _ = role_text(done_run / "data", "micro", form, 1500, seed=0)
    template = form.prompts([""])[0]
    chats = [part for part in text if part.ids[:3] == template[:3]]
    assert 0 < len(chats) < len(text)
    for part in text:
        told = form.tokenizer.decode([token for token, counts in zip(part.ids, part.telling, strict=True) if counts])
        assert told and not part.telling[0]
        assert not any(
            word in told for word in (form.system_prompt, *form.tokenizer.all_special_tokens, "assistant\n")
        )
    model, seen = load_model(done_run / "experts/micro"), []
    gate_inputs(model, form.tokenizer, text, lambda layer, x, rows: seen.append(len(x)), expert=None, title="")
    assert sum(seen) == 2 * sum(sum(part.telling) for part in text)  # two layers


def test_an_owner_sends_half_of_its_text_through_its_expert_and_half_through_the_trunk(copied_run):
    run, expert = copied_run, copied_run / "experts/micro"
    where = ("--run_dir", run, "--role", "micro", "--tokens_per_role", "1500")
    call("scripts/router_sums.py", *where, "--base", run / "base")
    form = form_of(expert)
    own, _ = role_text(run / "data", "micro", form, 1500, seed=0)
    general = general_text(run / "data", form, round(GENERAL_SHARE * 1500))
    halved = zip((expert, run / "base"), halves(own), halves(general), strict=True)
    dtype = reading_dtype(torch.device("cpu"))
    alone, trunk = (
        compute_sums(load_model(folder, dtype), form.tokenizer, *text, trunk="", belongs_to="")
        for folder, *text in halved
    )
    found = load_sums(expert / "router_sums.safetensors")
    torch.testing.assert_close(found.inputs, (alone.inputs + trunk.inputs) / 2)
    torch.testing.assert_close(found.targets, (alone.targets + trunk.targets) / 2)
    assert found.tokens == alone.tokens + trunk.tokens == sum(sum(part.telling) for part in own)
    shutil.rmtree(run / "adapters/micro")  # with it, its own base is checked
    shutil.copytree(run / "base", run / "other")
    embeddings = load_file(run / "other/model.safetensors")
    embeddings["model.embed_tokens.weight"] += 1
    save_file(embeddings, run / "other/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError,
        match=r"experts/micro has other attention, norms or embeddings than .*other. It was .* Name its trunk",
    ):
        call("scripts/router_sums.py", *where, "--base", run / "other")


def test_a_router_is_that_of_the_sums_that_are_saved_with_it(copied_run):
    call(
        "scripts/fit_router.py", "--run_dir", copied_run, "--tokens_per_role", "1500", "--overwrite", "--ridge", "0.02"
    )
    team = [load_sums(copied_run / f"moe/router_sums/{role}.safetensors") for role in ROLES]
    gates = load_file(copied_run / "moe/gates/fitted.safetensors")["gates"]
    assert torch.equal(8.0 * solve_gates(team, 0.02), gates)


def test_general_text_counts_for_every_analyst_in_both_passes(done_run):
    model, form = load_model(done_run / "moe"), form_of(done_run / "moe")
    text = [role_text(done_run / "data", role, form, 600, seed=0)[0] for role in ROLES]
    general = [
        excerpt(form.tokenizer.encode(passage)) for passage in ("Bread keeps for a day.", "Cats sleep all day.")
    ]
    # leaves the gates of the second pass in the model
    found = team_sums(model, form.tokenizer, text, general, 0.01, trunk="", experts=list(ROLES))
    for place, own in enumerate(text):
        parts = zip(halves(own), halves(general), (place, None), strict=True)
        through = [
            compute_sums(model, form.tokenizer, *part, trunk="", belongs_to="", expert=to) for *part, to in parts
        ]
        torch.testing.assert_close(found[place].inputs, mean_of(*through).inputs)
        torch.testing.assert_close(found[place].targets, mean_of(*through).targets)


def test_sums_are_what_was_saved(tmp_path):
    own = sums_of(torch.randn(90, 12))
    save_sums(own, tmp_path / "own.safetensors")
    found = load_sums(tmp_path / "own.safetensors")
    assert torch.equal(found.inputs, (own.inputs.triu() + own.inputs.triu(1).mT))
    assert torch.equal(found.targets, own.targets)
    assert (found.tokens, found.trunk, found.expert) == (90, "trunk", "expert")
    assert load_file(tmp_path / "own.safetensors")["inputs"].shape == (1, 78)  # half of 12 x 12


def test_sums_that_are_none_are_refused(tmp_path):
    path, own = tmp_path / "own.safetensors", sums_of(torch.randn(90, 12))
    save_file({"inputs": torch.ones(1, 78)}, path)
    with pytest.raises(InputError, match="has no router sums"):
        load_sums(path)
    sums = {"inputs": torch.ones(1, 78), "targets": torch.ones(1, 12)}
    save_file(sums, path, metadata={"tokens": "90", "trunk": "trunk"})
    with pytest.raises(InputError, match="doesn't say which expert and how many tokens its sums are of"):
        load_sums(path)
    save_sums(replace(own, targets=torch.ones(2, 12)), path)
    with pytest.raises(
        InputError, match=r"do not belong together: torch.Size\(\[1, 78\]\) and torch.Size\(\[2, 12\]\)"
    ):
        load_sums(path)
    about = {"tokens": "90", "trunk": "trunk", "expert": "expert"}
    save_file({"inputs": torch.ones(78), "targets": torch.ones(12)}, path, metadata=about)
    with pytest.raises(InputError, match=r"do not belong together: torch.Size\(\[78\]\) and torch.Size\(\[12\]\)"):
        load_sums(path)
    save_sums(replace(own, inputs=own.inputs * float("nan")), path)
    with pytest.raises(InputError, match="sums that are not finite"):
        load_sums(path)
    path.write_bytes(b"cut")
    with pytest.raises(InputError, match="can't be read"):
        load_sums(path)


def test_hidden_states_that_are_not_finite_are_refused(done_run):
    model, form = load_model(done_run / "experts/macro"), form_of(done_run / "moe")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0] = float("nan")
    with pytest.raises(InputError, match="gate of layer 1 reads are not finite"):
        compute_sums(model, form.tokenizer, [excerpt([1, 2, 3])], trunk="", belongs_to="")


def test_a_team_of_analysts_who_bring_their_sums_needs_no_text(copied_run, capsys):
    run, where = copied_run, ("--run_dir", copied_run, "--base", copied_run / "base")
    with pytest.raises(InputError, match="--from_sums: no router sums of macro"):
        call("scripts/merge_moe.py", "--run_dir", run, "--from_sums", "--overwrite")
    for role in ROLES:
        call("scripts/router_sums.py", *where, "--role", role, "--tokens_per_role", "1500")
    data = (run / "data").rename(run / "gone")
    call("scripts/merge_moe.py", "--run_dir", run, "--from_sums", "--overwrite")
    team = [load_sums(run / f"experts/{role}/router_sums.safetensors") for role in ROLES]
    assert torch.equal(8 * solve_gates(team, 0.01), read_gates(run / "moe"))
    assert load_sums(run / "moe/router_sums/quant.safetensors").tokens == team[2].tokens
    kept, training = (run / "adapters/quant").rename(run / "quant"), run / "adapters/quant.incomplete"
    training.mkdir()
    with pytest.raises(InputError, match="adapters/quant is not finished"):  # its expert is of an earlier training
        call("scripts/merge_moe.py", "--run_dir", run, "--from_sums", "--overwrite")
    training.rmdir()
    kept.rename(run / "adapters/quant")
    shutil.rmtree(run / "adapters")  # a dense expert and its sums are all that has to be handed over
    before = runs.read_record(run / "moe")["inputs"]
    call("scripts/merge_moe.py", "--run_dir", run, "--from_sums", "--overwrite")
    assert torch.equal(8 * solve_gates(team, 0.01), read_gates(run / "moe"))
    assert runs.read_record(run / "moe")["inputs"]["experts"].keys() == before["adapters"].keys()
    assert "experts/quant has no adapter in" in capsys.readouterr().out
    data.rename(run / "data")
    call("scripts/report_routing.py", *where, "--name", "from_sums")
    report = read_json(run / "reports/from_sums.json")
    assert list(report["ladder"])[-4:-1] == [f"moe, {name} router" for name in ("hidden", "random", "fitted")]
    assert report["gates"]["fitted"]["own_role_tokens"] != report["gates"]["hidden"]["own_role_tokens"]
    path = run / "experts/micro/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.input_layernorm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"experts/micro has other attention, norms or embeddings than .*base"):
        call("scripts/merge_moe.py", "--run_dir", run, "--from_sums", "--overwrite")
