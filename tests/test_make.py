"""The Makefile lists commands; each of them knows by itself what is done."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, run_main, snapshot

from benchmarks.training_speed import TRAINING_FLOPS, summarize
from edgecnn.cli import Parser
from prune_finetune import HEADLINE_RECIPE

ONE_SEED = ["train_baseline.py", "prune_finetune.py", "quantize.py", "evaluate.py"]
ONE_SEED += ["plot_pareto.py"]
DEVICES = ["export_edge.py", "simulate_hardware.py", "simulate_hardware.py"]
SHOWN = ["evaluate.py", "plot_pareto.py"]
DOCUMENTED = ["evaluate.py", "evaluate.py", "plot_pareto.py"]


@pytest.fixture
def clone(tmp_path):
    """A Makefile beside an installed environment, and nothing else: a dry run needs no more."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    for name in ("requirements.txt", "firmware/requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def commands(folder, *targets) -> list[str]:
    """The scripts with their arguments that make would run, in order."""
    command = ["make", "--dry-run", *targets]
    lines = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1)[1] for line in lines.splitlines() if line.startswith(".venv/")]
    return [line.strip() for line in lines if not line.startswith("-m pip")]


def scripts(folder, *targets) -> list[str]:
    return [command.split()[0] for command in commands(folder, *targets)]


def test_a_fresh_clone_lists_every_step_in_order(clone):
    assert scripts(clone) == ONE_SEED
    assert scripts(clone, "sweep") == [*ONE_SEED, *ONE_SEED[1:]]
    hardware = scripts(clone, "hardware")
    assert hardware[: len(ONE_SEED)] == ONE_SEED and hardware[-2:] == SHOWN
    headline = [
        "train_baseline.py",
        *["prune_finetune.py"] * 3,
        "quantize.py",
        *DEVICES,
        *DOCUMENTED,
    ]
    assert scripts(clone, "headline") == headline
    reference = scripts(clone, "reference")
    seed = ["train_baseline.py", *["prune_finetune.py"] * 3]
    assert reference[:13] == [*seed * 3, "prune_finetune.py"]
    assert reference[13:17] == ["quantize.py", *DEVICES]
    criteria = ["train_baseline.py", *["prune_finetune.py"] * 4, "quantize.py", "evaluate.py"]
    assert scripts(clone, "criteria") == [*criteria, "benchmarks/criteria.py"]
    assert set(scripts(clone, "smoke")) == {*ONE_SEED, *DEVICES}
    assert commands(clone, "test", "lint")[0].endswith(
        "-m pytest -q -n auto --dist worksteal tests"
    )


def test_every_command_is_one_that_its_script_takes(clone, monkeypatch, workdir):
    """Only the argument parsers run."""

    class Parsed(Exception):
        pass

    def parse(parser, *_):
        super(Parser, parser).parse_args()
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse)
    for target in ("all", "sweep", "hardware", "headline", "reference", "criteria", "smoke"):
        for command in dict.fromkeys(commands(clone, target)):
            script, *arguments = command.split()
            with pytest.raises(Parsed):
                run_main(script.removesuffix(".py").replace("/", "."), *arguments)


def test_run_moves_a_target_into_folders_of_its_own(clone):
    for target, default in (("all", ""), ("headline", "headline"), ("reference", "reference")):
        assert all(f"--run {default}" in line or not default for line in commands(clone, target))
        moved = commands(clone, target, "RUN=mine")
        assert all("--run mine" in line and "readme" not in line for line in moved)


def test_a_seed_is_a_target_of_its_own_so_that_several_run_at_once(clone):
    seed = commands(clone, "seed-7", "RUN=mine")
    assert len(seed) == 4 and all("--run mine --seed 7" in line for line in seed)
    assert sorted(commands(clone, "-j3", "reference")) == sorted(commands(clone, "reference"))


def test_the_makefile_is_short_and_help_names_every_target(clone):
    text = (clone / "Makefile").read_text()
    assert text.count("\n") <= 80
    said = subprocess.run(["make", "help"], cwd=clone, capture_output=True, text=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert [target for target in targets if f"make {target} " not in said] == []


def test_the_longer_recipe_of_another_seed_has_a_run_of_its_own(clone):
    for given, run in ((("SEED=1",), "headline_seed1"), (("SEED=1", "RUN=mine"), "mine")):
        lines = commands(clone, "headline", *given)
        assert all(f"--run {run}" in line for line in lines)
        seeded = [line.split()[0] for line in lines if "--seed 1" in line]
        assert seeded == ["train_baseline.py", *["prune_finetune.py"] * 3]


def test_a_finished_chain_is_kept(copy, capsys):
    before = snapshot(copy)
    for script in ("train_baseline", "quantize", "prune_finetune", "evaluate", "plot_pareto"):
        run_main(script, "--smoke")
        said = capsys.readouterr().out
        assert said.startswith("kept: ") and "making" not in said and "wrote" not in said
    assert snapshot(copy) == before


def test_a_changed_parent_redoes_what_was_made_from_it_and_no_more(copy, capsys):
    run_main("train_baseline", "--smoke", "--epochs", 1, "--force")
    capsys.readouterr()
    run_main("quantize", "--smoke", "--checkpoint", "checkpoints/smoke/pruned_50_fp32.pt")
    assert capsys.readouterr().out.startswith("kept: ")
    run_main("quantize", "--smoke")
    said = capsys.readouterr().out
    assert "making checkpoints/smoke/baseline_int8.pt anew: baseline_fp32.pt changed" in said
    assert "kept: checkpoints/smoke/pruned_50_int8.pt" in said
    run_main("evaluate", "--smoke")
    assert "baseline_fp32.pt, baseline_int8.pt changed" in capsys.readouterr().out
    run_main("plot_pareto", "--smoke")
    assert "metrics.json changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("quantize", "checkpoints/smoke/baseline_int8.pt"),
        ("prune_finetune", "checkpoints/smoke/pruned_50_fp32.pt"),
        ("evaluate", "results/smoke/table.md"),
        ("plot_pareto", "results/smoke/optimization_results.svg"),
    ],
)
def test_a_lost_output_is_made_again(copy, capsys, script, name):
    (copy / name).unlink()
    run_main(script, "--smoke")
    assert f"{name} is gone" in capsys.readouterr().out and (copy / name).exists()


def test_a_training_killed_with_9_goes_on_with_the_same_command_to_the_same_bits(copy, capsys):
    folder = copy / "checkpoints/smoke"
    options = ["--smoke", "--seed", "3", "--epochs", "4"]
    command = [sys.executable, str(REPOSITORY / "train_baseline.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    resume, path = (folder / f"baseline_seed3_fp32.{kind}" for kind in ("resume.pt", "pt"))
    deadline = time.monotonic() + 120
    while not resume.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert resume.exists() and not path.exists()
    run_main("train_baseline", *options)
    assert "resuming after epoch" in capsys.readouterr().out and not resume.exists()
    resumed = torch.load(path, weights_only=True)["tensors"]
    record = json.loads((copy / "results/smoke/baseline_seed3_fp32.json").read_text())
    assert [row["epoch"] for row in record["history"]] == [1, 2, 3, 4]
    run_main("train_baseline", *options)
    assert capsys.readouterr().out == f"kept: {path.relative_to(copy)}\n"
    run_main("train_baseline", *options, "--force")
    whole = torch.load(path, weights_only=True)["tensors"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert not list(folder.glob(".partial-*"))


def test_the_committed_runs_are_kept_as_they_are(workdir, capsys, monkeypatch):
    """What make reference and make headline say in a fresh clone, whatever code made the files."""
    monkeypatch.setattr("edgecnn.cifar10.load_split", None)  # no data: nothing can be made anew
    for folder in ("results", "checkpoints"):
        names = ["git", "ls-files", folder]
        listed = subprocess.run(names, cwd=REPOSITORY, capture_output=True, text=True).stdout
        for name in listed.splitlines():
            (workdir / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(REPOSITORY / name, workdir / name)
    before = snapshot(workdir)
    for seed in range(3):
        run_main("train_baseline", "--run", "reference", "--seed", seed)
        for how in ("--sparsity=0.5", "--sparsity=0", "--criterion=l1"):
            run_main("prune_finetune", "--run", "reference", "--seed", seed, how)
    run_main("quantize", "--run", "channels")  # whose INT8 checkpoints alone are in git
    teacher = ("--teacher", "checkpoints/headline/baseline_fp32.pt", "--checkpoint")
    more = ("--headline", "--sparsity", 0, "--epochs", 22, *teacher)
    start, efforts = teacher[1], [f"effort_{epochs}" for epochs in (22, 44, 66, 88)]
    for run in efforts:
        run_main("prune_finetune", "--run", run, *more, start)
        start = f"checkpoints/{run}/control_fp32.pt"
    for run in ("sparse", "cuda", *efforts):  # of which git has no checkpoint
        run_main("quantize", "--run", run)
        run_main("evaluate", "--run", run)
    for run in ("reference", "headline"):
        run_main("quantize", "--run", run)
        run_main("export_edge", "--run", run, "--images", 10000)
        run_main("simulate_hardware", "--run", run)
        run_main("evaluate", "--run", run)
    run_main("plot_pareto", "--run", "reference")  # headline's picture is not in git
    run_main(
        "plot_pareto", "--run", "headline", "channels", "taught", "wide", "deep", "tiny", "resnet8"
    )
    wide = ("--network", "edgeresnet_wide", "--run", "wide", "--headline", "--epochs", 40)
    run_main("train_baseline", *wide)
    large = ("--network", "edgeresnet_large", "--run", "large", "--headline", "--epochs", 70)
    run_main("train_baseline", *large)
    deep = ("--run", "deep", "--headline")
    teacher = ("--teacher", "checkpoints/large/baseline_fp32.pt", "--epochs", 45)
    run_main("train_baseline", "--network", "edgeresnet_deep", *deep, *teacher)
    zeros = ("--criterion", "lamp", "--sparsity", 0.765, "--epochs", 120)
    run_main("prune_finetune", *deep, *zeros, *teacher[:2])
    teacher = ("--teacher", "checkpoints/wide/baseline_fp32.pt")
    small = ("--weight-decay", 3e-4, "--label-smoothing", 0.05, "--epochs", 30, *teacher)
    tiny = ("--run", "tiny", "--headline")
    run_main("train_baseline", "--network", "edgemixer", *tiny, *small)
    zeros, start = ("--criterion", "energy", *teacher), "checkpoints/tiny/pruned_60_energy_fp32.pt"
    run_main("prune_finetune", *tiny, *zeros, "--sparsity", 0.6, "--epochs", 10)
    level = ("--sparsity", 0.78, "--epochs", 120, "--checkpoint", start)
    run_main("prune_finetune", *tiny, *zeros, *level)
    zeros = ("--run", "wide", "--headline", "--criterion", "lamp")
    zeros += ("--teacher", "checkpoints/large/baseline_fp32.pt", "--sparsity")
    run_main("prune_finetune", *zeros, 0.7, "--epochs", 15)
    start = ("--checkpoint", "checkpoints/wide/pruned_70_lamp_fp32.pt")
    run_main("prune_finetune", *zeros, 0.88, "--epochs", 90, *start)
    recipe = (
        "--run",
        "edgeresnet",
        "--headline",
        "--weight-decay",
        3e-4,
        "--label-smoothing",
        0.05,
    )
    run_main("train_baseline", "--network", "edgeresnet", *recipe)
    teacher = "checkpoints/headline/baseline_fp32.pt"
    run_main("prune_finetune", *recipe, "--sparsity", 0, "--epochs", 36, "--teacher", teacher)
    wide = ("--teacher", "checkpoints/wide/baseline_fp32.pt", "--epochs", 18, "--sparsity", 0)
    start = ("--checkpoint", "checkpoints/edgeresnet/control_fp32.pt")
    run_main("prune_finetune", "--run", "taught", *recipe[2:], *wide, *start)
    zeros = ("--run", "taught", "--headline", "--weight-decay", 1e-4, *recipe[5:], *wide[:2])
    zeros += ("--criterion", "energy", "--checkpoint")
    level = "checkpoints/taught/control_fp32.pt", "--sparsity", 0.7, "--epochs", 8
    run_main("prune_finetune", *zeros, *level)
    level = "checkpoints/taught/pruned_70_energy_fp32.pt", "--sparsity", 0.835, "--epochs", 28
    run_main("prune_finetune", *zeros, *level)
    taught = ("--run", "headline", "--headline")
    run_main("train_baseline", *taught)
    run_main("prune_finetune", *taught)
    levels = ("--sparsity", 0.8, 0.9, 0.93, 0.95, "--criterion", "energy", "--epochs", 22)
    run_main("prune_finetune", *taught, *levels)
    said = capsys.readouterr().out
    kept = [line for line in said.splitlines() if line.startswith("kept: ")]
    assert all(re.fullmatch(r"kept: \S+\.[a-z]+(; \S.*)?", line) for line in kept)
    assert len(kept) > 45 and not re.search("^(making|wrote)", said, re.MULTILINE)
    assert snapshot(workdir) == before


def test_the_time_left_counts_the_levels_that_follow(copy, capsys):
    run_main("prune_finetune", "--smoke", "--sparsity", 0.6, 0.7, "--criterion", "lamp")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 4 and all(line.endswith(" left") for line in lines)
    first, last = (float(line.split("about ")[1].split()[0]) for line in (lines[0], lines[-1]))
    seconds = float(lines[0].split(" s  about")[0].split()[-1])
    assert first == pytest.approx(3 * seconds, abs=1) and last == 0


def test_the_headline_sweep_trains_longer_than_its_first_level(clone):
    epochs = int(commands(clone, "headline")[3].split("--epochs ")[1])
    assert epochs > HEADLINE_RECIPE["epochs"]


def test_benchmark_takes_ratios_round_by_round():
    rounds = [
        {"matrix_gflops_per_s": g, "pipeline_images_per_s": p, "tutorial_0_workers_images_per_s": t}
        for g, p, t in ((100, 1000, 500), (200, 2000, 500), (100, 900, 300))
    ]
    summary = summarize(rounds)
    assert summary["speedup_over_tutorial"] == 3  # the ratios are 2, 4 and 3
    share = 100 * 1000 * TRAINING_FLOPS / 100e9
    assert summary["share_of_matrix_rate_percent"] == pytest.approx(share)
