# SPDX-License-Identifier: Apache-2.0
"""The rows that a tuning reads: how many of each task, and in which order."""

import random
from pathlib import Path

from finteam_experts.data.files import Row, held_out, read_task, tasks_of
from finteam_experts.data.tasks import TASKS
from finteam_experts.errors import InputError, nearest


def row_limits(per_task: int | None, of_task: dict[str, int] | None) -> dict[str, int | None]:
    """The most train rows to take of each task: `per_task`, unless `of_task` names it; `InputError` for unknown tasks."""
    own = of_task or {}
    if not isinstance(own, dict):
        raise InputError(f"rows_of_task is {own!r}; write it as {{stock_movement: 160}}.")
    for name in own:
        if name not in TASKS:
            raise InputError(f"rows_of_task: unknown task '{name}'.{nearest(str(name), TASKS)}")
    limits = [("rows_per_task", per_task, 1), *((f"rows_of_task, {task}", limit, 0) for task, limit in own.items())]
    for name, limit, least in limits:
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < least):
            raise InputError(
                f"{name} is {limit!r}; it must be a whole number from {least}, or be left out for all rows."
            )
    return {name: own.get(name, per_task) for name in TASKS}


def tuning_rows(data_dir: Path, seed: int, limits: dict[str, int | None], *, hold_out: bool) -> list[tuple[str, Row]]:
    """The train rows to tune on, each with its task, shuffled: at most `limits[task]` rows of each.

    With `hold_out`, rows that serve for validation are left out.
    """
    rng = random.Random(seed)
    rows = []
    for task in tasks_of(data_dir):
        own = read_task(data_dir, task, "train")
        own = [row for row in own if not (hold_out and held_out(data_dir, task, row))]
        rng.shuffle(own)
        rows += [(task, row) for row in own[: limits.get(task)]]
    if not rows:
        raise InputError("rows_of_task leaves no row to tune on. Give at least one task some.")
    rng.shuffle(rows)
    return rows
