# SPDX-License-Identifier: Apache-2.0
"""The rows that a tuning reads: which of each task, and in which order."""

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from finteam_experts.data.files import Row, held_out, read_task
from finteam_experts.data.tasks import Tasks
from finteam_experts.errors import InputError, nearest


def row_limits(tasks: Collection[str], per_task: int | None, of_task: dict[str, int] | None) -> dict[str, int | None]:
    """The most train rows to take of each task: `per_task`, unless `of_task` names it; `InputError` for wrong limits."""
    own = of_task or {}
    if not isinstance(own, dict):
        raise InputError(f"rows_of_task is {own!r}; write it as {{stock_movement: 160}}.")
    for name in own:
        if name not in tasks:
            raise InputError(f"rows_of_task: unknown task '{name}'.{nearest(str(name), tasks)}")
    limits = [("rows_per_task", per_task, 1), *((f"rows_of_task, {task}", limit, 0) for task, limit in own.items())]
    for name, limit, least in limits:
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < least):
            raise InputError(
                f"{name} is {limit!r}; it must be a whole number from {least}, or be left out for all rows."
            )
    return {name: own.get(name, per_task) for name in tasks}


def in_proportion(strata: Sequence[str], rng: random.Random) -> list[int]:
    """The places of all rows in a stratified order: any stretch of it has of each stratum about its share.

    Of n rows of a stratum one is drawn for each n-th of the order, at a random place in it.
    """
    rows_of = defaultdict(list)
    for row, stratum in enumerate(strata):
        rows_of[stratum].append(row)
    places = {}
    for rows in rows_of.values():
        for part, row in enumerate(rng.sample(rows, len(rows))):
            places[row] = (part + rng.random()) / len(rows)
    return sorted(places, key=places.__getitem__)


def tuning_rows(
    data_dir: Path, tasks: Tasks, seed: int, limits: dict[str, int | None], *, hold_out: bool
) -> list[tuple[str, Row]]:
    """The train rows to tune on, each with its task, shuffled: at most `limits[task]` rows of each, its labels in proportion.

    With `hold_out`, rows that serve for validation are left out.
    """
    rng = random.Random(seed)
    rows = []
    for name, task in tasks.items():
        own = read_task(data_dir, task, "train")
        own = [row for row in own if not (hold_out and held_out(data_dir, name, row))]
        rng.shuffle(own)
        limit = limits.get(name)
        if limit is not None and limit < len(own):
            order = in_proportion([row["label"] for row in own], random.Random(seed))
            own = [own[place] for place in order[:limit]]
        rows += [(name, row) for row in own]
    if not rows:
        raise InputError("rows_of_task leaves no row to tune on. Give at least one task some.")
    rng.shuffle(rows)
    return rows
