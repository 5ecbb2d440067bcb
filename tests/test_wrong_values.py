# SPDX-License-Identifier: Apache-2.0
"""Every value of every kind of file that people write, replaced by others: it is read, or refused with an `InputError`."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import SFTConfig

from conftest import REPOSITORY, load_script
from finteam_experts.data.conversations import chat_file, read_chats, trl_row
from finteam_experts.data.files import corpus_file, read_corpus, read_task, task_file
from finteam_experts.data.hub import read_sources
from finteam_experts.data.leaks import check_data_dir
from finteam_experts.data.tasks import FOLDER, default_tasks, read_task_file
from finteam_experts.errors import InputError
from finteam_experts.merging.config import read_merge_config, trained_roles
from finteam_experts.models import read_config
from finteam_experts.training.arguments import BaseModelConfig, parse, settings
from finteam_experts.training.rows import check_length, rows_of_run

VALUES = (None, 0, -1, 2.5, True, "", "x", [], ["a"], [1], [None], {}, {"a": 1}, [{}], math.nan, math.inf, 10**400)
FOR_RECIPES = (None, -1, 2.5, "", "x", ["a"], {"a": 1}, math.inf, 10**400)  # each costs a parser
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Costs rose."}]


def variants(content: Any) -> Iterator[Any]:
    """The content with each of its values replaced by each of `VALUES`, and with each of its keys left out."""
    for path in _paths(content):
        for value in VALUES:
            yield _with(content, path, value)
        if path:
            parent = _at(changed := copy.deepcopy(content), path[:-1])
            del parent[path[-1]]
            yield changed


def _paths(content: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    inner = (
        content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
    )
    for key, value in inner:
        yield from _paths(value, (*path, key))


def _at(content: Any, path: tuple) -> Any:
    for key in path:
        content = content[key]
    return content


def _with(content: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(content)
    _at(changed, path[:-1])[path[-1]] = value
    return changed


def refused(read: Callable[[], object]) -> bool:
    try:
        read()
    except InputError:
        return True
    return False


def read_team(path: Path) -> None:
    trained_roles(read_merge_config(path))


@pytest.mark.parametrize(
    ("source", "read"),
    [
        (FOLDER / "fpb.yaml", read_task_file),
        (REPOSITORY / "moe_merge.yaml", read_team),
        (REPOSITORY / "scripts/data_sources_gated.yaml", read_sources),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_yaml_file(tmp_path, source, read):
    content, file = yaml.safe_load(source.read_text()), tmp_path / source.name
    count = 0
    for variant in variants(content):
        file.write_text(yaml.safe_dump(variant, sort_keys=False))
        count += refused(lambda: read(file))
    assert count > 100


@pytest.mark.parametrize(
    "row", [{"text": "Sales rose.", "label": "positive", "question": "Is it?"}, {"messages": TURNS}]
)
def test_a_row_of_a_data_directory(tmp_path, row):
    files = (corpus_file(tmp_path, "macro"), task_file(tmp_path, "fpb", "train"), chat_file(tmp_path, "macro"))
    for file in (*files, task_file(tmp_path, "fpb", "test"), chat_file(tmp_path, "macro", heldout=True)):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"text": "Another.", "label": "neutral", "messages": TURNS}) + "\n")
    count = 0
    for variant in variants(row):
        for file in files:
            file.write_text(json.dumps(variant) + "\n")
        for read in (
            lambda: read_corpus(tmp_path, "macro"),
            lambda: read_task(tmp_path, default_tasks()["fpb"], "train"),
            lambda: read_chats(tmp_path, "macro"),
            lambda: check_data_dir(tmp_path),
        ):
            count += refused(read)
    assert count > 100


@pytest.mark.parametrize(
    "row", [{"messages": TURNS}, {"prompt": TURNS[:1], "completion": TURNS[1:]}, {"text": "Sales."}]
)
def test_a_row_of_a_dataset(row):
    found = [
        refused(lambda variant=variant: trl_row(variant, "row 1"))
        for variant in variants(row)
        if isinstance(variant, dict)
    ]
    assert any(found)


def test_half_characters_in_yaml(tmp_path):
    (file := tmp_path / "fpb.yaml").write_text((FOLDER / "fpb.yaml").read_text() + 'other: {text: ["a \\ud83d"]}\n')
    with pytest.raises(InputError, match="fpb.yaml: other holds half a character"):
        read_task_file(file)


@pytest.mark.parametrize("half", ["\ud800", "\udc80 percent"])
def test_half_characters_inside_a_conversation(tmp_path, half):
    file = chat_file(tmp_path, "macro")
    file.parent.mkdir()
    file.write_text(json.dumps({"messages": [TURNS[0], {"role": "assistant", "content": half}]}) + "\n")
    with pytest.raises(InputError, match="line 1: column 'messages' holds half a character"):
        read_chats(tmp_path, "macro")


@pytest.mark.parametrize(
    ("script", "arguments", "recipe", "options"),
    [
        ("train_expert", "ExpertArguments", "train_expert", ("--role", "macro")),
        ("instruct_tune", "TuneArguments", "instruct_tune_moe", ()),
    ],
)
def test_a_recipe(tmp_path, monkeypatch, toy_base, script, arguments, recipe, options):
    own = getattr(load_script(f"recipes/{script}.py"), arguments)
    content = yaml.safe_load((REPOSITORY / f"recipes/sample/{recipe}.yaml").read_text())
    file, config, count = tmp_path / "recipe.yaml", read_config(toy_base), 0
    monkeypatch.setattr("sys.argv", ["recipe", "--config", str(file), *options])

    def read() -> None:
        args, training_args, model_args = parse((own, SFTConfig, BaseModelConfig))
        args.share_batch(training_args)
        args.limits(default_tasks())
        model_args.check_lora(config)
        check_length(training_args.max_length, config)
        rows_of_run(training_args)
        json.dumps(settings(args, training_args, model_args), allow_nan=False)

    for key in sorted({field.name for field in dataclasses.fields(own)} | set(content)):
        for value in FOR_RECIPES:
            file.write_text(yaml.safe_dump(content | {key: value}))
            count += refused(read)
    assert count > 200
