"""INT8: integers from end to end, exact zeros, bit-equal reload, calibrated on training images."""

import json

import pytest
import torch
from conftest import run_main
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from edgecnn.checkpoint import fp32_model, load_checkpoint
from edgecnn.data import load_sample, normalize
from edgecnn.int8 import LAYERS, int8_model
from edgecnn.model import fold_batch_norm
from edgecnn.pruning import prune_globally
from quantize import quantize_model, to_tensors


class Recorder(TorchDispatchMode):
    """Every operation that runs, with the dtypes of the tensors it takes and gives."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        self.calls.append((str(function), {t.dtype for t in tensors}))
        return result


def as_checkpoint(tensors, quantization):
    return {"tensors": tensors, "quantization": {**quantization, "engine": "qnnpack"}}


@pytest.fixture
def parent(smoke):
    return fp32_model(load_checkpoint(smoke / "checkpoints/smoke/baseline_fp32.pt"))


@pytest.fixture(scope="module")
def images():
    return load_sample()[1][0]


def test_no_floating_point_operation_between_quantize_and_dequantize(smoke, images):
    model = int8_model(load_checkpoint(smoke / "checkpoints/smoke/baseline_int8.pt"))
    batch = normalize(images)
    with torch.no_grad(), Recorder() as recorder:
        model(batch)
    names = [name for name, _ in recorder.calls]
    first = next(i for i, name in enumerate(names) if "quantize_per_tensor" in name)
    last = next(i for i, name in enumerate(names) if "dequantize" in name)
    inner = recorder.calls[first + 1 : last]
    assert sum("conv2d_relu" in name for name, _ in inner) == 3
    assert sum("quantized.linear" in name for name, _ in inner) == 2
    for name, dtypes in inner:
        assert dtypes <= {torch.quint8, torch.int64}, f"{name} handles {dtypes}"


def test_reload_is_bit_equal(parent, images, workdir, smoke):
    torch.manual_seed(1)
    quantized = quantize_model(parent, load_sample()[0][0], "qnnpack")
    rebuilt = int8_model(as_checkpoint(*to_tensors(quantized)))
    batch = normalize(images)
    assert torch.equal(rebuilt(batch), quantized(batch))
    stored = load_checkpoint(smoke / "checkpoints/smoke/baseline_int8.pt")
    again = load_checkpoint(smoke / "checkpoints/smoke/baseline_int8.pt")
    assert torch.equal(int8_model(stored)(batch), int8_model(again)(batch))


def test_weights_round_to_the_nearest_step_and_zeros_stay_zero(parent):
    prune_globally(parent, 0.5, "layer-rank")
    tensors, quantization = to_tensors(quantize_model(parent, load_sample()[0][0], "qnnpack"))
    folded = fold_batch_norm(parent)
    for name in LAYERS:
        layer = getattr(folded, name)
        weight = (layer.conv if hasattr(layer, "conv") else layer).weight.detach()
        integers = tensors[f"{name}.weight"]
        scales = torch.tensor(quantization["layers"][name]["weight_scale"])
        assert len(scales) == (len(weight) if weight.ndim == 4 else 1)
        assert integers.dtype == torch.int8 and integers.min() >= -127
        assert (integers[weight == 0] == 0).all()
        error = (weight - integers * scales.view(-1, *[1] * (weight.ndim - 1))).abs()
        assert (error.flatten(1).amax(1) <= scales.float() * 0.5001).all()


def test_integers_explain_the_output(parent, images):
    """Plain float arithmetic on the stored integers reproduces the kernels to one rounding step."""
    tensors, quantization = to_tensors(quantize_model(parent, load_sample()[0][0], "qnnpack"))
    model = int8_model(as_checkpoint(tensors, quantization))

    def rounded(real, scale, zero_point):
        return ((real / scale).round() + zero_point).clamp(0, 255)

    scale, zero_point = quantization["input_scale"], quantization["input_zero_point"]
    batch = normalize(images[:16])
    x = (rounded(batch, scale, zero_point) - zero_point) * scale
    stage = model[1](model[0](batch))  # the first convolution's own output
    layer = quantization["layers"]["block1"]
    weight = tensors["block1.weight"] * torch.tensor(layer["weight_scale"]).view(-1, 1, 1, 1)
    real = F.relu(F.conv2d(x, weight.float(), tensors["block1.bias"], padding=1))
    expected = rounded(real, layer["output_scale"], layer["output_zero_point"])
    assert (expected - stage.int_repr()).abs().max() <= 1


def test_file_size_and_calibration_are_recorded(smoke):
    path = smoke / "checkpoints/smoke/baseline_int8.pt"
    assert path.stat().st_size <= 0.64 * 2**20
    result = json.loads((smoke / "results/smoke/baseline_int8.json").read_text())
    assert result["engine"] == "qnnpack"
    assert result["calibration"]["source"] == "390 training images"
    assert set(result["layers"]) == set(LAYERS)
    for layer in result["layers"].values():
        assert layer["output_scale"] > 0 and layer["weight_zero_point"] == 0


def test_quantized_pruned_network_keeps_its_zeros_in_a_smaller_file(smoke):
    folder = smoke / "checkpoints/smoke"
    fp32 = load_checkpoint(folder / "pruned_50_fp32.pt")["tensors"]
    int8 = load_checkpoint(folder / "pruned_50_int8.pt")["tensors"]
    assert (int8["fc1.weight"][fp32["fc1.weight"] == 0] == 0).all()
    assert int((int8["fc1.weight"] == 0).sum()) >= int((fp32["fc1.weight"] == 0).sum())
    sizes = [(folder / f"{name}_int8.pt").stat().st_size for name in ("pruned_50", "baseline")]
    assert sizes[0] < 0.7 * sizes[1]


def test_engine_is_stored_and_used(smoke, workdir):
    parent = smoke / "checkpoints/smoke/baseline_fp32.pt"
    run_main("quantize", "--smoke", "--engine", "fbgemm", "--checkpoint", parent)
    checkpoint = load_checkpoint("checkpoints/smoke/baseline_int8.pt")
    assert checkpoint["quantization"]["engine"] == "fbgemm"
    int8_model(checkpoint)
    assert torch.backends.quantized.engine == "fbgemm"
