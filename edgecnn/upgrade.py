"""Checkpoints of format version 1, which knew one network by its layers' names, in today's form.

Version 1 held 3 x (conv 3x3, batch norm, ReLU, 2x2 max-pool) of 3-32-64-128 channels over CIFAR-10,
and two linear layers; its convolutions become `block1.conv` to `block3.conv`.
"""

from edgecnn.graph import INPUT, Graph, Node, to_plain

BLOCKS, LINEAR = ("block1", "block2", "block3"), ("fc1", "fc2")
INPUT_SHAPE = (3, 32, 32)
POOL = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0]}
DATA = {
    "name": "cifar10",
    "classes": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2470, 0.2435, 0.2616],
}


def convolution(outputs: int, bias: int, **more) -> dict:
    """The options of version 1's only kind of convolution."""
    window = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1]}
    return {"outputs": outputs, **window, "groups": 1, "bias": bias, **more}


def float_graph(tensors: dict) -> Graph:
    """The trained network of version 1: its nodes bear the names of its modules."""
    nodes, last = [], INPUT
    for block in BLOCKS:
        outputs = len(tensors[f"{block}.conv.weight"])
        for name, op, options in (
            ("conv", "conv", convolution(outputs, bias=0)),
            ("bn", "batch_norm", {"eps": 1e-5}),
            ("pool", "max_pool", POOL),
            ("relu", "relu", {}),
        ):
            nodes.append(Node(f"{block}.{name}", op, (last,), options))
            last = nodes[-1].name
    nodes.append(Node("flatten", "flatten", (last,)))
    fc1, fc2 = ({"outputs": len(tensors[f"{name}.weight"]), "bias": 1} for name in LINEAR)
    nodes.append(Node("fc1", "linear", ("flatten",), fc1))
    nodes.append(Node("relu", "relu", ("fc1",)))
    nodes.append(Node("fc2", "linear", ("relu",), fc2))
    return Graph(INPUT_SHAPE, tuple(nodes))


def deployed_graph(tensors: dict) -> Graph:
    """The same network folded and fused, as version 1's INT8 files held it."""
    nodes, last = [], INPUT
    for block in BLOCKS:
        options = convolution(len(tensors[f"{block}.weight"]), bias=1, activation="relu")
        nodes.append(Node(f"{block}.conv", "conv", (last,), options))
        nodes.append(Node(f"{block}.pool", "max_pool", (f"{block}.conv",), POOL))
        last = nodes[-1].name
    nodes.append(Node("flatten", "flatten", (last,)))
    for name, source, activation in (("fc1", "flatten", "relu"), ("fc2", "fc1", "none")):
        options = {"outputs": len(tensors[f"{name}.weight"]), "bias": 1, "activation": activation}
        nodes.append(Node(name, "linear", (source,), options))
    return Graph(INPUT_SHAPE, tuple(nodes))


def upgraded_fp32(old: dict) -> dict:
    """A version-1 fp32 checkpoint, its weights unpacked, as version 2 holds it."""
    new = {key: value for key, value in old.items() if key != "architecture"}
    plain = to_plain(float_graph(old["tensors"]))
    return {**new, "format_version": 2, "graph": plain, "data": DATA}


def upgraded_int8(old: dict) -> dict:
    """A version-1 int8 checkpoint, its weights unpacked, as version 2 holds it."""
    graph, before = deployed_graph(old["tensors"]), old["quantization"]
    names = {block: f"{block}.conv" for block in BLOCKS} | {name: name for name in LINEAR}
    activations = {
        INPUT: {"scale": before["input_scale"], "zero_point": before["input_zero_point"]}
    }
    for name, layer in before["layers"].items():
        found = {"scale": layer["output_scale"], "zero_point": layer["output_zero_point"]}
        activations[names[name]] = found
    for node in graph.nodes:
        activations.setdefault(node.name, activations[node.inputs[0]])
    quantization = {
        "engine": before["engine"],
        "activations": activations,
        "weights": {names[n]: layer["weight_scale"] for n, layer in before["layers"].items()},
    }
    tensors = {}
    for key, tensor in old["tensors"].items():
        layer, kind = key.split(".")
        tensors[f"{names[layer]}.{kind}"] = tensor
    new = {key: value for key, value in old.items() if key != "architecture"}
    new |= {"format_version": 2, "graph": to_plain(graph), "data": DATA}
    return {**new, "tensors": tensors, "quantization": quantization}
