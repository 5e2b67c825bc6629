"""What the firmware does, step by step, and where everything lies in memory.

A step calls one kernel. A convolution takes along the 2x2 max pool or the residual addition behind it,
so that the larger map never exists. Buffers and scratch share one static arena whose offsets are
decided here; a step writes over an input that nobody reads later, where its kernel allows it.
"""

import math
import random
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from edgecnn.deploy.integer import IntegerNode, flat_maps, hwc_columns, integer_nodes
from edgecnn.deploy.kernels import (
    ROOMY,
    Geometry,
    Stored,
    chosen,
    conv_choices,
    dense_conv_instructions,
    dense_linear_instructions,
    geometry,
    linear_choices,
)
from edgecnn.graph import INPUT, Graph, from_plain, shapes_of
from edgecnn.quantized import HIGHEST

FLIP = 0x80808080  # four bytes of q from four of int8 = q - 128
# Endings of a value that a node has besides its own; no node's name holds a space.
FLIPPED, UNCLAMPED = " flipped", " unclamped"
ALIGNMENT = 8
ORDERS, ORDER_PAIRS = 50, 1_000_000  # of placing buffers that are tried; pairs looked at in all


@dataclass(frozen=True)
class Step:
    """One call of a kernel. `node` is the user's name for it; `inputs` and `output` name values.

    members, arrays: of the layer's struct. add: the numbers of an add_t. over: the inputs that the
    output may take the place of. features: what the kernel does how often; see kernels.Stored.
    """

    node: str
    kernel: str
    inputs: tuple[str, ...]
    output: str
    members: dict = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    add: tuple | None = None
    scratch_bytes: int = 0
    over: tuple[str, ...] = ()
    weight_bytes_read: int = 0
    features: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Steps in order; sizes and offsets in bytes of the arena's values, and each step's scratch."""

    graph: Graph
    steps: list[Step]
    sizes: dict[str, int]
    offsets: dict[str, int]
    scratch_offsets: list[int]
    arena_bytes: int

    @property
    def output(self) -> str:
        return self.steps[-1].output


# ---- steps -------------------------------------------------------------------------------------


def is_pool_2x2(n: IntegerNode) -> bool:
    """Whether a node is the pool that convolutions take along."""
    o = n.node.options
    whole = n.node.op == "max_pool" and list(o["kernel"]) == list(o["stride"]) == [2, 2]
    return whole and list(o["padding"]) == [0, 0]


def clamps(n: IntegerNode) -> bool:
    """Whether a node's range is narrower than a byte's."""
    return (n.low, n.high) != (0, HIGHEST)


def fusions(nodes: list[IntegerNode]) -> dict[str, IntegerNode]:
    """{conv: the pool or addition behind it that it takes along}."""
    order = {INPUT: -1} | {n.node.name: at for at, n in enumerate(nodes)}
    users = {n.node.name: [u for u in nodes if n.node.name in u.node.inputs] for n in nodes}
    found, taken = {}, set()
    for n in nodes:
        name, following = n.node.name, users[n.node.name]
        if n.node.op != "conv" or len(following) != 1 or following[0].node.name in taken:
            continue
        (user,) = following
        if is_pool_2x2(user) and n.node.options["groups"] == 1:
            found[name] = user
        elif user.node.op == "add" and not clamps(n):
            other = [i for i in user.node.inputs if i != name]
            if other and order[other[0]] < order[name]:
                found[name] = user
        if name in found:
            taken.add(user.node.name)
    return found


def requantizer(n: IntegerNode) -> tuple[dict, dict[str, np.ndarray]]:
    """(members, arrays) of a conv's or linear's requantize_t."""
    arrays = {"multiplier": n.multiplier, "bias": n.bias}
    if n.zeros[0]:
        sums = n.weight.reshape(len(n.weight), -1).astype(np.int64).sum(axis=1)
        arrays["offset"] = (-n.zeros[0] * sums).astype(np.int32)
    return {"zero": n.zero}, arrays


def add_scales(n: IntegerNode, first: str) -> tuple:
    """(scale a, scale b, zero a, zero b, zero) of an addition whose a is `first`."""
    scales = list(zip(n.multiplier.tolist(), n.zeros, strict=True))
    if n.node.inputs[0] != first:
        scales.reverse()
    (scale_a, zero_a), (scale_b, zero_b) = scales
    return scale_a, scale_b, zero_a, zero_b, n.zero


def conv_step(n: IntegerNode, g: Geometry, fused, flip: bool, stored: Stored) -> Step:
    """`fused`: the pool or addition behind it, or None; flip: its input is the signed image."""
    pool = fused is not None and fused.node.op == "max_pool"
    requantize, constants = requantizer(n)
    members = {**g._asdict(), **stored.members, "flip": FLIP if flip else 0}
    members |= {"zero": n.zeros[0] * 0x01010101, "requantize": requantize}
    (source,), output, name, add = n.node.inputs, n.node.name, n.node.name, None
    inputs, over = (source,), (source,) if stored.in_place else ()
    if fused is not None:
        output = fused.node.name
    if fused is not None and not pool:
        (residual,) = (i for i in fused.node.inputs if i != name)
        add = add_scales(fused, name)
        inputs, over = (source, residual), (residual,) if residual != source else ()
    return stored_step(stored, name, inputs, output, members, constants, over=over, add=add)


def linear_step(n: IntegerNode, stored: Stored) -> Step:
    requantize, constants = requantizer(n)
    (outputs, inputs), name = n.weight.shape, n.node.name
    members = {"inputs": inputs, "outputs": outputs, "requantize": requantize}
    over = n.node.inputs if stored.in_place else ()
    return stored_step(stored, name, n.node.inputs, name, members, constants, over=over)


def stored_step(stored: Stored, node, inputs, output, members, constants, **more) -> Step:
    """The step of a conv or linear as `stored`; constants: arrays beside its weights."""
    return Step(
        node,
        stored.kernel,
        inputs,
        output,
        members,
        stored.arrays | constants,
        scratch_bytes=stored.scratch_bytes,
        weight_bytes_read=stored.weight_bytes_read,
        features=stored.features,
        **more,
    )


def pool_step(n: IntegerNode, shape: tuple[int, ...]) -> Step:
    (channels, height, width), (_, out_height, out_width) = shape, n.shape
    o = n.node.options
    kernel = o.get("kernel", (height, width))  # a global pool is one window
    (kernel_height, kernel_width), (stride_y, stride_x) = kernel, o.get("stride", kernel)
    pad_y, pad_x = o.get("padding", (0, 0))
    members = {
        "height": height,
        "width": width,
        "channels": channels,
        "out_height": out_height,
        "out_width": out_width,
        "kernel_height": kernel_height,
        "kernel_width": kernel_width,
        "stride_y": stride_y,
        "stride_x": stride_x,
        "pad_y": pad_y,
        "pad_x": pad_x,
    }
    kernel = "max_pool"
    if n.node.op != "max_pool":
        kernel = "avg_pool"
        members |= {"zero": n.zero, "reciprocal": n.multiplier.item()}
    return Step(n.node.name, kernel, n.node.inputs, n.node.name, members)


def add_step(n: IntegerNode) -> Step:
    count, scales = math.prod(n.shape), add_scales(n, n.node.inputs[0])
    name, inputs = n.node.name, n.node.inputs
    return Step(name, "add", inputs, name, {"count": count}, add=scales, over=inputs)


def clamp_step(n: IntegerNode, source: str) -> Step:
    members = {"count": math.prod(n.shape), "low": n.low, "high": n.high}
    name = n.node.name
    return Step(name, "clamp", (source,), name, members, over=(source,))


def flip_step(source: str, output: str, shape: tuple[int, ...]) -> Step:
    return Step(source, "flip_signs", (source,), output, {"count": math.prod(shape)})


def takes_image(nodes: list[IntegerNode], fused: dict[str, IntegerNode]) -> bool:
    """Whether all that reads the image can read it signed, as it comes: convolutions can."""
    readers = [n for n in nodes if INPUT in n.node.inputs and n.node.name not in taken_along(fused)]
    return all(n.node.op == "conv" for n in readers) and not any(
        INPUT in f.node.inputs for f in fused.values()
    )


def taken_along(fused: dict[str, IntegerNode]) -> set[str]:
    """The names of the pools and additions that the convolution before them computes."""
    return {f.node.name for f in fused.values()}


class Network(NamedTuple):
    """What the steps of a checkpoint follow from.

    fused: {conv: the pool or addition behind it}. flip: convolutions read the image signed, as it comes.
    geometries: of the convolutions.
    """

    graph: Graph
    nodes: list[IntegerNode]
    fused: dict[str, IntegerNode]
    flip: bool
    geometries: dict[str, Geometry]


def network_of(checkpoint: dict) -> Network:
    """Raises UserError where the checkpoint's numbers do not fit its network."""
    nodes, graph = integer_nodes(checkpoint), from_plain(checkpoint["graph"])
    shapes, fused, geometries = shapes_of(graph), fusions(nodes), {}
    for n in nodes:
        if n.node.op == "conv":
            pool = n.node.name in fused and fused[n.node.name].node.op == "max_pool"
            geometries[n.node.name] = geometry(n, shapes[n.node.inputs[0]], pool)
    return Network(graph, nodes, fused, takes_image(nodes, fused), geometries)


def choices_of(network: Network) -> dict[str, list[Stored]]:
    """{conv or linear: it as each kernel that takes it stores it}."""
    maps, found = flat_maps(network.graph), {}
    for n in network.nodes:
        name, (source, *_) = n.node.name, n.node.inputs
        if n.node.op == "conv":
            image, groups = network.flip and source == INPUT, n.node.options["groups"]
            found[name] = conv_choices(network.geometries[name], n.weight, groups, image)
        elif n.node.op == "linear":
            # torch flattens C, H, W; here a map's channels stand side by side.
            columns = hwc_columns(n.weight, maps[source][0]) if source in maps else n.weight
            found[name] = linear_choices(columns)
    return found


def steps_of(network: Network, stored: dict[str, Stored]) -> list[Step]:
    """The steps of a network whose layers are stored so; values bear the names of their nodes."""
    shapes, fused, flip = shapes_of(network.graph), network.fused, network.flip
    behind = taken_along(fused)
    steps, alias = [], {}
    if not flip:
        steps.append(flip_step(INPUT, INPUT + FLIPPED, shapes[INPUT]))
        alias[INPUT] = INPUT + FLIPPED
    for n in network.nodes:
        name, op, (source, *_) = n.node.name, n.node.op, n.node.inputs
        if name in behind:
            continue
        if op == "flatten":
            alias[name] = alias.get(source, source)
            continue
        last = fused.get(name, n)  # whose range and name the value has
        if op == "conv":
            signed = flip and source == INPUT
            made = conv_step(n, network.geometries[name], fused.get(name), signed, stored[name])
        elif op == "linear":
            made = linear_step(n, stored[name])
        elif op == "add":
            made = add_step(n)
        elif op in ("relu", "relu6"):
            made = clamp_step(n, source)
        else:
            made = pool_step(n, shapes[source])
        steps += with_limits(renamed(made, alias), n, last)
    return steps


def with_limits(made: Step, n: IntegerNode, last: IntegerNode) -> list[Step]:
    """The step of a node, and a clamp behind it where its activation's range is not all of 0..255.

    last: the pool or addition that the step takes along, else the node itself.
    """
    limited = n if clamps(n) else last
    if not clamps(limited) or n.node.op in ("relu", "relu6"):
        return [made]
    raw = made.output + UNCLAMPED
    clamp = clamp_step(limited._replace(shape=last.shape), raw)
    return [replace(made, output=raw), replace(clamp, node=n.node.name, output=last.node.name)]


def renamed(step: Step, alias: dict[str, str]) -> Step:
    """The step on the values that hold what its inputs name."""
    inputs, over = (tuple(alias.get(i, i) for i in names) for names in (step.inputs, step.over))
    return replace(step, inputs=inputs, over=over)


def dense_instructions(graph: Graph) -> float:
    """Estimated Cortex-M4 instructions of a deployed network's layers with weights, none of them zero.

    A closed form of the graph's shapes, for pricing; poolings and additions that no convolution takes
    along are left out.
    """
    shapes = shapes_of(graph)
    nodes = [IntegerNode(n, shapes[n.name], (), 0, 0, HIGHEST) for n in graph.nodes]
    fused = fusions(nodes)
    flip, total = takes_image(nodes, fused), 0.0
    for n in nodes:
        (source, *_), shape = n.node.inputs, shapes[n.node.inputs[0]]
        if n.node.op == "conv":
            pool = n.node.name in fused and fused[n.node.name].node.op == "max_pool"
            image, groups = flip and source == INPUT, n.node.options["groups"]
            total += dense_conv_instructions(geometry(n, shape, pool), groups, image)
        elif n.node.op == "linear":
            total += dense_linear_instructions(*n.shape, *shape)
    return total


# ---- memory ------------------------------------------------------------------------------------


# Bytes of one place of the arena by step: {step: bytes in use while it runs}.
Use = dict[int, int]


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def clash(use: Use, offset: int, other: Use, other_offset: int) -> bool:
    """Whether two places share a byte while both are in use."""
    return any(
        offset < other_offset + other[step] and other_offset < offset + use[step]
        for step in use.keys() & other.keys()
    )


def placed(uses: list[Use], order: list[int]) -> tuple[int, list[int]]:
    """(peak, offsets): each place in turn as low as those before it allow."""
    offsets: dict[int, int] = {}
    for at in order:
        steps = uses[at].keys()
        others = [(uses[i], o) for i, o in offsets.items() if not steps.isdisjoint(uses[i])]
        tops = {offset + size for other, offset in others for size in other.values()}
        offsets[at] = next(
            offset
            for offset in sorted({0} | tops)
            if not any(clash(uses[at], offset, *other) for other in others)
        )
    peak = max((offsets[at] + max(uses[at].values()) for at in order), default=0)
    return peak, [offsets[at] for at in range(len(uses))]


def arrange(uses: list[Use]) -> tuple[int, list[int]]:
    """(peak, offsets) of the best of several orders: large first, and shuffles of that.

    No order beats the largest sum of what is in use at once; where one reaches it, that is taken.
    """
    total: dict[int, int] = {}
    for use in uses:
        for step, size in use.items():
            total[step] = total.get(step, 0) + size
    order = sorted(range(len(uses)), key=lambda at: -max(uses[at].values()))
    best, shuffle = placed(uses, order), random.Random(0)
    for _ in range(min(ORDERS, ORDER_PAIRS // max(len(uses), 1) ** 2)):
        if best[0] == max(total.values(), default=0):
            break
        shuffle.shuffle(order)
        best = min(best, placed(uses, order), key=lambda found: found[0])
    return best


def sizes_of(graph: Graph, steps: list[Step]) -> dict[str, int]:
    """{value: bytes} of all that steps read or write."""
    shapes = shapes_of(graph)
    names = {name for step in steps for name in (*step.inputs, step.output)}
    return {n: math.prod(shapes[n.partition(" ")[0]]) for n in names}


def arranged(graph: Graph, steps: list[Step]) -> tuple[Plan, dict[int, int]]:
    """(the plan of steps, {step: bytes in use while it runs})."""
    sizes, outside = sizes_of(graph, steps), (INPUT, steps[-1].output)
    first = {step.output: at for at, step in enumerate(steps)}
    last = {name: at for at, step in enumerate(steps) for name in (*step.inputs, step.output)}
    shares: dict[str, str] = {}  # value -> the one whose place it takes
    for at, step in enumerate(steps):
        free = [name for name in step.over if last[name] == at and name not in outside]
        if free and step.output not in outside:
            shares[step.output] = shares.get(free[0], free[0])
    owners = [name for name in first if name not in shares and name not in outside]
    uses: list[Use] = []
    for owner in owners:
        group = [owner, *(name for name, place in shares.items() if place == owner)]
        use: Use = {}
        for name in group:
            for at in range(first[name], last[name] + 1):
                use[at] = max(use.get(at, 0), aligned(sizes[name]))
        uses.append(use)
    uses += [{at: aligned(step.scratch_bytes)} for at, step in enumerate(steps)]
    peak, offsets = arrange(uses)
    places = dict(zip(owners, offsets, strict=False))
    places |= {name: places[place] for name, place in shares.items()}
    in_use = {at: sum(use.get(at, 0) for use in uses) for at in range(len(steps))}
    return Plan(graph, steps, sizes, places, offsets[len(owners) :], peak), in_use


def planned(checkpoint: dict, storage: str = "balanced") -> Plan:
    """The plan of an int8 checkpoint: a small arena, which dense convolutions then fill.

    storage: see kernels.chosen. Raises UserError where the checkpoint's numbers do not fit its network.
    """
    network = network_of(checkpoint)
    stored = chosen(choices_of(network), storage)
    plan, in_use = arranged(network.graph, steps_of(network, stored))
    weights = {n.node.name: n.weight for n in network.nodes}
    for at, step in enumerate(plan.steps):
        if step.kernel in ROOMY:
            room = step.scratch_bytes + plan.arena_bytes - in_use[at]
            again = ROOMY[step.kernel](network.geometries[step.node], weights[step.node], room)
            stored[step.node] = again
    roomy, _ = arranged(network.graph, steps_of(network, stored))
    return roomy if roomy.arena_bytes <= plan.arena_bytes else plan
