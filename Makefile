VENV := .venv
VLLM := .venv-vllm
WHEEL := .venv-wheel
DOCS := .venv-docs
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROMPT ?= What would happen if nobody needed sleep?
# Every worker runs tiny models: one thread of its own is faster than workers that fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4

# What touches transformers' seams; the rest is the same on every release.
CONTRACT := releases cache layout decoding generation options scripted families branches attention pipeline adapters hub
# What touches the other packages that have a lower bound.
BOUNDED := training extraction convert

.PHONY: storm demo test test-lowest test-newest test-wheel test-seams test-vllm test-vllm-servers test-vllm-engines serve-demo docs dist bench bench-long bench-smoke evaluation environments clean

demo: $(VENV)/.stamp
	mkdir -p build
	$(BIN)/hf-apar generate --compare --html build/answer.html "$(PROMPT)"

test: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(PYTEST)

# The lowest supported transformers, and the lowest of what else has a bound, laid over the other packages.
test-lowest: $(VENV)/lowest/.stamp
	PYTHONPATH=$(VENV)/lowest $(PYTEST) $(CONTRACT:%=tests/test_%.py) $(BOUNDED:%=tests/test_%.py)

# What pip resolves today from the wheel and nothing else: the README runs in it, then the tests of the seams.
test-wheel:
	rm -rf build/wheel $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) tests_wheel/readme.py build/wheel/*.whl $(WHEEL)

test-newest: test-wheel test-seams

SEAMS ?= $(CONTRACT)
test-seams:
	$(WHEEL)/bin/python -m pip install --quiet pytest pytest-xdist hypothesis
	OMP_NUM_THREADS=1 $(WHEEL)/bin/python -m pytest -n logical --maxprocesses 4 \
		$(SEAMS:%=tests/test_%.py)

$(VENV)/lowest/.stamp: $(VENV)/.stamp requirements-lowest.lock
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) -r requirements-lowest.lock
	touch $@

$(VENV)/.stamp: requirements.lock requirements-nodeps.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-nodeps.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# vLLM wants a transformers of its own, so it has an environment of its own.
$(VLLM)/.stamp: requirements-vllm.lock pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r requirements-vllm.lock
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The real engine and the real server, with a tiny random model: a process for each, on a core of its own.
VLLM_SERVERS := proxy server
test-vllm: $(VLLM)/.stamp
	$(MAKE) -j 2 --output-sync=target test-vllm-servers test-vllm-engines

test-vllm-servers test-vllm-engines: export OMP_NUM_THREADS := 1
test-vllm-servers test-vllm-engines: export VLLM_CPU_OMP_THREADS_BIND := nobind
test-vllm-servers:
	$(VLLM)/bin/python -m pytest $(VLLM_SERVERS:%=tests_vllm/test_%.py)
test-vllm-engines:
	$(VLLM)/bin/python -m pytest tests_vllm $(VLLM_SERVERS:%=--ignore tests_vllm/test_%.py)

# vLLM's server with the default model: starts it, asks it, prints the answer as it comes, stops it.
serve-demo: $(VLLM)/.stamp
	$(VLLM)/bin/python examples/serve.py "$(PROMPT)"

# The web site, into build/site: it has an environment of its own, without torch. A broken link is an error.
docs: $(DOCS)/.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --site-dir build/site

# What a release publishes, into dist/. An index takes no file above 100 MB; ours has the weights of an adapter, and stays small.
dist: $(DOCS)/.stamp
	rm -rf dist
	$(DOCS)/bin/python -m build --outdir dist .
	$(DOCS)/bin/twine check --strict dist/*
	test -z "$$(find dist -size +30M)"

$(DOCS)/.stamp: requirements-docs.lock
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -r requirements-docs.lock
	touch $@

# Nothing else may run meanwhile: some 40 minutes on two cores, and hours for the long ones. What is done is skipped, and what was
# stopped goes on; remove build/bench to begin anew. BENCH may give --questions (FastChat's vicuna_bench/question.jsonl, which is
# not part of this package) and --answers (a file that hf-apar distill wrote). For the rivals see benchmarks/rivals.py.
bench: $(VENV)/.stamp
	$(BIN)/python benchmarks/run.py $(BENCH)

bench-long: $(VENV)/.stamp
	$(BIN)/python benchmarks/run.py --long $(BENCH)

# Random scenarios for so many minutes, on from where the last call stopped: tests/storm, and docs/reliability.md.
STORM_MINUTES ?= 30
storm: $(VENV)/.stamp
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m storm --minutes $(STORM_MINUTES)

# All of docs/evaluation.md, hours on two cores; stopped and called again, it goes on. Nothing else may run meanwhile. VICUNA and MTBENCH
# are FastChat's question.jsonl, CHATS any chats, SEQUENTIAL what hf-apar train --sequential made, JUDGE_URL and JUDGE_MODEL a server that
# judges (a second call with them makes no answer again); each may be left out. Of each suite SAMPLE prompts are answered in batches of BATCH
# without a clock (80 is all there are), CLOCKED one at a time on the clock, JUDGED are judged; FAULTY of `parts` suffer faults, with each of
# CHANCES. CLOCK are options of what is timed, --dtype float32 --prepack on a processor without arithmetic in bfloat16.
EVALUATION ?= build/evaluation
SAMPLE ?= 80
CLOCKED ?= 5
BATCH ?= 32
JUDGED ?= 5
FAULTY ?= 30
CHANCES ?= 0.05 0.1 0.2 0.5
CLOCK ?=
EVALUATE := $(BIN)/hf-apar evaluate
MEASURES := --likelihood --embeddings
TWIN = $(SEQUENTIAL:%=--arm sequential=%)
ALL_SUITES = $(patsubst %,--suite %,parts whole either languages formats nested dialogue $(VICUNA) $(MTBENCH))
IN_BATCHES = $(EVALUATE) --output $(EVALUATION)/$(1) $(ALL_SUITES) --turns 2 --batch-size $(BATCH) --dtype float32 --arm plain --arm apar
FAULTS := $(foreach kind,missed needless short endless repeated unending,$(foreach p,$(CHANCES),$(kind)=$(p)))

evaluation: $(VENV)/.stamp
	@echo "1 of 6: all arms on the clock, $(CLOCKED) prompts of each suite"
	$(EVALUATE) --output $(EVALUATION)/clock $(ALL_SUITES) --sample $(CLOCKED) $(CLOCK) $(MEASURES) $(TWIN) \
		$(patsubst %,--arm %,plain apar apar+lookup apar+heads base skeleton)
	@echo "2 of 6: what is written, in batches, $(SAMPLE) prompts of each suite"
	$(call IN_BATCHES,suites) $(TWIN) --arm base --sample $(SAMPLE) $(MEASURES)
	@echo "3 of 6: deeper structure, where threads may fork once more than the checkpoint says"
	$(EVALUATE) --output $(EVALUATION)/deeper --suite nested --sample $(SAMPLE) --batch-size $(BATCH) --dtype float32 $(MEASURES) \
		--arm apar --arm 'apar!max-depth=3'
	@echo "4 of 6: what share of real prompts forks"
	test -z "$(CHATS)" || $(EVALUATE) --output $(EVALUATION)/chats --arm apar --suite "$(CHATS)" --sample 500 --max-new-tokens 128 --batch-size $(BATCH)
	@echo "5 of 6: what a judge says, where there is one"
	test -z "$(JUDGE_URL)" || { mkdir -p $(EVALUATION)/judged && { test -e $(EVALUATION)/judged/answers.jsonl || \
		cp $(addprefix $(EVALUATION)/suites/,settings.json answers.jsonl) $(EVALUATION)/judged; } && \
		$(call IN_BATCHES,judged) --sample $(JUDGED) --judge-url "$(JUDGE_URL)" --judge-model "$(JUDGE_MODEL)"; }
	@echo "6 of 6: faults"
	$(EVALUATE) --output $(EVALUATION)/faults --suite parts --sample $(FAULTY) --batch-size $(BATCH) --dtype float32 $(MEASURES) \
		--arm apar \
		$(patsubst %,--arm 'apar!%',$(FAULTS))
	$(BIN)/python benchmarks/evaluation.py $(EVALUATION)

# Counts of operations instead of seconds, so that it holds on a busy machine too.
bench-smoke: $(VENV)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/smoke.py

# All environments at once: pip takes a core for each.
environments: $(VENV)/.stamp $(VLLM)/.stamp $(DOCS)/.stamp

clean:
	rm -rf $(VENV) $(VLLM) $(WHEEL) $(DOCS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
