"""Modelled energy and memory of one inference: microjoules, stored bytes, activations.

A MacReport says how many MACs a network needs; this module prices them, and adds what memory costs:
the weights as stored with an index of their non-zeros, and the activations that every layer reads
and writes. All of it is a model at 45 nm, not a measurement; zeros are skipped at no cost beyond
their index, so it is a lower bound that no kernel reaches (registers, control and leakage are left
out).

    energy = modelled_energy(model, (3, 32, 32))
    energy.macs                 # the MacReport of the same forward
    energy.energy_uj("dram")    # Energy(arithmetic, weights, activations), .total
    print(energy.table())
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from edgecnn.graph import Graph, macs_of, weights_of
from mac_hooks import LayerCount, MacReport, aligned, count_macs, restored, stored_tensors

# Energy of one operation, 45 nm: M. Horowitz, "Computing's energy problem (and what we can do about
# it)", ISSCC 2014, figure 1.1.9. A MAC is a multiplication and an addition; INT8 products are added
# up in 32 bits.
MAC_PJ = {32: 3.7 + 0.9, 16: 1.1 + 0.4, 8: 0.2 + 0.1}
SRAM_PJ_PER_BYTE = 100 / 8  # 100 pJ a 64-bit access of a 1 MB memory, by the same figure
DRAM_PJ_PER_BYTE = 1300 / 8  # the low end of its 1.3-2.6 nJ a 64-bit access
# Where the weights lie; activations lie in SRAM in both.
MEMORY_PJ_PER_BYTE = {"sram": SRAM_PJ_PER_BYTE, "dram": DRAM_PJ_PER_BYTE}


class Energy(NamedTuple):
    """Modelled energy of one inference in microjoules, split by what it is spent on."""

    arithmetic: float
    weights: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


def weight_prices_pj(graph: Graph) -> dict[str, float]:
    """{layer: picojoules that one weight costs an INT8 inference}: its MACs, its fetch from SRAM."""
    macs, counts = macs_of(graph), weights_of(graph)
    return {name: macs[name] // counts[name] * MAC_PJ[8] + SRAM_PJ_PER_BYTE for name in macs}


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


@dataclass
class LayerEnergy:
    """What the energy of one layer is computed from.

    `stored_bytes` are those of its parameters with an index of the non-zeros. `activations_moved`
    counts the elements that the layer, and what follows it up to the next one with MACs (pooling,
    additions), reads and writes when every tensor crosses the memory once an operation; what works
    element by element is fused and moves nothing.
    """

    count: LayerCount
    stored_bytes: int = 0
    activations_moved: int = 0

    def energy_uj(self, memory: str = "sram") -> Energy:
        """Modelled energy of one inference with the weights in `memory` ("sram" or "dram").

        Stored weights are fetched once; activations, as wide as the weights, lie in SRAM.
        Raises ValueError for MACs of a width without a published energy.
        """
        macs, bits = self.count.used_macs, self.count.bits
        if macs and bits not in MAC_PJ:
            raise ValueError(f"{self.count.name}: no published energy of a {bits}-bit MAC")
        return Energy(
            macs and 1e-6 * macs * MAC_PJ[bits],
            1e-6 * self.stored_bytes * MEMORY_PJ_PER_BYTE[memory],
            1e-6 * self.activations_moved * (bits or 0) / 8 * SRAM_PJ_PER_BYTE,
        )


@dataclass
class EnergyReport:
    """The MacReport of a network, a LayerEnergy for each of its layers, and the peak of activations.

    `peak_activations` is the largest sum of elements of tensors alive at one time when the layers
    run one after the other, a tensor's memory is free after its last use, and what works element by
    element works in place: times the width of one, the RAM that activations need.
    """

    macs: MacReport
    layers: list[LayerEnergy]
    peak_activations: int

    @property
    def stored_bytes(self) -> int:
        return sum(layer.stored_bytes for layer in self.layers)

    def energy_uj(self, memory: str = "sram") -> Energy:
        """Sum of the layers' modelled energies; raises ValueError as LayerEnergy.energy_uj does."""
        columns = zip(*(layer.energy_uj(memory) for layer in self.layers), strict=True)
        return Energy(*map(sum, columns))

    def table(self) -> str:
        """Where weights, MACs and modelled energy sit, a line a layer, as aligned text."""
        header = ["layer", "zeros %", "stored B", "nonzero MACs", "arithmetic uJ"]
        header += ["SRAM weights uJ", "DRAM weights uJ", "activations uJ"]
        lines = [[*header, "SRAM total uJ", "DRAM total uJ"]]
        for row in [*self.layers, self]:
            count = self.macs if row is self else row.count
            sram, dram = row.energy_uj("sram"), row.energy_uj("dram")
            zeros = "-" if count.zeros_percent is None else f"{count.zeros_percent:.1f}"
            nonzero = "?" if count.nonzero_macs is None else f"{count.nonzero_macs:,}"
            columns = (sram.arithmetic, sram.weights, dram.weights, sram.activations)
            lines.append([count.name, zeros, f"{row.stored_bytes:,}", nonzero])
            lines[-1] += [f"{value:.3f}" for value in (*columns, sram.total, dram.total)]
        peak = f"{self.peak_activations:,}"
        return aligned(lines, 1) + f"\npeak activation memory: {peak} elements"


def modelled_energy(
    model: nn.Module, input_size: tuple[int, ...] | None = None, **options
) -> EnergyReport:
    """Count the MACs of a model and model what an inference costs, from one forward.

    input_size and options are those of `count_macs`, which also says what is raised.
    """
    flow = _Flow()
    report = count_macs(model, input_size, observe=flow, **options)
    stored: dict[str, int] = {}
    with restored(model):
        for layer, tensor, _is_weight in stored_tensors(model):
            stored[layer] = stored.get(layer, 0) + stored_bytes(tensor)
    rows = [
        LayerEnergy(row, stored.get(row.name, 0), flow.moved.get(row.name, 0))
        for row in report.layers
    ]
    return EnergyReport(report, rows, flow.peak())


class _Step(NamedTuple):
    """The activations that one operation reads and writes, by number of their memory."""

    reads: set[int]
    writes: set[int]
    fused: bool  # element by element: it may overwrite what it reads


class _Flow:
    """Follows the activations through a forward as `observe` of `count_macs`."""

    def __init__(self):
        self.moved: dict[str, int] = {}  # elements, by layer
        self.numbers = WeakIdKeyDictionary()  # storage of an activation -> its number
        self.sizes: list[int] = []  # elements, by number
        self.steps: list[_Step] = []
        self.layer = ""  # of the latest product, which moves are booked on; "" before the first

    def __call__(self, operation, inputs: list, outputs: list, row: LayerCount | None) -> None:
        if row is not None:
            self.moved[row.name] = self.moved.get(row.name, 0) + self.moved.pop("", 0)
            self.layer = row.name
        inputs, outputs = ([t for t in ts if _is_activation(t)] for ts in (inputs, outputs))
        reads = {self.number(t): t.numel() for t in inputs}
        views = all(t.untyped_storage() in self.numbers for t in outputs)
        if not outputs or (views and not operation._schema.is_mutable):
            return
        fused = row is None and len(reads) == 1 and inputs[0].numel() == outputs[0].numel()
        writes = {self.number(t): t.numel() for t in outputs}
        self.steps.append(_Step(set(reads), set(writes), fused))
        elements = 0 if fused else sum(reads.values()) + sum(writes.values())
        self.moved[self.layer] = self.moved.get(self.layer, 0) + elements

    def number(self, tensor: torch.Tensor) -> int:
        """Number of the memory that an activation lies in."""
        number = self.numbers.setdefault(tensor.untyped_storage(), len(self.sizes))
        if number == len(self.sizes):
            self.sizes.append(tensor.numel())
        return number

    def peak(self) -> int:
        """The largest number of elements alive at one time; what none writes is from the start."""
        last_use = {b: i for i, step in enumerate(self.steps) for b in step.reads | step.writes}
        written = set().union(*(step.writes for step in self.steps))
        alive = {b for b in range(len(self.sizes)) if b not in written}
        peak = sum(self.sizes[b] for b in alive)
        for i, step in enumerate(self.steps):
            free = {b for b in step.reads | step.writes if last_use[b] == i}
            if step.fused:
                alive -= free & step.reads
            alive |= step.writes
            peak = max(peak, sum(self.sizes[b] for b in alive))
            alive -= free
        return peak


def _is_activation(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds activations rather than positions, tokens or masks."""
    return tensor.is_floating_point() or tensor.is_quantized
