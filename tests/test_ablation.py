"""The ablation: closed forms of its parts, and every trial on the small sample."""

import json

import torch
from conftest import run_main

from benchmarks.ablation import DECAYS, TRIALS, moving_average, table
from edgecnn.networks import EdgeCNN


def test_a_moving_average_starts_with_the_first_weights_and_forgets_them_at_its_decay():
    torch.manual_seed(0)
    model = EdgeCNN()
    average = moving_average(model, 0.9)
    average.update_parameters(model)
    start = model.fc2.bias.detach().clone()
    with torch.no_grad():
        model.fc2.bias += 1
        model.block1.bn.running_mean += 1
    for _ in range(3):
        average.update_parameters(model)
    torch.testing.assert_close(average.module.fc2.bias.data, start + (1 - 0.9**3))
    expected = torch.full((32,), 1 - 0.9**3)
    torch.testing.assert_close(average.module.block1.bn.running_mean, expected)


def test_every_trial_runs_and_ends_at_its_zeros(workdir, capsys):
    run_main("benchmarks.ablation", "--smoke")
    for name, trial in TRIALS.items():
        result = json.loads((workdir / f"results/ablation_smoke/{name}.json").read_text())
        weights = torch.load(workdir / f"checkpoints/ablation_smoke/{name}.pt", weights_only=True)
        weights = [value for value in weights.values() if value.ndim > 1]
        zeros = sum(int((value == 0).sum()) for value in weights)
        assert zeros == round(trial.sparsity * sum(value.numel() for value in weights))
        assert result["sparsity"] == trial.sparsity and len(result["history"]) == 2
    table = (workdir / "results/ablation_smoke/table.md").read_text()
    assert table.count("\n") == len(TRIALS) + 2
    capsys.readouterr()
    run_main("benchmarks.ablation", "--smoke", "distilled_95")
    assert "kept: checkpoints/ablation_smoke/distilled_95.pt\n" in capsys.readouterr().out


def test_the_table_holds_a_trial_against_the_other_on_the_same_seed():
    def result(trial, seed, accuracy):
        averaged = {str(decay): accuracy + 0.25 for decay in DECAYS}
        return {
            "trial": trial,
            "seed": seed,
            "macs_nonzero": 2e6,
            "history": [{}] * 8,
            "validation_accuracy_percent": accuracy,
            "averaged_validation_accuracy_percent": averaged,
        }

    accuracies = {("one_shot_90", 0): 87.0, ("one_shot_90", 1): 88.0, ("distilled_90", 1): 88.5}
    lines = table([result(*key, accuracy) for key, accuracy in accuracies.items()]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [line[0] for line in cells] == ["one_shot_90", "distilled_90"]
    assert cells[0][4:6] == ["87.00, 88.00", "-"]
    assert cells[1][1:3] == ["one_shot_90", "distillation 0.7 for 0"]
    assert cells[1][4:] == ["88.50", "+0.50", "+0.25 / +0.25"]
