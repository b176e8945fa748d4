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

# A process per core, each with one thread: spinning thread pools side by side are slower than none.  Skipped tests are
# listed with their reasons at the end (-rs): a green run without Chromium or Python 3.10 has not tested those.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -m "not full" -n auto --maxprocesses=4 --dist loadfile -rs

# Long sweeps, many hours: write their results as JSON under docs/, then the pages that are made from them.  What is not
# here needs more than this environment; docs/benchmarks.md says what.
test-full: lint
	$(PY) -m pytest tests -rs
	$(PY) tools/cpp_sanitizers.py --json docs/cpp_sanitizers.json
	$(PY) tools/scheduler_sweep.py
	$(PY) tools/model_sweep.py
	$(PY) benchmarks/unknown_classes.py --json docs/unknown_classes.json
	$(PY) benchmarks/quality.py --json docs/quality.json
	$(PY) benchmarks/int8_speed.py --json docs/speed.json
	$(PY) benchmarks/loop_overhead.py --json docs/loop_overhead.json
	$(PY) benchmarks/fp8_quality.py --json docs/fp8.json
	for model in dit unet; do for part in quality times equal-time dynamic tap noise; do \
	  $(PY) benchmarks/caching.py --model $$model --part $$part --json docs/caching.json || exit 1; done; done
	$(PY) benchmarks/caching_speed.py --model dit-s2 --keep build/speed-graphs --json docs/caching_speed.json
	$(PY) benchmarks/openvino_speed.py --json docs/openvino_speed.json
	$(PY) benchmarks/engine_agreement.py --json docs/engine_agreement.json
	$(PY) benchmarks/selection.py --json docs/selection.json
	$(PY) benchmarks/compile_cost.py --json docs/compile_cost.json
	$(PY) tools/kill_resume.py --json docs/kill_resume.json
	$(PY) tools/cpp_fuzz.py --minutes 4 --json docs/cpp_fuzz.json
	$(PY) benchmarks/rtx_builds.py --json docs/tensorrt.json --check
	$(PY) tools/benchmark_page.py

clean:
	rm -rf build .typing .mypy_cache .ruff_cache .pytest_cache
