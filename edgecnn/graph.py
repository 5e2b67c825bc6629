"""A network as data: a list of nodes, each an operation on earlier ones, and a shape for each weight.

Every step after training reads this list; none needs the Python code of the network. Nodes stand in
the order in which they run, the last one gives the logits, and `input` names the image.

  operation     options                                      tensors
  conv          outputs kernel stride padding groups bias    weight (O, I / groups, kh, kw), bias (O,)
  linear        outputs bias                                 weight (O, I), bias (O,)
  batch_norm    eps momentum                                 weight bias running_mean running_var (C,)
  max_pool      kernel stride padding
  avg_pool      kernel stride
  dropout       share
  relu, relu6, add, flatten, global_avg_pool

Pairs are (rows, columns). A batch norm follows a conv or a linear that nothing else reads, so that it
can be folded into it. `conv`, `linear` and `add` take an `activation` too, none, relu or relu6:
that of the deployed network, where batch norm is folded and dropout gone (edgecnn/rewrite.py).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

INPUT = "input"
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")  # torch.nn.Sequential names by number
NAME_LENGTH = 200
ACTIVATIONS = ("none", "relu", "relu6")
# Bounds of what a file may ask for, far above any microcontroller: nodes; a side; values of one map
# and of all weights; values of all maps, and multiplications, of one image.
MAX_NODES, MAX_SIDE, MAX_VALUES = 1000, 65_536, 2**24
MAX_ACTIVATIONS, MAX_MACS = 2**26, 2**32
BATCH_VALUES = 2**28  # activations of the images that are evaluated at once: 1 GiB of float32

Shape = tuple[int, ...]  # of one example: (C, H, W), or (features,) once flat


class GraphError(ValueError):
    """A list of nodes that is no network; the message names the node and what is wrong."""


@dataclass(frozen=True)
class Node:
    """One operation: the inputs are names of earlier nodes, or `input`."""

    name: str
    op: str
    inputs: tuple[str, ...]
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Nodes in running order over one image of `input_shape` (C, H, W)."""

    input_shape: tuple[int, int, int]
    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Node:
        """The node of that name; raises KeyError."""
        return self._named[name]

    @property
    def output(self) -> str:
        """The name of the node that gives the logits."""
        return self.nodes[-1].name

    def users(self, name: str) -> list[Node]:
        """The nodes that read what `name` gives, in running order."""
        return self._readers.get(name, [])

    @cached_property
    def _named(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _readers(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return found


# ---- the operations: shape and tensors -----------------------------------------------------------


def window_shape(shape: Shape, kernel, stride, padding=(0, 0)) -> tuple[int, int]:
    """(rows, columns) of windows over (C, H, W): floor((n + 2 p - k) / s) + 1 each."""
    padded = [n + 2 * p for n, p in zip(shape[1:], padding, strict=True)]
    require(shape[0] * math.prod(padded) <= MAX_VALUES, "its padded input is too large")
    sides = zip(shape[1:], kernel, stride, padding, strict=True)
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sides)


def conv_shape(shapes, o) -> Shape:
    (shape,) = shapes
    require(len(shape) == 3, "takes a map (C, H, W)")
    groups = o["groups"]
    require(groups in (1, shape[0]), f"groups {groups} is neither 1 nor its {shape[0]} channels")
    require(o["outputs"] % groups == 0, "its outputs are no multiple of its groups")
    return o["outputs"], *window_shape(shape, o["kernel"], o["stride"], o["padding"])


def conv_tensors(shapes, o) -> dict[str, Shape]:
    weight = (o["outputs"], shapes[0][0] // o["groups"], *o["kernel"])
    return {"weight": weight} | ({"bias": (o["outputs"],)} if o["bias"] else {})


def linear_shape(shapes, o) -> Shape:
    require(len(shapes[0]) == 1, "takes flat features; flatten the map before it")
    return (o["outputs"],)


def linear_tensors(shapes, o) -> dict[str, Shape]:
    weight = {"weight": (o["outputs"], shapes[0][0])}
    return weight | ({"bias": (o["outputs"],)} if o["bias"] else {})


def batch_norm_tensors(shapes, o) -> dict[str, Shape]:
    names = ("weight", "bias", "running_mean", "running_var")
    return dict.fromkeys(names, (shapes[0][0],))


def pool_shape(shapes, o) -> Shape:
    (shape,) = shapes
    require(len(shape) == 3, "takes a map (C, H, W)")
    padding = o.get("padding", (0, 0))
    require(all(2 * p <= k for p, k in zip(padding, o["kernel"], strict=True)), "pads too much")
    return shape[0], *window_shape(shape, o["kernel"], o["stride"], padding)


def global_avg_pool_shape(shapes, o) -> Shape:
    require(len(shapes[0]) == 3, "takes a map (C, H, W)")
    return shapes[0][0], 1, 1


def add_shape(shapes, o) -> Shape:
    require(shapes[0] == shapes[1], f"adds {shapes[0]} and {shapes[1]}")
    return shapes[0]


def same_shape(shapes, o) -> Shape:
    return shapes[0]


def flat_shape(shapes, o) -> Shape:
    return (math.prod(shapes[0]),)


def no_tensors(shapes, o) -> dict[str, Shape]:
    return {}


class Operation(NamedTuple):
    """What a node of one kind takes and gives."""

    shape: Callable[[list[Shape], dict], Shape]
    options: dict[str, str] = {}  # name -> kind, one of KINDS
    tensors: Callable[[list[Shape], dict], dict[str, Shape]] = no_tensors
    arity: int = 1


def is_count(value) -> bool:
    """Whether a value from a file is a number of channels, rows or columns."""
    return type(value) is int and 1 <= value <= MAX_SIDE


# What an option may be, and in words.
KINDS = {
    "count": (is_count, f"a whole number from 1 to {MAX_SIDE:,}"),
    "pair": (lambda v: is_pair(v, 1), "two whole numbers from 1"),
    "padding": (lambda v: is_pair(v, 0), "two whole numbers from 0"),
    "flag": (lambda v: type(v) is int and v in (0, 1), "0 or 1"),
    "positive": (lambda v: type(v) is float and 0 < v < 1, "a float above 0 and below 1"),
    "share": (lambda v: type(v) is float and 0 <= v < 1, "a float from 0 to below 1"),
    "activation": (lambda v: v in ACTIVATIONS, "one of " + ", ".join(ACTIVATIONS)),
}
WINDOW = {"kernel": "pair", "stride": "pair"}
OPERATIONS = {
    "conv": Operation(
        conv_shape,
        {"outputs": "count", **WINDOW, "padding": "padding", "groups": "count", "bias": "flag"},
        conv_tensors,
    ),
    "linear": Operation(linear_shape, {"outputs": "count", "bias": "flag"}, linear_tensors),
    "batch_norm": Operation(
        same_shape, {"eps": "positive", "momentum": "positive"}, batch_norm_tensors
    ),
    "relu": Operation(same_shape),
    "relu6": Operation(same_shape),
    "max_pool": Operation(pool_shape, {**WINDOW, "padding": "padding"}),
    "avg_pool": Operation(pool_shape, WINDOW),
    "global_avg_pool": Operation(global_avg_pool_shape),
    "add": Operation(add_shape, arity=2),
    "flatten": Operation(flat_shape),
    "dropout": Operation(same_shape, {"share": "share"}),
}
ACTIVATED = ("conv", "linear", "add")  # the operations that an activation may be part of
WEIGHTED = ("conv", "linear")  # those that own MACs


def is_pair(value, low: int) -> bool:
    """Whether a value is a list or tuple of two integers from `low`."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(type(n) is int and low <= n <= MAX_SIDE for n in value)
    )


def require(holds: bool, problem: str) -> None:
    """Raise GraphError with the problem unless it holds."""
    if not holds:
        raise GraphError(problem)


# ---- what follows from the nodes -----------------------------------------------------------------


def shapes_of(graph: Graph) -> dict[str, Shape]:
    """{node name: shape of its output for one image}, `input` included; raises GraphError."""
    shapes: dict[str, Shape] = {INPUT: tuple(graph.input_shape)}
    require(math.prod(graph.input_shape) <= MAX_VALUES, "the image is too large")
    for node in graph.nodes:
        try:
            shape = OPERATIONS[node.op].shape([shapes[name] for name in node.inputs], node.options)
            require(min(shape) >= 1, "its input is too small for it")
            require(math.prod(shape) <= MAX_VALUES, "its output is too large")
        except GraphError as error:
            raise GraphError(f"{node.name} ({node.op}): {error}") from None
        shapes[node.name] = shape
    return shapes


def tensor_shapes(graph: Graph) -> dict[str, Shape]:
    """{"<node>.<tensor>": shape} of every tensor of a checkpoint of this graph, in running order."""
    shapes = shapes_of(graph)
    found = {}
    for node in graph.nodes:
        tensors = OPERATIONS[node.op].tensors([shapes[n] for n in node.inputs], node.options)
        found |= {f"{node.name}.{tensor}": shape for tensor, shape in tensors.items()}
    require(sum(map(math.prod, found.values())) <= MAX_VALUES, "the network has too many weights")
    return found


def weights_of(graph: Graph) -> dict[str, int]:
    """{node name: how many weights it has, biases apart} of what owns MACs."""
    shapes, layers = tensor_shapes(graph), (n.name for n in graph.nodes if n.op in WEIGHTED)
    return {name: math.prod(shapes[f"{name}.weight"]) for name in layers}


def activations_of(graph: Graph) -> int:
    """The values of all activations of one image, `input` included."""
    return sum(map(math.prod, shapes_of(graph).values()))


def batch_size(graph: Graph, most: int) -> int:
    """How many images to evaluate at once: at most `most`, and BATCH_VALUES activations."""
    return max(1, min(most, BATCH_VALUES // activations_of(graph)))


def check_work(graph: Graph) -> None:
    """Raise GraphError where one image would take too much memory or time."""
    shapes, work = shapes_of(graph), sum(macs_of(graph).values())
    require(activations_of(graph) <= MAX_ACTIVATIONS, "it has too many activations")
    for node in graph.nodes:
        if "kernel" in node.options and node.op not in WEIGHTED:
            work += math.prod(shapes[node.name]) * math.prod(node.options["kernel"])
    require(work <= MAX_MACS, f"it takes {work:,} multiplications an image")


def macs_of(graph: Graph) -> dict[str, int]:
    """{node name: multiplications of one inference, zeros included} of what owns MACs."""
    shapes = shapes_of(graph)
    return {name: n * math.prod(shapes[name][1:]) for name, n in weights_of(graph).items()}


# ---- plain values, as a checkpoint holds them ----------------------------------------------------


def to_plain(graph: Graph) -> dict:
    """Dicts, lists, text and numbers alone; `from_plain` inverts it."""
    nodes = [
        {"name": n.name, "op": n.op, "inputs": list(n.inputs), "options": plain_options(n.options)}
        for n in graph.nodes
    ]
    return {"input_shape": list(graph.input_shape), "nodes": nodes}


def plain_options(options: dict) -> dict:
    """Options with tuples as lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def from_plain(plain) -> Graph:
    """The graph of plain values from a file, every one of them checked; raises GraphError."""
    require(isinstance(plain, dict) and plain.keys() == {"input_shape", "nodes"}, "no graph")
    shape, nodes = plain["input_shape"], plain["nodes"]
    sides = isinstance(shape, list) and len(shape) == 3
    require(sides and all(map(is_count, shape)), "its input shape is not [C, H, W]")
    require(isinstance(nodes, list) and 1 <= len(nodes) <= MAX_NODES, "its nodes are no list")
    known, checked = {INPUT}, []
    for node in nodes:
        checked.append(checked_node(node, known))
        known.add(checked[-1].name)
    graph = Graph(tuple(shape), tuple(checked))
    unread = known - {INPUT, graph.output} - {n for node in checked for n in node.inputs}
    require(not unread, f"nothing reads {', '.join(sorted(unread))}")
    for node in checked:
        require(
            node.op != "batch_norm" or is_foldable(graph, node),
            f"{node.name} (batch_norm): does not follow a conv or a linear that nothing else reads",
        )
    check_work(graph)
    shape = shapes_of(graph)[graph.output]
    require(len(shape) == 1, f"{graph.output} gives {shape}, not one number a class")
    return graph


def is_foldable(graph: Graph, norm: Node) -> bool:
    """Whether a batch norm follows a conv or a linear, without activation, that nothing else reads."""
    (source,) = norm.inputs
    if source == INPUT or graph[source].op not in WEIGHTED or len(graph.users(source)) > 1:
        return False
    return graph[source].options.get("activation", "none") == "none"


def checked_node(node, known: set[str]) -> Node:
    """A node from plain values whose inputs are among `known`; raises GraphError."""
    require(
        isinstance(node, dict) and node.keys() == {"name", "op", "inputs", "options"}, "no node"
    )
    name, op, inputs, options = (node[key] for key in ("name", "op", "inputs", "options"))
    named = isinstance(name, str) and len(name) <= NAME_LENGTH and NAME.fullmatch(name)
    require(bool(named), "a node has no proper name")
    require(name not in known, f"{name} stands twice")
    require(isinstance(op, str) and op in OPERATIONS, f"{name}: unknown operation")
    operation = OPERATIONS[op]
    require(
        isinstance(inputs, list)
        and len(inputs) == operation.arity
        and all(isinstance(i, str) and i in known for i in inputs),
        f"{name} ({op}): its inputs are not {operation.arity} earlier nodes",
    )
    kinds = operation.options | ({"activation": "activation"} if op in ACTIVATED else {})
    given = options if isinstance(options, dict) else {}
    optional = {"activation"}
    require(
        isinstance(options, dict) and kinds.keys() - optional <= given.keys() <= kinds.keys(),
        f"{name} ({op}): its options are not {', '.join(kinds) or 'none'}",
    )
    for key, value in given.items():
        right, words = KINDS[kinds[key]]
        require(bool(right(value)), f"{name} ({op}): {key} is {value!a:.40}, not {words}")
    return Node(
        name,
        op,
        tuple(inputs),
        {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()},
    )
