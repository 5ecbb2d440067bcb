# SPDX-License-Identifier: Apache-2.0
"""The order of the rows: stratified, so that a short tuning sees every label of every task in its proportion.

Drawn at random, nine of the ten rows that a tuning of two hundred has of one task may have the same label, and the model learns to
give that one.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

STRATUM = "stratum"  # the dataset's column


class StratifiedSampler(Sampler[int]):
    """Every row once an epoch, those of one stratum evenly spread over it; another order in each epoch.

    `strata` has the stratum of each row. Of n rows of a stratum one is drawn for each n-th of the epoch, at a random place in it.
    """

    def __init__(self, strata: Sequence[str], seed: int) -> None:
        self.seed, self.epoch = seed, 0
        self.rows_of = defaultdict(list)
        for row, stratum in enumerate(strata):
            self.rows_of[stratum].append(row)

    def __len__(self) -> int:
        return sum(map(len, self.rows_of.values()))

    def set_epoch(self, epoch: int) -> None:
        """The trainer says which epoch begins, also where it resumes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        places = {}
        for rows in self.rows_of.values():
            for part, row in enumerate(rng.sample(rows, len(rows))):
                places[row] = (part + rng.random()) / len(rows)
        return iter(sorted(places, key=places.__getitem__))
