"""The ablation: closed forms of its parts, and every trial on the small sample."""

import json

import torch
from conftest import run_main

from benchmarks.ablation import DECAYS, TRIALS, Averages
from edgecnn.model import EdgeCNN


def test_averages_forget_their_start_at_their_decay():
    torch.manual_seed(0)
    model = EdgeCNN()
    averages = Averages(model)
    with torch.no_grad():
        model.fc2.bias += 1
        model.block1.bn.running_mean += 1
    start = model.fc2.bias - 1
    for _ in range(3):
        averages.update(model)
    for decay in DECAYS:
        average = averages.models[decay]
        torch.testing.assert_close(average.fc2.bias, start + (1 - decay**3), atol=1e-6, rtol=0)
        expected = torch.full((32,), 1 - decay**3)
        torch.testing.assert_close(average.block1.bn.running_mean, expected, atol=1e-6, rtol=0)


def test_every_trial_runs_and_ends_at_its_zeros(workdir, capsys):
    run_main("benchmarks.ablation", "--smoke")
    for name, trial in TRIALS.items():
        result = json.loads((workdir / f"results/smoke/{name}.json").read_text())
        weights = torch.load(workdir / f"checkpoints/smoke/{name}.pt", weights_only=True)
        weights = [value for value in weights.values() if value.ndim > 1]
        zeros = sum(int((value == 0).sum()) for value in weights)
        assert zeros == round(trial.sparsity * sum(value.numel() for value in weights))
        assert result["sparsity"] == trial.sparsity and len(result["history"]) == 2
    table = (workdir / "results/smoke/table.md").read_text()
    assert table.count("\n") == len(TRIALS) + 2
    capsys.readouterr()
    run_main("benchmarks.ablation", "--smoke", "distilled_95")
    assert "distilled_95 was made before: kept" in capsys.readouterr().out
