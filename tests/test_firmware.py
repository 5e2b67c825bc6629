"""The C kernels against numpy, the generated C against torch, and the Cortex-M's exact counts."""

import ctypes
import shutil

import numpy as np
import pytest
import torch

from edgecnn import c_source, cortex_m
from edgecnn.checkpoint import load_checkpoint
from edgecnn.data import load_sample
from edgecnn.errors import UserError
from edgecnn.int8 import int8_graph, set_engine

needs_emulator = pytest.mark.skipif(
    not all(map(shutil.which, (cortex_m.COMPILER, cortex_m.EMULATOR))), reason=cortex_m.INSTALL
)
IMAGES = 20


# ---- the kernels, called one by one ------------------------------------------------------------


class Requantize(ctypes.Structure):
    _fields_ = [("multiplier", ctypes.c_void_p), ("bias", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int32) for name in ("low", "high", "shift")]


class Conv(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int) for name in ("height", "width", "inputs", "outputs", "flip", "zero")
    ]
    _fields_ += [(name, ctypes.c_void_p) for name in ("weights", "entries", "starts")]
    _fields_ += [("requantize", Requantize)]


class Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("inputs", "outputs")]
    _fields_ += [
        (name, ctypes.c_void_p) for name in ("weights", "entries", "masks", "values", "starts")
    ]
    _fields_ += [("requantize", Requantize)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The int8 kernels alone, built as for a network."""
    return c_source.compile_host("", "int8", tmp_path_factory.mktemp("kernels") / "kernels.so")


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 8 bytes, as the generated constants do."""
    buffer = np.zeros(array.nbytes // 8 + 2, np.uint64).view(array.dtype)
    buffer[: array.size] = array.reshape(-1)
    return buffer


def run_kernel(library, layer: dict, kernel: str, arrays: dict, inputs: np.ndarray, in_place=False):
    """The kernel's bytes for HWC (or flat) input bytes."""
    weight = layer["weight"]
    members = {name: aligned(values) for name, values in arrays.items()}
    members |= {name: aligned(layer[name]) for name in ("multiplier", "bias")}
    requantize = Requantize(
        members.pop("multiplier").ctypes.data,
        members.pop("bias").ctypes.data,
        layer["low"],
        layer["high"],
        layer["shift"],
    )
    kept = [requantize, members, aligned(layer["multiplier"]), aligned(layer["bias"])]
    requantize.multiplier, requantize.bias = kept[2].ctypes.data, kept[3].ctypes.data
    pointers = {name: values.ctypes.data for name, values in members.items()}
    shape = {name: layer[name] for name in ("height", "width", "flip", "zero") if name in layer}
    kind = Conv if weight.ndim == 4 else Linear
    struct = kind(
        outputs=len(weight), inputs=weight.shape[1], requantize=requantize, **shape, **pointers
    )
    count = len(weight)
    if weight.ndim == 4:
        count *= (layer["height"] // 2) * (layer["width"] // 2)
    source = np.zeros(max(inputs.size, count) + 8, np.uint8)
    source[: inputs.size] = inputs.reshape(-1)
    out = source if in_place else np.zeros(count + 8, np.uint8)
    scratch = np.zeros(1 << 16, np.uint64)
    arguments = [ctypes.byref(struct), source.ctypes.data, out.ctypes.data, scratch.ctypes.data]
    function = getattr(library, kernel)
    function.argtypes, function.restype = [ctypes.c_void_p] * 4, None
    function(*arguments)
    return out[:count]


def rounded(layer: dict, sums: np.ndarray) -> np.ndarray:
    """Closed form of the requantization: sums (..., O) -> bytes."""
    real = (sums.astype(np.float32) + layer["bias"]) * layer["multiplier"]
    return (np.clip(np.rint(real), layer["low"], layer["high"]) + layer["shift"]).astype(np.uint8)


def conv_reference(layer: dict, inputs: np.ndarray) -> np.ndarray:
    """Conv3x3 pad 1 -> MaxPool2 -> requantize of (H, W, C) bytes, in int64."""
    weight, values = layer["weight"].astype(np.int64), inputs.astype(np.int64)
    height, width, _ = inputs.shape
    padded = np.pad((values ^ layer["flip"]) - layer["zero"], ((1, 1), (1, 1), (0, 0)))
    sums = sum(
        padded[ky : ky + height, kx : kx + width] @ weight[:, :, ky, kx].T
        for ky in range(3)
        for kx in range(3)
    )  # (H, W, O)
    height, width = height // 2 * 2, width // 2 * 2
    windows = sums[:height, :width].reshape(height // 2, 2, width // 2, 2, -1)
    return rounded(layer, windows.max(axis=(1, 3))).reshape(-1)


def make_layer(rng, shape: tuple, fill: str, **geometry) -> dict:
    """A layer whose weights are filled as named, with outputs over the whole range of a byte."""
    weight = rng.integers(-127, 128, shape).astype(np.int8)
    weight[weight == 0] = 1
    if fill == "some zeros":
        weight[rng.random(shape) < 0.8] = 0
    elif fill == "all zeros":
        weight[:] = 0
    elif fill == "extreme":
        weight[:] = np.where(rng.random((shape[0],) + (1,) * (len(shape) - 1)) < 0.5, 127, -127)
    spread = np.sqrt(np.prod(shape[1:])) * 127 * 127
    return {
        "weight": weight,
        "multiplier": rng.uniform(50, 300, shape[0]).astype(np.float32) / np.float32(spread),
        "bias": rng.uniform(-1, 1, shape[0]).astype(np.float32) * np.float32(spread),
        "low": 0,
        "high": 251,
        "shift": 0,
        **geometry,
    }


FILLS = ("no zeros", "some zeros", "all zeros", "extreme")
CONV_SHAPES = [(6, 8, 4, 6), (7, 9, 1, 1), (2, 2, 3, 5), (5, 12, 8, 2), (9, 7, 12, 3), (8, 6, 4, 8)]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("height, width, inputs, outputs", CONV_SHAPES)
def test_convolutions_equal_numpy(library, height, width, inputs, outputs, fill):
    rng = np.random.default_rng(height * 100 + width)
    for flip, zero in ((0, 0), (128, 117)):
        geometry = {"height": height, "width": width, "flip": flip, "zero": zero}
        layer = make_layer(rng, (outputs, inputs, 3, 3), fill, **geometry)
        image = rng.integers(0, 256, (height, width, inputs)).astype(np.uint8)
        if fill == "extreme":
            image[:] = 255 ^ flip
        expected = conv_reference(layer, image)
        if fill == "extreme" and outputs > 3:
            assert {0, 251} <= set(expected.tolist())  # both ends saturate
        stored = [c_source.sparse_storage(layer)]
        stored.append(("conv_direct", {"weights": c_source.conv_order(layer["weight"], False)}))
        if c_source.dense_kernel(layer) == "conv_winograd":
            stored.append(c_source.int8_storage(layer, "dense"))
        for kernel, arrays in stored:
            for in_place in {False, outputs <= 2 * inputs}:
                found = run_kernel(library, layer, kernel, arrays, image, in_place)
                assert np.array_equal(found, expected), (kernel, flip, in_place)


def test_winograd_takes_the_widest_layers(library):
    rng = np.random.default_rng(0)
    geometry = {"height": 16, "width": 16, "flip": 0, "zero": 0}
    layer = make_layer(rng, (4, 64, 3, 3), "extreme", **geometry)
    layer["multiplier"] /= 100
    image = np.full((16, 16, 64), 255, np.uint8)
    kernel, arrays = c_source.int8_storage(layer, "dense")
    assert kernel == "conv_winograd"
    found = run_kernel(library, layer, kernel, arrays, image, in_place=True)
    assert np.array_equal(found, conv_reference(layer, image))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (7, 3), (32, 4), (255, 5), (1030, 9)])
def test_linear_layers_equal_numpy(library, inputs, outputs, fill):
    rng = np.random.default_rng(inputs)
    layer = make_layer(rng, (outputs, inputs), fill)
    layer |= {"low": -74, "high": 181, "shift": -54}  # as the logits' zero point 74 makes them
    values = rng.integers(0, 256, inputs).astype(np.uint8)
    if fill == "extreme":
        values[:] = 255
    expected = rounded(layer, values.astype(np.int64) @ layer["weight"].T.astype(np.int64))
    rows = layer["weight"]
    entries, starts = c_source.sparse_entries(rows, np.arange(inputs))
    masks, kept, value_starts = c_source.bitmap_rows(rows)
    stored = {
        "linear_dense": {"weights": c_source.linear_order(rows)},
        "linear_sparse": {"entries": entries, "starts": starts},
        "linear_bitmap": {"masks": masks, "values": kept, "starts": value_starts},
    }
    for kernel, arrays in stored.items():
        assert np.array_equal(run_kernel(library, layer, kernel, arrays, values), expected), kernel


def test_gaps_beyond_a_byte_are_bridged(library):
    layer = make_layer(np.random.default_rng(0), (2, 2000), "all zeros")
    layer["weight"][0, [3, 1999]], layer["weight"][1, 1000] = (5, -7), 100
    values = np.random.default_rng(1).integers(0, 256, 2000).astype(np.uint8)
    kernel, arrays = c_source.sparse_storage(layer)
    assert kernel == "linear_sparse"
    expected = rounded(layer, values.astype(np.int64) @ layer["weight"].T.astype(np.int64))
    assert np.array_equal(run_kernel(library, layer, kernel, arrays, values), expected)


# ---- generated networks ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample():
    return load_sample()[1][0][:IMAGES]


@pytest.fixture(scope="module")
def pruned(smoke):
    return load_checkpoint(smoke / "checkpoints/smoke/pruned_50_int8.pt")


@pytest.mark.parametrize("storage", ["dense", "sparse", "balanced"])
def test_generated_c_is_bit_exact_with_torch_and_exact_integers(pruned, sample, storage):
    def packed(engine):
        set_engine(engine)
        return int8_graph(pruned["tensors"], pruned["quantization"]).eval()

    graphs = {"fbgemm": lambda: packed("fbgemm"), "qnnpack": lambda: packed("qnnpack")}
    found = c_source.host_parity(pruned, sample, graphs, storage)
    assert found["exact_integers"]["bit_exact_images"] == IMAGES
    assert found["qnnpack"]["max_difference_lsb"] <= 2
    if "vnni" in torch.backends.cpu.get_cpu_capability().lower() or torch.cpu._is_vnni_supported():
        assert found["fbgemm"]["bit_exact_images"] == IMAGES


def test_fp32_c_agrees_with_torch(smoke, sample, tmp_path):
    checkpoint = load_checkpoint(smoke / "checkpoints/smoke/baseline_fp32.pt")
    model = c_source.fp32_model(checkpoint).eval()
    source = c_source.c_source(c_source.stored_layers(checkpoint), "fp32")
    library = c_source.compile_host(source, "fp32", tmp_path / "network.so")
    images = c_source.normalize(sample)
    with torch.no_grad():
        torch.testing.assert_close(
            c_source.run_host(library, images), model(images), rtol=1e-4, atol=1e-4
        )


def test_sparse_storage_is_smaller_and_balanced_keeps_dense_where_zeros_are_few(pruned):
    def kernels(storage):
        return {layer["name"]: layer["kernel"] for layer in c_source.stored_layers(pruned, storage)}

    assert kernels("dense")["block2"] == kernels("balanced")["block2"] == "conv_winograd"
    assert kernels("sparse")["block2"] == "conv_sparse"
    assert kernels("sparse")["fc1"] == "linear_bitmap"  # half zeros: a bit a weight beats a byte


# ---- the emulated microcontroller --------------------------------------------------------------


def counted(checkpoint, images, storage, folder):
    """Instructions of one inference by layer, and the bytes of RAM it leaves for the program."""
    source = c_source.c_source(c_source.stored_layers(checkpoint, storage), "int8")
    objects = cortex_m.compile_objects(source, "int8", cortex_m.M4, folder)
    program = cortex_m.link(objects, cortex_m.M4)
    ran, layers = cortex_m.count_layers(cortex_m.M4, program, images[:1])
    counts = [sum(times * len(block) for block, _, times in layer) for layer in layers]
    return counts, cortex_m.section_bytes(program)[".bss"] + ran["stack_bytes"]


@needs_emulator
def test_emulated_row_equals_the_host_and_repeats(pruned, sample, tmp_path):
    images = c_source.network_inputs(pruned, sample)
    row = cortex_m.cortex_m_row(pruned, images, "sparse")
    source = c_source.c_source(c_source.stored_layers(pruned, "sparse"), "int8")
    library = c_source.compile_host(source, "int8", tmp_path / "network.so")
    assert row["m4_logits"] == c_source.run_host(library, images).tolist()
    counts, ram_bytes = counted(pruned, images, "sparse", tmp_path)
    assert list(row["m4_instructions_per_layer"].values()) == counts
    assert sum(row["m4_instructions_by_class"].values()) == row["m4_instructions"] == sum(counts)
    assert ram_bytes <= row["m4_ram_bytes"] <= 30_000  # more images can only use more stack
    assert row["stm32f405_fits"]
    low, middle, high = (row[f"m4_cycles_modelled{end}"] for end in ("_low", "", "_high"))
    assert row["m4_instructions"] < low < middle < high
    nonzero_macs = sum(
        np.count_nonzero(layer["weight"]) * layer.get("height", 1) * layer.get("width", 1)
        for layer in c_source.int8_layers(pruned)
    )
    assert row["m4_instructions"] <= 2.0e6 + 2.5 * nonzero_macs


@needs_emulator
def test_dense_int8_takes_less_than_an_instruction_a_mac_and_30_kb(pruned, sample, tmp_path):
    images = c_source.network_inputs(pruned, sample)
    counts, ram_bytes = counted(pruned, images, "dense", tmp_path)
    assert sum(counts) <= 1.0 * 10_848_768
    assert ram_bytes <= 30_000


@needs_emulator
def test_what_exceeds_the_flash_does_not_fit(tmp_path):
    source = """#include "network.h"
    static const signed char weights[BYTES] = {1};
    void infer(const value_t *image, value_t *logits)
    {
        for (int i = 0; i < BYTES; i++) logits[i % LOGITS] += weights[i] * image[0];
    }"""
    for count, fits in ((1 << 19, True), (1 << 20, False)):
        text = source.replace("BYTES", str(count))
        objects = cortex_m.compile_objects(text, "int8", cortex_m.M4, tmp_path)
        assert cortex_m.fits(objects, cortex_m.STM32F405) is fits


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


# ---- what can go wrong -------------------------------------------------------------------------


def test_missing_and_failing_host_compilers_are_user_errors(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not installed"):
        c_source.compile_host("", "int8", tmp_path / "x.so")
    monkeypatch.delenv("CC")
    with pytest.raises(UserError, match="failed with exit code 1: .*error"):
        c_source.compile_host("int f(void) { return; }", "int8", tmp_path / "x.so")
    assert not (tmp_path / "x.so").exists()


def test_missing_tools_are_not_measured(monkeypatch, pruned, sample):
    monkeypatch.setattr(cortex_m, "EMULATOR", "no-such-emulator")
    with pytest.raises(cortex_m.NotInstalled, match="no-such-emulator"):
        cortex_m.cortex_m_row(pruned, sample)


@needs_emulator
def test_a_hanging_emulator_is_a_user_error(monkeypatch, pruned, sample):
    monkeypatch.setattr(cortex_m, "QEMU_TIMEOUT_S", 0.01)
    with pytest.raises(UserError, match="did not finish"):
        cortex_m.cortex_m_row(pruned, c_source.network_inputs(pruned, sample), "sparse")


def test_tensors_that_do_not_fit_are_user_errors(pruned):
    broken = {**pruned, "tensors": {**pruned["tensors"]}}
    del broken["tensors"]["fc1.bias"]
    with pytest.raises(UserError, match="do not fit"):
        c_source.stored_layers(broken)
    quantization = {**pruned["quantization"], "input_scale": 1e6}
    with pytest.raises(UserError, match="overflow"):
        c_source.stored_layers({**pruned, "quantization": quantization})
