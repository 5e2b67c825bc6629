"""What a checkpoint may hold, checked before any of its tensors is read and again after.

The first check takes tensors on the meta device: torch.load(map_location="meta") gives shapes, types
and layouts, and reads no data. Every function raises ValueError, saying what does not fit.
"""

import re
from collections.abc import Iterator

import torch

from edgecnn.model import ARCHITECTURE, EdgeCNN, weight_layers
from edgecnn.packing import check_packed
from edgecnn.records import in_range, plain_problem
from edgecnn.text import NAME_LENGTH, TEXT_LENGTH, is_name, is_text

COUNTER = "num_batches_tracked"
PRECISIONS = ("fp32", "int8")
TENSOR_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
KEYS = ("architecture", "precision", "tensors", "provenance")
SCALES = (1e-20, 1e20)  # of int8 layers; their float32 products stay finite and above 0
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
}


def tensor_shapes(checkpoint: dict) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that a checkpoint's network has: name -> (dtype, shape).

    fp32: the module's own state without BN's batch counters. int8: of each layer with MACs the
    folded weight and bias.
    """
    with torch.device("meta"):
        model = EdgeCNN()
    if checkpoint["precision"] == "fp32":
        state = model.state_dict()
        return {n: (t.dtype, tuple(t.shape)) for n, t in state.items() if not n.endswith(COUNTER)}
    shapes = {}
    for name, layer in weight_layers(model).items():
        name, shape = name.removesuffix(".conv"), tuple(layer.weight.shape)
        shapes |= {
            f"{name}.weight": (torch.int8, shape),
            f"{name}.bias": (torch.float32, shape[:1]),
        }
    return shapes


def shown(dtype, shape) -> str:
    """`float32 256x2048`, for a message."""
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape)) or 'scalar'}"


def require(condition: bool, problem: str) -> None:
    """Raise ValueError where a condition does not hold."""
    if not condition:
        raise ValueError(problem)


# ---- before the data is read -------------------------------------------------------------------


def check_header(checkpoint: dict) -> None:
    """Architecture, precision and provenance: plain values of the right types."""
    for key in KEYS:
        require(key in checkpoint, f"it lacks `{key}`")
    if checkpoint["architecture"] != ARCHITECTURE:
        raise ValueError(
            f"it holds the architecture {checkpoint['architecture']!s:.60}, not {ARCHITECTURE}"
        )
    precision = checkpoint["precision"]
    known = isinstance(precision, str) and precision in PRECISIONS
    require(known, f"precision {precision!s:.60} is not known")
    origin = checkpoint["provenance"]
    require(isinstance(origin, dict), "its provenance is no dictionary")
    missing = [key for key in ORIGIN if key not in origin]
    require(not missing, f"its provenance lacks {', '.join(missing)}")
    problem = plain_problem(origin, MOST_VALUES)
    require(problem is None, f"in its provenance {problem}")
    for key, right in (ORIGIN | OPTIONAL_ORIGIN).items():
        if key in origin:
            require(right(origin[key]), f"its provenance has {ascii(origin[key]):.40} as {key}")


def check_layout(checkpoint: dict) -> None:
    """The tensors' names, types, shapes and layouts, packed ones as announced; quantization."""
    tensors, expected = checkpoint["tensors"], tensor_shapes(checkpoint)
    require(isinstance(tensors, dict), "its tensors are no dictionary")
    for name in tensors:
        known = isinstance(name, str) and len(name) <= NAME_LENGTH and TENSOR_NAME.fullmatch(name)
        require(bool(known), f"{ascii(name):.60} is no name of a tensor")
        require(name in expected, f"the tensors do not fit {ARCHITECTURE}: it has no {name:.60}")
    for name, (dtype, shape) in expected.items():
        require(name in tensors, f"the tensors do not fit {ARCHITECTURE}: {name} is missing")
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
            f"the tensors do not fit {ARCHITECTURE}: {name} is {shown(value.dtype, value.shape)}, "
            f"not {shown(dtype, shape)}",
        )
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        require(whole, f"{name} is a view of other data")
    if checkpoint["precision"] == "int8":
        check_quantization(checkpoint.get("quantization"), expected)


def check_quantization(quantization, expected: dict) -> None:
    """Scales finite and above 0, one or one an output channel; zero points of unsigned 8 bits."""
    require(isinstance(quantization, dict), "it lacks `quantization`, its scales and zero points")
    require(is_name(quantization.get("engine")), "its quantization names no engine")

    def check(place: dict, which: str, name: str) -> None:
        scale, zero_point = place.get(f"{which}_scale"), place.get(f"{which}_zero_point")
        require(in_range(scale, *SCALES), f"the {which} scale of {name} is not finite and positive")
        require(
            type(zero_point) is int and 0 <= zero_point <= 255,
            f"the {which} zero point of {name} is no integer from 0 to 255",
        )

    check(quantization, "input", "the network")
    layers = quantization.get("layers")
    require(isinstance(layers, dict), "its quantization has no layers")
    names = [name.removesuffix(".weight") for name in expected if name.endswith(".weight")]
    require(list(layers) == names, f"its layers are not {', '.join(names)}, in this order")
    for name, layer in layers.items():
        require(isinstance(layer, dict), f"the quantization of {name} is no dictionary")
        check(layer, "output", name)
        scales, (outputs, *_) = layer.get("weight_scale"), expected[f"{name}.weight"][1]
        right = isinstance(scales, list) and len(scales) in (1, outputs)
        require(right, f"{name} needs 1 or {outputs} weight scales")
        finite = all(in_range(scale, *SCALES) for scale in scales)
        require(finite, f"a weight scale of {name} is not finite and positive")
        zero = layer.get("weight_zero_point")
        require(type(zero) is int and zero == 0, f"the weight zero point of {name} is not 0")


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
