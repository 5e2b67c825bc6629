# make            environment, data, the five steps, the table and the picture (one seed)
# make test       environment + tests          make lint       ruff
# make sweep      after make: gradual pruning to 50, 70, 80, 90 and 95 % zeros, each quantized
# make hardware   after make: .tflite and C of every variant, and what they cost on three targets
# make criteria   which pruning criterion spares energy, on the validation split
# make smoke      the whole chain on a small sample, in the folders named smoke/
# make reference  three seeds with the controls: the files the README's figures come from
# make headline   one seed of the longer recipe, unattended; after a stop the same command goes on
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

EMULATED := gcc-arm-none-eabi qemu-system-arm

# A step's JSON is written last, so it stands for the step; another file of it, lost, forces it again.
need = $(if $(wildcard $(1)),,FORCE)

.PHONY: all sweep hardware criteria test lint smoke reference headline benchmark FORCE
.DELETE_ON_ERROR:

all: results/optimization_results.png
	@cat results/table.md

# ---- environment -------------------------------------------------------------------------------

$(INSTALLED): requirements.txt firmware/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(CPU),$(PIP) $$(sed -n 's/^\(torch[a-z]*==[0-9.]*\).*/\1+cpu/p' requirements.txt))
	$(PIP) -r requirements.txt
	$(PIP) -r firmware/requirements.txt || echo "no device tools here: steps 6 and 7 will not run"
	@{ command -v qemu-system-arm && command -v arm-none-eabi-gcc; } > /dev/null || \
		echo "make hardware needs: sudo apt-get install $(EMULATED)"
	@touch $@

$(TESTS_INSTALLED): tests/requirements.txt $(INSTALLED)
	$(PIP) -r tests/requirements.txt
	@touch $@

# ---- the sweep: sparsity x precision ------------------------------------------------------------

# The criterion that won `make criteria`; a sparsity is a share in the command, a percent in a name.
SWEEP_CRITERION := energy
SWEEP := --sparsity 0.5 0.7 0.8 0.9 0.95 --criterion $(SWEEP_CRITERION)
LEVELS := $(foreach percent,50 70 80 90 95,pruned_$(percent)_$(SWEEP_CRITERION))
LAST := $(lastword $(LEVELS))
SWEPT := $(LEVELS:%=results/%_int8.json)

sweep: results/optimization_results.png
	@cat results/table.md

# Levels made before, with the same arguments, are kept, so that a stopped sweep goes on.
results/$(LAST)_fp32.json: results/baseline_fp32.json prune_finetune.py \
		$(foreach level,$(LEVELS),$(call need,checkpoints/$(level)_fp32.pt))
	$(PY) prune_finetune.py $(SWEEP) --resume
	@touch $@

.SECONDEXPANSION:
$(SWEPT): results/%_int8.json: results/$(LAST)_fp32.json quantize.py \
		$$(call need,checkpoints/$$*_int8.pt)
	$(PY) quantize.py --checkpoint checkpoints/$*_fp32.pt

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

# Variants of the sweep join the table once they exist, or are asked for.
results/metrics.json: results/baseline_int8.json results/pruned_50_int8.json evaluate.py \
		mac_hooks.py $(LIBRARY) $(call need,results/table.md) \
		$(if $(filter sweep,$(MAKECMDGOALS)),$(SWEPT),$(wildcard $(SWEPT)))
	$(PY) evaluate.py

results/optimization_results.png: results/metrics.json plot_pareto.py \
		$(call need,results/optimization_results.svg)
	$(PY) plot_pareto.py

# ---- hardware: an interpreter, an NPU, a Cortex-M ------------------------------------------------

DEVICE := export_edge.py simulate_hardware.py $(wildcard firmware/*)
DEVICE += $(addprefix edgecnn/,c_source.py cortex_m.py ethos_u.py int8.py tflite.py)

hardware: results/hardware.json results/break_even.png
	@cat results/table.md

results/hardware.json: $(wildcard $(SWEPT)) results/baseline_int8.json results/pruned_50_int8.json \
		$(DEVICE) $(call need,results/edge/baseline_int8.tflite) | results/metrics.json
	$(PY) export_edge.py
	$(PY) simulate_hardware.py
	$(PY) evaluate.py --docs
	$(PY) plot_pareto.py

results/break_even.json: results/baseline_int8.json $(DEVICE)
	$(PY) simulate_hardware.py --break-even

results/break_even.png: results/break_even.json plot_pareto.py $(call need,results/break_even.svg)
	$(PY) plot_pareto.py --break-even

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

# One seed of the sweep.
$(DONE)/sweep: $(DONE)/baseline-0 prune_finetune.py
	$(PY) prune_finetune.py $(REFERENCE) $(SWEEP) --resume
	@touch $@

$(DONE)/int8-sweep-%: $(DONE)/sweep quantize.py
	$(PY) quantize.py --checkpoint checkpoints/reference/$*_fp32.pt
	@touch $@

$(DONE)/hardware: $(DEVICE) $(foreach step,baseline pruned_50 control pruned_50_l1,$(DONE)/int8-$(step)-0) \
		$(LEVELS:%=$(DONE)/int8-sweep-%)
	$(PY) export_edge.py $(REFERENCE) --images 10000
	$(PY) simulate_hardware.py $(REFERENCE)
	$(PY) simulate_hardware.py $(REFERENCE) --break-even
	@touch $@

STEPS := baseline pruned_50 control pruned_50_l1
TRAINED := $(foreach seed,$(SEEDS),$(foreach step,$(STEPS),$(step)-$(seed)))
reference: $(addprefix $(DONE)/,$(TRAINED)) $(addprefix $(DONE)/int8-,$(TRAINED)) \
		$(DONE)/hardware
	$(PY) evaluate.py $(REFERENCE)
	$(PY) evaluate.py $(REFERENCE) --docs
	$(PY) plot_pareto.py $(REFERENCE)
	$(PY) plot_pareto.py $(REFERENCE) --break-even
	$(PY) plot_pareto.py $(REFERENCE) --layers pruned_90_$(SWEEP_CRITERION)_int8
	$(PY) plot_pareto.py $(REFERENCE) --budget flash_kib=256 ram_kib=32 accuracy=85

# ---- the headline recipe ------------------------------------------------------------------------

# Stamps, as for reference: a fresh clone trains anew, a stopped run goes on where it was.
HEADLINE_DONE := checkpoints/headline/.done
HEADLINE := --run headline --headline --resume
HEADLINE_PERCENTS := 80 90 93 95
HEADLINE_SWEEP := --sparsity 0.8 0.9 0.93 0.95 --criterion $(SWEEP_CRITERION)
# Longer than the 50 % level's: the more zeros, the more there is to recover.
SWEEP_EPOCHS := 22
HEADLINE_TRAINED := baseline pruned_50 control sweep
HEADLINE_VARIANTS := baseline pruned_50 control \
	$(foreach percent,$(HEADLINE_PERCENTS),pruned_$(percent)_$(SWEEP_CRITERION))
# For the estimate of the time left: the epochs of the 50 % level and the control that still follow
# a step, and of the levels of the sweep.
LEVEL_EPOCHS := $(shell sed -n 's/^HEADLINE_RECIPE.*"epochs": \([0-9]*\).*/\1/p' prune_finetune.py)
later = --epochs-after $(shell expr $(1) \* $(LEVEL_EPOCHS) + $(words $(HEADLINE_PERCENTS)) \* $(SWEEP_EPOCHS))

$(HEADLINE_DONE)/baseline: train_baseline.py $(TRAINING) | $(INSTALLED)
	$(PY) train_baseline.py $(HEADLINE) $(call later,2)
	@mkdir -p $(HEADLINE_DONE) && touch $@

$(HEADLINE_DONE)/pruned_50: $(HEADLINE_DONE)/baseline prune_finetune.py
	$(PY) prune_finetune.py $(HEADLINE) $(call later,1)
	@touch $@

# The dense network of the 50 % level's effort, distillation included.
$(HEADLINE_DONE)/control: $(HEADLINE_DONE)/baseline prune_finetune.py
	$(PY) prune_finetune.py $(HEADLINE) --sparsity 0 $(call later,0)
	@touch $@

$(HEADLINE_DONE)/sweep: $(HEADLINE_DONE)/baseline prune_finetune.py
	$(PY) prune_finetune.py $(HEADLINE) $(HEADLINE_SWEEP) --epochs $(SWEEP_EPOCHS)
	@touch $@

$(HEADLINE_VARIANTS:%=$(HEADLINE_DONE)/int8-%): $(HEADLINE_DONE)/int8-%: \
		$(HEADLINE_TRAINED:%=$(HEADLINE_DONE)/%) quantize.py
	$(PY) quantize.py --checkpoint checkpoints/headline/$*_fp32.pt
	@touch $@

$(HEADLINE_DONE)/hardware: $(DEVICE) $(HEADLINE_VARIANTS:%=$(HEADLINE_DONE)/int8-%)
	$(PY) export_edge.py --run headline --images 10000
	$(PY) simulate_hardware.py --run headline
	$(PY) simulate_hardware.py --run headline --break-even
	@touch $@

headline: $(HEADLINE_DONE)/hardware
	$(PY) evaluate.py --run headline
	$(PY) evaluate.py --run headline --docs
	$(PY) plot_pareto.py --run headline

# ---- which criterion: on the validation split, at equal effort -----------------------------------

TRIED := checkpoints/holdout/.done
TRIAL := --holdout --sparsity 0.7 0.8 0.9 0.95 --epochs 3
CRITERIA := l1 layer-rank lamp energy

$(TRIED)/baseline: train_baseline.py $(TRAINING) | $(INSTALLED)
	$(PY) train_baseline.py --holdout --resume
	@mkdir -p $(TRIED) && touch $@

$(TRIED)/trial-%: $(TRIED)/baseline prune_finetune.py
	$(PY) prune_finetune.py $(TRIAL) --criterion $* --resume
	@touch $@

# The default criterion is left out of a variant's name.
TRIALS := $(foreach percent,70 80 90 95,pruned_$(percent) \
	$(foreach criterion,$(filter-out layer-rank,$(CRITERIA)),pruned_$(percent)_$(criterion)))

$(TRIALS:%=$(TRIED)/int8-%): $(TRIED)/int8-%: $(CRITERIA:%=$(TRIED)/trial-%) quantize.py
	$(PY) quantize.py --checkpoint checkpoints/holdout/$*_fp32.pt
	@touch $@

criteria: $(TRIALS:%=$(TRIED)/int8-%)
	$(PY) evaluate.py --holdout
	$(PY) benchmarks/criteria.py

# ---- checks ------------------------------------------------------------------------------------

smoke: $(INSTALLED)
	$(PY) train_baseline.py --smoke
	$(PY) quantize.py --smoke
	$(PY) prune_finetune.py --smoke
	$(PY) quantize.py --smoke --checkpoint checkpoints/smoke/pruned_50_fp32.pt
	$(PY) evaluate.py --smoke
	$(PY) plot_pareto.py --smoke
	$(PY) export_edge.py --smoke
	$(PY) simulate_hardware.py --smoke

test: $(TESTS_INSTALLED)
	$(PY) -m pytest -q tests

lint: $(TESTS_INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

benchmark: $(INSTALLED)
	$(PY) benchmarks/training_speed.py
