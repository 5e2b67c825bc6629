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
LIBRARY := $(wildcard edgecnn/*.py)
INSTALLED := $(VENV)/.installed
TESTS_INSTALLED := $(VENV)/.tests-installed

# A step's JSON is written last, so it stands for the step; a missing checkpoint forces it again.
need = $(if $(wildcard checkpoints/$(1).pt),,FORCE)

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

results/baseline_fp32.json: train_baseline.py $(LIBRARY) $(INSTALLED) $(call need,baseline_fp32)
	$(PY) train_baseline.py --resume

results/baseline_int8.json: results/baseline_fp32.json quantize.py $(call need,baseline_int8)
	$(PY) quantize.py

results/pruned_50_fp32.json: results/baseline_fp32.json prune_finetune.py \
		$(call need,pruned_50_fp32)
	$(PY) prune_finetune.py --resume

results/pruned_50_int8.json: results/pruned_50_fp32.json quantize.py $(call need,pruned_50_int8)
	$(PY) quantize.py --checkpoint checkpoints/pruned_50_fp32.pt

results/metrics.json: results/baseline_int8.json results/pruned_50_int8.json evaluate.py mac_hooks.py
	$(PY) evaluate.py

results/optimization_results.png: results/metrics.json plot_pareto.py
	$(PY) plot_pareto.py

# ---- three seeds and the controls --------------------------------------------------------------

# Stamps that git ignores, not the committed files, say what is done: a fresh clone trains anew.
DONE := checkpoints/reference/.done
SEEDS := 0 1 2
seeded = $(1)$(if $(filter-out 0,$*),_seed$*)_fp32.pt
REFERENCE := --run reference

$(DONE)/baseline-%: train_baseline.py quantize.py $(LIBRARY) $(INSTALLED)
	$(PY) train_baseline.py $(REFERENCE) --seed $* --resume
	$(PY) quantize.py $(REFERENCE) --checkpoint checkpoints/reference/$(call seeded,baseline)
	@mkdir -p $(DONE) && touch $@

$(DONE)/pruned-%: $(DONE)/baseline-% prune_finetune.py
	$(PY) prune_finetune.py $(REFERENCE) --seed $* --resume
	$(PY) quantize.py $(REFERENCE) --checkpoint checkpoints/reference/$(call seeded,pruned_50)
	@touch $@

$(DONE)/control-%: $(DONE)/baseline-% prune_finetune.py
	$(PY) prune_finetune.py $(REFERENCE) --seed $* --sparsity 0 --resume
	$(PY) quantize.py $(REFERENCE) --checkpoint checkpoints/reference/$(call seeded,control)
	@touch $@

$(DONE)/l1-%: $(DONE)/baseline-% prune_finetune.py
	$(PY) prune_finetune.py $(REFERENCE) --seed $* --criterion l1 --resume
	$(PY) quantize.py $(REFERENCE) --checkpoint checkpoints/reference/$(call seeded,pruned_50_l1)
	@touch $@

.PRECIOUS: $(DONE)/baseline-% $(DONE)/pruned-% $(DONE)/control-% $(DONE)/l1-%

reference: $(foreach seed,$(SEEDS),$(foreach step,pruned control l1,$(DONE)/$(step)-$(seed)))
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
