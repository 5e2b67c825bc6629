"""Pruning: exact counts, one global ranking, zeros that hold after every step, honest MACs."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_main
from foreign_networks import captured

from edgecnn.checkpoint import float_module, load_checkpoint
from edgecnn.data import load_sample
from edgecnn.dataset import CIFAR10
from edgecnn.energy import MAC_PJ, SRAM_PJ_PER_BYTE, weight_prices_pj
from edgecnn.errors import UserError
from edgecnn.files import sha256
from edgecnn.module import module_of
from edgecnn.pruning import (
    CRITERIA,
    hold_zeros,
    importance,
    lamp_scores,
    prune_globally,
    weight_layers,
)
from edgecnn.train import Recipe, fit
from mac_hooks import count_macs
from prune_finetune import HEADLINE_RECIPE

WEIGHTS, MACS = 619_872, 10_848_768


def network():
    return module_of(captured("edgecnn")[0])


def pruned(sparsity, criterion, seed=0):
    torch.manual_seed(seed)
    model = network()
    return model, prune_globally(model, sparsity, criterion)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_sparsity_is_exact_to_one_weight(sparsity, criterion):
    model, masks = pruned(sparsity, criterion)
    zeros = sum(int((layer.weight == 0).sum()) for layer in weight_layers(model).values())
    assert abs(zeros - sparsity * WEIGHTS) <= 1
    assert sum(int((~mask).sum()) for mask in masks.values()) == zeros
    assert not any("mask" in name or "orig" in name for name in model.state_dict())


def test_a_control_is_the_same_whatever_would_have_gone(copy, capsys):
    smoke = ("prune_finetune", "--smoke", "--sparsity", 0, "--epochs", 1)
    for how in ([], ["--structure", "channels"], ["--criterion", "energy"]):
        run_main(*smoke, *how)
    assert capsys.readouterr().out.count("kept: checkpoints/smoke/control_fp32.pt") == 2


def test_l1_keeps_every_magnitude_above_one_global_threshold():
    torch.manual_seed(0)
    before = [layer.weight.detach().clone() for layer in weight_layers(network()).values()]
    _, masks = pruned(0.5, "l1")
    kept = torch.cat([w[m].abs() for w, m in zip(before, masks.values(), strict=True)])
    gone = torch.cat([w[~m].abs() for w, m in zip(before, masks.values(), strict=True)])
    assert kept.min() >= gone.max()


def test_normalized_takes_the_smallest_of_each_layer_in_equal_shares():
    torch.manual_seed(0)
    before = [layer.weight.detach().clone() for layer in weight_layers(network()).values()]
    model, masks = pruned(0.5, "layer-rank")
    for weight, mask in zip(before, masks.values(), strict=True):
        assert abs(int((~mask).sum()) - weight.numel() / 2) <= 1
        assert weight[mask].abs().min() >= weight[~mask].abs().max()
    nonzero_macs = count_macs(model, CIFAR10.shape).nonzero_macs
    assert nonzero_macs <= 5.43e6 and abs(nonzero_macs - MACS / 2) <= 2 * 1024 + 256 + 64 + 2


def test_l1_leaves_more_macs_than_weights():
    # fc1's weights are the smallest and are used once each, so plain L1 spares the convolutions.
    model, _ = pruned(0.5, "l1")
    assert count_macs(model, CIFAR10.shape).nonzero_macs > 8e6


def test_lamp_score_is_the_share_of_the_remaining_squared_norm():
    weight = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    expected = [[9 / 9, 1 / 14], [0 / 14, 4 / 13]]
    np.testing.assert_allclose(lamp_scores(weight), expected)
    assert torch.equal(lamp_scores(torch.zeros(3)), torch.zeros(3, dtype=torch.float64))


def test_a_weight_costs_its_uses_and_its_fetch():
    costs = weight_prices_pj(captured("edgecnn")[0])
    uses = {"block1.conv": 1024, "block2.conv": 256, "block3.conv": 64, "fc1": 1, "fc2": 1}
    assert costs == {name: n * MAC_PJ[8] + SRAM_PJ_PER_BYTE for name, n in uses.items()}


def test_energy_prunes_the_dearer_of_two_equally_dispensable_weights():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    cheap, dear = (importance(weight, "energy", price) for price in (13.0, 130.0))
    torch.testing.assert_close(cheap, 10 * dear)
    macs = {c: count_macs(pruned(0.8, c)[0], CIFAR10.shape).nonzero_macs for c in CRITERIA}
    assert macs["energy"] < 0.9 * macs["lamp"]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("first", CRITERIA)
def test_masks_only_shrink_from_level_to_level(first, criterion):
    model, before = pruned(0.5, first)
    after = prune_globally(model, 0.8, criterion)
    assert all(not (after[name] & ~before[name]).any() for name in before)
    zeros = sum(int((~mask).sum()) for mask in after.values())
    assert abs(zeros - 0.8 * WEIGHTS) <= 1


def test_a_level_below_the_parents_zeros_is_refused():
    model, _ = pruned(0.5, "l1")
    with pytest.raises(UserError, match="50.00 % of the weights are zero already"):
        prune_globally(model, 0.4, "l1")


@pytest.fixture
def sweep(smoke, workdir):
    """A folder with a baseline in it, and how to run a sweep there."""
    shutil.copytree(smoke / "checkpoints", "checkpoints")
    shutil.copytree(smoke / "results", "results")

    def run(*arguments):
        run_main("prune_finetune", "--smoke", "--sparsity", *arguments)

    return run


def test_a_sweep_keeps_what_was_made_and_chains_the_rest(sweep, workdir, capsys):
    folder = workdir / "checkpoints/smoke"
    level_1 = (folder / "pruned_50_fp32.pt").read_bytes()
    sweep(0.5, 0.8)
    assert "kept: checkpoints/smoke/pruned_50_fp32.pt\n" in capsys.readouterr().out
    assert (folder / "pruned_50_fp32.pt").read_bytes() == level_1
    low, high = (load_checkpoint(folder / f"pruned_{n}_fp32.pt") for n in (50, 80))
    assert high["provenance"]["parent"] == "pruned_50_fp32"
    assert high["provenance"]["arguments"]["sparsity"] == 0.8
    for name, tensor in high["tensors"].items():
        if tensor.ndim > 1:
            assert not (tensor.bool() & ~low["tensors"][name].bool()).any()
    made = (folder / "pruned_80_fp32.pt").read_bytes()
    sweep(0.5, 0.8, 0.9)  # goes on after the last level
    assert (folder / "pruned_80_fp32.pt").read_bytes() == made
    (folder / "pruned_80_fp32.pt").unlink()
    (folder / "pruned_90_fp32.pt").unlink()
    sweep(0.5, 0.8)
    remade = load_checkpoint(folder / "pruned_80_fp32.pt")["tensors"]
    assert all(torch.equal(remade[name], high["tensors"][name]) for name in remade)


@pytest.mark.parametrize(
    ("levels", "difference"),
    [
        ((0.5, 0.6, "--epochs", 1), "epochs 2"),
        ((0.5, 0.6, "--learning-rate", 0.2), "learning_rate 0.1"),
        ((0.4, 0.5), "parent baseline_fp32"),  # another list: other levels before it
    ],
)
def test_a_sweep_with_other_arguments_is_refused_and_nothing_is_lost(
    sweep, workdir, capsys, levels, difference
):
    before = (workdir / "checkpoints/smoke/pruned_50_fp32.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        sweep(*levels)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"pruned_50_fp32.pt was made with {difference}" in error
    assert (workdir / "checkpoints/smoke/pruned_50_fp32.pt").read_bytes() == before
    assert not (workdir / "checkpoints/smoke/pruned_40_fp32.pt").exists()


def test_a_level_of_another_parent_is_made_again(sweep, workdir, capsys):
    run_main("train_baseline", "--smoke", "--epochs", 1, "--force")
    sweep(0.5, 0.8)
    said = capsys.readouterr().out
    assert "pruned_50_fp32.pt anew: baseline_fp32.pt changed" in said and "kept" not in said


def test_the_headline_recipe_is_taught_by_the_baseline_and_a_new_one_teaches_anew(
    sweep, workdir, capsys
):
    folder = workdir / "checkpoints/smoke"
    sweep(0.5, 0.8, "--headline", "--force")  # pruned_50 is of the default recipe
    origin = load_checkpoint(folder / "pruned_80_fp32.pt")["provenance"]
    assert origin["teacher_sha256"] == sha256(folder / "baseline_fp32.pt")
    assert origin["parent"] == "pruned_50_fp32"
    assert origin["arguments"]["distillation"] == HEADLINE_RECIPE["distillation"] > 0
    run_main("train_baseline", "--smoke", "--epochs", 1, "--force")
    parent = folder / "pruned_50_fp32.pt"
    capsys.readouterr()
    sweep(0.8, 0.9, "--headline", "--checkpoint", parent)
    said = capsys.readouterr().out
    assert "pruned_80_fp32.pt anew: baseline_fp32.pt changed" in said and "kept" not in said


def test_a_sweep_is_not_continued_by_another_recipe(sweep, capsys):
    with pytest.raises(SystemExit):
        sweep(0.5, 0.8, "--headline")
    error = capsys.readouterr().err
    assert "pruned_50_fp32.pt was made with weight_decay 0.0005, distillation 0.0" in error


def test_a_layer_left_without_weights_is_named(sweep, capsys):
    sweep(0.999, "--criterion", "l1", "--epochs", 1)
    error = capsys.readouterr().err
    assert "warning: no weight is left in " in error and "fc1" in error


@pytest.mark.parametrize("levels", [(0.5, 0.5), (0.8, 0.5), (0, 0.5)])
def test_levels_that_do_not_rise_are_refused(levels, workdir, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main("prune_finetune", "--smoke", "--sparsity", *levels)
    assert stop.value.code == 2
    assert "levels must rise" in capsys.readouterr().err


def test_zeros_hold_after_every_step_and_kept_weights_move():
    model, masks = pruned(0.7, "layer-rank")
    start = {name: layer.weight.clone() for name, layer in weight_layers(model).items()}
    steps = []

    def check():
        moved = any(
            (layer.weight[~masks[n]] != 0).any() for n, layer in weight_layers(model).items()
        )
        hold_zeros(model, masks)
        for name, layer in weight_layers(model).items():
            zeros = layer.weight[~masks[name]]
            assert torch.equal(zeros.view(torch.int32), torch.zeros(len(zeros), dtype=torch.int32))
        steps.append(moved)

    recipe = Recipe(2, 64, 0.1, seed=0, start="test")
    fit(model, load_sample()[0], CIFAR10, recipe, torch.device("cpu"), after_step=check)
    assert len(steps) == 12 and any(steps)  # without the hook the optimizer does revive them
    for name, layer in weight_layers(model).items():
        assert not torch.equal(layer.weight, start[name])
        assert int((layer.weight == 0).sum()) == int((~masks[name]).sum())


def test_saved_file_is_small_exact_and_names_its_parent(smoke):
    path = smoke / "checkpoints/smoke/pruned_50_fp32.pt"
    checkpoint = load_checkpoint(path, "fp32")
    model = float_module(checkpoint)
    zeros = sum(int((layer.weight == 0).sum()) for layer in weight_layers(model).values())
    assert abs(zeros - WEIGHTS / 2) <= 1
    assert path.stat().st_size <= 1.19 * 2**20
    result = json.loads((smoke / "results/smoke/pruned_50_fp32.json").read_text())
    assert result["parent"] == "baseline_fp32"
    parent = json.loads((smoke / "results/smoke/baseline_fp32.json").read_text())
    assert result["parent_sha256"] == parent["checkpoint_sha256"]
    assert result["layer_sparsity_percent"]["fc1"] == pytest.approx(50, abs=0.001)
