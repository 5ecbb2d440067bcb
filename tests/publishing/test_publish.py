# SPDX-License-Identifier: Apache-2.0
"""Step 5, against a Hub on this machine, over LFS and over Xet: what is published loads, and failures lose nothing."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from conftest import REPOSITORY, ROLES, SHORT, call, shell
from finteam_experts.errors import InputError
from finteam_experts.files import read_json
from finteam_experts.publishing.cards import Cards, learned_from
from finteam_experts.publishing.repositories import PublishedRun, Repo, check_licence, check_texts
from local_hub import OWNER, READER, LocalHub

NAME = "Team"
MODELS = [f"owner/{NAME}", f"owner/{NAME}-merged", *(f"owner/{NAME}-{role}-lora" for role in ROLES)]
WEIGHTS = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
           "chat_template.jinja"}  # fmt: skip


def command(run_dir):
    return ["scripts/publish.py", "--run_dir", str(run_dir), "--namespace", "owner", "--name", NAME,
            "--base_model", "owner/toy"]  # fmt: skip


def publish(run_dir, hub, *attempts):
    """Run the script once for each of `attempts`, (token, arguments), in one process that knows no other Hub.

    Returns (exit code, output, errors) of each.
    """
    called = [(token, [*command(run_dir), *arguments]) for token, arguments in attempts]
    ended = shell(
        sys.executable, "-c", REPEATED, json.dumps(called),
        env={**os.environ, **hub.environment()},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.split("ENDED")[1])


REPEATED = """
import contextlib, io, json, os, runpy, sys
ended = []
for token, sys.argv in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    ended.append((code, out.getvalue(), err.getvalue()))
print("ENDED", json.dumps(ended))
"""


def with_secrets(run, tmp_path_factory):
    """A copy of a complete run, among files that are nobody's business."""
    run_dir = shutil.copytree(run, tmp_path_factory.mktemp("publish") / "run")
    for part in ("moe", "moe-instruct", "adapters/macro"):
        (run_dir / part / ".env").write_text("TOKEN=secret")
        (run_dir / part / "optimizer.pt").write_bytes(b"secret")
        (run_dir / part / "checkpoint-2").mkdir()
        (run_dir / part / "checkpoint-2" / "model.safetensors").write_bytes(b"secret")
    return run_dir


@pytest.fixture(scope="module")
def run_with_secrets(tmp_path_factory, done_run):
    return with_secrets(done_run, tmp_path_factory)


@pytest.fixture(scope="module", params=["lfs", "qwen3", pytest.param("xet", marks=pytest.mark.slow)])
def published(request, tmp_path_factory, run_with_secrets):
    run_dir = run_with_secrets
    if request.param == "qwen3":
        run_dir = with_secrets(request.getfixturevalue("qwen3_run"), tmp_path_factory)
    with LocalHub(tmp_path_factory.mktemp("hub") / "hub", xet=request.param == "xet") as hub:
        hub.put("models", "owner/toy", run_dir / "base")
        [(code, _, errors)] = publish(run_dir, hub, (OWNER, []))
        assert code == 0, errors
        yield hub, run_dir


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        yield hub


def test_what_is_published_and_nothing_else(published):
    hub, run_dir = published
    assert {name for kind, name in hub.repos if kind == "models"} == {*MODELS, "owner/toy"}
    for name in MODELS:
        repo = hub.repos["models", name]
        assert repo.private
        assert repo.tags == {"v0.1.0": repo.head}
        assert repo.messages[1].startswith("FinTeamExperts v0.1.0: ")
        files = set(repo.commits[repo.head]) - {".gitattributes", "README.md", "finteam.json"}
        if name.endswith("-lora"):
            assert files == {"adapter_model.safetensors", "adapter_config.json"}
        else:
            figure = "routing.png" if name.endswith("-merged") else "evaluation.png"
            assert files - {figure, "special_tokens_map.json", "model.safetensors.index.json"} == WEIGHTS
            assert figure in files
    space = hub.repos["spaces", f"owner/{NAME}"]
    assert space.private
    assert set(space.commits[space.head]) - {".gitattributes"} == {
        "README.md", "app.py", "team.py", "panels.py", "examples.py", "gpu.py", "chats.py", "prompts.py", "scoring.py",
        "requirements.txt",
    }  # fmt: skip
    assert space.settings["variables"] == [{"key": "MODEL_ID", "value": f"owner/{NAME}"}]


def test_models_load_by_their_id_in_a_new_process_with_the_same_weights(published):
    hub, run_dir = published
    parts = ["moe-instruct", "moe", *(f"adapters/{role}" for role in ROLES)]
    folders = {name: str(run_dir / part) for name, part in zip(MODELS, parts, strict=True)}
    code = f"""
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
def load(place, is_adapter):
    if not is_adapter:
        return AutoModelForCausalLM.from_pretrained(place)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("owner/toy"), place)
for name, folder in {folders}.items():
    is_adapter = name.endswith("-lora")
    if is_adapter:
        assert PeftConfig.from_pretrained(name).base_model_name_or_path == "owner/toy"
    else:
        assert AutoTokenizer.from_pretrained(name).chat_template
    fetched, own = load(name, is_adapter).state_dict(), load(folder, is_adapter).state_dict()
    assert fetched.keys() == own.keys()
    for key, tensor in own.items():
        assert fetched[key].dtype == tensor.dtype and torch.equal(fetched[key], tensor), (name, key)
    print("SAME", name)
"""
    ended = shell(sys.executable, "-c", code, env={**os.environ, **hub.environment()})
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("SAME") == len(MODELS)


def test_a_private_model_needs_the_token(published):
    hub, _ = published
    code = f"from huggingface_hub import hf_hub_download; print(hf_hub_download('owner/{NAME}', 'config.json'))"
    for token, works in ((None, False), (OWNER, True)):
        environment = hub.environment(token=token, home=hub.folder / f"home of {token}")
        ended = shell(sys.executable, "-c", code, env={**os.environ, **environment})
        assert (ended.returncode == 0) == works
        assert works or "RepositoryNotFoundError" in ended.stderr


def test_a_second_publish_uploads_nothing(published):
    hub, run_dir = published
    before = len(hub.requests)
    [(code, output, errors)] = publish(run_dir, hub, (OWNER, []))
    assert code == 0, errors
    assert output.count(": unchanged") == len(MODELS) + 1
    asked = hub.requests[before:]
    assert not [path for method, path, _ in asked if method == "PUT" or "/commit/" in path or "/tag/" in path]


def test_cards_are_what_the_hub_reads_and_hold_nothing_local(published):
    hub, run_dir = published
    for name in MODELS:
        repo = hub.repos["models", name]
        text = hub.content(repo.commits[repo.head]["README.md"]).decode()
        card = ModelCard(text)
        assert card.data.license == "apache-2.0"
        assert card.data.pipeline_tag == "text-generation"
        assert "finance" in card.data.tags
        assert "```python" in text
        assert "not financial advice" in text.lower() or "financial advice" in text
        assert f"https://huggingface.co/owner/{NAME}" in text
        assert not re.search(r"\b(None|nan)\b", text)
        for foreign in (str(run_dir), "outputs/", OWNER, "{{", "{%"):
            assert foreign not in text, (name, foreign)
        if name.endswith("-lora"):
            shares = re.search(r"It was trained on (.+), with LoRA on", text)[1]
            assert "rows of its tasks (" in shares
            assert sum(map(int, re.findall(r"(\d+)%", shares))) == pytest.approx(100, abs=2)
        else:
            family = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE"}[
                read_json(run_dir / "moe/config.json")["model_type"]
            ]
            assert f"in the {family} architecture" in text
    tuned = ModelCard(hub.content(hub.repos["models", f"owner/{NAME}"].commits[
        hub.repos["models", f"owner/{NAME}"].head]["README.md"]).decode())  # fmt: skip
    assert tuned.data.base_model == f"owner/{NAME}-merged"
    assert tuned.data.base_model_relation == "finetune"
    report = json.loads((run_dir / "reports/evaluation.json").read_text())["models"]["moe-instruct"]["tasks"]
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in tuned.data.eval_results}
    assert len(found) == 12
    assert found["fpb", "accuracy"] == round(report["fpb"]["accuracy"], 4)
    assert found["stock_movement", "matthews_correlation"] == round(report["stock_movement"]["mcc"], 4)


@pytest.mark.slow
def test_a_commit_that_fails_says_what_to_do_and_loses_nothing(hub, run_with_secrets):
    failures = {
        401: "hf auth login",
        403: "write access",
        404: "gone",
        412: "Someone else changed",
        503: "again later",
    }
    for status in failures:
        hub.fail("POST", f"{NAME}-merged/commit/", status)
    hub.fail("POST", f"{NAME}-merged/commit/", None)
    attempts = [(OWNER, ["--parts", "adapters", "moe"])] * (len(failures) + 2)
    *refused, broken_off, done = publish(run_with_secrets, hub, *attempts)
    for (code, _, errors), advice in zip(refused, failures.values(), strict=True):
        assert code == 2
        assert f"owner/{NAME}-merged" in errors
        assert advice in errors
        assert "Traceback" not in errors
    assert broken_off[0] == 2
    assert "broke off" in broken_off[2]
    assert done[0] == 0, done[2]
    uploaded = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(uploaded) == len(set(uploaded))  # what was there before a failure is not sent again
    assert all(len(hub.repos["models", name].commits) == 2 for name in MODELS[1:])


@pytest.mark.slow
def test_an_upload_killed_in_its_middle_goes_on_where_it_was(hub, run_with_secrets):
    first, second = (
        hashlib.sha256((run_with_secrets / "adapters" / role / "adapter_model.safetensors").read_bytes()).hexdigest()
        for role in ROLES[:2]
    )
    half_sent = hub.hold("PUT", second)
    process = subprocess.Popen(
        [sys.executable, *command(run_with_secrets), "--parts", "adapters"],
        cwd=REPOSITORY, env={**os.environ, **hub.environment()}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert half_sent.wait(60)
    process.kill()
    process.wait()
    assert [f"/lfs/{first}"] == [path for method, path, _ in hub.requests if method == "PUT"]
    [(code, _, errors)] = publish(run_with_secrets, hub, (OWNER, ["--parts", "adapters"]))
    assert code == 0, errors
    uploaded = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(uploaded) == len(set(uploaded)) == len(ROLES)


def test_a_published_team_trains_on(published, tmp_path, toy_data):
    hub, _ = published
    environment = {**os.environ, **hub.environment()}
    fetched = shell("hf", "download", f"owner/{NAME}-merged", "--local-dir", tmp_path / "moe", env=environment)
    assert fetched.returncode == 0, fetched.stderr[-2000:]
    tuned = shell(
        "accelerate", "launch", "--quiet", "recipes/instruct_tune.py", "--config", "recipes/sample/instruct_tune_moe.yaml",
        "--run_dir", tmp_path, "--data_dir", toy_data, *SHORT, env=environment,
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr[-2000:]
    assert (tmp_path / "moe-instruct" / "model.safetensors").is_file()


def test_a_team_whose_adapters_are_elsewhere_is_published_without_them(copied_run):
    shutil.rmtree(copied_run / "adapters")
    run = PublishedRun(copied_run, "owner", NAME, "owner/toy")
    repos = run.repos(["dense", "adapters", "moe", "moe-instruct", "space"])
    assert [repo.part for repo in repos] == ["moe", "moe-instruct", "space"]
    assert Cards(run, "apache-2.0", "v1", {}).metadata(repos[0]).base_model == ["owner/toy"]
    record = read_json(copied_run / "moe/finteam.json")
    del record["inputs"]["base"]  # as in a team that was changed
    (copied_run / "moe/finteam.json").write_text(json.dumps(record))
    assert PublishedRun(copied_run, "owner", NAME, None).dense == "base"
    (copied_run / "base").rename(copied_run / "gone")
    with pytest.raises(InputError, match="merged from a base that is neither its folder base nor trunk"):
        _ = PublishedRun(copied_run, "owner", NAME, None).dense


def test_preflight_refuses_before_anything_is_made(hub, run_with_secrets):
    attempts = [("", []), (READER, []), (OWNER, ["--namespace", "somebody"]), (OWNER, ["--name", "My team"])]
    messages = [
        "hf auth login",
        "only reads",
        "the token belongs to owner",
        "--name My team give no name of a repository",
    ]
    for (code, _, errors), message in zip(publish(run_with_secrets, hub, *attempts), messages, strict=True):
        assert code == 2
        assert message in errors
    assert not hub.repos


def test_a_dry_run_runs_makes_and_loads_nothing(hub, copied_run, monkeypatch):
    [(code, output, errors)] = publish(copied_run, hub, (OWNER, ["--dry_run"]))
    assert code == 0, errors
    for name in MODELS:
        assert f"model {name} (private)" in output
    assert "MB  model.safetensors" in output
    assert f"The snippets of these cards would be run first: owner/{NAME}-macro-lora, " in output
    assert "Nothing was uploaded" in output
    assert not hub.requests
    assert not (copied_run / "reports/snippets.json").exists()

    def refuse(*_, **__):
        raise AssertionError("a dry run runs and loads nothing")

    monkeypatch.setattr("subprocess.run", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    call(*command(copied_run), "--dry_run")


def spoil_report(run_dir):
    path = run_dir / "reports/evaluation.json"
    report = read_json(path)
    report["inputs"]["models"]["moe-instruct"]["weights"] = "0" * 16
    path.write_text(json.dumps(report))


def forget_steps(run_dir):
    path = run_dir / "moe-instruct/finteam.json"
    record = read_json(path)
    del record["results"]["rows_seen"]
    path.write_text(json.dumps(record))


def name_the_token(run_dir):
    path = run_dir / "moe/chat_template.jinja"
    path.write_text(path.read_text() + f"{{# {OWNER} #}}")
    (run_dir / "reports/routing.json").unlink()  # it is of the team before


def break_the_model(run_dir):
    (run_dir / "moe/model.safetensors").write_bytes(b"no weights")
    (run_dir / "reports/routing.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_report, "is of another moe-instruct"),
        (forget_steps, "rows_seen"),
        (name_the_token, "chat_template.jinja names your token. Remove it"),
        (break_the_model, "snippet fails on"),
    ],
)
def test_everything_is_checked_before_the_first_repository_is_made(hub, copied_run, damage, message):
    damage(copied_run)
    parts = ["--parts", "moe"] if damage is break_the_model else []
    [(code, _, errors)] = publish(copied_run, hub, (OWNER, parts))
    assert code in (1, 2)
    assert message in errors
    assert not hub.repos


def test_an_adapter_that_the_team_was_not_merged_from_is_left_out(copied_run, capsys):
    """As after a replacement in the team: the adapter of the run folder is that of the expert before."""
    record = read_json(copied_run / "moe/finteam.json")
    adapter = copied_run / "adapters/quant/adapter_model.safetensors"
    adapter.write_bytes((copied_run / "adapters/macro/adapter_model.safetensors").read_bytes())
    for about in ({}, {"experts": {name: {"adapter": own} for name, own in record["inputs"]["adapters"].items()}}):
        (copied_run / "moe/finteam.json").write_text(json.dumps(record | about))
        run = PublishedRun(copied_run, "owner", NAME, "owner/toy")
        assert [repo.part for repo in run.repos(["adapters"])] == ["adapters/macro", "adapters/micro"]
        assert "adapters/quant is not what the expert in" in capsys.readouterr().out


def test_a_space_without_a_plan_is_refused_before_a_model_is_made(hub, run_with_secrets):
    hub.paid = False
    [(code, _, errors)] = publish(run_with_secrets, hub, (OWNER, []))
    assert code == 2
    assert "leave space out of --parts" in errors
    assert not hub.repos


def test_a_version_is_not_published_twice_with_other_files(hub, run_with_secrets):
    only = ["--parts", "adapters"]
    first, other, new = publish(
        run_with_secrets,
        hub,
        (OWNER, only),
        (OWNER, [*only, "--license", "mit"]),
        (OWNER, [*only, "--license", "mit", "--version", "2"]),
    )
    assert first[0] == new[0] == 0
    assert other[0] == 2
    assert "version v0.1.0 was published with another README.md. Name a new one with --version" in other[2]
    for role in ROLES:
        repo = hub.repos["models", f"owner/{NAME}-{role}-lora"]
        assert set(repo.tags) == {"v0.1.0", "v2"}
        assert len(repo.commits) == 3  # the refused version left none


@pytest.mark.parametrize(
    ("licence", "sources", "base", "name", "message"),
    [
        ("apache-2.0", {"x/fpb": "CC BY-NC-SA 3.0"}, "", "Team", "x/fpb is licensed CC BY-NC-SA 3.0"),
        ("llama3.1", {}, "meta-llama/Llama-3.1-8B-Instruct", "Team", "--name Llama-Team"),
        ("apache-2.0", {}, "meta-llama/Meta-Llama-3-8B", "Llama-Team", "keeps its licence"),
    ],
)
def test_licences_that_do_not_allow_it_are_refused(licence, sources, base, name, message):
    with pytest.raises(InputError, match=message):
        check_licence(licence, sources, base, name)


def test_licences_that_allow_it():
    check_licence("cc-by-nc-4.0", {"x/fpb": "CC BY-NC-SA 3.0"}, "", "Team")
    check_licence("apache-2.0", {"x/sm": "MIT"}, "HuggingFaceTB/SmolLM2-135M-Instruct", "Team")
    check_licence("llama3.1", {}, "meta-llama/Llama-3.1-8B-Instruct", "Llama-Team")


def test_texts_that_name_the_token_or_a_folder_of_this_machine_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    for text, named in ((OWNER, "your token"), (f"{tmp_path}/model", "a folder of this machine"),
                        (f"{Path.home()}/model", "your home folder")):  # fmt: skip
        with pytest.raises(InputError, match=f"me/x/config.json names {named}"):
            check_texts([Repo("me/x", "moe", {"config.json": json.dumps({"base": text}).encode()})], tmp_path)
    check_texts([Repo("me/x", "moe", {"config.json": b"{}", "model.safetensors": OWNER.encode()})], tmp_path)


@pytest.mark.parametrize(
    ("corpus", "shares", "words"),
    [
        ("0a1b", None, "passages of its field"),
        ({"corpus": "0a1b"}, {"corpus": 0.5, "chats": 0.5}, "passages of its field (100%)"),
        ({"chats": "0a1b", "tasks": {"fpb": "0a1b"}}, {"corpus": 0.2, "chats": 0.6, "tasks": 0.2},
         "conversations about it (75%), rows of its tasks (25%)"),
        ({"chats": "0a1b", "tasks": {}}, {"chats": 0.6, "tasks": 0.4}, "conversations about it (100%)"),
    ],
)  # fmt: skip
def test_a_card_says_what_an_expert_learned_from(corpus, shares, words):
    settings = {} if shares is None else {"learn_from": shares}
    assert learned_from({"inputs": {"corpus": corpus, "settings": settings}}) == words
