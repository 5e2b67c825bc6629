"""Exact integers: written out by hand, equal to the first network's, equal to torch's fbgemm."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from narrow import (
    GRAPHS,
    avg_pool,
    conv,
    device_images,
    graph_of,
    linear,
    max_pool,
    random_images,
    read_out,
)

from edgecnn.checkpoint import load_checkpoint
from edgecnn.data import load_sample, normalize
from edgecnn.dataset import CIFAR10
from edgecnn.deploy.integer import (
    INTEGER,
    exact_logits,
    exact_values,
    fbgemm_constants,
    flat_maps,
    hwc_columns,
    integer_nodes,
)
from edgecnn.errors import UserError
from edgecnn.graph import GraphError, from_plain
from edgecnn.quantized import int8_module, quantize_images, quantized_values


def steps_of(checkpoint: dict, engine: str):
    """(node, torch's q, exact q from the same inputs) of each node, as float64."""
    images = random_images(from_plain(checkpoint["graph"]))
    with torch.no_grad():
        values = quantized_values(int8_module(checkpoint, engine), images)
    values = {name: value.int_repr().double() for name, value in values.items()}
    for n in integer_nodes(checkpoint):
        exact = INTEGER[n.node.op]([values[name] for name in n.node.inputs], n)
        yield n.node, values[n.node.name], exact


# ---- against torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_every_operation_equals_fbgemm(name):
    checkpoint = read_out(GRAPHS[name], engine="fbgemm")
    for node, theirs, exact in steps_of(checkpoint, "fbgemm"):
        difference = (theirs - exact).abs()
        if node.op in ("add", "avg_pool", "global_avg_pool"):  # other roundings, seen at ties alone
            assert difference.max() <= 1 and (difference > 0).double().mean() < 0.1
        else:
            assert difference.max() == 0, node


@pytest.mark.parametrize("name", GRAPHS)
def test_every_operation_is_within_one_step_of_qnnpack(name):
    for node, theirs, exact in steps_of(read_out(GRAPHS[name]), "qnnpack"):
        difference = (theirs - exact).abs()
        assert difference.max() <= 1 and (difference > 0).double().mean() <= 0.03, node


# ---- by hand -------------------------------------------------------------------------------------


def test_convolution_written_out():
    checkpoint = read_out(graph_of((2, 5, 4), conv(3, 3, (2, 1), (1, 2))))
    own = checkpoint["quantization"]["activations"]
    zero_in, zero_out = own["input"]["zero_point"], own["n0"]["zero_point"]
    weight = checkpoint["tensors"]["n0.weight"].numpy().astype(int)
    images = device_images(checkpoint)[:2]
    padded = np.full((2, 2, 7, 8), zero_in)
    padded[:, :, 1:6, 2:6] = images.numpy().astype(int) + 128
    n = integer_nodes(checkpoint)[0]
    for image, out in zip(padded, exact_values(checkpoint, images)["n0"], strict=True):
        assert out.shape == (3, 3, 6)
        for o, y, x in np.ndindex(3, 3, 6):
            window = image[:, 2 * y : 2 * y + 3, x : x + 3] - zero_in
            total = np.float32(int((window * weight[o]).sum()))
            value = np.rint(np.float32(total + n.bias[o]) * n.multiplier[o])
            assert out[o, y, x] == np.clip(value + zero_out, 0, 255)


def test_add_written_out():
    checkpoint = read_out(GRAPHS["add relu"])
    values = exact_values(checkpoint, device_images(checkpoint))
    own = checkpoint["quantization"]["activations"]
    out = own["n2"]
    total = np.zeros(values["n2"].shape, np.float32)
    for name in ("n1", "n0"):
        real = values[name].numpy().astype(np.float32) - np.float32(own[name]["zero_point"])
        total += real * (np.float32(own[name]["scale"]) / np.float32(out["scale"]))
    expected = np.clip(np.rint(total) + out["zero_point"], out["zero_point"], 255)
    assert np.array_equal(values["n2"].numpy(), expected)
    assert own["n0"]["scale"] != own["n1"]["scale"]


def test_averages_round_ties_to_even_and_padding_never_wins_a_maximum():
    pooled = read_out(graph_of((1, 2, 4), avg_pool(2, 2)))
    zero = pooled["quantization"]["activations"]["input"]["zero_point"]
    image = torch.tensor([[1, 1, 3, 3], [0, 0, 3, 1]]).view(1, 1, 2, 4) + zero - 128
    found = exact_values(pooled, image.to(torch.int8))["n0"].flatten() - zero
    assert found.tolist() == [0, 2]  # 2 / 4 and 10 / 4, both halves
    checkpoint = read_out(graph_of((1, 3, 3), max_pool(3, 2, 1)))
    lowest = torch.full((1, 1, 3, 3), -128, dtype=torch.int8)
    assert (exact_values(checkpoint, lowest)["n0"] == 0).all()


def test_constants_in_single_precision():
    multiplier, bias = fbgemm_constants([0.5, 0.25], 0.1, 0.2, np.array([1, -3], np.float32))
    scales = np.float32(0.1) * np.array([0.5, 0.25], np.float32)
    assert np.array_equal(bias, np.array([1, -3], np.float32) / scales)
    assert np.array_equal(multiplier, scales / np.float32(0.2))
    _, one = fbgemm_constants([0.3], 0.1, 0.2, np.array([1, -3], np.float32))
    assert np.array_equal(one, np.float32([1, -3]) * (1 / (np.float32(0.1) * np.float32(0.3))))


# ---- the order of flat features ------------------------------------------------------------------


def test_columns_follow_a_map_flattened_channels_last():
    x = np.random.default_rng(0).integers(-9, 9, (5, 2, 3))  # (C, H, W)
    weight = np.random.default_rng(1).integers(-9, 9, (4, 30))
    moved = hwc_columns(weight, channels=5) @ x.transpose(1, 2, 0).reshape(-1)
    assert np.array_equal(moved, weight @ x.reshape(-1))


def test_flat_features_remember_their_map():
    graph = graph_of((2, 4, 4), ("flatten", {}), ("relu", {}), linear(6), linear(3))
    assert flat_maps(graph) == {"n0": (2, 4, 4), "n1": (2, 4, 4)}
    pooled = graph_of((2, 4, 4), ("global_avg_pool", {}), ("flatten", {}), linear(3))
    assert flat_maps(pooled) == {}
    flat, add = ("flatten", {}), {"activation": "none"}
    two = ("flatten", {}, ("n0",)), ("add", add, ("n1", "n2"))
    same = graph_of((2, 4, 4), ("relu", {}), flat, *two, linear(3))
    assert flat_maps(same)["n3"] == (2, 4, 4)
    other = graph_of((2, 4, 4), conv(8, 2, 2), flat, ("flatten", {}, ("input",)), two[1], linear(3))
    with pytest.raises(GraphError, match="other orders"):
        flat_maps(other)
    with pytest.raises(GraphError, match="flattened map"):
        flat_maps(graph_of((2, 4, 4), flat))


# ---- what does not fit ---------------------------------------------------------------------------


def test_numbers_that_overflow_are_refused():
    checkpoint = read_out(GRAPHS["conv 3x3"])
    checkpoint["quantization"]["activations"]["n0"]["scale"] = 1e-9
    with pytest.raises(UserError, match="n0: ValueError: can overflow"):
        exact_logits(checkpoint, device_images(checkpoint))


@pytest.mark.parametrize("key", ["weights", "activations"])
def test_missing_numbers_are_refused(key):
    checkpoint = read_out(GRAPHS["max_pool"])
    del checkpoint["quantization"][key]["n0"]
    with pytest.raises(UserError, match="do not fit its network"):
        integer_nodes(checkpoint)


def test_a_pool_of_another_scale_is_refused():
    checkpoint = read_out(GRAPHS["max_pool"])
    own = checkpoint["quantization"]["activations"]
    own["n1"] = {**own["n1"], "scale": own["n1"]["scale"] * 2}
    with pytest.raises(UserError, match="another scale"):
        integer_nodes(checkpoint)


# ---- the first network ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "digest"),
    [
        (
            "headline/pruned_93_energy_int8.pt",
            "bcf231f6bcb66bfda653233664460fa5a4de0995e4a2d8f7e4eea0a9337ab57a",
        ),
        (
            "reference/baseline_int8.pt",
            "b2a5e52a3a34864ef5be4871a385ae363e5f72235fc8c0953b637b24eee10f6f",
        ),
    ],
)
def test_committed_networks_give_the_integers_they_always_gave(path, digest):
    """The digests are those of the logits that version 1's code gave for the sample's images."""
    checkpoint = load_checkpoint(REPOSITORY / "checkpoints" / path)
    images = quantize_images(checkpoint, normalize(load_sample()[1][0], CIFAR10))
    assert hashlib.sha256(exact_logits(checkpoint, images).numpy()).hexdigest() == digest
