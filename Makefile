# Everything runs in .venv, which the first target makes. What a machine needs: make, git, Python 3.11 or newer.
#
# pip takes torch from wherever it is set up to look (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf): a CPU build is enough,
# and on Linux it saves gigabytes over the CUDA build of the default index.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test space style quality tables hub

# The first of these that is new enough; `make PYTHON=/path/to/python ...` names another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Nothing below asks the network for a model.
OFFLINE := HF_HUB_OFFLINE=1

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: .venv/installed ## clinical answers for the bundled example ECGs
	@$(OFFLINE) $(BIN)/ecgmoe predict examples --model hub/model --table
	@echo
	@echo "Your own recordings, files or folders:  $(BIN)/ecgmoe predict PATH... --table"
	@echo "One JSON object a line:                 $(BIN)/ecgmoe predict PATH... --out results.jsonl"
	@echo "This is research software and not a medical device."

test: quality ## style, types and tests
	$(OFFLINE) $(BIN)/python -m pytest

space: .venv/installed-space ## the web page, on this machine
	$(OFFLINE) $(BIN)/python space/app.py

style: .venv/installed-test ## format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/installed-test ## style and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tables: .venv/installed-test ## write the README's result tables from benchmarks/results
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python -m benchmarks.cards

hub: ## copy the model's code beside its published weights
	@for file in hub/model/*.py; do cp modeling_ecgmoe/$$(basename $$file) $$file; done

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "ECG-MoE needs Python 3.11 or newer, found $$(python3 --version 2>&1)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "ECG-MoE needs Python 3.11 or newer, $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments; add its venv package (Debian: apt-get install python3-venv)." >&2; \
		exit 1; }
	@"$(PYTHON)" -m venv .venv || { rm -rf .venv; exit 1; }

# torch alone and pinned, before anything that depends on it could choose another build of it.
.venv/installed-torch: constraints.txt | $(BIN)/python
	@echo "Installing torch into .venv ..."
	@$(INSTALL) torch
	@touch $@

# This package, editable, by itself.
.venv/installed: pyproject.toml constraints.txt .venv/installed-torch
	@echo "Installing ecg-moe into .venv, which takes some minutes the first time ..."
	@$(INSTALL) --editable .
	@touch $@

# installed-test, installed-space: with that extra.
.venv/installed-%: pyproject.toml constraints.txt .venv/installed-torch
	@echo "Installing ecg-moe[$*] into .venv, which takes some minutes the first time ..."
	@$(INSTALL) --editable '.[$*]'
	@touch $@
