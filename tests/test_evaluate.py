"""evaluate.py: exact counts on the smoke chain, names, and the bars of the committed runs."""

import json
import shutil

import pytest
from conftest import REPOSITORY, run_main

from edgecnn.checkpoint import load_checkpoint, sha256
from edgecnn.compare import mcnemar_p
from edgecnn.docs import table_files
from edgecnn.hardware import read_hardware
from edgecnn.names import NAME_PATTERN, variant_name
from edgecnn.tables import AXES, better_axes

MACS = 10_848_768
REFERENCE = REPOSITORY / "results" / "reference"
VARIANTS = ("baseline_fp32", "baseline_int8", "pruned_50_fp32", "pruned_50_int8")


@pytest.fixture(scope="module")
def smoke_rows(smoke):
    return {r["variant"]: r for r in json.loads((smoke / "results/smoke/metrics.json").read_text())}


@pytest.fixture(scope="module")
def reference_rows():
    return json.loads((REFERENCE / "metrics.json").read_text())


@pytest.fixture(scope="module")
def headline_rows():
    return json.loads((REPOSITORY / "results/headline/metrics.json").read_text())


# ---- the smoke chain ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("baseline", "fp32"), "baseline_fp32"),
        (("control", "int8", "l1", 1), "control_seed1_int8"),
        (("pruned_50", "fp32"), "pruned_50_fp32"),
        (("pruned_50", "int8", "l1", 2), "pruned_50_l1_seed2_int8"),
        (("pruned_97.5", "fp32", "layer-rank", 3), "pruned_97.5_seed3_fp32"),
    ],
)
def test_one_naming_scheme(arguments, name):
    assert variant_name(*arguments) == name and NAME_PATTERN.fullmatch(name)


def test_rows_carry_exact_counts_and_provenance(smoke, smoke_rows):
    assert set(smoke_rows) == set(VARIANTS)
    for name, r in smoke_rows.items():
        assert r["macs"] == MACS and r["parameters"] == 620_362 and r["weights"] == 619_872
        path = smoke / r["checkpoint"]
        assert r["size_bytes"] == path.stat().st_size and r["checkpoint_sha256"] == sha256(path)
        bits = 8 if name.endswith("int8") else 32
        assert r["relative_energy"] == pytest.approx(r["macs_nonzero"] / 1e6 * bits / 8, abs=1e-4)
        assert r["relative_energy_dense"] == pytest.approx(MACS / 1e6 * bits / 8, abs=1e-4)
    assert smoke_rows["baseline_fp32"]["macs_nonzero"] == MACS
    assert smoke_rows["pruned_50_fp32"]["macs_nonzero"] <= 5.43e6
    assert smoke_rows["pruned_50_int8"]["parent"] == "pruned_50_fp32"
    assert smoke_rows["pruned_50_int8"]["accuracy_change_points"] is not None
    for r in smoke_rows.values():
        for other in ("parent", "baseline"):
            gained, lost = r[f"images_gained_vs_{other}"], r[f"images_lost_vs_{other}"]
            if gained is None:
                assert r["variant"] == "baseline_fp32"
                continue
            key = "accuracy_change" + "_vs_baseline" * (other == "baseline") + "_points"
            assert r[key] == pytest.approx(100 * (gained - lost) / r["test_images"], abs=1e-3)
            assert r[f"mcnemar_p_vs_{other}"] == mcnemar_p(gained, lost)
        assert not any(isinstance(value, list) for value in r.values())  # flat
    table = (smoke / "results/smoke/table_all.md").read_text()
    assert all(f"| {name} " in table for name in smoke_rows)


def test_inspect_describes_a_saved_file(smoke, monkeypatch, capsys):
    monkeypatch.chdir(smoke)
    run_main("evaluate", "--inspect", "checkpoints/smoke/pruned_50_int8.pt")
    text = capsys.readouterr().out
    assert "int8" in text and "pruned_50_fp32" in text and "sparsity" not in text.split("\n")[0]
    fc1 = next(line for line in text.splitlines() if "fc1.weight" in line)
    assert "256x2048" in fc1 and "50.0" in fc1 and "524,288" in fc1


def test_a_variant_whose_checkpoint_is_elsewhere_stays_as_measured(copy, capsys):
    folder, checkpoints = copy / "results/smoke", copy / "checkpoints/smoke"
    before = {name: (folder / name).read_bytes() for name in ("metrics.json", "layers.json")}
    elsewhere = ("baseline_fp32", "pruned_50_int8")
    for name in elsewhere:
        (checkpoints / f"{name}.pt").rename(copy / f"{name}.pt")
    run_main("evaluate", "--smoke")
    assert capsys.readouterr().out.count("as measured where its file is") == 2

    def rows(content):
        rows = json.loads(content)
        return sorted(
            ({**r, "evaluated_commit": None} for r in rows), key=lambda r: str([*r.values()])
        )

    for name, content in before.items():
        assert rows((folder / name).read_bytes()) == rows(content)
    (checkpoints / "baseline_int8.pt").rename(checkpoints / "mine_int8.pt")  # it is here
    run_main("evaluate", "--smoke")
    assert "baseline_int8" not in (folder / "table_all.md").read_text()


# ---- the committed runs ------------------------------------------------------------------------


def test_new_break_even_figures_reach_the_tables(copy, capsys):
    folder = copy / "results/smoke"
    run_main("evaluate", "--smoke")
    assert "kept: results/smoke/metrics.json" in capsys.readouterr().out
    shutil.copy(REPOSITORY / "results/reference/break_even.json", folder)
    run_main("evaluate", "--smoke")
    assert "break_even.json changed" in capsys.readouterr().out
    assert "Where zeros start to pay" in (folder / "table_all.md").read_text()


# INT8 checkpoints of seed 0 whose rows stay though git lacks the file, for room.
NOT_IN_GIT = {"reference": {"control_int8"}, "headline": set()}


@pytest.fixture(scope="module", params=NOT_IN_GIT)
def committed(request):
    """(a committed run's name, its results folder, the rows of its metrics.json)."""
    folder = REPOSITORY / "results" / request.param
    return request.param, folder, json.loads((folder / "metrics.json").read_text())


def test_committed_tables_are_what_the_committed_json_renders(committed, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    _, folder, rows = committed
    for name, content in table_files(folder, rows, read_hardware(folder)).items():
        assert (folder / name).read_bytes() == content


def test_committed_checkpoints_are_the_ones_that_were_measured(committed):
    seed_0 = [r for r in committed[2] if r["seed"] == 0]
    assert {r["variant"] for r in seed_0} >= {*VARIANTS, "control_fp32", "control_int8"}
    here = [r for r in seed_0 if (REPOSITORY / r["checkpoint"]).exists()]
    quantized = {r["variant"] for r in seed_0 if r["bits"] == 8}
    assert {r["variant"] for r in here} >= quantized - NOT_IN_GIT[committed[0]]
    for r in here:
        path = REPOSITORY / r["checkpoint"]
        assert sha256(path) == r["checkpoint_sha256"] and path.stat().st_size == r["size_bytes"]
        assert load_checkpoint(path)["precision"] == r["precision"]


def test_every_committed_row_has_its_own_json(committed):
    _, folder, rows = committed
    for r in rows:
        stage = json.loads((folder / f"{r['variant']}.json").read_text())
        assert stage["checkpoint_sha256"] == r["checkpoint_sha256"]
        assert stage["commit"] == r["trained_commit"]
        # Seeds 1 and 2 ran when a result that a run had rewritten still counted as a changed source.
        assert "dirty" not in r["trained_commit"] or r["seed"]


def test_the_headline_run_meets_its_bars(headline_rows):
    rows = {r["variant"]: r for r in headline_rows}
    assert all(r["test_images"] == 10_000 for r in headline_rows)
    dense, dense_int8 = rows["baseline_fp32"], rows["baseline_int8"]
    assert dense["accuracy_percent"] >= 89.3 and dense["size_bytes"] <= 2.38 * 2**20
    assert abs(dense_int8["accuracy_change_points"]) <= 0.2
    assert dense_int8["size_bytes"] <= 0.64 * 2**20
    half = rows["pruned_50_fp32"]
    assert half["accuracy_percent"] >= dense["accuracy_percent"]
    assert half["accuracy_change_vs_control_points"] is not None
    assert half["macs_nonzero"] <= 5.43e6 and half["size_bytes"] <= 1.19 * 2**20
    sparse = rows["pruned_90_energy_int8"]
    assert sparse["accuracy_percent"] >= 88.3 and sparse["size_bytes"] <= 0.13 * 2**20
    assert sparse["relative_energy"] <= 4.3
    sparsest = rows["pruned_95_energy_int8"]
    assert sparsest["accuracy_percent"] >= 87.0 and sparsest["size_bytes"] <= 75_000
    assert sparsest["weight_stored_bytes"] <= 75_000
    assert sparsest["m4_instructions"] <= 2.0e6 + 2.5 * sparsest["macs_nonzero"]
    winner = rows["pruned_93_energy_int8"]
    lost = [key for (_, key, *_), won in zip(AXES, better_axes(winner), strict=True) if not won]
    assert lost == ["tflite_bytes", "stm32l4r5_energy_measured_uj"]  # the latter has no figure
    assert winner["accuracy_percent"] >= 87.65
    assert winner["stm32l4r5_energy_modelled_uj"] <= 5496 / 2
    assert winner["stm32l4r5_energy_modelled_high_uj"] < 5496
