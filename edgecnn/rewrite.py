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


def pool_before_relu(graph: Graph) -> Graph:
    """Max-pools before the ReLUs they read: the same values, on fewer elements.

    Exact because both are monotone; the gradients are the same too.
    """
    for relu in reversed(graph.nodes):
        readers = graph.users(relu.name)
        while relu.op in RELUS and [node.op for node in readers] == ["max_pool"]:
            (pool,) = readers
            (source,) = graph[relu.name].inputs
            moved, nodes = replace(relu, inputs=(pool.name,)), []
            for node in graph.nodes:
                inputs = tuple(relu.name if name == pool.name else name for name in node.inputs)
                node = replace(node, inputs=inputs)
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
    return fused(replace(graph, nodes=tuple(map(with_bias_and_activation, kept_nodes(graph)))))


def kept_nodes(graph: Graph) -> list[Node]:
    """The nodes without batch norm and dropout; their readers read what those read."""
    instead: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        inputs = tuple(instead.get(name, name) for name in node.inputs)
        if node.op == "batch_norm":
            foldable = is_foldable(graph, node)
            require(foldable, f"{node.name} (batch_norm): follows no conv or linear")
        if node.op in ("batch_norm", "dropout"):
            instead[node.name] = inputs[0]
        else:
            kept.append(replace(node, inputs=inputs))
    require(bool(kept), "nothing but batch norm and dropout")
    return kept


def with_bias_and_activation(node: Node) -> Node:
    """The same node with all the options of a deployed one."""
    options = ({"activation": "none"} if node.op in ACTIVATED else {}) | node.options
    return replace(node, options=options | ({"bias": 1} if node.op in WEIGHTED else {}))


def fused(graph: Graph) -> Graph:
    """A copy in which each ReLU is part of what it follows, where nothing else reads that."""
    nodes: dict[str, Node] = {}
    producers: dict[str, str] = {}  # value -> the one before it that an activation may be part of
    readers = {name: len(graph.users(name)) for name in (INPUT, *(n.name for n in graph.nodes))}
    instead: dict[str, str] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(instead.get(name, name) for name in node.inputs))
        source = node.inputs[0]
        producer = producers.get(source) if readers[source] == 1 else None
        if node.op in RELUS and producer is not None:
            before = nodes[producer]
            both = {before.options["activation"], node.op}
            activation = "relu6" if "relu6" in both else "relu"
            nodes[producer] = replace(before, options=before.options | {"activation": activation})
            instead[node.name], readers[source] = source, readers[node.name]
            continue
        nodes[node.name] = node
        if node.op in ACTIVATED:
            producers[node.name] = node.name
        elif node.op in MONOTONE and producer is not None:
            producers[node.name] = producer
    return replace(graph, nodes=tuple(nodes.values()))


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
