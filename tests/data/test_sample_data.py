# SPDX-License-Identifier: Apache-2.0
"""The sample data: enough of it, the same for the same seed, figures that add up, neither trivial nor impossible."""

import random
import re

import pandas as pd
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from conftest import call
from finteam_experts.data.files import read_corpus, read_task
from finteam_experts.data.leaks import check_data_dir
from finteam_experts.data.sample import task_rows
from finteam_experts.data.sample.figures import make_company, month_side, side
from finteam_experts.data.tasks import default_tasks

TASKS = default_tasks()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        call("scripts/make_sample_data.py", "--run_dir", folder / name, "--seed", seed)
    return folder


@pytest.mark.parametrize("seed_run", ["first", "other"])
@pytest.mark.parametrize("task", TASKS)
def test_bag_of_words_is_neither_trivial_nor_impossible(runs, task, seed_run):
    train, test = (read_task(runs / seed_run / "data", TASKS[task], split) for split in ("train", "test"))
    assert len(train) >= 400
    assert len(test) >= 200
    classifier = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    classifier.fit([row["text"] for row in train], [row["label"] for row in train])
    accuracy = classifier.score([row["text"] for row in test], [row["label"] for row in test])
    assert 0.6 <= accuracy <= 0.9


@pytest.mark.parametrize("role", ["macro", "micro", "quant"])
def test_corpora(runs, role):
    data = runs / "first" / "data"
    train, heldout = read_corpus(data, role), read_corpus(data, role, heldout=True)
    assert len(set(train)) >= 800
    assert len(set(heldout)) >= 100
    assert not set(train) & set(heldout)


def test_same_seed_same_bytes(runs):
    def content(name):
        return {path.name: path.read_bytes() for path in (runs / name / "data").rglob("*.jsonl")}

    assert content("first") == content("again")
    assert content("first") != content("other")


MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
YEAR = re.compile(
    rf"\b(?:{MONTHS}|{'|'.join(month[:3] for month in MONTHS.split('|'))})(?: \d\d?,)? (\d{{4}})\b"
    r"|quarter of (\d{4})|\b(\d{4})-\d\d\b|\bin ((?:19|20)\d\d)\b(?![.\d]| mn)"
)


@pytest.mark.parametrize("seed_run", ["first", "other"])
def test_no_year_is_both_trained_on_and_scored(runs, seed_run):
    """And so no day and its price, in whichever files they are."""
    years = {True: set(), False: set()}
    for path in (runs / seed_run / "data").rglob("*.jsonl"):
        scored = path.stem.endswith(("_heldout", "_test", "_valid"))
        found = {int("".join(match)) for match in YEAR.findall(path.read_text())}
        assert found or not path.stem.startswith(("macro", "quant", "headlines"))
        years[scored] |= found
    assert len(years[True]) >= 12
    assert len(years[False]) >= 80
    assert years[True].isdisjoint(years[False])


def test_no_text_of_the_sample_is_both_trained_on_and_scored(runs):
    for run in ("first", "other"):
        check_data_dir(runs / run / "data")


def test_figures_of_two_sides_are_on_neither():
    assert (side(2003), side(2004), side(2003, 2004)) == (True, False, None)
    assert month_side(pd.Timestamp("2004-01-31")) is month_side(pd.Timestamp("2003-01-31")) is None


def test_statements_add_up():
    rng = random.Random(3)
    for company in (make_company(rng) for _ in range(200)):
        for year in (0, 1):
            parts = company.cost_of_sales, company.operating_expenses, company.interest, company.tax
            assert company.net_profit(year) == pytest.approx(
                company.revenue[year] - sum(p[year] for p in parts), abs=0.11
            )
        assert company.equity() + company.liabilities == pytest.approx(company.assets, abs=0.11)


@pytest.mark.parametrize("task", ["fpb", "headlines"])
def test_a_row_says_which_way_its_figure_went(task):
    """A small model can't tell which of two figures is larger: its score on rows of two figures alone would be luck."""
    verbs = "|".join((task_rows._UP, task_rows._DOWN, task_rows._FLAT, task_rows._PRICE_UP, task_rows._PRICE_DOWN))
    told = re.compile(rf"\b(?:{verbs}) |[+-]\d+\.\d+")
    rows, _ = task_rows.task_rows(task, 300, 0, random.Random(5))
    assert [row["text"] for row in rows if not told.search(row["text"])] == []
    signed = [row for row in rows if re.search(r"[+-]\d+\.\d+", row["text"])]
    assert len(signed) > 50
    if task == "headlines":
        assert all(row["label"] == ("Yes" if "+" in row["text"] else "No") for row in signed)


def test_a_post_about_a_share_gives_one_price():
    for row in task_rows.task_rows("fiqasa", 300, 0, random.Random(5))[0]:
        assert len(re.findall(r"\d+", re.sub(r"[+-]\d+\.\d%", "", row["text"]))) <= 1, row["text"]
