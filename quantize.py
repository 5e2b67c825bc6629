"""Step 2: post-training static quantization of FP32 checkpoints to INT8, weights and activations.

Reads   checkpoints/*_fp32.pt (or the one given), training images for calibration
Writes  checkpoints/<name>_int8.pt  results/<name>_int8.json, a pair a checkpoint

    python quantize.py                   # every one that is not quantized yet
    python quantize.py --checkpoint checkpoints/pruned_50_fp32.pt
    python quantize.py --smoke           # seconds; reads checkpoints/smoke/

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

from edgecnn.checkpoint import (
    fp32_model,
    load_checkpoint,
    parent_fields,
    provenance,
    save_variant,
)
from edgecnn.cli import (
    Parser,
    add_force_argument,
    add_run_arguments,
    positive_int,
    run_name,
)
from edgecnn.data import load_training, normalize
from edgecnn.errors import user_errors_exit_2
from edgecnn.int8 import LAYERS, int8_model, set_engine
from edgecnn.model import EdgeCNN, fold_batch_norm
from edgecnn.names import checkpoints_dir
from edgecnn.step import Step, variant_step
from edgecnn.train import predict

ENGINE = "qnnpack"  # ARM's engine: what a phone or a Raspberry Pi runs; slow on x86
CALIBRATION_IMAGES = 2048
CALIBRATION_BATCH = 256
CALIBRATION_SEED = 0  # which training images calibrate
DECISIVE = ("engine", "calibration_images", "smoke")  # the arguments that decide the result

# torch.ao.quantization works in the pinned torch and says at every call that it will move to torchao.
warnings.filterwarnings("ignore", message=".*torch.ao.quantization.*", category=DeprecationWarning)


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


# ---- the step ----------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="FP32 checkpoint to quantize, dense or pruned (default: all of the run)",
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
    add_force_argument(parser)
    add_run_arguments(parser)
    return parser.parse_args()


def quantize_checkpoint(step: Step, parent_path: Path, args) -> None:
    """Quantize one FP32 checkpoint, and write what became of it."""

    parent = load_checkpoint(parent_path, "fp32")
    ancestry = parent["provenance"]
    holdout = ancestry.get("holdout", False)  # then the calibration sees no validation image either
    (images, _), _ = load_training(args.data_dir, holdout, args.smoke)
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

    lineage = {key: ancestry[key] for key in ("method", "criterion", "seed")}
    lineage |= parent_fields(parent_path)
    origin = provenance(step.record.stem, args, **lineage, holdout=holdout)
    packed = lineage["method"].startswith("pruned")
    result = {"calibration": calibration, **quantization}
    save_variant(step, origin, "int8", tensors, result, quantization, packed)
    percent = calibration["agreement_with_parent_percent"]
    print(f"{step.record.stem}: {percent:.2f} % of the calibration images as {parent_path.stem}")


@user_errors_exit_2
def main():
    args = parse_arguments()
    run = run_name(args)
    set_engine(args.engine)
    arguments = {key: getattr(args, key) for key in DECISIVE}
    folder, only = checkpoints_dir(run), [args.checkpoint] if args.checkpoint else []
    for path in only or sorted(folder.glob("*_fp32.pt")) or [folder / "baseline_fp32.pt"]:
        name = path.stem.removesuffix("_fp32") + "_int8"
        step = variant_step(run, name, "quantize.py", arguments, (path,), args.force)
        if not step.kept():
            quantize_checkpoint(step, path, args)


if __name__ == "__main__":
    main()
