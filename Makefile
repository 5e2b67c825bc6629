# A command whose result stands says "kept" and ends: after a stop, the same target goes on.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
INSTALLED := .venv/.installed$(if $(CPU),-cpu)
IN = $(if $(RUN),--run $(RUN))
LONG = $(IN) --headline$(if $(SEED), --seed $(SEED))
define newline


endef
DEVICES = $(PY) export_edge.py $(IN) --images 10000$(newline)$(PY) simulate_hardware.py $(IN)$(newline)\
	$(PY) simulate_hardware.py $(IN) --break-even$(newline)
TABLE = $(PY) evaluate.py $(IN)$(newline)$(PY) plot_pareto.py $(IN)
SHOW = $(PY) evaluate.py $(IN)$(newline)$(PY) evaluate.py $(IN) --docs$(newline)$(PY) plot_pareto.py $(IN)$(newline)
SWEEP := --sparsity 0.5 0.7 0.8 0.9 0.95 --criterion energy
.PHONY: all help sweep hardware headline reference criteria smoke test lint benchmark
all: $(INSTALLED) ## train, prune, quantize, table and picture of one seed (15 minutes)
	$(PY) train_baseline.py $(IN)
	$(PY) prune_finetune.py $(IN)
	$(PY) quantize.py $(IN)
	$(TABLE)
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "CPU=1: CPU-only torch; RUN=name: checkpoints/name/, results/name/; SEED=1: of make headline"
sweep: all ## then gradual pruning to 50, 70, 80, 90 and 95 % zeros
	$(PY) prune_finetune.py $(IN) $(SWEEP)
	$(PY) quantize.py $(IN)
	$(TABLE)
hardware: all ## then .tflite and C of every variant, and what they cost on three targets
	$(PY) export_edge.py $(IN)
	$(PY) simulate_hardware.py $(IN)
	$(PY) simulate_hardware.py $(IN) --break-even
	$(PY) plot_pareto.py $(IN) --break-even
	$(TABLE)
headline: RUN = headline$(SEED:%=_seed%)
reference: RUN = reference
headline: $(INSTALLED) ## one seed of the longer recipe up to 95 % zeros, and hardware (hours)
	$(PY) train_baseline.py $(LONG)
	$(PY) prune_finetune.py $(LONG)
	$(PY) prune_finetune.py $(LONG) --sparsity 0
	$(PY) prune_finetune.py $(LONG) --sparsity 0.8 0.9 0.93 0.95 --criterion energy --epochs 22
	$(PY) quantize.py $(IN)
	$(DEVICES)
	$(SHOW)
seed-%: $(INSTALLED)
	$(PY) train_baseline.py $(IN) --seed $*
	$(foreach how,--sparsity=0.5 --sparsity=0 --criterion=l1,$(PY) prune_finetune.py $(IN) --seed $* $(how)$(newline))
reference: seed-0 seed-1 seed-2 ## three seeds (seed-0, ...) with controls, one sweep, and hardware (hours)
	$(PY) prune_finetune.py $(IN) $(SWEEP)
	$(PY) quantize.py $(IN)
	$(DEVICES)
	$(SHOW)
	$(PY) plot_pareto.py $(IN) --break-even
	$(PY) plot_pareto.py $(IN) --layers pruned_90_energy_int8
	$(PY) plot_pareto.py $(IN) --budget flash_kib=256 ram_kib=32 accuracy=85
criteria: $(INSTALLED) ## which pruning criterion spares energy, on the validation split (an hour)
	$(PY) train_baseline.py --holdout
	$(foreach name,l1 layer-rank lamp energy,$(PY) prune_finetune.py --holdout \
		--sparsity 0.7 0.8 0.9 0.95 --epochs 3 --criterion $(name)$(newline))
	$(PY) quantize.py --run holdout
	$(PY) evaluate.py --holdout
	$(PY) benchmarks/criteria.py $(IN)
smoke: $(INSTALLED) ## the whole chain on a small sample, in the folders named smoke/ (a minute)
	$(foreach step,train_baseline prune_finetune quantize,$(PY) $(step).py --smoke$(newline))
	$(foreach step,export_edge simulate_hardware evaluate plot_pareto,$(PY) $(step).py --smoke$(newline))
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED) ## every test, one process a core
	$(PY) -m pytest -q -n auto --dist worksteal tests
lint: $(INSTALLED) ## ruff
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
benchmark: $(INSTALLED) ## training throughput, on a quiet machine
	$(PY) benchmarks/training_speed.py $(IN)
	$(PY) benchmarks/mac_counters.py $(IN)
$(INSTALLED): requirements.txt firmware/requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(if $(CPU),$(PIP) $$(sed -n 's/^\(torch[a-z]*==[0-9.]*\).*/\1+cpu/p' requirements.txt))
	$(PIP) -r requirements.txt -r tests/requirements.txt
	$(PIP) -r firmware/requirements.txt || echo "no device tools here: steps 6 and 7 will not run"
	@touch $@
