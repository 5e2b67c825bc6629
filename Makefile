# make            environment, data, the five steps, the table and the picture (one seed)
# make test       environment + tests          make lint       ruff
# make smoke      the whole chain on a small sample, in the folders named smoke/
# make reference  three seeds with the controls: the files the README's figures come from
# make benchmark  training throughput, on a quiet machine
# make CPU=1      CPU-only builds of torch and torchvision, where your package index has them

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# What decides the weights; the rest of edgecnn/ only names, stores and shows them.
TRAINING := $(addprefix edgecnn/,data.py model.py train.py)
LIBRARY := $(wildcard edgecnn/*.py)
INSTALLED := $(VENV)/.installed$(if $(CPU),-cpu)
TESTS_INSTALLED := $(VENV)/.tests-installed

# A step's JSON is written last, so it stands for the step; another file of it, lost, forces it again.
need = $(if $(wildcard $(1)),,FORCE)

.PHONY: all test lint smoke reference benchmark FORCE
.DELETE_ON_ERROR:

all: results/optimization_results.png
	@cat results/table.md

# ---- environment -------------------------------------------------------------------------------

$(INSTALLED): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(CPU),$(PIP) $$(sed -n 's/^\(torch[a-z]*==[0-9.]*\).*/\1+cpu/p' requirements.txt))
	$(PIP) -r requirements.txt
	@touch $@

$(TESTS_INSTALLED): tests/requirements.txt $(INSTALLED)
	$(PIP) -r tests/requirements.txt
	@touch $@

# ---- one seed ----------------------------------------------------------------------------------

results/baseline_fp32.json: train_baseline.py $(TRAINING) $(call need,checkpoints/baseline_fp32.pt) \
		| $(INSTALLED)
	$(PY) train_baseline.py --resume

results/baseline_int8.json: results/baseline_fp32.json quantize.py \
		$(call need,checkpoints/baseline_int8.pt)
	$(PY) quantize.py

results/pruned_50_fp32.json: results/baseline_fp32.json prune_finetune.py \
		$(call need,checkpoints/pruned_50_fp32.pt)
	$(PY) prune_finetune.py --resume

results/pruned_50_int8.json: results/pruned_50_fp32.json quantize.py \
		$(call need,checkpoints/pruned_50_int8.pt)
	$(PY) quantize.py --checkpoint checkpoints/pruned_50_fp32.pt

results/metrics.json: results/baseline_int8.json results/pruned_50_int8.json evaluate.py \
		mac_hooks.py $(LIBRARY) $(call need,results/table.md)
	$(PY) evaluate.py

results/optimization_results.png: results/metrics.json plot_pareto.py \
		$(call need,results/optimization_results.svg)
	$(PY) plot_pareto.py

# ---- three seeds and the controls --------------------------------------------------------------

# Stamps that git ignores, not the committed files, say what is done: a fresh clone trains anew.
DONE := checkpoints/reference/.done
SEEDS := 0 1 2
REFERENCE := --run reference

$(DONE)/baseline-%: train_baseline.py $(TRAINING) | $(INSTALLED)
	$(PY) train_baseline.py $(REFERENCE) --seed $* --resume
	@mkdir -p $(DONE) && touch $@

$(DONE)/pruned_50-%: $(DONE)/baseline-% prune_finetune.py
	$(PY) prune_finetune.py $(REFERENCE) --seed $* --resume
	@touch $@

$(DONE)/control-%: $(DONE)/baseline-% prune_finetune.py
	$(PY) prune_finetune.py $(REFERENCE) --seed $* --sparsity 0 --resume
	@touch $@

$(DONE)/pruned_50_l1-%: $(DONE)/baseline-% prune_finetune.py
	$(PY) prune_finetune.py $(REFERENCE) --seed $* --criterion l1 --resume
	@touch $@

# A stamp baseline-1 stands for the file baseline_seed1_fp32.pt, and baseline-0 for baseline_fp32.pt.
$(DONE)/int8-%: $(DONE)/% quantize.py
	$(PY) quantize.py --checkpoint checkpoints/reference/$(subst -,_seed,$(subst -0,,$*))_fp32.pt
	@touch $@

STEPS := baseline pruned_50 control pruned_50_l1
TRAINED := $(foreach seed,$(SEEDS),$(foreach step,$(STEPS),$(step)-$(seed)))
reference: $(addprefix $(DONE)/,$(TRAINED)) $(addprefix $(DONE)/int8-,$(TRAINED))
	$(PY) evaluate.py $(REFERENCE) --update-readme
	$(PY) plot_pareto.py $(REFERENCE)

# ---- checks ------------------------------------------------------------------------------------

smoke: $(INSTALLED)
	$(PY) train_baseline.py --smoke
	$(PY) quantize.py --smoke
	$(PY) prune_finetune.py --smoke
	$(PY) quantize.py --smoke --checkpoint checkpoints/smoke/pruned_50_fp32.pt
	$(PY) evaluate.py --smoke
	$(PY) plot_pareto.py --smoke

test: $(TESTS_INSTALLED)
	$(PY) -m pytest -q tests

lint: $(TESTS_INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

benchmark: $(INSTALLED)
	$(PY) benchmarks/training_speed.py
