# SPDX-License-Identifier: Apache-2.0
"""Step 2b: the regression is ridge regression, the gates know their roles, and bad input leaves the MoE as it was."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROLES, call, fit_router, form_of, instruct_tune
from finteam_experts import runs
from finteam_experts.data.calibration import role_text
from finteam_experts.data.files import corpus_file, read_corpus
from finteam_experts.errors import InputError
from finteam_experts.evaluation.batches import encode, padded_batches
from finteam_experts.evaluation.heldout import heldout_loss
from finteam_experts.evaluation.routing import measure_routing
from finteam_experts.families import family_of
from finteam_experts.files import write_json
from finteam_experts.merging import gates
from finteam_experts.merging.router import LEAST_GAIN, choose_scale, team_sums
from finteam_experts.merging.sums import compute_sums, solve_gates
from finteam_experts.models import load_model, load_tokenizer


def folder_hash(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


@pytest.fixture
def merged(copied_run):
    """A run whose MoE has mergekit's router still."""
    for name in ("moe", "moe-instruct", "reports"):
        shutil.rmtree(copied_run / name)
    call("scripts/merge_moe.py", "--run_dir", copied_run)
    return copied_run


@pytest.fixture(scope="module")
def heldout(done_run):
    """Held-out token sequences of each role of the toy run."""
    tokenizer = load_tokenizer(done_run / "moe")
    return [encode(tokenizer, read_corpus(done_run / "data", role, heldout=True), 96) for role in ROLES]


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({8: 1.0, 16: 0.99, 32: 0.98, 64: 0.97}, 64),  # never beyond the largest
        ({8: 1.0, 16: 0.99, 32: 0.99 * (1 - LEAST_GAIN / 2)}, 16),  # too small a gain
        ({8: 1.0, 16: 1.1, 4: 0.9, 2: 0.95}, 4),
        ({8: 1.0, 16: 1.1, 4: 1.1}, 8),
        ({8: 1.0, 16: 1.1, 4: 0.9, 2: 0.8, 1: 0.7, 0.5: 0.6}, 0.5),
    ],
)
def test_scale(losses, chosen):
    scale, tried = choose_scale(losses.__getitem__)
    assert scale == chosen
    assert tried == losses


def test_forced_expert_is_the_dense_expert(done_run):
    """Tokens that go through one expert alone have that dense expert's logits."""
    model, tokens = load_model(done_run / "moe"), torch.arange(5, 65).view(3, 20)
    with torch.no_grad():
        unforced = model(tokens).logits
        for expert, role in enumerate(ROLES):
            with gates.forced_expert(model, expert):
                found = model(tokens).logits
            assert torch.allclose(found, load_model(done_run / "experts" / role)(tokens).logits, atol=1e-5)
            assert not torch.allclose(found, unforced, atol=1e-3)


def test_watched_mlps_see_what_the_gates_read(done_run):
    model, seen = load_model(done_run / "moe"), {}
    with torch.no_grad(), gates.watched_mlps(model, seen.__setitem__):
        logits = model(torch.arange(5, 25)[None], output_router_logits=True).router_logits
    for layer, weight in enumerate(gates.get_gates(model)):
        assert torch.allclose(seen[layer] @ weight.T, logits[layer], atol=1e-5)


def test_routing_is_what_a_loop_over_passages_counts(done_run, heldout):
    model, tokenizer = load_model(done_run / "moe"), load_tokenizer(done_run / "moe")
    routing = measure_routing(model, tokenizer, heldout)
    first, passages = torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)
    for role, own in enumerate(heldout):
        for ids in own:
            with torch.no_grad():
                logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
            for layer in range(2):
                counts = torch.bincount(logits[layer][1:].argmax(-1), minlength=3)
                first[layer, role] += counts
                passages[layer, role, counts.argmax()] += 1
    assert torch.equal(routing.first_choices, first)
    assert torch.equal(routing.passages, passages)
    assert routing.tokens.tolist() == [sum(len(ids) - 1 for ids in own) for own in heldout]
    assert torch.allclose(routing.weights.sum(-1), routing.tokens.expand(2, 3))
    texts = read_corpus(done_run / "data", "micro", heldout=True)
    assert routing.loss()[1] == pytest.approx(heldout_loss(model, tokenizer, texts, max_tokens=96), abs=1e-5)


def test_routing_by_passage_question_and_answer(done_run):
    model, form = load_model(done_run / "moe"), form_of(done_run / "moe")
    asked = [("Sales rose to 40 mn.\n\nIs that good?", "Yes, it is."), ("What is beta?", "A slope.")]
    exchanges = [form.exchanges(asked), form.exchanges(asked[:1]), form.exchanges(asked[1:])]
    for (question, answer), exchange in zip(asked, exchanges[0], strict=True):
        for span, text in enumerate((question.rpartition("\n\n")[0], question.rpartition("\n\n")[2], answer)):
            ids = [token for token, mark in zip(exchange.ids, exchange.spans, strict=True) if mark == span]
            assert form.tokenizer.decode(ids).strip() == text
    ids, spans = ([[getattr(e, part) for e in own] for own in exchanges] for part in ("ids", "spans"))
    routing = measure_routing(model, form.tokenizer, ids, losses=False, spans=spans)
    own, count = torch.zeros(3), torch.zeros(3)
    for role, found in enumerate(exchanges):
        for exchange in found:
            with torch.no_grad():
                logits = model(torch.tensor([exchange.ids]), output_router_logits=True).router_logits
            for layer in logits:
                for right, mark in zip((layer.argmax(-1) == role).tolist(), exchange.spans, strict=True):
                    if mark >= 0:
                        own[mark] += right
                        count[mark] += 1
    expected = dict(
        zip(("own_role_passage", "own_role_question", "own_role_answer"), (own / count).tolist(), strict=True)
    )
    assert routing.spans() == pytest.approx(expected, abs=1e-5)


def test_gates_know_the_text_and_not_the_traces_of_its_expert(done_run):
    """Experts that leave strong traces: gates that know their text by them alone leave a token where it went astray."""
    moe = done_run / "moe"
    model, form = load_model(moe), form_of(moe)
    with torch.no_grad():
        for place, down in enumerate(model.model.layers[0].mlp.experts.down_proj):
            down[place] = 50 * down[place].abs()
    text = [role_text(done_run / "data", role, form, 3000, seed=0)[0] for role in ROLES]
    own = [
        compute_sums(model, form.tokenizer, part, trunk="", belongs_to="", expert=place)
        for place, part in enumerate(text)
    ]
    asked = [[part.ids for part in role_text(done_run / "data", role, form, 2000, seed=1)[0]] for role in ROLES]
    shares = []
    for sums in (own, team_sums(model, form.tokenizer, text, [], 0.01, trunk="", experts=list(ROLES))):
        gates.set_gates(model, solve_gates(sums, 0.01))
        shares.append(measure_routing(model, form.tokenizer, asked).shares().diagonal(dim1=1, dim2=2).mean(1).tolist())
    assert shares[1][1] > shares[0][1] + 0.003, shares  # in the layer after the traces


def test_batches_hold_every_sequence_once_within_the_limit(done_run):
    lengths = [3, 50, 7, 7, 90, 200, 1, 30]
    sequences = [[number] * length for number, length in enumerate(lengths)]
    rows = []
    for taken, batch in padded_batches(sequences, load_tokenizer(done_run / "moe"), batch_tokens=100, title=""):
        rows += taken
        assert batch["input_ids"].numel() <= 100 or len(taken) == 1
        for row, ids, mask in zip(taken, batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[mask.bool()].tolist() == sequences[row]
    assert sorted(rows) == list(range(len(lengths)))


def test_fitting_replaces_the_gates_and_nothing_else(merged, heldout):
    before = load_file(merged / "moe/model.safetensors")
    model, tokenizer = load_model(merged / "moe"), load_tokenizer(merged / "moe")
    hidden = measure_routing(model, tokenizer, heldout).summary()
    fit_router(merged, "--chat_share", 0.25)
    after = load_file(merged / "moe/model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        family_of("mixtral").gate_tensor(layer) for layer in range(2)
    }
    assert torch.equal(gates.load_gates(merged / "moe", "hidden")[1], before[family_of("mixtral").gate_tensor(1)])
    assert torch.equal(gates.load_gates(merged / "moe", "fitted"), gates.read_gates(merged / "moe"))
    fitted = measure_routing(load_model(merged / "moe"), tokenizer, heldout).summary()
    assert fitted["own_role_tokens"] > max(hidden["own_role_tokens"] + 0.1, 0.6)
    assert fitted["load_entropy"] > 0.95
    results = runs.read_record(merged / "moe")["router"]["results"]
    assert results["own_role_tokens"] > 0.6
    assert str(results["scale"]) in json.dumps(results["loss_at_scale"])
    assert len(results["loss_at_scale"]) == 1  # with one expert per token, every scale is the same router


def test_a_given_scale_is_taken(copied_run):
    moe = copied_run / "moe"
    chosen, scale = gates.read_gates(moe), runs.read_record(moe)["router"]["results"]["scale"]
    fit_router(copied_run, "--overwrite", "--scale", "0.25")
    torch.testing.assert_close(gates.read_gates(moe) * (scale / 0.25), chosen)
    assert runs.read_record(moe)["router"]["results"]["scale"] == 0.25
    with pytest.raises(InputError, match="--scale is 0.0; it has to be above 0"):
        fit_router(copied_run, "--overwrite", "--scale", "0")


def test_fitted_router_is_skipped_refused_or_replaced(copied_run, capsys):
    fit_router(copied_run)
    assert "moe has its fitted router: skipped" in capsys.readouterr().out
    before = folder_hash(copied_run / "moe")
    with pytest.raises(InputError, match=r"settings.ridge: recorded 0.01, now 0.5\nPass --overwrite"):
        fit_router(copied_run, "--ridge", 0.5)
    assert folder_hash(copied_run / "moe") == before
    fit_router(copied_run, "--ridge", 0.5, "--overwrite")
    assert folder_hash(copied_run / "moe") != before
    assert gates.load_gates(copied_run / "moe", "hidden").shape == (2, 3, 32)


def test_a_fit_that_is_cut_off_while_writing_is_not_taken_for_a_finished_one(merged, monkeypatch):
    import conftest

    script = conftest.load_script("scripts/fit_router.py")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "write_gates", interrupt)
    monkeypatch.setattr("sys.argv", ["fit_router.py", "--run_dir", str(merged)])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert load_model(merged / "moe")  # a complete folder is never taken away
    with pytest.raises(InputError, match=r"router was being replaced .* Run again: scripts/fit_router.py"):
        instruct_tune(merged, "moe")
    fit_router(merged)
    assert runs.require(merged / "moe", "")["router"]["kind"] == "fitted"


def swap_roles(run_dir):
    record = runs.read_record(run_dir / "moe")
    record["team"] = record["team"][1::-1] + record["team"][2:]
    write_json(run_dir / "moe" / runs.RECORD, record)


def lose_a_role(run_dir):
    record = runs.read_record(run_dir / "moe")
    write_json(run_dir / "moe" / runs.RECORD, record | {"team": record["team"][:2]})


def shorten_corpus(run_dir):
    path = corpus_file(run_dir / "data", "quant")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:31]))


def break_a_weight(run_dir):
    path = run_dir / "moe/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run_dir: corpus_file(run_dir / "data", "micro").unlink(), r"corpora/micro.jsonl does not exist"),
        (shorten_corpus, r"corpora/quant.jsonl has 31 passages. The router needs 32 or more"),
        (swap_roles, r"gives 'micro' another expert than the weights at its place, which are those of macro"),
        (lose_a_role, r"moe has 3 experts, but its finteam.json names 2: macro, micro"),
        (break_a_weight, r"the hidden states that the gate of layer 0 reads are not finite"),
        (lambda run_dir: shutil.rmtree(run_dir / "moe"), r"moe does not exist. Run this step first"),
    ],
)
def test_bad_input_leaves_the_moe_as_it_was(merged, damage, message):
    damage(merged)
    before = folder_hash(merged)
    with pytest.raises(InputError, match=message):
        fit_router(merged)
    assert folder_hash(merged) == before


def test_the_tokens_that_were_read_are_named(merged, capsys):
    """Not those that were asked for: the corpora hold no more."""
    call("scripts/fit_router.py", "--run_dir", merged, "--tokens_per_role", 100_000, "--scale", 4)
    printed = capsys.readouterr().out
    read = {role: int(re.search(rf"(\d+) tokens of {role}", printed)[1]) for role in ROLES}
    assert all(1000 < tokens < 20_000 for tokens in read.values())
    assert "The data has no more than that of macro, micro, quant: --tokens_per_role asked for 100000" in printed


def test_too_few_tokens_are_refused(merged):
    with pytest.raises(InputError, match="--tokens_per_role is 10; it has to be 256 or more"):
        fit_router(merged, "--tokens_per_role", 10)
