"""Step 2: post-training static quantization of FP32 checkpoints to INT8, weights and activations.

Reads   checkpoints/*_fp32.pt (or the one given), training images for calibration
Writes  checkpoints/<name>_int8.pt  results/<name>_int8.json, a pair a checkpoint

    python quantize.py                   # every one that is not quantized yet
    python quantize.py --checkpoint checkpoints/pruned_50_fp32.pt
    python quantize.py --smoke           # seconds; reads checkpoints/smoke/

BN is folded and ReLU fused; activations are unsigned 8 bit, per tensor; weights are symmetric in
[-127, 127], per channel for convolutions and per tensor for Linear layers. A zero weight stays zero.
"""

import functools
import hashlib
from pathlib import Path

import torch

from edgecnn.checkpoint import (
    dataset_of,
    float_module,
    graph_of,
    load_checkpoint,
    parent_fields,
    provenance,
    save_variant,
)
from edgecnn.cli import Parser, add_force_argument, add_run_arguments, positive_int, run_name
from edgecnn.data import normalize, reload_training
from edgecnn.errors import user_errors_exit_2
from edgecnn.graph import to_plain
from edgecnn.names import checkpoints_dir, results_dir
from edgecnn.quantized import int8_module, quantize, set_engine
from edgecnn.rewrite import deployed
from edgecnn.step import Step, variant_step
from edgecnn.train import predict

ENGINE = "qnnpack"  # ARM's engine: what a phone or a Raspberry Pi runs; slow on x86
CALIBRATION_IMAGES = 2048
CALIBRATION_BATCH = 256
CALIBRATION_SEED = 0  # which training images calibrate
DECISIVE = ("engine", "calibration_images", "smoke")  # the arguments that decide the result


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


def quantize_checkpoint(step: Step, parent_path: Path, args, reload) -> None:
    """Quantize one FP32 checkpoint, and write what became of it. reload: data.reload_training."""
    parent = load_checkpoint(parent_path, "fp32")
    ancestry, dataset = parent["provenance"], dataset_of(parent)
    holdout = ancestry.get("holdout", False)  # then the calibration sees no validation image either
    (images, _), _ = reload(dataset, args.data_dir, holdout)
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    chosen = torch.randperm(len(images), generator=generator)[: args.calibration_images]

    graph, folded = deployed(graph_of(parent), parent["tensors"])
    batches = (normalize(batch, dataset) for batch in images[chosen].split(CALIBRATION_BATCH))
    tensors, quantization = quantize(graph, folded, batches, args.engine)
    parts = {"graph": to_plain(graph), "tensors": tensors, "quantization": quantization}
    theirs = predict(float_module(parent), images[chosen], dataset)
    agree = predict(int8_module(parts), images[chosen], dataset) == theirs
    calibration = {
        "source": f"{len(images):,} training images",
        "images": len(chosen),
        "indices_sha256": hashlib.sha256(chosen.numpy().data).hexdigest(),
        "agreement_with_parent_percent": 100 * agree.double().mean().item(),
    }

    lineage = {key: ancestry[key] for key in ("method", "criterion", "seed")}
    lineage |= parent_fields(parent_path)
    origin = provenance(step.record.stem, args, **lineage, holdout=holdout)
    result = {"calibration": calibration, "quantization": quantization}
    save_variant(step, origin, "int8", (graph, tensors), dataset, result, quantization)
    percent = calibration["agreement_with_parent_percent"]
    print(f"{step.record.stem}: {percent:.2f} % of the calibration images as {parent_path.stem}")


@user_errors_exit_2
def main():
    args = parse_arguments()
    run = run_name(args)
    set_engine(args.engine)
    arguments = {key: getattr(args, key) for key in DECISIVE}
    folder, only = checkpoints_dir(run), [args.checkpoint] if args.checkpoint else []
    there = sorted(folder.glob("*_fp32.pt"))
    records = sorted(results_dir(run).glob("*_int8.json"))  # a clone may hold nothing else
    made = [folder / f"{path.stem.removesuffix('int8')}fp32.pt" for path in records]
    reload = functools.cache(reload_training)
    for path in only or there or made or [folder / "baseline_fp32.pt"]:
        name = path.stem.removesuffix("_fp32") + "_int8"
        step = variant_step(run, name, "quantize.py", arguments, (path,), args.force)
        if not step.kept():
            quantize_checkpoint(step, path, args, reload)


if __name__ == "__main__":
    main()
