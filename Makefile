# `make demo` and `make test` set everything up on a fresh machine, in their own `.venv`.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: demo test lint test-full bench clean

$(STAMP): pyproject.toml setup.py tools/setup_environment.py
	$(PYTHON) tools/setup_environment.py .venv
	touch $(STAMP)

demo: $(STAMP)
	.venv/bin/quantempo demo -o build/demo --overwrite

lint: $(STAMP)
	$(PY) tools/link_tree.py
	$(PY) -m ruff check .
	$(PY) tools/check_types.py

# A process per core, each with one thread: spinning thread pools side by side are slower than none.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -m "not full" -n auto --maxprocesses=4 --dist loadfile

# Long sweeps: write their results as JSON under docs/, then the pages that are made from them.
test-full: lint
	$(PY) -m pytest tests
	$(PY) tools/cpp_sanitizers.py --json docs/cpp_sanitizers.json
	$(PY) tools/scheduler_sweep.py
	$(PY) tools/model_sweep.py
	$(PY) benchmarks/quality.py --json docs/quality.json
	$(PY) benchmarks/int8_speed.py --json docs/speed.json
	$(PY) benchmarks/loop_overhead.py --json docs/loop_overhead.json
	$(PY) benchmarks/rtx_builds.py --json docs/tensorrt.json --check
	$(PY) tools/benchmark_page.py

clean:
	rm -rf build .typing .mypy_cache .ruff_cache .pytest_cache
