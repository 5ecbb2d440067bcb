# SPDX-License-Identifier: Apache-2.0
"""The demo, started as a user starts it, answers over its API."""

import os
import re
import subprocess
import sys
import time
import urllib.request

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from conftest import REPOSITORY


@pytest.fixture(scope="module")
def address(done_run, tmp_path_factory):
    log = tmp_path_factory.mktemp("space") / "log"
    environment = os.environ | {"MODEL_ID": str(done_run / "moe-instruct"), "GRADIO_ANALYTICS_ENABLED": "False",
                                "PYTHONUNBUFFERED": "1", "GRADIO_SERVER_PORT": "7989"}  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "space/app.py"], cwd=REPOSITORY, env=environment, stdout=output,
                                   stderr=output)  # fmt: skip
    deadline = time.monotonic() + 90
    while not (found := re.search(r"http://[\d.]+:\d+", log.read_text())) and time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    yield found[0]
    process.terminate()
    process.wait()


def test_answers_with_the_share_of_each_analyst(address):
    text, shares = Client(address, verbose=False).predict("What moves bond yields?", api_name="/answer")
    assert isinstance(text, str)
    found = {entry["label"]: entry["confidence"] for entry in shares["confidences"]}
    assert set(found) == {"Macro analyst", "Micro analyst", "Quantitative analyst"}
    assert sum(found.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("question", "message"), [("  ", "type a question"), ("x" * 4001, "below 4000 characters")])
def test_refuses_nothing_and_too_much(address, question, message):
    with pytest.raises(AppError, match=message):
        Client(address, verbose=False).predict(question, api_name="/answer")


def test_page_says_that_it_is_no_advice(address):
    assert "not financial advice" in urllib.request.urlopen(address).read().decode()
