"""Files of any graph: standard ones, run by tflite-micro to the last bits, wholly on the NPU."""

import numpy as np
import pytest
import torch
from foreign_networks import FOREIGN
from narrow import (
    GRAPHS,
    avg_pool,
    conv,
    device_images,
    graph_of,
    linear,
    max_pool,
    quantized,
    read_out,
)

from edgecnn.capture import capture
from edgecnn.deploy.integer import exact_logits
from edgecnn.deploy.parity import operator_differences
from edgecnn.deploy.tflite import (
    integer_bias,
    operators,
    run_tflite,
    side_padding,
    tflite_micro,
    write_tflite,
)
from edgecnn.errors import UserError
from edgecnn.networks import NETWORKS
from edgecnn.quantized import MAX_BIAS
from edgecnn.rewrite import deployed

# The operators in front of the read-out's FULLY_CONNECTED.
OPERATORS = {
    "conv 1x1": "CONV_2D",
    "conv 3x3": "CONV_2D",
    "conv 5x3 stride 2": "PAD CONV_2D",
    "conv stride 1x2 padding 2": "PAD CONV_2D",
    "depthwise": "DEPTHWISE_CONV_2D",
    "depthwise stride 2": "PAD DEPTHWISE_CONV_2D",
    "depthwise x2": "DEPTHWISE_CONV_2D",
    "linear": "FULLY_CONNECTED FULLY_CONNECTED",
    "linear relu6": "FULLY_CONNECTED",
    "max_pool": "CONV_2D MAX_POOL_2D",
    "max_pool padded": "CONV_2D PADV2 MAX_POOL_2D",
    "max_pool padded relu": "CONV_2D PAD MAX_POOL_2D",
    "max_pool 1x1": "MAX_POOL_2D",
    "avg_pool": "AVERAGE_POOL_2D",
    "global_avg_pool": "CONV_2D AVERAGE_POOL_2D",
    "relu alone": "CONV_2D RELU",
    "relu6 alone": "CONV_2D RELU6 CONV_2D",
    "add": "CONV_2D CONV_2D ADD",
    "add relu": "CONV_2D CONV_2D ADD",
    "add to itself": "ADD",
}
# Everything at once: residual, depthwise, ReLU6, odd sides, a flatten that has to be reordered.
MIXED = graph_of(
    (3, 13, 10),
    conv(6, (5, 3), (2, 1), (2, 1), activation="relu6"),
    conv(6, 3, 1, 1, groups=6, activation="relu6"),
    conv(6, 1),
    ("add", {"activation": "relu"}, ("n0", "n2")),
    max_pool(3, 2, 1),
    avg_pool(2, 1),
    ("flatten", {}),
    linear(9, "relu"),
    linear(5),
)


def wrong_operators(checkpoint: dict) -> dict:
    """The operators of its file that differ from exact integers by more than rounding explains."""
    data = write_tflite(checkpoint, "net")
    found = operator_differences(checkpoint, data, device_images(checkpoint))
    assert len(found) > 1
    return {name: pair for name, pair in found.items() if pair[0] > pair[1]}


# ---- numbers -------------------------------------------------------------------------------------


def test_padding_is_what_tflite_computes():
    seen = set()
    for size, kernel, stride, padding in np.ndindex(14, 6, 4, 4):
        if min(size, kernel, stride) == 0 or 2 * padding > kernel or kernel > size + 2 * padding:
            continue
        out = (size + 2 * padding - kernel) // stride + 1
        words, before, after = side_padding(size, kernel, stride, padding)
        last = (out - 1) * stride + kernel  # where the last window ends, from the first one's start
        assert before == padding and 0 <= after <= padding
        assert (
            size + before + after - kernel
        ) // stride + 1 == out and size + before + after >= last
        same_out = -(-size // stride)
        total = max((same_out - 1) * stride + kernel - size, 0)
        assert ("SAME" in words) == (same_out == out and total // 2 == before)
        assert ("VALID" in words) == (padding == 0)
        seen.add(tuple(sorted(words)))
    assert seen == {(), ("SAME",), ("VALID",), ("SAME", "VALID")}


def test_biases_are_integers_at_the_accumulators_scale():
    weight = np.ones((2, 3), np.int8)
    bias, scales = integer_bias(np.array([1.0, -0.26]), np.array([0.5, 0.25]), weight, 0.25)
    assert bias.tolist() == [8, -4] and bias.dtype == np.int32 and scales.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_layer_of_zeros_gets_a_scale_that_holds_its_bias(per_channel):
    tiny = float(torch.finfo(torch.float32).eps)
    bias, scales = np.array([5.0, -3.0]), np.full(2 if per_channel else 1, tiny)
    integers, wider = integer_bias(bias, scales, np.zeros((2, 4), np.int8), 1e-3)
    assert np.allclose(integers * wider * 1e-3, bias, rtol=1e-6)
    assert np.abs(integers.astype(np.int64)).max() <= MAX_BIAS + 64
    with pytest.raises(UserError, match="bias does not fit"):
        integer_bias(bias, scales, np.ones((2, 4), np.int8), 1e-3)


# ---- the file ------------------------------------------------------------------------------------


def test_file_is_a_standard_one():
    schema, _ = tflite_micro()
    checkpoint = quantized(MIXED)
    data = write_tflite(checkpoint, "net")
    assert data == write_tflite(quantized(MIXED), "net")
    model = schema.Model.GetRootAsModel(data, 0)
    assert data[4:8] == b"TFL3" and model.Version() == 3 and model.SubgraphsLength() == 1
    assert model.Buffers(0).DataLength() == 0
    for i in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(i)
        assert code.DeprecatedBuiltinCode() == code.BuiltinCode()
    graph = model.Subgraphs(0)
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    names = [tensor.Name().decode() for tensor in tensors]
    assert len(set(names)) == len(names)
    constants = {name: t for name, t in zip(names, tensors, strict=True) if t.Buffer()}
    start = np.frombuffer(data, np.uint8).ctypes.data
    for name, stored in checkpoint["tensors"].items():
        content = model.Buffers(constants[name].Buffer()).DataAsNumpy()
        assert (content.ctypes.data - start) % 16 == 0, f"{name} is not aligned"
        assert len(content) == stored.numel() * (1 if name.endswith("weight") else 4)
        if name.endswith("weight"):
            theirs = np.bincount(stored.flatten().view(torch.uint8), minlength=256)
            assert np.array_equal(np.bincount(content, minlength=256), theirs)
    image, logits = (tensors[i(0)] for i in (graph.Inputs, graph.Outputs))
    assert image.ShapeAsNumpy().tolist() == [1, 13, 10, 3]
    assert logits.ShapeAsNumpy().tolist() == [1, 5]


def test_scales_of_a_bias_are_products_along_the_channels():
    schema, _ = tflite_micro()
    graph = schema.Model.GetRootAsModel(write_tflite(quantized(MIXED), "net"), 0).Subgraphs(0)
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    axes = []
    for i in range(graph.OperatorsLength()):
        inputs = graph.Operators(i).InputsAsNumpy()
        if len(inputs) == 3:
            x, weight, bias = (tensors[k].Quantization() for k in inputs)
            assert np.allclose(x.Scale(0) * weight.ScaleAsNumpy(), bias.ScaleAsNumpy(), rtol=1e-6)
            assert not weight.ZeroPointAsNumpy().any() and not bias.ZeroPointAsNumpy().any()
            axes.append(weight.QuantizedDimension())
            sides = tensors[inputs[1]].ShapeAsNumpy()
            assert weight.ScaleLength() in (1, sides[axes[-1]])
    assert axes == [0, 3, 0, 0, 0]


def test_logits_that_are_no_linear_layer_are_reshaped():
    graph = graph_of((2, 6, 6), conv(4, 3), ("global_avg_pool", {}), ("flatten", {}))
    checkpoint = quantized(graph)
    assert operators(write_tflite(checkpoint, "net"))[-1] == "RESHAPE"
    assert wrong_operators(checkpoint) == {}


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_every_operation_under_tflite_micro(name):
    checkpoint = read_out(GRAPHS[name], seed=2)
    expected = [*OPERATORS[name].split(), "FULLY_CONNECTED"]
    assert operators(write_tflite(checkpoint, "net")) == expected
    assert wrong_operators(checkpoint) == {}


@pytest.mark.parametrize("seed", range(3))
def test_mixed_nets_under_tflite_micro(seed):
    assert wrong_operators(quantized(MIXED, seed=seed)) == {}


NETS = {name: (shipped.make, *shipped[1:]) for name, shipped in NETWORKS.items()}
NETS |= {
    name: (lambda classes, shape, m=m: m(classes), *rest) for name, (m, *rest) in FOREIGN.items()
}


@pytest.mark.parametrize("name", NETS)
def test_whole_networks_under_tflite_micro(name):
    """Random weights, batch norms that know the images."""
    make, shape, classes = NETS[name]
    torch.manual_seed(0)
    module = make(classes, shape).train()
    with torch.no_grad():
        for _ in range(20):
            module(torch.randn(8, *shape))
    assert wrong_operators(quantized(*deployed(*capture(module, shape)))) == {}


@pytest.mark.parametrize(("value", "scale"), [(127, 1e-4), (-127, 1e-4), (0, 0.02)])
def test_saturated_and_empty_layers(value, scale):
    checkpoint = quantized(MIXED)
    quantization = checkpoint["quantization"]
    for name in quantization["weights"]:
        tensor = checkpoint["tensors"][f"{name}.weight"]
        checkpoint["tensors"][f"{name}.weight"] = torch.full_like(tensor, value)
    own = quantization["activations"]["n8"]
    quantization["activations"]["n8"] = {**own, "scale": scale}
    images = device_images(checkpoint)
    logits, _ = run_tflite(write_tflite(checkpoint, "net"), images)
    assert np.abs(logits.astype(int) - exact_logits(checkpoint, images).numpy()).max() <= 1
    bias = np.rint(checkpoint["tensors"]["n8.bias"].numpy() / scale) + own["zero_point"] - 128
    if value == 0:  # what remains is the last layer's bias
        assert np.abs(logits - bias.clip(-128, 127)).max() <= 1
    elif value > 0:
        assert logits.max() == 127


# ---- refusals ------------------------------------------------------------------------------------


def test_a_graph_whose_logits_are_a_map_is_refused():
    flat = graph_of((2, 3, 3), conv(2, 1), ("flatten", {}))
    for graph in (GRAPHS["max_pool"], flat):
        with pytest.raises(UserError, match="no .tflite form"):
            write_tflite(quantized(graph), "net")


def test_images_of_another_size_are_refused():
    data = write_tflite(quantized(MIXED), "net")
    with pytest.raises(UserError, match="tflite-micro cannot run"):
        run_tflite(data, torch.zeros(1, 3, 8, 8, dtype=torch.int8))
