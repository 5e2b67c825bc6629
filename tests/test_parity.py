"""Which .tflite files are refused: those that compute something else, and no others."""

import copy

import numpy as np
import pytest
import torch
from deploying import conv, random_checkpoint, random_images

import export_edge
from edgecnn.deploy import tflite
from edgecnn.deploy.parity import operator_differences
from edgecnn.deploy.tflite import run_tflite, tflite_values, write_tflite
from edgecnn.errors import UserError
from edgecnn.graph import Graph, Node

WINDOW = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1]}
GRAPH = Graph(
    (3, 12, 14),
    (
        conv("stem", "input", 8, (3, 3), (2, 2), (1, 1), activation="relu"),  # even sides: a PAD
        conv("depth", "stem", 8, (3, 3), (1, 1), (1, 1), 8, activation="none"),
        Node("pool", "max_pool", ("depth",), WINDOW),
        Node("flat", "flatten", ("pool",)),
        Node("head", "linear", ("flat",), {"outputs": 5, "bias": 1, "activation": "none"}),
    ),
)
IMAGES = random_images(GRAPH, 12)


@pytest.fixture
def checkpoint():
    return random_checkpoint(GRAPH, clamped=True)  # a ReLU does more than the range


def wrong(checkpoint, data: bytes) -> list[str]:
    """The operators that differ by more than rounding explains."""
    differences = operator_differences(checkpoint, data, IMAGES)
    assert list(differences) == ["stem", "depth", "pool", "head"]
    return [node for node, (found, allowed) in differences.items() if found > allowed]


def test_every_operator_follows_exact_integers_to_one_lsb(checkpoint):
    differences = operator_differences(checkpoint, write_tflite(checkpoint, "net"), IMAGES)
    assert all(found <= 1 and allowed == 1 for found, allowed in differences.values())


def test_the_values_that_are_compared_lead_to_the_logits_of_an_ordinary_run(checkpoint):
    data = write_tflite(checkpoint, "net")
    logits, _ = run_tflite(data, IMAGES)
    values = tflite_values(data, IMAGES)
    assert np.array_equal(values["head"].numpy(), logits)
    assert torch.equal(values["input"], IMAGES)


def left_in_torchs_order(patch):
    patch.setattr(tflite, "hwc_columns", lambda weight, channels: weight)


def padded_as_same(patch):
    patch.setattr(tflite, "side_padding", lambda *side: ({"SAME"}, 0, 0))


def without_activation(patch):
    patch.setattr(tflite, "ACTIVATIONS", dict.fromkeys(tflite.ACTIVATIONS, "NONE"))


def without_bias(patch):
    real = tflite.integer_bias

    def no_bias(*numbers):
        bias, scales = real(*numbers)
        return 0 * bias, scales

    patch.setattr(tflite, "integer_bias", no_bias)


def pools_padded_with_zero(patch):
    real = tflite.Writer.padded
    patch.setattr(tflite.Writer, "padded", lambda self, node, lowest=False: real(self, node))


@pytest.mark.parametrize(
    ("mistake", "nodes"),
    [
        (left_in_torchs_order, ["head"]),
        (padded_as_same, ["stem", "pool"]),
        (without_activation, ["stem"]),
        (without_bias, ["stem", "depth", "head"]),
        (pools_padded_with_zero, ["pool"]),
    ],
)
def test_each_mistake_shows_at_its_operators_alone(checkpoint, monkeypatch, mistake, nodes):
    mistake(monkeypatch)
    assert wrong(checkpoint, write_tflite(checkpoint, "net")) == nodes


@pytest.mark.parametrize("node", ["stem", "depth"])
def test_a_kernel_that_is_turned_shows(checkpoint, node):
    other = copy.deepcopy(checkpoint)
    other["tensors"][f"{node}.weight"] = checkpoint["tensors"][f"{node}.weight"].mT.contiguous()
    assert wrong(checkpoint, write_tflite(other, "net")) == [node]


def test_an_output_finer_than_a_unit_of_the_sum_may_differ_by_its_rounded_bias(checkpoint):
    """A file holds the bias in whole units of the sum; here one is 50 LSB of the output."""
    quantization = checkpoint["quantization"]
    unit = quantization["activations"]["flat"]["scale"] * quantization["weights"]["head"][0]
    quantization["activations"]["head"]["scale"] = unit / 50
    checkpoint["tensors"]["head.weight"].zero_()
    checkpoint["tensors"]["head.bias"].fill_(0.4 * unit)
    differences = operator_differences(checkpoint, write_tflite(checkpoint, "net"), IMAGES)
    assert differences["head"] == (20, 26)


# ---- the rule --------------------------------------------------------------------------------------

SPREAD = np.random.default_rng(0).integers(-100, 100, (40, 3)).astype(np.int8)
FLAT = np.random.default_rng(0).integers(-1, 2, (40, 3)).astype(np.int8)  # as good as untrained


def test_other_classes_where_logits_are_as_good_as_equal_are_no_reason():
    other = FLAT[:, ::-1].copy()
    parity = export_edge.compare_logits(other, FLAT, np.zeros(40))
    assert parity["agreement_percent"] < 80
    export_edge.require_parity("net", other, FLAT, {"head": (1, 1)})


def test_a_few_logits_may_be_far_off():
    other = SPREAD.copy()
    other[::8] = np.clip(other[::8].astype(int) + 20, -128, 127)
    export_edge.require_parity("net", other, SPREAD, {"head": (1, 1)})


@pytest.mark.parametrize(
    ("theirs", "operators", "message"),
    [
        (0 * SPREAD, {"head": (0, 1)}, "answers every image alike"),
        (SPREAD, {"stem": (0, 1), "a": (2, 1), "head": (9, 1)}, "exact integers: a is up to 2 LSB"),
        (SPREAD[:, ::-1], {"head": (0, 1)}, "does not agree with PyTorch"),
        (np.roll(SPREAD, 1, 0), {"head": (0, 1)}, "does not agree with PyTorch"),
    ],
)
def test_what_is_refused(theirs, operators, message):
    with pytest.raises(UserError, match=message):
        export_edge.require_parity("net", theirs, SPREAD, operators)


def test_few_weights_on_a_large_image_have_an_arena():
    graph = Graph(
        (3, 160, 160),
        (
            conv("stem", "input", 4, (5, 5), (4, 4), activation="relu"),
            Node("mean", "global_avg_pool", ("stem",)),
            Node("flat", "flatten", ("mean",)),
        ),
    )
    checkpoint, images = random_checkpoint(graph), random_images(graph, 2)
    _, arena_bytes = run_tflite(write_tflite(checkpoint, "net"), images)
    assert 3 * 160**2 <= arena_bytes < 1.2 * (3 + 4 / 16) * 160**2
