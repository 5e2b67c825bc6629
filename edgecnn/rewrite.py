"""Rewrites of a graph: functions from graph to graph that keep what the network computes.

`pool_before_relu` is for training, `deployed` for everything after it.
"""

from dataclasses import replace

import torch
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from edgecnn.graph import ACTIVATED, INPUT, WEIGHTED, Graph, Node, is_foldable, require

Tensors = dict[str, torch.Tensor]
RELUS = ("relu", "relu6")
MONOTONE = ("max_pool", "flatten")  # a ReLU after one of them is the same before it, exactly
FUSE = {"conv": fuse_conv_bn_weights, "linear": fuse_linear_bn_weights}


def with_nodes(graph: Graph, changes: dict[str, Node | None], instead: dict[str, str]) -> Graph:
    """A copy with nodes replaced or dropped (None), and inputs read from other nodes instead."""
    nodes = [changes.get(node.name, node) for node in graph.nodes]
    renamed = (
        replace(node, inputs=tuple(instead.get(name, name) for name in node.inputs))
        for node in nodes
        if node is not None
    )
    return replace(graph, nodes=tuple(renamed))


def without(graph: Graph, node: Node) -> Graph:
    """A copy without a node of one input: its readers read that input."""
    require(len(graph.nodes) > 1, f"nothing is left without {node.name}")
    return with_nodes(graph, {node.name: None}, {node.name: node.inputs[0]})


def pool_before_relu(graph: Graph) -> Graph:
    """Max-pools before the ReLUs they read: the same values, on fewer elements.

    Exact because both are monotone; the gradients are the same too.
    """
    for relu in reversed(graph.nodes):
        readers = graph.users(relu.name)
        while relu.op in RELUS and [node.op for node in readers] == ["max_pool"]:
            (pool,) = readers
            (source,) = graph[relu.name].inputs
            graph = with_nodes(graph, {}, {pool.name: relu.name})
            moved, nodes = replace(relu, inputs=(pool.name,)), []
            for node in graph.nodes:
                if node.name == pool.name:
                    nodes += [replace(node, inputs=(source,)), moved]
                elif node.name != relu.name:
                    nodes.append(node)
            graph = replace(graph, nodes=tuple(nodes))
            readers = graph.users(relu.name)
    return graph


# ---- the deployed network ------------------------------------------------------------------------


def deployed(graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """The network as devices run it, and its tensors: `deployed_graph`, `folded_tensors`."""
    return deployed_graph(graph), folded_tensors(graph, tensors)


def deployed_graph(graph: Graph) -> Graph:
    """Batch norm folded, dropout gone, each ReLU part of what it follows, all layers with bias.

    Left are conv, linear and add, each with its activation; max_pool, avg_pool, global_avg_pool,
    flatten; and a relu or relu6 where something else reads what it reads. A deployed graph stays as
    it is. Raises GraphError where a batch norm cannot be folded.
    """
    for node in graph.nodes:
        if node.op == "batch_norm":
            require(
                is_foldable(graph, node), f"{node.name} (batch_norm): follows no conv or linear"
            )
        if node.op in ("batch_norm", "dropout"):
            graph = without(graph, graph[node.name])
    graph = replace(graph, nodes=tuple(map(with_bias_and_activation, graph.nodes)))
    for node in graph.nodes:
        if node.op in RELUS:
            graph = fuse_relu(graph, graph[node.name])
    return graph


def with_bias_and_activation(node: Node) -> Node:
    """The same node with all the options of a deployed one."""
    options = ({"activation": "none"} if node.op in ACTIVATED else {}) | node.options
    return replace(node, options=options | ({"bias": 1} if node.op in WEIGHTED else {}))


def fuse_relu(graph: Graph, relu: Node) -> Graph:
    """A copy in which a ReLU is the activation of what it follows; the same graph if it cannot be."""
    source = relu.inputs[0]
    while source != INPUT and len(graph.users(source)) == 1:
        producer = graph[source]
        if producer.op in ACTIVATED:
            both = {producer.options["activation"], relu.op}
            activation = "relu6" if "relu6" in both else "relu"
            fused = replace(producer, options=producer.options | {"activation": activation})
            return without(with_nodes(graph, {source: fused}, {}), relu)
        if producer.op not in MONOTONE:
            break
        source = producer.inputs[0]
    return graph


def folded_tensors(graph: Graph, tensors: Tensors) -> Tensors:
    """`<node>.weight` and `<node>.bias` of every conv and linear, float32, batch norm folded.

    Formula: Jacob et al., CVPR 2018 (arXiv 1712.05877), section 3.2. A weight of zero stays zero.
    """
    norms = {node.inputs[0]: node for node in graph.nodes if node.op == "batch_norm"}
    folded = {}
    for node in graph.nodes:
        if node.op not in WEIGHTED:
            continue
        weight, bias = tensors[f"{node.name}.weight"], tensors.get(f"{node.name}.bias")
        if node.name in norms:
            norm = norms[node.name]
            names = ("running_mean", "running_var", "weight", "bias")
            mean, var, scale, shift = (tensors[f"{norm.name}.{name}"] for name in names)
            fuse, eps = FUSE[node.op], norm.options["eps"]
            weight, bias = fuse(weight, bias, mean, var, eps, scale, shift)
        elif bias is None:
            bias = weight.new_zeros(weight.shape[0])
        folded |= {f"{node.name}.weight": weight.detach(), f"{node.name}.bias": bias.detach()}
    return folded
