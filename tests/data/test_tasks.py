# SPDX-License-Identifier: Apache-2.0
"""Tasks as data: a directory's own task files decide what is trained, measured and shown; lm-eval runs them as they are."""

import json
import shutil
import sys

import pytest
import torch
import yaml

from conftest import TASKS, call, fit_router, form_of, instruct_tune, shell
from finteam_experts.data.files import read_task, task_file, tasks_of, write_rows
from finteam_experts.data.tasks import FOLDER, default_tasks, read_task_file, render_all
from finteam_experts.errors import InputError
from finteam_experts.models import load_model
from finteam_experts.runs import read_record
from finteam_experts.scoring import log_likelihoods

RATING = {
    "task": "rating",
    "doc_to_text": "{{text}}\n\n{{question|default('Is the grade kept?', true)}} Answer kept or cut.",
    "doc_to_choice": ["kept", "cut"],
    "metadata": {"question": "Is the grade kept?"},
}


def write_task(data, definition, *, rows: int = 16) -> None:
    name, labels = definition["task"], definition["doc_to_choice"]
    (data / "tasks").mkdir(parents=True, exist_ok=True)
    (data / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    for split, first in (("train", 0), ("test", rows)):
        own = [{"text": f"Opinion {name} {n} on a loan.", "label": labels[n % 2]} for n in range(first, first + rows)]
        write_rows(task_file(data, name, split), own)


def test_a_task_file_needs_little(tmp_path):
    write_task(tmp_path, RATING)
    task = tasks_of(tmp_path)["rating"]
    assert (task.title, task.role, task.main_score) == ("rating", None, "macro_f1")
    assert len(read_task(tmp_path, task, "test")) == 16


def test_the_packages_tasks_are_defaults_for_directories_without_files(toy_data):
    assert tasks_of(toy_data) == TASKS
    for path in FOLDER.glob("*.yaml"):
        assert read_task_file(path) == TASKS[path.stem]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"doc_to_choice": [False, True]},
            r"a label of doc_to_choice is False; .*Put it in quotes, as \[\"No\", \"Yes\"\]",
        ),
        ({"doc_to_choice": []}, "doc_to_choice is .*it lists two or more labels"),
        ({"task": "other"}, "task is 'other'; it must be the file's name, 'rating'"),
        ({"doc_to_text": "{{text}} Is it kept?"}, "doc_to_text asks 'TEXT Is it kept[?]'; it has to ask 'TEXT"),
        ({"doc_to_text": "{{text"}, "doc_to_text can't be rendered: unexpected end of template"),
        ({"metadata": {"question": " "}}, "metadata.question is ' '; it must be text"),
        ({"metadata": {"question": "Is the grade kept?", "role": 3}}, "metadata.role is 3; it must be text"),
    ],
)
def test_a_wrong_task_file_is_named(tmp_path, change, message):
    path = tmp_path / "rating.yaml"
    path.write_text(yaml.safe_dump(RATING | change))
    with pytest.raises(InputError, match=f"rating.yaml: {message}"):
        read_task_file(path)


def test_two_files_of_one_task_and_a_role_that_the_team_does_not_have(copied_run):
    data = copied_run / "data"
    write_task(data, RATING | {"metadata": {"question": "Is the grade kept?", "role": "credit"}})
    for step in (lambda: instruct_tune(copied_run, "moe", "--seed", 3), lambda: fit_router(copied_run)):
        with pytest.raises(
            InputError, match="rating.yaml: metadata.role is 'credit', and the team has macro, micro, quant"
        ):
            step()
    other = shutil.copytree(data, copied_run / "other")
    (other / "tasks/rating.yml").write_text(yaml.safe_dump(RATING))
    with pytest.raises(InputError, match="rating.yml: task files end with .yaml"):
        tasks_of(other)


@pytest.mark.parametrize(
    "names",
    [["rating"], pytest.param(["fpb", "headlines", "rating"], marks=pytest.mark.slow)],
    ids=["alone", "one of three"],
)
def test_a_task_of_no_analyst_goes_all_the_way(copied_run, tmp_path, capsys, names):
    """What is tuned, evaluated and published are the tasks of the directory and no others."""
    data = tmp_path / "mine"
    shutil.copytree(copied_run / "data/corpora", data / "corpora")
    write_task(data, RATING)
    for name in names[:-1]:
        for split in ("train", "test"):
            shutil.copyfile(task_file(copied_run / "data", name, split), task_file(data, name, split))
    for folder in ("moe-instruct", "dense-instruct", "reports"):
        shutil.rmtree(copied_run / folder)
    where = ("--data_dir", data)
    fit_router(copied_run, *where, "--overwrite")
    instruct_tune(copied_run, "moe", *where)
    instruct_tune(copied_run, "dense", *where)
    call("scripts/evaluate.py", "--run_dir", copied_run, *where)
    report = json.loads((copied_run / "reports/evaluation.json").read_text())
    assert [task["name"] for task in report["tasks"]] == list(report["majority"]) == names
    assert all(list(part["tasks"]) == names for part in report["models"].values())
    assert set(next(iter(report["differences"].values()))) == {*names, "average"}
    assert [task["name"] for task in read_record(copied_run / "moe-instruct")["tasks"]] == names
    assert "fiqasa" not in capsys.readouterr().out.partition("Tasks:")[2]
    ended = shell(sys.executable, "scripts/publish.py", "--run_dir", copied_run, "--data_dir", data, "--namespace", "me",
                  "--base_model", "owner/toy", "--dry_run", "--parts", "moe-instruct")  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.slow
def test_lm_eval_itself_runs_a_task_file_on_a_tuned_model(done_run, tmp_path):
    """The documented command, in the data directory: the accuracy is that of the labels without the end, which lm-eval can't score."""
    data = shutil.copytree(done_run / "data", tmp_path / "data")
    shutil.copyfile(FOLDER / "headlines.yaml", data / "tasks/headlines.yaml")
    ended = shell(
        "bash", "-c", f"cd {data} && lm_eval --model hf --model_args pretrained={done_run / 'moe-instruct'} --tasks headlines "
        "--include_path tasks --apply_chat_template --system_instruction 'You are a financial analyst.' --device cpu "
        f"--output_path {tmp_path / 'out'}",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    (result,) = (tmp_path / "out").rglob("*.json")
    found = json.loads(result.read_text())["results"]["headlines"]["acc,none"]
    task, folder = default_tasks()["headlines"], done_run / "moe-instruct"
    rows, form = read_task(data, task, "test"), form_of(folder)
    asked = [(prompt, label) for prompt in render_all(task, rows, form.tokenizer) for label in task.labels]
    pairs = [(exchange.prompt, exchange.answer) for exchange in form.exchanges(asked)]
    scores = torch.tensor([score for score, _ in log_likelihoods(load_model(folder), pairs)]).view(len(rows), -1)
    right = [task.labels[best] == row["label"] for best, row in zip(scores.argmax(1).tolist(), rows, strict=True)]
    assert found == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{{ self.__init__.__globals__.__builtins__.open('PWNED', 'w') }}",
        "{% set os = joiner.__init__.__globals__.os %}{{ os.system('touch PWNED') }}",
        "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
        "{{ 10**10**8 }}",
        "{{ 'x' * 10**11 }}",
        "{{ text|center(10**11) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% include '/etc/passwd' %}",
        "{{" + "(" * 5000 + "text" + ")" * 5000 + "}}",
    ],
)
def test_a_template_of_a_task_file_runs_no_code_and_ends(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, RATING | {"doc_to_text": template})
    with pytest.raises(InputError, match=r"rating.yaml: doc_to_text can't be rendered: .*Write it as '{{text}}"):
        tasks_of(tmp_path)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{text}}\n\n{% if question %}{{question}}{% else %}Is the grade kept?{% endif %} Answer kept or cut.",
        "{{ text | trim }}\n\n{{ question or 'Is the grade kept?' }} Answer kept or cut.",
    ],
)
def test_other_ways_to_ask_the_same(tmp_path, template):
    write_task(tmp_path, RATING | {"doc_to_text": template})
    assert tasks_of(tmp_path)["rating"].question == "Is the grade kept?"


@pytest.mark.parametrize(
    ("tag", "named"),
    [
        ("!function utils.words", "!function"),
        ("!!python/object/apply:os.system ['touch PWNED']", "python/object/apply"),
    ],
)
def test_a_tag_that_would_run_code_is_not_read(tmp_path, monkeypatch, tag, named):
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, RATING)
    path = tmp_path / "tasks/rating.yaml"
    path.write_text(f"process_docs: {tag}\n" + path.read_text())
    with pytest.raises(
        InputError, match=rf"rating.yaml, line 1: the tag '.*{named}.*' is not read, since it could run code"
    ):
        tasks_of(tmp_path)
    assert not (tmp_path / "PWNED").exists()
