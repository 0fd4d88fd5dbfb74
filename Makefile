# `make demo` and `make test` set everything up first; Python 3.11 or newer is all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A file stays whole, for its server; files are taken in the order of collection, which tests/conftest.py sees to.
SPREAD := --dist loadfile --no-loadscope-reorder

.PHONY: demo test services setup clean

demo: $(VENV)/.demo
	$(BIN)/postroom demo

test: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python -m services --check
	$(BIN)/python -m pytest -m 'not server' --numprocesses 2 $(SPREAD)
	$(BIN)/python -m pytest -m server --numprocesses 4 $(SPREAD)

# Private RabbitMQ, Kafka, Redis and SQS for development, until Ctrl-C.
services: $(VENV)/.dev
	$(BIN)/python -m services

setup: $(VENV)/.dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Postroom needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[amqp,demo,http,kafka,outbox,postgresql,pydantic,redis,sqs,testing]' --group dev
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
