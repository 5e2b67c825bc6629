"""Step 2: post-training static quantization of an FP32 checkpoint to INT8, weights and activations.

Reads   an FP32 checkpoint (default checkpoints/baseline_fp32.pt), training images for calibration
Writes  checkpoints/<name>_int8.pt  results/<name>_int8.json

    python quantize.py
    python quantize.py --checkpoint checkpoints/pruned_50_fp32.pt
    python quantize.py --smoke           # seconds; reads checkpoints/smoke/baseline_fp32.pt

BN is folded and ReLU fused; activations are unsigned 8 bit, per tensor; weights are symmetric in
[-127, 127], per channel for convolutions and per tensor for Linear layers. A zero weight stays zero.
"""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.ao import quantization as tq
from torch.ao.nn import intrinsic as nni
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from edgecnn.checkpoint import (
    fp32_model,
    load_checkpoint,
    parent_fields,
    provenance,
    publish,
)
from edgecnn.cli import Parser, add_run_arguments, data_source, positive_int, run_name
from edgecnn.data import load_training, normalize
from edgecnn.files import (
    UserError,
    checkpoints_dir,
    require_writable,
    results_dir,
    user_errors_exit_2,
)
from edgecnn.model import ARCHITECTURE, CLASSES, IMAGE_SHAPE, EdgeCNN, fold_batch_norm
from edgecnn.train import predict

ENGINE = "qnnpack"  # ARM's engine: what a phone or a Raspberry Pi runs; slow on x86
CALIBRATION_IMAGES = 2048
CALIBRATION_BATCH = 256
CALIBRATION_SEED = 0  # which training images calibrate
# The deployed order: name -> quantized module type; each convolution is followed by a 2x2 max-pool.
LAYERS = {
    "block1": nniq.ConvReLU2d,
    "block2": nniq.ConvReLU2d,
    "block3": nniq.ConvReLU2d,
    "fc1": nniq.LinearReLU,
    "fc2": nnq.Linear,
}

# torch.ao.quantization works in the pinned torch and says at every call that it will move to torchao.
warnings.filterwarnings("ignore", message=".*torch.ao.quantization.*", category=DeprecationWarning)
warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")


# ---- quantizing --------------------------------------------------------------------------------


def qconfig(per_channel: bool) -> tq.QConfig:
    """Histogram-calibrated unsigned activations, symmetric weights that never use -128."""
    # x86's 8-bit dot product saturates without VNNI; torch's defaults spare it the eighth bit too.
    reduce_range = torch.backends.quantized.engine in ("fbgemm", "x86")
    activation = tq.HistogramObserver.with_args(dtype=torch.quint8, reduce_range=reduce_range)
    weight = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127}
    if per_channel:
        observer = tq.PerChannelMinMaxObserver.with_args(
            qscheme=torch.per_channel_symmetric, ch_axis=0, **weight
        )
    else:
        observer = tq.MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric, **weight)
    return tq.QConfig(activation=activation, weight=observer)


def float_graph(model: EdgeCNN) -> nn.Sequential:
    """The deployed graph in floating point: BN folded, ReLU fused, ready for observers."""
    folded = fold_batch_norm(model)
    graph = nn.Sequential()
    graph.append(tq.QuantStub(qconfig(per_channel=False)))
    for name in ("block1", "block2", "block3"):
        fused = nni.ConvReLU2d(getattr(folded, name).conv, nn.ReLU())
        fused.qconfig = qconfig(per_channel=True)
        graph.add_module(name, fused)
        graph.add_module(f"{name}_pool", nn.MaxPool2d(2))
    graph.add_module("flatten", nn.Flatten())
    graph.add_module("fc1", nni.LinearReLU(folded.fc1, nn.ReLU()))
    graph.add_module("fc2", folded.fc2)
    graph.fc1.qconfig = graph.fc2.qconfig = qconfig(per_channel=False)
    graph.add_module("dequantize", tq.DeQuantStub(qconfig(per_channel=False)))
    return graph.eval()


@torch.no_grad()
def quantize_model(model: EdgeCNN, images: torch.Tensor, engine: str) -> nn.Sequential:
    """Static PTQ of the network, calibrated on uint8 (N, 3, 32, 32) images, for one engine."""
    torch.backends.quantized.engine = engine
    prepared = tq.prepare(float_graph(model))
    for batch in images.split(CALIBRATION_BATCH):
        prepared(normalize(batch))
    return tq.convert(prepared)


# ---- storing -----------------------------------------------------------------------------------


def to_tensors(quantized: nn.Sequential) -> tuple[dict[str, torch.Tensor], dict]:
    """(int8 weights and float32 biases by name, plain scales and zero points) of a quantized net."""
    first = quantized[0]
    tensors, layers = {}, {}
    for name in LAYERS:
        layer = getattr(quantized, name)
        weight = layer.weight()
        per_channel = weight.qscheme() != torch.per_tensor_affine
        tensors[f"{name}.weight"] = weight.int_repr()
        tensors[f"{name}.bias"] = layer.bias().detach()
        layers[name] = {
            "weight_scale": weight.q_per_channel_scales().tolist()
            if per_channel
            else [weight.q_scale()],
            "weight_zero_point": 0,
            "output_scale": float(layer.scale),
            "output_zero_point": int(layer.zero_point),
        }
    return tensors, {
        "input_scale": float(first.scale),
        "input_zero_point": int(first.zero_point),
        "layers": layers,
    }


def quantized_weight(values: torch.Tensor, scales: list[float]) -> torch.Tensor:
    """A qint8 tensor from its integers and its one scale, or one scale an output channel."""
    if len(scales) == 1:
        return torch._make_per_tensor_quantized_tensor(values, scales[0], 0)
    zero_points = torch.zeros(len(scales), dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(
        values, torch.tensor(scales, dtype=torch.float64), zero_points, 0
    )


def int8_model(checkpoint: dict) -> nn.Sequential:
    """The runnable quantized network of an int8 checkpoint: (N, 3, 32, 32) floats -> (N, 10).

    Raises UserError when this torch lacks the engine or the tensors do not fit.
    """
    set_engine(checkpoint["quantization"].get("engine"))
    try:
        model = int8_graph(checkpoint["tensors"], checkpoint["quantization"]).eval()
        # Layers that do not fit each other show only in a forward.
        if model(torch.zeros(1, *IMAGE_SHAPE)).shape != (1, len(CLASSES)):
            raise ValueError(f"it does not answer with {len(CLASSES)} logits")
        if list(checkpoint["quantization"]["layers"]) != list(LAYERS):
            raise ValueError(f"its layers are not {', '.join(LAYERS)}, in this order")
        return model
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the checkpoint's tensors do not fit {ARCHITECTURE}: {reason}") from None


def int8_graph(tensors: dict[str, torch.Tensor], quantization: dict) -> nn.Sequential:
    """The quantized modules in deployed order, packed for the selected engine."""
    graph = nn.Sequential()
    graph.append(
        nnq.Quantize(quantization["input_scale"], quantization["input_zero_point"], torch.quint8)
    )
    for name, kind in LAYERS.items():
        values, layer = tensors[f"{name}.weight"], quantization["layers"][name]
        outputs, inputs = values.shape[:2]
        module = kind(inputs, outputs, 3, padding=1) if values.ndim == 4 else kind(inputs, outputs)
        module.set_weight_bias(
            quantized_weight(values, layer["weight_scale"]), tensors[f"{name}.bias"]
        )
        module.scale, module.zero_point = layer["output_scale"], layer["output_zero_point"]
        if name == "fc1":
            graph.add_module("flatten", nn.Flatten())
        graph.add_module(name, module)
        if values.ndim == 4:
            graph.add_module(f"{name}_pool", nn.MaxPool2d(2))
    graph.add_module("dequantize", nnq.DeQuantize())
    return graph


def set_engine(engine: str) -> None:
    """Select torch's quantized engine; raises UserError when this build lacks it."""
    supported = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if engine not in supported:
        raise UserError(f"this torch has no engine {engine}; it has {', '.join(supported)}")
    torch.backends.quantized.engine = engine


# ---- the step ----------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="FP32 checkpoint to quantize, dense or pruned (default: the run's baseline_fp32.pt)",
    )
    parser.add_argument(
        "--engine",
        choices=("qnnpack", "fbgemm", "x86", "onednn"),
        default=ENGINE,
        help="torch's integer kernels that the file is for (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration-images",
        type=positive_int,
        default=CALIBRATION_IMAGES,
        help="training images that set the activations' ranges (default: %(default)s)",
    )
    add_run_arguments(parser)
    return parser.parse_args()


@user_errors_exit_2
def main():
    args = parse_arguments()
    run = run_name(args)
    require_writable(checkpoints_dir(run), results_dir(run))
    set_engine(args.engine)
    parent_path = args.checkpoint or checkpoints_dir(run) / "baseline_fp32.pt"
    parent = load_checkpoint(parent_path, "fp32")
    ancestry = parent["provenance"]
    holdout = ancestry.get("holdout", False)  # then the calibration sees no validation image either
    _, (images, _), _ = load_training(data_source(args), args.data_dir, holdout=holdout)
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    chosen = torch.randperm(len(images), generator=generator)[: args.calibration_images]

    model = fp32_model(parent)
    tensors, quantization = to_tensors(quantize_model(model, images[chosen], args.engine))
    quantization["engine"] = args.engine
    deployed = int8_model({"tensors": tensors, "quantization": quantization})
    agree = predict(deployed, images[chosen]) == predict(model, images[chosen])
    calibration = {
        "source": f"{len(images):,} training images",
        "images": len(chosen),
        "indices_sha256": hashlib.sha256(chosen.numpy().data).hexdigest(),
        "agreement_with_parent_percent": 100 * agree.double().mean().item(),
    }

    name = parent_path.stem.removesuffix("_fp32") + "_int8"
    lineage = {key: ancestry[key] for key in ("method", "criterion", "seed")}
    lineage |= parent_fields(parent_path)
    origin = provenance(name, args, **lineage, holdout=holdout)
    packed = lineage["method"].startswith("pruned")
    result = {"calibration": calibration, **quantization}
    publish(run, origin, "int8", tensors, result, quantization=quantization, packed=packed)
    percent = calibration["agreement_with_parent_percent"]
    print(f"{name} agrees with {parent_path.stem} on {percent:.2f} % of the calibration images")


if __name__ == "__main__":
    main()
