"""The kernels of firmware/, seen from Python: how each stores a layer, and what it takes to run.

A layer is stored densely or as its non-zeros alone: two bytes each, the step from the last one and
the value. Which kernel a layer gets is decided by its instructions on a Cortex-M4, by a formula whose
coefficients were counted, and by its bytes of flash (kernel_costs.json, benchmarks/kernel_costs.py).
"""

import itertools
import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgecnn.deploy.integer import IntegerNode

MAX_STEP = 255
WORD = 4
GROUP = 4  # positions, or tiles, that a dense convolution takes at once
# Scratch that a direct convolution fills with positions unless there is more room, and the most groups
# of positions that it takes (conv_direct.c: MOST_GROUPS).
DIRECT_BYTES, DIRECT_GROUPS = 4608, 8
SPARSE_ENTRIES = 128  # of a channel that conv_sparse adds up in one go (conv_sparse.c: MOST)
COPIED = 16  # bytes of entries that it copies at once; so many less 2 lie behind a layer's
MAX_SCRATCH_BYTES = 2**20
DEPTHWISE_BYTES = 8192  # scratch up to which four channels are unpacked at once
COSTS = Path(__file__).with_name("kernel_costs.json")


class Stored(NamedTuple):
    """A layer as one kernel takes it.

    members: plain values of the kernel's struct. arrays: those it points to. in_place: whether the
    output may lie where the input does. features: {coefficient's name: how often that work is done}.
    """

    kernel: str
    members: dict[str, int]
    arrays: dict[str, np.ndarray]
    scratch_bytes: int
    in_place: bool
    features: dict[str, float]
    weight_passes: float  # how often an inference reads the weights from flash, on average

    @property
    def instructions(self) -> float:
        """Estimated instructions of one inference on a Cortex-M4."""
        costs = counted()["instructions"][self.kernel]
        return sum(costs[name] * count for name, count in self.features.items())

    @property
    def stored_bytes(self) -> int:
        """Bytes of flash that the weights take."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def weight_bytes_read(self) -> int:
        """Bytes of weights that one inference reads from flash."""
        read = (v.nbytes for k, v in self.arrays.items() if k in ("weights", "entries"))
        return round(self.weight_passes * sum(read))


@cache
def counted() -> dict:
    """instructions: {kernel: {coefficient: instructions}}; code_bytes: {kernel: bytes of its code}."""
    return json.loads(COSTS.read_text())


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)


# ---- geometry ----------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """A convolution's sizes, named as the members of conv_t."""

    height: int
    width: int
    inputs: int
    out_height: int
    out_width: int
    outputs: int
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    pad_y: int
    pad_x: int
    pool: int

    @property
    def taps(self) -> int:
        return self.kernel_height * self.kernel_width

    @property
    def units(self) -> tuple[int, int]:
        """(rows, columns) of what leaves: positions, or pooling windows."""
        return self.out_height >> self.pool, self.out_width >> self.pool

    @property
    def leaving(self) -> int:
        """Values that leave the kernel."""
        return math.prod(self.units) * self.outputs

    def first_byte(self, position: tuple[int, int]) -> int:
        """The first byte of the input that an output position (row, column) or a later one reads.

        Later rows of a window, and of a padded map, reach further left than the position itself.
        """
        row = max(position[0] * self.stride_y - self.pad_y, 0)
        exact = self.taps == 1 and not (self.pad_y or self.pad_x)
        column = position[1] * self.stride_x if exact else 0
        return (row * self.width + column) * self.inputs


def geometry(n: IntegerNode, shape: tuple[int, ...], pool: bool) -> Geometry:
    """Of a conv node over an input (C, H, W)."""
    o, (inputs, height, width), (outputs, out_height, out_width) = n.node.options, shape, n.shape
    sides = (*o["kernel"], *o["stride"], *o["padding"])
    return Geometry(height, width, inputs, out_height, out_width, outputs, *sides, int(pool))


def written_behind(g: Geometry, ends) -> bool:
    """Whether the output may lie over the input: (bytes written, next position read) at each end."""
    return all(written <= g.first_byte(position) for written, position in ends)


# ---- orders of weights -------------------------------------------------------------------------


def sparse_entries(rows: np.ndarray, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(entries, starts): the non-zeros of int8 rows (O, K) whose kth input lies at addresses[k].

    An entry is two bytes, the step from the entry before and the value; a step above 255 takes
    entries of value 0. starts: (O + 1,) byte offsets.
    """
    order = np.argsort(addresses, kind="stable")
    entries, starts = bytearray(), [0]
    for row in rows[:, order]:
        nonzero = np.flatnonzero(row)
        at = 0
        for address, value in zip(addresses[order][nonzero].tolist(), row[nonzero], strict=True):
            while address - at > MAX_STEP:
                entries += bytes((MAX_STEP, 0))
                at += MAX_STEP
            entries += bytes((address - at, int(value) & 0xFF))
            at = address
        starts.append(len(entries))
    return np.frombuffer(bytes(entries), np.uint8), np.array(starts, np.uint32)


def linear_order(weight: np.ndarray) -> np.ndarray:
    """int8 (O, I) as linear_dense reads it: int16 (O/4, I/4, 2, 2, 2), two rows in a value.

    Zero-filled to multiples of 4. Rows 2i and 2i + 1 share 256 * upper + lower, which always fits.
    """
    outputs, inputs = weight.shape
    padded = np.pad(weight, ((0, -outputs % 4), (0, -inputs % 4))).astype(np.int16)
    paired = padded[0::2] + 256 * padded[1::2]  # (O/2, I)
    # (O/4, row pair, I/4, k, j) -> (O/4, I/4, row pair, j, k): a word holds the inputs j and j + 2
    return paired.reshape(len(paired) // 2, 2, -1, 2, 2).transpose(0, 2, 1, 4, 3)


# ---- convolutions ------------------------------------------------------------------------------


def conv_direct(g: Geometry, weight: np.ndarray, room: int | None = None) -> Stored:
    """`room`: bytes of scratch; the more positions stand there, the rarer weights are read."""
    rows = weight.transpose(0, 2, 3, 1).reshape(g.outputs, -1)  # (O, kh * kw * C)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % WORD)))
    words, (unit_rows, columns) = rows.shape[1] // WORD, g.units
    units, group = unit_rows * columns, 1 if g.pool else GROUP
    groups = ceil_div(units, group)
    fixed = 16 * words + GROUP * (4 * words + 4)  # two outputs' weights, four positions' bytes
    block = (DIRECT_BYTES if room is None else room - fixed) // (32 * words)
    block = max(1, min(groups, DIRECT_GROUPS, block))
    ends = []
    for last in range(block * group, units, block * group):
        y, x = divmod(last, columns)
        ends.append((last * g.outputs, (y << g.pool, x << g.pool)))
    pairs, blocks = ceil_div(g.outputs, 2), ceil_div(groups, block)
    in_line = g.taps == 1 and g.inputs % WORD == 0 and g.pad_x == g.pad_y == 0
    features = {
        "layer": 1,
        "group": groups,
        "kernel_row": 0 if in_line else groups * GROUP * g.kernel_height,
        "copied_word": 0 if in_line else groups * GROUP * words,
        "column_word": groups * words,
        "block_pair": blocks * pairs,
        "row_word": blocks * pairs * words,
        "tile": groups * pairs,
        "tile_word": groups * pairs * words,
        "output": g.leaving,
    }
    scratch = 32 * block * words + fixed
    in_place = written_behind(g, ends)
    members = {"block": block}
    return Stored("conv_direct", members, {"weights": rows}, scratch, in_place, features, blocks)


def winograd_takes(g: Geometry) -> bool:
    """Whether conv_winograd takes a layer."""
    shape = g.kernel_height == g.kernel_width == 3 and g.stride_y == g.stride_x == 1
    return shape and g.inputs % 4 == 0 and g.outputs % 2 == 0


def conv_winograd(g: Geometry, weight: np.ndarray) -> Stored:
    order = weight.reshape(g.outputs, g.inputs // 4, 4, 3, 3).transpose(0, 1, 3, 4, 2)
    if g.pool:
        rows, columns = g.units
    else:
        rows, columns = ceil_div(g.out_height, 2), ceil_div(g.out_width, 2)
    tiles = rows * columns
    quads = ceil_div(max(8 // columns, 1) * columns, GROUP)  # a row of tiles, or eight
    block = GROUP * quads
    ends = []
    for last in range(block, tiles, block):
        y, x = divmod(last, columns)
        written = last if g.pool else 2 * y * g.out_width + (2 * g.out_width if x else 0)
        ends.append((written * g.outputs, (2 * y, 2 * x)))
    blocks, pairs, all_quads = ceil_div(tiles, block), g.outputs // 2, ceil_div(tiles, GROUP)
    features = {
        "layer": 1,
        "tile": tiles,
        "tile_word": tiles * g.inputs // 4,
        "block_pair": blocks * pairs,
        "filter_word": blocks * pairs * g.inputs // 2,
        "quad_pair": all_quads * pairs,
        "quad_pair_word": all_quads * pairs * g.inputs // 4,
        "tile_pair": tiles * pairs,
        "output": g.leaving,
    }
    scratch = (16 * quads * 4 + 32) * g.inputs * 2 + ceil_div(g.inputs, 8) * 8
    in_place = written_behind(g, ends)
    members = {"block": quads}
    return Stored("conv_winograd", members, {"weights": order}, scratch, in_place, features, blocks)


def sparse_band(g: Geometry) -> tuple[int, int, int]:
    """(rows, half of the columns, the latter with a window's) of a channel that stand unpacked."""
    half = ceil_div(ceil_div(g.out_width, 2), GROUP) * GROUP
    return g.kernel_height + g.stride_y, half, half + (g.kernel_width - 1) // g.stride_x


def sparse_takes(g: Geometry) -> bool:
    """Whether conv_sparse's scratch is within what any microcontroller has."""
    rows, _, columns = sparse_band(g)
    return 4 * g.inputs * rows * g.stride_x * columns <= MAX_SCRATCH_BYTES


def conv_sparse(g: Geometry, weight: np.ndarray) -> Stored:
    rows, half, columns = sparse_band(g)
    channel, ky, kx = np.indices(weight.shape[1:])
    step = g.stride_x
    addresses = ((channel * rows + ky) * step + kx % step) * columns + kx // step
    entries, starts = sparse_entries(weight.reshape(g.outputs, -1), addresses.reshape(-1))
    out_rows = g.out_height & ~1 if g.pool else g.out_height
    bands = ceil_div(out_rows, 2)
    ends = [((y >> g.pool) * g.units[1] * g.outputs, (y, 0)) for y in range(2, out_rows, 2)]
    groups, passes = half // GROUP, out_rows * (half // GROUP)
    kept = (bands - 1) * max(g.kernel_height - g.stride_y, 0)
    band_columns = (bands * rows - kept) * step * columns
    counts = np.diff(starts.astype(int)) // 2
    parts = np.where(counts > SPARSE_ENTRIES, ceil_div(counts, SPARSE_ENTRIES), 0).sum()
    # where a row takes several rounds all but long channels are read from a copy, made once a band
    copied = counts[counts <= SPARSE_ENTRIES] if groups > 1 else counts[:0]
    copies = ceil_div(2 * copied, COPIED) * COPIED  # bytes
    read = bands * copies.sum() + passes * 2 * (counts.sum() - copied.sum())
    features = {
        "layer": 1,
        "band": bands,
        "band_column": band_columns,
        "band_word": band_columns * (g.inputs // 4 + g.inputs % 4),
        "kept_word": kept * step * columns * g.inputs,
        "copied_entry": bands * int(copied.sum()),
        "band_output": bands * g.outputs,
        "row_group": out_rows * groups * g.outputs,
        "entry": out_rows * groups * len(entries) // 2,
        "part": bands * groups * int(parts),
        "output": g.leaving,
    }
    arrays = {"entries": np.pad(entries, (0, COPIED - 2)), "starts": starts}
    scratch = 4 * g.inputs * rows * step * columns
    scratch += int(copies.max(initial=0))
    in_place, often = written_behind(g, ends), float(read / arrays["entries"].nbytes)
    return Stored("conv_sparse", {}, arrays, scratch, in_place, features, often)


def conv_depthwise(g: Geometry, weight: np.ndarray, room: int | None = None) -> Stored:
    """`room`: bytes of scratch; where they hold four channels, those are unpacked at once."""
    words = ceil_div(g.width + 2 * g.pad_x, 2) * (g.height + 2 * g.pad_y)
    four = g.inputs == g.outputs and g.inputs % 4 == 0 and 16 * words <= (room or DEPTHWISE_BYTES)
    fast = g.kernel_height == g.kernel_width == 3 and g.stride_x <= 2
    features = {
        "channel": g.outputs,
        "plane_word_of_4" if four else "plane_word": g.inputs * words,
        "row": g.outputs * g.out_height,
        ("fast_stride_1", "fast_stride_2")[g.stride_x - 1] if fast else "position": g.leaving,
    }
    if not fast:
        features |= {"tap_row": g.leaving * g.kernel_height, "tap": g.leaving * g.taps}
    same = (g.out_height, g.out_width, g.outputs) == (g.height, g.width, g.inputs)
    block, arrays = 4 if four else 1, {"weights": weight.reshape(g.outputs, -1)}
    members, scratch = {"block": block}, 4 * block * words
    return Stored("conv_depthwise", members, arrays, scratch, same, features, 1)


def conv_choices(g: Geometry, weight: np.ndarray, groups: int, image: bool) -> list[Stored]:
    """Every kernel that takes a convolution, the dense ones first; `image`: its input is signed."""
    if groups > 1:
        return [conv_depthwise(g, weight)]
    dense = [conv_direct(g, weight)]
    if winograd_takes(g) and not image:
        dense.append(conv_winograd(g, weight))
    return [*dense, conv_sparse(g, weight)] if sparse_takes(g) else dense


@cache
def dense_conv_instructions(g: Geometry, groups: int, image: bool) -> float:
    """Estimated instructions of a convolution without zeros: of the dense kernel that needs fewest."""
    weight = np.ones((g.outputs, 1 if groups > 1 else g.inputs, g.kernel_height, g.kernel_width))
    choices = conv_choices(g, weight.astype(np.int8), groups, image)
    return min(c.instructions for c in choices if not c.kernel.endswith("_sparse"))


@cache
def dense_linear_instructions(outputs: int, inputs: int) -> float:
    """Estimated instructions of a linear layer without zeros."""
    return linear_dense(np.ones((outputs, inputs), np.int8)).instructions


ROOMY = {"conv_direct": conv_direct, "conv_depthwise": conv_depthwise}  # take a `room`


# ---- linear layers -----------------------------------------------------------------------------


def linear_dense(weight: np.ndarray) -> Stored:
    order = linear_order(weight)
    quads, inputs = order.shape[:2]
    features = {"layer": 1, "input": inputs, "quad": quads, "quad_word": quads * inputs}
    features |= {"output": len(weight)}
    return Stored("linear_dense", {}, {"weights": order}, 8 * inputs, True, features, 1)


def linear_sparse(weight: np.ndarray) -> Stored:
    entries, starts = sparse_entries(weight, np.arange(weight.shape[1]))
    features = {"layer": 1, "entry": len(entries) // 2, "output": len(weight)}
    return Stored(
        "linear_sparse", {}, {"entries": entries, "starts": starts}, 0, False, features, 1
    )


def linear_choices(weight: np.ndarray) -> list[Stored]:
    """Both kernels that take a linear layer, the dense one first."""
    return [linear_dense(weight), linear_sparse(weight)]


# ---- the choice --------------------------------------------------------------------------------

ROUNDS = 4  # of weighing instructions against bytes; two settle it


def chosen(layers: dict[str, list[Stored]], storage: str) -> dict[str, Stored]:
    """{layer: one of its kernels}.

    storage: `balanced`, see below; else the fewest instructions of all kernels (`fastest`), of the
    `dense` ones alone, of the `sparse` ones where there is one; or the name of a kernel, for the layers
    that it takes.
    """
    if storage == "balanced":
        return balanced(layers)

    def pick(choices):
        named = [c for c in choices if c.kernel == storage]
        if named:
            return named[0]  # at no estimate: kernel_costs.py counts kernels that have none yet
        sparse = [c for c in choices if c.kernel.endswith("_sparse")]
        dense = [c for c in choices if c not in sparse]
        some = {"dense": dense, "sparse": sparse}.get(storage) or choices
        return min(some, key=lambda one: one.instructions)

    return {name: pick(choices) for name, choices in layers.items()}


def balanced(layers: dict[str, list[Stored]]) -> dict[str, Stored]:
    """The least product of instructions and flash: a percent of one is worth a percent of the other.

    Flash is the weights' and that of the kernels in use, which is why every set of kernels is tried.
    """
    kinds = sorted({choice.kernel for choices in layers.values() for choice in choices})
    best, least = {}, math.inf
    for size in range(1, len(kinds) + 1):
        for used in itertools.combinations(kinds, size):
            options = {n: [c for c in choices if c.kernel in used] for n, choices in layers.items()}
            if not all(options.values()):
                continue
            code, price = sum(counted()["code_bytes"][kernel] for kernel in used), 0.0
            for _ in range(ROUNDS):
                picked = {
                    n: min(c, key=lambda one: one.instructions + price * one.stored_bytes)
                    for n, c in options.items()
                }
                instructions = sum(one.instructions for one in picked.values())
                flash = code + sum(one.stored_bytes for one in picked.values())
                if instructions * flash < least:
                    best, least = picked, instructions * flash
                price = instructions / flash
    return best
