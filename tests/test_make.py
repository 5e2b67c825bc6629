"""What `make` would run: everything in a fresh clone, only what is out of date afterwards."""

import os
import shutil
import subprocess

import pytest
from conftest import REPOSITORY

from benchmarks.training_speed import TRAINING_FLOPS, summarize
from prune_finetune import HEADLINE_RECIPE

STEPS = ("train_baseline.py", "quantize.py", "prune_finetune.py", "evaluate.py", "plot_pareto.py")
STEPS += ("export_edge.py", "simulate_hardware.py")
# What `make reference` ends with, whatever was out of date.
CLOSING = ["evaluate.py", "evaluate.py", *["plot_pareto.py"] * 4]
DEVICES = ["export_edge.py", "simulate_hardware.py", "simulate_hardware.py"]
LEVELS = [f"pruned_{percent}_energy" for percent in (50, 70, 80, 90, 95)]
VARIANTS = ("baseline_fp32", "baseline_int8", "pruned_50_fp32", "pruned_50_int8")


@pytest.fixture
def clone(tmp_path):
    """The sources with an installed environment, every file equally old, as git leaves them."""
    for name in ("Makefile", "requirements.txt", "mac_hooks.py", *STEPS):
        shutil.copy(REPOSITORY / name, tmp_path)
    for folder in ("edgecnn", "firmware", "results/reference", "checkpoints/reference"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return tmp_path


def finish(folder):
    """Leave the files of a finished run, each a second younger than the one before."""
    for path in ("checkpoints", "results"):
        (folder / path).mkdir(exist_ok=True)
    names = [f"results/{variant}.json" for variant in VARIANTS]
    names += ["results/table.md", "results/metrics.json"]
    names += ["results/optimization_results.svg", "results/optimization_results.png"]
    for age, name in enumerate(names):
        (folder / name).touch()
        os.utime(folder / name, (1e9 + 100 + age, 1e9 + 100 + age))
    for variant in VARIANTS:
        (folder / f"checkpoints/{variant}.pt").touch()


def steps(folder, *targets) -> list[str]:
    """The scripts that make would run, in order."""
    command = ["make", "--dry-run", *targets]
    lines = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return [line.split()[1] for line in lines.splitlines() if line.startswith(".venv/bin/python")]


def test_fresh_clone_runs_every_step_in_order(clone):
    assert steps(clone) == [
        "train_baseline.py",
        "quantize.py",
        "prune_finetune.py",
        "quantize.py",
        "evaluate.py",
        "plot_pareto.py",
    ]
    assert steps(clone, "reference").count("train_baseline.py") == 3
    assert steps(clone, "reference").count("prune_finetune.py") == 10


def test_finished_run_is_not_done_again(clone):
    finish(clone)
    assert steps(clone) == []


@pytest.mark.parametrize(
    ("changed", "rerun"),
    [
        ("plot_pareto.py", ["plot_pareto.py"]),
        ("mac_hooks.py", ["evaluate.py", "plot_pareto.py"]),
        ("results/pruned_50_fp32.json", ["quantize.py", "evaluate.py", "plot_pareto.py"]),
    ],
)
def test_a_change_redoes_what_depends_on_it(clone, changed, rerun):
    finish(clone)
    os.utime(clone / changed, (2e9, 2e9))
    assert steps(clone) == rerun


def test_an_interrupted_or_changed_reference_run_does_only_what_is_missing(clone):
    done = clone / "checkpoints/reference/.done"
    done.mkdir()
    for step in ("baseline", "pruned_50", "control", "pruned_50_l1"):
        for seed in range(3):
            (done / f"{step}-{seed}").touch()
            (done / f"int8-{step}-{seed}").touch()
    assert steps(clone, "reference").count("quantize.py") == len(LEVELS)
    (done / "sweep").touch()
    for level in LEVELS:
        (done / f"int8-sweep-{level}").touch()
    assert steps(clone, "reference") == DEVICES + CLOSING
    (done / "hardware").touch()
    assert steps(clone, "reference") == CLOSING
    (done / "pruned_50-1").unlink()
    assert steps(clone, "reference")[:2] == ["prune_finetune.py", "quantize.py"]
    os.utime(clone / "quantize.py", (4e9, 4e9))
    assert steps(clone, "reference").count("quantize.py") == 12 + len(LEVELS)
    assert "train_baseline.py" not in steps(clone, "reference")


def test_a_sweep_after_make_prunes_once_and_quantizes_every_level(clone):
    finish(clone)
    expected = ["prune_finetune.py", *["quantize.py"] * 5, "evaluate.py", "plot_pareto.py"]
    assert steps(clone, "sweep") == expected
    (clone / "results/pruned_95_energy_fp32.json").touch()
    for level in LEVELS:
        (clone / f"checkpoints/{level}_fp32.pt").touch()
        (clone / f"checkpoints/{level}_int8.pt").touch()
        (clone / f"results/{level}_int8.json").touch()
    (clone / "results/metrics.json").touch()
    (clone / "results/optimization_results.png").touch()
    assert steps(clone, "sweep") == [] and steps(clone) == []
    (clone / "checkpoints/pruned_80_energy_int8.pt").unlink()
    assert steps(clone, "sweep") == ["quantize.py", "evaluate.py", "plot_pareto.py"]
    (clone / "checkpoints/pruned_80_energy_fp32.pt").unlink()
    assert steps(clone, "sweep") == expected


def test_hardware_follows_the_variants_and_is_not_done_again(clone):
    finish(clone)
    expected = ["export_edge.py", "simulate_hardware.py", "evaluate.py", "plot_pareto.py"]
    assert steps(clone, "hardware") == [*expected, "simulate_hardware.py", "plot_pareto.py"]
    (clone / "results/edge").mkdir()
    names = ("edge/baseline_int8.tflite", "hardware.json", "break_even.json", "break_even.svg")
    for name in (*names, "break_even.png"):
        (clone / "results" / name).touch()
    assert steps(clone, "hardware") == []
    os.utime(clone / "firmware/kernels.c", (4e9, 4e9))
    assert steps(clone, "hardware") == [*expected, "simulate_hardware.py", "plot_pareto.py"]


def test_criteria_are_tried_on_the_validation_split_a_run_at_a_time(clone):
    expected = ["train_baseline.py", *["prune_finetune.py"] * 4, *["quantize.py"] * 16]
    assert steps(clone, "criteria") == [*expected, "evaluate.py", "benchmarks/criteria.py"]
    done = clone / "checkpoints/holdout/.done"
    done.mkdir(parents=True)
    for stamp in ("baseline", "trial-l1", "trial-lamp"):
        (done / stamp).touch()
    assert steps(clone, "criteria").count("prune_finetune.py") == 2


def test_the_headline_run_goes_on_where_it_stopped(clone):
    variants = ["baseline", "pruned_50", "control"]
    variants += [f"pruned_{percent}_energy" for percent in (80, 90, 93, 95)]
    trained = ["train_baseline.py", *["prune_finetune.py"] * 3]
    shown = ["evaluate.py", "evaluate.py", "plot_pareto.py"]
    last = [*DEVICES, *shown]
    assert steps(clone, "headline") == [*trained, *["quantize.py"] * len(variants), *last]
    done = clone / "checkpoints/headline/.done"
    done.mkdir(parents=True)
    for stamp in ("baseline", "pruned_50"):
        (done / stamp).touch()
    assert steps(clone, "headline")[:3] == ["prune_finetune.py", "prune_finetune.py", "quantize.py"]
    for stamp in ("control", "sweep", *(f"int8-{variant}" for variant in variants)):
        (done / stamp).touch()
    assert steps(clone, "headline") == last
    (done / "hardware").touch()
    assert steps(clone, "headline") == shown
    os.utime(clone / "edgecnn/train.py", (4e9, 4e9))
    assert steps(clone, "headline")[:4] == trained


def test_every_training_step_of_the_headline_run_can_be_resumed_and_knows_what_follows(clone):
    command = ["make", "--dry-run", "headline"]
    lines = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout
    training = [line for line in lines.splitlines() if "train_base" in line or "prune_fine" in line]
    assert len(training) == 4
    assert all("--run headline --headline --resume" in line for line in training)
    after = [int(line.split("--epochs-after ")[1]) for line in training[:3]]
    levels, epochs = training[3].split("--sparsity ")[1].split(" --criterion energy --epochs ")
    sweep = len(levels.split()) * int(epochs)
    assert after == [sweep + left * HEADLINE_RECIPE["epochs"] for left in (2, 1, 0)]


@pytest.mark.parametrize("name", ["table.md", "optimization_results.svg"])
def test_a_lost_result_is_made_again(clone, name):
    finish(clone)
    (clone / "results" / name).unlink()
    assert steps(clone)[-1] == "plot_pareto.py"


def test_a_lost_checkpoint_is_made_again(clone):
    finish(clone)
    (clone / "checkpoints/pruned_50_fp32.pt").unlink()
    expected = ["prune_finetune.py", "quantize.py", "evaluate.py", "plot_pareto.py"]
    assert steps(clone) == expected


def test_benchmark_takes_ratios_round_by_round():
    rounds = [
        {"matrix_gflops_per_s": g, "pipeline_images_per_s": p, "tutorial_0_workers_images_per_s": t}
        for g, p, t in ((100, 1000, 500), (200, 2000, 500), (100, 900, 300))
    ]
    summary = summarize(rounds)
    assert summary["speedup_over_tutorial"] == 3  # the ratios are 2, 4 and 3
    share = 100 * 1000 * TRAINING_FLOPS / 100e9
    assert summary["share_of_matrix_rate_percent"] == pytest.approx(share)
