"""The emulated Cortex-M: its integers, its exact counts, and the bars that the networks keep."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from deploying import conv, deployed_network, random_checkpoint, random_images

import simulate_hardware
from benchmarks import kernel_costs
from benchmarks.kernel_costs import LAYERS, Layer, checkpoint_of
from edgecnn.checkpoint import load_checkpoint
from edgecnn.deploy import c_source, cortex_m, kernels
from edgecnn.deploy.integer import exact_logits
from edgecnn.deploy.plan import planned
from edgecnn.errors import UserError
from edgecnn.graph import INPUT, Graph, Node

needs_emulator = pytest.mark.skipif(
    not all(map(shutil.which, (cortex_m.COMPILER, cortex_m.EMULATOR))), reason=cortex_m.INSTALL
)
IMAGES = torch.randint(
    -128, 128, (3, 3, 32, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
)


def committed(name: str) -> dict:
    return load_checkpoint(REPOSITORY / "checkpoints" / f"{name}_int8.pt")


def random_network(name: str) -> tuple[dict, torch.Tensor]:
    """(random checkpoint, images) of a shipped network."""
    graph = deployed_network(name)
    return random_checkpoint(graph), random_images(graph, 2)


def counted(checkpoint: dict, images: torch.Tensor, storage: str, folder: Path) -> tuple[dict, int]:
    """({node: instructions}, bytes of RAM) of one inference, whose logits must be the exact ones."""
    source = c_source.c_source(checkpoint, storage)
    program = cortex_m.link(cortex_m.compile_objects(source, cortex_m.M4, folder), cortex_m.M4)
    ran, layers = cortex_m.count_layers(cortex_m.M4, program, images)
    assert torch.equal(ran["logits"], exact_logits(checkpoint, images))
    ram = cortex_m.section_bytes(program)[".bss"] + ran["stack_bytes"]
    return cortex_m.instructions_by_node(source, layers), ram


@needs_emulator
def test_first_network_dense(tmp_path):
    counts, ram_bytes = counted(committed("reference/baseline"), IMAGES, "dense", tmp_path)
    assert list(counts) == ["block1.conv", "block2.conv", "block3.conv", "fc1", "fc2"]
    assert sum(counts.values()) <= 8.5e6
    assert ram_bytes <= 29_000


@needs_emulator
def test_headline_network(tmp_path):
    checkpoint = committed("headline/pruned_93_energy")
    row = cortex_m.cortex_m_row(checkpoint, IMAGES)
    assert row["m4_logits"] == exact_logits(checkpoint, IMAGES).tolist()
    assert row["m4_instructions"] <= 3.7e6
    assert row["m4_ram_bytes"] <= 17_200 and row["m4_flash_bytes"] <= 103_568  # CMSIS-NN's ResNet-8
    assert row["stm32f405_fits"]
    assert sum(row["m4_instructions_per_layer"].values()) == row["m4_instructions"]
    assert sum(row["m4_instructions_by_class"].values()) == row["m4_instructions"]
    low, middle, high = (row[f"m4_cycles_modelled{end}"] for end in ("_low", "", "_high"))
    assert row["m4_instructions"] < low < middle < high


@needs_emulator
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("value", [255, 0, None])
@pytest.mark.parametrize("pooled", [False, True])
def test_sparse_convolution_with_any_number_of_extreme_weights(tmp_path, stride, value, pooled):
    """Whole rounds of its loop and parts of one, and more entries than its sums hold at once.

    value: of the map it reads, as far from the zero point as can be; None: any, and 100 the zero point.
    """
    counts = (0, 1, 11, 12, 13, 127, 128, 129, 256, 300, 360)
    window = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0]}
    nodes = (
        conv("front", INPUT, 40, (1, 1)),
        conv("layer", "front", 2 * len(counts), (3, 3), (stride, stride), (1, 1)),
        *([Node("pool", "max_pool", ("layer",), window)] if pooled else []),
        Node("flat", "flatten", ("pool" if pooled else "layer",)),
        Node("logits", "linear", ("flat",), {"outputs": 64, "bias": 1}),
    )
    checkpoint = random_checkpoint(Graph((3, 5, 11), nodes))
    tensors = checkpoint["tensors"]
    if value is not None:
        tensors["front.weight"][:], tensors["front.bias"][:] = 0, 1e4 if value else -1e4
    rows, places = tensors["layer.weight"].flatten(1), torch.randperm(360)
    rows[:] = 0
    for at, count in enumerate(counts):
        rows[2 * at, places[:count]], rows[2 * at + 1, places[:count]] = 127, -128
    tensors["layer.weight"] = rows.reshape(tensors["layer.weight"].shape)
    checkpoint["quantization"]["activations"]["front"]["zero_point"] = (
        100 if value is None else 255 - value
    )
    counted(checkpoint, random_images(Graph((3, 5, 11), nodes), 2), "sparse", tmp_path)


@needs_emulator
def test_resnet8_dense(tmp_path):
    counts, ram_bytes = counted(*random_network("resnet8"), "dense", tmp_path)
    assert sum(counts.values()) <= 14.0e6  # CMSIS-NN: 29.87
    assert ram_bytes <= 53_596


@needs_emulator
def test_ds_cnn_pointwise(tmp_path):
    counts, _ = counted(*random_network("ds_cnn"), "dense", tmp_path)
    pointwise = [count for node, count in counts.items() if "pointwise" in node]
    assert sum(pointwise) <= 1.1 * 4 * 25 * 5 * 64 * 64


@needs_emulator
def test_what_exceeds_the_flash_does_not_fit(tmp_path):
    checkpoint, images = random_network("ds_cnn")
    source = c_source.c_source(checkpoint)
    for count, fits in ((1 << 19, True), (1 << 20, False)):
        weights = f"const signed char more[{count}] = {{1}};\n"
        code = weights + source.code.replace("i % IMAGE_CHANNELS", "more[i] + i % IMAGE_CHANNELS")
        code = code.replace("{\n    conv", "{\n    logits[0] = more[image[0] & 127];\n    conv", 1)
        objects = cortex_m.compile_objects(source._replace(code=code), cortex_m.M4, tmp_path)
        assert cortex_m.fits(objects, cortex_m.STM32F405) is fits
    assert images.shape[1:] == (1, 49, 10)


COSTS = json.loads(kernels.COSTS.read_text())


def test_estimates_are_those_of_the_committed_costs_and_near_what_was_counted():
    for row in COSTS["layers"]:
        checkpoint = checkpoint_of(Layer(**row["layer"]))
        (step,) = (s for s in planned(checkpoint, row["kernel"]).steps if s.node == "layer")
        costs = COSTS["instructions"][row["kernel"]]
        estimated = sum(costs[key] * times for key, times in step.features.items())
        assert step.kernel == row["kernel"] and round(estimated) == row["estimated"]
        assert estimated == pytest.approx(row["instructions"], rel=0.03), row


@needs_emulator
def test_kernels_cost_what_was_counted(tmp_path):
    """The cheapest layer of each kernel and the kernels' code, counted anew."""
    same_tools = COSTS | cortex_m.tool_versions() == COSTS
    near = partial(pytest.approx, rel=0 if same_tools else 0.1)
    files = [c_source.FIRMWARE / file for file in c_source.KERNELS]
    objects = cortex_m.compile_files(files, cortex_m.M4, tmp_path)
    assert kernel_costs.code_bytes(objects) == near(COSTS["code_bytes"])
    for kernel in LAYERS:
        rows = [row for row in COSTS["layers"] if row["kernel"] == kernel]
        least = min(rows, key=lambda row: row["instructions"])
        checkpoint = checkpoint_of(Layer(**least["layer"]))
        found = kernel_costs.counted(checkpoint, kernel, objects, tmp_path)[1]
        assert found == near(least["instructions"]), kernel


LOG = """\
IN: run
0x00000010:  f000 f806  bl       #0x20

Trace 0: 0x7f0 [0/00000010/1/2] run
IN: infer
0x00000020:  b510       push     {r4, lr}
0x00000022:  f000 f80d  bl       #0x40

Trace 0: 0x7f1 [0/00000020/1/2] infer
IN: conv_direct
0x00000040:  6801       ldr      r1, [r0]
0x00000042:  6842       ldr      r2, [r0, #4]
0x00000044:  fb21 3002  smlad    r0, r1, r2, r3
0x00000048:  d1fa       bne      #0x40

Trace 0: 0x7f2 [0/00000040/1/2] conv_direct
Trace 0: 0x7f2 [0/00000040/1/2] conv_direct
IN: conv_direct
0x0000004a:  4770       bx       lr

Trace 0: 0x7f3 [0/0000004a/1/2] conv_direct
IN: infer
0x00000026:  e8bd 4010  pop.w    {r4, lr}
0x0000002a:  f000 b80d  b.w      #0x60

Trace 0: 0x7f4 [0/00000026/1/2] infer
IN: linear_dense
0x00000060:  4770       bx       lr

Trace 0: 0x7f5 [0/00000060/1/2] linear_dense
IN: run
0x00000014:  4770       bx       lr

Trace 0: 0x7f6 [0/00000014/1/2] run
"""


def test_trace_closed_form():
    first, second = cortex_m.read_trace(LOG.splitlines(keepends=True))
    assert cortex_m.instruction_classes(first) == {
        "store": 1,
        "load": 5,
        "multiply": 2,
        "branch_taken": 4,
        "branch_not_taken": 1,
    }
    assert cortex_m.instruction_classes(second) == {"branch_taken": 1}
    # push {2} 1 + 2; two rounds of ldr 2, ldr 1, smlad 1, bne 1; pop {2} 1 + 2; bl, bx, b.w 1 each;
    # each of the four taken branches refills the pipeline in one cycle.
    assert cortex_m.layer_cycles(first, cortex_m.ASSUMPTIONS["_low"]) == 3 + 2 * 5 + 3 + 3 + 4
    assert cortex_m.layer_cycles(second, cortex_m.ASSUMPTIONS["_low"]) == 2


@pytest.mark.parametrize("size, following, taken", [(2, 2, 0), (2, 4, 1), (4, 4, 0), (4, 2, 1)])
def test_a_short_branch_over_one_instruction_is_taken(size, following, taken):
    block = [cortex_m.Instruction(0x40, size, "cbz", "r2, #0x44")]
    assert cortex_m.was_taken(block, 0x40 + following) == taken


@pytest.mark.parametrize(
    "mnemonic, operands, branch",
    [
        ("pop", "{r4, pc}", True),
        ("pop", "{r4, r5}", False),
        ("ldr", "r0, [pc, #8]", False),
        ("ldr.w", "pc, [r1, #8]", True),
        ("bics", "r0, r1", False),
        ("ble.w", "#0x10", True),
        ("bfi", "r0, r1, #0, #1", False),
        ("cbz", "r0, #0x10", True),
    ],
)
def test_branches_are_told_from_the_rest(mnemonic, operands, branch):
    assert cortex_m.is_branch(mnemonic, operands) is branch


@needs_emulator
def test_a_program_larger_than_the_emulated_board_is_not_measured(capsys):
    nodes = (
        conv("layer", INPUT, 16, (3, 3), padding=(1, 1)),
        Node("mean", "global_avg_pool", ("layer",)),
        Node("logits", "flatten", ("mean",)),
    )
    graph = Graph((3, 600, 600), nodes)
    checkpoint = random_checkpoint(graph) | {"provenance": {"variant": "large"}}
    assert simulate_hardware.cortex_m(checkpoint, torch.zeros(1, 3, 600, 600)) == {}
    assert (
        "large, Cortex-M: not measured: the program does not fit the emulated mps2"
        in capsys.readouterr().out
    )


def test_missing_tools_are_not_measured(monkeypatch):
    monkeypatch.setattr(cortex_m, "EMULATOR", "no-such-emulator")
    with pytest.raises(cortex_m.NotInstalled, match="no-such-emulator"):
        cortex_m.cortex_m_row({}, IMAGES)


@needs_emulator
def test_a_hanging_emulator_is_a_user_error(monkeypatch):
    monkeypatch.setattr(cortex_m, "QEMU_TIMEOUT_S", 0.01)
    monkeypatch.setattr(cortex_m, "IMAGE_TIMEOUT_S", 0)
    with pytest.raises(UserError, match="did not finish"):
        cortex_m.cortex_m_row(committed("headline/pruned_93_energy"), IMAGES)
