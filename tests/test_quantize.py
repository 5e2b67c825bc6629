"""quantize.py: what its files hold, on which images it calibrates, for which kernels."""

import hashlib
import json

import pytest
import torch
from conftest import changed, fails, run_main

from edgecnn.checkpoint import float_module, load_checkpoint
from edgecnn.data import load_sample, normalize
from edgecnn.dataset import CIFAR10
from edgecnn.quantized import int8_module

FOLDER = "checkpoints/smoke"


def test_a_file_gives_nearly_the_logits_of_its_parent_and_the_same_bits_each_time(smoke):
    int8, fp32 = (
        load_checkpoint(smoke / f"{FOLDER}/baseline_{kind}.pt") for kind in ("int8", "fp32")
    )
    images = normalize(load_sample()[1][0], CIFAR10)
    with torch.no_grad():
        ours, again = (int8_module(int8)(images) for _ in range(2))
        theirs = float_module(fp32).eval()(images)
    assert torch.equal(ours, again)
    assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


def test_file_size_and_calibration_are_recorded(smoke):
    assert (smoke / f"{FOLDER}/baseline_int8.pt").stat().st_size <= 0.64 * 2**20
    result = json.loads((smoke / "results/smoke/baseline_int8.json").read_text())
    checkpoint = load_checkpoint(smoke / f"{FOLDER}/baseline_int8.pt")
    assert result["quantization"] == checkpoint["quantization"]
    assert result["quantization"]["engine"] == "qnnpack"
    calibration = result["calibration"]
    assert calibration["source"] == "390 training images" and calibration["images"] == 390
    every = torch.randperm(390, generator=torch.Generator().manual_seed(0))
    assert calibration["indices_sha256"] == hashlib.sha256(every.numpy().data).hexdigest()
    assert calibration["agreement_with_parent_percent"] >= 95


def test_quantized_pruned_network_keeps_its_zeros_in_a_smaller_file(smoke):
    fp32, int8 = (
        load_checkpoint(smoke / f"{FOLDER}/pruned_50_{kind}.pt")["tensors"]
        for kind in ("fp32", "int8")
    )
    weights = {name: tensor for name, tensor in int8.items() if tensor.ndim > 1}
    assert len(weights) == 5
    for name, tensor in weights.items():
        assert (tensor[fp32[name] == 0] == 0).all() and (tensor == 0).float().mean() >= 0.49
    sizes = [
        (smoke / f"{FOLDER}/{name}_int8.pt").stat().st_size for name in ("pruned_50", "baseline")
    ]
    assert sizes[0] < 0.7 * sizes[1]


def test_a_namesake_of_another_run_replaces_nothing(copy, capsys):
    other = changed(
        copy / f"{FOLDER}/baseline_fp32.pt",
        copy / "checkpoints/other/baseline_fp32.pt",
        lambda checkpoint: checkpoint["tensors"]["fc2.bias"].add_(1),
    )
    given = ("quantize", "--smoke", "--checkpoint", other)
    error = fails(capsys, copy, *given)
    assert f"{FOLDER}/baseline_int8.pt was made from another file than {other}" in error
    run_main(*given, "--force")
    changed(other, other, lambda checkpoint: checkpoint["tensors"]["fc2.bias"].add_(1))
    capsys.readouterr()
    run_main(*given)  # made anew in the place that the record names
    assert "anew: baseline_fp32.pt changed" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
def test_engine_is_stored_and_used(smoke, workdir, engine):
    parent = smoke / f"{FOLDER}/baseline_fp32.pt"
    options = ("--engine", engine, "--calibration-images", 40)
    run_main("quantize", "--smoke", *options, "--checkpoint", parent)
    checkpoint = load_checkpoint(f"{FOLDER}/baseline_int8.pt")
    assert checkpoint["quantization"]["engine"] == engine
    result = json.loads((workdir / "results/smoke/baseline_int8.json").read_text())
    assert result["calibration"]["images"] == 40
    int8_module(checkpoint)
    assert torch.backends.quantized.engine == engine
