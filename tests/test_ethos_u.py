"""Vela's figures of new graphs: everything on the NPU, zeros shrink flash, what fails is one line."""

import functools

import pytest
from foreign_networks import captured
from narrow import GRAPHS, conv, graph_of, linear, max_pool, quantized, read_out

from edgecnn.deploy import ethos_u
from edgecnn.deploy.tflite import operators, write_tflite
from edgecnn.errors import UserError
from edgecnn.quantized import with_zeros
from edgecnn.rewrite import deployed

# A residual block behind a stride that TFLite's SAME is not, then a wide layer of 26 kB.
RESIDUAL = graph_of(
    (3, 16, 12),
    conv(8, 3, 2, 1, activation="relu"),
    conv(8, 3, 1, 1, activation="relu6"),
    conv(8, 3, 1, 1),
    ("add", {"activation": "relu"}, ("n2", "n0")),
    max_pool(3, 2, 1),
    ("flatten", {}),
    linear(270),
)
NPU = "u55_128_"


@functools.cache
def cost(zeros: float) -> dict:
    """Vela's figures of RESIDUAL with a share of zeros."""
    return ethos_u.npu_cost(write_tflite(with_zeros(quantized(RESIDUAL), zeros), "net"))


def test_a_residual_graph_runs_on_the_npu_whole():
    found = cost(0)
    assert found[f"{NPU}operators_on_npu_percent"] == 100
    assert found[f"{NPU}system_config"] == "Ethos_U55_High_End_Embedded"
    assert found[f"{NPU}memory_mode"] == "Shared_Sram"
    cycles, clock_mhz = found[f"{NPU}cycles_modelled"], found[f"{NPU}clock_mhz"]
    assert found[f"{NPU}latency_ms_modelled"] == pytest.approx(cycles / clock_mhz / 1e3, abs=1e-6)
    assert found[f"{NPU}sram_bytes_modelled"] >= 2 * 8 * 8 * 6  # both inputs of the addition
    assert found[f"{NPU}flash_bytes_modelled"] >= found[f"{NPU}weights_coded_bytes"] > 270 * 96 / 2


def test_zeros_shrink_flash_and_never_cost_cycles():
    dense, sparse = cost(0), cost(0.9)
    for key, share in (("flash_bytes_modelled", 0.6), ("cycles_modelled", 1)):
        assert sparse[NPU + key] <= share * dense[NPU + key]


def test_resnet8_with_its_pads_costs_on_the_npu_what_the_published_one_does():
    """Torch's stride-2 padding is not TFLite's SAME: the file has a PAD before each such conv.

    201,747 cycles: MLPerf Tiny's file through the same Vela. Random weights hardly compress.
    """
    data = write_tflite(quantized(*deployed(*captured("resnet8"))), "net")
    assert operators(data).count("PAD") == 2
    found = ethos_u.npu_cost(data)
    assert found[f"{NPU}operators_on_npu_percent"] == 100
    assert found[f"{NPU}cycles_modelled"] == pytest.approx(201_747, rel=0.05)


@pytest.mark.parametrize(
    ("name", "operator"), [("max_pool padded", "PADV2"), ("relu6 alone", "RELU6")]
)
def test_rare_operators_run_on_the_npu(name, operator):
    data = write_tflite(read_out(GRAPHS[name]), "net")
    assert operator in operators(data)
    assert ethos_u.npu_cost(data)[f"{NPU}operators_on_npu_percent"] == 100


def test_what_vela_cannot_do_is_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"no accelerator ethos-u99.*ethos-u55-128"):
        ethos_u.npu_cost(b"", "ethos-u99")
    with pytest.raises(UserError, match="Vela cannot compile"):
        ethos_u.npu_cost(b"not a file")
    monkeypatch.setattr(ethos_u.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"firmware/requirements\.txt"):
        ethos_u.npu_cost(b"")
