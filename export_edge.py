"""Step 6: INT8 variants as artifacts that devices run, each checked before it is kept.

Reads   checkpoints/*_int8.pt (or the one given), data/ (test images: only to compare frozen files)
Writes  results/edge/<variant>.tflite  results/edge/<variant>.json (how they agree)
        results/edge/<variant>/: C that compiles by itself, `cc *.c && ./a.out picture.ppm`

    python export_edge.py
    python export_edge.py --run reference --images 10000    # the committed figures
    python export_edge.py --smoke           # seconds; reads checkpoints/smoke/

Under tflite-micro, each operator of a .tflite file has to give what exact integers give, to one LSB,
and the logits have to follow torch's; how often the class is torch's is reported. The C, compiled
here, has to give every logit of exact integers, bit for bit; how it agrees with torch's fbgemm and
QNNPACK kernels is reported.
"""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from edgecnn.checkpoint import (
    dataset_of,
    int8_checkpoints,
    load_checkpoint,
    of_lowest_seed,
    provenance,
)
from edgecnn.cli import (
    Parser,
    add_force_argument,
    add_run_arguments,
    positive_int,
    run_name,
)
from edgecnn.data import load_judging, normalize
from edgecnn.deploy.c_source import C_NAMES, agreement, c_files, host_compiler, host_parity
from edgecnn.deploy.integer import exact_logits
from edgecnn.deploy.parity import operator_differences
from edgecnn.deploy.tflite import operators, run_tflite, tflite_micro_installed, write_tflite
from edgecnn.errors import UserError, user_errors_exit_2
from edgecnn.names import EDGE, results_dir
from edgecnn.quantized import int8_module, integer_logits, quantize_images
from edgecnn.split import Split
from edgecnn.step import Step, source_digests

MIN_IMAGES = 25  # fewer would say nothing
IMAGES = 1000  # about 11 ms an image; all 10,000 for the committed figures
OPERATOR_IMAGES = 25  # on which every operator is held against exact integers
# How far logits may be from torch's on average: an LSB, or this share of what they vary by.
LOGITS_SHARE = 0.1
LINEAGE = ("method", "criterion", "seed", "parent")
C_ENGINES = ("fbgemm", "qnnpack")  # torch's kernels that the generated C is held against


# ---- parity ------------------------------------------------------------------------------------


def compare_logits(theirs: np.ndarray, ours: np.ndarray, labels: np.ndarray) -> dict:
    """How the logits (N, classes) of an artifact agree with PyTorch's, both int8 at the same scale."""
    predicted, expected = theirs.argmax(1), ours.argmax(1)  # the first of equals, as torch's argmax
    return {
        "parity_images": len(labels),
        "differing_images": int((predicted != expected).sum()),
        "agreement_percent": round(100 * float(np.mean(predicted == expected)), 4),
        "accuracy_percent": round(100 * float(np.mean(predicted == labels)), 4),
        "torch_accuracy_percent": round(100 * float(np.mean(expected == labels)), 4),
        "max_difference_lsb": int(np.abs(theirs.astype(int) - ours.astype(int)).max()),
    }


def require_parity(name: str, theirs: np.ndarray, ours: np.ndarray, operators: dict) -> None:
    """Raise UserError when a .tflite is not its checkpoint: logits as compare_logits takes them.

    operators: operator_differences. That few images get torch's very class proves nothing either way:
    where two logits are as good as equal, rounding decides.
    """
    if len(theirs) > 1 and (theirs == theirs[0]).all():
        raise UserError(f"{name} answers every image alike: its weights are empty or were not read")
    wrong = {node: found for node, (found, allowed) in operators.items() if found > allowed}
    for node, found in wrong.items():  # the first one; those behind it may be right
        raise UserError(
            f"{name} does not agree with exact integers: {node} is up to {found} LSB off; "
            "nothing was written for it"
        )
    error, spread = np.abs(theirs - ours.astype(float)).mean(), ours.std(axis=0).mean()
    if error > max(1, LOGITS_SHARE * spread):
        raise UserError(
            f"{name} does not agree with PyTorch: its logits are {error:.1f} LSB off on average, "
            f"and vary by {spread:.1f}; nothing was written for it"
        )


# ---- one variant -------------------------------------------------------------------------------


def tflite_artifact(
    name: str, checkpoint: dict, images: torch.Tensor, labels: torch.Tensor
) -> tuple[bytes, dict]:
    """(the .tflite file, its figures) of an int8 checkpoint. Raises UserError where it disagrees.

    images: normalized (N, C, H, W).
    """
    content, inputs = write_tflite(checkpoint, name), quantize_images(checkpoint, images)
    logits, arena_bytes = run_tflite(content, inputs)
    ours = integer_logits(int8_module(checkpoint), images).numpy()
    within = operator_differences(checkpoint, content, inputs[:OPERATOR_IMAGES])
    require_parity(f"{name}.tflite", logits, ours, within)
    exact = agreement(torch.from_numpy(logits), exact_logits(checkpoint, inputs))
    return content, {
        "tflite_sha256": hashlib.sha256(content).hexdigest(),
        "tflite_bytes": len(content),
        "tflite_operators": operators(content),
        "tflite_micro_version": version("tflite-micro"),
        "tflite_micro_arena_bytes": arena_bytes,
        "engine": checkpoint["quantization"]["engine"],
        "operators_max_difference_lsb": max(found for found, _ in within.values()),
        **compare_logits(logits, ours, labels.numpy()),
        **{f"tflite_vs_exact_integers_{key}": value for key, value in exact.items()},
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
        f"wrote {step.outputs[0]}, {step.outputs[1].parent}/ and {step.record.name}\n"
        f"  every operator within {result['operators_max_difference_lsb']} LSB of exact integers; "
        f"the class is torch's on {result['agreement_percent']:.2f} % of "
        f"{result['parity_images']:,} images, "
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


def chosen(args, run: str) -> dict[Path, dict]:
    """The checkpoints to export, all of them checked before the first takes its time."""
    if args.checkpoint:
        return {args.checkpoint: load_checkpoint(args.checkpoint, "int8")}
    return of_lowest_seed(int8_checkpoints(run))


def export_step(path: Path, folder: Path, args) -> Step:
    """The step of one checkpoint; its JSON of figures is the record."""
    arguments = {"images": args.images, "smoke": args.smoke}
    outputs = (folder / f"{path.stem}.tflite", *(folder / path.stem / name for name in C_NAMES))
    code = source_digests("export_edge.py", "firmware/*.[ch]")
    record = folder / f"{path.stem}.json"
    return Step(run_name(args), record, arguments, (path,), outputs, code, args.force)


def export(step: Step, checkpoint: dict, data: Split, test_set: str, args) -> None:
    """Make one checkpoint's files, hold them against PyTorch, write them."""
    name, labels = step.record.stem, data[1][: args.images]
    images = normalize(data[0][: args.images], dataset_of(checkpoint))
    content, figures = tflite_artifact(name, checkpoint, images, labels)
    files, c_figures = c_artifact(name, checkpoint, images)
    figures["test_set"] = test_set
    lineage = {key: checkpoint["provenance"][key] for key in LINEAGE}
    lineage["checkpoint_sha256"] = step.digests[step.parents[0].name]
    texts = (files[path.name].encode() for path in step.outputs[1:])
    contents = dict(zip(step.outputs, (content, *texts), strict=True))
    write_artifacts(step, contents, {**provenance(name, args, **lineage), **figures, **c_figures})


@user_errors_exit_2
def main():
    args = parse_arguments()
    run = run_name(args)
    folder = results_dir(run) / EDGE
    if not tflite_micro_installed():
        print("not measured: tflite-micro is missing; pip install -r firmware/requirements.txt")
        return
    checkpoints = chosen(args, run)
    steps = {path: export_step(path, folder, args) for path in checkpoints}
    todo = [path for path, step in steps.items() if not step.kept()]
    judging = functools.cache(load_judging)
    failed = []
    if todo:
        host_compiler()  # its absence would show after minutes, of each variant
    for path in todo:
        data, test_set = judging(dataset_of(checkpoints[path]), args.data_dir)
        try:
            export(steps[path], checkpoints[path], data, test_set, args)
        except UserError as error:  # the variants behind it may be sound
            failed.append(str(error))
    if failed:
        raise UserError("; ".join(dict.fromkeys(failed)))


if __name__ == "__main__":
    main()
