# `make quickstart` and `make test` work in a fresh clone: each sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
REQUIREMENTS := requirements.txt
TRAINED := output/quickstart/checkpoint.pth
# the model of make demo: the checkpoint of make quickstart if there is one, else the shipped projection
SHIPPED := minigpt4/quickstart/checkpoint
MODEL    = $(if $(wildcard $(TRAINED)),--cfg-path eval_configs/embedded_eval.yaml --checkpoint $(TRAINED),--checkpoint $(SHIPPED))

.PHONY: help quickstart quickstart-v2 demo test test-fast latest oldest object-stores survival lmms-eval vlmevalkit check clean

help:
	@echo "make quickstart   environment, data, weights, both training stages, evaluation, a sample answer"
	@echo "make quickstart-v2   train and evaluate a small MiniGPT-v2 (it names what it sees, but finds few boxes yet: docs/embedded.md)"
	@echo "make demo         chat about drawn images in the browser (downloads the LLM once, 93 MB)"
	@echo "make test         the test suite (CPU; downloads the LLM and img2dataset once, about 1 GB)"
	@echo "make test-fast    the test suite without the slow tests (minutes each)"
	@echo "make latest       make test-fast with the newest release of every package, ignoring upper bounds"
	@echo "make oldest       the full test suite with the oldest releases that requirements.txt allows"
	@echo "make object-stores  add s3fs and an S3 server to the environment, then test shards in object stores"
	@echo "make survival     fault and kill tests with the real LLM (an hour); writes the table of docs/reliability.md"
	@echo "make lmms-eval    install lmms-eval with the model minigpt4 in build/lmms-eval, then test it"
	@echo "make vlmevalkit   install VLMEvalKit with this MiniGPT-4 in build/vlmevalkit, then test it"
	@echo "make check        lint and formatting"
	@echo "make clean        remove the environment and outputs"

$(READY): $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r $(REQUIREMENTS)
	touch $(READY)

quickstart: $(READY)
	$(BIN)/python -m minigpt4.quickstart

quickstart-v2: $(READY)
	$(BIN)/python -m minigpt4.quickstart.v2

demo: $(READY)
	$(BIN)/python demo.py $(MODEL)

# for two cores: one more, because some tests wait for servers, browsers and other processes
WORKERS ?= 3
# the harnesses need their own environments, which take minutes to install: see lmms-eval, vlmevalkit
SUITE = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore tests/evaluation/harnesses

test: $(READY)
	$(SUITE)

test-fast: $(READY)
	$(SUITE) -m "not slow"

latest:
	mkdir -p build
	sed 's/,<[0-9.]*//' requirements.txt > build/latest.txt
	$(MAKE) test-fast VENV=build/latest REQUIREMENTS=build/latest.txt

oldest:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --disable-pip-version-check uv
	build/uv/bin/uv pip compile -q --resolution lowest-direct requirements.txt -o build/oldest.txt
	$(MAKE) test VENV=build/oldest REQUIREMENTS=build/oldest.txt

STORES := s3fs "moto[server]"
object-stores: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check $(STORES)
	$(BIN)/python -m pytest tests/datasets/test_object_store.py tests/runners/test_s3_training.py
	$(BIN)/python -m pytest tests/survival/test_faults.py -k object_store

survival: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check $(STORES)
	$(BIN)/python -m pytest tests/survival tests/runners -m survival --fault-table docs/reliability.md

lmms-eval vlmevalkit: $(READY)
	$(BIN)/python -m tests.evaluation.harnesses.environment $@
	$(BIN)/python -m pytest tests/evaluation/harnesses/test_$(subst -,_,$@).py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) output build *.egg-info
