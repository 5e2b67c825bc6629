"""Tables: what a cell says, which rows and axes a table shows, seven columns, one unit for one thing."""

import json
import re

import pytest
from conftest import REPOSITORY, hits_of, row

from edgecnn.cells import ENERGY, change, markdown_table, per_seed, significant
from edgecnn.compare import compare
from edgecnn.errors import UserError
from edgecnn.front import front_table
from edgecnn.hardware import PICOJOULES_A_CYCLE, with_hardware
from edgecnn.names import TEST_SET
from edgecnn.peers import ORIGINAL, RESNET8
from edgecnn.tables import (
    AXES,
    TITLES,
    better_axes,
    blocks,
    lead_table,
    original_table,
    page,
    resnet8_table,
    shown,
)


def full_row(variant, accuracy, size_bytes, energy, **fields):
    more = dict.fromkeys(("macs", "macs_nonzero", "sparsity_percent"), 0)
    more |= {"accuracy_ci95_low_percent": 80.0, "accuracy_ci95_high_percent": 90.0}
    return row(variant, accuracy, size_bytes, energy, **more | fields)


def linked(variant="pruned_93_energy_int8", **changes):
    """A linked INT8 row that is better than ResNet-8 by a hair on every axis, but for `changes`."""
    better = {
        key: RESNET8[key] + (0.01 if up else -1)
        for _, key, *_, up in AXES
        if key in RESNET8 and not key.endswith("measured_uj")
    }
    made = full_row(variant, 0, 1000, 1.0, dominated_by=None, test_set=TEST_SET) | better
    made |= {"test_images": 10_000, "tflite_micro_images": 10_000, "stm32f405_fits": True}
    cycles = {f"m4_cycles_modelled{end}": 30e6 for end in PICOJOULES_A_CYCLE}
    return with_hardware([made], [made | cycles])[0] | changes


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


# ---- cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.7978, "0.80"),
        (3.5123, "3.5"),
        (9.96, "10"),
        (88.27, "88"),
        (1986.4, "2,000"),
        (14_351, "14,000"),
    ],
)
def test_modelled_figures_keep_two_digits(value, text):
    assert significant(value) == text


def test_differences_that_are_not_significant_are_marked():
    some = {"accuracy_change_points": 0.11, "mcnemar_p_vs_parent": 0.05}
    assert change(some, "parent") == "+0.11 n.s."
    assert change(some | {"mcnemar_p_vs_parent": 0.0499}, "parent") == "+0.11"
    assert change({"accuracy_change_points": 0.11}, "parent") == "+0.11"  # not tested, not marked
    assert change({"accuracy_change_points": None}, "parent") == change({}, "parent") == "-"
    assert per_seed([some, some | {"mcnemar_p_vs_parent": 0.01}], "parent") == "+0.11 n.s., +0.11"
    assert per_seed([some, {}], "parent") == "-"


def test_names_from_files_are_no_markup():
    table = markdown_table(["Variant", "b"], [["a|b <!-- c -->", "1"]])
    assert "a\\|b &lt;!-- c -->" in table and "<!--" not in table


# ---- which rows --------------------------------------------------------------------------------


def test_short_tables_show_what_is_always_shown_and_the_front_the_long_ones_all():
    rows = [
        full_row("baseline_fp32", 85.0, 2000, 40.0),
        full_row("pruned_50_fp32", 84.0, 2000, 40.0),  # dominated, always shown
        full_row("pruned_50_l1_fp32", 84.5, 2000, 40.0),  # dominated
        full_row("pruned_90_int8", 84.0, 100, 1.0, energy_sram_uj=12.25, energy_dram_uj=6.7),
        full_row("pruned_95_int8", 83.0, 200, 1.0),  # dominated
        full_row("baseline_seed1_fp32", 85.5, 2000, 40.0),
    ]
    rows = compare(rows, hits_of(rows))
    assert [r["variant"] for r in shown(rows)] == [
        "baseline_fp32",
        "pruned_50_fp32",
        "pruned_90_int8",
    ]
    short, whole = blocks(rows, []), blocks(rows, [], everything=True)
    assert set(short) == {"main", "accuracy", "cost", "energy", "seeds"}
    assert "2 more, dominated" in short["accuracy"] and "dominated, in" not in whole["accuracy"]
    assert [line[0] for line in cells(whole["cost"])[2:]] == [r["variant"] for r in rows]
    (energy,) = cells(short["energy"])[2:]  # of the one that has a figure
    assert energy[0] == "pruned_90_int8" and energy[4:] == ["12", "not measured", "6.7"]
    assert "baseline_fp32" in short["seeds"] and "0.35" in short["seeds"]


def test_the_main_table_is_of_linked_programs_where_there_are_any():
    rows = [
        linked("baseline_int8", method="baseline", dominated_by="pruned_93_energy_int8"),
        linked("control_int8", method="control"),
        linked(),
        linked("pruned_50_int8", dominated_by="baseline_int8"),
        linked("pruned_50_fp32", precision="fp32"),
    ]
    lines = cells(blocks(rows, [])["main"])
    assert [line[0] for line in lines[2:]] == ["baseline_int8", "pruned_93_energy_int8"]
    assert lines[0][2:4] == ["Flash, KiB", "RAM, KiB"]
    assert lines[3][2] == f"{(RESNET8['m4_flash_bytes'] - 1) / 1024:.1f}"


# ---- others' figures ---------------------------------------------------------------------------


def test_the_peer_is_beaten_axis_by_axis():
    # The last axis is the measured energy, of which we have none.
    assert better_axes(linked()) == [True] * (len(AXES) - 1) + [False]
    for i, (_, key, *_) in enumerate(AXES[:-1]):
        # Neither a tie nor "not measured" is a victory.
        for figure in (RESNET8.get(key, 1e9), None):
            changed = better_axes(linked(**{key: figure}))
            assert not changed[i] and sum(changed) == len(AXES) - 2


def test_a_part_of_the_images_beats_no_accuracy_of_all_of_them():
    part = linked("baseline_int8", method="baseline", tflite_micro_images=1000)
    won = dict(zip((key for _, key, *_ in AXES), better_axes(part), strict=True))
    assert not won["tflite_micro_accuracy_percent"] and won["accuracy_percent"]
    line = next(line for line in cells(resnet8_table([part])) if "tflite-micro, m" in line[0])
    assert line[-1] == f"{part['tflite_micro_accuracy_percent']:.2f} of 1,000"


def test_the_peers_table_has_each_axis_once_and_marks_what_is_better():
    rows = [linked("baseline_int8", method="baseline", tflite_bytes=629_968), linked()]
    rows += [linked("pruned_95_int8", macs_nonzero=1), linked("pruned_80_int8", macs_nonzero=9e9)]
    lines = cells(resnet8_table(rows))
    assert lines[0] == ["", "ResNet-8", "baseline_int8", "pruned_93_energy_int8", "pruned_95_int8"]
    assert [line[0] for line in lines[2:]] == [what for what, *_ in AXES]
    assert len({key for _, key, *_ in AXES}) == len(AXES)
    by_name = {line[0]: line[1:] for line in lines[2:]}
    assert by_name[".tflite file, KiB"][:2] == ["96.2", "615.2"]  # a loss is no bold figure
    assert by_name["Cortex-M4 instructions, M, counted"][0] == "29.87"
    assert by_name["STM32L4R5 energy, µJ, measured"] == ["5,496", *["not measured"] * 3]
    assert resnet8_table([r | {"test_set": "validation split"} for r in rows]) == ""


def test_the_dense_network_of_a_run_without_a_baseline_is_its_control():
    rows = [linked(f"{name}_int8", method=name) for name in ("control", "pruned_93_energy")]
    assert cells(resnet8_table(rows))[0][2:] == ["control_int8", "pruned_93_energy_int8"]
    rows.append(linked("baseline_int8", method="baseline"))
    assert cells(resnet8_table(rows))[0][2:] == ["baseline_int8", "pruned_93_energy_int8"]


def test_the_original_table_stands_beside_ours_axis_by_axis():
    ours = {
        "test_set": TEST_SET,
        "accuracy_percent": 85.0,
        "size_bytes": 2**20,
        "macs_nonzero": 5e6,
        "relative_energy": 7,
    }
    rows = [ours | {"variant": variant} for variant in ORIGINAL]
    lines = cells(original_table(rows))
    assert [line[5:] for line in lines[2:]] == [
        ["80.74", "85.00"],
        ["1,219", "1,024"],
        ["5.42", "5.00"],
        ["21.70", "7.00"],
    ]
    assert original_table(rows[1:]) == ""
    assert original_table([r | {"test_set": "validation split"} for r in rows]) == ""


def test_the_lead_is_split_into_network_kernels_and_zeros():
    start = {"zeros_percent": 0.0, "m4_dense_instructions": 8e6, "m4_dense_flash_bytes": 1024}
    row = linked(m4_instructions=4e6, macs=10_848_768, weights=619_872)
    lines = cells(lead_table([row], [start]))[2:]
    assert [line[4:] for line in lines] == [
        ["-", "-"],
        ["1.3", "network"],
        ["2.8", "kernels"],
        ["2.0", "zeros"],
    ]
    for other in ({"macs": 5e6}, {"weights": 78_000}):  # whose count in CMSIS-NN nobody has taken
        lines = cells(lead_table([row | other], [start]))[2:]
        assert [line[1:2] + line[4:] for line in lines] == [
            ["CMSIS-NN", "-", "-"],
            ["ours", "3.7", "network, kernels"],
            ["ours", "2.0", "zeros"],
        ]
    assert lead_table([linked()], []) == ""


# ---- every table of the committed runs ---------------------------------------------------------


@pytest.mark.parametrize("run", ["reference", "headline"])
def test_tables_have_seven_columns_and_one_unit_for_one_thing(run):
    folder = REPOSITORY / "results" / run
    rows = json.loads((folder / "metrics.json").read_text())
    break_even = json.loads((folder / "break_even.json").read_text())
    found = blocks(rows, break_even, everything=True)
    assert found.keys() >= TITLES.keys() - {"seeds"} and found.keys() <= TITLES.keys()
    for table in found.values():
        assert len(cells(table)[0]) <= 7
        assert not re.search(r"\bkB\b|\bKB\b|\bMB\b|\buJ\b|\bmJ\b", table)
    assert page(found).count("### ") == len(found)


# ---- the joint front ---------------------------------------------------------------------------


def joined(name, accuracy, flash, energy, **more):
    """A linked row of a joint table: `run/variant`, its costs as given and alike otherwise."""
    costs = {"m4_flash_bytes": flash, ENERGY.format(""): energy, "m4_ram_bytes": 1, **more}
    made = linked(**{"accuracy_percent": accuracy, "macs_nonzero": 1e6}) | costs
    return made | {"variant": name}


def test_the_joint_table_is_the_front_and_says_who_dominates_whom():
    rows = [
        joined("a/dense", 90.0, 500_000, 3000),
        joined("a/sparse", 88.0, 90_000, 2000),
        joined("b/dense", 89.0, 100_000, 2500),
        joined("b/worse", 87.0, 100_000, 2500),
        joined("b/tie", 88.0, 90_000, 2000),  # equals do not dominate each other
        joined("b/little_ram", 70.0, 500_000, 3000, m4_ram_bytes=0.5),
        joined("b/better_but_not_linked", 99.0, None, 1),
    ]
    table, _, notes = front_table(rows).partition("\n\n")
    lines = cells(table)
    assert len(lines[0]) <= 7 and lines[0][:2] == ["Run and variant", "Accuracy %"]
    expected = ["a/dense", "b/dense", "a/sparse", "b/tie", "b/little_ram"]
    assert [line[0] for line in lines[2:]] == expected
    assert lines[3][1:3] == ["89.00", "97.7"]
    assert notes.startswith("Dominated: b/worse by b/dense. 1 more lack")
    with pytest.raises(UserError, match="simulate_hardware"):
        front_table(rows[-1:])


def test_the_joint_table_takes_the_lowest_seed_of_each_run():
    rows = [joined("a/x", 90, 5, 3, seed=1), joined("a/y", 91, 5, 3, seed=2)]
    rows += [joined("b/x", 89, 4, 3, seed=0), joined("b/y", 95, 1, 1, seed=1)]
    assert [line[0] for line in cells(front_table(rows))[2:]] == ["a/x", "b/x"]
