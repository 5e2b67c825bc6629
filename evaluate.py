"""Step 4: the table: accuracy on the 10,000 test images, bytes, MACs, energy score of every variant.

Reads   checkpoints/*.pt (or the files given), data/ (the CIFAR-10 test set), results/hardware.json
Writes  results/metrics.json  results/table.md (headline and front)  results/table_all.md (all)
        results/layers.json (where weights, MACs and energy sit in each)

    python evaluate.py
    python evaluate.py --budget flash_kb=512 ram_kb=64           # the best variant that fits
    python evaluate.py --budget board=stm32f405 accuracy=85      # reads metrics.json, at once
    python evaluate.py --inspect checkpoints/pruned_50_int8.pt   # what a saved file holds
    python evaluate.py --run reference --update-readme           # rewrites the README's table
    python evaluate.py --smoke                                   # seconds, on the small sample
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgecnn.budget import HELP, answer, parse_budget
from edgecnn.cli import Parser, add_run_arguments, data_source, run_name
from edgecnn.files import (
    DEFAULT_CRITERION,
    MADE_BY,
    REPOSITORY,
    UserError,
    checkpoints_dir,
    is_headline,
    lowest_seed_rows,
    read_json,
    read_rows,
    require_writable,
    results_dir,
    user_errors_exit_2,
    variant_name,
    write_json,
    write_text,
)
from edgecnn.peers import ORIGINAL, RESNET8

# What needs torch is imported where it is used: --budget has to answer at once.
if TYPE_CHECKING:
    import torch

    from edgecnn.data import Split

MIB = 2**20
Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
README = REPOSITORY / "README.md"
TEST_SET = "CIFAR-10 test set"
# simulate_hardware.py's keys begin so; checkpoints never have them.
HARDWARE_KEYS = (
    "hardware_",
    "m4_",
    "m7_",
    "ethos_",
    "u55_",
    "u65_",
    "u85_",
    "stm32l4r5_",
    "stm32f405_",
    "tflite_",
)
METHOD_ORDER = ("baseline", "control", "pruned")
CHANGE_KEYS = {
    "parent": "accuracy_change_points",
    "control": "accuracy_change_vs_control_points",
    "baseline": "accuracy_change_vs_baseline_points",
}
# Against the peer: what, our key, the peer's key, the unit, digits, and whether more is better.
PEER_AXES = (
    ("Accuracy %, peer's as published", "accuracy_percent", "accuracy_percent", 1, 2, True),
    (
        "by tflite-micro, peer's as published",
        "tflite_micro_accuracy_percent",
        "accuracy_percent",
        1,
        2,
        True,
    ),
    ("Non-zero MACs M, of the peer all", "macs_nonzero", "macs", 1e6, 2, False),
    *(
        (what, key, key, unit, digits, False)
        for what, key, unit, digits in (
            ("Ethos-U55-128 cycles, modelled", "u55_128_cycles_modelled", 1, 0),
            ("its flash KiB, modelled", "u55_128_flash_bytes_modelled", 1024, 1),
            ("its SRAM KiB, modelled", "u55_128_sram_bytes_modelled", 1024, 1),
        )
    ),
    *(
        (what, key, "stm32l4r5_energy_measured_uj", 1, 0, False)
        for what, key in (
            ("STM32L4R5 energy uJ, modelled, peer's measured", "stm32l4r5_energy_modelled_uj"),
            ("the same, unkind end of our band", "stm32l4r5_energy_modelled_high_uj"),
        )
    ),
)
# Against the original table: what, its key, our key, the unit.
ORIGINAL_COLUMNS = (
    ("accuracy %", "accuracy_percent", "accuracy_percent", 1),
    ("size MB", "size_mb", "size_bytes", MIB),
    ("non-zero MACs M", "macs_m", "macs_nonzero", 1e6),
    ("relative energy", "relative_energy", "relative_energy", 1),
)
SIGNIFICANCE = 0.05  # of one comparison; the many are not corrected for
# Hypervolume: what a front gains over a dense FP32 network (4 bytes for each of 620,362 parameters,
# 10.848768 M MACs x 32 / 8) that guesses.
REFERENCE_POINT = {
    "accuracy_percent": 10.0,
    "size_bytes": 4 * 620_362,
    "relative_energy": 43.395072,
}


# ---- one variant -------------------------------------------------------------------------------


def wilson_interval_percent(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion, in percent (Wilson 1927, JASA 22:209-212)."""
    p, z2 = correct / total, Z_95**2
    center = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return 100 * (center - half), 100 * (center + half)


def counted(checkpoint: dict):
    """(the runnable network of a checkpoint, its MacReport as deployed: BN folded into convolutions)."""
    from edgecnn.checkpoint import fp32_model
    from edgecnn.model import IMAGE_SHAPE, fold_batch_norm
    from mac_hooks import count_macs
    from quantize import int8_model

    if checkpoint["precision"] == "int8":
        model = int8_model(checkpoint)
        return model, count_macs(model, IMAGE_SHAPE)
    model = fp32_model(checkpoint)
    return model, count_macs(fold_batch_norm(model), IMAGE_SHAPE)


def energy_columns(report, bits: int) -> dict:
    """What mac_hooks.py models of a network: microjoules by memory and purpose, bytes of memory."""
    sram, dram = report.energy_uj("sram"), report.energy_uj("dram")
    extrapolated = report.stm32l4r5_extrapolated_uj()
    return {
        "energy_arithmetic_uj": round(sram.arithmetic, 4),
        "energy_weights_sram_uj": round(sram.weights, 4),
        "energy_weights_dram_uj": round(dram.weights, 4),
        "energy_activations_uj": round(sram.activations, 4),
        "energy_sram_uj": round(sram.total, 4),
        "energy_dram_uj": round(dram.total, 4),
        "energy_stm32l4r5_extrapolated_uj": extrapolated and round(extrapolated, 1),
        "weight_stored_bytes": sum(layer.stored_bytes for layer in report.layers),
        "activations_peak_bytes": report.peak_activations * bits // 8,
    }


def layer_rows(path: Path) -> list[dict]:
    """A flat row of layers.json for each layer with MACs: where weights, MACs and energy sit."""
    from edgecnn.checkpoint import load_checkpoint

    rows = []
    for layer in counted(load_checkpoint(path))[1].layers:
        sram, dram = layer.energy_uj("sram"), layer.energy_uj("dram")
        zeros = 1 - layer.nonzero_parameters / layer.parameters
        rows.append(
            {
                "variant": path.stem,
                "layer": layer.name.removesuffix(".conv"),
                "parameters": layer.parameters,
                "zeros_percent": round(100 * zeros, 3),
                "stored_bytes": layer.stored_bytes,
                "macs": layer.macs,
                "macs_nonzero": layer.nonzero_macs,
                "energy_arithmetic_uj": round(sram.arithmetic, 5),
                "energy_weights_sram_uj": round(sram.weights, 5),
                "energy_weights_dram_uj": round(dram.weights, 5),
                "energy_activations_uj": round(sram.activations, 5),
            }
        )
    return rows


def evaluate_checkpoint(
    path: Path, data: Split, test_set: str, device: torch.device
) -> tuple[dict, list[bool]]:
    """(one flat row of metrics.json, which images are right, in their order).

    Raises UserError when the file is not a usable checkpoint.
    """
    import torch

    from edgecnn.checkpoint import COMMIT, load_checkpoint, sha256
    from edgecnn.packing import storage_bytes
    from edgecnn.train import predict
    from mac_hooks import energy_score

    checkpoint = load_checkpoint(path)
    origin, precision = checkpoint["provenance"], checkpoint["precision"]
    model, report = counted(checkpoint)
    if precision == "int8":
        device = torch.device("cpu")  # torch's integer kernels are CPU kernels
    images, labels = data
    hits = (predict(model.to(device), images, device) == labels).tolist()
    correct = sum(hits)
    low, high = wilson_interval_percent(correct, len(labels))
    bits = {"fp32": 32, "int8": 8}[precision]
    weights = [t for t in checkpoint["tensors"].values() if t.ndim > 1]
    weight_count = sum(t.numel() for t in weights)
    nonzero = sum(int(t.count_nonzero()) for t in weights)
    row = {
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
        **energy_columns(report, bits),
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


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the images that one variant alone gets right.

    Without a difference each of the n = gained + lost images falls on either side with chance 1/2:
    p = 2 P(X <= min(gained, lost)), X binomial (n, 1/2), at most 1. McNemar 1947, Psychometrika
    12:153-157, with the exact binomial distribution.
    """
    n, tail, ways = gained + lost, 0, 1
    for k in range(min(gained, lost) + 1):
        tail += ways  # n choose k
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)  # integers up to the one division


def held_against(row: dict, other: dict | None, name: str, hits: dict[str, list[bool]]) -> dict:
    """What `row` gains and loses against `other` on the same images; None without the other."""
    gained = lost = p = None
    if other is not None:
        pairs = list(zip(hits[row["variant"]], hits[other["variant"]], strict=True))
        gained, lost = pairs.count((True, False)), pairs.count((False, True))
        p = mcnemar_p(gained, lost)
    return {
        CHANGE_KEYS[name]: difference(row, other),
        f"images_gained_vs_{name}": gained,
        f"images_lost_vs_{name}": lost,
        f"mcnemar_p_vs_{name}": p,
    }


def union_volume(corners: list[tuple[float, float, float]]) -> float:
    """Volume of the union of boxes from the origin to each corner; exact, corners at or below 0 add 0.

    Between the heights of two corners the cross-section is a union of rectangles: slice by slice.
    """
    corners = sorted((c for c in corners if min(c) > 0), key=lambda c: -c[2])
    volume = 0.0
    for i, (_, _, top) in enumerate(corners):
        bottom = corners[i + 1][2] if i + 1 < len(corners) else 0.0
        rectangles = sorted(((x, y) for x, y, _ in corners[: i + 1]), reverse=True)
        area = height = 0.0
        for j, (x, y) in enumerate(rectangles):
            height = max(height, y)
            left = rectangles[j + 1][0] if j + 1 < len(rectangles) else 0.0
            area += (x - left) * height
        volume += area * (top - bottom)
    return volume


def gains(row: dict) -> tuple[float, float, float]:
    """(points of accuracy, halvings of the bytes, halvings of the energy score) over the reference."""
    return (
        row["accuracy_percent"] - REFERENCE_POINT["accuracy_percent"],
        math.log2(REFERENCE_POINT["size_bytes"] / row["size_bytes"]),
        # A score that rounds to 0 counts as the last digit it is stored with.
        math.log2(REFERENCE_POINT["relative_energy"] / max(row["relative_energy"], 1e-4)),
    )


def equal_effort(row: dict, control: dict, by_name: dict[str, dict]) -> bool:
    """Whether a pruned variant was fine-tuned once, as long as its control and from the same weights.

    The same fine-tuning without pruning is what it has to be held against; later levels of a sweep
    took more.
    """
    fp32 = [v if v["precision"] == "fp32" else by_name.get(v["parent"]) for v in (row, control)]
    if not row["method"].startswith("pruned") or None in fp32:
        return False
    start, epochs = ([v.get(key) for v in fp32] for key in ("parent_sha256", "epochs"))
    return start[0] is not None and start[0] == start[1] and epochs[0] == epochs[1]


def compare(rows: list[dict], hits: dict[str, list[bool]]) -> list[dict]:
    """Rows with what needs the others: changes, dominance, the front's volume, statistics over seeds.

    hits: variant -> which images are right, in one order. Raises UserError when two rows have one
    name.
    """
    by_name = {row["variant"]: row for row in rows}
    if len(by_name) < len(rows):
        raise UserError("two files of one name stand for the same variant; give one of them")
    compared = []
    for row in rows:
        parent = by_name.get(row["parent"])
        if parent is not None and parent["checkpoint_sha256"] != row["parent_sha256"]:
            parent = None  # the parent was trained again since: a difference would mean nothing
        control = by_name.get(variant_name("control", row["precision"], seed=row["seed"]))
        control = control if control and equal_effort(row, control, by_name) else None
        baseline = by_name.get(variant_name("baseline", "fp32", seed=row["seed"]))
        baseline = baseline if baseline is not row else None
        rivals = [other for other in rows if other["seed"] == row["seed"]]
        better = [other for other in rivals if dominates(other, row)]
        runs = [other["accuracy_percent"] for other in rows if group(other) == group(row)]
        compared.append(
            {
                **row,
                **held_against(row, parent, "parent", hits),
                **held_against(row, control, "control", hits),
                **held_against(row, baseline, "baseline", hits),
                "dominated_by": max(better, key=lambda r: r["accuracy_percent"])["variant"]
                if better
                else None,
                "front_hypervolume": round(union_volume([gains(r) for r in rivals]), 3),
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


def signed(row: dict, name: str) -> str:
    """A change of accuracy, marked n.s. where McNemar's test does not tell it from none; or a dash."""
    change, p = row.get(CHANGE_KEYS[name]), row.get(f"mcnemar_p_vs_{name}")
    if change is None:
        return "-"
    return f"{change:+.2f}" + (" n.s." if p is not None and p >= SIGNIFICANCE else "")


def per_seed(runs: list[dict], name: str) -> str:
    """The change of every run, or a dash where one lacks it."""
    changes = [signed(run, name) for run in runs]
    return "-" if "-" in changes else ", ".join(changes)


def optional(row: dict, key: str) -> str:
    """A figure with two decimals, or a dash where the row was measured without it."""
    return "-" if row.get(key) is None else f"{row[key]:.2f}"


def variant_table(rows: list[dict]) -> str:
    """One line a variant."""
    lines = [
        [
            row["variant"],
            f"{row['accuracy_percent']:.2f}",
            f"{row['accuracy_ci95_low_percent']:.1f}-{row['accuracy_ci95_high_percent']:.1f}",
            "-"
            if row["accuracy_change_points"] is None
            else f"{signed(row, 'parent')} ({row['parent']})",
            signed(row, "baseline"),
            f"{row['size_bytes']:,}",
            f"{row['size_bytes'] / MIB:.2f}",
            f"{row['macs'] / 1e6:.2f}",
            f"{row['macs_nonzero'] / 1e6:.2f}",
            f"{row['sparsity_percent']:.1f}",
            f"{row['relative_energy']:.2f}",
            optional(row, "energy_sram_uj"),
            optional(row, "energy_dram_uj"),
            row["dominated_by"] or "no",
        ]
        for row in rows
    ]
    header = (
        "Variant;Accuracy %;95 % interval;Change, points (against);Against baseline FP32;File bytes;"
        "File MB;MACs M;Non-zero MACs M;Zeros %;Relative energy;Energy uJ, SRAM;Energy uJ, DRAM;"
        "Dominated by"
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
                per_seed(runs, "parent"),
                per_seed(runs, "control"),
                f"{statistics.mean(run['macs_nonzero'] for run in runs) / 1e6:.2f}",
            ]
        )
    header = (
        "Variant;Seeds;Mean accuracy %;Standard deviation, points;Range %;"
        "Against parent, a seed;Against control, a seed;Non-zero MACs M (mean)"
    ).split(";")
    return markdown_table(header, lines) if lines else ""


def front_note(rows: list[dict]) -> str:
    """The front's hypervolume, a seed; empty where the rows were measured without it."""
    volumes = {row["seed"]: row.get("front_hypervolume") for row in rows}
    if None in volumes.values():
        return ""
    seeds = [row["seed"] for row in rows]
    shown = ", ".join(
        f"{volume:.1f} (seed {seed}, {seeds.count(seed)} variants)"
        for seed, volume in sorted(volumes.items())
    )
    axes = "points x halvings of bytes x halvings of relative energy"
    return f"Dominated hypervolume of the front ({axes}): {shown}."


def with_hardware(rows: list[dict], hardware: list[dict]) -> list[dict]:
    """Rows with simulate_hardware.py's plain figures of the very same checkpoint as columns."""
    found = {row["checkpoint_sha256"]: row for row in hardware}
    plain = [
        {
            key: value
            for key, value in found.get(row.get("checkpoint_sha256"), {}).items()
            if key.startswith(HARDWARE_KEYS) and not isinstance(value, dict | list)
        }
        for row in rows
    ]
    ours = [{k: v for k, v in row.items() if not k.startswith(HARDWARE_KEYS)} for row in rows]
    return [row | figures for row, figures in zip(ours, plain, strict=True)]


def scaled(row: dict, key: str, unit: float = 1, digits: int = 0) -> str:
    """A figure in a unit, or "not measured" where the row is without it."""
    value = row.get(key)
    return "not measured" if value is None else f"{value / unit:,.{digits}f}"


def hardware_table(rows: list[dict]) -> str:
    """Targets, one line a variant that has a figure of one, and the peer; empty without figures."""
    shown = [row for row in rows if any(key.startswith(HARDWARE_KEYS) for key in row)]
    lines = []
    for row in shown:
        # A .tflite file is INT8: of an FP32 variant there is nothing to measure.
        absent = "-" if row.get("precision") == "fp32" else "not measured"
        accuracy = scaled(row, "tflite_micro_accuracy_percent", digits=2)
        if accuracy != "not measured":
            accuracy += f" of {row['tflite_micro_images']:,}"
        cells = [row["variant"], accuracy]
        cells += [scaled(row, "tflite_micro_arena_bytes"), scaled(row, "u55_128_cycles_modelled")]
        cells += [scaled(row, "u55_128_flash_bytes_modelled", 1024, 1)]
        cells += [scaled(row, "u55_128_sram_bytes_modelled", 1024, 1)]
        cells += [scaled(row, "m4_instructions", 1e6, 2), scaled(row, "m4_flash_bytes", 1e3, 1)]
        cells += [scaled(row, "m4_ram_bytes", 1e3, 1)]
        band = [f"stm32l4r5_energy_modelled{end}_uj" for end in ("", "_low", "_high")]
        energy, low, high = (scaled(row, key) for key in band)
        if "m4_flash_bytes" in row and energy == "not measured":
            energy = "does not fit"
        cells.append(f"{energy} ({low}-{high})" if energy[0].isdigit() else energy)
        cells.append({True: "yes", False: "no", None: "not measured"}[row.get("stm32f405_fits")])
        lines.append([absent if cell == "not measured" else cell for cell in cells])
    peer = [f"*{RESNET8['name']}*", f"{RESNET8['accuracy_percent']:.2f} published", "-"]
    peer += [scaled(RESNET8, "u55_128_cycles_modelled")]
    peer += [
        scaled(RESNET8, f"u55_128_{area}_bytes_modelled", 1024, 1) for area in ("flash", "sram")
    ]
    peer += ["-", "-", "-", f"{RESNET8['stm32l4r5_energy_measured_uj']:,} measured", "-"]
    header = (
        "Variant;Accuracy % of images, tflite-micro;Arena bytes;Ethos-U55-128 cycles, modelled;"
        "its flash KiB, modelled;its SRAM KiB, modelled;Cortex-M4 instructions M, counted;"
        "its flash kB;its RAM kB;STM32L4R5 energy uJ, modelled (low-high);Fits STM32F405"
    ).split(";")
    return markdown_table(header, [*lines, peer]) if lines else ""


def better_axes(row: dict) -> list[bool]:
    """On which of PEER_AXES a variant beats the peer; what was not measured beats nothing."""
    whole = row | (
        {}
        if row.get("tflite_micro_images") == row["test_images"]
        else {"tflite_micro_accuracy_percent": None}
    )
    return [
        whole.get(key) is not None
        and (whole[key] > RESNET8[theirs] if more else whole[key] < RESNET8[theirs])
        for _, key, theirs, _, _, more in PEER_AXES
    ]


def peer_table(rows: list[dict]) -> str:
    """INT8 variants with figures of a target, the peer, and on how many axes (bold) it is beaten.

    Empty without such a variant, or where accuracy is not that of the test set.
    """
    shown = [
        row
        for row in rows
        if row.get("precision") == "int8"
        and row.get("test_set") == TEST_SET
        and any(key.startswith(HARDWARE_KEYS) for key in row)
    ]
    lines = []
    for row in shown:
        better = better_axes(row)
        cells = [scaled(row, key, unit, digits) for _, key, _, unit, digits, _ in PEER_AXES]
        cells = [f"**{cell}**" if won else cell for cell, won in zip(cells, better, strict=True)]
        lines.append([row["variant"], *cells, f"{sum(better)} of {len(better)}"])
    peer = [scaled(RESNET8, theirs, unit, digits) for _, _, theirs, unit, digits, _ in PEER_AXES]
    header = ["Against ResNet-8", *(what for what, *_ in PEER_AXES), "Better on"]
    return markdown_table(header, [*lines, [f"*{RESNET8['name']}*", *peer, "-"]]) if lines else ""


def original_table(rows: list[dict]) -> str:
    """The original table's rows with ours beside them; empty where one is missing or no test set."""
    ours = {row["variant"]: row for row in rows if row.get("test_set") == TEST_SET}
    if not ORIGINAL.keys() <= ours.keys():
        return ""
    header = ["Row of the original table"]
    header += [f"{what}: {whose}" for what, *_ in ORIGINAL_COLUMNS for whose in ("its", "ours")]
    lines = []
    for variant, theirs in ORIGINAL.items():
        line = [theirs["name"]]
        for _, key, our_key, unit in ORIGINAL_COLUMNS:
            line += [scaled(theirs, key, 1, 2), scaled(ours[variant], our_key, unit, 2)]
        lines.append(line)
    return markdown_table(header, lines)


def all_tables(rows: list[dict]) -> str:
    """table_all.md: every variant of every seed, and every one with figures of a target."""
    return "\n\n".join(filter(None, [variant_table(rows), hardware_table(rows)])) + "\n"


def read_hardware(folder: Path) -> list[dict]:
    """The rows of the run's hardware.json, none without the file; raises UserError for other JSON."""
    path, made_by = folder / "hardware.json", "python simulate_hardware.py"
    rows = read_json(path, made_by) if path.exists() else []
    named = isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("checkpoint_sha256"), str) for row in rows
    )
    if not named:
        raise UserError(
            f"{path} is not a list of measured checkpoints; make it again with: {made_by}"
        )
    return rows


def write_tables(folder: Path, rows: list[dict], hardware: list[dict]) -> str:
    """Write metrics.json and both tables of the rows, with the targets' figures; the main table."""
    rows = with_hardware(rows, hardware)
    write_json(folder / "metrics.json", rows)
    write_text(folder / "table.md", tables(rows))
    write_text(folder / "table_all.md", all_tables(rows))
    return tables(rows)


def tables(rows: list[dict]) -> str:
    """table.md and the README's block: headline and front of the lowest seed, others' figures, seeds."""
    lowest = lowest_seed_rows(rows)
    shown = [row for row in lowest if is_headline(row["variant"]) or not row["dominated_by"]]
    hidden = len(lowest) - len(shown)
    note = f"{hidden} more, dominated, in `table_all.md`." if hidden else ""
    parts = [variant_table(shown), note, front_note(rows), hardware_table(shown)]
    parts += [peer_table(shown), original_table(lowest), seed_table(rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def readme_markers(run: str) -> tuple[str, str]:
    """The README's lines about the table of a run."""
    command = f"evaluate.py --run {run} --update-readme"
    return f"<!-- {run} table: begin ({command}) -->", f"<!-- {run} table: end -->"


def readme_with(readme: str, block: str, run: str) -> str:
    """The README's text with the block between the run's two markers replaced.

    Raises UserError when a marker is missing.
    """
    begin, end = readme_markers(run)
    if [readme.count(begin), readme.count(end)] != [1, 1] or readme.index(begin) > readme.index(
        end
    ):
        raise UserError(
            f"README.md needs the lines `{begin}` and `{end}`, once each; put them there"
        )
    head, tail = readme.split(begin)[0], readme.split(end)[1]
    return f"{head}{begin}\n{block}{end}{tail}"


def inspection(path: Path) -> str:
    """What a checkpoint is, how it was made, its tensors, and where MACs and energy sit."""
    from edgecnn.checkpoint import load_checkpoint, sha256
    from edgecnn.packing import storage_bytes

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
            "",
            counted(checkpoint)[1].energy_table(),
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
        "--budget",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help=f"name the best variant of metrics.json within limits, exit code 1 if none fits: {HELP}",
    )
    parser.add_argument(
        "--update-readme",
        action="store_true",
        help="also put the table between the README's two markers of this --run",
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
    from edgecnn.data import CIFAR10, load_test, load_training

    if args.smoke:
        held = load_training(data_source(args), args.data_dir, holdout=True)[2]
        return held, "held-out part of the smoke sample (training images)"
    if getattr(args, "holdout", False):
        return load_training(data_source(args), args.data_dir, holdout=True)[2], "validation split"
    return load_test(CIFAR10, args.data_dir), TEST_SET


def require_complete(paths: list[Path], metrics: Path) -> None:
    """Raise UserError where writing `metrics` would lose a variant whose checkpoint is not here."""
    if not metrics.exists():
        return
    names = {path.stem for path in paths}
    lost = [r["variant"] for r in read_json(metrics, MADE_BY) if r["variant"] not in names]
    if lost:
        raise UserError(
            f"{metrics} has {', '.join(lost)}, whose checkpoints are not here: make them again, "
            f"or delete {metrics.name} to do without them"
        )


def readme_to_update(args) -> str | None:
    """The README's text with --update-readme, checked before any work; raises UserError."""
    if not args.update_readme:
        return None
    if args.smoke or args.holdout or args.checkpoints or not args.run:
        raise UserError("--update-readme takes a whole --run on the test set, nothing else")
    try:
        readme = README.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {README.name}: {error.strerror}") from None
    readme_with(readme, "", args.run)
    return readme


def pick(args) -> None:
    """Answer --budget from the run's metrics.json. Exits with 1 when no variant fits."""
    if args.inspect or args.checkpoints or args.update_readme:
        raise UserError("--budget reads metrics.json and stops; give it with --run alone")
    limits = parse_budget(args.budget)
    rows = read_rows(results_dir(run_name(args)) / "metrics.json", {"size_bytes": (1, 1e15)})
    fits, text = answer(rows, limits)
    print(text)
    if not fits:
        sys.exit(1)


def measure(paths: list[Path], args) -> list[dict]:
    """The rows of metrics.json, in the tables' order. Raises UserError before any work."""
    from edgecnn.checkpoint import load_checkpoint, require_unseen_holdout
    from edgecnn.train import pick_device

    for path in paths:  # every file is checked before minutes are spent on the first
        require_unseen_holdout(load_checkpoint(path), args.holdout and not args.smoke)
    device = pick_device(args.device)
    data, test_set = load_images(args)
    rows, hits = [], {}
    for path in paths:
        row, hits[path.stem] = evaluate_checkpoint(path, data, test_set, device)
        rows.append(row)
        print(f"{path.stem}: {row['accuracy_percent']:.2f} % of {len(data[1]):,} images")
    return sorted(compare(rows, hits), key=sort_key)


@user_errors_exit_2
def main():
    args = parse_arguments()
    if args.budget:
        return pick(args)
    if args.inspect:
        print(inspection(args.inspect))
        return
    folder = results_dir(run_name(args))
    readme = readme_to_update(args)
    paths = args.checkpoints or find_checkpoints(run_name(args))
    if not args.checkpoints:
        require_complete(paths, folder / "metrics.json")
        require_writable(folder)
    hardware = read_hardware(folder)
    rows = measure(paths, args)
    if args.checkpoints:
        print(f"\n{variant_table(rows)}")
        return
    write_json(folder / "layers.json", [row for path in paths for row in layer_rows(path)])
    table = write_tables(folder, rows, hardware)
    print(f"\n{table}")
    if readme is not None:
        write_text(README, readme_with(readme, table, args.run))
    print(f"wrote metrics.json, table.md and table_all.md in {folder}")


if __name__ == "__main__":
    main()
