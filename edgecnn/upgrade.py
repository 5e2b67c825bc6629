"""Checkpoints of format version 1, which knew one network by its layers' names, in today's form.

That network is today's `edgecnn` over CIFAR-10. Version 1's INT8 files named its convolutions
`block1` to `block3`, and held its two linear layers as now.
"""

import functools

import torch

from edgecnn.capture import capture
from edgecnn.graph import INPUT, WEIGHTED, Graph, to_plain
from edgecnn.networks import NETWORKS, EdgeCNN
from edgecnn.rewrite import deployed_graph

DATA = {
    "name": "cifar10",
    "classes": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2470, 0.2435, 0.2616],
}


@functools.cache
def float_graph() -> Graph:
    """The trained network of version 1."""
    with torch.random.fork_rng(devices=[]):
        return capture(EdgeCNN(), NETWORKS["edgecnn"].input_shape)[0]


def upgraded(old: dict, graph: Graph, **values) -> dict:
    """What both precisions change."""
    kept = {key: value for key, value in old.items() if key != "architecture"}
    return {**kept, "format_version": 2, "graph": to_plain(graph), "data": dict(DATA), **values}


def upgraded_fp32(old: dict) -> dict:
    """A version-1 fp32 checkpoint, its weights unpacked, as version 2 holds it."""
    return upgraded(old, float_graph())


def upgraded_int8(old: dict) -> dict:
    """A version-1 int8 checkpoint, its weights unpacked, as version 2 holds it."""
    graph, before, tensors = deployed_graph(float_graph()), old["quantization"], {}
    image = {"scale": before["input_scale"], "zero_point": before["input_zero_point"]}
    activations, weights = {INPUT: image}, {}
    for node in graph.nodes:
        activations[node.name] = activations[node.inputs[0]]
        if node.op in WEIGHTED:
            name = node.name.removesuffix(".conv")
            own = before["layers"][name]
            found = {"scale": own["output_scale"], "zero_point": own["output_zero_point"]}
            activations[node.name], weights[node.name] = found, own["weight_scale"]
            for kind in ("weight", "bias"):
                tensors[f"{node.name}.{kind}"] = old["tensors"][f"{name}.{kind}"]
    quantization = {"engine": before["engine"], "activations": activations, "weights": weights}
    return upgraded(old, graph, tensors=tensors, quantization=quantization)
