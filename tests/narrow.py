"""Small deployed graphs for the tests, quantized with random weights; every value can be read out."""

import math

import torch

from edgecnn.graph import INPUT, Graph, Node, from_plain, shapes_of, tensor_shapes, to_plain
from edgecnn.quantized import quantize, quantize_images

DATA = {"name": "random", "classes": ["a", "b"], "mean": [0.5], "std": [0.5]}


def pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def conv(outputs, kernel, stride=1, padding=0, groups=1, activation="none") -> tuple[str, dict]:
    window = {"kernel": pair(kernel), "stride": pair(stride), "padding": pair(padding)}
    options = {"outputs": outputs, **window, "groups": groups, "bias": 1, "activation": activation}
    return "conv", options


def linear(outputs, activation="none") -> tuple[str, dict]:
    return "linear", {"outputs": outputs, "bias": 1, "activation": activation}


def max_pool(kernel, stride, padding=0) -> tuple[str, dict]:
    window = {"kernel": pair(kernel), "stride": pair(stride), "padding": pair(padding)}
    return "max_pool", window


def avg_pool(kernel, stride) -> tuple[str, dict]:
    return "avg_pool", {"kernel": pair(kernel), "stride": pair(stride)}


def graph_of(input_shape, *steps) -> Graph:
    """A graph of (op, options) steps, each on the one before, or (op, options, inputs); n0, n1, ...

    It may end in a map, which `read_out` makes logits.
    """
    nodes: list[Node] = []
    for index, (op, options, *inputs) in enumerate(steps):
        sources = tuple(inputs[0]) if inputs else (nodes[-1].name if nodes else INPUT,)
        nodes.append(Node(f"n{index}", op, sources, options))
    return Graph(tuple(input_shape), tuple(nodes))


def random_tensors(graph: Graph, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float weights that keep the size of the activations, and biases that do not vanish."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        * (math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.3)
        for name, shape in tensor_shapes(graph).items()
    }


def random_images(graph: Graph, count: int = 16, seed: int = 1) -> torch.Tensor:
    """Normalized float images (count, C, H, W)."""
    return torch.randn(count, *graph.input_shape, generator=torch.Generator().manual_seed(seed))


def quantized(graph: Graph, tensors=None, engine: str = "qnnpack", seed: int = 0) -> dict:
    """An int8 checkpoint of a graph, calibrated on random_images."""
    tensors = random_tensors(graph, seed) if tensors is None else tensors
    integers, quantization = quantize(graph, tensors, [random_images(graph)], engine)
    stored = {"tensors": integers, "quantization": quantization, "data": DATA}
    return {"graph": to_plain(graph), "precision": "int8", **stored}


def read_out(graph: Graph, tensors=None, engine: str = "qnnpack", seed: int = 0) -> dict:
    """`quantized`, with a flatten and an identity behind the last map, so that logits show it.

    127 * (q - zero) at the weight's scale 1 / 127 and the input's own scale is q - zero again.
    """
    checkpoint = quantized(graph, tensors, engine, seed)
    features = math.prod(shapes_of(graph)[graph.output])
    flat = Node("flat", "flatten", (graph.output,))
    out = Node("out", "linear", ("flat",), {"outputs": features, "bias": 1, "activation": "none"})
    checkpoint["graph"] = to_plain(Graph(graph.input_shape, (*graph.nodes, flat, out)))
    checkpoint["tensors"]["out.weight"] = 127 * torch.eye(features, dtype=torch.int8)
    checkpoint["tensors"]["out.bias"] = torch.zeros(features)
    own = checkpoint["quantization"]["activations"]
    own["flat"] = own["out"] = own[graph.output]
    checkpoint["quantization"]["weights"]["out"] = [1 / 127]
    return checkpoint


def device_images(checkpoint: dict) -> torch.Tensor:
    """random_images as int8 (N, C, H, W)."""
    return quantize_images(checkpoint, random_images(from_plain(checkpoint["graph"])))


RELU6 = ("relu6", {})
# One graph an operation: the options that it has, odd sides, every kind of padding.
GRAPHS = {
    "conv 1x1": graph_of((3, 5, 4), conv(4, 1)),
    "conv 3x3": graph_of((3, 6, 7), conv(5, 3, padding=1, activation="relu")),
    "conv 5x3 stride 2": graph_of((2, 9, 6), conv(3, (5, 3), 2, (2, 1))),
    "conv stride 1x2 padding 2": graph_of(
        (1, 5, 8), conv(4, (3, 5), (1, 2), 2, activation="relu6")
    ),
    "depthwise": graph_of((4, 7, 6), conv(4, 3, 1, 1, groups=4, activation="relu")),
    "depthwise stride 2": graph_of((4, 8, 7), conv(4, 3, 2, 1, groups=4)),
    "depthwise x2": graph_of((3, 5, 5), conv(6, 3, 2, 0, groups=3)),
    "linear": graph_of((2, 3, 4), ("flatten", {}), linear(7, "relu"), linear(5)),
    "linear relu6": graph_of((2, 3, 4), ("flatten", {}), linear(7, "relu6")),
    "max_pool": graph_of((3, 7, 6), conv(3, 1), max_pool(2, 2)),
    "max_pool padded": graph_of((3, 8, 6), conv(3, 1), max_pool(3, 2, 1)),
    "max_pool padded relu": graph_of((3, 8, 7), conv(3, 1, activation="relu"), max_pool(3, 2, 1)),
    "max_pool 1x1": graph_of((3, 5, 4), max_pool(1, 2)),
    "avg_pool": graph_of((3, 8, 7), avg_pool((3, 4), 2)),
    "global_avg_pool": graph_of((3, 5, 7), conv(4, 1), ("global_avg_pool", {})),
    "relu alone": graph_of((3, 4, 4), conv(4, 1), ("relu", {})),
    "relu6 alone": graph_of((3, 4, 4), conv(4, 1), RELU6, conv(2, 1)),
    "add": graph_of(
        (3, 5, 4),
        conv(4, 1),
        conv(4, 3, 1, 1),
        ("add", {"activation": "none"}, ("n0", "n1")),
    ),
    "add relu": graph_of(
        (3, 5, 4),
        conv(4, 1, activation="relu"),
        conv(4, 3, 1, 1),
        ("add", {"activation": "relu"}, ("n1", "n0")),
    ),
    "add to itself": graph_of((2, 3, 3), ("add", {"activation": "relu6"}, ("input", "input"))),
}
