"""One MAC for each use of a weight; products of two activations counted apart; batch 1.

`count_macs` runs one forward with forward hooks on every module and books each multiplication on
the layer it belongs to: dense MACs, non-zero MACs, parameters, bit width and a relative energy.

  counted      convolutions and transposed convolutions of 1, 2 and 3 dimensions, linear, bilinear
               and recurrent layers and cells, attention, and the same arithmetic called as a
               function (F.linear, matmul, einsum, F.scaled_dot_product_attention); float, masked,
               parametrized and torch.ao-quantized weights
  not counted  biases, normalisation, pooling, activation functions, look-ups, scaling by a vector,
               element-wise products of activations, and products among stored tensors alone (they
               fold before deployment; the report says how many there were)
  borders      a weight of a convolution is used once per output position, of a transposed one once
               per input position, padding and cropping notwithstanding; a mask in attention saves
               nothing

How: the hooks say which module is running and a dispatch mode sees the ATen operations it runs, so
that a functional call and a fused layer are seen like any other. A product is an activation product
when both operands depend on the input, else a weight product. A weight that meets an activation in
an operation not understood is named in an error (or a warning), never counted as zero in silence.

Reads nothing and writes nothing but the table on standard output. On the meta device no arithmetic
is done (the non-zero counts are then unknown); a model with real weights costs one real forward.

    python mac_hooks.py                                   # the 3-32-64-128 network of this project
    python mac_hooks.py --model resnet50 --input-size 3 224 224
    python mac_hooks.py --smoke                           # the same as no argument: seconds
"""

import argparse
import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

# ---------------------------------------------------------------- formulas


def conv_macs(weight: tuple[int, ...], positions: tuple[int, ...]) -> int:
    """MACs of a convolution: every weight is used once per position.

    weight: (out, in / groups, *kernel), or (in, out / groups, *kernel) when transposed.
    positions: shape (batch, channels, *spatial) of the output, or of the input when transposed.
    """
    return math.prod(weight) * positions[0] * math.prod(positions[2:])


def linear_macs(weight: tuple[int, ...], x: tuple[int, ...]) -> int:
    """MACs of a layer that uses each weight once per leading position of x (..., features).

    weight: any shape: (out, in) of a linear layer, (out, in1, in2) of a bilinear one,
    (gates x hidden, in) of a recurrent one, whose leading positions are the time steps.
    """
    return math.prod(weight) * math.prod(x[:-1])


def matmul_macs(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """MACs of (..., m, k) x (..., k, n): each element of left meets the n columns of right.

    A right operand of one dimension (k,) is a single column.
    """
    return math.prod(left) * (right[-1] if len(right) > 1 else 1)


def energy_score(macs: int, bits: int) -> float:
    """Relative energy of MACs on operands of so many bits: MACs in millions x bits / 8.

    10,848,768 MACs score 43.40 at 32 bit and 10.85 at 8 bit; half of them score 21.70 at 32 bit.

    It has no unit: it compares the bits that go through the multipliers. It leaves out:
    - memory: a 64-bit SRAM access costs 10-100 pJ and a DRAM access 1,300-2,600 pJ, where the
      multiplication and addition of an INT8 MAC cost 0.23 pJ (Horowitz, ISSCC 2014, 45 nm);
    - the real price of FP32: its MAC costs 4.6 pJ by the same source, 15-20 times an INT8 one
      (by the width of the accumulator), not the 4 times that bits / 8 gives;
    - the kernel: unstructured zeros save nothing on a dense kernel, and a sparse one pays for its
      indices in memory and in instructions;
    - idle and leakage power, and requantisation between INT8 layers.
    """
    return macs / 1e6 * bits / 8


# Energy of one operation, 45 nm: M. Horowitz, "Computing's energy problem (and what we can do about
# it)", ISSCC 2014, figure 1.1.9. A MAC is a multiplication and an addition; INT8 products are added
# up in 32 bits.
MAC_PJ = {32: 3.7 + 0.9, 16: 1.1 + 0.4, 8: 0.2 + 0.1}
SRAM_PJ_PER_BYTE = 100 / 8  # 100 pJ a 64-bit access of a 1 MB memory, by the same figure
DRAM_PJ_PER_BYTE = 1300 / 8  # the low end of its 1.3-2.6 nJ a 64-bit access
# Where the weights lie; activations lie in SRAM in both.
MEMORY_PJ_PER_BYTE = {"sram": SRAM_PJ_PER_BYTE, "dram": DRAM_PJ_PER_BYTE}
# A real microcontroller, STM32L4R5 (Cortex-M4, 120 MHz): 5,496 uJ for the 12.5 M INT8 MACs of
# ResNet-8, dense kernels, MLPerf Tiny v1.3, its most efficient published run on that chip.
STM32L4R5_PJ_PER_INT8_MAC = 5496e6 / 12.5e6


class Energy(NamedTuple):
    """Modelled energy of one inference in microjoules, split by what it is spent on."""

    arithmetic: float
    weights: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


def weight_energy_pj(uses: int, bits: int, memory: str = "sram") -> float:
    """Picojoules that one weight costs an inference: its MACs and its one fetch from `memory`."""
    return uses * MAC_PJ[bits] + bits / 8 * MEMORY_PJ_PER_BYTE[memory]


def stored_bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight with the index of its non-zeros: the smallest of three plain layouts.

    Dense; a one-bit-a-weight bitmap and the non-zeros; or non-zeros that each carry one byte, the
    zeros skipped before it, with a filler of value zero for every 256 in a row (relative indexing
    with 8 bits: Han et al., "Deep Compression", ICLR 2016). Dense on the meta device.
    """
    if weight.is_meta:
        return weight.nbytes
    values = weight.dequantize() if weight.is_quantized else weight.to_dense()
    where = values.flatten().nonzero().flatten()
    skipped = torch.diff(where, prepend=where.new_tensor([-1])) - 1
    entries = len(where) + int((skipped // 256).sum())
    size = weight.element_size()
    bitmap = -(-weight.numel() // 8) + len(where) * size
    return min(weight.numel() * size, bitmap, entries * (size + 1))


# ---------------------------------------------------------------- report


@dataclass
class LayerCount:
    """One layer: MACs summed over its calls, parameters counted once.

    A non-zero count is None on the meta device, whose tensors have no values. `output_shape` (of
    the last call) is None for a layer that the forward never ran. `bits` is the width of the
    weights, or of the activations where a layer multiplies nothing else, the widest where they
    differ; None without MACs. Parameters are those to be stored on a device: a masked or
    parametrized weight counts as the tensor that it yields. `stored_bytes` is what they take with
    an index of the non-zeros. `activations_moved` counts the elements that the layer, and what
    follows it up to the next one with MACs (pooling, additions), reads and writes when every tensor
    crosses the memory once an operation; what works element by element is fused and moves nothing.
    """

    name: str
    type: str
    output_shape: tuple[int, ...] | None = None
    macs: int = 0
    nonzero_macs: int | None = 0
    activation_macs: int = 0
    parameters: int = 0
    nonzero_parameters: int | None = 0
    bits: int | None = None
    stored_bytes: int = 0
    activations_moved: int = 0

    def energy_uj(self, memory: str = "sram") -> Energy:
        """Modelled energy of one inference with the weights in `memory` ("sram" or "dram").

        Assumes that zeros are skipped at no cost beyond their index, that stored weights are
        fetched once, and activations as wide as the weights, in SRAM, moved as the class says. So
        it is a lower bound that no kernel reaches: registers, control, leakage are left out.
        Raises ValueError for MACs of a width without a published energy.
        """
        macs = self.used_macs + self.activation_macs
        if macs and self.bits not in MAC_PJ:
            raise ValueError(f"{self.name}: no published energy of a {self.bits}-bit MAC")
        return Energy(
            macs and 1e-6 * macs * MAC_PJ[self.bits],
            1e-6 * self.stored_bytes * MEMORY_PJ_PER_BYTE[memory],
            1e-6 * self.activations_moved * (self.bits or 0) / 8 * SRAM_PJ_PER_BYTE,
        )

    @property
    def used_macs(self) -> int:
        """MACs whose weight is not zero; the dense ones where zeros are unknown."""
        return self.macs if self.nonzero_macs is None else self.nonzero_macs

    @property
    def energy(self) -> float:
        """Energy score of the non-zero and activation MACs; of dense ones if zeros are unknown."""
        return energy_score(self.used_macs + self.activation_macs, self.bits or 0)


@dataclass
class MacReport:
    """What `count_macs` found: one row a layer that owns parameters or did MACs, in module order.

    `folded_macs` are products of stored tensors alone, in no column: they need computing only once.
    `uncounted` names what could not be counted (always empty unless unknown="warn").
    `peak_activations` is the largest sum of elements of tensors alive at one time when the layers
    run one after the other, a tensor's memory is free after its last use, and what works element by
    element works in place: times the width of one, the RAM that activations need.
    """

    layers: list[LayerCount]
    input_shapes: list[tuple[int, ...]]
    folded_macs: int = 0
    uncounted: list[str] = field(default_factory=list)
    peak_activations: int = 0

    @property
    def macs(self) -> int:
        """Uses of weights, zeros included."""
        return sum(layer.macs for layer in self.layers)

    @property
    def nonzero_macs(self) -> int | None:
        """Uses of weights that are not zero; None on the meta device."""
        return _sum(layer.nonzero_macs for layer in self.layers)

    @property
    def activation_macs(self) -> int:
        """Products of two activations."""
        return sum(layer.activation_macs for layer in self.layers)

    @property
    def total_macs(self) -> int:
        """Both columns together, the figure that is usually published."""
        return self.macs + self.activation_macs

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def nonzero_parameters(self) -> int | None:
        """None on the meta device."""
        return _sum(layer.nonzero_parameters for layer in self.layers)

    @property
    def energy(self) -> float:
        """Sum of the rows' relative energies."""
        return sum(layer.energy for layer in self.layers)

    def energy_uj(self, memory: str = "sram") -> Energy:
        """Sum of the rows' modelled energies; raises ValueError as LayerCount.energy_uj does."""
        columns = zip(*(layer.energy_uj(memory) for layer in self.layers), strict=True)
        return Energy(*map(sum, columns))

    def stm32l4r5_extrapolated_uj(self) -> float | None:
        """Microjoules on that microcontroller if each used MAC cost what one of ResNet-8 does there.

        An extrapolation: another network, dense kernels, one chip; zeros skipped at no cost. None
        unless all weights are INT8, the only width measured.
        """
        if any(layer.bits not in (None, 8) for layer in self.layers):
            return None
        return 1e-6 * STM32L4R5_PJ_PER_INT8_MAC * sum(layer.used_macs for layer in self.layers)

    def energy_table(self) -> str:
        """Where weights, MACs and modelled energy sit, a line a layer, as aligned text."""
        header = [
            "layer",
            "zeros %",
            "stored B",
            "nonzero MACs",
            "arithmetic uJ",
            "SRAM weights uJ",
        ]
        header += ["DRAM weights uJ", "activations uJ", "SRAM total uJ", "DRAM total uJ"]
        whole = LayerCount("total", "", parameters=self.parameters)
        whole.nonzero_parameters = self.nonzero_parameters
        whole.stored_bytes = sum(layer.stored_bytes for layer in self.layers)
        lines = [header]
        for row in [*self.layers, whole]:
            sram, dram = ((self if row is whole else row).energy_uj(m) for m in ("sram", "dram"))
            macs = self.nonzero_macs if row is whole else row.nonzero_macs
            zeros = "?" if row.nonzero_parameters is None else "-"
            if row.parameters and row.nonzero_parameters is not None:
                zeros = f"{100 * (1 - row.nonzero_parameters / row.parameters):.1f}"
            lines.append([row.name, zeros, f"{row.stored_bytes:,}"])
            lines[-1].append("?" if macs is None else f"{macs:,}")
            columns = (sram.arithmetic, sram.weights, dram.weights, sram.activations)
            lines[-1] += [f"{value:.3f}" for value in (*columns, sram.total, dram.total)]
        peak = f"{self.peak_activations:,}"
        return _aligned(lines, 1) + f"\npeak activation memory: {peak} elements"

    def to_dict(self) -> dict:
        """Plain dicts, lists and numbers for json.dump: fields, totals and energies."""
        totals = ("macs", "nonzero_macs", "activation_macs", "total_macs")
        totals += ("parameters", "nonzero_parameters", "energy")
        layers = [asdict(layer) | {"energy": layer.energy} for layer in self.layers]
        return asdict(self) | {"layers": layers} | {key: getattr(self, key) for key in totals}

    def table(self) -> str:
        """The report as aligned text: a header, one line a layer, the totals, then what to note."""
        header = ["layer", "type", "output", "MACs", "nonzero MACs", "act. MACs"]
        header += ["params", "nonzero params", "bits", "energy"]
        total = LayerCount("total", "", (), self.macs, self.nonzero_macs, self.activation_macs)
        total.parameters, total.nonzero_parameters = self.parameters, self.nonzero_parameters
        lines = [header, *(_cells(layer, layer.energy) for layer in self.layers)]
        lines.append(_cells(total, self.energy))
        inputs = ", ".join(_shape(shape) for shape in self.input_shapes)
        text = [f"input {inputs}", _aligned(lines, 3)]
        if self.folded_macs:
            text.append(f"not in the totals: {self.folded_macs:,} MACs among stored tensors alone")
        text += [f"NOT COUNTED: {what}" for what in self.uncounted]
        return "\n".join(text)

    __str__ = table


def _sum(counts) -> int | None:
    """Sum of counts, unknown (None) if one of them is."""
    counts = list(counts)
    return None if None in counts else sum(counts)


def _aligned(lines: list[list[str]], names: int) -> str:
    """A header, rows and a total as text; the first columns, names, to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _cells(layer: LayerCount, energy: float) -> list[str]:
    """The text of a row, column by column."""
    counts = (layer.macs, layer.nonzero_macs, layer.activation_macs)
    counts += (layer.parameters, layer.nonzero_parameters)
    return [
        layer.name,
        layer.type,
        "not run" if layer.output_shape is None else _shape(layer.output_shape),
        *("?" if count is None else f"{count:,}" for count in counts),
        str(layer.bits or ""),
        f"{energy:.2f}",
    ]


# ---------------------------------------------------------------- what one operation multiplies


class _Product(NamedTuple):
    left: torch.Tensor
    right: list[torch.Tensor]  # several only in a recurrent layer: input and hidden weights
    macs: int


# Matrix products, with the position of the left operand; the right one follows it.
_MATMULS = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot), 0),
    **dict.fromkeys((aten._int_mm, aten._scaled_mm, torch.ops.quantized.matmul), 0),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addbmm, aten.addmv, aten._sparse_addmm), 1),
}
# Fused recurrent layers, with the arguments that hold their weights.
_RECURRENT = {aten.mkldnn_rnn_layer: slice(1, 3), aten._cudnn_rnn: slice(1, 2)}

# Operations in which a weight may meet an activation without a multiplication worth counting.
# fmt: off
_NO_PRODUCT = {
    "add", "sub", "rsub", "maximum", "minimum", "where", "masked_fill", "masked_scatter",
    "cat", "stack", "copy", "index", "index_put", "index_select", "gather", "scatter",
    "slice_scatter", "select_scatter",
}
# fmt: on
_NO_PRODUCT_PARTS = ("embedding", "_norm")  # look-ups; normalisation layers


def _product(func, args: tuple, out) -> _Product | None:
    """The product that an operation computes; None if it is not one of those understood."""
    packet = func._overloadpacket
    if packet in _MATMULS:
        left, right = args[_MATMULS[packet] :][:2]
        return _Product(left, [right], matmul_macs(left.shape, right.shape))
    if packet is aten.convolution:
        x, weight, _bias, _stride, _padding, _dilation, transposed = args[:7]
        return _Product(x, [weight], conv_macs(weight.shape, (x if transposed else out).shape))
    if packet is aten._trilinear:  # the arithmetic of nn.Bilinear: (input1, weight, input2, ...)
        return _Product(args[0], [args[1]], linear_macs(args[1].shape, args[0].shape))
    if packet in _RECURRENT:
        weights = [t for t in tree_leaves(args[_RECURRENT[packet]]) if t.ndim > 1]
        return _Product(args[0], weights, sum(linear_macs(w.shape, args[0].shape) for w in weights))
    packed = next(_packed(args), None)
    if func.namespace == "quantized" and packed is not None:
        x, weight = args[0], packed.unpack()[0]
        if "linear" in packet.__name__:
            return _Product(x, [weight], linear_macs(weight.shape, x.shape))
        transposed = "transpose" in packet.__name__
        return _Product(x, [weight], conv_macs(weight.shape, (x if transposed else out).shape))
    return None


def _packed(values) -> Iterator[torch.ScriptObject]:
    """The packed weights among values, such as torch.ao's quantized layers keep."""
    return (v for v in values if isinstance(v, torch.ScriptObject) and hasattr(v, "unpack"))


def _nonzero(tensor: torch.Tensor) -> int | None:
    """How many elements are not zero; None on the meta device."""
    if tensor.is_meta:
        return None
    if tensor.is_quantized:
        tensor = tensor.dequantize()  # zero is where an element equals its zero point
    return int(torch.count_nonzero(tensor.to_dense()))


# ---------------------------------------------------------------- which layer it belongs to


def _layer_name(name: str) -> str:
    """Name of the layer that a module serves: itself, or that whose weight it stores."""
    for helper in (".parametrizations.", "._packed_params."):
        name = ("." + name + ".").partition(helper)[0].strip(".")
    return name


def _label(name: str) -> str:
    return name or "(model)"


class _MacMode(TorchDispatchMode):
    """Books the MACs of every operation of a forward on the row of the layer it belongs to.

    Storages, not tensors, are told apart, so that views and in-place writes need no special care:
    `depends` holds those computed from the model's input, `origin` the names of the parameters and
    buffers that the others were computed from (nothing for constants made during the forward).
    """

    def __init__(self, model: nn.Module, rows: dict[str, LayerCount], inputs: tuple):
        super().__init__()
        self.rows = rows
        self.running: list[str] = [""]  # modules whose forward is under way, innermost last
        self.folded_macs = 0
        self.uncounted: dict[str, None] = {}  # an ordered set
        self.ran: set[str] = set()
        self.met: set[str] = set()  # stored tensors that met an activation in some operation
        self.depends = WeakIdKeyDictionary()
        self.origin = WeakIdKeyDictionary()
        self.is_parameter: dict[str, bool] = {}
        for prefix, module in model.named_modules():
            for name, tensor in (module._parameters | module._buffers).items():
                if tensor is not None:
                    full = f"{prefix}.{name}".lstrip(".")
                    self.is_parameter[full] = name in module._parameters
                    key = _storage(tensor)
                    self.origin[key] = self.origin.get(key, frozenset()) | {full}
        self.buffers = WeakIdKeyDictionary()  # storages of activations -> their number
        self.sizes: list[int] = []  # elements, by number
        self.flow: list[_Flow] = []
        self.last_row: LayerCount | None = None  # of the latest product, which moves are booked on
        self.moved_before = 0  # elements, before the first product
        for tensor in _tensors(inputs):
            self.depends[_storage(tensor)] = True
            self.buffer(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            with self:  # in inference mode composite operations arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        product = _product(func, args, out)
        tensors = _tensors((args, kwargs))
        active = any(self.is_active(t) for t in tensors)
        if product is not None:
            active |= self.book(product, out)
        if active:
            stored = [t for t in tensors if not self.is_active(t) and self.names(t)]
            self.met.update(*(self.names(t) for t in stored))
            if product is None:
                self.check(func, args, kwargs, out, stored)
            self.move(func, [t for t in tensors if self.is_active(t)], _tensors(out), product)
        names = frozenset().union(*(self.names(t) for t in tensors))
        for tensor in _tensors(out):
            if active:
                self.depends[_storage(tensor)] = True
            elif names:
                self.origin[_storage(tensor)] = names | self.names(tensor)
        return out

    def is_active(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self.depends

    def names(self, tensor: torch.Tensor) -> frozenset[str]:
        return self.origin.get(_storage(tensor), frozenset())

    def buffer(self, tensor: torch.Tensor) -> int:
        """Number of the memory that an activation lies in."""
        if _storage(tensor) not in self.buffers:
            self.buffers[_storage(tensor)] = len(self.sizes)
            self.sizes.append(tensor.numel())
        return self.buffers[_storage(tensor)]

    def move(self, func, inputs: list, outputs: list, product: _Product | None) -> None:
        """Note the activations that an operation reads and writes, and book the elements moved."""
        inputs, outputs = ([t for t in ts if _is_activation(t)] for ts in (inputs, outputs))
        views = all(_storage(t) in self.buffers for t in outputs)
        if not outputs or (views and not func._schema.is_mutable):
            return
        fused = product is None and len({self.buffer(t) for t in inputs}) == 1
        fused = fused and inputs[0].numel() == outputs[0].numel()
        reads = {self.buffer(t): t.numel() for t in inputs}
        writes = {self.buffer(t): t.numel() for t in outputs}
        self.flow.append(_Flow(set(reads), set(writes), fused))
        moved = 0 if fused else sum(reads.values()) + sum(writes.values())
        if self.last_row is None:
            self.moved_before += moved
        else:
            self.last_row.activations_moved += moved

    def book(self, product: _Product, out) -> bool:
        """Put a product into its column; False if it folds into a constant."""
        left, right, macs = product
        left_active, right_active = self.is_active(left), self.is_active(right[0])
        if left_active and right_active:
            row = self.begin(self.rows[self.running[-1]])
            row.activation_macs += macs
            row.bits = row.bits or left.element_size() * 8
            return True
        # packed weights are stored tensors too, but carry no name
        left_stored = not left_active and bool(self.names(left))
        right_stored = not right_active and bool(right[0].is_quantized or self.names(right[0]))
        if not (left_active or right_active) and left_stored == right_stored:
            self.folded_macs += macs
            return False
        # a constant made in the forward, such as a recurrent layer's first state, is no weight
        weights = right if left_active or right_stored else [left]
        row = self.begin(self.row(weights))
        row.macs += macs
        size = sum(w.numel() for w in weights)
        nonzero = _sum(_nonzero(w) for w in weights)
        row.nonzero_macs = _sum((row.nonzero_macs, nonzero and macs // size * nonzero))
        row.bits = max(row.bits or 0, *(w.element_size() * 8 for w in weights))
        if row.output_shape is None:  # its own forward did not run: a function uses the weight
            row.output_shape = tuple(_tensors(out)[0].shape)
        return True

    def begin(self, row: LayerCount) -> LayerCount:
        """The same row, which what is moved from now on is booked on."""
        row.activations_moved += self.moved_before
        self.last_row, self.moved_before = row, 0
        return row

    def row(self, weights: list[torch.Tensor]) -> LayerCount:
        """The running layer's row, or that of the one other layer which owns the weights."""
        names = frozenset().union(*(self.names(w) for w in weights))
        owners = {_layer_name(name.rpartition(".")[0]) for name in names}
        running = self.running[-1]
        return self.rows[owners.pop() if len(owners) == 1 and running not in owners else running]

    def check(self, func, args, kwargs, out, stored: list[torch.Tensor]) -> None:
        """Note an operation which multiplies by a stored tensor in a way that is not understood."""
        packet = func._overloadpacket
        op, where = str(packet), f"inside {_label(self.running[-1])}"
        name = packet.__name__.rstrip("_")
        if name in _NO_PRODUCT or any(part in name for part in _NO_PRODUCT_PARTS):
            return
        if packet in flop_registry:
            macs = flop_registry[packet](*args, **kwargs, out_val=out) // 2
            self.uncounted[f"{op} {where}, {macs:,} MACs by PyTorch's FLOP counter"] = None
        elif "scaled_dot_product" in name:
            self.uncounted[f"{op} {where}, a fused attention kernel"] = None
        elif any(isinstance(a, torch.ScriptObject) for a in tree_leaves(args)):
            self.uncounted[f"{op} {where}, on packed weights"] = None
        for tensor in stored:
            names = self.names(tensor)
            is_mask = name in ("mul", "div") and not any(self.is_parameter[n] for n in names)
            if not (_is_vector(tensor) or is_mask or tensor.dtype == torch.bool):
                what = " * ".join(sorted(names))
                self.uncounted[f"{op} {where}, on {what} {_shape(tensor.shape)}"] = None

    def check_end(self, model: nn.Module, out) -> None:
        """Note weights of layers which ran without any operation on them being seen."""
        for prefix, module in model.named_modules():
            for name, tensor in module._parameters.items():
                full = f"{prefix}.{name}".lstrip(".")
                unseen = prefix in self.ran and tensor is not None and full not in self.met
                if unseen and not _is_vector(tensor):
                    kind = type(module).__name__
                    message = f"{full} {_shape(tensor.shape)} of {_label(prefix)} ({kind})"
                    self.uncounted[f"{message}: no operation on it was seen"] = None
        if not any(self.is_active(t) for t in _tensors(out)):
            self.uncounted["the output depends on the input through no operation seen"] = None


class _Flow(NamedTuple):
    """The activations that one operation reads and writes, by number of their memory."""

    reads: set[int]
    writes: set[int]
    fused: bool  # element by element: it may overwrite what it reads


def _peak_elements(sizes: list[int], flow: list[_Flow]) -> int:
    """The largest number of elements alive at one time; what none writes is alive at the start."""
    last_use = {b: step for step, op in enumerate(flow) for b in op.reads | op.writes}
    written = set().union(*(op.writes for op in flow))
    alive = {b for b in range(len(sizes)) if b not in written}
    peak = sum(sizes[b] for b in alive)
    for step, op in enumerate(flow):
        free = {b for b in op.reads | op.writes if last_use[b] == step}
        if op.fused:
            alive -= free & op.reads
        alive |= op.writes
        peak = max(peak, sum(sizes[b] for b in alive))
        alive -= free
    return peak


def _is_activation(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds activations rather than positions, tokens or masks."""
    return tensor.is_floating_point() or tensor.is_quantized


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_vector(tensor: torch.Tensor) -> bool:
    """Whether it is the bias, scale or slope of a layer rather than a matrix of weights."""
    return sum(size > 1 for size in tensor.shape) < 2


def _storage(tensor: torch.Tensor):
    """What a tensor and its views share; the tensor itself where the layout has no storage."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


# ---------------------------------------------------------------- count


def count_macs(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    *,
    example_inputs: torch.Tensor | tuple | None = None,
    unknown: str = "error",
) -> MacReport:
    """MACs, parameters and relative energy of every layer, from one forward in eval mode.

    input_size: shape of one example without the batch, such as (3, 32, 32); a batch of 1 is put
    before it. Zeros are fed, on the device and of the floating-point type of the parameters.
    example_inputs: instead of a size, the tensor or the tuple of arguments to call the model with;
    counted as they are, so give them a batch of 1.
    unknown: what to do about a weight that meets activations in an operation not understood, or in
    none that could be seen: "error", or "warn" to get the report with these MACs missing.

    A use of a weight is booked on the layer that owns it, whoever multiplies by it (the output
    projection of nn.MultiheadAttention has its own row), an activation product on the running one.

    The model is left as it was, also when its forward raises: modes, gradients, buffers, attributes
    and hooks; so are the random states of the CPU and of CUDA. (A forward that overwrites a
    parameter in place is not undone.) The model may lie on the meta device: nothing is computed
    then, and the non-zero counts are None.

    Raises TypeError for a TorchScript module, ValueError for a bad argument, for a lazy module
    without its shapes yet, or with every uncounted weight and operation named.
    """
    if unknown not in ("error", "warn"):
        raise ValueError(f"unknown must be 'error' or 'warn', not {unknown!r}")
    if (input_size is None) == (example_inputs is None):
        raise ValueError("give either input_size or example_inputs")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{_label(name)} is TorchScript: count the module it was made from")
        if any(is_lazy(t) for t in [*module._parameters.values(), *module._buffers.values()]):
            raise ValueError(f"{_label(name)} is lazy: run the model once to give it its shapes")
    if example_inputs is None:
        example_inputs = _zeros(model, input_size)
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs

    with _restored(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        rows = _parameter_rows(model)
        mode = _MacMode(model, rows, inputs)
        handles = []
        try:
            for name, module in model.named_modules():
                handles += _hook(name, module, mode)
            with mode:
                out = model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        mode.check_end(model, out)

    uncounted = list(mode.uncounted)
    if uncounted:
        message = "MACs that cannot be counted: " + "; ".join(uncounted)
        if unknown == "error":
            raise ValueError(message + ' (unknown="warn" counts the rest)')
        warnings.warn(message, stacklevel=2)
    layers = [r for r in rows.values() if r.parameters or r.macs or r.activation_macs]
    shapes = [tuple(t.shape) for t in _tensors(inputs)]
    peak = _peak_elements(mode.sizes, mode.flow)
    return MacReport(layers, shapes, mode.folded_macs, uncounted, peak)


def _zeros(model: nn.Module, input_size: tuple[int, ...]) -> torch.Tensor:
    """A batch of one example of zeros, where and as the model's weights are."""
    if not input_size or not all(isinstance(n, int) and n > 0 for n in input_size):
        raise ValueError(f"input_size must be positive integers, not {input_size}")
    stored = [*model.parameters(), *model.buffers()]
    floating = next((t for t in stored if t.is_floating_point()), torch.empty(0))
    device = stored[0].device if stored else "cpu"
    return torch.zeros(1, *input_size, dtype=floating.dtype, device=device)


def _parameter_rows(model: nn.Module) -> dict[str, LayerCount]:
    """A row for every layer, its parameters counted, a shared one on the first owner's."""
    rows: dict[str, LayerCount] = {}
    counted: set[int] = set()
    for name, module in model.named_modules():
        layer = _layer_name(name)
        row = rows.setdefault(layer, LayerCount(_label(layer), type(module).__name__))
        for tensor in _stored_parameters(module, counted, is_helper=layer != name):
            row.parameters += tensor.numel()
            row.nonzero_parameters = _sum((row.nonzero_parameters, _nonzero(tensor)))
            row.stored_bytes += stored_bytes(tensor)
    return rows


def _stored_parameters(module: nn.Module, counted: set[int], is_helper: bool) -> Iterator:
    """The tensors that a device would store for a module, in the form in which they are used.

    counted: ids of the parameters met so far, which are passed over. is_helper: the module only
    stores another one's weight, so that of a parametrization nothing but the result counts.
    """
    for name, parameter in module._parameters.items():
        if parameter is None or id(parameter) in counted or is_helper:
            continue
        counted.add(id(parameter))
        mask = module._buffers.get(f"{name.removesuffix('_orig')}_mask")  # torch.nn.utils.prune
        yield parameter if mask is None else parameter * mask
    for name in getattr(module, "parametrizations", ()):  # torch.nn.utils.parametrize
        yield getattr(module, name)
    for packed in _packed(vars(module).values()):  # torch.ao.nn.quantized
        yield from (tensor for tensor in packed.unpack() if tensor is not None)


def _hook(name: str, module: nn.Module, mode: _MacMode) -> tuple:
    """Forward hooks that tell the mode which layer is running; returns their handles."""

    def enter(module, args):
        mode.running.append(_layer_name(name))

    def leave(module, args, out):
        mode.running.pop()
        tensors = _tensors(out)  # none where the layer has raised
        if tensors:
            mode.ran.add(name)
        if tensors and _layer_name(name) == name:
            mode.rows[name].output_shape = tuple(tensors[0].shape)

    # first in and last out, so that the pre-hooks which compute a masked weight run inside
    return (
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    )


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and leave it, its buffers and the random states as they were."""
    modules = list(model.modules())
    tables = ("_parameters", "_buffers", "_modules")
    attributes = [(m, dict(vars(m)), [dict(vars(m)[t]) for t in tables]) for m in modules]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        # the fast paths of attention and of the encoder layer run as one opaque operation
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modules:
            module.training = False  # not eval(), which a model may override
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, values, contents in attributes:
            for extra in vars(module).keys() - values.keys():
                del vars(module)[extra]
            vars(module).update(values)
            for table, content in zip(tables, contents, strict=True):
                vars(module)[table].clear()
                vars(module)[table].update(content)
        with torch.no_grad():
            for buffer, value in buffers:
                if buffer.shape != value.shape:
                    buffer.resize_(value.shape)
                is_sparse = buffer.layout is not torch.strided  # which torch.equal cannot compare
                if is_sparse or not (buffer.is_meta or torch.equal(buffer, value)):
                    buffer.copy_(value)


# ---------------------------------------------------------------- command line


def _example_network() -> nn.Sequential:
    """The CIFAR-10 network of this project: 10,848,768 MACs on an input of (3, 32, 32)."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


class _EmptyOnMeta(TorchFunctionMode):
    """Makes the parameters of torch.nn layers without memory, and all else as usual.

    Under torch.device("meta") a RegNet, which computes its widths with tensors, cannot be built.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def torchvision_model(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A torchvision classification model on the meta device, and the input size of its weights.

    Raises ValueError for a name that is none, ImportError without torchvision.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"unknown torchvision classification model {name!r}")
    crop = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    # only a vision transformer fixes its input size, in the shape of its position embedding
    options = {"image_size": crop} if name.startswith("vit_") else {}
    with _EmptyOnMeta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two models warn that their initialisation may change
        model = models.get_model(name, weights=None, **options).to("meta")
    return model, (3, crop, crop)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count the MACs of a network, layer by layer.")
    parser.add_argument("--model", help="a torchvision classification model")
    parser.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="N",
        help="shape of one example without the batch (default: 3 32 32, or that of the weights)",
    )
    parser.add_argument("--smoke", action="store_true", help="this project's network, in seconds")
    args = parser.parse_args(argv)
    try:
        if args.smoke or args.model is None:
            torch.manual_seed(0)  # a random weight may be exactly zero
            model, size = _example_network(), (3, 32, 32)
        else:
            model, size = torchvision_model(args.model)
        report = count_macs(model, tuple(args.input_size or size))
        print(report, report.energy_table(), sep="\n\n")
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        # also a size that the network cannot take, which torch reports in its own words
        print(f"mac_hooks.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
