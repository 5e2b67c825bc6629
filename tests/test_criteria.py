"""The comparison of criteria: what a curve costs at an accuracy, and equal effort."""

import math

import pytest
from conftest import run_main

from benchmarks.criteria import COSTS, at_equal_accuracy, cost_at, curves, made_up_rows, table
from edgecnn.errors import UserError
from edgecnn.files import read_json

KEY = "energy_sram_uj"


def curve(*points):
    return [{KEY: cost, "accuracy_percent": accuracy} for cost, accuracy in points]


def test_a_cost_is_read_off_the_cheapest_crossing():
    falling = curve((8, 86.0), (4, 85.0), (2, 83.0))
    assert cost_at(falling, 86.0, KEY) == pytest.approx(8)
    assert cost_at(falling, 85.5, KEY) == pytest.approx(math.sqrt(8 * 4))  # halfway in logarithm
    assert cost_at(falling, 82.0, KEY) == 2  # the cheapest level does already
    assert cost_at(falling, 86.5, KEY) is None
    assert cost_at(curve((2, 84), (4, 86), (8, 85), (16, 86)), 85, KEY) == pytest.approx(
        math.sqrt(8)
    )


def test_savings_are_against_global_l1_at_80_percent():
    found = curves(made_up_rows())
    rows = at_equal_accuracy(found, 80)
    equal = {row["criterion"]: row for row in rows}
    yardstick = next(r for r in found["l1"] if r["method"] == "pruned_80")
    assert equal["l1"]["at_accuracy_percent"] == yardstick["accuracy_percent"]
    for key in COSTS:
        assert equal["l1"][key] == pytest.approx(yardstick[key], rel=1e-4)
        assert equal["l1"][f"{key}_saved_percent"] == pytest.approx(0, abs=0.01)
    assert table(found, [rows, rows]).count("accuracy of global L1 at 80 % zeros") == 2


def test_unequal_effort_or_no_yardstick_is_refused():
    rows = made_up_rows()
    with pytest.raises(UserError, match="equal effort"):
        curves([rows[0] | {"epochs_a_level": 4}, *rows[1:]])
    with pytest.raises(UserError, match="equal effort"):
        curves([row for row in rows if row["criterion"] != "l1"])


def test_smoke_writes_table_figure_and_json(workdir):
    run_main("benchmarks.criteria", "--smoke")
    written = {path.name for path in (workdir / "results/smoke").iterdir() if path.is_file()}
    assert written == {"criteria.json", "criteria.md", "criteria.png"}
    result = read_json(workdir / "results/smoke/criteria.json", "")
    assert {row["criterion"] for row in result["at_equal_accuracy"]} == {
        "l1",
        "layer-rank",
        "lamp",
        "energy",
    }
