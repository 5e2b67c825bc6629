"""Exported files: torch's integers, run by tflite-micro to the last bit; refused where they differ."""

import contextlib
import hashlib
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import fails, run_main
from edgecnn.int8 import (
    int8_graph,
    int8_model,
    integer_logits,
    quantize_images,
    signed_zero_point,
    with_zeros,
)
from edgecnn.tflite import (
    MAX_BIAS,
    channels_last,
    integer_bias,
    operators,
    run_tflite,
    tflite_micro,
    write_tflite,
)

import export_edge
from edgecnn import ethos_u, tflite
from edgecnn.checkpoint import load_checkpoint
from edgecnn.data import load_sample, normalize
from edgecnn.errors import UserError

FOLDER = "checkpoints/smoke"
ARGUMENTS = ("--smoke", "--images", 50, "--checkpoint", f"{FOLDER}/baseline_int8.pt")


@pytest.fixture(scope="module")
def images():
    return load_sample()[1][0][:20]


@pytest.fixture
def checkpoint(smoke):
    return load_checkpoint(smoke / FOLDER / "baseline_int8.pt")


def random_checkpoint(seed: int, weights=None, output_scale=None, channels=(3, 4, 5, 6), hidden=7):
    """A net of the deployed form with narrow random layers; its scales keep activations in range."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"block{i + 1}": (channels[i + 1], channels[i], 3, 3) for i in range(3)}
    shapes |= {"fc1": (hidden, 16 * channels[3]), "fc2": (10, hidden)}
    tensors, layers = {}, {}
    for name, shape in shapes.items():
        values = torch.randint(-127, 128, shape, generator=generator)
        tensors[f"{name}.weight"] = (values if weights is None else values * 0 + weights).to(
            torch.int8
        )
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 4
        scales = torch.rand(shape[0] if len(shape) == 4 else 1, generator=generator) + 0.5
        fan_in = np.prod(shape[1:])
        layers[name] = {
            "weight_scale": (scales / 74 / fan_in**0.5).float().tolist(),
            "weight_zero_point": 0,
            "output_scale": output_scale or 0.02,
            "output_zero_point": 120 if name == "fc2" else 0,
        }
    quantization = {"input_scale": 0.016, "input_zero_point": 124, "layers": layers}
    return {"tensors": tensors, "quantization": {**quantization, "engine": "qnnpack"}}


def torch_logits(checkpoint, images):
    """The same arithmetic as int8_graph on layers of any width, by torch's own kernels."""
    torch.backends.quantized.engine = "qnnpack"
    model = int8_graph(checkpoint["tensors"], checkpoint["quantization"])
    return integer_logits(model, images)


# ---- numbers -----------------------------------------------------------------------------------


def test_signed_integers_stand_for_the_same_values(checkpoint, images):
    assert [signed_zero_point(z) for z in (0, 128, 255)] == [-128, 0, 127]
    scale = checkpoint["quantization"]["input_scale"]
    zero_point = checkpoint["quantization"]["input_zero_point"]
    theirs = int8_model(checkpoint)[0](normalize(images)).dequantize()  # (N, 3, 32, 32)
    ours = quantize_images(checkpoint, images)  # (N, 32, 32, 3)
    assert ours.dtype == np.int8 and ours.flags.c_contiguous
    values = (ours.astype(np.float32) - signed_zero_point(zero_point)) * np.float32(scale)
    assert np.array_equal(values.transpose(0, 3, 1, 2), theirs.numpy())


def test_channels_last_is_the_order_of_a_flattened_map():
    x = np.random.default_rng(0).integers(-9, 9, (5, 2, 3))  # (C, H, W)
    weight = np.random.default_rng(1).integers(-9, 9, (4, 30))
    expected = weight @ x.reshape(-1)
    assert np.array_equal(
        channels_last(weight, positions=6) @ x.transpose(1, 2, 0).reshape(-1), expected
    )
    assert channels_last(np.zeros((8, 3, 1, 2))).shape == (8, 1, 2, 3)


def test_biases_are_integers_at_the_accumulators_scale():
    weight = np.ones((2, 3), np.int8)
    bias, scales = integer_bias(np.array([1.0, -0.26]), np.array([0.5, 0.25]), weight, 0.25)
    assert bias.tolist() == [8, -4] and bias.dtype == np.int32 and scales.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_layer_of_zeros_gets_a_scale_that_holds_its_bias(per_channel):
    tiny = float(torch.finfo(torch.float32).eps)
    bias, scales = np.array([5.0, -3.0]), np.full(2 if per_channel else 1, tiny)
    integers, wider = integer_bias(bias, scales, np.zeros((2, 4), np.int8), 1e-3)
    assert np.allclose(integers * wider * 1e-3, bias, rtol=1e-6)
    assert np.abs(integers.astype(np.int64)).max() <= MAX_BIAS + 64
    with pytest.raises(UserError, match="bias does not fit"):
        integer_bias(bias, scales, np.ones((2, 4), np.int8), 1e-3)


def test_zeros_are_spread_evenly_and_only_added(checkpoint):
    sparse = with_zeros(checkpoint, 0.9)
    for name, tensor in checkpoint["tensors"].items():
        other = sparse["tensors"][name]
        if tensor.ndim == 1:
            assert torch.equal(tensor, other)
            continue
        kept = other != 0
        assert abs(float((~kept).float().mean()) - 0.9) < 1e-3
        assert torch.equal(other[kept], tensor[kept])
        assert tensor[kept].abs().min() >= tensor[~kept].to(torch.int16).abs().max()


# ---- the file ----------------------------------------------------------------------------------


def test_file_is_a_standard_one(checkpoint):
    schema, _ = tflite_micro()
    data = write_tflite(checkpoint, "net")
    assert data == write_tflite(checkpoint, "net")
    model = schema.Model.GetRootAsModel(data, 0)
    assert data[4:8] == b"TFL3" and model.Version() == 3 and model.SubgraphsLength() == 1
    assert model.Buffers(0).DataLength() == 0
    assert operators(data) == ["CONV_2D", "MAX_POOL_2D"] * 3 + ["FULLY_CONNECTED"] * 2
    for i in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(i)
        assert code.DeprecatedBuiltinCode() == code.BuiltinCode()
    graph = model.Subgraphs(0)
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    names = [tensor.Name().decode() for tensor in tensors]
    assert len(set(names)) == len(names) == 1 + 5 * 3 + 3
    constants = {name: t for name, t in zip(names, tensors, strict=True) if t.Buffer()}
    assert set(constants) == {
        f"{layer}.{kind}"
        for layer in checkpoint["quantization"]["layers"]
        for kind in ("weight", "bias")
    }
    start = np.frombuffer(data, np.uint8).ctypes.data
    for name, tensor in constants.items():
        content = model.Buffers(tensor.Buffer()).DataAsNumpy()
        assert (content.ctypes.data - start) % 16 == 0, f"{name} is not aligned"
        stored = checkpoint["tensors"][name]
        assert len(content) == stored.numel() * (1 if name.endswith("weight") else 4)
        if name.endswith("weight"):
            counts = np.bincount(content, minlength=256)
            assert np.array_equal(
                counts, np.bincount(stored.flatten().view(torch.uint8), minlength=256)
            )


def test_scales_of_a_bias_are_products(checkpoint):
    schema, _ = tflite_micro()
    graph = schema.Model.GetRootAsModel(write_tflite(checkpoint, "net"), 0).Subgraphs(0)
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    for i in range(graph.OperatorsLength()):
        inputs = graph.Operators(i).InputsAsNumpy()
        if len(inputs) == 3:
            x, weight, bias = (tensors[k].Quantization() for k in inputs)
            assert np.allclose(x.Scale(0) * weight.ScaleAsNumpy(), bias.ScaleAsNumpy(), rtol=1e-6)
            assert not weight.ZeroPointAsNumpy().any() and not bias.ZeroPointAsNumpy().any()


# ---- parity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_random_narrow_nets_run_as_in_torch(seed, images):
    checkpoint = random_checkpoint(seed, channels=((3, 4, 5, 6), (3, 1, 7, 2))[seed % 2])
    logits, arena_bytes = run_tflite(
        write_tflite(checkpoint, "net"), quantize_images(checkpoint, images)
    )
    expected = torch_logits(checkpoint, images)
    assert arena_bytes > 0 and not (logits == logits[0]).all()
    assert np.abs(logits.astype(int) - expected).max() <= 2
    assert (logits == expected).mean() > 0.5


@pytest.mark.parametrize(("weights", "output_scale"), [(127, 1e-4), (-127, 1e-4), (0, 0.02)])
def test_saturated_and_empty_layers(weights, output_scale, images):
    checkpoint = random_checkpoint(5, weights, output_scale)
    logits, _ = run_tflite(write_tflite(checkpoint, "net"), quantize_images(checkpoint, images))
    assert np.abs(logits.astype(int) - torch_logits(checkpoint, images)).max() <= 1
    if weights:
        assert logits.min() == -128 and logits.max() == 127
    else:  # what remains is the last layer's bias
        zero_point = signed_zero_point(
            checkpoint["quantization"]["layers"]["fc2"]["output_zero_point"]
        )
        expected = np.rint(checkpoint["tensors"]["fc2.bias"].numpy() / output_scale) + zero_point
        assert np.abs(logits - expected).max() <= 1


@pytest.mark.parametrize("layer", ["block1", "block2", "block3", "fc1", "fc2"])
def test_every_layers_weights_reach_the_output(layer, checkpoint, images):
    """Halving one layer changes the file's logits just as it changes torch's."""
    before = integer_logits(int8_model(checkpoint), images)
    checkpoint["tensors"][f"{layer}.weight"] //= 2
    expected = integer_logits(int8_model(checkpoint), images)
    logits, _ = run_tflite(write_tflite(checkpoint, "net"), quantize_images(checkpoint, images))
    assert (before != expected).any()
    assert np.abs(logits.astype(int) - expected).max() <= 1


def test_export_of_the_smoke_run(copy, capsys):
    run_main("export_edge", "--smoke", "--images", 50)
    for name in ("baseline_int8", "pruned_50_int8"):
        result = json.loads((copy / f"results/smoke/edge/{name}.json").read_text())
        assert result["parity_images"] == 50 and result["max_difference_lsb"] <= 2
        assert 40_960 <= result["tflite_micro_arena_bytes"] < 50_000
        file = copy / f"results/smoke/edge/{name}.tflite"
        assert result["tflite_bytes"] == file.stat().st_size
        assert result["tflite_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not (copy / "results/smoke/edge/baseline_fp32.tflite").exists()


@pytest.mark.parametrize(
    ("count", "differing", "more_correct", "accepted"),
    [
        (1000, 5, 1, True),
        (1000, 6, 0, False),
        (1000, 2, 2, False),
        (10_000, 50, -15, True),
        (10_000, 51, 0, False),
        (10_000, 16, -16, False),
        (130, 5, 5, True),
        (130, 6, 0, False),
        (25, 1, 1, True),
        (24, 1, 0, False),
        (1, 0, 0, True),
    ],
)
def test_rules_of_parity(count, differing, more_correct, accepted):
    logits = np.array([[0, 1], [1, 0]])
    parity = {"parity_images": count, "differing_images": differing}
    parity |= {"correct_images": 100 + more_correct, "torch_correct_images": 100}
    expectation = (
        contextlib.nullcontext() if accepted else pytest.raises(UserError, match="does not agree")
    )
    with expectation:
        export_edge.require_parity("x", logits, parity)


def test_parity_figures():
    theirs = np.array([[3, 3, 0], [0, 5, 1], [-128, 0, 1]], np.int8)
    ours = np.array([[3, 3, 0], [0, 4, 1], [127, 0, 1]], np.int8)
    figures = export_edge.compare_logits(theirs, ours, np.array([0, 1, 2]))
    assert figures["differing_images"] == 1 and figures["max_difference_lsb"] == 255
    assert figures["correct_images"] == 3 and figures["torch_correct_images"] == 2
    assert figures["agreement_percent"] == 66.6667 and figures["equal_logits_percent"] == 77.7778


# ---- errors ------------------------------------------------------------------------------------


def test_constant_outputs_are_an_error_and_nothing_is_published(copy, capsys):
    run_main("export_edge", *ARGUMENTS)
    path = copy / FOLDER / "baseline_int8.pt"
    spoiled = torch.load(path, weights_only=True)
    spoiled["tensors"]["fc2.weight"].zero_()
    torch.save(spoiled, path)
    capsys.readouterr()
    assert "every image alike" in fails(capsys, copy, "export_edge", *ARGUMENTS)


def test_a_file_that_disagrees_is_not_published(copy, capsys, monkeypatch):
    monkeypatch.setattr(
        tflite,
        "channels_last",
        lambda weight, positions=1: channels_last(weight) if weight.ndim == 4 else weight,
    )  # the classic mistake: fc1 left in torch's order
    error = fails(capsys, copy, "export_edge", *ARGUMENTS)
    assert "does not agree" in error


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "not a readable checkpoint"),
        (lambda path: path.unlink(), "python quantize.py"),
        (lambda path: shutil.copy(path.with_name("baseline_fp32.pt"), path), "takes int8"),
    ],
)
def test_checkpoints_that_cannot_be_exported(copy, capsys, spoil, message):
    path = copy / FOLDER / "baseline_int8.pt"
    spoil(path)
    assert message in fails(capsys, copy, "export_edge", "--smoke", "--checkpoint", path)


def swap_layers(checkpoint):
    layers = checkpoint["quantization"]["layers"]
    checkpoint["quantization"]["layers"] = dict(reversed(layers.items()))


def narrow(name, dimension):
    def spoil(checkpoint):
        tensors = checkpoint["tensors"]
        tensors[name] = tensors[name].narrow(dimension, 0, 5).contiguous()

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        swap_layers,
        narrow("block2.weight", 1),
        narrow("fc1.bias", 0),
        lambda c: (narrow("fc2.weight", 0)(c), narrow("fc2.bias", 0)(c)),
        lambda c: c["quantization"].update(input_scale=float("nan")),
        lambda c: c["quantization"].update(input_zero_point=1000),
        lambda c: c["quantization"]["layers"]["block1"].update(output_scale=-1.0),
        lambda c: c["quantization"]["layers"]["fc1"].update(output_scale="x"),
    ],
)
def test_checkpoints_whose_parts_do_not_fit(copy, capsys, spoil):
    path = copy / FOLDER / "baseline_int8.pt"
    checkpoint = torch.load(path, weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, path)
    error = fails(capsys, copy, "export_edge", *ARGUMENTS)
    assert "baseline_int8.pt: " in error and "make it again with: python quantize.py" in error


def test_a_run_without_int8_checkpoints(copy, capsys):
    for path in (copy / FOLDER).glob("*_int8.pt"):
        path.unlink()
    assert "python quantize.py" in fails(capsys, copy, "export_edge", "--smoke")


def test_all_images_decide_where_the_first_ones_miss_a_bar(copy, monkeypatch, capsys):
    monkeypatch.setattr(export_edge, "agrees", lambda parity: parity["parity_images"] > 50)
    arguments = ("--checkpoint", "checkpoints/smoke/baseline_int8.pt", "--images", 50)
    run_main("export_edge", "--smoke", *arguments)
    assert "50 images do not settle it, taking 130" in capsys.readouterr().out
    result = json.loads((copy / "results/smoke/edge/baseline_int8.json").read_text())
    assert result["parity_images"] == 130


def test_missing_packages_are_named(copy, capsys, monkeypatch, checkpoint):
    monkeypatch.setitem(importlib.sys.modules, "tflite_micro", None)
    monkeypatch.setitem(importlib.sys.modules, "tflite_micro.python.tflite_micro", None)
    run_main("export_edge", "--smoke")
    said = capsys.readouterr().out
    assert "not measured" in said and "firmware/requirements.txt" in said
    assert not (copy / "results/smoke/edge").exists()
    with pytest.raises(UserError, match="firmware/requirements.txt"):
        write_tflite(checkpoint, "net")
    monkeypatch.setattr(ethos_u.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="firmware/requirements.txt"):
        ethos_u.npu_cost(b"")


def test_a_file_that_the_interpreter_refuses(images, checkpoint):
    data = write_tflite(checkpoint, "net")
    with pytest.raises(UserError, match="tflite-micro cannot run"):
        run_tflite(data, np.zeros((1, 8, 8, 3), np.int8))


# ---- NPU ---------------------------------------------------------------------------------------


def test_zeros_shrink_flash_and_cycles_on_the_npu(checkpoint):
    nets = [with_zeros(checkpoint, share) for share in (0, 0.8)]
    dense, sparse = (ethos_u.npu_cost(write_tflite(net, "net")) for net in nets)
    assert dense["u55_128_operators_on_npu_percent"] == 100
    assert dense["u55_128_system_config"] == "Ethos_U55_High_End_Embedded"
    assert dense["u55_128_memory_mode"] == "Shared_Sram"
    clock_khz = 1e3 * dense["u55_128_clock_mhz"]
    assert dense["u55_128_latency_ms_modelled"] == pytest.approx(
        dense["u55_128_cycles_modelled"] / clock_khz
    )
    assert dense["u55_128_sram_bytes_modelled"] >= 32 * 32 * (32 + 3)
    assert sparse["u55_128_flash_bytes_modelled"] < 0.5 * dense["u55_128_flash_bytes_modelled"]
    assert sparse["u55_128_cycles_modelled"] < 0.7 * dense["u55_128_cycles_modelled"]


def test_unknown_accelerator_and_unreadable_file():
    with pytest.raises(UserError, match="no accelerator ethos-u99.*ethos-u55-128"):
        ethos_u.npu_cost(b"", "ethos-u99")
    with pytest.raises(UserError, match="Vela cannot compile"):
        ethos_u.npu_cost(b"not a file")
