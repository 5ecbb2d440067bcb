# SPDX-License-Identifier: Apache-2.0
"""The tables of the sample's recipe on real data: what is kept of a run, and how the team's distance to one model is told."""

import random
import shutil

import pytest

from conftest import load_script
from finteam_experts.data.conversations import chat_file
from finteam_experts.data.files import read_task, write_rows
from finteam_experts.data.tasks import default_tasks
from finteam_experts.files import write_json

TASKS = default_tasks()
SPANS = ("", ", conversations", ", task prompts")


@pytest.fixture
def data(toy_data, tmp_path):
    folder = shutil.copytree(toy_data, tmp_path / "data")
    for role in ("macro", "general"):
        rows = [
            {"messages": [{"role": "user", "content": f"Rate {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
            for n in range(6)
        ]
        write_rows(chat_file(folder, role, heldout=True), rows)
    return folder


def a_run(folder, data, seed, right):
    """The reports of a run in which each model gives the right label with a chance of its own."""
    rng = random.Random(seed)
    models = {}
    for model, chance in right.items():
        tasks = {}
        for name, task in TASKS.items():
            rows = read_task(data, task, "test")
            labels = [row["label"] if rng.random() < chance else rng.choice(task.labels) for row in rows]
            tasks[name] = {task.main_score: chance, "predictions": labels}
        answers = {"n": 6, "written": ["A secret passage."] * 6, "bare": 0.0, "repeats": 0.5, "read": 1.0}
        answers |= {"computed": None, "words": 8.0}
        models[model] = {"tasks": tasks, "answers": {"macro": answers, "general": answers}}
    write_json(folder / "reports/evaluation.json", {"inputs": {"limit": None}, "models": models})
    summary = {"own_role_tokens": 0.9, "own_role_passages": 1.0, "dead_experts": 0}
    write_json(folder / "reports/routing.json", {"gates": {f"tuned{span}": {"summary": summary} for span in SPANS}})


def test_what_is_kept_of_a_run_and_the_tables(data, toy_base, tmp_path, monkeypatch):
    script = load_script("experiments/real_data/table.py")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    right = {"base": 0.0, "trunk": 0.5, "dense-instruct": 0.5, "moe": 1.0, "moe-instruct": 0.0}
    for seed in (0, 1):
        run_dir = tmp_path / f"runs/seed{seed}"
        a_run(run_dir, data, seed, right)
        for model in right:
            if model != "base":
                (run_dir / model).symlink_to(toy_base)
    (tmp_path / "runs/data").symlink_to(data)
    monkeypatch.setattr("sys.argv", ["table.py", str(tmp_path / "runs"), "--base", str(toy_base)])
    script.main()
    kept = (tmp_path / "results/seed0.json").read_text()
    assert "secret" not in kept and "It is" not in kept  # no text of the data's or a model's
    lines = (tmp_path / "results/README.md").read_text().splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    *_, gaps = (line.split(" | ") for line in lines if line.startswith("| average |"))
    assert gaps[1].startswith("+0.") and gaps[2].startswith("-0.")  # experts alone, and tuned as a whole, to one model
    conversations = next(line for line in lines if line.startswith("| 6 conversations: macro |"))
    assert "bare labels" in conversations
    assert cells["team of experts"][1] == "+0.000 [+0.000, +0.000]"  # of nats: all are one model here
    assert cells["team of experts"][-5:] == ["0.00", "0.50", "1.00", "-", "8.00"]
    assert cells["held-out text"] == ["0.900", "1.000", "0"]
