# SPDX-License-Identifier: Apache-2.0
"""Step 4: the scores are scikit-learn's, the report is complete, it resumes model by model, and no model has seen its rows."""

import dataclasses
import json
import re
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from conftest import call, chat, form_of, instruct_tune
from finteam_experts.data.files import rows_to_score, task_file, write_rows
from finteam_experts.data.tasks import default_tasks, render, render_all
from finteam_experts.errors import InputError
from finteam_experts.evaluation.answers import first_label, greedy_answers
from finteam_experts.evaluation.metrics import (
    METRICS,
    paired_difference,
    resampled_scores,
    scores,
    scores_with_errors,
)
from finteam_experts.evaluation.routing import expert_shares
from finteam_experts.files import read_json, write_json
from finteam_experts.fingerprints import fingerprint
from finteam_experts.models import load_model, load_tokenizer

TASKS = default_tasks()


def evaluate(run_dir, *arguments):
    call("scripts/evaluate.py", "--run_dir", run_dir, *arguments)


@pytest.mark.parametrize("classes", [2, 3, 40])
def testresampled_scores_are_those_of_scikit_learn_on_the_rows_drawn(classes):
    rng = np.random.default_rng(classes)
    for _ in range(50):
        n = rng.integers(1, 12)
        true, predicted = rng.integers(classes, size=(2, n))
        units = np.unique(rng.integers(4, size=n), return_inverse=True)[1]
        weights = rng.integers(3, size=(1, units.max() + 1))
        weights[0, units[0]] = 1
        found = resampled_scores(true, predicted, units)(weights)
        drawn = np.repeat(np.arange(n), weights[0, units])
        for name, value in scores(true[drawn], predicted[drawn]).items():
            assert found[name][0] == pytest.approx(value, abs=1e-9)


def test_many_labels_take_little_memory():
    """Memory grows with the labels, not with their square's square."""
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(300, size=(2, 600))
    tracemalloc.start()
    found = scores_with_errors(true, predicted)
    task = dataclasses.replace(TASKS["fpb"], labels=tuple(f"label {n}" for n in range(300)))
    rows = [{"text": f"Row {row}", "label": task.labels[label]} for row, label in enumerate(true)]
    ours, theirs = ({"fpb": own[None]} for own in (true, predicted))
    gap = paired_difference({"fpb": task}, {"fpb": rows}, ours, theirs)["fpb"]
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    assert gap["difference"] == pytest.approx(1 - found["macro_f1"]) and gap["low"] < gap["difference"] < gap["high"]


def test_an_interval_covers_texts_and_seeds_and_is_none_where_nothing_varies():
    tasks, rng = {"fpb": TASKS["fpb"]}, np.random.default_rng(0)
    rows = {"fpb": [{"text": f"Row {row}", "label": TASKS["fpb"].labels[row % 3]} for row in range(60)]}
    true = np.array([row % 3 for row in range(60)])
    ours = {"fpb": np.stack([np.where(rng.random(60) < 0.9, true, 0) for _ in range(3)])}
    theirs = {"fpb": np.stack([np.where(rng.random(60) < 0.6, true, 0) for _ in range(3)])}
    apart, together = (paired_difference(tasks, rows, ours, theirs, shared_seeds=shared) for shared in (False, True))
    for found in (apart, together):
        own = [np.mean([METRICS["macro_f1"](true, seed) for seed in side["fpb"]]) for side in (ours, theirs)]
        assert found["fpb"]["difference"] == found["average"]["difference"] == own[0] - own[1]
        assert found["fpb"]["low"] < found["fpb"]["difference"] < found["fpb"]["high"]
    same = paired_difference(tasks, rows, ours, ours, shared_seeds=True)["average"]
    assert same == {"difference": 0, "low": 0, "high": 0}
    one_text = {"fpb": [row | {"text": "The same."} for row in rows["fpb"]]}
    one = paired_difference(tasks, one_text, {"fpb": ours["fpb"][:1]}, {"fpb": theirs["fpb"][:1]})["fpb"]
    assert one["low"] == one["high"] == pytest.approx(one["difference"])


def test_standard_error_of_accuracy_is_the_binomial_one():
    true = np.array([0, 1] * 100)
    predicted = np.where(np.arange(200) < 150, true, 1 - true)
    found = scores_with_errors(true, predicted)
    assert found["accuracy"] == 0.75
    assert found["accuracy_stderr"] == pytest.approx((0.75 * 0.25 / 200) ** 0.5, rel=0.1)


def test_generated_answers_are_those_of_plain_generation(done_run):
    """Batched and padded on the left, or one by one: the same words."""
    loaded, tokenizer = load_model(done_run / "moe-instruct"), load_tokenizer(done_run / "moe-instruct")
    prompts = ["Rates rose.", "The company reported higher sales in March and April.", "x"]
    expected = []
    for prompt in prompts:
        encoded = tokenizer.apply_chat_template(
            chat(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = loaded.generate(**encoded, max_new_tokens=8, do_sample=False)
        expected.append(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
    form = form_of(done_run / "moe-instruct")
    assert greedy_answers(loaded, form, prompts) == expected
    assert greedy_answers(loaded, form, []) == []


def test_generated_score_counts_the_first_label(done_run):
    """Recomputed from plain generation, for a tuned model and for one that writes no label."""
    report = json.loads((done_run / "reports/evaluation.json").read_text())
    for name in ("moe", "moe-instruct"):
        model, form = load_model(done_run / name), form_of(done_run / name)
        rows = rows_to_score(done_run / "data", TASKS["fpb"], "test", None)
        prompts = render_all(TASKS["fpb"], rows, form.tokenizer)
        found = [first_label(answer, TASKS["fpb"].labels) for answer in greedy_answers(model, form, prompts)]
        generated = report["models"][name]["tasks"]["fpb"]["generated"]
        assert generated["without_label"] == found.count(None)
        assert generated["accuracy"] == np.mean([a == row["label"] for a, row in zip(found, rows, strict=True)])


@torch.no_grad()
def test_label_loss_is_the_cross_entropy_among_the_labels(copied_run):
    model, tokenizer = load_model(copied_run / "dense-instruct"), load_tokenizer(copied_run / "dense-instruct")
    task, losses = TASKS["headlines"], []
    for row in rows_to_score(copied_run / "data", TASKS["headlines"], "test", None):
        prompt = tokenizer.apply_chat_template(
            chat(render(task, row, tokenizer)), add_generation_prompt=True, tokenize=False
        )
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        scores = []
        for label in task.labels:
            answer = [*tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            log_probs = model(torch.tensor([start + answer])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            scores.append(log_probs.gather(1, torch.tensor(answer)[:, None]).sum())
        losses.append(-torch.stack(scores).log_softmax(0)[task.labels.index(row["label"])])
    where = ("--run_dir", copied_run, "--models", "dense-instruct", "--tasks", "headlines", "--name", "exact")
    call("scripts/evaluate.py", *where, "--no-bf16", "--chats", "0")
    report = json.loads((copied_run / "reports/exact.json").read_text())
    found = report["models"]["dense-instruct"]["tasks"]["headlines"]["label_loss"]
    assert found == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_report(done_run):
    report = json.loads((done_run / "reports/evaluation.json").read_text())
    assert list(report["models"]) == ["base", "dense-instruct", "moe", "moe-instruct"]
    for part in report["models"].values():
        assert set(part["tasks"]) == set(TASKS)
        for task, result in part["tasks"].items():
            assert result["n"] == sum(result["predicted"].values()) == len(result["predictions"]) == 12
            assert set(result["predicted"]) == set(TASKS[task].labels)
            assert 0 <= result["accuracy"] <= 1
            assert result["macro_f1_stderr"] >= 0
    for name in ("moe", "moe-instruct"):
        for shares in report["models"][name]["routing"].values():
            assert sum(shares.values()) == pytest.approx(1)
    assert all(entry["mcc"] == 0 for entry in report["majority"].values())
    assert (done_run / "reports/evaluation.png").stat().st_size > 10_000
    assert not list((done_run / "reports").glob("*.incomplete"))


def test_expert_shares_are_the_mixing_weights(done_run):
    model, ids, spans = load_model(done_run / "moe"), [[1, 5, 9, 20, 30], [1, 3, 7]], [[-1, 0, 0, -1, 2], [-1, 0, 1]]
    shares = expert_shares(model, form_of(done_run / "moe").tokenizer, ids, spans)
    assert shares.shape == (2, 2, 3)
    for row, kept, found in zip(
        ids, ([1, 2, 4], [1, 2]), shares.transpose(0, 1), strict=True
    ):  # the template's tokens don't count
        logits = model(torch.tensor([row]), output_router_logits=True).router_logits
        for layer, own in zip(logits, found, strict=True):  # one expert per token
            first = torch.bincount(layer[kept].argmax(-1), minlength=3) / len(kept)
            assert own.tolist() == pytest.approx(first.tolist())


def test_complete_report_is_skipped_and_other_inputs_refused(copied_run, capsys):
    evaluate(copied_run)
    assert "evaluation.json is complete: skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="limit: recorded None, now 5"):
        evaluate(copied_run, "--limit", 5)


def test_interrupted_evaluation_keeps_finished_models(copied_run, capsys, monkeypatch):
    shutil.rmtree(copied_run / "reports")
    import conftest

    script = conftest.load_script("scripts/evaluate.py")
    original = script.evaluate_model

    def stop_at_moe(folder, *args, **options):
        if folder.name == "moe":
            raise KeyboardInterrupt
        return original(folder, *args, **options)

    monkeypatch.setattr(script, "evaluate_model", stop_at_moe)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run_dir", str(copied_run), "--limit", "6"])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    monkeypatch.undo()
    assert not (copied_run / "reports/evaluation.json").exists()
    evaluate(copied_run, "--limit", 6)
    assert "dense-instruct: scores are complete: skipped" in capsys.readouterr().out
    assert json.loads((copied_run / "reports/evaluation.json").read_text())["models"]["moe"]


def test_model_that_is_not_there(copied_run):
    shutil.rmtree(copied_run / "reports")
    shutil.rmtree(copied_run / "moe-instruct")
    with pytest.raises(InputError, match="moe-instruct does not exist. Run this step first"):
        evaluate(copied_run)
    with pytest.raises(InputError, match="--limit is 1; it has to be 2 or more"):
        evaluate(copied_run, "--limit", 1)


@pytest.mark.slow
def test_benchmark_compares_with_lm_eval(done_run, capsys):
    call("benchmarks/evaluation.py", "--model", done_run / "dense-instruct", "--data_dir", done_run / "data",
         "--limit", 6, "--rounds", 1)  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("24 rows: ") == 2
    assert all(
        float(nats) < 1e-3 for nats in re.findall(r"differ by at most (\S+) nats, and all of them agree", printed)
    )


HELD_OUT = ("--hold_out_validation", "true")


def test_models_that_were_trained_on_the_valid_rows_are_not_scored_on_them(copied_run):
    valid = ("--split", "valid", "--name", "valid", "--chats", 0)
    with pytest.raises(InputError, match=r"trained on these rows: dense-instruct \(dense-instruct: fiqasa, fpb"):
        evaluate(copied_run, *valid, "--models", "base", "dense-instruct")
    shutil.rmtree(copied_run / "dense-instruct")
    instruct_tune(copied_run, "dense", *HELD_OUT)
    evaluate(copied_run, *valid, "--models", "base", "dense-instruct", "--limit", 2, "--tasks", "fpb")
    shutil.rmtree(copied_run / "moe-instruct")
    instruct_tune(copied_run, "moe", *HELD_OUT)
    with pytest.raises(InputError, match=r"moe-instruct \(adapters/macro: headlines\); .*adapters/micro: fiqasa, fpb"):
        evaluate(copied_run, *valid, "--models", "moe-instruct")
    with pytest.raises(InputError, match=r"experts/quant \(adapters/quant: stock_movement\)"):
        evaluate(copied_run, *valid, "--models", "experts/quant")
    shutil.rmtree(copied_run / "adapters/quant")
    with pytest.raises(InputError, match=r"moe \(the expert quant: no record of its training\)"):
        evaluate(copied_run, *valid, "--models", "moe")
    for task in TASKS:  # rows of their own, which nobody trains on: the check for leaks sees to it
        write_rows(
            task_file(copied_run / "data", task, "valid"),
            [{"text": f"New {n}.", "label": TASKS[task].labels[0]} for n in range(3)],
        )
    evaluate(copied_run, *valid, "--models", "moe", "--name", "own_rows")


def test_a_model_from_a_trunk_that_saw_the_valid_rows(copied_run):
    shutil.copytree(copied_run / "dense-instruct", copied_run / "trunk")
    record = read_json(copied_run / "dense-instruct/finteam.json")
    record["inputs"]["settings"]["hold_out_validation"] = True
    record["inputs"]["model"] = fingerprint(copied_run / "trunk")
    write_json(copied_run / "dense-instruct/finteam.json", record)
    with pytest.raises(InputError, match=r"trained on these rows: dense-instruct \(trunk: "):
        evaluate(copied_run, "--split", "valid", "--name", "valid", "--models", "dense-instruct")
