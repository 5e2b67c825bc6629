"""One MAC for each use of a weight; products of two activations counted apart; batch 1.

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
not guessed  a multiplication not understood is named in an error, never left out in silence

  report = count_macs(model, (3, 32, 32))
  print(report, report.tree(), sep="\\n\\n")  # or .macs, .nonzero_macs, .layers, .to_dict() ...

  python mac_hooks.py --model resnet50 --tree  # prints the report of a torchvision model
  python mac_hooks.py --smoke                  # that of resnet18, in seconds
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary


def count_macs(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    *,
    example_inputs: Tensor | tuple | dict | None = None,
    bits: int | None = None,
    unknown: str = "error",
    observe: Callable | None = None,
) -> MacReport:
    """MACs, parameters and relative energy of every layer, from one forward in eval mode.

    input_size: shape of one example without the batch, such as (3, 32, 32). A batch of 1 of zeros
    is fed, on the device and of the floating-point type of the parameters.
    example_inputs: instead, the tensor, the tuple of arguments or the dict of keyword arguments to
    call the model with; counted as they are, so give them a batch of 1.
    bits: width of a MAC, where the tensors do not tell (integers that are stored as floats).
    unknown: what to do about what cannot be counted: "error", or "warn" to get the rest.
    observe: called after each operation on activations with (operation, the activations it reads,
    the tensors it returns, the LayerCount that its product was booked on or None).

    A use of a weight is booked on the layer that owns it, whoever multiplies by it (the output
    projection of nn.MultiheadAttention has its own row), an activation product on the running one.

    The model is left as it was, also when its forward raises: modes, gradients, buffers, hooks, and
    attributes with what is in their dicts, lists and sets; so are the random states of the CPU and
    of CUDA. (A forward that overwrites a parameter in place is not undone.) The model may lie on
    the meta device: nothing is computed then, and the non-zero counts are None.

    Raises TypeError for a TorchScript module, ValueError for a bad argument, for a lazy module
    without its shapes yet, or with every uncounted weight and operation named.
    """
    if unknown not in ("error", "warn"):
        raise ValueError(f"unknown must be 'error' or 'warn', not {unknown!r}")
    if bits is not None and (not isinstance(bits, int) or bits < 1):
        raise ValueError(f"bits must be a positive integer, not {bits!r}")
    if (input_size is None) == (example_inputs is None):
        raise ValueError("give either input_size or example_inputs")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{_label(name)} is TorchScript: count the module it was made from")
        if any(is_lazy(t) for t in [*module._parameters.values(), *module._buffers.values()]):
            raise ValueError(f"{_label(name)} is lazy: run the model once to give it its shapes")
    args = _zeros(model, input_size) if example_inputs is None else example_inputs
    args, kwargs = ((), args) if isinstance(args, dict) else (args, {})
    args = (args,) if isinstance(args, Tensor) else tuple(args)

    # a fused kernel of attention would be one opaque operation
    with restored(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        mode, handles = _MacMode(model, (args, kwargs), observe), []
        try:
            for name, module in model.named_modules():
                handles += mode.hook(name, module)
            with mode:
                out = model(*args, **kwargs)
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
    layers = [row for row in mode.rows.values() if row.parameters or row.total_macs]
    for row in layers:
        row.bits = row.bits and (bits or row.bits)
    shapes = [tuple(t.shape) for t in _tensors((args, kwargs), set())]
    return MacReport(layers, shapes, mode.folded_macs, uncounted)


# ---------------------------------------------------------------- report


@dataclass
class LayerCount:
    """One layer: MACs summed over its calls, parameters counted once.

    `macs` are uses of weights, zeros included; `activation_macs` are products of two activations. A
    non-zero count is None on the meta device. `output_shape` (of the last call, () of a number) is
    None for a layer that never ran. Parameters are those to be stored on a device: a masked or
    parametrized weight counts as the tensor that it yields. `weights` are the parameters but for
    biases and normalisation. `bits` is the width in which the weights are stored, or that of the
    activations where nothing else is multiplied, the widest where they differ; None without MACs.
    """

    name: str
    type: str
    output_shape: tuple[int, ...] | None = None
    macs: int = 0
    nonzero_macs: int | None = 0
    activation_macs: int = 0
    parameters: int = 0
    nonzero_parameters: int | None = 0
    weights: int = 0
    nonzero_weights: int | None = 0
    bits: int | None = None

    @property
    def total_macs(self) -> int:
        """Both kinds of MACs together, the figure that is usually published."""
        return self.macs + self.activation_macs

    @property
    def used_macs(self) -> int:
        """MACs whose weight is not zero; the dense ones where zeros are unknown."""
        return self.macs if self.nonzero_macs is None else self.nonzero_macs

    @property
    def energy(self) -> float:
        """Energy score of the non-zero and activation MACs; of dense ones if zeros are unknown."""
        return energy_score(self.used_macs + self.activation_macs, self.bits or 0)

    @property
    def zeros_percent(self) -> float | None:
        """Share of the weights that are zero; None without weights or values."""
        known = self.weights and self.nonzero_weights is not None
        return 100 * (1 - self.nonzero_weights / self.weights) if known else None


@dataclass
class MacReport:
    """What `count_macs` found: one row a layer that owns parameters or did MACs, in module order.

    Its columns in TOTALS are attributes too, summed over the layers: `report.macs` and so on.
    `folded_macs` are products of stored tensors alone, in no column: they need computing only once.
    `uncounted` names what could not be counted (always empty unless unknown="warn").
    """

    layers: list[LayerCount]
    input_shapes: list[tuple[int, ...]]
    folded_macs: int = 0
    uncounted: list[str] = field(default_factory=list)

    TOTALS = ("macs", "nonzero_macs", "activation_macs", "parameters", "nonzero_parameters")
    TOTALS += ("weights", "nonzero_weights", "total_macs", "energy")

    def __getattr__(self, name: str) -> int | float | None:
        if name not in MacReport.TOTALS:
            raise AttributeError(f"a MacReport has no {name!r}")
        return _sum(getattr(layer, name) for layer in self.layers)

    def to_dict(self) -> dict:
        """Plain dicts, lists and numbers for json.dump: fields, totals and energies."""
        layers = [asdict(layer) | {"energy": layer.energy} for layer in self.layers]
        return asdict(self) | {"layers": layers} | {key: getattr(self, key) for key in self.TOTALS}

    def table(self) -> str:
        """The report as aligned text: a header, one line a layer, the totals, then what to note."""
        columns = {key: getattr(self, key) for key in self.TOTALS[:-2]}
        header = "layer,type,output,MACs,nonzero MACs,act. MACs,params,zeros %,bits,energy"
        lines = [header.split(",")]
        for row in (*self.layers, LayerCount("total", "", (), **columns)):
            shape = "not run" if row.output_shape is None else _shape(row.output_shape)
            counts = (row.macs, row.nonzero_macs, row.activation_macs, row.parameters)
            zeros = "-" if row.zeros_percent is None else f"{row.zeros_percent:.1f}"
            energy = self.energy if row.name == "total" else row.energy
            counts = ["?" if count is None else f"{count:,}" for count in counts]
            row_bits = str(row.bits or "")
            lines.append([row.name, row.type, shape, *counts, zeros, row_bits, f"{energy:.2f}"])
        text = ["input " + ", ".join(map(_shape, self.input_shapes)), aligned(lines, 3)]
        if self.folded_macs:
            text.append(f"not in the totals: {self.folded_macs:,} MACs among stored tensors alone")
        return "\n".join([*text, *(f"NOT COUNTED: {what}" for what in self.uncounted)])

    __str__ = table

    def tree(self) -> str:
        """Every module with all that it holds: MACs of both kinds, their share, parameters."""
        sums: dict[tuple[str, ...], list[int]] = {}
        for row in self.layers:
            path = () if row.name == _label("") else tuple(row.name.split("."))
            for depth in range(len(path) + 1):
                entry = sums.setdefault(path[:depth], [0, 0])
                entry[:] = entry[0] + row.total_macs, entry[1] + row.parameters
        lines = [["module", "MACs", "share %", "params"]]
        for path, (macs, parameters) in sums.items():
            name = "  " * len(path) + _label("".join(path[-1:]))
            share = 100 * macs / max(1, self.total_macs)
            lines.append([name, f"{macs:,}", f"{share:.1f}", f"{parameters:,}"])
        return aligned(lines, 1)


def energy_score(macs: int, bits: int) -> float:
    """Relative energy of MACs on operands of so many bits: MACs in millions x bits / 8, no unit.

    10,848,768 MACs score 43.40 at 32 bit and 10.85 at 8 bit; half of them score 21.70 at 32 bit.
    It compares the bits that go through the multipliers and leaves out:
    - memory: a 64-bit SRAM access costs 10-100 pJ and a DRAM access 1,300-2,600 pJ, where the
      multiplication and addition of an INT8 MAC cost 0.23 pJ (Horowitz, ISSCC 2014, 45 nm);
    - the real price of FP32: 4.6 pJ a MAC by the same source, 15-20 times INT8, not 4 times;
    - the kernel: unstructured zeros save nothing on a dense one, and a sparse one pays for its
      indices in memory and in instructions;
    - idle and leakage power, and requantisation between INT8 layers.
    """
    return macs / 1e6 * bits / 8


def aligned(lines: list[list[str]], names: int) -> str:
    """A header, rows and a total, if any, as text; the first columns, names, to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{'<' if i < names else '>'}{w}}}" for i, w in enumerate(widths))
    text = [form.format(*line).rstrip() for line in lines]
    rule = "-" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], *[rule] * (lines[-1][0] == "total"), text[-1]])


def _sum(counts) -> int | float | None:
    """Sum of counts, unknown (None) if one of them is."""
    counts = list(counts)
    return None if None in counts else sum(counts)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _label(name: str) -> str:
    return name or "(model)"


# ---------------------------------------------------------------- what one operation multiplies
# A product is (left operands, right operands, MACs). There are several on the left where a layer has
# two inputs, or states beside its input, and on the right where it has two matrices.

aten, quantized = torch.ops.aten, torch.ops.quantized


def _conv(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> tuple:
    """Each weight is used once per position (batch x spatial) of the output, or of x (N, C, ...)."""
    positions = (x if transposed else out).shape
    return [x], [weight], weight.numel() * positions[0] * math.prod(positions[2:])


def _linear(inputs: list[Tensor], weights: list[Tensor]) -> tuple:
    """Each weight is used once per leading position (batch, time) of the first input (..., F)."""
    return inputs, weights, sum(w.numel() for w in weights) * math.prod(inputs[0].shape[:-1])


def _matmul(left: Tensor, right: Tensor, *_) -> tuple:
    """(..., m, k) x (..., k, n) or (k,): each element of left meets the n columns of right."""
    return [left], [right], left.numel() * (right.shape[-1] if right.ndim > 1 else 1)


_PRODUCTS: dict[object, Callable[[tuple, object], tuple]] = {
    aten.convolution: lambda args, out: _conv(args[0], args[1], out, transposed=args[6]),
    aten._trilinear: lambda args, out: _linear([args[0], args[2]], [args[1]]),  # nn.Bilinear
    aten.mkldnn_rnn_layer: lambda args, out: _linear(_tensors(args), list(args[1:3])),
    aten._cudnn_rnn: lambda args, out: _linear(_tensors(args), [w for w in args[1] if w.ndim > 1]),
}
for _op in (aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten._int_mm, aten._scaled_mm):
    _PRODUCTS[_op] = lambda args, out: _matmul(*args)
for _op in (aten.addmm, aten.baddbmm, aten.addbmm, aten.addmv, aten._sparse_addmm):
    _PRODUCTS[_op] = lambda args, out: _matmul(*args[1:])
_PRODUCTS[quantized.matmul] = _PRODUCTS[aten.mm]

# Operations in which a weight may meet an activation without a multiplication worth counting:
# names in full, and the beginnings of the names that have a product among torch's quantized ones.
_NO_PRODUCT = {
    "aten": """add sub rsub maximum minimum where masked_fill masked_scatter cat stack copy index
        index_put index_select gather scatter slice_scatter select_scatter""".split(),
    "torchvision": "nms roi_align roi_pool ps_roi_align ps_roi_pool".split(),
}
_QUANTIZED_PRODUCTS = ("linear", "conv", "int4mm", "quantized_")
_RECURRENT = ("quantized_lstm", "quantized_gru")  # of aten


def _product(packet, args: tuple, out) -> tuple | None:
    """What an operation multiplies; None if it is none of those understood."""
    if packet in _PRODUCTS:
        return _PRODUCTS[packet](args, out)
    namespace, name = _names(packet)
    # torch.ao's layers and cells: (x, ..., packed weights, ...), other operations only (un)pack
    if namespace == "quantized" and name.startswith(_QUANTIZED_PRODUCTS) or name in _RECURRENT:
        weights = [t for t in _unpacked(args) if t.ndim > 1]
        if weights and isinstance(args[0], Tensor):
            if name.startswith("conv"):
                return _conv(args[0], weights[0], out, "transpose" in name)
            return _linear(_tensors(args), weights)
    return None


@functools.cache
def _names(packet) -> tuple[str, str]:
    """(library, name) of an operation, the mark of an in-place one left out."""
    namespace, _, name = str(packet).rstrip("_").partition(".")
    return namespace, name


def _multiplies_nothing(packet) -> bool:
    """Whether an operation that is no product has no part in one."""
    namespace, name = _names(packet)
    if namespace == "quantized":
        return not name.startswith(_QUANTIZED_PRODUCTS)
    is_known = namespace == "aten" and ("embedding" in name or "_norm" in name)
    return is_known or name in _NO_PRODUCT.get(namespace, ())


def _unpacked(value) -> list[Tensor]:
    """Weights and biases in the packed parameters that torch.ao's quantized layers keep."""
    if isinstance(value, torch.ScriptObject):
        if hasattr(value, "unpack"):  # matrices of float16 are shown as float32
            found = _tensors(value.unpack())
            return [t.half() if t.ndim > 1 and not t.is_quantized else t for t in found]
        is_cell = "CellParams" in str(value._type())  # of a recurrent layer: holds linear ones
        return _unpacked(value.__getstate__()) if is_cell else []
    return [t for v in value for t in _unpacked(v)] if isinstance(value, (list, tuple)) else []


def _tensors(value, objects: set[int] | None = None) -> list[Tensor]:
    """Every tensor in nested containers; in dataclasses and namespaces, too, with a set for them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (dict, list, tuple, set, frozenset, deque)):
        children = value.values() if isinstance(value, dict) else value
    elif objects is None or id(value) in objects or isinstance(value, (type, nn.Module)):
        return []
    else:
        objects.add(id(value))
        names = getattr(value, "__dict__", None) or getattr(value, "__dataclass_fields__", ())
        children = [getattr(value, name, None) for name in names]
    return [t for child in children for t in _tensors(child, objects)]


# ---------------------------------------------------------------- how it works


def _layer(name: str) -> str:
    """Label of the layer that a module serves: itself, or that whose weight it stores."""
    for helper in (".parametrizations.", "._packed_params.", "._all_weight_values."):
        name = ("." + name + ".").partition(helper)[0].strip(".")
    return _label(name)


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(layer, parameter, tensor) of all that a device would store, in the form that is used.

    A shared parameter comes with its first owner only, a masked or parametrized one as the result.
    """
    met: set[int] = set()
    for name, module in model.named_modules():
        layer = _layer(name)
        for key, parameter in module._parameters.items() if layer == _label(name) else ():
            if parameter is not None and id(parameter) not in met:
                met.add(id(parameter))
                key = key.removesuffix("_orig")  # torch.nn.utils.prune
                mask = module._buffers.get(f"{key}_mask")
                yield layer, key, parameter if mask is None else parameter * mask
        for key in getattr(module, "parametrizations", ()):  # torch.nn.utils.parametrize
            yield layer, key, getattr(module, key)
        packed = [v for v in vars(module).values() if isinstance(v, torch.ScriptObject)]
        for tensor in _unpacked(packed):  # torch.ao.nn.quantized
            yield layer, "weight" if tensor.ndim > 1 else "bias", tensor


# What is known of a storage: computed from the model's input, or from which stored tensors.
_ACTIVE, _CONSTANT = None, frozenset()


class _MacMode(TorchDispatchMode):
    """Books the MACs of every operation of a forward on the row of the layer it belongs to.

    Forward hooks say which module is running, and a dispatch mode sees the ATen operations that it
    runs, so that a functional call and a fused layer are seen like any other. `known` says of each
    storage (so that views and in-place writes need no care) whether it was computed from the input,
    or else from which parameters, buffers and kept tensors: from none, for a constant.
    """

    def __init__(self, model: nn.Module, inputs, observe: Callable | None):
        super().__init__()
        self.observe = observe
        self.running = [(_label(""), False)]  # layers under way, innermost last; may it not fold
        self.folded_macs = 0
        self.uncounted: dict[str, None] = {}  # an ordered set
        self.ran: set[str] = set()
        self.met: set[str] = set()  # stored tensors that met an activation in some operation
        self.seen_active = False
        self.whole = {torch.ops.prim.device.default}  # operations that do not decompose
        self.counts = WeakIdKeyDictionary()  # storage -> non-zeros of its views
        self.known = WeakIdKeyDictionary()
        self.stored: dict[str, Tensor] = {}
        self.rows: dict[str, LayerCount] = {}
        for prefix, module in model.named_modules():
            self.rows.setdefault(_layer(prefix), LayerCount(_layer(prefix), type(module).__name__))
            own = dict(vars(module))  # a cache that an earlier forward filled is stored, too
            for name, value in (own.pop("_parameters") | own.pop("_buffers") | own).items():
                for tensor in _tensors(value) if isinstance(value, _MAY_HOLD_TENSORS) else ():
                    full = f"{prefix}.{name}".lstrip(".")
                    self.stored[full] = tensor
                    self.known[_storage(tensor)] = self.names(tensor) | {full}
        for tensor in _tensors(inputs, set()):
            self.known[_storage(tensor)] = _ACTIVE
        norms = {_layer(n) for n, m in model.named_modules() if isinstance(m, _NORMS)}
        for layer, key, tensor in stored_tensors(model):
            row, nonzero = self.rows[layer], self.nonzero(tensor)
            row.parameters += tensor.numel()
            row.nonzero_parameters = _sum((row.nonzero_parameters, nonzero))
            if tensor.ndim > 1 and "bias" not in key and layer not in norms:
                row.weights += tensor.numel()
                row.nonzero_weights = _sum((row.nonzero_weights, nonzero))

    def hook(self, name: str, module: nn.Module) -> tuple:
        """Forward hooks that tell which layer is running; returns their handles."""
        layer = _layer(name)
        recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))

        def enter(module, args, kwargs):
            # a recurrent layer with any active input or state runs as a whole
            given = _tensors((args, kwargs)) if recurrent else []
            self.running.append((layer, self.any_active(given)))

        def leave(module, args, out):
            self.running.pop()
            if out is not None:  # it has not raised
                self.ran.add(name)
                if layer == _label(name):
                    shapes = [t.shape for t in _tensors(out, set())] or [getattr(out, "shape", ())]
                    self.rows[layer].output_shape = tuple(shapes[0])

        # first in and last out, so that the pre-hooks which compute a masked weight run inside
        return (
            module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.whole:
            with self:  # in inference mode composite operations arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            self.whole.add(func)
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        states = [self.known_of(t) for t in inputs]
        active, row = _ACTIVE in states, None
        product = _product(func._overloadpacket, args, out)
        if product:
            row = self.book(inputs, outputs, *product)
            active |= row is not None
        if active:
            self.seen_active = True
            self.met.update(*(names for names in states if names))
            if not product:
                stored = [t for t, names in zip(inputs, states, strict=True) if names]
                self.check(func, args, stored)
            if self.observe:
                reads = [t for t, s in zip(inputs, states, strict=True) if s is _ACTIVE]
                self.observe(func, reads, outputs, row)
            for tensor in outputs:
                self.known[_storage(tensor)] = _ACTIVE
        elif names := _CONSTANT.union(*states):
            for tensor in outputs:
                self.known[_storage(tensor)] = names | self.names(tensor)
        return out

    def known_of(self, tensor: Tensor) -> frozenset[str] | None:
        return self.known.get(_storage(tensor), _CONSTANT)

    def any_active(self, tensors: list[Tensor]) -> bool:
        return any(self.known_of(t) is _ACTIVE for t in tensors)

    def names(self, tensor: Tensor) -> frozenset[str]:
        return self.known_of(tensor) or _CONSTANT

    def book(self, inputs: list, outputs: list, left: list, right: list, macs: int):
        """Put a product into its column and return its row; None if it folds into a constant."""
        running, whole = self.running[-1]
        left_active, right_active = self.any_active(left), self.any_active(right)
        if left_active and right_active:
            row = self.rows[running]
            row.activation_macs += macs
            row.bits = row.bits or left[0].element_size() * 8
            return row
        left_stored = not left_active and bool(self.names(left[0]))
        is_packed = id(right[0]) not in map(id, inputs)
        right_stored = is_packed or not right_active and bool(self.names(right[0]))
        if not (left_active or right_active or whole) and left_stored == right_stored:
            self.folded_macs += macs
            return None
        # a constant made in the forward, such as a recurrent layer's first state, is no weight
        weights = right if left_active or right_stored else left
        owners = {_layer(n.rpartition(".")[0]) for w in weights for n in self.names(w)}
        row = self.rows[owners.pop() if len(owners) == 1 and running not in owners else running]
        row.macs += macs
        nonzero, size = _sum(map(self.nonzero, weights)), sum(w.numel() for w in weights)
        row.nonzero_macs = _sum((row.nonzero_macs, nonzero and macs * nonzero // size))
        row.bits = max(row.bits or 0, *map(self.bits, weights))
        if row.output_shape is None:  # its own forward did not run: a function uses the weight
            row.output_shape = tuple(outputs[0].shape)
        return row

    def bits(self, weight: Tensor) -> int:
        """Width of a weight, or of the stored tensor from which it was widened, scales apart."""
        stored = [self.stored[name] for name in self.names(weight)]
        widths = [t.element_size() for t in stored if not _is_vector(t)]
        return 8 * min(weight.element_size(), max(widths, default=math.inf))

    def nonzero(self, tensor: Tensor) -> int | None:
        """How many elements are not zero, counted once; None on the meta device."""
        if tensor.is_meta:
            return None
        views = self.counts.setdefault(_storage(tensor), {})
        key = (tensor.dtype, None if tensor.is_inference() else tensor._version)
        if tensor.layout is torch.strided:
            strides = sorted(zip(tensor.stride(), tensor.shape, strict=True))
            key += (tensor.storage_offset(), *strides)
        if key not in views:
            # of a quantized tensor, zero is where an element equals its zero point
            values = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
            views[key] = int(torch.count_nonzero(values))
        return views[key]

    def check(self, func, args: tuple, stored: list[Tensor]) -> None:
        """Note an operation on activations that may multiply in a way that is not understood."""
        packet, name = func._overloadpacket, str(func._overloadpacket)
        if _multiplies_nothing(packet):
            return
        where = f"{name} inside {self.running[-1][0]}"
        is_packed = any(isinstance(a, torch.ScriptObject) for a in args)
        is_foreign = func.namespace not in ("aten", "prim", "prims", "quantized_decomposed")
        is_fused = packet in flop_registry or "attention" in name or name.endswith("mm")
        if is_packed or is_foreign or is_fused:
            kind = ", on packed weights" if is_packed else ", of another library" * is_foreign
            self.uncounted[where + kind] = None
            return
        for tensor in stored:
            names = self.names(tensor)
            is_weight = any(isinstance(self.stored[n], nn.Parameter) for n in names)
            is_mask = name.rstrip("_") in ("aten.mul", "aten.div") and not is_weight
            if not (_is_vector(tensor) or is_mask or tensor.dtype == torch.bool):
                what = f"on {' * '.join(sorted(names))} {_shape(tensor.shape)}"
                self.uncounted[f"{where}, {what}"] = None

    def check_end(self, model: nn.Module, out) -> None:
        """Note weights of layers which ran without any operation on them being seen."""
        for prefix, module in model.named_modules():
            kept = {f"{prefix}.{name}".lstrip(".") for name in vars(module)}
            if prefix not in self.ran or kept & self.met:  # a filled cache stands for its weights
                continue
            for name, tensor in module._parameters.items():
                full = f"{prefix}.{name}".lstrip(".")
                if not (tensor is None or full in self.met or _is_vector(tensor)):
                    what = f"{full} {_shape(tensor.shape)} of {_label(prefix)}"
                    kind = type(module).__name__
                    self.uncounted[f"{what} ({kind}): no operation on it was seen"] = None
        outputs = _tensors(out, set())
        if not (self.any_active(outputs) if outputs else self.seen_active):
            self.uncounted["the output depends on the input through no operation seen"] = None


_MAY_HOLD_TENSORS = (Tensor, dict, list, tuple, set, deque)
_NORMS = (nn.LayerNorm, nn.RMSNorm)  # those whose scale may have several dimensions


def _is_vector(tensor: Tensor) -> bool:
    """Whether it is the bias, scale or slope of a layer rather than a matrix of weights."""
    return sum(size > 1 for size in tensor.shape) < 2


def _storage(tensor: Tensor):
    """What a tensor and its views share; the tensor itself where the layout has no storage."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


def _zeros(model: nn.Module, input_size: tuple[int, ...]) -> Tensor:
    """A batch of one example of zeros, where and as the model's weights are."""
    if not input_size or not all(isinstance(n, int) and n > 0 for n in input_size):
        raise ValueError(f"input_size must be positive integers, not {input_size}")
    stored = [*model.parameters(), *model.buffers()]
    floating = next((t for t in stored if t.is_floating_point()), torch.empty(0))
    device = stored[0].device if stored else "cpu"
    return torch.zeros(1, *input_size, dtype=floating.dtype, device=device)


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and leave all that it keeps, and the random states, as before."""
    kept, copies = {}, {}
    for module in model.modules():
        _keep(vars(module), kept, copies)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        # the fast paths of attention and of the encoder layer run as one opaque operation
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            vars(module)["training"] = False  # not eval(), which a model may override
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for value, before in kept.values():
            value.clear()
            (value.update if isinstance(value, (dict, set)) else value.extend)(before)


_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, list, deque, set))


def _keep(value, kept: dict[int, tuple], copies: dict[int, Tensor]) -> None:
    """Note what nested dicts, lists and sets hold, and put copies of their tensors in their place."""
    if id(value) in kept:
        return
    kept[id(value)] = value, value.copy() if value else ()
    if isinstance(value, set):
        return  # its elements have no place that a copy could take
    for key, element in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if type(element) in _CONTAINERS:
            _keep(element, kept, copies)
        elif isinstance(element, Tensor) and not isinstance(element, nn.Parameter):
            value[key] = copies.setdefault(id(element), element.detach().clone())


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count the MACs of a network, layer by layer.")
    parser.add_argument("--model", default="resnet18", help="a torchvision classification model")
    size = "shape of one example without the batch (default: 3 224 224)"
    parser.add_argument("--input-size", type=int, nargs="+", default=(3, 224, 224), help=size)
    parser.add_argument("--tree", action="store_true", help="also print each module's share")
    parser.add_argument("--smoke", action="store_true", help="count resnet18, in seconds")
    args = parser.parse_args(argv)
    try:
        from torchvision import models

        name = "resnet18" if args.smoke else args.model
        if name not in models.list_models(module=models):
            raise ValueError(f"unknown torchvision classification model {name!r}")
        with warnings.catch_warnings(action="ignore"):  # two announce other initial weights
            report = count_macs(models.get_model(name, weights=None), tuple(args.input_size))
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        # also a size that the network cannot take, which torch reports in its own words
        print(f"mac_hooks.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(report, *([report.tree()] if args.tree else []), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
