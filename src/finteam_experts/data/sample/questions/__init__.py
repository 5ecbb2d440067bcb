# SPDX-License-Identifier: Apache-2.0
"""Sample questions on a passage, by role. Every figure of an answer is in the passage or computed from it."""

import random
from collections.abc import Callable

from finteam_experts.data.sample.questions.macro import macro
from finteam_experts.data.sample.questions.micro import micro
from finteam_experts.data.sample.questions.quant import quant
from finteam_experts.data.sample.turns import Chat

QUESTIONS: dict[str, Callable[[random.Random, bool], Chat]] = {"macro": macro, "micro": micro, "quant": quant}
