# `make run`, `make test`, `make lint` and `make docs` set up everything in .venv; they need Python 3.11 or newer.
PYTHON ?= python3
RUN := .venv/.ready
TEST := .venv/.ready-test
LINT := .venv/.ready-lint
DOCS := .venv/.ready-docs

run: $(RUN)
	.venv/bin/python run.py $(ARGS)

test: $(TEST)
	.venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(LINT)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/yamllint --strict .
	.venv/bin/pymarkdown scan $$(git ls-files '*.md')

docs: $(DOCS)
	.venv/bin/python -m mkdocs build --strict $(ARGS)

slow: $(TEST)
	.venv/bin/python -m pytest -m slow $(ARGS)

$(RUN): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make run PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(LINT): $(RUN) requirements-lint.lock
	.venv/bin/python -m pip install --quiet -r requirements.lock -r requirements-lint.lock
	@touch $@

$(DOCS): $(RUN) requirements-docs.lock
	.venv/bin/python -m pip install --quiet -r requirements.lock -r requirements-docs.lock
	@touch $@

$(TEST): $(RUN) requirements-test.lock
	.venv/bin/python -m pip install --quiet -r requirements.lock -r requirements-test.lock
	@touch $@

mutants: $(TEST)
	.venv/bin/python tests/mutants.py $(ARGS)

startup: $(RUN)
	.venv/bin/python -m experiments.bench.startup $(ARGS)

# No environment of its own: a machine with a GPU may have no network, so it runs with what PYTHON has, or names what is missing.
gpu:
	$(PYTHON) -m experiments.bench.gpu $(ARGS)

# Environments of other versions are made once, under COMPAT_HOME; ARGS="newest --cut" runs a short part on the newest.
compat:
	$(PYTHON) tests/compat.py $(ARGS)

.PHONY: run test lint docs slow mutants startup gpu compat
