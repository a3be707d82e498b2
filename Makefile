# make demo | test | bench | lint: each does all of its own set-up on a fresh machine with Python 3.11+ and a C++ compiler.
PY := .venv/bin/python
SOURCES := hooks plugins csrc tests integration
TYPING := build/typing

.PHONY: demo test bench lint setup
.DEFAULT_GOAL := demo

setup:
	@integration/setup_env.sh

demo: setup
	.venv/bin/jettison demo

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadfile
	$(PY) -m pytest integration

bench: setup
	@for bench in integration/bench_*.py; do echo "== $$bench"; $(PY) $$bench || [ $$? = 3 ] || exit 1; done

lint: setup
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	mkdir -p $(TYPING) && ln -sfn ../.. $(TYPING)/jettison
	MYPYPATH=$(TYPING) $(PY) -m mypy -p jettison.hooks -p jettison.plugins -p jettison.csrc
	.venv/bin/lint-imports
