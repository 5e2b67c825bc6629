"""A graph as an ordinary module: nn.Conv2d, nn.BatchNorm2d, nn.Linear ... under the graph's names.

So torch.nn.utils.prune, mac_hooks, state_dict and channels_last work on it as on any network.
"""

import torch
import torch.nn.functional as F
from torch import nn

from edgecnn.graph import INPUT, Graph, GraphError, Shape, require, shapes_of

COUNTER = "num_batches_tracked"  # of a batch norm, which a fixed momentum never reads
ACTIVATION = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}


class Add(nn.Module):
    """The sum of two activations of one shape."""

    def forward(self, a, b):
        return a + b


# ---- one operation each: the module of a node that reads `shape` and has the options `o` ---------


def conv_module(shape: Shape, o: dict) -> nn.Module:
    window = {key: o[key] for key in ("stride", "padding", "groups")}
    return nn.Conv2d(shape[0], o["outputs"], o["kernel"], **window, bias=bool(o["bias"]))


def linear_module(shape: Shape, o: dict) -> nn.Module:
    return nn.Linear(shape[0], o["outputs"], bias=bool(o["bias"]))


def batch_norm_module(shape: Shape, o: dict) -> nn.Module:
    kind = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    return kind(shape[0], eps=o["eps"], momentum=o["momentum"])


MODULES = {
    "conv": conv_module,
    "linear": linear_module,
    "batch_norm": batch_norm_module,
    "relu": lambda shape, o: nn.ReLU(),
    "relu6": lambda shape, o: nn.ReLU6(),
    "max_pool": lambda shape, o: nn.MaxPool2d(o["kernel"], o["stride"], o["padding"]),
    "avg_pool": lambda shape, o: nn.AvgPool2d(o["kernel"], o["stride"]),
    "global_avg_pool": lambda shape, o: nn.AdaptiveAvgPool2d(1),
    "add": lambda shape, o: Add(),
    "flatten": lambda shape, o: nn.Flatten(),
    "dropout": lambda shape, o: nn.Dropout(o["share"]),
}


# ---- the network -----------------------------------------------------------------------------------


class Network(nn.Module):
    """(N, C, H, W) images -> (N, classes) logits, as the graph says; a child a node."""

    def __init__(self, graph: Graph):
        super().__init__()
        self._graph = graph
        # what nothing reads any more is let go, so that evaluation holds few activations at a time
        last = {name: node.name for node in graph.nodes for name in node.inputs}
        self._spent = {n.name: [i for i in set(n.inputs) if last[i] == n.name] for n in graph.nodes}
        shapes = shapes_of(graph)
        for node in graph.nodes:
            place(self, node.name, MODULES[node.op](shapes[node.inputs[0]], node.options))

    def forward(self, x, observers=None):
        """The logits; observers: {node: a function that is called with what the node gives}."""
        values, observers = {INPUT: x}, observers or {}
        for node in self._graph.nodes:
            y = self.get_submodule(node.name)(*(values[name] for name in node.inputs))
            values[node.name] = ACTIVATION[node.options.get("activation", "none")](y)
            if node.name in observers:
                observers[node.name](values[node.name])
            for name in self._spent[node.name]:
                del values[name]
        return values[self._graph.output]


def place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` the submodule of a dotted name; raises GraphError where torch uses the name."""
    *path, last = name.split(".")
    parent = root
    for part in path:
        if part not in parent._modules:
            add_child(parent, part, nn.Module(), name)
        parent = parent._modules[part]
    below = parent._modules.pop(last, nn.Module())  # of names that go on where this one ends
    add_child(parent, last, module, name)
    for part, child in below._modules.items():
        add_child(module, part, child, name)


def add_child(parent: nn.Module, part: str, child: nn.Module, name: str) -> None:
    """Add a submodule; raises GraphError where its name is one of torch's own."""
    require(not hasattr(parent, part), f"{name}: torch.nn.Module has a use for the name {part}")
    parent.add_module(part, child)


def module_of(graph: Graph, tensors: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """The graph as a module in training mode, with `tensors` in it, else freshly initialised.

    Its state_dict has the names of graph.tensor_shapes, and BN's counters. With tensors, torch's
    random state stays as it is. Raises GraphError where names or shapes do not fit.
    """
    if tensors is None:
        return Network(graph)
    with torch.random.fork_rng(devices=[]):
        network = Network(graph)
    counters = {k: t for k, t in network.state_dict().items() if k.endswith(f".{COUNTER}")}
    try:
        network.load_state_dict(counters | tensors)
    except RuntimeError as error:
        raise GraphError(f"the tensors do not fit: {' '.join(str(error).split())}") from None
    return network


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a module without BN's counters: the tensors that its graph names."""
    state = module.state_dict().items()
    return {name: tensor for name, tensor in state if not name.endswith(f".{COUNTER}")}
