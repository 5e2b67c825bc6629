"""Step 7: what every variant costs on hardware: an interpreter, an NPU, a Cortex-M; none of it silicon.

Reads   checkpoints/*.pt, results/edge/<variant>.tflite and .json (export_edge.py), data/ (20 images)
Writes  results/hardware.json, whose figures evaluate.py joins to its tables

    python simulate_hardware.py                 # after export_edge.py
    python simulate_hardware.py --break-even    # where sparsity starts to pay: results/break_even.json
    python simulate_hardware.py --smoke         # seconds; reads checkpoints/smoke/

Counted: instructions, flash and RAM of the linked program in QEMU. Measured: the interpreter's arena.
Modelled: the NPU (by Arm's Vela) and cycles (keys with _modelled). What a missing tool would
have given is null, "not measured". Taken are the INT8 variants of the lowest seed, and what else
`export_edge.py --checkpoint` exported; a run has one network and one data set.
"""

from importlib.metadata import version
from pathlib import Path

import torch

from edgecnn.checkpoint import dataset_of, int8_checkpoints, of_lowest_seed
from edgecnn.cli import (
    Parser,
    add_force_argument,
    add_run_arguments,
    positive_int,
    run_name,
)
from edgecnn.data import load_judging, normalize
from edgecnn.deploy.c_source import host_logits
from edgecnn.deploy.cortex_m import (
    NotInstalled,
    NotMeasured,
    cortex_m_row,
    require_tools,
    tool_versions,
)
from edgecnn.deploy.ethos_u import ACCELERATOR, npu_cost, require_accelerator, vela_installed
from edgecnn.deploy.tflite import write_tflite
from edgecnn.errors import UserError, user_errors_exit_2
from edgecnn.files import elsewhere, json_bytes, read_record, read_table, rows_before, sha256
from edgecnn.names import EDGE, command, results_dir
from edgecnn.quantized import quantize_images, with_zeros
from edgecnn.step import COMMIT, Step, results_step, source_digests

IMAGES = 20  # on which the emulated processor's outputs are held against this machine's
ZEROS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the break-even picture
KEPT = {"variant": None, "checkpoint_sha256": None}  # of a row that stays
FROM_EXPORT = {
    "tflite_bytes": "tflite_bytes",
    "tflite_micro_arena_bytes": "tflite_micro_arena_bytes",
    "accuracy_percent": "tflite_micro_accuracy_percent",
    "parity_images": "tflite_micro_images",
}
OF_TFLITE = ("tflite_", "u55_")  # how the keys of its figures begin


# ---- one variant -------------------------------------------------------------------------------


def exported(folder: Path, name: str, digest: str) -> tuple[bytes | None, dict]:
    """(the .tflite file, its figures) that export_edge.py left of this very checkpoint.

    Without them None and nulls: not measured.
    """
    path, json_path = folder / f"{name}.tflite", folder / f"{name}.json"
    made_by = command("export_edge", folder.parent)
    if path.exists() and json_path.exists():
        keys = ("checkpoint_sha256", "tflite_sha256", *FROM_EXPORT)
        result = read_record(json_path, made_by, dict.fromkeys(keys))
        digests = [result[key] for key in ("checkpoint_sha256", "tflite_sha256")]
        if digests == [digest, sha256(path)]:
            return path.read_bytes(), {ours: result[key] for key, ours in FROM_EXPORT.items()}
    print(f"{name}: no current {path.name}; make it with: {made_by}")
    return None, dict.fromkeys(FROM_EXPORT.values())


def cortex_m(checkpoint: dict, images: torch.Tensor) -> dict:
    """cortex_m_row, its outputs checked on all images against the same C on this machine.

    images: normalized (N, C, H, W). Empty where the compiler or QEMU is missing or the program too
    large. Raises UserError where the outputs differ.
    """
    inputs = quantize_images(checkpoint, images)
    try:
        row = cortex_m_row(checkpoint, inputs)
    except NotMeasured as error:
        print(f"{checkpoint['provenance']['variant']}, Cortex-M: not measured: {error}")
        return {}
    if row.pop("m4_logits") != host_logits(checkpoint, inputs).tolist():
        raise UserError(
            "the emulated Cortex-M4 gives other logits than this machine; "
            "no figure of it can be trusted, check the compilers"
        )
    return row | {"m4_checked_images": len(inputs)}


def hardware_row(
    path: Path,
    checkpoint: dict,
    images: torch.Tensor,
    folder: Path,
    accelerator: str,
    before: list[dict],
) -> dict:
    """One row of hardware.json. Raises UserError where a tool fails.

    Without the .tflite its figures are those that a row `before` has of the same checkpoint.
    """
    digest = sha256(path)
    tflite, figures = exported(folder, path.stem, digest)
    row = {"variant": path.stem, "checkpoint_sha256": digest, "hardware_commit": COMMIT, **figures}
    if tflite and vela_installed():
        row |= npu_cost(tflite, accelerator)
    last = next((r for r in before if r["checkpoint_sha256"] == digest), {})
    if tflite is None and last.get("tflite_bytes") is not None:
        row |= {key: last[key] for key in last if key.startswith(OF_TFLITE)}
        print(f"{path.stem}: what was measured of that .tflite stays")
    return row | cortex_m(checkpoint, images)


# ---- where sparsity starts to pay --------------------------------------------------------------


def break_even_row(checkpoint: dict, share: float, images: torch.Tensor, accelerator: str) -> dict:
    """Costs of a network with the same share of zeros in every layer: for costs, not accuracy."""
    sparse = with_zeros(checkpoint, share)
    inputs = quantize_images(sparse, images[:1])
    row = {"zeros_percent": 100 * share, "hardware_commit": COMMIT}
    for storage in ("dense", "sparse"):
        found = cortex_m_row(sparse, inputs, storage)
        for key in ("m4_instructions", "m4_flash_bytes", "m4_cycles_modelled", "m7_instructions"):
            core, _, what = key.partition("_")
            row[f"{core}_{storage}_{what}"] = found[key]
    return row | npu_cost(write_tflite(sparse, "break_even"), accelerator)


def break_even(checkpoint: dict, images: torch.Tensor, accelerator: str) -> list[dict]:
    """The rows of break_even.json: none without the tools, and none of a program that is too large."""
    try:
        require_tools()
        if not vela_installed():
            raise NotInstalled(
                "ethos-u-vela not installed; pip install -r firmware/requirements.txt"
            )
    except NotInstalled as error:
        print(f"break-even: not measured: {error}")
        return []
    rows = []
    for share in ZEROS:
        try:
            rows.append(break_even_row(checkpoint, share, images, accelerator))
        except NotMeasured as error:  # with few zeros the sparse form is the larger one
            print(f"break-even at {share:.0%} zeros: not measured: {error}")
    return rows


# ---- the step ----------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--accelerator",
        default=ACCELERATOR,
        metavar="NAME",
        help="Ethos-U configuration that Vela models; the table shows the default alone (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--images",
        type=positive_int,
        default=IMAGES,
        help="images whose outputs are compared between the processors (default: %(default)s)",
    )
    parser.add_argument(
        "--break-even",
        action="store_true",
        help="instead, dense against sparse kernels at rising shares of zeros",
    )
    add_force_argument(parser)
    add_run_arguments(parser)
    return parser.parse_args()


def variants(run: str) -> dict[Path, dict]:
    """The INT8 checkpoints of the lowest seed, the dense baseline first, and of others what is
    exported; raises UserError."""
    found, edge = int8_checkpoints(run), results_dir(run) / EDGE
    first = of_lowest_seed(found)
    first = sorted(first.items(), key=lambda item: item[1]["provenance"]["method"] != "baseline")
    exported = {p: c for p, c in found.items() if (edge / f"{p.stem}.tflite").exists()}
    return dict(first) | exported


def tools() -> dict[str, str]:
    """The versions of what counts and models, of those that are here: figures depend on them."""
    found = {"ethos-u-vela": version("ethos-u-vela")} if vela_installed() else {}
    try:
        return found | tool_versions()
    except NotInstalled:
        return found


def hardware_step(args, folder: Path, paths: list[Path]) -> Step:
    """The step that writes hardware.json, or break_even.json of the first checkpoint."""
    name = "break_even" if args.break_even else "hardware"
    arguments = {key: getattr(args, key) for key in ("accelerator", "images", "smoke")}
    code = source_digests("simulate_hardware.py", "firmware/*.[chl]*") | tools()
    edge = [folder / EDGE / f"{path.stem}{kind}" for path in paths for kind in (".tflite", ".json")]
    parents = paths[:1] if args.break_even else [*paths, *(path for path in edge if path.exists())]
    # The record of the picture has the bare name.
    record = f"{name}_figures" if args.break_even else name
    return results_step(folder, record, code, arguments, parents, (f"{name}.json",), args.force)


@user_errors_exit_2
def main():
    args = parse_arguments()
    folder = results_dir(run_name(args))
    require_accelerator(args.accelerator)
    checkpoints = variants(run_name(args))
    paths = list(checkpoints)
    step = hardware_step(args, folder, paths)
    if step.kept():
        return
    dataset, rows, before = dataset_of(checkpoints[paths[0]]), [], []
    if not (args.break_even or args.force):  # what was measured of files that are not here stays
        before = rows_before(step.outputs[0], read_table, "", KEPT)
        rows = elsewhere(before, {path.stem: sha256(path) for path in paths})
    (images, _), _ = load_judging(dataset, args.data_dir)
    images = normalize(images[: args.images], dataset)
    if args.break_even:
        rows = break_even(checkpoints[paths[0]], images, args.accelerator)
    for path in [] if args.break_even else paths:
        parts = checkpoints[path], images, folder / EDGE, args.accelerator, before
        rows.append(hardware_row(path, *parts))
        if "m4_instructions" in rows[-1]:
            print(f"{path.stem}: {rows[-1]['m4_instructions'] / 1e6:.2f} M instructions")
    step.commit({step.outputs[0]: json_bytes(rows)})
    print(f"wrote {step.outputs[0]}")


if __name__ == "__main__":
    main()
