"""Tests of edgecnn/energy.py: published costs times counted bytes, elements and MACs."""

import pytest
import torch
from foreign_networks import captured
from torch import nn
from torch.nn.utils import prune

from edgecnn.energy import modelled_energy, stored_bytes
from edgecnn.module import module_of
from edgecnn.networks import EdgeCNN
from edgecnn.rewrite import deployed_graph


def _chain(*layers):
    return modelled_energy(nn.Sequential(*layers), (3, 8, 8))


def test_energy_is_macs_stored_bytes_and_moved_elements_times_the_published_costs():
    report = _chain(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    (layer,) = report.layers
    moved = 3 * 64 + 4 * 64 + 4 * 64 + 4 * 16  # the convolution in and out, the pool in and out
    assert layer.activations_moved == moved
    assert layer.stored_bytes == (3 * 4 * 9 + 4) * 4
    for memory, pj_per_64_bits in (("sram", 100), ("dram", 1300)):
        energy = report.energy_uj(memory)
        assert energy.arithmetic == pytest.approx(1e-6 * 4.6 * 3 * 4 * 9 * 64)
        assert energy.weights == pytest.approx(1e-6 * 448 * pj_per_64_bits / 8)
        assert energy.activations == pytest.approx(1e-6 * moved * 4 * 100 / 8)
        assert energy.total == pytest.approx(sum(energy))


def test_energy_of_this_projects_network_by_precision():
    model = module_of(deployed_graph(captured("edgecnn")[0]))
    fp32 = modelled_energy(model, (3, 32, 32)).energy_uj("dram")
    assert fp32.weights == pytest.approx(620_362 * 4 * 1300 / 8 * 1e-6)  # 403 uJ
    assert fp32.arithmetic == pytest.approx(10.848768 * 4.6)


def test_the_peak_is_the_largest_sum_of_live_tensors():
    assert modelled_energy(EdgeCNN(), (3, 32, 32)).peak_activations == 32 * 1024 + 32 * 256
    wide = _chain(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.BatchNorm2d(5), nn.Conv2d(5, 1, 1))
    assert wide.peak_activations == (3 + 5) * 64  # what works element by element works in place

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return x + self.second(torch.relu(self.first(x)))

    report = modelled_energy(Residual(), (3, 8, 8))
    assert report.peak_activations == 3 * 3 * 64  # x waits for the addition
    assert [row.activations_moved for row in report.layers] == [2 * 192, 2 * 192 + 3 * 192]


def test_an_activation_still_needed_is_not_overwritten():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = self.conv(x)
            return y * torch.sigmoid(y)

    assert modelled_energy(Gate(), (3, 8, 8)).peak_activations == 3 * 2 * 64


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1] * 64, 64),  # dense
        ([1] * 20 + [0] * 44, 8 + 20),  # bitmap
        ([0] * 639 + [1], 2 * (1 + 2)),  # two fillers: 639 zeros are 2 x 256 and 127
        ([0] * 255 + [1] + [0] * 256 + [1], 2 * (2 + 1)),
        ([0] * 1000, 0),
    ],
)
def test_stored_bytes_take_the_smallest_layout(values, expected):
    assert stored_bytes(torch.tensor(values, dtype=torch.int8)) == expected
    quantized = torch._make_per_tensor_quantized_tensor(
        torch.tensor(values, dtype=torch.int8), 0.5, 0
    )
    assert stored_bytes(quantized) == expected


def test_an_unpriced_width_is_refused():
    report = modelled_energy(nn.Sequential(nn.Linear(4, 4)).double(), (4,))
    with pytest.raises(ValueError, match="64-bit"):
        report.energy_uj()


def test_bits_set_the_price():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    as_float, as_int8 = (modelled_energy(model, (4,), bits=b).energy_uj() for b in (None, 8))
    assert as_float.arithmetic == pytest.approx(16 * 4.6e-6)
    assert as_int8.arithmetic == pytest.approx(16 * 0.3e-6)
    assert as_int8.activations == pytest.approx(as_float.activations / 4)


def test_what_a_view_or_a_mask_leaves_is_moved_once():
    report = _chain(nn.Flatten(), nn.Flatten(), nn.Linear(192, 2))
    assert report.layers[0].activations_moved == 192 + 2  # views move nothing
    assert report.peak_activations == 192 + 2


def test_stored_bytes_of_a_masked_and_of_a_float16_packed_weight():
    linear = nn.Linear(64, 64, bias=False)
    prune.l1_unstructured(linear, "weight", amount=64 * 64 - 32)
    dense = modelled_energy(nn.Linear(64, 64, bias=False), (64,))
    masked = modelled_energy(linear, (64,))
    assert dense.stored_bytes == 64 * 64 * 4
    assert 32 * 5 <= masked.stored_bytes <= (32 + 16) * 5  # one byte an entry, at most 16 fillers
    assert masked.layers[0].count.zeros_percent == pytest.approx(100 * (1 - 32 / 4096))


def test_table_names_each_layer_and_its_zeros_of_the_weights_alone():
    convolution = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        convolution.weight[:2] = 0
        convolution.bias[:] = 0
    lines = _chain(convolution, nn.BatchNorm2d(4), nn.ReLU()).table().splitlines()
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["0"][1] == rows["total"][1] == "50.0"
    assert rows["1"][1] == "-"
    assert rows["total"][3] == str(3 * 2 * 64)
    assert lines[-1] == f"peak activation memory: {(3 + 4) * 64} elements"
