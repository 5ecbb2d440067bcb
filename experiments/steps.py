# SPDX-License-Identifier: Apache-2.0
"""Running the product's own steps as a user would."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from finteam_experts.errors import InputError

REPOSITORY = Path(__file__).parents[1]


def options_of(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line arguments."""
    found = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        found += [f"--{key}", *map(str, values)]
    return found


def call(command: list[object]) -> None:
    """Run a step; `InputError` where the step fails, with the step's own message above."""
    print(f"\n=== {' '.join(map(str, command))}", flush=True)
    if code := subprocess.call(list(map(str, command))):
        raise InputError(
            f"the step above ended with exit code {code}. Fix what it names and run the same command again."
        )


def step(script: str, *arguments: object) -> None:
    call([sys.executable, REPOSITORY / script, *arguments])
