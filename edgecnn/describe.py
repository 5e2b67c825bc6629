"""A graph as text: its layers as devices run them, what each costs, and the memory it takes."""

import math

import torch

from edgecnn.energy import modelled_energy
from edgecnn.graph import INPUT, Graph, Node, macs_of, shapes_of, tensor_shapes, weights_of
from edgecnn.module import Network
from edgecnn.rewrite import deployed_graph, folded_tensors
from mac_hooks import aligned

HEADER = ("layer", "operation", "output", "MACs", "parameters", "zeros %")


def describe(graph: Graph, tensors: dict[str, torch.Tensor] | None = None) -> str:
    """A table of the deployed layers, one a line, with totals; the share of zeros with `tensors`.

    MACs and parameters count zeros too; a parameter is a weight or a bias, batch norm folded.
    """
    small = deployed_graph(graph)
    shapes, macs, weights = shapes_of(small), macs_of(small), weights_of(small)
    tensor = tensor_shapes(small)
    parameters = {name: n + math.prod(tensor[f"{name}.bias"]) for name, n in weights.items()}
    zeros = dict.fromkeys(macs, 0)
    if tensors is not None:
        folded = folded_tensors(graph, tensors)
        zeros = {name: int((folded[f"{name}.weight"] == 0).sum()) for name in macs}
    lines = [HEADER]
    for node in small.nodes:
        counts = ("", "", "")
        if node.name in macs:
            share = 100 * zeros[node.name] / weights[node.name]
            counts = f"{macs[node.name]:,}", f"{parameters[node.name]:,}", f"{share:.1f}"
        lines.append((node.name, operation(node), by(shapes[node.name]), *counts))
    share = 100 * sum(zeros.values()) / max(1, sum(weights.values()))
    total = f"{sum(macs.values()):,}", f"{sum(parameters.values()):,}", f"{share:.1f}"
    lines.append(("total", "", "", *total))
    if tensors is None:
        lines = [line[:-1] for line in lines]
    with torch.device("meta"):  # nothing is computed
        peak = modelled_energy(Network(small), small.input_shape).peak_activations
    memory = f"activations alive at one time: at most {peak:,} ({peak / 1024:.1f} KiB in INT8)"
    return f"image {by(shapes[INPUT])}\n{aligned(lines, 3)}\n{memory}"


def operation(node: Node) -> str:
    """What a node does in a few words: `conv 3x3 stride 2 depthwise, relu6`."""
    o, words = node.options, [node.op]
    if "kernel" in o:
        words.append(by(o["kernel"]))
        words += [f"stride {by(o['stride'])}"] if tuple(o["stride"]) != (1, 1) else []
    words += ["depthwise"] if o.get("groups", 1) > 1 else []
    activation = o.get("activation", "none")
    return " ".join(words) + (f", {activation}" if activation != "none" else "")


def by(sides) -> str:
    """(16, 32, 32) -> `16x32x32`."""
    return "x".join(map(str, sides))
