"""An INT8 checkpoint in exact integers: what the C kernels give bit for bit, and no CPU changes.

Activations are torch's quint8 (real = (q - zero point) * scale), weights symmetric int8. A sum is
exact; a requantized value is rint((sum + bias / (input scale * weight scale)) * multiplier), each
step in single precision, as torch's fbgemm computes it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from edgecnn.errors import UserError
from edgecnn.graph import (
    INPUT,
    WEIGHTED,
    Graph,
    GraphError,
    Node,
    batch_size,
    from_plain,
    shapes_of,
)
from edgecnn.quantized import HIGHEST, ROUNDING_LIMIT, SIGNED_OFFSET, relu6_high

SUM_LIMIT = 2**29  # of an int32 accumulator
BATCH = 100  # images whose every value is held at once


class IntegerNode(NamedTuple):
    """A node with the numbers of its arithmetic; see the functions below for how they are used.

    weight: int8, as torch orders it. bias: (O,) float32 in accumulator units. multiplier: float32,
    (O,) for conv and linear, (2,) for add, (1,) for averages. zeros: the inputs' zero points.
    low, high: the range of q after `zero`, the output's zero point, is added.
    """

    node: Node
    shape: tuple[int, ...]
    zeros: tuple[int, ...]
    zero: int
    low: int
    high: int
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    multiplier: np.ndarray | None = None


# ---- numbers -----------------------------------------------------------------------------------


def fbgemm_constants(scales, input_scale: float, output_scale: float, bias: np.ndarray):
    """(multiplier, bias in accumulator units): two (O,) float32, rounded as torch's fbgemm does.

    scales: the weight's, one an output channel, or one in all. Source: ATen/native/quantized/cpu
    (act_times_w_scale) and fbgemm's requantization, which divides the bias for a scale a channel
    and multiplies it by the reciprocal for a scale a tensor.
    """
    scales = np.float32(input_scale) * np.array(scales, np.float32)
    bias = bias / scales if len(scales) > 1 else bias * (np.float32(1) / scales)
    return np.broadcast_to(scales / np.float32(output_scale), bias.shape), bias


def flat_maps(graph: Graph) -> dict[str, tuple[int, int, int]]:
    """{name: the map (C, H, W) that its flat features once were} of all that a flatten still orders.

    torch flattens C, H, W; a device keeps H, W, C. Raises GraphError where that order would show:
    in the logits, or where two maps of other shapes are added.
    """
    shapes, maps = shapes_of(graph), {}
    for node in graph.nodes:
        found = {maps.get(name) or shapes[name] for name in node.inputs}
        if node.op in WEIGHTED or len(shapes[node.name]) == 3:
            continue
        found = {shape for shape in found if len(shape) == 3 and shape[1] * shape[2] > 1}
        if node.op == "add" and found and len({maps.get(name) for name in node.inputs}) > 1:
            raise GraphError(f"{node.name} (add): adds maps that were flattened in other orders")
        maps |= {node.name: found.pop()} if found else {}
    if graph.output in maps:
        raise GraphError(f"{graph.output}: the logits are a flattened map; pool it first")
    return maps


def hwc_columns(weight: np.ndarray, channels: int) -> np.ndarray:
    """Columns of a linear weight (O, C * H * W) reordered for an input flattened as H, W, C."""
    return weight.reshape(len(weight), channels, -1).swapaxes(1, 2).reshape(len(weight), -1)


def weighted_constants(node: Node, tensors: dict, quantization: dict) -> dict:
    """weight, bias and multiplier of a conv or linear; raises ValueError where they overflow."""
    weight, bias = (tensors[f"{node.name}.{key}"].numpy() for key in ("weight", "bias"))
    scales = [quantization["activations"][name]["scale"] for name in (*node.inputs, node.name)]
    sums = HIGHEST * np.abs(weight.reshape(len(weight), -1).astype(np.int64)).sum(axis=1)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        multiplier, bias = fbgemm_constants(quantization["weights"][node.name], *scales, bias)
        largest = (sums + np.abs(bias)) * multiplier
    if not (np.all(largest < ROUNDING_LIMIT) and sums.max() < SUM_LIMIT):
        raise ValueError("can overflow the kernels' arithmetic")
    return {"weight": weight, "bias": bias, "multiplier": multiplier}


def add_constants(node: Node, tensors: dict, quantization: dict) -> dict:
    """The multipliers of both inputs of an add; raises ValueError where they overflow."""
    activations = quantization["activations"]
    scales = np.array([activations[name]["scale"] for name in node.inputs], np.float32)
    multiplier = scales / np.float32(activations[node.name]["scale"])
    if not HIGHEST * multiplier.astype(np.float64).sum() < ROUNDING_LIMIT:
        raise ValueError("can overflow the kernels' arithmetic")
    return {"multiplier": multiplier}


def average_constants(count: int) -> dict:
    """The multiplier of an average over `count` values."""
    return {"multiplier": np.array([1 / count], np.float32)}


def integer_node(node: Node, shapes: dict, tensors: dict, quantization: dict) -> IntegerNode:
    """One node with its numbers; raises KeyError, TypeError or ValueError where they do not fit."""
    activations, options = quantization["activations"], node.options
    zeros = tuple(activations[name]["zero_point"] for name in node.inputs)
    scale, zero = activations[node.name]["scale"], activations[node.name]["zero_point"]
    active = node.op if node.op in ("relu", "relu6") else options.get("activation", "none")
    low = 0 if active == "none" else zero
    high = relu6_high(scale, zero) if active == "relu6" else HIGHEST
    constants: dict = {}
    if node.op in WEIGHTED:
        constants = weighted_constants(node, tensors, quantization)
    elif node.op == "add":
        constants = add_constants(node, tensors, quantization)
    elif activations[node.inputs[0]] != activations[node.name]:
        raise ValueError("has another scale or zero point than its input")
    if node.op == "avg_pool":
        constants = average_constants(options["kernel"][0] * options["kernel"][1])
    elif node.op == "global_avg_pool":
        _, height, width = shapes[node.inputs[0]]
        constants = average_constants(height * width)
    return IntegerNode(node, shapes[node.name], zeros, zero, low, high, **constants)


def integer_nodes(checkpoint: dict) -> list[IntegerNode]:
    """The nodes of an int8 checkpoint in running order, with the numbers of their arithmetic.

    Raises UserError when the tensors do not fit the graph or the kernels' arithmetic.
    """
    at = "graph"
    try:
        graph = from_plain(checkpoint["graph"])
        shapes, found = shapes_of(graph), []
        flat_maps(graph)
        for node in graph.nodes:
            at = node.name
            tensors, quantization = checkpoint["tensors"], checkpoint["quantization"]
            found.append(integer_node(node, shapes, tensors, quantization))
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"the checkpoint's numbers do not fit its network: {at}: {reason}"
        ) from None
    return found


# ---- the operations: q of the inputs -> q of the output, both in float64 --------------------------


def requantized(sums: torch.Tensor, n: IntegerNode) -> torch.Tensor:
    """Exact sums (N, O, ...) -> q, bias and multiplier along dimension 1."""
    along = (1, -1, 1, 1)[: sums.ndim]
    bias, multiplier = (torch.from_numpy(v.copy()).view(along) for v in (n.bias, n.multiplier))
    rounded = torch.round((sums.float() + bias) * multiplier).double()
    return (rounded + n.zero).clamp(n.low, n.high)


def conv_integer(inputs: list[torch.Tensor], n: IntegerNode) -> torch.Tensor:
    (x,), o = inputs, n.node.options
    weight = torch.from_numpy(n.weight.astype(np.float64))
    sums = F.conv2d(x - n.zeros[0], weight, None, o["stride"], o["padding"], 1, o["groups"])
    return requantized(sums, n)


def linear_integer(inputs: list[torch.Tensor], n: IntegerNode) -> torch.Tensor:
    weight = torch.from_numpy(n.weight.astype(np.float64))
    return requantized((inputs[0] - n.zeros[0]) @ weight.T, n)  # (N, I) -> (N, O)


def add_integer(inputs: list[torch.Tensor], n: IntegerNode) -> torch.Tensor:
    pairs = zip(inputs, n.zeros, n.multiplier.tolist(), strict=True)
    a, b = ((x - zero).float() * multiplier for x, zero, multiplier in pairs)
    return (torch.round(a + b).double() + n.zero).clamp(n.low, n.high)


def relu_integer(inputs: list[torch.Tensor], n: IntegerNode) -> torch.Tensor:
    return inputs[0].clamp(n.low, n.high)


def max_pool_integer(inputs: list[torch.Tensor], n: IntegerNode) -> torch.Tensor:
    o = n.node.options
    return F.max_pool2d(inputs[0], o["kernel"], o["stride"], o["padding"])  # pads with -inf


def average_integer(sums: torch.Tensor, n: IntegerNode) -> torch.Tensor:
    """Exact sums of q - zero point -> q of their average."""
    rounded = torch.round(sums.float() * n.multiplier.item()).double()
    return (rounded + n.zero).clamp(n.low, n.high)


def avg_pool_integer(inputs: list[torch.Tensor], n: IntegerNode) -> torch.Tensor:
    o = n.node.options
    sums = F.avg_pool2d(inputs[0] - n.zero, o["kernel"], o["stride"], divisor_override=1)
    return average_integer(sums, n)


def global_avg_pool_integer(inputs: list[torch.Tensor], n: IntegerNode) -> torch.Tensor:
    return average_integer((inputs[0] - n.zero).sum((2, 3), keepdim=True), n)


def flatten_integer(inputs: list[torch.Tensor], n: IntegerNode) -> torch.Tensor:
    return inputs[0].flatten(1)


INTEGER = {
    "conv": conv_integer,
    "linear": linear_integer,
    "add": add_integer,
    "relu": relu_integer,
    "relu6": relu_integer,
    "max_pool": max_pool_integer,
    "avg_pool": avg_pool_integer,
    "global_avg_pool": global_avg_pool_integer,
    "flatten": flatten_integer,
}


def exact_values(checkpoint: dict, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: q as float64} of every node for int8 images (N, C, H, W), `input` included.

    Float64 holds every sum exactly, so this reference depends on no CPU's instructions.
    """
    values = {INPUT: images.double() + SIGNED_OFFSET}
    for n in integer_nodes(checkpoint):
        inputs = [values[name] for name in n.node.inputs]
        values[n.node.name] = INTEGER[n.node.op](inputs, n)
    return values


def exact_logits(checkpoint: dict, images: torch.Tensor) -> torch.Tensor:
    """The network in exact integers, without C: int8 (N, C, H, W) -> int8 logits (N, classes)."""
    logits = []
    for batch in images.split(batch_size(from_plain(checkpoint["graph"]), BATCH)):
        values = exact_values(checkpoint, batch)
        logits.append(values[next(reversed(values))] - SIGNED_OFFSET)
    return torch.cat(logits).to(torch.int8)
