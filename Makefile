# Every command of the readme. Each makes what it needs first; PYTHON=python3.12 names another interpreter, VENV another folder.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: run test lab docs bench machine clean
.DEFAULT_GOAL := run

run: $(VENV)/.library ## all ten steps and a turn of the loop, with a scorecard: about a quarter of an hour
	$(BIN)/llm-scratch run --preset cpu $(ARGS)

test: $(VENV)/.development machine ## every chapter, every test, the site, two hosts
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 $(ARGS)

lab: $(VENV)/.development ## the chapters in JupyterLab, on 127.0.0.1
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 $(shell test `id -u` = 0 && echo --allow-root) nbs/index.ipynb $(ARGS)

docs: $(VENV)/.development ## the site, into _docs
	$(BIN)/python docs/build.py $(ARGS)

bench: $(VENV)/.development ## side by side with other libraries, an hour; the last three go on where they were stopped, in runs/bench
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/duplicates.py
	$(BIN)/python benchmarks/cleaning.py
	$(BIN)/python benchmarks/trainers.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/monitors.py
	$(BIN)/python benchmarks/machine.py
	@mkdir -p runs/bench
	$(BIN)/python benchmarks/throughput.py --out runs/bench/throughput.json
	$(BIN)/python benchmarks/backward.py --out runs/bench/backward.json
	$(BIN)/python benchmarks/quality.py --out runs/bench/quality.json

machine: ## what tests need beside Python: a browser, ssh, Prometheus, where this machine lets us
	@sh tests/machine.sh

clean: ## what the commands made, but for the runs
	rm -rf $(VENV) _docs docs/node_modules build dist *.egg-info .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip

$(VENV)/.library: $(VENV)/bin/python settings.ini setup.py pyproject.toml constraints.txt
	$(PIP) -e '.[run]'
	@touch $@

$(VENV)/.development: $(VENV)/bin/python settings.ini setup.py pyproject.toml constraints.txt
	$(PIP) -e '.[run,dev,docs,data,distributed,evaluation,finetuning,safety,monitor,megatron,interchange,fast,deploy,serve]'
	@touch $@ $(VENV)/.library
