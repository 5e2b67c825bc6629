"""Random INT8 networks, and a plan run kernel by kernel in this process: for the tests of the C."""

import ctypes

import numpy as np
import torch
from foreign_networks import captured

from edgecnn.deploy import c_source
from edgecnn.deploy.integer import exact_values
from edgecnn.graph import (
    ACTIVATED,
    INPUT,
    WEIGHTED,
    Graph,
    Node,
    shapes_of,
    tensor_shapes,
    to_plain,
)
from edgecnn.rewrite import deployed_graph

GUARD, FILL = 64, 0xA5  # bytes behind the arena that no kernel may touch


# ---- random networks -----------------------------------------------------------------------------


def random_checkpoint(
    graph: Graph, seed: int = 0, zeros: float = 0.0, clamped: bool = False
) -> dict:
    """An int8 checkpoint of a deployed graph whose outputs fill 0..255 and saturate at both ends.

    zeros: share of zero weights. clamped: a ReLU's zero point is not 0, so that it has to be a step.
    """
    rng, shapes = np.random.default_rng(seed), shapes_of(graph)
    tensors, weights = {}, {}
    activations = {INPUT: {"scale": 0.02, "zero_point": int(rng.integers(90, 140))}}
    for node in graph.nodes:
        before = [activations[name] for name in node.inputs]
        if node.op not in ACTIVATED:
            activations[node.name] = dict(before[0])
            continue
        relu = node.options.get("activation", "none") != "none"
        zero = int(rng.integers(90, 140)) if clamped or not relu else 0
        scale = sum(one["scale"] for one in before)
        if node.op in WEIGHTED:
            shape = tensor_shapes(graph)[f"{node.name}.weight"]
            values = rng.integers(-127, 128, shape)
            values[rng.random(shape) < zeros] = 0
            inputs = np.prod(shape[1:]) * max(1 - zeros, 0.05)
            own = rng.uniform(0.001, 0.002, shape[0] if node.op == "conv" else 1)
            weights[node.name] = own.tolist()
            scale *= own.mean() * np.sqrt(inputs) * 73 * 100 / 60
            bias = rng.normal(0, 20 * scale, shape[0]).astype(np.float32)
            tensors[f"{node.name}.weight"] = torch.from_numpy(values.astype(np.int8))
            tensors[f"{node.name}.bias"] = torch.from_numpy(bias)
        if node.options.get("activation") == "relu6" and not clamped:
            scale = min(scale, 6 / (255 - zero))
        activations[node.name] = {"scale": float(scale), "zero_point": zero}
    channels, classes = graph.input_shape[0], shapes[graph.output][0]
    return {
        "graph": to_plain(graph),
        "tensors": tensors,
        "quantization": {"engine": "qnnpack", "activations": activations, "weights": weights},
        "data": {
            "name": "random",
            "classes": [f"class {i}" for i in range(classes)],
            "mean": [0.4] * channels,
            "std": [0.3] * channels,
        },
    }


def random_images(graph: Graph, count: int, seed: int = 0) -> torch.Tensor:
    """int8 (count, C, H, W)."""
    values = np.random.default_rng(seed).integers(-128, 128, (count, *graph.input_shape))
    return torch.from_numpy(values.astype(np.int8))


def conv(
    name: str, source: str, outputs: int, kernel, stride=(1, 1), padding=(0, 0), groups=1, **more
):
    """A conv node of a deployed graph."""
    options = {"outputs": outputs, "kernel": list(kernel), "stride": list(stride), "bias": 1}
    return Node(
        name, "conv", (source,), options | {"padding": list(padding), "groups": groups, **more}
    )


def deployed_network(name: str) -> Graph:
    """The deployed graph of a shipped or foreign network."""
    return deployed_graph(captured(name)[0])


def ended(input_shape, *nodes: Node) -> Graph:
    """The graph of nodes and what makes one number a channel of the last map."""
    mean = Node("mean", "global_avg_pool", (nodes[-1].name,))
    return Graph(tuple(input_shape), (*nodes, mean, Node("logits", "flatten", ("mean",))))


# ---- a plan without a generated file ---------------------------------------------------------------


def struct(name: str, **fields) -> type:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def ints(names: str) -> dict:
    return dict.fromkeys(names.split(), ctypes.c_int32)


POINTER = ctypes.c_void_p
Add = struct("Add", scale_a=ctypes.c_float, scale_b=ctypes.c_float, **ints("zero_a zero_b zero"))
Requantize = struct("Requantize", multiplier=POINTER, bias=POINTER, offset=POINTER, **ints("zero"))
STORED = {"weights": POINTER, "entries": POINTER, "starts": POINTER, "requantize": Requantize}
WINDOW = "kernel_height kernel_width stride_y stride_x pad_y pad_x"
Conv = struct(
    "Conv",
    **ints(f"height width inputs out_height out_width outputs {WINDOW} pool block"),
    flip=ctypes.c_uint32,
    zero=ctypes.c_uint32,
    **STORED,
    add=POINTER,
)
Linear = struct("Linear", **ints("inputs outputs"), **STORED)
Pool = struct(
    "Pool",
    **ints(f"height width channels out_height out_width {WINDOW} zero"),
    reciprocal=ctypes.c_float,
)
AddLayer = struct("AddLayer", **ints("count"), scales=Add)
Clamp = struct("Clamp", **ints("count"), low=ctypes.c_uint8, high=ctypes.c_uint8)
STRUCTS = {
    "conv": Conv,
    "linear": Linear,
    "max": Pool,
    "avg": Pool,
    "add": AddLayer,
    "clamp": Clamp,
}


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 8 bytes, as the generated constants do."""
    buffer = np.zeros(array.nbytes // 8 + 2, np.uint64).view(array.dtype)
    buffer[: array.size] = array.reshape(-1)
    return buffer


def call(library, step, pointers: list[int], scratch: int) -> None:
    """Call a step's kernel on addresses."""
    function = getattr(library, step.kernel)
    function.restype = None
    if step.kernel == "flip_signs":
        function.argtypes = [POINTER, POINTER, ctypes.c_int]
        return function(*pointers, step.members["count"])
    kept = {name: aligned(values) for name, values in step.arrays.items()}
    address = {name: values.ctypes.data for name, values in kept.items()}
    members = dict(step.members)
    if "requantize" in members:
        constants = {k: address.pop(k) for k in ("multiplier", "bias", "offset") if k in address}
        members["requantize"] = Requantize(**constants, **members["requantize"])
    own = Add(*step.add) if step.add is not None else None
    if step.kernel == "add":
        members["scales"] = own
    elif own is not None:
        members["add"] = ctypes.addressof(own)
    layer = STRUCTS[step.kernel.split("_")[0]](**members, **address)
    if step.kernel.startswith("conv_") and len(pointers) == 2:
        pointers = [pointers[0], None, pointers[1]]
    arguments = [ctypes.addressof(layer), *pointers]
    arguments += [scratch] if step.kernel in c_source.WITH_SCRATCH else []
    function.argtypes = [POINTER] * len(arguments)
    return function(*arguments)


def differing_step(library, plan, checkpoint: dict, image: torch.Tensor) -> str | None:
    """The first step whose output is not the exact integers' for one int8 image (C, H, W); or None."""
    exact = exact_values(checkpoint, image[None])
    arena = aligned(np.full(plan.arena_bytes + GUARD, FILL, np.uint8)).view(np.uint8)
    pixels = aligned(image.permute(1, 2, 0).contiguous().numpy())  # (H, W, C)
    logits = np.zeros(plan.sizes[plan.output] + GUARD, np.uint8)
    for at, step in enumerate(plan.steps):

        def place(value):
            outside = {INPUT: pixels, plan.output: logits}.get(value)
            base = arena if outside is None else outside
            return base.ctypes.data + (plan.offsets[value] if outside is None else 0)

        pointers = [place(value) for value in (*step.inputs, step.output)]
        call(library, step, pointers, arena.ctypes.data + plan.scratch_offsets[at])
        size = plan.sizes[step.output]
        found = np.ctypeslib.as_array(
            ctypes.cast(pointers[-1], ctypes.POINTER(ctypes.c_uint8)), (size,)
        )
        if " " not in step.output:  # what a node has besides its own value
            values = exact[step.output][0]
            expected = values.permute(1, 2, 0) if values.ndim == 3 else values
            if not np.array_equal(found, expected.reshape(-1).numpy().astype(np.uint8)):
                return f"{step.node} by {step.kernel}"
        if not (arena[plan.arena_bytes : plan.arena_bytes + GUARD] == FILL).all():
            return f"{step.node} by {step.kernel} writes behind the arena"
    return None
