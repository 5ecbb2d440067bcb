# SPDX-License-Identifier: Apache-2.0
"""The order of the rows: stratified, so that a short tuning sees every label of every task in its proportion.

Drawn at random, nine of the ten rows that a tuning of two hundred has of one task may have the same label, and the model learns to
give that one.
"""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from finteam_experts.data.mixture import in_proportion

STRATUM = "stratum"  # the dataset's column


class StratifiedSampler(Sampler[int]):
    """Every row once an epoch, those of one stratum evenly spread over it; another order in each epoch.

    `strata` has the stratum of each row.
    """

    def __init__(self, strata: Sequence[str], seed: int) -> None:
        self.strata, self.seed, self.epoch = strata, seed, 0

    def __len__(self) -> int:
        return len(self.strata)

    def set_epoch(self, epoch: int) -> None:
        """The trainer says which epoch begins, also where it resumes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(in_proportion(self.strata, random.Random(f"{self.seed} {self.epoch}")))
