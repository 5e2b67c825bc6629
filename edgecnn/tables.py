"""Markdown tables of a run's metrics.json: pure text, one table a question, at most seven columns.

Modelled figures keep the two digits that their bands leave; memories are in KiB of 1,024 bytes.
"""

import statistics

from edgecnn.cells import (
    ENERGY,
    KIB,
    NOT_MEASURED,
    band,
    change,
    columns,
    energy,
    interval,
    key,
    markdown_table,
    per_seed,
    scaled,
)
from edgecnn.compare import crossing, group, lowest_seed_rows
from edgecnn.hardware import PICOJOULES_A_CYCLE, stm32l4r5_energy_uj
from edgecnn.names import NAME_PATTERN, TEST_SET, is_pruned
from edgecnn.peers import CMSIS_NN, ORIGINAL, RESNET8

BAND_NOTE = (
    "Low, modelled and high energy of a clock cycle: {_low}, {middle} and {_high} pJ.".format(
        middle=PICOJOULES_A_CYCLE[""], **PICOJOULES_A_CYCLE
    )
)
ALWAYS_SHOWN = ("baseline", "control", "pruned_50")  # the methods that every table names
INTERPRETER_ACCURACY = "tflite_micro_accuracy_percent"
# Against ResNet-8, each axis once: its name, the key, a unit, decimals, whether more is better.
AXES = (
    ("Accuracy %, measured (ResNet-8: as published)", "accuracy_percent", 1, 2, True),
    ("Accuracy %, tflite-micro, measured", INTERPRETER_ACCURACY, 1, 2, True),
    (".tflite file, KiB", "tflite_bytes", KIB, 1, False),
    ("MACs of dense kernels, M, counted", "macs", 1e6, 2, False),
    ("Non-zero MACs, M, counted (ResNet-8: all)", "macs_nonzero", 1e6, 2, False),
    ("tflite-micro arena, KiB, measured", "tflite_micro_arena_bytes", KIB, 1, False),
    ("Ethos-U55-128 cycles, thousand, modelled", "u55_128_cycles_modelled", 1e3, 0, False),
    ("Ethos-U55-128 flash, KiB, modelled", "u55_128_flash_bytes_modelled", KIB, 1, False),
    ("Ethos-U55-128 SRAM, KiB, modelled", "u55_128_sram_bytes_modelled", KIB, 1, False),
    ("Cortex-M4 instructions, M, counted", "m4_instructions", 1e6, 2, False),
    ("Cortex-M4 flash, KiB, linked", "m4_flash_bytes", KIB, 1, False),
    ("Cortex-M4 RAM, KiB, linked and stack", "m4_ram_bytes", KIB, 1, False),
    ("STM32L4R5 energy, µJ, modelled (low-high)", ENERGY.format(""), 1, None, False),
    ("STM32L4R5 energy, µJ, measured", "stm32l4r5_energy_measured_uj", 1, 0, False),
)
# Against the table that this project started from: what, the key, a unit, decimals.
ORIGINAL_AXES = (
    ("Accuracy %", "accuracy_percent", 1, 2),
    ("File, KiB", "size_bytes", KIB, 0),
    ("Non-zero MACs, M", "macs_nonzero", 1e6, 2),
    ("Energy score", "relative_energy", 1, 2),
)


# ---- one table a question ----------------------------------------------------------------------


def is_always_shown(variant: str) -> bool:
    """Whether it is one of ALWAYS_SHOWN, of whatever seed."""
    match = NAME_PATTERN.fullmatch(variant)
    return match is not None and match["method"] in ALWAYS_SHOWN


def shown(rows: list[dict]) -> list[dict]:
    """Of the lowest seed: the variants always shown, and those that no other dominates."""
    rows = lowest_seed_rows(rows)
    return [row for row in rows if is_always_shown(row["variant"]) or not row.get("dominated_by")]


def with_figures(rows: list[dict], *beginnings: str) -> list[dict]:
    """The rows that have a figure under a key that begins so."""
    return [r for r in rows if any(k.startswith(beginnings) and r[k] is not None for k in r)]


def deployed(rows: list[dict]) -> list[dict]:
    """The lowest seed's linked INT8 programs: the dense one, and the pruned front.

    The dense one is the baseline; in a run whose baseline is another run's, the control.
    """
    linked = [r for r in lowest_seed_rows(rows) if r.get("m4_flash_bytes") is not None]
    linked = [row for row in linked if row["precision"] == "int8"]
    methods = {row["method"] for row in linked}
    dense = "baseline" if "baseline" in methods else "control"
    return [
        row
        for row in linked
        if row["method"] == dense or (is_pruned(row["method"]) and not row["dominated_by"])
    ]


def main_table(rows: list[dict]) -> str:
    """What most readers want to know: accuracy, memories, work, energy."""
    parts = {
        "Accuracy % (95 % interval)": lambda r: f"{r['accuracy_percent']:.2f} ({interval(r)})",
        "Flash, KiB": key("m4_flash_bytes", KIB, 1),
        "RAM, KiB": key("m4_ram_bytes", KIB, 1),
        "Non-zero MACs, M": key("macs_nonzero", 1e6, 2),
        "Energy, µJ, modelled (low-high)": energy,
    }
    if deployed(rows):
        return columns(deployed(rows), parts)
    del parts["Energy, µJ, modelled (low-high)"]
    parts = {what: text for what, text in parts.items() if "KiB" not in what} | {
        "Weights, KiB, modelled": key("weight_stored_bytes", KIB, 1),
        "Activations, KiB, modelled": key("activations_peak_bytes", KIB, 1),
        "45 nm energy, µJ, modelled": key("energy_sram_uj", 1, None),
    }
    return columns(shown(rows), parts)


def accuracy_table(rows: list[dict]) -> str:
    """How right, how surely, and against what."""
    return columns(
        rows,
        {
            "Accuracy %": key("accuracy_percent", 1, 2),
            "95 % interval": interval,
            "Parent": lambda r: "-" if change(r, "parent") == "-" else r["parent"],
            "Against parent, points": lambda r: change(r, "parent"),
            "Against control": lambda r: change(r, "control"),
            "Against FP32 baseline": lambda r: change(r, "baseline"),
        },
    )


def cost_table(rows: list[dict]) -> str:
    """Bytes, multiplications and the energy score, and which variant is better in all three."""
    return columns(
        rows,
        {
            "Zeros %": key("sparsity_percent", 1, 1),
            "File, KiB": key("size_bytes", KIB, 1),
            "MACs, M": key("macs", 1e6, 2),
            "Non-zero MACs, M": key("macs_nonzero", 1e6, 2),
            "Energy score": key("relative_energy", 1, 2),
            "Dominated by": lambda row: row.get("dominated_by") or "no",
        },
    )


def energy_table(rows: list[dict]) -> str:
    """Where the modelled energy of a 45 nm chip goes, and what memory makes of it."""
    names = {
        "Arithmetic": "arithmetic",
        "Activations": "activations",
        "Weights in SRAM": "weights_sram",
        "Total": "sram",
        "Weights in DRAM": "weights_dram",
        "Total, DRAM": "dram",
    }
    parts = {f"{what}, µJ": key(f"energy_{name}_uj", 1, None) for what, name in names.items()}
    return columns(with_figures(rows, "energy_"), parts)


def on_all_images(row: dict) -> bool:
    """Whether the interpreter ran on all test images, as far as the row tells."""
    return row.get("tflite_micro_images") in (None, row.get("test_images"))


def interpreter_accuracy(row: dict) -> str:
    """Percent under tflite-micro and, where it ran on a part of the test images, on how many."""
    text = scaled(row, INTERPRETER_ACCURACY, 1, 2)
    return text if on_all_images(row) else f"{text} of {row['tflite_micro_images']:,}"


def npu_table(rows: list[dict]) -> str:
    """The .tflite file under the interpreter, measured, and on the NPU, modelled by Vela."""
    return columns(
        with_figures(rows, "tflite_", "u55_"),
        {
            "Accuracy %, tflite-micro": interpreter_accuracy,
            ".tflite, KiB": key("tflite_bytes", KIB, 1),
            "Arena, KiB": key("tflite_micro_arena_bytes", KIB, 1),
            "Ethos-U55-128 cycles, thousand": key("u55_128_cycles_modelled", 1e3),
            "its flash, KiB": key("u55_128_flash_bytes_modelled", KIB, 1),
            "its SRAM, KiB": key("u55_128_sram_bytes_modelled", KIB, 1),
        },
    )


def cortex_m_table(rows: list[dict]) -> str:
    """The C program on an emulated Cortex-M4: counted and linked; cycles and energy modelled."""
    fits = {True: "yes", False: "no", None: NOT_MEASURED}
    table = columns(
        with_figures(rows, "m4_"),
        {
            "Instructions, M, counted": key("m4_instructions", 1e6, 2),
            "Flash, KiB": key("m4_flash_bytes", KIB, 1),
            "RAM, KiB": key("m4_ram_bytes", KIB, 1),
            "Cycles, M, modelled (low-high)": lambda row: band(row, "m4_cycles_modelled{}", 1e6),
            "STM32L4R5, µJ, modelled (low-high)": energy,
            "Fits STM32F405": lambda row: fits[row.get("stm32f405_fits")],
        },
    )
    return table and f"{table}\n\n{BAND_NOTE}"


def better_axes(row: dict) -> list[bool]:
    """On which of AXES a variant beats ResNet-8; what was not measured beats nothing.

    Nor does the interpreter's accuracy on a part of the images: the peer's is of all.
    """
    peer = RESNET8 | stm32l4r5_energy_uj(RESNET8)
    if not on_all_images(row):
        row = row | {INTERPRETER_ACCURACY: None}
    return [
        row.get(name) is not None and (row[name] > peer[name] if more else row[name] < peer[name])
        for _, name, _, _, more in AXES
    ]


def resnet8_table(rows: list[dict]) -> str:
    """ResNet-8 axis by axis beside the dense INT8 network and the two sparsest; bold where better.

    Empty where the accuracy is not that of the test set, or nothing is linked.
    """
    rows = [row for row in deployed(rows) if row.get("test_set") == TEST_SET]
    dense = [row for row in rows if not is_pruned(row["method"])]
    pruned = [row for row in rows if is_pruned(row["method"])]
    ours = [*dense, *sorted(pruned, key=lambda row: -row["macs_nonzero"])[-2:]]
    better = [better_axes(row) for row in ours]
    lines = []
    for i, (what, name, unit, decimals, _) in enumerate(AXES):

        def text(row, name=name, unit=unit, decimals=decimals):
            if name == INTERPRETER_ACCURACY:
                return interpreter_accuracy(row)
            return energy(row) if decimals is None else scaled(row, name, unit, decimals)

        cells = [f"**{text(r)}**" if b[i] else text(r) for r, b in zip(ours, better, strict=True)]
        lines.append([what, text(RESNET8 | stm32l4r5_energy_uj(RESNET8)), *cells])
    return markdown_table(["", "ResNet-8", *(r["variant"] for r in ours)], lines) if ours else ""


def original_table(rows: list[dict]) -> str:
    """The original table's three rows beside ours; empty where one is missing or no test set."""
    ours = {r["variant"]: r for r in lowest_seed_rows(rows) if r.get("test_set") == TEST_SET}
    if not ORIGINAL.keys() <= ours.keys():
        return ""
    header = [
        "",
        *(f"{o['name']}, {whose}" for o in ORIGINAL.values() for whose in ("original", "ours")),
    ]
    lines = [
        [what, *(scaled(r, *axis) for v, theirs in ORIGINAL.items() for r in (theirs, ours[v]))]
        for what, *axis in ORIGINAL_AXES
    ]
    return markdown_table(header, lines)


def seeds_table(rows: list[dict]) -> str:
    """Mean and spread of every variant that was run with two seeds or more; empty without one."""
    groups = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    lines = []
    for name, runs in groups.items():
        accuracies = [run["accuracy_percent"] for run in runs]
        if len(runs) > 1:
            lines.append(
                [
                    name,
                    str(len(runs)),
                    f"{statistics.mean(accuracies):.2f}",
                    f"{statistics.stdev(accuracies):.2f}",
                    f"{min(accuracies):.2f}-{max(accuracies):.2f}",
                    per_seed(runs, "parent"),
                    per_seed(runs, "control"),
                ]
            )
    header = ["Variant", "Seeds", "Mean accuracy %", "Standard deviation", "Range %"]
    header += ["Against parent, a seed", "Against control, a seed"]
    return markdown_table(header, lines) if lines else ""


def lead_table(rows: list[dict], break_even: list[dict]) -> str:
    """How much of the lead over ResNet-8 on a Cortex-M4 is network, kernels, zeros, in instructions.

    Empty without linked pruned variants or the dense kernels' count at no zeros.
    """
    pruned = [row for row in deployed(rows) if row["method"].startswith("pruned")]
    start = next((row for row in break_even if row["zeros_percent"] == 0), None)
    if not pruned or start is None:
        return ""
    dense = {name: start[f"m4_dense_{name}"] for name in ("instructions", "flash_bytes")}
    dense = {f"m4_{name}": value for name, value in dense.items()}
    steps = [("ResNet-8", "CMSIS-NN", RESNET8, None, "")]
    if all(pruned[0].get(key) == CMSIS_NN[key] for key in ("macs", "weights")):
        steps += [("the network, dense", "CMSIS-NN", CMSIS_NN, RESNET8, "network")]
        steps += [("the network, dense", "ours", dense, CMSIS_NN, "kernels")]
    else:  # of no other network is its count in CMSIS-NN known
        steps += [("the network, dense", "ours", dense, RESNET8, "network, kernels")]
    for row in sorted(pruned, key=lambda row: -row["macs_nonzero"])[-2:]:
        steps.append((row["variant"], "ours", row, dense, "zeros"))
    lines = [
        [
            what,
            kernels,
            scaled(row, "m4_instructions", 1e6, 2),
            scaled(row, "m4_flash_bytes", KIB, 1),
            f"{before['m4_instructions'] / row['m4_instructions']:.1f}" if before else "-",
            by or "-",
        ]
        for what, kernels, row, before, by in steps
    ]
    header = ["", "Kernels", "Instructions, M, counted", "Flash, KiB", "Times fewer", "by"]
    return markdown_table(header, lines)


def break_even_table(rows: list[dict]) -> str:
    """Dense against sparse kernels at rising shares of zeros, and where the sparse ones overtake."""
    if not rows:
        return ""
    parts = (
        ("m4_dense_instructions", 1e6, 2),
        ("m4_sparse_instructions", 1e6, 2),
        ("m4_dense_flash_bytes", KIB, 1),
        ("m4_sparse_flash_bytes", KIB, 1),
        ("u55_128_cycles_modelled", 1e3, 0),
        ("u55_128_flash_bytes_modelled", KIB, 1),
    )
    header = ["Zeros %", "Instructions, M, dense", "sparse", "Flash, KiB, dense", "sparse"]
    header += ["Ethos-U55-128 cycles, thousand", "its flash, KiB"]
    lines = [[f"{r['zeros_percent']:g}", *(scaled(r, *part) for part in parts)] for r in rows]
    zeros = [row["zeros_percent"] for row in rows]
    points = []
    for what in ("instructions", "flash_bytes"):
        lines_of = [[row[f"m4_{kind}_{what}"] for row in rows] for kind in ("dense", "sparse")]
        even = crossing(zeros, *lines_of)
        points.append("never" if even is None else f"from {even:.0f} % zeros")
    note = f"Sparse kernels need fewer instructions {points[0]}, less flash {points[1]}."
    return f"{markdown_table(header, lines)}\n\n{note}"


# ---- all of them -------------------------------------------------------------------------------

VARIANT_TABLES = {
    "accuracy": accuracy_table,
    "cost": cost_table,
    "energy": energy_table,
    "npu": npu_table,
    "cortex_m": cortex_m_table,
}
TITLES = {
    "main": "Variants at a glance",
    "accuracy": "Accuracy",
    "cost": "Size, multiplications, energy score",
    "energy": "Energy an inference in 45 nm, modelled",
    "npu": "Interpreter (measured) and NPU (modelled)",
    "cortex_m": "Cortex-M4 (counted) and STM32L4R5 (modelled)",
    "resnet8": "Against MLPerf Tiny's ResNet-8 INT8; bold: ours is better",
    "original": "The original table's rows beside ours",
    "seeds": "Over seeds",
    "lead": "Where the lead over ResNet-8 comes from",
    "break_even": "Where zeros start to pay",
}
SHORT = ("main", "accuracy", "cost", "resnet8")  # of table.md


def blocks(rows: list[dict], break_even: list[dict], everything: bool = False) -> dict[str, str]:
    """Every table that a run has, by name; of variants those of `shown`, or with `everything` all."""
    chosen = rows if everything else shown(rows)
    hidden = len(lowest_seed_rows(rows)) - len(shown(rows))
    note = f"\n\n{hidden} more, dominated, in `table_all.md`." if hidden and not everything else ""
    found = {"main": main_table(rows)}
    found |= {name: table(chosen) for name, table in VARIANT_TABLES.items()}
    found |= {name: found[name] + note for name in ("accuracy", "cost")}
    found |= {"resnet8": resnet8_table(rows), "original": original_table(rows)}
    found |= {"seeds": seeds_table(rows), "lead": lead_table(rows, break_even)}
    found |= {"break_even": break_even_table(break_even)}
    return {name: text for name, text in found.items() if text}


def page(tables: dict[str, str], names=tuple(TITLES)) -> str:
    """Some tables under their titles: the text of table.md and table_all.md."""
    parts = [f"### {TITLES[name]}\n\n{tables[name]}" for name in names if name in tables]
    return "\n\n".join(parts) + "\n"
