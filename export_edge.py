"""Step 6: INT8 variants as artifacts that devices run, each checked against PyTorch before it is kept.

Reads   checkpoints/*_int8.pt (or the one given), data/ (test images: only to compare frozen files)
Writes  results/edge/<variant>.tflite  results/edge/<variant>.c  results/edge/<variant>.json
        results/edge/baseline_fp32.c (the FP32 kernels' weights)

    python export_edge.py
    python export_edge.py --run reference --images 10000    # the committed figures
    python export_edge.py --smoke           # seconds; reads checkpoints/smoke/

A .tflite file runs under tflite-micro on the same images as the checkpoint under torch. Below
1,000 images, where a percentage says little, up to 5 may differ (and at most one in 25); where the
first 1,000 miss a bar, all 10,000 decide. The C file
belongs to the kernels in firmware/: compiled here, it has to give every logit that exact integer
arithmetic gives, bit for bit; how it agrees with torch's fbgemm and QNNPACK kernels is reported.
"""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from edgecnn.checkpoint import dataset_of, find_checkpoints, load_checkpoint, provenance
from edgecnn.cli import (
    Parser,
    add_force_argument,
    add_run_arguments,
    positive_int,
    run_name,
)
from edgecnn.data import load_judging, normalize
from edgecnn.deploy.c_source import C_NAMES, c_files, host_parity
from edgecnn.deploy.tflite import operators, run_tflite, tflite_micro_installed, write_tflite
from edgecnn.errors import UserError, user_errors_exit_2
from edgecnn.names import results_dir
from edgecnn.quantized import int8_module, integer_logits, quantize_images
from edgecnn.split import Split
from edgecnn.step import Step, source_digests

MIN_IMAGES = 25  # fewer would say nothing
IMAGES = 1000  # about 11 ms an image; all 10,000 for the committed figures
MIN_AGREEMENT_PERCENT = 99.5
MAX_ACCURACY_DIFFERENCE_POINTS = 0.15
LINEAGE = ("method", "criterion", "seed", "parent")
FEW_IMAGES, FEW_IMAGES_MAY_DIFFER, ONE_IN = 1000, 5, 25
C_ENGINES = ("fbgemm", "qnnpack")  # torch's kernels that the generated C is held against


# ---- parity ------------------------------------------------------------------------------------


def compare_logits(theirs: np.ndarray, ours: np.ndarray, labels: np.ndarray) -> dict:
    """How the logits (N, 10) of an artifact agree with PyTorch's, both int8 at the same scale."""
    predicted, expected = theirs.argmax(1), ours.argmax(1)  # the first of equals, as torch's argmax
    count, differing = len(labels), int((predicted != expected).sum())
    correct, torch_correct = (int((classes == labels).sum()) for classes in (predicted, expected))
    return {
        "parity_images": count,
        "differing_images": differing,
        "agreement_percent": round(100 * (1 - differing / count), 4),
        "correct_images": correct,
        "accuracy_percent": round(100 * correct / count, 4),
        "torch_correct_images": torch_correct,
        "torch_accuracy_percent": round(100 * torch_correct / count, 4),
        "max_difference_lsb": int(np.abs(theirs.astype(int) - ours.astype(int)).max()),
        "equal_logits_percent": round(100 * float(np.mean(theirs == ours)), 4),
    }


def agrees(parity: dict) -> bool:
    """Whether an artifact's answers are PyTorch's, by the bars on this many images."""
    count, differing = parity["parity_images"], parity["differing_images"]
    if count < FEW_IMAGES:
        return differing <= min(FEW_IMAGES_MAY_DIFFER, count // ONE_IN)
    shift = abs(parity["correct_images"] - parity["torch_correct_images"])
    in_class = 100 * (count - differing) >= MIN_AGREEMENT_PERCENT * count
    return in_class and 100 * shift <= MAX_ACCURACY_DIFFERENCE_POINTS * count


def require_parity(name: str, logits: np.ndarray, parity: dict) -> None:
    """Raise UserError when an artifact's outputs are constant or do not agree with PyTorch's."""
    count, differing = parity["parity_images"], parity["differing_images"]
    if count > 1 and (logits == logits[0]).all():
        raise UserError(f"{name} answers every image alike: its weights are empty or were not read")
    shift = abs(parity["correct_images"] - parity["torch_correct_images"])
    if not agrees(parity):
        raise UserError(
            f"{name} does not agree with PyTorch: another class on {differing:,} of {count:,} images, "
            f"{shift:,} more or fewer correct; nothing was written for it"
        )


# ---- one variant -------------------------------------------------------------------------------


def tflite_artifact(
    path: Path, checkpoint: dict, data: Split, count: int, test_set: str
) -> tuple[bytes, dict]:
    """(the .tflite file, its figures) of an int8 checkpoint. Raises UserError where it disagrees.

    The first `count` images judge; where two of 1,000 are too many for the accuracy bar, all do.
    """
    model, dataset = int8_module(checkpoint), dataset_of(checkpoint)
    content = write_tflite(checkpoint, path.stem)
    for images, labels in ((data[0][:count], data[1][:count]), data):
        images = normalize(images, dataset)
        logits, arena_bytes = run_tflite(content, quantize_images(checkpoint, images))
        ours = integer_logits(model, images).numpy()
        parity = compare_logits(logits, ours, labels.numpy())
        constant = (logits == logits[0]).all()
        if agrees(parity) or constant or len(labels) == len(data[1]):
            break
        print(f"{path.stem}: {len(labels):,} images do not settle it, taking {len(data[1]):,}")
    require_parity(f"{path.stem}.tflite", logits, parity)
    return content, {
        "tflite_sha256": hashlib.sha256(content).hexdigest(),
        "tflite_bytes": len(content),
        "tflite_operators": operators(content),
        "tflite_micro_version": version("tflite-micro"),
        "tflite_micro_arena_bytes": arena_bytes,
        "engine": checkpoint["quantization"]["engine"],
        "test_set": test_set,
        **parity,
    }


def c_artifact(name: str, checkpoint: dict, images: torch.Tensor) -> tuple[dict[str, str], dict]:
    """(the files of the generated C by name, its agreement with exact integers and torch).

    images: normalized (N, C, H, W). Raises UserError where a logit differs from exact integers, or no
    C compiler is there.
    """
    parity = host_parity(checkpoint, images, C_ENGINES)
    exact = parity["exact_integers"]
    if exact["bit_exact_images"] != exact["images"]:
        raise UserError(
            f"{name}: the C differs from exact integers by up to {exact['max_difference_lsb']} LSB; "
            "nothing was written for it: check the C compiler"
        )
    return c_files(checkpoint), {
        f"c_vs_{reference}_{key}": value
        for reference, figures in parity.items()
        for key, value in figures.items()
    }


def write_artifacts(step: Step, contents: dict[Path, bytes], result: dict) -> None:
    """Write a variant's files and its JSON."""
    step.commit(contents, result)
    print(
        f"wrote {step.record} and {', '.join(path.name for path in contents)}: "
        f"{result['agreement_percent']:.2f} % agreement on "
        f"{result['parity_images']:,} images, at most {result['max_difference_lsb']} LSB apart, "
        f"accuracy {result['accuracy_percent']:.2f} % (torch {result['torch_accuracy_percent']:.2f})"
    )


# ---- the step ----------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="INT8 checkpoint to export (default: all of the run's lowest seed)",
    )
    parser.add_argument(
        "--images",
        type=positive_int,
        default=IMAGES,
        help="images on which the artifacts are compared with torch (default: %(default)s)",
    )
    add_force_argument(parser)
    add_run_arguments(parser)
    args = parser.parse_args()
    if args.images < MIN_IMAGES:
        parser.error(f"--images {args.images}: give at least {MIN_IMAGES}")
    return args


def int8_checkpoints(args, run: str) -> dict[Path, dict]:
    """The checkpoints to export, all of them checked before the first takes its time."""
    if args.checkpoint:
        return {args.checkpoint: load_checkpoint(args.checkpoint, "int8")}
    checkpoints = {path: load_checkpoint(path) for path in find_checkpoints(run)}
    found = {path: c for path, c in checkpoints.items() if c["precision"] == "int8"}
    if not found:
        raise UserError("this run has no int8 checkpoint; make one with: python quantize.py")
    first = min(checkpoint["provenance"]["seed"] for checkpoint in found.values())
    return {path: c for path, c in found.items() if c["provenance"]["seed"] == first}


def export_step(path: Path, folder: Path, args) -> Step:
    """The step of one checkpoint; its JSON of figures is the record."""
    arguments = {"images": args.images, "smoke": args.smoke}
    outputs = (folder / f"{path.stem}.tflite", *(folder / path.stem / name for name in C_NAMES))
    code = source_digests("export_edge.py", "firmware/*.[ch]")
    record = folder / f"{path.stem}.json"
    return Step(run_name(args), record, arguments, (path,), outputs, code, args.force)


def export(step: Step, checkpoint: dict, data: Split, test_set: str, args) -> None:
    """Make one checkpoint's files, hold them against PyTorch, write them."""
    name, few = step.record.stem, normalize(data[0][: args.images], dataset_of(checkpoint))
    content, figures = tflite_artifact(step.parents[0], checkpoint, data, args.images, test_set)
    files, c_figures = c_artifact(name, checkpoint, few)
    lineage = {key: checkpoint["provenance"][key] for key in LINEAGE}
    lineage["checkpoint_sha256"] = step.digests[step.parents[0].name]
    texts = (files[path.name].encode() for path in step.outputs[1:])
    contents = dict(zip(step.outputs, (content, *texts), strict=True))
    write_artifacts(step, contents, {**provenance(name, args, **lineage), **figures, **c_figures})


@user_errors_exit_2
def main():
    args = parse_arguments()
    run = run_name(args)
    folder = results_dir(run) / "edge"
    if not tflite_micro_installed():
        print("not measured: tflite-micro is missing; pip install -r firmware/requirements.txt")
        return
    checkpoints = int8_checkpoints(args, run)
    steps = {path: export_step(path, folder, args) for path in checkpoints}
    todo = [path for path, step in steps.items() if not step.kept()]
    judging = functools.cache(load_judging)
    for path in todo:
        data, test_set = judging(dataset_of(checkpoints[path]), args.data_dir)
        export(steps[path], checkpoints[path], data, test_set, args)


if __name__ == "__main__":
    main()
