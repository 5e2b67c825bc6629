"""Step 4: the tables: accuracy on the test images, bytes, MACs, energy of every variant.

Reads   checkpoints/*.pt (or the files given), the test images, results/hardware.json
        results/metrics.json: variants whose checkpoints are on another machine stay as measured,
        but with --force
Writes  results/metrics.json (with hardware.json's figures of the very same checkpoints)
        results/table.md (the short tables)  results/table_all.md (every variant)
        results/layers.json (where weights, MACs and energy sit in each)

    python evaluate.py
    python evaluate.py --docs                                    # joins and renders, measures nothing
    python evaluate.py --budget flash_kib=512 ram_kib=64         # the best variant that fits
    python evaluate.py --budget board=stm32f405 accuracy=85      # reads metrics.json, at once
    python evaluate.py --run headline resnet8 --budget board=stm32f405    # the best of all runs
    python evaluate.py --run headline resnet8 --docs    # their front: results/front/headline_resnet8.md
    python evaluate.py --inspect checkpoints/pruned_50_int8.pt   # what a saved file holds
    python evaluate.py --smoke                                   # seconds, on the small sample
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgecnn.budget import HELP, answer, parse_budget
from edgecnn.cli import Parser, add_force_argument, add_run_arguments, run_names
from edgecnn.compare import compare, sort_key, wilson_interval_percent
from edgecnn.docs import NEEDED, TABLES, joined_files, render, table_files
from edgecnn.errors import UserError, user_errors_exit_2
from edgecnn.files import elsewhere, json_bytes, read_rows, read_table, rows_before, sha256
from edgecnn.front import read_runs
from edgecnn.hardware import read_hardware
from edgecnn.names import command, results_dir
from edgecnn.records import LAYER
from edgecnn.step import Step, results_step, source_digests
from edgecnn.tables import accuracy_table, cost_table

# What a row that stays is compared by, besides docs.NEEDED.
LINEAGE = dict.fromkeys(("test_set", "test_images", "parent", "parent_sha256", "checkpoint_sha256"))

# What needs torch is imported where it is used: --budget and --docs have to answer at once.
if TYPE_CHECKING:
    import torch

    from edgecnn.data import Split


# ---- one variant -------------------------------------------------------------------------------


def energy_columns(energy, digits: int) -> dict:
    """Microjoules of an EnergyReport or one of its layers, by purpose and memory."""
    sram, dram = energy.energy_uj("sram"), energy.energy_uj("dram")
    return {
        "energy_arithmetic_uj": round(sram.arithmetic, digits),
        "energy_weights_sram_uj": round(sram.weights, digits),
        "energy_weights_dram_uj": round(dram.weights, digits),
        "energy_activations_uj": round(sram.activations, digits),
    }


def layer_rows(path: Path) -> list[dict]:
    """A flat row of layers.json for each layer with MACs: where weights, MACs and energy sit."""
    from edgecnn.checkpoint import load_checkpoint
    from edgecnn.inspection import counted

    rows = []
    for priced in counted(load_checkpoint(path))[1].layers:
        layer = priced.count
        rows.append(
            {
                "variant": path.stem,
                "layer": layer.name,
                "parameters": layer.parameters,
                "zeros_percent": round(layer.zeros_percent, 3),
                "stored_bytes": priced.stored_bytes,
                "macs": layer.macs,
                "macs_nonzero": layer.nonzero_macs,
                **energy_columns(priced, 5),
            }
        )
    return rows


def evaluate_checkpoint(
    path: Path, data: Split, seen: dict, device: torch.device
) -> tuple[dict, list[bool]]:
    """(one flat row of metrics.json, which images are right, in their order).

    seen: what the row says of the images. Raises UserError when the file is not a usable checkpoint.
    """
    import torch

    from edgecnn.checkpoint import COMMIT, dataset_of, load_checkpoint
    from edgecnn.inspection import counted
    from edgecnn.train import predict
    from mac_hooks import energy_score

    checkpoint = load_checkpoint(path)
    origin, precision = checkpoint["provenance"], checkpoint["precision"]
    dataset = dataset_of(checkpoint)
    model, energy = counted(checkpoint)
    report = energy.macs
    if precision == "int8":
        device = torch.device("cpu")  # torch's integer kernels are CPU kernels
    images, labels = data
    hits = (predict(model.to(device), images, dataset, device) == labels).tolist()
    correct = sum(hits)
    low, high = wilson_interval_percent(correct, len(labels))
    bits = {"fp32": 32, "int8": 8}[precision]
    row = {
        "variant": path.stem,
        "method": origin["method"],
        "criterion": origin["criterion"],
        "seed": origin["seed"],
        "precision": precision,
        "bits": bits,
        **seen,
        "correct_images": correct,
        "accuracy_percent": round(100 * correct / len(labels), 4),
        "accuracy_ci95_low_percent": round(low, 3),
        "accuracy_ci95_high_percent": round(high, 3),
        "size_bytes": path.stat().st_size,
        "parameters": report.parameters,
        "weights": report.weights,
        "weights_nonzero": report.nonzero_weights,
        "sparsity_percent": round(report.zeros_percent, 4),
        "macs": report.macs,
        "macs_nonzero": report.nonzero_macs,
        "relative_energy": round(energy_score(report.nonzero_macs, bits), 4),
        "relative_energy_dense": round(energy_score(report.macs, bits), 4),
        **energy_columns(energy, 4),
        "energy_sram_uj": round(energy.energy_uj("sram").total, 4),
        "energy_dram_uj": round(energy.energy_uj("dram").total, 4),
        "weight_stored_bytes": energy.stored_bytes,
        "activations_peak_bytes": energy.peak_activations * bits // 8,
        "epochs": origin["arguments"].get("epochs"),
        "parent": origin["parent"],
        "checkpoint": str(path),
        "checkpoint_sha256": sha256(path),
        "parent_sha256": origin.get("parent_sha256"),
        "arguments": " ".join(f"{k}={v}" for k, v in origin["arguments"].items()),
        "trained_torch_version": origin["torch_version"],
        "trained_commit": origin["commit"],
        "trained_date_utc": origin["date_utc"],
        "evaluated_torch_version": str(torch.__version__),
        "evaluated_commit": COMMIT,
    }
    return row, hits


# ---- the step ----------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        type=Path,
        help="files to evaluate: prints their tables and writes nothing "
        "(default: every .pt in the run's checkpoint folder)",
    )
    parser.add_argument(
        "--inspect", type=Path, metavar="FILE", help="describe one checkpoint and stop"
    )
    parser.add_argument(
        "--budget",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help=f"name the best variant of metrics.json within limits, exit code 1 if none fits: {HELP}",
    )
    parser.add_argument(
        "--docs",
        action="store_true",
        help="measure nothing: join hardware.json into metrics.json again, write the tables, and "
        "refresh the generated tables of README.md and docs/; of several runs write the joint front",
    )
    parser.add_argument(
        "--holdout",
        action="store_true",
        help="the validation images instead of the test set, in the folders named holdout/ unless "
        "--run names them",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="cpu",
        help="where FP32 variants run; INT8 always runs on the CPU (default: %(default)s)",
    )
    add_force_argument(parser)
    add_run_arguments(parser, several="--budget and --docs take them all together")
    args = parser.parse_args()
    if sum(map(bool, (args.checkpoints, args.inspect, args.budget, args.docs))) > 1:
        parser.error("give one of --budget, --docs, --inspect and files")
    return args


def pick(runs: list[str], words: list[str]) -> None:
    """Answer --budget from the runs' metrics.json. Exits with 1 when no variant fits."""
    limits = parse_budget(words)
    there = sorted(path.parent.name for path in results_dir().glob("*/metrics.json"))
    for metrics in (results_dir(run) / "metrics.json" for run in runs):
        if there and not metrics.exists():
            known = " or ".join(there)
            made_by = command("evaluate", metrics.parent)
            raise UserError(f"{metrics} is missing; run: {made_by}, or give --run {known}")
    fits, text = answer(read_runs(runs, {"size_bytes": (1, 1e15)}), limits)
    print(text)
    if not fits:
        sys.exit(1)


def measure(paths: list[Path], args, before: list[dict] = ()) -> list[dict]:
    """The rows of metrics.json, in the tables' order: `before` are those of the last one.

    Raises UserError before any work.
    """
    from edgecnn.checkpoint import dataset_of, load_checkpoint, require_unseen_holdout
    from edgecnn.data import load_judging
    from edgecnn.split import fingerprint
    from edgecnn.train import pick_device

    twice = [path for path in paths if [p.stem for p in paths].count(path.stem) > 1]
    if twice:
        raise UserError(f"{' and '.join(map(str, twice))} have one name; evaluate them one by one")
    datasets = []
    for path in paths:  # every file is checked before minutes are spent on the first
        checkpoint = load_checkpoint(path)
        require_unseen_holdout(checkpoint, args.holdout and not args.smoke)
        datasets.append(dataset_of(checkpoint))
    other = next((p for p, d in zip(paths, datasets, strict=True) if d != datasets[0]), None)
    if other:
        raise UserError(
            f"{other} was trained on other data or another input shape than {paths[0]}; move one of "
            "them to a run of its own"
        )
    device = pick_device(args.device)
    data, test_set = load_judging(datasets[0], args.data_dir, args.holdout)
    seen = {"test_set": test_set, "test_images": len(data[1]), "test_sha256": fingerprint(data)}
    rows, hits = elsewhere(before, {path.stem: sha256(path) for path in paths}), {}
    other = [row["variant"] for row in rows if {**seen, **row} != {**row, **seen}]
    if other:
        raise UserError(
            f"{', '.join(other)} of metrics.json saw other images, and the checkpoints are not here: "
            "copy them here, or give --force to do without them"
        )
    for row in rows:
        print(f"{row['variant']}: {row['accuracy_percent']:.2f} %, as measured where its file is")
    for path in paths:
        row, hits[path.stem] = evaluate_checkpoint(path, data, seen, device)
        rows.append(row)
        print(f"{path.stem}: {row['accuracy_percent']:.2f} % of {len(data[1]):,} images")
    return sorted(compare(rows, hits, before), key=sort_key)


def evaluate_step(args, folder: Path, paths: list[Path]) -> Step:
    """The step that writes metrics.json, the tables and layers.json of these checkpoints."""
    from edgecnn.checkpoint import dataset_of, load_checkpoint
    from edgecnn.data import picture_digests

    arguments = {"holdout": args.holdout, "smoke": args.smoke}
    parents = [*paths, *joined_files(folder)]
    outputs, code = (*TABLES, "layers.json"), source_digests("evaluate.py")
    step = results_step(folder, "evaluate", code, arguments, parents, outputs, args.force)
    for path in paths[:1]:  # a run has one data set
        source = dataset_of(load_checkpoint(path)).source
        step.pictures = picture_digests(source, "train" if args.holdout else "test")
    return step


@user_errors_exit_2
def main():
    args = parse_arguments()
    runs = run_names(args, several=bool(args.budget or args.docs))
    if args.budget:
        return pick(runs, args.budget)
    if args.docs:
        return render(runs)
    folder = results_dir(runs[0])
    from edgecnn.checkpoint import find_checkpoints
    from edgecnn.inspection import inspection

    if args.inspect:
        return print(inspection(args.inspect))
    paths = args.checkpoints or find_checkpoints(runs[0], or_figures=not args.force)
    if args.checkpoints:
        rows = measure(paths, args)
        return print(f"\n{accuracy_table(rows)}\n\n{cost_table(rows)}")
    step = evaluate_step(args, folder, paths)
    if not step.kept():
        before, layers = [], []
        if not args.force:
            before = rows_before(folder / "metrics.json", read_rows, NEEDED | LINEAGE)
            layers = rows_before(folder / "layers.json", read_table, "", LAYER)
        hardware = read_hardware(folder)
        rows = measure(paths, args, before)
        contents = table_files(folder, rows, hardware)
        stay = {row["variant"] for row in rows} - {path.stem for path in paths}
        layers = [row for row in layers if row["variant"] in stay]
        layers += [row for path in paths for row in layer_rows(path)]
        contents["layers.json"] = json_bytes(layers)
        step.commit({folder / name: content for name, content in contents.items()})
    print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
