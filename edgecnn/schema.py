"""What a checkpoint may hold, checked before any of its tensors is read and again after.

The first check takes tensors on the meta device: torch.load(map_location="meta") gives shapes, types
and layouts, and reads no data. Every function raises ValueError, saying what does not fit.
"""

from collections.abc import Iterator

import torch

from edgecnn.dataset import DataSet
from edgecnn.graph import (
    ACTIVATED,
    INPUT,
    MAX_MACS,
    WEIGHTED,
    Graph,
    from_plain,
    require,
    shapes_of,
    tensor_shapes,
)
from edgecnn.module import Network
from edgecnn.packing import check_packed
from edgecnn.records import in_range, plain_problem
from edgecnn.rewrite import deployed_graph
from edgecnn.text import NAME_LENGTH, TEXT_LENGTH, is_name, is_text

PRECISIONS = ("fp32", "int8")
KEYS = ("graph", "data", "precision", "tensors", "provenance")
SCALES = (1e-12, 1e12)  # of int8 layers; products and ratios of three stay finite and above 0
MOST_VALUES = 10_000  # in provenance
# The keys of a provenance that every reader relies on, and what they hold.
ORIGIN = {
    "method": is_name,
    "criterion": lambda value: value is None or is_name(value),
    "seed": lambda value: type(value) is int and 0 <= value < 2**31,
    "parent": lambda value: value is None or is_name(value),
    "arguments": lambda value: isinstance(value, dict) and len(str(value)) < TEXT_LENGTH,
    "torch_version": lambda value: is_text(value, NAME_LENGTH),
    "commit": lambda value: value is None or is_text(value, NAME_LENGTH),
    "date_utc": lambda value: is_text(value, NAME_LENGTH),
}
OPTIONAL_ORIGIN = {
    "variant": is_name,
    "holdout": lambda value: isinstance(value, bool),
    "parent_sha256": lambda value: value is None or is_text(value, NAME_LENGTH),
    "whole_macs": lambda value: type(value) is int and 0 < value <= MAX_MACS,
    "teacher_sha256": lambda value: is_text(value, NAME_LENGTH),
}


def expected_tensors(checkpoint: dict) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that a checkpoint's graph has: name -> (dtype, shape).

    int8 files hold int8 weights and float32 biases, fp32 files float32 alone.
    """
    weight = torch.int8 if checkpoint["precision"] == "int8" else torch.float32
    found = tensor_shapes(from_plain(checkpoint["graph"]))
    return {n: (weight if n.endswith(".weight") else torch.float32, s) for n, s in found.items()}


def shown(dtype, shape) -> str:
    """`float32 256x2048`, for a message."""
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape)) or 'scalar'}"


# ---- before the data is read -------------------------------------------------------------------


def check_header(checkpoint: dict) -> None:
    """Precision, provenance, graph and data set, all of them plain values: of the right types."""
    for key in KEYS:
        require(key in checkpoint, f"it lacks `{key}`")
    precision = checkpoint["precision"]
    require(isinstance(precision, str), "its precision is no text")
    require(precision in PRECISIONS, f"precision {ascii(precision):.60} is not known")
    origin = checkpoint["provenance"]
    require(isinstance(origin, dict), "its provenance is no dictionary")
    missing = [key for key in ORIGIN if key not in origin]
    require(not missing, f"its provenance lacks {', '.join(missing)}")
    problem = plain_problem(origin, MOST_VALUES)
    require(problem is None, f"in its provenance {problem}")
    for key, right in (ORIGIN | OPTIONAL_ORIGIN).items():
        if key in origin:
            require(right(origin[key]), f"its provenance has {ascii(origin[key]):.40} as {key}")
    graph, dataset = from_plain(checkpoint["graph"]), DataSet.from_dict(checkpoint["data"])
    require(graph.input_shape == dataset.shape, "its graph and its data set differ in shape")
    (outputs,) = shapes_of(graph)[graph.output]
    require(outputs == len(dataset.classes), "it has not an output a class")
    with torch.device("meta"):
        Network(graph)  # refuses names that torch has a use for
    if precision == "int8":
        right = deployed_graph(graph) == graph
        require(right, "its graph is not that of a deployed network")


def check_layout(checkpoint: dict) -> None:
    """The tensors' names, types, shapes and layouts, packed ones as announced; quantization."""
    tensors, expected = checkpoint["tensors"], expected_tensors(checkpoint)
    require(isinstance(tensors, dict), "its tensors are no dictionary")
    for name in tensors:
        known = isinstance(name, str) and name in expected
        require(known, f"the tensors do not fit the graph: it has no {ascii(name):.60}")
    for name, (dtype, shape) in expected.items():
        require(name in tensors, f"the tensors do not fit the graph: {name} is missing")
        value = tensors[name]
        if isinstance(value, dict):
            try:
                check_packed(value, dtype, shape)
            except ValueError as error:
                raise ValueError(f"{name} is a damaged weight ({error})") from None
            value, dtype, shape = value["coded"], torch.uint8, tuple(value["coded"].shape)
        require(type(value) in (torch.Tensor, torch.nn.Parameter), f"{name} is no tensor")
        require(value.layout == torch.strided, f"{name} is no dense tensor")
        require(
            value.dtype == dtype and value.shape == shape,
            f"the tensors do not fit the graph: {name} is {shown(value.dtype, value.shape)}, "
            f"not {shown(dtype, shape)}",
        )
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        require(whole, f"{name} is a view of other data")
    if checkpoint["precision"] == "int8":
        graph = from_plain(checkpoint["graph"])
        check_quantization(checkpoint.get("quantization"), graph, expected)


def check_quantization(quantization, graph: Graph, expected: dict) -> None:
    """Scales finite and above 0, as many as there have to be; zero points of unsigned 8 bits."""
    keys = ("engine", "activations", "weights")
    known = isinstance(quantization, dict) and quantization.keys() == set(keys)
    require(known, f"it lacks `quantization`: {', '.join(keys)}, no more")
    engine, activations, weights = (quantization[key] for key in keys)
    require(is_name(engine), "its quantization names no engine")
    names = [INPUT, *(node.name for node in graph.nodes)]
    known = isinstance(activations, dict) and list(activations) == names
    require(known, "its quantization is not of the graph's nodes, in their order")
    for name, own in activations.items():
        known = isinstance(own, dict) and own.keys() == {"scale", "zero_point"}
        require(known, f"the quantization of {name} is no scale and zero point")
        scale, zero_point = own["scale"], own["zero_point"]
        require(in_range(scale, *SCALES), f"the scale of {name} is not finite and positive")
        require(
            type(zero_point) is int and 0 <= zero_point <= 255,
            f"the zero point of {name} is no integer from 0 to 255",
        )
    for node in graph.nodes:
        if node.op not in ACTIVATED:
            same = activations[node.name] == activations[node.inputs[0]]
            require(same, f"{node.name} ({node.op}) does not keep the scale of its input")
    layers = [node for node in graph.nodes if node.op in WEIGHTED]
    known = isinstance(weights, dict) and list(weights) == [node.name for node in layers]
    require(known, "its weight scales are not of the graph's layers, in their order")
    for node in layers:
        scales = weights[node.name]
        count = expected[f"{node.name}.weight"][1][0] if node.op == "conv" else 1
        right = isinstance(scales, list) and len(scales) == count
        require(right, f"{node.name} needs {count} weight scales")
        finite = all(in_range(scale, *SCALES) for scale in scales)
        require(finite, f"a weight scale of {node.name} is not finite and positive")


def stored_bytes(checkpoint: dict) -> int:
    """The bytes that a checked checkpoint's tensors take in its file."""
    values = checkpoint["tensors"].values()
    return sum((v["coded"] if isinstance(v, dict) else v).nbytes for v in values)


# ---- after it is read --------------------------------------------------------------------------


def value_problems(tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """What no figure of unpacked tensors may be: not finite, a negative variance, -128."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            yield f"{name} holds values that are not finite"
        elif name.endswith("running_var") and (tensor < 0).any():
            yield f"{name} holds a negative variance"
        elif tensor.dtype == torch.int8 and (tensor == -128).any():
            yield f"{name} holds -128, and weights are symmetric"
