# SPDX-License-Identifier: Apache-2.0
"""The order of the rows in a tuning: no stretch of it has too much of one label."""

import shutil
from collections import Counter

import pytest

from conftest import instruct_tune
from finteam_experts.training.sampler import StratifiedSampler

STRATA = ["paid"] * 300 + ["default"] * 300 + ["conversation"] * 120 + ["rare"] * 3


@pytest.mark.parametrize("seed", range(5))
def test_every_stretch_has_each_stratum_in_its_proportion(seed):
    rows = list(StratifiedSampler(STRATA, seed))
    assert sorted(rows) == list(range(len(STRATA)))
    for start in range(0, len(rows) - 24, 24):
        found = Counter(STRATA[row] for row in rows[start : start + 24])
        for stratum, count in Counter(STRATA).items():
            assert abs(found[stratum] - 24 * count / len(STRATA)) <= 2.5, (start, stratum, found)


def test_epochs_and_seeds_differ_and_repeat():
    sampler = StratifiedSampler(STRATA, 0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert list(StratifiedSampler(STRATA, 1)) not in (first, second)
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_tuning_reads_its_rows_in_that_order_unless_it_is_told_not_to(copied_run, monkeypatch):
    epochs = []
    iterate = StratifiedSampler.__iter__

    def recorded(sampler):
        epochs.append((sampler.epoch, len(set(sampler.strata))))
        return iterate(sampler)

    monkeypatch.setattr(StratifiedSampler, "__iter__", recorded)
    few = ("--rows_per_task", 8, "--tasks", "fpb", "headlines", "--chat_share", 0)  # two epochs in the steps of a test
    for stratified in ("true", "false"):
        shutil.rmtree(copied_run / "dense-instruct")
        instruct_tune(copied_run, "dense", *few, "--stratify_rows", stratified)
        assert [epoch for epoch, _ in epochs] == [0, 1]  # of the first training
    assert epochs[0][1] in (4, 5)  # three labels of PhraseBank, of which eight rows may lack one, and two of headlines
