"""Step 4: the table: accuracy on the 10,000 test images, bytes, MACs, energy score of every variant.

Reads   checkpoints/*.pt (or the files given), data/ (the CIFAR-10 test set: read here and only here)
Writes  results/metrics.json  results/table.md

    python evaluate.py
    python evaluate.py --inspect checkpoints/pruned_50_int8.pt   # what a saved file holds
    python evaluate.py --run reference --update-readme           # rewrites the README's table
    python evaluate.py --smoke                                   # seconds, on the small sample
"""

import math
import statistics
from pathlib import Path

import torch

from edgecnn.checkpoint import (
    COMMIT,
    fp32_model,
    load_checkpoint,
    require_unseen_holdout,
    sha256,
)
from edgecnn.cli import Parser, add_run_arguments, run_name
from edgecnn.data import Split, load_sample, load_split, load_training
from edgecnn.files import (
    DEFAULT_CRITERION,
    REPOSITORY,
    UserError,
    checkpoints_dir,
    read_json,
    require_writable,
    results_dir,
    user_errors_exit_2,
    variant_name,
    write_json,
    write_text,
)
from edgecnn.model import IMAGE_SHAPE, fold_batch_norm
from edgecnn.packing import storage_bytes
from edgecnn.train import pick_device, predict
from mac_hooks import count_macs, energy_score
from quantize import int8_model

MIB = 2**20
Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
README_MARKERS = "<!-- table: begin (evaluate.py --update-readme) -->", "<!-- table: end -->"
README = REPOSITORY / "README.md"
TEST_SET = "CIFAR-10 test set"
METHOD_ORDER = ("baseline", "control", "pruned")


# ---- one variant -------------------------------------------------------------------------------


def wilson_interval_percent(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion, in percent (Wilson 1927, JASA 22:209-212)."""
    p, z2 = correct / total, Z_95**2
    center = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return 100 * (center - half), 100 * (center + half)


def evaluate_checkpoint(path: Path, data: Split, test_set: str, device: torch.device) -> dict:
    """One flat row of metrics.json. Raises UserError when the file is not a usable checkpoint."""
    checkpoint = load_checkpoint(path)
    origin, precision = checkpoint["provenance"], checkpoint["precision"]
    if precision == "int8":
        counted = model = int8_model(checkpoint)
        device = torch.device("cpu")  # torch's integer kernels are CPU kernels
    else:
        model = fp32_model(checkpoint)
        counted = fold_batch_norm(model)  # as deployed: BN is part of the convolutions
    report = count_macs(counted, IMAGE_SHAPE)
    images, labels = data
    correct = int((predict(model.to(device), images, device) == labels).sum())
    low, high = wilson_interval_percent(correct, len(labels))
    bits = {"fp32": 32, "int8": 8}[precision]
    weights = [t for t in checkpoint["tensors"].values() if t.ndim > 1]
    weight_count = sum(t.numel() for t in weights)
    nonzero = sum(int(t.count_nonzero()) for t in weights)
    return {
        "variant": path.stem,
        "method": origin["method"],
        "criterion": origin["criterion"],
        "seed": origin["seed"],
        "precision": precision,
        "bits": bits,
        "test_set": test_set,
        "test_images": len(labels),
        "correct_images": correct,
        "accuracy_percent": round(100 * correct / len(labels), 4),
        "accuracy_ci95_low_percent": round(low, 3),
        "accuracy_ci95_high_percent": round(high, 3),
        "size_bytes": path.stat().st_size,
        **storage_bytes(checkpoint["tensors"]),
        "parameters": report.parameters,
        "weights": weight_count,
        "weights_nonzero": nonzero,
        "sparsity_percent": round(100 * (1 - nonzero / weight_count), 4),
        "macs": report.macs,
        "macs_nonzero": report.nonzero_macs,
        "relative_energy": round(energy_score(report.nonzero_macs, bits), 4),
        "relative_energy_dense": round(energy_score(report.macs, bits), 4),
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


# ---- rows side by side -------------------------------------------------------------------------


def dominates(a: dict, b: dict) -> bool:
    """Whether `a` is at least as good as `b` in accuracy, bytes and energy score, and better in one."""
    gains = [
        a["accuracy_percent"] - b["accuracy_percent"],
        b["size_bytes"] - a["size_bytes"],
        b["relative_energy"] - a["relative_energy"],
    ]
    return min(gains) >= 0 and max(gains) > 0


def group(row: dict) -> str:
    """The variant's name without its seed."""
    return row["variant"].replace(f"_seed{row['seed']}_", "_")


def difference(row: dict, other: dict | None) -> float | None:
    """Accuracy of `row` above `other`'s, in points; None without the other."""
    return other and round(row["accuracy_percent"] - other["accuracy_percent"], 4)


def per_seed(runs: list[dict], key: str) -> str:
    """A signed figure of every run, or a dash where one lacks it."""
    values = [run[key] for run in runs]
    return "-" if None in values else " ".join(f"{value:+.2f}" for value in values)


def compare(rows: list[dict]) -> list[dict]:
    """Rows with what needs the others: change against the parent, dominance, statistics over seeds.

    Raises UserError when two rows have one name.
    """
    by_name = {row["variant"]: row for row in rows}
    if len(by_name) < len(rows):
        raise UserError("two files of one name stand for the same variant; give one of them")
    compared = []
    for row in rows:
        parent = by_name.get(row["parent"])
        if parent is not None and parent["checkpoint_sha256"] != row["parent_sha256"]:
            parent = None  # the parent was trained again since: a difference would mean nothing
        # The same fine-tuning without pruning is what a pruned variant has to be held against.
        control = by_name.get(variant_name("control", row["precision"], seed=row["seed"]))
        control = control if row["method"].startswith("pruned") else None
        better = [other for other in rows if other["seed"] == row["seed"] and dominates(other, row)]
        runs = [other["accuracy_percent"] for other in rows if group(other) == group(row)]
        compared.append(
            {
                **row,
                "accuracy_change_points": difference(row, parent),
                "accuracy_change_vs_control_points": difference(row, control),
                "dominated_by": max(better, key=lambda r: r["accuracy_percent"])["variant"]
                if better
                else None,
                "seeds": len(runs),
                "accuracy_mean_percent": round(statistics.mean(runs), 4),
                "accuracy_std_points": round(statistics.stdev(runs), 4) if len(runs) > 1 else None,
            }
        )
    return compared


def sort_key(row: dict):
    """Baseline, controls, then pruned variants by percent; the default criterion first; by seed."""
    family, _, percent = row["method"].partition("_")
    order = METHOD_ORDER.index(family) if family in METHOD_ORDER else len(METHOD_ORDER)
    sparsity = float(percent) if percent.replace(".", "", 1).isdecimal() else 0.0
    criterion = "" if row["criterion"] == DEFAULT_CRITERION else row["criterion"] or ""
    return order, sparsity, criterion, group(row), row["seed"]


# ---- showing -----------------------------------------------------------------------------------


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, aligned so that it reads in a terminal too; the first column is text."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def render(cells):
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(f"{'-' * (w + 1)}{'-' if i == 0 else ':'}" for i, w in enumerate(widths))
    return "\n".join([render(header), f"|{rule}|", *map(render, lines)])


def variant_table(rows: list[dict]) -> str:
    """The main table: one line a variant of the lowest seed."""
    first = min(row["seed"] for row in rows)
    lines = [
        [
            row["variant"],
            f"{row['accuracy_percent']:.2f}",
            f"{row['accuracy_ci95_low_percent']:.1f}-{row['accuracy_ci95_high_percent']:.1f}",
            "-"
            if row["accuracy_change_points"] is None
            else f"{row['accuracy_change_points']:+.2f} ({row['parent']})",
            f"{row['size_bytes']:,}",
            f"{row['size_bytes'] / MIB:.2f}",
            f"{row['macs'] / 1e6:.2f}",
            f"{row['macs_nonzero'] / 1e6:.2f}",
            f"{row['sparsity_percent']:.1f}",
            f"{row['relative_energy']:.2f}",
            row["dominated_by"] or "no",
        ]
        for row in rows
        if row["seed"] == first
    ]
    header = (
        "Variant;Accuracy %;95 % interval;Change, points (against);File bytes;File MB;MACs M;"
        "Non-zero MACs M;Zeros %;Relative energy;Dominated by"
    ).split(";")
    return markdown_table(header, lines)


def seed_table(rows: list[dict]) -> str:
    """Mean and spread of every variant that was run with two seeds or more; empty without one."""
    groups = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    lines = []
    for name, runs in groups.items():
        if len(runs) < 2:
            continue
        accuracies = [run["accuracy_percent"] for run in runs]
        lines.append(
            [
                name,
                str(len(runs)),
                f"{runs[0]['accuracy_mean_percent']:.2f}",
                f"{runs[0]['accuracy_std_points']:.2f}",
                f"{min(accuracies):.2f}-{max(accuracies):.2f}",
                per_seed(runs, "accuracy_change_points"),
                per_seed(runs, "accuracy_change_vs_control_points"),
                f"{statistics.mean(run['macs_nonzero'] for run in runs) / 1e6:.2f}",
            ]
        )
    header = (
        "Variant;Seeds;Mean accuracy %;Standard deviation, points;Range %;"
        "Against parent, a seed;Against control, a seed;Non-zero MACs M (mean)"
    ).split(";")
    return markdown_table(header, lines) if lines else ""


def tables(rows: list[dict]) -> str:
    """table.md and the README's block: the variants and, with several seeds, their statistics."""
    return "\n\n".join(filter(None, [variant_table(rows), seed_table(rows)])) + "\n"


def readme_with(readme: str, block: str) -> str:
    """The README's text with the block between its two markers replaced.

    Raises UserError when a marker is missing.
    """
    begin, end = README_MARKERS
    if [readme.count(begin), readme.count(end)] != [1, 1] or readme.index(begin) > readme.index(
        end
    ):
        raise UserError(
            f"README.md needs the lines `{begin}` and `{end}`, once each; put them back"
        )
    head, tail = readme.split(begin)[0], readme.split(end)[1]
    return f"{head}{begin}\n{block}{end}{tail}"


def inspection(path: Path) -> str:
    """What a checkpoint is, how it was made, and its tensors with shape, dtype, zeros and bytes."""
    checkpoint = load_checkpoint(path)
    stored = storage_bytes(checkpoint["tensors"])
    origin = [f"  {key:<14} {value}" for key, value in checkpoint["provenance"].items()]
    lines = [
        [
            name,
            "x".join(map(str, tensor.shape)) or "scalar",
            str(tensor.dtype).removeprefix("torch."),
            f"{100 * (1 - int(tensor.count_nonzero()) / tensor.numel()):.1f}",
            *(f"{size:,}" for size in storage_bytes({name: tensor}).values()),
        ]
        for name, tensor in checkpoint["tensors"].items()
    ]
    header = ["Tensor", "Shape", "dtype", "Zeros %", "Raw B", "Non-zeros + bitmap B", "Coded B"]
    total = ["total", "", "", "", *(f"{size:,}" for size in stored.values())]
    return "\n".join(
        [
            f"{path}: {checkpoint['precision']} {checkpoint['architecture']}, "
            f"{path.stat().st_size:,} bytes, SHA-256 {sha256(path)}",
            *origin,
            "",
            markdown_table(header, [*lines, total]),
        ]
    )


# ---- the step ----------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        type=Path,
        help="files to evaluate: prints their table and writes nothing "
        "(default: every .pt in the run's checkpoint folder)",
    )
    parser.add_argument(
        "--inspect", type=Path, metavar="FILE", help="describe one checkpoint and stop"
    )
    parser.add_argument(
        "--update-readme",
        action="store_true",
        help="also put the table between the README's two markers",
    )
    parser.add_argument(
        "--holdout",
        action="store_true",
        help="the 5,000 validation images instead of the test set, in the folders named holdout/",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="cpu",
        help="where FP32 variants run; INT8 always runs on the CPU (default: %(default)s)",
    )
    add_run_arguments(parser)
    return parser.parse_args()


def find_checkpoints(run: str) -> list[Path]:
    """Every finished checkpoint of a run; raises UserError when there is none."""
    folder = checkpoints_dir(run)
    paths = [path for path in sorted(folder.glob("*.pt")) if not path.stem.endswith(".resume")]
    paths = [path for path in paths if not path.name.startswith(".")]  # a killed run's leftovers
    if not paths:
        raise UserError(f"no checkpoint in {folder}; make one with: python train_baseline.py")
    return paths


def load_images(args) -> tuple[Split, str]:
    """The images that judge, and what they are."""
    if args.smoke:
        return load_sample()[1], "held-out part of the smoke sample (training images)"
    if args.holdout:
        return load_training(args.data_dir, holdout=True, smoke=False)[1], "validation split"
    return load_split("test", args.data_dir), TEST_SET


def require_complete(paths: list[Path], metrics: Path) -> None:
    """Raise UserError where writing `metrics` would lose a variant whose checkpoint is not here."""
    if not metrics.exists():
        return
    names = {path.stem for path in paths}
    lost = [
        r["variant"] for r in read_json(metrics, "python evaluate.py") if r["variant"] not in names
    ]
    if lost:
        raise UserError(
            f"{metrics} has {', '.join(lost)}, whose checkpoints are not here: make them again, "
            f"or delete {metrics.name} to do without them"
        )


def readme_to_update(args) -> str | None:
    """The README's text with --update-readme, checked before any work; raises UserError."""
    if not args.update_readme:
        return None
    if args.smoke or args.holdout or args.checkpoints:
        raise UserError("--update-readme takes a whole run on the test set, nothing else")
    try:
        readme = README.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {README.name}: {error.strerror}") from None
    readme_with(readme, "")
    return readme


@user_errors_exit_2
def main():
    args = parse_arguments()
    if args.inspect:
        print(inspection(args.inspect))
        return
    run = run_name(args)
    metrics, table = results_dir(run) / "metrics.json", results_dir(run) / "table.md"
    readme = readme_to_update(args)
    paths = args.checkpoints or find_checkpoints(run)
    if not args.checkpoints:
        require_complete(paths, metrics)
        require_writable(results_dir(run))
    for path in paths:  # every file is checked before minutes are spent on the first
        require_unseen_holdout(load_checkpoint(path), args.holdout and not args.smoke)
    device = pick_device(args.device)
    data, test_set = load_images(args)
    rows = []
    for path in paths:
        rows.append(evaluate_checkpoint(path, data, test_set, device))
        print(f"{path.stem}: {rows[-1]['accuracy_percent']:.2f} % of {len(data[1]):,} images")
    rows = sorted(compare(rows), key=sort_key)
    print(f"\n{tables(rows)}")
    if args.checkpoints:
        return
    write_json(metrics, rows)
    write_text(table, tables(rows))
    if readme is not None:
        write_text(README, readme_with(readme, tables(rows)))
    print(f"wrote {metrics} and {table}")


if __name__ == "__main__":
    main()
