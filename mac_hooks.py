"""One MAC for each use of a weight; products of two activations counted apart; batch 1.

counted      convolutions, plain and transposed, linear, bilinear and recurrent layers and cells,
             attention, the same arithmetic called as a function (F.linear, matmul, einsum); with
             float, masked, parametrized and torch.ao-quantized weights
not counted  biases, normalisation, pooling, activation functions, look-ups, scaling by a vector,
             element-wise products of activations; products of stored tensors alone, which fold
             before deployment, are reported apart
borders      a weight is used once per output position of a convolution, once per input position of
             a transposed one, whatever the padding; a mask in attention saves nothing
not guessed  a multiplication not understood is named in an error, never left out in silence

  report = count_macs(model, (3, 32, 32))  # .macs, .nonzero_macs, .layers, .to_dict() ...
  print(report, report.tree(), sep="\\n\\n")

  python mac_hooks.py --model resnet50 --tree  # of a torchvision model; --smoke: resnet18
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
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

    input_size: shape of one example of zeros without the batch, such as (3, 32, 32).
    example_inputs: instead, the tensor, the tuple of arguments or the dict of keyword arguments to
    call the model with; counted as they are, so give them a batch of 1.
    bits: width of a MAC, where the tensors do not tell (integers that are stored as floats).
    unknown: what to do about what cannot be counted: "error", or "warn" to get the rest.
    observe: called after each operation on activations with (operation, the activations it reads,
    the tensors it returns, the LayerCount that its product was booked on or None).

    A use of a weight is booked on the layer that owns it, a product of activations on the running
    one. The model, but for a parameter overwritten in place, and the random states are left as they
    were, also when the forward raises. On the meta device nothing is computed.
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
            raise TypeError(f"{_layer(name)} is TorchScript: count the module it was made from")
        if any(map(nn.parameter.is_lazy, (module._parameters | module._buffers).values())):
            raise ValueError(f"{_layer(name)} is lazy: run the model once to give it its shapes")
    inputs = example_inputs
    if inputs is None:  # zeros, where and as the model's weights are
        if not input_size or not all(isinstance(n, int) and n > 0 for n in input_size):
            raise ValueError(f"input_size must be positive integers, not {input_size}")
        stored = (*model.parameters(), *model.buffers(), torch.empty(0))
        like = next(t for t in stored if t.is_floating_point())
        inputs = torch.zeros(1, *input_size, dtype=like.dtype, device=like.device)
    args, kwargs = ([], dict(inputs)) if isinstance(inputs, dict) else (inputs, {})
    args = [args] if isinstance(args, Tensor) else list(args)

    with restored(model):
        # a forward may write to its inputs; of tensors of inference mode, products are not seen
        args, kwargs = _copied([args, kwargs], {})
        mode = _MacMode(model, (args, kwargs), observe)
        shapes = [tuple(t.shape) for t in _tensors((args, kwargs), set())]
        with mode:
            out = model(*args, **kwargs)
        mode.check_end(out)
    uncounted = list(dict.fromkeys(mode.uncounted))
    if uncounted:
        message = "MACs that cannot be counted: " + "; ".join(uncounted)
        if unknown == "error":
            raise ValueError(message + ' (unknown="warn" counts the rest)')
        warnings.warn(message, stacklevel=2)
    layers = [row for row in mode.rows.values() if row.parameters or row.total_macs]
    for row in layers:
        row.bits = row.bits and (bits or row.bits)
    return MacReport(layers, shapes, mode.folded_macs, uncounted)


# ---------------------------------------------------------------- report


@dataclass
class LayerCount:
    """One layer: MACs summed over its calls, parameters counted once; on meta, non-zeros are None.

    A masked or parametrized weight counts as the tensor that it yields, the one to be stored.
    """

    name: str
    type: str
    output_shape: tuple[int, ...] | None = None  # of the last call; () of a number, None if not run
    macs: int = 0  # uses of weights, zeros included
    nonzero_macs: int | None = 0
    activation_macs: int = 0  # products of two activations
    parameters: int = 0
    nonzero_parameters: int | None = 0
    weights: int = 0  # the parameters but for biases and normalisation
    nonzero_weights: int | None = 0
    bits: int | None = None  # of the widest stored weight, else of activations; None without MACs

    @property
    def total_macs(self) -> int:
        """Both kinds of MACs together, the figure that is usually published."""
        return self.macs + self.activation_macs

    @property
    def used_macs(self) -> int:
        """The same without those whose weight is known to be zero."""
        used = self.macs if self.nonzero_macs is None else self.nonzero_macs
        return used + self.activation_macs

    @property
    def energy(self) -> float:
        """Energy score of the used MACs."""
        return energy_score(self.used_macs, self.bits or 0)

    @property
    def zeros_percent(self) -> float | None:
        """Share of the weights that are zero; None without weights or values."""
        known = self.weights and self.nonzero_weights is not None
        return 100 * (1 - self.nonzero_weights / self.weights) if known else None


@dataclass
class MacReport:
    """One row a layer that owns parameters or did MACs; their sums are attributes: `report.macs`."""

    layers: list[LayerCount]  # in module order
    input_shapes: list[tuple[int, ...]]
    folded_macs: int = 0  # of stored tensors alone, computed once: in no other column
    uncounted: list[str] = field(default_factory=list)  # empty unless unknown="warn"

    TOTALS = ("macs", "nonzero_macs", "activation_macs", "parameters", "nonzero_parameters")
    TOTALS += ("weights", "nonzero_weights", "total_macs", "energy")
    # with these it is the last row of its own table
    name, type, output_shape, bits = "total", "", (), None
    zeros_percent = LayerCount.zeros_percent

    def __post_init__(self):
        for key in self.TOTALS:
            setattr(self, key, _sum(getattr(layer, key) for layer in self.layers))

    def to_dict(self) -> dict:
        """Plain dicts, lists and numbers for json.dump: fields, totals and energies."""
        layers = [asdict(layer) | {"energy": layer.energy} for layer in self.layers]
        return asdict(self) | {"layers": layers} | {key: getattr(self, key) for key in self.TOTALS}

    def table(self) -> str:
        """The report as aligned text: a header, one line a layer, the totals, then what to note."""
        header = "layer,type,output,MACs,nonzero MACs,act. MACs,params,zeros %,bits,energy"
        lines = [header.split(",")]
        for row in (*self.layers, self):
            shape = "not run" if row.output_shape is None else _shape(row.output_shape)
            counts = (row.macs, row.nonzero_macs, row.activation_macs, row.parameters)
            counts = ["?" if count is None else f"{count:,}" for count in counts]
            zeros = "-" if row.zeros_percent is None else f"{row.zeros_percent:.1f}"
            numbers = [*counts, zeros, str(row.bits or ""), f"{row.energy:.2f}"]
            lines.append([row.name, row.type, shape, *numbers])
        text = ["input " + ", ".join(map(_shape, self.input_shapes)), aligned(lines, 3)]
        if self.folded_macs:
            text.append(f"not in the totals: {self.folded_macs:,} MACs among stored tensors alone")
        return "\n".join([*text, *(f"NOT COUNTED: {what}" for what in self.uncounted)])

    __str__ = table

    def tree(self) -> str:
        """Every module with all that it holds: MACs of both kinds, their share, parameters."""
        macs, parameters = Counter(), Counter()
        for row in self.layers:
            path = (_ROOT, *row.name.split(".")) if row.name != _ROOT else (_ROOT,)
            for part in itertools.accumulate((name,) for name in path):
                macs[part] += row.total_macs
                parameters[part] += row.parameters
        lines = [["module", "MACs", "share %", "params"]]
        for part, count in macs.items():
            share = f"{100 * count / max(1, self.total_macs):.1f}"
            name = "  " * (len(part) - 1) + part[-1]
            lines.append([name, f"{count:,}", share, f"{parameters[part]:,}"])
        return aligned(lines, 1)


def energy_score(macs: int, bits: int) -> float:
    """Relative energy of MACs on operands of so many bits: MACs in millions x bits / 8, no unit.

    It compares the bits that go through the multipliers. Left out: memory (a DRAM access costs
    1,300-2,600 pJ, an INT8 MAC 0.23 pJ: Horowitz, ISSCC 2014, 45 nm); that an FP32 MAC costs 15-20
    times an INT8 one, not 4 (same source); that unstructured zeros save nothing on a dense kernel
    and cost a sparse one its indices; idle and leakage power; requantisation between layers.
    """
    return macs / 1e6 * bits / 8


def aligned(lines: list[list[str]], names: int) -> str:
    """A header, rows and a total, if any, as text; the first columns, names, to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{'<' if i < names else '>'}{w}}}" for i, w in enumerate(widths))
    text = [form.format(*line).rstrip() for line in lines]
    rule = "-" * max(map(len, text))
    total = [rule, text.pop()] if lines[-1][0] == "total" else []
    return "\n".join([text[0], rule, *text[1:], *total])


def _sum(counts) -> int | float | None:
    """Sum of counts, unknown (None) if one of them is."""
    counts = list(counts)
    return None if None in counts else sum(counts)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# ---------------------------------------------------------------- what one operation multiplies

# products of matrices
_MATRICES = """aten.mm aten.bmm aten.mv aten.dot aten.vdot aten._int_mm aten._scaled_mm aten.addmm
    aten.baddbmm aten.addbmm aten.addmv aten._sparse_addmm quantized.matmul""".split()
# layers, and which argument follows their weights, which start at 1; nn.Bilinear is a _trilinear
_LAYERS = {"aten.convolution": 2, "aten._trilinear": 2, "aten._cudnn_rnn": 2}
_LAYERS |= {"aten.mkldnn_rnn_layer": 3}
# layers of torch.ao, whose weights are packed
_PACKED = re.compile(r"quantized\.(linear|conv|int4mm|quantized_).*|aten\.quantized_(lstm|gru)")
# what a weight may meet an activation in without a multiplication worth counting
_NO_PRODUCT = re.compile(
    r"aten\.(add|sub|rsub|maximum|minimum|where|masked_fill|masked_scatter|cat|stack|copy|index"
    r"|index_put|index_select|gather|scatter|slice_scatter|select_scatter|.*embedding.*|.*_norm.*)_?"
    r"|torchvision\.(nms|roi_align|roi_pool|ps_roi_align|ps_roi_pool)"
    r"|quantized\.(?!linear|conv|int4mm|quantized_).*"
)


def _product(name: str, args: tuple, out) -> tuple[list, list, int] | None:
    """(left operands, right ones, MACs) of an operation; None if it is no product understood.

    Operands are several where a layer has two inputs, states beside its input, or two matrices.
    """
    if name in _MATRICES:  # (..., m, k) x (..., k, n) or (k,): left meets the n columns of right
        left, right = args[1:3] if "add" in name else args[:2]
        return [left], [right], left.numel() * (right.shape[-1] if right.ndim > 1 else 1)
    end = _LAYERS.get(name, 1)
    weights = _unpacked(args) if _PACKED.fullmatch(name) else _tensors(args[1:end])
    weights = [w for w in weights if w.ndim > 1]
    left = _tensors([args[:1], args[end:]]) if weights else []
    if not left:  # no product, or it packs or unpacks
        return None
    # each weight is used once per position: of x (..., C), or of a convolution's output (N, C, ...)
    convolves = "conv" in name
    transposed = "transpose" in name or name == "aten.convolution" and args[6]
    counted = out if convolves and not transposed else left[0]
    positions = counted.numel() // max(1, counted.shape[1 if convolves else -1])
    return left, weights, positions * sum(w.numel() for w in weights)


def _unpacked(value) -> list[Tensor]:
    """Weights and biases in the packed parameters that torch.ao's quantized layers keep."""
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _unpacked(v)]
    if not isinstance(value, torch.ScriptObject):
        return []
    if hasattr(value, "unpack"):  # matrices of float16 are shown as float32
        found = _tensors(value.unpack())
        return [t.half() if t.ndim > 1 and not t.is_quantized else t for t in found]
    # the parameters of a recurrent cell hold linear ones
    return _unpacked(value.__getstate__()) if "CellParams" in str(value._type()) else []


def _tensors(value, opened: set[int] | None = None) -> list[Tensor]:
    """Every tensor in nested containers; in dataclasses and namespaces, too, with a set for them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple, set, frozenset, deque)):
        if opened is None or id(value) in opened or isinstance(value, (type, nn.Module)):
            return []
        opened.add(id(value))
        names = getattr(value, "__dict__", None) or getattr(value, "__dataclass_fields__", ())
        value = [getattr(value, name, None) for name in names]
    return [t for child in value for t in _tensors(child, opened)]


# ---------------------------------------------------------------- how it works

_ROOT = "(model)"
# modules that torch puts into a layer to keep its weights
_HELPER = re.compile(r"(?:^|\.)(?:parametrizations|_packed_params|_all_weight_values)(?:\.|$)")
# what is known of a tensor: computed from the model's input, or from which stored tensors
_ACTIVE, _CONSTANT = None, frozenset()


def _layer(name: str) -> str:
    """Label of the layer that a module serves: itself, or that whose weight it stores."""
    return _HELPER.split(name)[0] or _ROOT


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(layer, tensor, is it a weight) of all that a device would store, in the form that is used.

    A shared parameter comes with its first owner only, a masked or parametrized one as the result.
    """
    modules = dict(model.named_modules())
    for full, tensor in model.named_parameters():
        name, _, key = full.removesuffix("_orig").rpartition(".")  # torch.nn.utils.prune
        if not _HELPER.search(name):
            mask = modules[name]._buffers.get(f"{key}_mask")
            is_norm = isinstance(modules[name], (nn.LayerNorm, nn.RMSNorm))
            is_weight = tensor.ndim > 1 and "bias" not in key and not is_norm
            yield _layer(name), tensor if mask is None else tensor * mask, is_weight
    for name, module in modules.items():
        made = [getattr(module, key) for key in getattr(module, "parametrizations", ())]
        for tensor in [*made, *_unpacked(list(vars(module).values()))]:
            yield _layer(name), tensor, tensor.ndim > 1


class _MacMode(TorchDispatchMode):
    """Books the MACs of every operation of a forward on the row of the layer it belongs to.

    Forward hooks say which module is running, and a dispatch mode sees the ATen operations that it
    runs, so that a functional call and a fused layer are seen like any other. What is known of a
    tensor is kept by its storage, so that views and in-place writes need no care.
    """

    def __init__(self, model: nn.Module, inputs, observe: Callable | None):
        super().__init__()
        self.observe = observe
        self.rows: dict[str, LayerCount] = {}
        self.running = [(_ROOT, False)]  # layers under way, innermost last; may it not fold
        self.ran: dict[str, nn.Module] = {}
        self.folded_macs, self.uncounted = 0, []
        self.stored: dict[str, Tensor] = {}  # parameters, buffers and caches
        self.met, self.seen_active = set(), False  # those which met an activation; was there one
        self.known = WeakIdKeyDictionary()  # storage -> _ACTIVE or names of stored tensors
        self.counts = WeakIdKeyDictionary()  # storage -> non-zeros of its views
        for prefix, module in model.named_modules():
            self.rows.setdefault(_layer(prefix), LayerCount(_layer(prefix), type(module).__name__))
            own = dict(vars(module))
            for name, value in (own.pop("_parameters") | own.pop("_buffers") | own).items():
                for tensor in _tensors(value):
                    full = f"{prefix}.{name}".lstrip(".")
                    self.stored[full] = tensor
                    self.known[_storage(tensor)] = (self.state(tensor) or _CONSTANT) | {full}
            self.hook(prefix, module)
        for tensor in _tensors(inputs, set()):
            self.known[_storage(tensor)] = _ACTIVE
        for layer, tensor, is_weight in stored_tensors(model):
            row, nonzero = self.rows[layer], self.nonzero(tensor)
            row.parameters += tensor.numel()
            row.nonzero_parameters = _sum((row.nonzero_parameters, nonzero))
            if is_weight:
                row.weights += tensor.numel()
                row.nonzero_weights = _sum((row.nonzero_weights, nonzero))

    def hook(self, name: str, module: nn.Module) -> None:
        """Hooks that tell which layer is running; `restored` takes them away again."""
        layer, recurrent = _layer(name), isinstance(module, (nn.RNNBase, nn.RNNCellBase))

        def enter(module, args, kwargs):
            # a recurrent layer with any active input or state runs as a whole
            self.running.append((layer, recurrent and self.active(_tensors((args, kwargs)))))

        def leave(module, args, out):
            self.running.pop()
            if out is not None:  # it has not raised
                self.ran[name] = module
                if not _HELPER.search(name):
                    shapes = [t.shape for t in _tensors(out, set())] or [getattr(out, "shape", ())]
                    self.rows[layer].output_shape = tuple(shapes[0])

        # first in and last out, so that the pre-hooks which compute a masked weight run inside
        module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, outputs = str(func._overloadpacket), _tensors(out)
        states = [(t, self.state(t)) for t in _tensors((args, kwargs))]
        names = _CONSTANT.union(*(state for _, state in states if state))
        product = _product(name, args, out)
        row = self.book(*product, outputs) if product else None
        active = row is not None or any(state is _ACTIVE for _, state in states)
        for tensor in outputs:
            self.known[_storage(tensor)] = _ACTIVE if active else names
        if active:
            self.seen_active = True
            self.met |= names
            if not product and not _NO_PRODUCT.fullmatch(name):
                self.check(func, name, args, [(t, state) for t, state in states if state])
            if self.observe:
                self.observe(func, [t for t, s in states if s is _ACTIVE], outputs, row)
        return out

    def state(self, tensor: Tensor) -> frozenset[str] | None:
        return self.known.get(_storage(tensor), _CONSTANT)

    def active(self, tensors: list[Tensor]) -> bool:
        return any(self.state(t) is _ACTIVE for t in tensors)

    def book(self, left: list, right: list, macs: int, outputs: list) -> LayerCount | None:
        """Put a product into its column and return its row; None if it folds into a constant."""
        running, whole = self.running[-1]
        left_active, right_active = self.active(left), self.active(right)
        if left_active and right_active:
            row = self.rows[running]
            row.activation_macs += macs
            row.bits = row.bits or left[0].element_size() * 8
            return row
        # a constant made in the forward, such as a recurrent layer's first state, is no weight;
        # what no operation made, such as a packed weight, is stored
        is_stored = [bool(self.known.get(_storage(side[0]), True)) for side in (left, right)]
        if not (left_active or right_active or whole) and is_stored[0] == is_stored[1]:
            self.folded_macs += macs
            return None
        weights = right if left_active or is_stored[1] else left
        names = {name for weight in weights for name in self.state(weight) or ()}
        owners = {_layer(name.rpartition(".")[0]) for name in names}
        row = self.rows[owners.pop() if len(owners) == 1 else running]
        row.macs += macs
        nonzero, size = _sum(map(self.nonzero, weights)), sum(w.numel() for w in weights)
        row.nonzero_macs = _sum((row.nonzero_macs, nonzero and macs * nonzero // size))
        # a widened weight is as wide as the stored one, scales apart
        width = max(w.element_size() for w in weights)
        stored = [self.stored[name] for name in names]
        widest = max((t.element_size() for t in stored if not _is_vector(t)), default=width)
        row.bits = max(row.bits or 0, 8 * min(width, widest))
        if row.output_shape is None:  # its own forward did not run: a function uses the weight
            row.output_shape = tuple(outputs[0].shape)
        return row

    def nonzero(self, tensor: Tensor) -> int | None:
        """How many elements are not zero, counted once; None on the meta device."""
        if tensor.is_meta:
            return None
        key = (tensor.is_inference() or tensor._version,)
        if tensor.layout is torch.strided:  # a transposed view has the same elements
            strides = sorted(zip(tensor.stride(), tensor.shape, strict=True))
            key += (tensor.storage_offset(), *strides)
        counts = self.counts.setdefault(_storage(tensor), {})
        if key not in counts:
            # of a quantized tensor, zero is where an element equals its zero point
            values = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
            counts[key] = int(torch.count_nonzero(values))
        return counts[key]

    def check(self, func, name: str, args: tuple, stored: list[tuple[Tensor, frozenset]]) -> None:
        """Note an operation on activations that may multiply in a way that is not understood."""
        where = f"{name} inside {self.running[-1][0]}"
        if any(isinstance(a, torch.ScriptObject) for a in args):
            self.uncounted.append(f"{where}, on packed weights")
        elif func.namespace not in ("aten", "prim", "prims", "quantized_decomposed"):
            self.uncounted.append(f"{where}, of another library")
        elif re.search(r"attention|convolution|conv\dd|\.linear|matmul|einsum|mm$", name):
            self.uncounted.append(where)
        else:
            may_mask = name.rstrip("_") in ("aten.mul", "aten.div")
            for tensor, names in stored:
                is_weight = any(isinstance(self.stored[n], nn.Parameter) for n in names)
                is_mask = tensor.dtype == torch.bool or may_mask and not is_weight
                if not (is_mask or _is_vector(tensor)):
                    what = f"{' * '.join(sorted(names))} {_shape(tensor.shape)}"
                    self.uncounted.append(f"{where}, on {what}")

    def check_end(self, out) -> None:
        """Note weights of layers which ran without any operation on them being seen."""
        for prefix, module in self.ran.items():
            cached = {f"{prefix}.{name}".lstrip(".") for name in vars(module)} & self.met
            for name, tensor in module.named_parameters(prefix, recurse=False):
                # a cache filled earlier stands for its weights
                if not (cached or name in self.met or _is_vector(tensor)):
                    owner = f"{prefix or _ROOT} ({type(module).__name__})"
                    what = f"{name} {_shape(tensor.shape)} of {owner}"
                    self.uncounted.append(f"{what}: no operation on it was seen")
        outputs = _tensors(out, set())
        if not (self.active(outputs) if outputs else self.seen_active):
            self.uncounted.append("the output depends on the input through no operation seen")


def _is_vector(tensor: Tensor) -> bool:
    """Whether it is the bias, scale or slope of a layer rather than a matrix of weights."""
    return sum(size > 1 for size in tensor.shape) < 2


def _storage(tensor: Tensor):
    """What a tensor and its views share; the tensor itself where the layout has no storage."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, in which a forward works on copies of what the modules keep.

    Afterwards the modules, but for a parameter overwritten in place, and the random states are as
    before. A fused kernel or fast path of attention, one opaque operation, is not taken.
    """
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    math = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
    kept, copies = [(module, vars(module)) for module in model.modules()], {}
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad(), math:
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, own in kept:  # not eval(), which a model may override
                object.__setattr__(module, "__dict__", _copied(own, copies) | {"training": False})
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module, own in kept:
                object.__setattr__(module, "__dict__", own)


def _copied(value, copies: dict[int, object]):
    """A container with copies of the tensors, but for parameters, and of the containers in it."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        copies[id(value)] = value.detach().clone()
    elif type(value) in (dict, OrderedDict, defaultdict, list, deque, set):
        copies[id(value)] = copied = value.copy()
        if copied and not isinstance(value, set):  # whose elements have no place
            for key, element in value.items() if isinstance(value, dict) else enumerate(value):
                copied[key] = _copied(element, copies)
    return copies.get(id(value), value)


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count the MACs of a network, layer by layer.")
    parser.add_argument("--model", default="resnet18", help="a torchvision classification model")
    smoke = {"action": "store_const", "const": "resnet18", "dest": "model"}
    parser.add_argument("--smoke", help="count resnet18, in seconds", **smoke)
    size = "shape of one example without the batch (default: 3 224 224)"
    parser.add_argument("--input-size", type=int, nargs="+", default=(3, 224, 224), help=size)
    parser.add_argument("--tree", action="store_true", help="also print each module's share")
    args = parser.parse_args(argv)
    try:
        from torchvision import models

        if args.model not in models.list_models(module=models):
            raise ValueError(
                f"torchvision has no model {args.model!r} for classification; see its list_models()"
            )
        with warnings.catch_warnings(action="ignore"):  # two announce other initial weights
            report = count_macs(models.get_model(args.model, weights=None), tuple(args.input_size))
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        # also a size that the network cannot take, which torch reports in its own words
        print(f"mac_hooks.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(report, *([report.tree()] if args.tree else []), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
