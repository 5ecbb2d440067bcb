# SPDX-License-Identifier: Apache-2.0
"""Step 4: the scores are lm-eval's and scikit-learn's, the report is complete, and it resumes model by model."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from conftest import call, chat, form_of
from finteam_experts.data.files import rows_to_score
from finteam_experts.data.tasks import default_tasks, render, render_all
from finteam_experts.errors import InputError
from finteam_experts.evaluation.labels import LabelScoringLM, first_label, greedy_answers
from finteam_experts.evaluation.metrics import confusion, scores, scores_with_errors
from finteam_experts.evaluation.routing import expert_shares
from finteam_experts.models import load_model, load_tokenizer

TASKS = default_tasks()


def evaluate(run_dir, *arguments):
    call("scripts/evaluate.py", "--run_dir", run_dir, *arguments)


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_equal_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    for _ in range(50):
        n = rng.integers(1, 12)
        true, predicted = rng.integers(classes, size=(2, n))
        found = scores(confusion(true, predicted, classes))
        assert found["accuracy"] == pytest.approx(accuracy_score(true, predicted))
        assert found["weighted_f1"] == pytest.approx(f1_score(true, predicted, average="weighted"))
        assert found["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
        if len(set(true) | set(predicted)) > 1:
            assert found["mcc"] == pytest.approx(matthews_corrcoef(true, predicted))


def test_standard_error_of_accuracy_is_the_binomial_one():
    true = np.array([0, 1] * 100)
    predicted = np.where(np.arange(200) < 150, true, 1 - true)
    found = scores_with_errors(true, predicted, 2)
    assert found["accuracy"] == 0.75
    assert found["accuracy_stderr"] == pytest.approx((0.75 * 0.25 / 200) ** 0.5, rel=0.1)


@pytest.mark.parametrize("model", ["base", "moe"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_label_scores_equal_those_of_lm_eval(done_run, model, batch_tokens):
    """Labels of one and of several tokens, some the beginning of others, prompts of many lengths; fp32, 1e-4 nats."""
    loaded, tokenizer = load_model(done_run / model), load_tokenizer(done_run / model)
    contexts = ["Rates rose.", "The company reported higher sales in " + "March " * 9, "x" * 40]
    labels = ["Rise", "Fall", "positive", "positive outlook", "p"]
    pairs = [(context, label) for context in contexts for label in labels]
    requests = [((c, x), tokenizer(c)["input_ids"], tokenizer(x)["input_ids"]) for c, x in pairs]
    options = {"pretrained": loaded, "tokenizer": tokenizer, "batch_size": 1}
    expected = HFLM(**options)._loglikelihood_tokens(requests, disable_tqdm=True)
    ours = LabelScoringLM(pretrained=loaded, form=form_of(done_run / model), batch_tokens=batch_tokens)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    for (score, greedy), (expected_score, expected_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(expected_score, abs=1e-4)
        assert greedy == expected_greedy


def test_bfloat16_scores_are_close_and_ties_are_not_made(done_run):
    """The backbone rounds, the head does not: scores move by hundredths, and two labels never score exactly alike."""
    loaded, tokenizer = load_model(done_run / "moe"), load_tokenizer(done_run / "moe")
    requests = [
        ((context, label), tokenizer(context)["input_ids"], tokenizer(label)["input_ids"])
        for context in ("Rates rose.", "Sales fell by a third in March.")
        for label in ("p", "n", "r", "f")
    ]
    options = {"pretrained": loaded, "form": form_of(done_run / "moe")}
    exact, rounded = (
        [score for score, _ in LabelScoringLM(**options, bf16=bf16)._loglikelihood_tokens(requests, disable_tqdm=True)]
        for bf16 in (False, True)
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.3)
    assert len(set(rounded)) == len(rounded)


def test_first_label_in_an_answer():
    labels = ("negative", "neutral", "positive")
    assert first_label("It is Positive, not negative.", labels) == "positive"
    assert first_label("neutral", labels) == "neutral"
    assert first_label("I cannot say.", labels) is None
    assert first_label("Norise", ("No", "Norise")) == "Norise"
    assert first_label("I do not know another one. Yes", ("No", "Yes")) == "Yes"
    assert first_label("Gain of 10", ("gain of 1", "gain of 10")) == "gain of 10"
    assert first_label("会上涨的", ("涨", "跌")) == "涨"


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
            answer = tokenizer(label, add_special_tokens=False)["input_ids"]
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
    assert all(float(nats) < 1e-3 for nats in re.findall(r"differ by at most (\S+) nats", printed))
    for task in TASKS:
        found = re.search(
            rf"^{task}: accuracy lm-eval, auto (\S+), lm-eval, 16 (\S+), ours (\S+)$", printed, flags=re.M
        )
        assert len(set(found.groups())) == 1
