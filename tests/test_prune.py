"""Pruning: exact counts, one global ranking, zeros that hold after every step, honest MACs."""

import json

import pytest
import torch

from edgecnn.checkpoint import fp32_model, load_checkpoint
from edgecnn.data import load_sample
from edgecnn.model import IMAGE_SHAPE, EdgeCNN, weight_layers
from edgecnn.train import Recipe, fit
from mac_hooks import count_macs
from prune_finetune import hold_zeros, prune_globally

WEIGHTS, MACS = 619_872, 10_848_768


def pruned(sparsity, criterion, seed=0):
    torch.manual_seed(seed)
    model = EdgeCNN()
    return model, prune_globally(model, sparsity, criterion)


@pytest.mark.parametrize("criterion", ["l1", "l1-normalized"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_sparsity_is_exact_to_one_weight(sparsity, criterion):
    model, masks = pruned(sparsity, criterion)
    zeros = sum(int((layer.weight == 0).sum()) for layer in weight_layers(model).values())
    assert abs(zeros - sparsity * WEIGHTS) <= 1
    assert sum(int((~mask).sum()) for mask in masks.values()) == zeros
    assert not any("mask" in name or "orig" in name for name in model.state_dict())


def test_l1_keeps_every_magnitude_above_one_global_threshold():
    torch.manual_seed(0)
    before = [layer.weight.detach().clone() for layer in weight_layers(EdgeCNN()).values()]
    _, masks = pruned(0.5, "l1")
    kept = torch.cat([w[m].abs() for w, m in zip(before, masks.values(), strict=True)])
    gone = torch.cat([w[~m].abs() for w, m in zip(before, masks.values(), strict=True)])
    assert kept.min() >= gone.max()


def test_normalized_takes_the_smallest_of_each_layer_in_equal_shares():
    torch.manual_seed(0)
    before = [layer.weight.detach().clone() for layer in weight_layers(EdgeCNN()).values()]
    model, masks = pruned(0.5, "l1-normalized")
    for weight, mask in zip(before, masks.values(), strict=True):
        assert abs(int((~mask).sum()) - weight.numel() / 2) <= 1
        assert weight[mask].abs().min() >= weight[~mask].abs().max()
    nonzero_macs = count_macs(model, IMAGE_SHAPE).nonzero_macs
    assert nonzero_macs <= 5.43e6 and abs(nonzero_macs - MACS / 2) <= 2 * 1024 + 256 + 64 + 2


def test_l1_leaves_more_macs_than_weights():
    # fc1's weights are the smallest and are used once each, so plain L1 spares the convolutions.
    model, _ = pruned(0.5, "l1")
    assert count_macs(model, IMAGE_SHAPE).nonzero_macs > 8e6


def test_zeros_hold_after_every_step_and_kept_weights_move():
    model, masks = pruned(0.7, "l1-normalized")
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
    fit(model, load_sample()[0], recipe, torch.device("cpu"), after_step=check)
    assert len(steps) == 12 and any(steps)  # without the hook the optimizer does revive them
    for name, layer in weight_layers(model).items():
        assert not torch.equal(layer.weight, start[name])
        assert int((layer.weight == 0).sum()) == int((~masks[name]).sum())


def test_saved_file_is_small_exact_and_names_its_parent(smoke):
    path = smoke / "checkpoints/smoke/pruned_50_fp32.pt"
    checkpoint = load_checkpoint(path, "fp32")
    model = fp32_model(checkpoint)
    zeros = sum(int((layer.weight == 0).sum()) for layer in weight_layers(model).values())
    assert abs(zeros - WEIGHTS / 2) <= 1
    assert path.stat().st_size <= 1.19 * 2**20
    result = json.loads((smoke / "results/smoke/pruned_50_fp32.json").read_text())
    assert result["parent"] == "baseline_fp32"
    parent = json.loads((smoke / "results/smoke/baseline_fp32.json").read_text())
    assert result["parent_sha256"] == parent["checkpoint_sha256"]
    assert result["layer_sparsity_percent"]["fc1"] == pytest.approx(50, abs=0.001)
