"""A user's module becomes a graph: what torch.export sees, operation by operation, or a refusal.

`capture` runs the module in evaluation mode on two images. What the module does in training mode
alone, besides dropout and batch norm, is not seen. Supported is what CAPTURED lists; everything else
ends in one line that names the user's module and the operation.
"""

import contextlib
import io
import itertools
import logging
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx, nn

from edgecnn.errors import UserError
from edgecnn.graph import (
    INPUT,
    OPERATIONS,
    Graph,
    GraphError,
    Node,
    Shape,
    from_plain,
    require,
    shapes_of,
    tensor_shapes,
    to_plain,
)
from edgecnn.module import module_of
from edgecnn.networks import user_line

SUPPORTED = (
    "supported are Conv2d (zero padding, no dilation, groups 1 or depthwise), BatchNorm right after "
    "a Conv2d or Linear, ReLU, ReLU6, MaxPool2d, AvgPool2d, adaptive average pooling, Linear, adding "
    "two activations, flattening, Dropout, a last softmax"
)
BATCH = 2  # images of the example: with one, batch and classes could be confused
TOLERANCE = 1e-4  # of the largest logit, between the module and its graph


def capture(module: nn.Module, input_shape: Shape) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The graph of a module over images (C, H, W), and a copy of its tensors by their own names.

    A last softmax or log-softmax is left out: training and the predicted class need the logits.
    The module is left in evaluation mode, torch's random state as it was. Raises UserError, in one
    line, for whatever cannot be trained or deployed.
    """
    check_parameters(module)
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(BATCH, *input_shape, generator=generator)
    with torch.random.fork_rng(devices=[]):
        answer, program = traced(module.eval(), example)
    build = Builder(module, program, input_shape)
    for node in live_nodes(program.graph):
        build.add(node)
    try:
        graph = from_plain(to_plain(build.finish()))
        names = tensor_shapes(graph)
        unused = [name for name, _ in module.named_parameters() if name not in names]
        require(not unused, f"it never uses {', '.join(unused[:3])}; remove the module")
        state = module.state_dict()
        tensors = {name: state[name].clone() for name in names}
        rebuilt = module_of(graph, tensors).eval()
    except GraphError as error:
        raise UserError(f"this network cannot be deployed: {error}; {SUPPORTED}") from None
    with torch.no_grad():
        difference = (build.last(rebuilt(example)) - answer).abs().max()
    if not difference <= TOLERANCE * max(1.0, answer.abs().max()):
        raise UserError("the network computes something that its list of operations does not show")
    return graph, tensors


def check_classes(graph: Graph, classes: int) -> None:
    """Raise UserError unless the network has an output a class."""
    (outputs,) = shapes_of(graph)[graph.output]
    if outputs != classes:
        raise UserError(
            f"the network ends in {graph.output} with {outputs} outputs, the data have {classes} "
            f"classes; make it end in {classes} (a Name that takes `classes` is given their number)"
        )


def check_parameters(module: nn.Module) -> None:
    """Raise UserError for parameters that would not be trained as they are."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UserError(f"{name} has no shape yet; lazy modules are not supported")
        if parameter.dtype != torch.float32:
            raise UserError(f"{name} is {parameter.dtype}; parameters must be torch.float32")
        if not parameter.requires_grad:
            raise UserError(f"{name} is frozen (requires_grad False); all parameters are trained")


# ---- what torch sees -----------------------------------------------------------------------------


def traced(module: nn.Module, example: torch.Tensor):
    """(the module's answer to the example, its exported program); raises UserError."""
    shape = tuple(example.shape[1:])
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            answer = module(example.clone())  # which it might overwrite
    except Exception as error:  # whatever the user's code raises
        raise UserError(
            f"the network cannot take an image of {shape}: {blame(error, module)}"
        ) from None
    if not isinstance(answer, torch.Tensor):
        kind = f"a {type(answer).__name__}"
        raise UserError(f"the network gives {kind}; supported is one tensor, a logit a class")
    try:
        with quiet():
            program = torch.export.export(module, (example.clone(),))
    except Exception as error:  # torch.export raises many kinds, most of them private
        raise UserError(
            f"torch.export cannot capture the network: {blame(error, module)}; a network must not "
            "decide by the values of its input, nor leave torch"
        ) from None
    return answer, program


def blame(error: Exception, module: nn.Module) -> str:
    """An error's first line, with the innermost module that was running and the user's line."""
    names, running = {id(m): name for name, m in module.named_modules()}, ""
    trace = error.__traceback__
    while trace is not None:
        running = names.get(id(trace.tb_frame.f_locals.get("self")), running)
        trace = trace.tb_next
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    place = user_line(error)
    return f"{describe_module(module, running)}: {line[:300]}{place and f' ({place})'}"


def describe_module(module: nn.Module, path: str) -> str:
    """How a line names a module of the user's: path, and the settings of one without children."""
    part = module.get_submodule(path)
    if path and next(part.children(), None) is None:
        return f"{path} = {' '.join(repr(part).split())[:150]}"
    return f"{path or 'the network'} ({type(part).__name__})"


@contextlib.contextmanager
def quiet():
    """Keep torch.export's warnings and drawings off the user's screen: the refusal is one line."""
    logging.disable(logging.CRITICAL)
    try:
        silent = io.StringIO()
        with (
            contextlib.redirect_stderr(silent),
            contextlib.redirect_stdout(silent),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def line_of(node: fx.Node) -> str:
    """`, nets.py line 12`: where the user's code calls what is traced, or ""."""
    found = re.findall(r'File "(.+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f", {Path(found[-1][0]).name} line {found[-1][1]}" if found else ""


def operation(node: fx.Node) -> str:
    """The plain name of what a traced node does: conv2d, relu, add ..., in place or not."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else getattr(node.target, "__name__", node.target)
    return str(name).rpartition("::")[2].rstrip("_")


def is_in_place(node: fx.Node) -> bool:
    """Whether a traced node overwrites its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def live_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The calls that the output may depend on, in running order."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live or is_in_place(node):
            live |= {node, *node.all_input_nodes}
    return [
        node for node in graph.nodes if node in live and node.op not in ("placeholder", "output")
    ]


def arguments(node: fx.Node) -> dict:
    """The arguments of a traced call by name, defaults included; the first is called `input`."""
    schema = node.target._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    given = defaults | dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return given | {"input": given[schema[0].name]}  # which torch calls `self` here and there


# ---- building the graph --------------------------------------------------------------------------


@dataclass(eq=False)
class Memory:
    """Where an activation lies: the node that wrote it last. Views share it."""

    node: str


class Value(NamedTuple):
    """An activation as the user's code sees it: of `shape`, without the batch, made at `path`."""

    memory: Memory
    shape: Shape
    path: str


class Builder:
    """The graph so far, and which of its nodes holds each activation that was traced."""

    def __init__(self, module: nn.Module, program, input_shape: Shape):
        self.module = module
        signature = program.graph_signature
        self.stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.outputs = signature.user_outputs
        self.shapes: dict[str, Shape] = {INPUT: tuple(input_shape)}
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, Value] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in signature.user_inputs:
                self.values[node] = Value(Memory(INPUT), self.shapes[INPUT], "")
        # names that nodes without weights must leave alone
        self.taken = {INPUT} | {name for name, m in module.named_modules() if not is_plain(m)}
        self.last = lambda logits: logits  # the softmax that is left out

    def add(self, node: fx.Node) -> None:
        """Translate one traced call; raises UserError where it is not supported."""
        *_, (path, _) = [("", None), *node.meta.get("nn_module_stack", {}).values()]
        self.path = path.partition("@")[0]  # "@1" marks a second call
        name = operation(node)
        try:
            require(name in CAPTURED, f"it runs {name}, which is not supported")
            given = arguments(node)
            value = CAPTURED[name](self, node, given)
            traced_shape = tuple(node.meta["val"].shape)
            require(
                traced_shape == (BATCH, *value.shape),
                f"{name} gives {traced_shape[1:]}, not {value.shape} (ceil_mode is not supported)",
            )
        except GraphError as error:
            where = describe_module(self.module, self.path)
            place = "" if "=" in where else line_of(node)
            raise UserError(f"{where}{place}: {error}; {SUPPORTED}") from None
        if is_in_place(node):  # all views of what it overwrites see the result
            memory = self.value(given["input"]).memory
            memory.node = value.memory.node
            value = value._replace(memory=memory)
        self.values[node] = value

    def finish(self) -> Graph:
        """The graph; raises GraphError when the last value is not the one that is returned."""
        by_name = {node.name: value for node, value in self.values.items()}
        require(len(self.outputs) == 1 and self.outputs[0] in by_name, "it gives no activation")
        value = by_name[self.outputs[0]]
        require(len(value.shape) == 1, f"it gives {value.shape}, not one number a class")
        self.flat(value)
        return Graph(self.shapes[INPUT], tuple(self.nodes))

    # what the operations below need

    def value(self, node) -> Value:
        """The activation that an argument is."""
        known = isinstance(node, fx.Node) and node in self.values
        require(known, "it works on something that is no activation")
        return self.values[node]

    def read(self, node) -> str:
        """The graph's node that holds an argument, in the shape in which the user's code sees it."""
        value = self.value(node)
        if len(value.shape) == 1:
            return self.flat(value)
        held = self.shapes[value.memory.node]
        require(value.shape == held, f"a map of {held} seen as {value.shape}")
        return value.memory.node

    def flat(self, value: Value) -> str:
        """The graph's node that holds an activation flattened, made where the user flattens it."""
        source = value.memory.node
        if len(self.shapes[source]) == 1:
            return source
        for node in self.nodes:
            if node.op == "flatten" and node.inputs == (source,):
                return node.name
        return self.make("flatten", [source], {}, path=value.path).memory.node

    def make(self, op: str, inputs: list[str], options: dict, name="", path=None) -> Value:
        """Append a node, named after the user's module where no name is given."""
        if not name:
            path = self.path if path is None else path
            leaf = path and is_plain(self.module.get_submodule(path))
            base = path if leaf else f"{path}.{op}".lstrip(".")
            others = (f"{base}_{count}" for count in itertools.count(2))
            name = next(n for n in itertools.chain([base], others) if n not in self.taken)
        require(name != INPUT, f"a layer must not be called {INPUT}; rename it")
        require(name not in self.shapes, f"{name} is used more than once; give each use its own")
        self.taken.add(name)
        shape = OPERATIONS[op].shape([self.shapes[i] for i in inputs], options)
        require(min(shape) >= 1, "its input is too small for it")
        self.nodes.append(Node(name, op, tuple(inputs), options))
        self.shapes[name] = shape
        return Value(Memory(name), shape, self.path)

    def owner(self, stored: dict[str, fx.Node | None], kind: str) -> str:
        """The module's path that owns the given weights, under the names which torch gives them."""
        owners = set()
        for attribute, node in stored.items():
            known = isinstance(node, fx.Node) and node.name in self.stored
            require(known, f"its {attribute} is computed, not a parameter of an {kind}")
            path, _, name = self.stored[node.name].rpartition(".")
            require(name == attribute, f"its {attribute} is kept as {name}; use an {kind}")
            owners.add(path)
        require(len(owners) == 1, f"its weights belong to {' and '.join(sorted(owners))}")
        require(owners != {""}, f"its weights lie in the network itself; use an {kind} inside it")
        return owners.pop()


def is_plain(module: nn.Module) -> bool:
    """Whether a module has neither children nor tensors of its own: nn.ReLU, nn.MaxPool2d ..."""
    return not (module._modules or module._parameters or module._buffers)


def pair(value) -> tuple[int, int]:
    """torch's one number, or list of one or two, as (rows, columns)."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


# ---- one operation each: a traced call `a` becomes nodes -----------------------------------------


def conv_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    require(pair(a["dilation"]) == (1, 1), f"dilation {pair(a['dilation'])} is not supported")
    kernel = tuple(a["weight"].meta["val"].shape[2:])
    if isinstance(a["padding"], str):  # "same", "valid"
        same = a["padding"] == "same"
        require(
            not same or all(k % 2 for k in kernel), "padding='same' of an even kernel is uneven"
        )
        padding = tuple(k // 2 if same else 0 for k in kernel)
    else:
        padding = pair(a["padding"])
    has_bias = a["bias"] is not None
    stored = {"weight": a["weight"]} | ({"bias": a["bias"]} if has_bias else {})
    options = {
        "outputs": a["weight"].meta["val"].shape[0],
        "kernel": kernel,
        "stride": pair(a["stride"]),
        "padding": padding,
        "groups": a["groups"],
        "bias": int(has_bias),
    }
    return b.make("conv", [b.read(a["input"])], options, b.owner(stored, "nn.Conv2d"))


def linear_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    has_bias = a["bias"] is not None
    stored = {"weight": a["weight"]} | ({"bias": a["bias"]} if has_bias else {})
    options = {"outputs": a["weight"].meta["val"].shape[0], "bias": int(has_bias)}
    return b.make("linear", [b.read(a["input"])], options, b.owner(stored, "nn.Linear"))


def batch_norm_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    require(a["weight"] is not None, "affine=False is not supported")
    statistics = a["running_mean"] is not None and not a["training"]
    require(statistics, "track_running_stats=False is not supported")
    require(0 < a["momentum"] < 1, "its momentum must lie between 0 and 1 (None is not supported)")
    stored = {key: a[key] for key in ("weight", "bias", "running_mean", "running_var")}
    options = {"eps": float(a["eps"]), "momentum": float(a["momentum"])}
    source = b.read(a["input"])
    return b.make("batch_norm", [source], options, b.owner(stored, "nn.BatchNorm2d"))


def relu_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    return b.make("relu", [b.read(a["input"])], {})


def relu6_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    limits = a.get("min_val", 0), a.get("max_val", 6)  # of hardtanh
    require(limits == (0, 6), f"hardtanh between {limits[0]} and {limits[1]} is not supported")
    return b.make("relu6", [b.read(a["input"])], {})


def window(a: dict) -> dict:
    """Kernel and stride of a pool, whose stride is its kernel where none is given."""
    return {"kernel": pair(a["kernel_size"]), "stride": pair(a["stride"] or a["kernel_size"])}


def max_pool_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    require(pair(a["dilation"]) == (1, 1), f"dilation {pair(a['dilation'])} is not supported")
    options = window(a) | {"padding": pair(a["padding"])}
    return b.make("max_pool", [b.read(a["input"])], options)


def avg_pool_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    require(pair(a["padding"]) == (0, 0), "average pooling with padding is not supported")
    require(a["divisor_override"] is None, "divisor_override is not supported")
    return b.make("avg_pool", [b.read(a["input"])], window(a))


def adaptive_avg_pool_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    source, size = b.read(a["input"]), pair(a["output_size"])
    require(len(b.shapes[source]) == 3, "takes a map (C, H, W)")
    sides = b.shapes[source][1:]
    if size == (1, 1):
        return b.make("global_avg_pool", [source], {})
    even = all(side % n == 0 for side, n in zip(sides, size, strict=True))
    require(even, f"pools {sides} to {size}, which does not divide it evenly")
    kernel = tuple(side // n for side, n in zip(sides, size, strict=True))
    return b.make("avg_pool", [source], {"kernel": kernel, "stride": kernel})


def mean_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    """The mean over rows and columns, also where the user's code has joined the two."""
    value = b.value(a["input"])
    source, axes = value.memory.node, len(value.shape) + 1
    held, dims = b.shapes[source], sorted(d % axes for d in a.get("dim") or range(axes))
    whole = len(held) == 3 and value.shape[0] == held[0] and len(value.shape) > 1
    require(whole and dims == list(range(2, axes)), "a mean over anything but rows and columns")
    pooled = b.make("global_avg_pool", [source], {})
    return pooled._replace(shape=tuple(node.meta["val"].shape[1:]))


def add_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    require(a["alpha"] == 1, "an addition with alpha is not supported")
    return b.make("add", [b.read(a["input"]), b.read(a["other"])], {})


def view_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    """Another shape of the same numbers in the same order: told from a flatten where it is read."""
    value, (batch, *shape) = b.value(a["input"]), node.meta["val"].shape
    whole = batch == BATCH and math.prod(shape) == math.prod(value.shape)
    require(whole, f"it gives {(batch, *shape)} of {BATCH} images: each must keep its own numbers")
    return Value(value.memory, tuple(shape), b.path)


def same_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    require(node.meta["val"].dtype == torch.float32, f"{node.meta['val'].dtype} is not supported")
    return b.value(a["input"])


def clone_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    value = b.value(a["input"])
    return value._replace(memory=Memory(value.memory.node))


def dropout_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    require(not a["train"], "dropout that also acts in evaluation is not supported")
    return b.make("dropout", [b.read(a["input"])], {"share": float(a["p"])})


def softmax_captured(b: Builder, node: fx.Node, a: dict) -> Value:
    value = b.value(a["input"])
    last = all(user.op == "output" for user in node.users)
    require(last and len(value.shape) == 1, "only a softmax that ends the network is supported")
    require(a["dim"] in (1, -1), f"a softmax over dimension {a['dim']}, not over the classes")
    b.last = lambda logits: node.target(logits, a["dim"])
    return value


CAPTURED = {  # torch's name of an operation -> its function
    "conv2d": conv_captured,
    "linear": linear_captured,
    "batch_norm": batch_norm_captured,
    "relu": relu_captured,
    "relu6": relu6_captured,
    "hardtanh": relu6_captured,
    "max_pool2d": max_pool_captured,
    "avg_pool2d": avg_pool_captured,
    "adaptive_avg_pool2d": adaptive_avg_pool_captured,
    "mean": mean_captured,
    "add": add_captured,
    "dropout": dropout_captured,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze"), view_captured),
    **dict.fromkeys(("to", "contiguous", "alias"), same_captured),
    "clone": clone_captured,
    **dict.fromkeys(("softmax", "log_softmax"), softmax_captured),
}
