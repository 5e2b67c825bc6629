"""INT8 by torch: calibrating a deployed graph, and running it on torch's integer kernels.

Activations are unsigned 8 bit, per tensor; weights are symmetric in [-127, 127], one scale an
output channel for conv and one in all for linear. `quantize` is the only place that calibrates:
another calibrator has to give the same two values. A zero weight stays zero.
"""

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from edgecnn.errors import UserError
from edgecnn.graph import ACTIVATED, INPUT, WEIGHTED, Graph, Node, batch_size, from_plain
from edgecnn.module import MODULES, module_of, place

SIGNED_OFFSET = 128  # a device's int8 is torch's quint8 less this, at the same scale
HIGHEST = 255
BATCH = 500  # images
ROUNDING_LIMIT = 2.0**22  # above it, adding 1.5 * 2^23 in single precision no longer rounds
# Where a bias, in steps of input scale x weight scale, has to stay for int32 accumulators: they add
# at most 2^29 to it (integer.SUM_LIMIT).
MAX_BIAS = 2**30
# QNNPACK adds inputs of 2^-14 to 2^8 of the output's scale (its own message); half of that is safe.
MIN_ADD_RATIO, MAX_ADD_RATIO = 2.0**-13, 2.0**7

# Quantized tensors work in the pinned torch, which says that they will go.
warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")


def set_engine(engine: str) -> None:
    """Select torch's quantized engine; raises UserError when this build lacks it."""
    supported = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if engine not in supported:
        raise UserError(f"this torch has no engine {engine}; it has {', '.join(supported)}")
    torch.backends.quantized.engine = engine


def relu6_high(scale: float, zero_point: int) -> int:
    """The largest q that ReLU6 leaves."""
    return min(HIGHEST, zero_point + round(6 / scale))


# ---- calibrating -------------------------------------------------------------------------------


def calibrate(graph: Graph, tensors: dict, batches: Iterable, reduce_range: bool) -> dict:
    """{name: {scale, zero_point}} of the image and of all that is requantized, by histograms.

    batches: float32 (N, C, H, W), normalized. reduce_range: leave the eighth bit unused.
    """
    names = [INPUT, *(node.name for node in graph.nodes if node.op in ACTIVATED)]
    highest = HIGHEST // 2 if reduce_range else HIGHEST
    observers = {name: tq.HistogramObserver(quant_min=0, quant_max=highest) for name in names}
    network = module_of(graph, tensors).eval()
    for batch in batches:
        network(observers[INPUT](batch), observers)
    found = {}
    for name, observer in observers.items():
        scale, zero_point = observer.calculate_qparams()
        found[name] = {"scale": float(scale), "zero_point": int(zero_point)}
    return found


def quantized_weight(values: torch.Tensor, per_channel: bool) -> tuple[torch.Tensor, list[float]]:
    """(int8 of the same shape, scales) of a float weight: symmetric, never -128."""
    symmetric = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127}
    if per_channel:
        observer = tq.PerChannelMinMaxObserver(qscheme=torch.per_channel_symmetric, **symmetric)
        observer(values)
        scales, zeros = observer.calculate_qparams()
        integers = torch.quantize_per_channel(values, scales.double(), zeros, 0, torch.qint8)
    else:
        observer = tq.MinMaxObserver(qscheme=torch.per_tensor_symmetric, **symmetric)
        observer(values)
        scales, zeros = observer.calculate_qparams()
        integers = torch.quantize_per_tensor(values, float(scales), 0, torch.qint8)
    return integers.int_repr(), scales.reshape(-1).tolist()


def floors(graph: Graph, tensors: dict, weights: dict, activations: dict) -> Iterator:
    """(an entry of activations, the least scale that the kernels' arithmetic allows it).

    It matters for what is all but zero on every calibration image, such as a branch that pruning
    emptied; there a wider scale is as exact.
    """
    for node in graph.nodes:
        own, inputs = activations[node.name], [activations[name] for name in node.inputs]
        if node.op in WEIGHTED:
            weight, bias = (tensors[f"{node.name}.{key}"].double() for key in ("weight", "bias"))
            scales = inputs[0]["scale"] * torch.tensor(weights[node.name], dtype=torch.float64)
            largest = HIGHEST * weight.abs().flatten(1).sum(1) * scales + bias.abs()  # (O,)
            yield own, largest.max().item() / (ROUNDING_LIMIT / 2)
            used = weight.flatten(1).any(1)  # a bias alone fits at any scale
            steps = bias.abs() / (scales / inputs[0]["scale"] * MAX_BIAS / 2)  # (O,)
            yield inputs[0], torch.where(used, steps, 0).max().item()
        elif node.op == "add":
            for entry in inputs:
                yield own, entry["scale"] / MAX_ADD_RATIO
                yield entry, own["scale"] * MIN_ADD_RATIO


@torch.no_grad()
def quantize(graph: Graph, tensors: dict, batches: Iterable, engine: str) -> tuple[dict, dict]:
    """(int8 weights and float32 biases, quantization) of a deployed graph, as a checkpoint holds them.

    batches: float32 (N, C, H, W) normalized images that set the activations' ranges. engine: the
    torch kernels it is for; x86's 8-bit dot product saturates without VNNI, and torch's defaults
    spare it the eighth bit. Raises UserError when this torch lacks the engine.
    """
    set_engine(engine)
    observed = calibrate(graph, tensors, batches, engine in ("fbgemm", "x86"))
    stored, weights, activations = {}, {}, {INPUT: observed[INPUT]}
    for node in graph.nodes:  # what is not requantized shares the entry of its input
        activations[node.name] = observed.get(node.name) or activations[node.inputs[0]]
        if node.op in WEIGHTED:
            weight, bias = (tensors[f"{node.name}.{key}"].detach() for key in ("weight", "bias"))
            integers, weights[node.name] = quantized_weight(weight, node.op == "conv")
            stored |= {f"{node.name}.weight": integers, f"{node.name}.bias": bias}
    is_widened = True
    while is_widened:
        is_widened = False
        for entry, least in floors(graph, stored, weights, activations):
            is_widened |= entry["scale"] < least
            entry["scale"] = max(entry["scale"], least)
    activations = {name: dict(entry) for name, entry in activations.items()}
    return stored, {"engine": engine, "activations": activations, "weights": weights}


# ---- running -----------------------------------------------------------------------------------


class Add(nn.Module):
    """Two quint8 tensors of any scales added to one of its own, with ReLU where it is fused."""

    def __init__(self, scale: float, zero_point: int, relu: bool):
        super().__init__()
        self.scale, self.zero_point = scale, zero_point
        self.add = torch.ops.quantized.add_relu if relu else torch.ops.quantized.add

    def forward(self, a, b):
        return self.add(a, b, self.scale, self.zero_point)


def relu6(x: torch.Tensor) -> torch.Tensor:
    """ReLU6 of quint8; torch's QNNPACK kernel for it mixes up the values of a channels-last map."""
    return torch.ops.quantized.relu6(x.contiguous())


class ReLU6(nn.Module):
    """A ReLU6 that is no part of another node."""

    def forward(self, x):
        return relu6(x)


class Subsample(nn.Module):
    """Pooling of one value, which QNNPACK refuses: every `stride`th of rows and columns."""

    def __init__(self, stride: tuple[int, int]):
        super().__init__()
        self.rows, self.columns = stride

    def forward(self, x):
        return x[:, :, :: self.rows, :: self.columns].contiguous()


def packed_weight(values: torch.Tensor, scales: list[float]) -> torch.Tensor:
    """A qint8 tensor from its integers and its one scale, or one scale an output channel."""
    if len(scales) == 1:
        return torch._make_per_tensor_quantized_tensor(values, scales[0], 0)
    zero_points = torch.zeros(len(scales), dtype=torch.int64)
    scales = torch.tensor(scales, dtype=torch.float64)
    return torch._make_per_channel_quantized_tensor(values, scales, zero_points, 0)


def weighted_module(node: Node, tensors: dict, quantization: dict) -> nn.Module:
    """torch's quantized convolution or linear layer of a node, packed for the selected engine."""
    o, values = node.options, tensors[f"{node.name}.weight"]
    relu = o.get("activation", "none") != "none"
    if node.op == "conv":
        kind = nniq.ConvReLU2d if relu else nnq.Conv2d
        window = {key: o[key] for key in ("stride", "padding")}
        inputs, kernel = values.shape[1] * o["groups"], o["kernel"]
        module = kind(inputs, o["outputs"], kernel, groups=o["groups"], **window)
    else:
        module = (nniq.LinearReLU if relu else nnq.Linear)(values.shape[1], o["outputs"])
    weight = packed_weight(values, quantization["weights"][node.name])
    module.set_weight_bias(weight, tensors[f"{node.name}.bias"])
    own = quantization["activations"][node.name]
    module.scale, module.zero_point = own["scale"], own["zero_point"]
    return module


def node_module(node: Node, tensors: dict, quantization: dict) -> nn.Module:
    """The module that runs a node on quint8 tensors."""
    o = node.options
    match node.op:
        case "conv" | "linear":
            return weighted_module(node, tensors, quantization)
        case "add":
            own = quantization["activations"][node.name]
            relu = o.get("activation", "none") != "none"
            return Add(own["scale"], own["zero_point"], relu)
        case "max_pool" | "avg_pool" if o["kernel"] == (1, 1):
            return Subsample(o["stride"])
        case "relu6":
            return ReLU6()
    return MODULES[node.op]((), o)  # those that run on quint8 as on floats


def ran(node: Node, module: nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
    """What a node's module gives; of an activation that is part of it torch fuses ReLU alone."""
    value = module(*inputs)
    if node.options.get("activation") != "relu6":
        return value
    at_end = relu6_high(value.q_scale(), value.q_zero_point()) == HIGHEST
    return value if at_end else relu6(value)


class Int8Network(nn.Module):
    """A quantized graph on torch's kernels: normalized (N, C, H, W) floats -> (N, classes) floats.

    The submodules are the nodes', under their names.
    """

    def __init__(self, graph: Graph, tensors: dict, quantization: dict):
        super().__init__()
        self._graph, self._image = graph, quantization["activations"][INPUT]
        modules = [node_module(node, tensors, quantization) for node in graph.nodes]
        self._steps = list(zip(graph.nodes, modules, strict=True))
        for node, module in self._steps:
            place(self, node.name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_values(self, x)[self._steps[-1][0].name].dequantize()


def quantized_values(network: Int8Network, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: quint8} of every node for normalized float images, `input` included."""
    values = {INPUT: torch.quantize_per_tensor(x, **network._image, dtype=torch.quint8)}
    for node, module in network._steps:
        values[node.name] = ran(node, module, [values[name] for name in node.inputs])
    return values


@torch.no_grad()
def int8_module(checkpoint: dict, engine: str | None = None) -> Int8Network:
    """The runnable network of an int8 checkpoint, for its own engine unless another is named.

    Raises UserError when this torch lacks the engine or the tensors do not fit.
    """
    quantization = checkpoint["quantization"]
    set_engine(engine or quantization["engine"])
    try:
        graph = from_plain(checkpoint["graph"])
        model = Int8Network(graph, checkpoint["tensors"], quantization).eval()
        model(torch.zeros(1, *graph.input_shape))  # what does not fit shows only in a forward
        return model
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the checkpoint's tensors do not fit its network: {reason}") from None


# ---- as devices read them ------------------------------------------------------------------------


def signed(quantized: torch.Tensor) -> torch.Tensor:
    """The int8 tensor of a quint8 one: the same real values, every zero point 128 lower."""
    return (quantized.int_repr().to(torch.int16) - SIGNED_OFFSET).to(torch.int8)


def quantize_images(checkpoint: dict, images: torch.Tensor) -> torch.Tensor:
    """Normalized float (N, C, H, W) -> int8 of the same shape, as the network itself quantizes them."""
    own = checkpoint["quantization"]["activations"][INPUT]
    quantized = torch.quantize_per_tensor(images, own["scale"], own["zero_point"], torch.quint8)
    return signed(quantized)


@torch.no_grad()
def integer_logits(model: Int8Network, images: torch.Tensor) -> torch.Tensor:
    """int8 (N, classes) logits for normalized float images (N, C, H, W)."""
    logits, batches = model._graph.output, images.split(batch_size(model._graph, BATCH))
    return torch.cat([signed(quantized_values(model, part)[logits]) for part in batches])


def with_zeros(checkpoint: dict, share: float) -> dict:
    """A copy whose smallest |weights| are zero, the same share in every layer; not fine-tuned.

    Such a network predicts badly: it is for the cost of zeros, never for an accuracy.
    """
    tensors = dict(checkpoint["tensors"])
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            count = round(share * tensor.numel())
            smallest = tensor.flatten().to(torch.int16).abs().argsort(stable=True)[:count]
            tensors[name] = tensor.flatten().index_fill(0, smallest, 0).view(tensor.shape)
    return {**checkpoint, "tensors": tensors}
