"""Quantizing a graph: torch's own eager scales, exact zeros, integers from end to end, any names."""

import pytest
import torch
from narrow import (
    conv,
    graph_of,
    linear,
    max_pool,
    quantized,
    random_images,
    random_tensors,
    read_out,
)
from torch import nn
from torch.ao import quantization as tq
from torch.ao.nn import intrinsic as nni
from torch.utils._python_dispatch import TorchDispatchMode

from edgecnn.data import load_sample, normalize
from edgecnn.dataset import CIFAR10
from edgecnn.deploy.integer import exact_logits
from edgecnn.deploy.tflite import write_tflite
from edgecnn.errors import UserError
from edgecnn.graph import Graph, Node, from_plain, macs_of, to_plain
from edgecnn.quantized import (
    HIGHEST,
    MAX_BIAS,
    int8_module,
    integer_logits,
    quantize,
    quantize_images,
    relu6_high,
    signed,
    with_zeros,
)
from mac_hooks import count_macs

SEQUENCE = graph_of(
    (3, 32, 32),
    conv(6, 3, 1, 1, activation="relu"),
    max_pool(2, 2),
    conv(5, 3, 2, 1, activation="relu"),
    ("flatten", {}),
    linear(8, "relu"),
    linear(10),
)
RESIDUAL = graph_of(
    (3, 11, 8),
    conv(6, 3, 2, 1, activation="relu6"),
    conv(6, 3, 1, 1, groups=6, activation="relu6"),
    conv(6, 1),
    ("add", {"activation": "none"}, ("n0", "n2")),
    ("relu", {}),
    max_pool(3, 2, 1),
    ("global_avg_pool", {}),
    ("flatten", {}),
    linear(4),
)


def eager(tensors: dict, images: torch.Tensor, engine: str) -> nn.Sequential:
    """SEQUENCE quantized by torch.ao's prepare and convert, the way its documentation shows."""
    torch.backends.quantized.engine = engine
    activation = tq.HistogramObserver.with_args(dtype=torch.quint8, reduce_range=engine == "fbgemm")
    symmetric = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127}
    channel = tq.PerChannelMinMaxObserver.with_args(
        qscheme=torch.per_channel_symmetric, **symmetric
    )
    tensor = tq.MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric, **symmetric)
    model = nn.Sequential(
        tq.QuantStub(),
        nni.ConvReLU2d(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()),
        nn.MaxPool2d(2),
        nni.ConvReLU2d(nn.Conv2d(6, 5, 3, 2, 1), nn.ReLU()),
        nn.Flatten(),
        nni.LinearReLU(nn.Linear(320, 8), nn.ReLU()),
        nn.Linear(8, 10),
        tq.DeQuantStub(),
    ).eval()
    for index, layer in enumerate((model[1][0], model[3][0], model[5][0], model[6])):
        name = ("n0", "n2", "n4", "n5")[index]
        layer.weight.data, layer.bias.data = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    for module in model:
        per_channel = isinstance(module, nni.ConvReLU2d)
        module.qconfig = tq.QConfig(activation, channel if per_channel else tensor)
    prepared = tq.prepare(model)
    with torch.no_grad():
        for batch in images.split(100):
            prepared(batch)
    return tq.convert(prepared)


@pytest.mark.parametrize("engine", ["qnnpack", "fbgemm"])
def test_scales_and_integers_are_those_of_torchs_own_workflow(engine):
    tensors, images = random_tensors(SEQUENCE), normalize(load_sample()[0][0], CIFAR10)
    model = eager(tensors, images, engine)
    integers, quantization = quantize(SEQUENCE, tensors, images.split(100), engine)
    own = quantization["activations"]
    assert own["input"] == {"scale": float(model[0].scale), "zero_point": int(model[0].zero_point)}
    assert own["n1"] == own["n0"] and own["n3"] == own["n2"]
    assert list(own) == ["input", *(node.name for node in SEQUENCE.nodes)]
    for name, index in (("n0", 1), ("n2", 3), ("n4", 5), ("n5", 6)):
        layer = model[index]
        assert own[name] == {"scale": float(layer.scale), "zero_point": int(layer.zero_point)}
        weight = layer.weight()
        channels = name in ("n0", "n2")
        scales = weight.q_per_channel_scales().tolist() if channels else [weight.q_scale()]
        assert quantization["weights"][name] == scales
        assert torch.equal(integers[f"{name}.weight"], weight.int_repr())
        assert torch.equal(integers[f"{name}.bias"], tensors[f"{name}.bias"])
    plain = {"graph": to_plain(SEQUENCE), "tensors": integers, "quantization": quantization}
    test_images = normalize(load_sample()[1][0], CIFAR10)
    with torch.no_grad():
        assert torch.equal(int8_module(plain)(test_images), model(test_images))


def test_weights_round_to_the_nearest_step_and_zeros_stay_zero():
    tensors = random_tensors(RESIDUAL)
    for tensor in tensors.values():
        if tensor.ndim > 1:
            tensor[torch.rand(tensor.shape) < 0.5] = 0
    checkpoint = quantized(RESIDUAL, tensors)
    for name, scales in checkpoint["quantization"]["weights"].items():
        weight, stored = tensors[f"{name}.weight"], checkpoint["tensors"][f"{name}.weight"]
        assert len(scales) == (len(weight) if weight.ndim == 4 else 1)
        assert stored.dtype == torch.int8 and stored.min() >= -127
        assert (stored[weight == 0] == 0).all()
        steps = torch.tensor(scales).view(-1, *[1] * (weight.ndim - 1))
        assert ((weight - stored * steps).abs() <= 0.5001 * steps).all()


def test_activations_that_are_not_requantized_keep_their_scale():
    own = quantized(RESIDUAL)["quantization"]["activations"]
    assert own["n3"] == own["n4"] == own["n5"] == own["n6"] == own["n7"]
    assert own["n2"] != own["n3"] and own["n0"]["zero_point"] == own["n1"]["zero_point"] == 0


@pytest.mark.parametrize(("engine", "high"), [("qnnpack", 255), ("fbgemm", 127)])
def test_relu6_ends_at_six(engine, high):
    graph = graph_of((2, 4, 4), conv(3, 1, activation="relu6"))
    tensors = random_tensors(graph)
    tensors["n0.weight"] *= 20
    checkpoint = read_out(graph, tensors, engine)
    own = checkpoint["quantization"]["activations"]["n0"]
    assert relu6_high(**own) == high and own["scale"] * high == pytest.approx(6, rel=0.01)
    found = integer_logits(int8_module(checkpoint), random_images(graph))
    assert found.max() == high - 128


def test_a_layer_that_calibration_never_saw_alive_stays_within_the_arithmetic():
    graph = graph_of((2, 4, 4), conv(3, 1, activation="relu"), ("flatten", {}), linear(2))
    tensors = random_tensors(graph)
    tensors["n0.bias"] -= 1000
    checkpoint = quantized(graph, tensors)
    images = random_images(graph)
    model = int8_module(checkpoint)
    exact = exact_logits(checkpoint, quantize_images(checkpoint, images))
    assert (integer_logits(model, images).int() - exact).abs().max() <= 1
    assert (exact == exact[0]).all()


def test_a_map_that_is_dead_leaves_room_for_the_next_layer_s_bias():
    graph = graph_of(
        (2, 4, 4), conv(3, 1, activation="relu"), conv(3, 1), ("flatten", {}), linear(2)
    )
    tensors = random_tensors(graph)
    tensors["n0.weight"] *= 0.01
    tensors["n0.bias"].fill_(-1)
    tensors["n1.weight"] *= 0.01
    tensors["n1.bias"].fill_(0.5)
    checkpoint = quantized(graph, tensors)
    found = checkpoint["quantization"]
    steps = checkpoint["tensors"]["n1.bias"].abs() / torch.tensor(found["weights"]["n1"])
    assert (steps / found["activations"]["n0"]["scale"]).max() <= MAX_BIAS
    write_tflite(checkpoint, "dead")


@pytest.mark.parametrize(("spoiled", "factor"), [("n0", 0), ("n2", 0), ("n2", 1e-6), ("n0 n2", 0)])
def test_residual_branches_that_pruning_emptied(spoiled, factor):
    """QNNPACK adds no input of less than 2^-14 of the output's scale."""
    graph = graph_of(
        (3, 5, 4),
        conv(4, 1, activation="relu"),
        max_pool(3, 1, 1),
        conv(4, 3, 1, 1),
        ("add", {"activation": "relu"}, ("n1", "n2")),
        ("flatten", {}),
        linear(3),
    )
    tensors = random_tensors(graph)
    for name in spoiled.split():
        tensors[f"{name}.weight"] *= factor
        tensors[f"{name}.bias"] *= factor
    checkpoint = quantized(graph, tensors)
    images = random_images(graph)
    exact = exact_logits(checkpoint, quantize_images(checkpoint, images)).int()
    assert (integer_logits(int8_module(checkpoint), images).int() - exact).abs().max() <= 1


def test_signed_integers_stand_for_the_same_values():
    quint8 = torch.quantize_per_tensor(torch.tensor([-9.0, 0, 9]), 0.05, 100, torch.quint8)
    assert signed(quint8).tolist() == [-128, 100 - 128, 127]
    checkpoint = quantized(RESIDUAL)
    images, own = random_images(RESIDUAL), checkpoint["quantization"]["activations"]["input"]
    real = (quantize_images(checkpoint, images).float() + 128 - own["zero_point"]) * own["scale"]
    assert real.shape == images.shape and (real - images).abs().quantile(0.9) <= own["scale"] / 2


# ---- the network ---------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Every operation that runs, with the dtypes of the tensors it takes and gives."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        self.calls.append((str(function), {t.dtype for t in tensors}))
        return result


@pytest.mark.parametrize("graph", [SEQUENCE, RESIDUAL])
def test_no_floating_point_between_the_image_and_the_logits(graph):
    model = int8_module(quantized(graph))
    with torch.no_grad(), Recorder() as recorder:
        logits = model(random_images(graph))
    assert logits.shape == (16, graph.nodes[-1].options["outputs"])
    names = [name for name, _ in recorder.calls]
    first = next(i for i, name in enumerate(names) if "quantize_per_tensor" in name)
    last = next(i for i, name in enumerate(names) if "dequantize" in name)
    inner = recorder.calls[first + 1 : last]
    assert len(inner) >= len(graph.nodes)
    for name, dtypes in inner:
        assert dtypes <= {torch.quint8, torch.int64}, f"{name} handles {dtypes}"


@pytest.mark.parametrize("graph", [SEQUENCE, RESIDUAL])
def test_macs_of_the_quantized_modules(graph):
    checkpoint = quantized(graph)
    report = count_macs(int8_module(checkpoint), graph.input_shape)
    assert {layer.name: layer.macs for layer in report.layers} == macs_of(graph)
    sparse = count_macs(int8_module(with_zeros(checkpoint, 0.9)), graph.input_shape)
    assert sparse.nonzero_macs < 0.15 * report.macs


def test_engines_agree_and_an_unknown_one_is_named():
    checkpoint, images = quantized(RESIDUAL, engine="fbgemm"), random_images(RESIDUAL)
    logits = [
        integer_logits(int8_module(checkpoint, engine), images).int()
        for engine in ("fbgemm", "qnnpack")
    ]
    assert (logits[0] - logits[1]).abs().max() <= 2
    with pytest.raises(UserError, match="no engine tpu"):
        int8_module(checkpoint, "tpu")


def test_names_that_go_on_where_another_ends():
    names = ("relu6.x", "relu6", "steps", "quantized", "a.b", "a", "0", "0.1")
    nodes = [
        Node(name, op, (before,), options)
        for name, before in zip(names, ("input", *names[:-1]), strict=True)
        for op, options in [conv(2, 1)]
    ]
    tail = [Node("f", "flatten", (names[-1],)), Node("fc", "linear", ("f",), linear(3)[1])]
    graph = from_plain(to_plain(Graph((2, 3, 3), (*nodes, *tail))))
    checkpoint = quantized(graph)
    model, images = int8_module(checkpoint), random_images(graph)
    assert {name for name, _ in model.named_modules()} >= {*names, "fc"}
    exact = exact_logits(checkpoint, quantize_images(checkpoint, images)).int()
    assert (integer_logits(model, images).int() - exact).abs().max() <= 2
    assert {layer.name for layer in count_macs(model, (2, 3, 3)).layers} == {*names, "fc"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c["tensors"].pop("n0.weight"),
        lambda c: c["tensors"].update({"n2.weight": c["tensors"]["n2.weight"][:2]}),
        lambda c: c["quantization"]["activations"].pop("n3"),
        lambda c: c["graph"]["nodes"].pop(2),
    ],
)
def test_what_does_not_fit_is_one_line(spoil):
    checkpoint = quantized(RESIDUAL)
    spoil(checkpoint)
    with pytest.raises(UserError, match="do not fit its network"):
        int8_module(checkpoint)


def test_a_relu6_of_its_own_clamps_at_six():
    graph = graph_of((2, 3, 3), conv(3, 1), ("relu6", {}))
    tensors = random_tensors(graph)
    tensors["n0.weight"] *= 20
    checkpoint = read_out(graph, tensors)
    own = checkpoint["quantization"]["activations"]["n0"]
    found = integer_logits(int8_module(checkpoint), random_images(graph)).int() + 128
    assert found.min() == own["zero_point"] and found.max() == relu6_high(**own) < HIGHEST
