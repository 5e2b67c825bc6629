"""Step 7: figures joined to their checkpoint, "not measured", the break-even picture, git's figures."""

import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY, fails, run_main

import simulate_hardware
from edgecnn.deploy.cortex_m import NotInstalled
from edgecnn.files import read_json
from edgecnn.hardware import PICOJOULES_A_CYCLE, stm32l4r5_energy_uj, with_hardware
from edgecnn.names import COMMITTED_RUNS
from edgecnn.tables import cortex_m_table, npu_table

REFERENCE = REPOSITORY / "results/reference"


@pytest.fixture(scope="module")
def committed():
    return {row["variant"]: row for row in json.loads((REFERENCE / "metrics.json").read_text())}


def int8_rows(committed):
    return [r for r in committed.values() if r["precision"] == "int8" and "m4_instructions" in r]


# ---- joining -----------------------------------------------------------------------------------


def test_figures_join_the_row_of_the_very_same_checkpoint():
    rows = [
        {"variant": "a", "checkpoint_sha256": "1", "size_bytes": 5, "m4_instructions": 7},
        {"variant": "b", "checkpoint_sha256": "2"},
    ]
    hardware = [
        {"variant": "a", "checkpoint_sha256": "older", "m4_instructions": 9},
        {"variant": "b", "checkpoint_sha256": "2", "m4_ram_bytes": 3, "m4_kernels": {"fc1": "x"}},
    ]
    joined = with_hardware(rows, hardware)
    assert joined[0] == {"variant": "a", "checkpoint_sha256": "1", "size_bytes": 5}
    assert joined[1] == {"variant": "b", "checkpoint_sha256": "2", "m4_ram_bytes": 3}


def test_energy_follows_from_cycles_and_stays_within_the_published_runs():
    cycles = {f"m4_cycles_modelled{end}": 2e6 for end in PICOJOULES_A_CYCLE}
    energy = stm32l4r5_energy_uj(cycles | {"m4_flash_bytes": 2**21})
    assert list(energy.values()) == [548, 552, 1304]
    assert set(stm32l4r5_energy_uj(cycles | {"m4_flash_bytes": 2**21 + 1}).values()) == {None}
    # ResNet-8 in MLPerf Tiny's runs on this chip at 120 MHz: (inferences a second, microjoules).
    runs = [(1.420, 29_207), (2.567, 20_236), (2.569, 21_342), (3.348, 12_684), (3.372, 14_927)]
    runs += [(4.673, 7_033), (4.407, 17_755), (4.505, 17_315), (6.056, 6_919), (6.036, 5_496)]
    implied = [rate * uj / 120 for rate, uj in runs]
    ends = [PICOJOULES_A_CYCLE[end] for end in ("_low", "", "_high")]
    assert ends == [round(min(implied)), round(implied[-1]), round(max(implied))]


def test_what_was_not_measured_is_said():
    tables = [{"variant": "pruned", "m4_instructions": 6_500_000}, {"variant": "none"}]
    (line,) = cortex_m_table(tables).splitlines()[2:3]
    assert "6.50" in line and line.count("not measured") == 5
    assert "none" not in cortex_m_table(tables) and npu_table(tables) == ""


# ---- the step ----------------------------------------------------------------------------------


@pytest.fixture
def exported(copy):
    run_main("export_edge", "--smoke", "--checkpoint", "checkpoints/smoke/pruned_50_int8.pt")
    for path in (copy / "checkpoints/smoke").glob("*.pt"):
        if path.stem != "pruned_50_int8":
            path.unlink()
    return copy


def test_a_variant_is_counted_and_its_figures_reach_the_table(exported):
    metrics = (exported / "results/smoke/metrics.json").read_bytes()
    run_main("simulate_hardware", "--smoke", "--images", 2)
    assert (exported / "results/smoke/metrics.json").read_bytes() == metrics  # one writer
    run_main("evaluate", "--smoke", "--docs")
    (row,) = read_json(exported / "results/smoke/hardware.json", "")
    assert row["m4_checked_images"] == 2 and 1e6 < row["m4_instructions"] < 8.5e6
    assert not any("energy" in key for key in row)  # edgecnn/hardware.py computes it from cycles
    assert row["u55_128_operators_on_npu_percent"] == 100
    assert row["tflite_micro_arena_bytes"] > 40_960
    metrics = read_json(exported / "results/smoke/metrics.json", "")
    (joined,) = (r for r in metrics if r["variant"] == "pruned_50_int8")
    assert joined["m4_instructions"] == row["m4_instructions"]
    assert joined["stm32l4r5_energy_modelled_uj"] > 0
    table = (exported / "results/smoke/table_all.md").read_text()
    assert "Instructions, M, counted" in table and "ResNet-8" not in table  # not the test set


def test_a_missing_tool_is_not_measured_and_nothing_else_is_lost(exported, monkeypatch, capsys):
    def missing(*_):
        raise NotInstalled("qemu-system-arm not installed; sudo apt-get install it")

    monkeypatch.setattr(simulate_hardware, "cortex_m_row", missing)
    monkeypatch.setattr(simulate_hardware, "vela_installed", lambda: False)
    run_main("simulate_hardware", "--smoke")
    run_main("evaluate", "--smoke", "--docs")
    (row,) = read_json(exported / "results/smoke/hardware.json", "")
    assert row["tflite_micro_arena_bytes"] > 0
    assert not any(key.startswith(("m4_", "u55_")) for key in row)
    assert "not measured" in (exported / "results/smoke/table_all.md").read_text()
    assert "sudo apt-get install" in capsys.readouterr().out
    monkeypatch.setattr(simulate_hardware, "require_tools", missing)
    run_main("simulate_hardware", "--smoke", "--break-even")
    assert read_json(exported / "results/smoke/break_even.json", "") == []
    run_main("plot_pareto", "--smoke", "--break-even")
    assert "not measured, no picture" in capsys.readouterr().out


def test_of_other_seeds_what_is_exported_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeds = {"pruned_50": 1, "baseline": 1, "baseline_seed2": 2, "pruned_50_seed2": 2}
    found = {
        Path(f"{name}_int8.pt"): {"provenance": {"seed": seed, "method": name.split("_seed")[0]}}
        for name, seed in seeds.items()
    }
    monkeypatch.setattr(simulate_hardware, "int8_checkpoints", lambda _run: found)
    first = ["baseline_int8", "pruned_50_int8"]  # the dense one of the lowest seed leads
    assert [path.stem for path in simulate_hardware.variants("mine")] == first
    edge = tmp_path / "results/mine/edge"
    edge.mkdir(parents=True)
    (edge / "pruned_50_seed2_int8.tflite").touch()
    taken = [path.stem for path in simulate_hardware.variants("mine")]
    assert taken == [*first, "pruned_50_seed2_int8"]


def test_what_was_counted_of_a_file_that_is_elsewhere_stays(exported, monkeypatch, capsys):
    path, stays = (
        exported / "results/smoke/hardware.json",
        {"variant": "a", "checkpoint_sha256": "1"},
    )
    run_main("simulate_hardware", "--smoke")
    (row,) = rows = read_json(path, "")
    monkeypatch.setattr(simulate_hardware, "hardware_row", lambda *_: row)
    for force, expected in ([], [stays, row]), (["--force"], [row]):
        path.write_text(json.dumps([*rows, stays, row | {"variant": "renamed"}]))
        run_main("simulate_hardware", "--smoke", *force)
        assert read_json(path, "") == expected
    path.write_text("<<<<<<< ours\n")
    assert "--force" in fails(capsys, exported, "simulate_hardware", "--smoke")
    run_main("simulate_hardware", "--smoke", "--force")


def test_the_break_even_figures_and_their_picture_are_both_kept(exported, monkeypatch, capsys):
    rows = read_json(REFERENCE / "break_even.json", "")
    monkeypatch.setattr(simulate_hardware, "break_even", lambda *_: rows)
    for kept in (0, 2):
        run_main("simulate_hardware", "--smoke", "--break-even")
        run_main("plot_pareto", "--smoke", "--break-even")
        assert capsys.readouterr().out.count("kept: results/smoke/break_even.") == kept


@pytest.mark.parametrize("text", ["[1]", "[{}]", "null", '{"a": 1}', ""])
def test_a_malformed_hardware_json_is_refused_before_any_work(copy, capsys, text):
    (copy / "results/smoke/hardware.json").write_text(text)
    assert "simulate_hardware.py" in fails(capsys, copy, "evaluate", "--smoke")


@pytest.mark.parametrize("cc", ["false", "true", "/etc/passwd", "no-such-compiler -m64"])
def test_a_compiler_that_does_not_compile_is_one_line(copy, capsys, monkeypatch, cc):
    monkeypatch.setenv("CC", cc)
    assert cc.split()[0] in fails(capsys, copy, "export_edge", "--smoke")


def test_an_export_of_other_weights_is_not_taken(exported, capsys):
    json_path = exported / "results/smoke/edge/pruned_50_int8.json"
    result = json.loads(json_path.read_text())
    json_path.write_text(json.dumps(result | {"checkpoint_sha256": "0"}))
    found = simulate_hardware.exported(json_path.parent, "pruned_50_int8", "1")
    assert found[0] is None and set(found[1].values()) == {None}
    assert "python export_edge.py" in capsys.readouterr().out


def test_what_was_measured_of_a_tflite_that_is_gone_stays(exported, capsys):
    path = exported / "results/smoke/hardware.json"
    run_main("simulate_hardware", "--smoke", "--images", 1)
    (before,) = read_json(path, "")
    (exported / "results/smoke/edge/pruned_50_int8.tflite").unlink()
    run_main("simulate_hardware", "--smoke", "--images", 1)
    assert "pruned_50_int8: what was measured of that .tflite stays" in capsys.readouterr().out
    assert read_json(path, "") == [before] and before["tflite_bytes"] > 0
    path.write_text(json.dumps([before | {"checkpoint_sha256": "0"}]))
    run_main("simulate_hardware", "--smoke", "--images", 1)
    (row,) = read_json(path, "")  # of another checkpoint nothing does
    assert row["tflite_bytes"] is None and not any(key.startswith("u55_") for key in row)


def test_outputs_that_differ_between_the_processors_are_refused(exported, monkeypatch, capsys):
    real = simulate_hardware.cortex_m_row

    def wrong(checkpoint, inputs):
        row = real(checkpoint, inputs)
        row["m4_logits"][0][0] ^= 1
        return row

    monkeypatch.setattr(simulate_hardware, "cortex_m_row", wrong)
    error = fails(capsys, exported, "simulate_hardware", "--smoke", "--images", 1)
    assert "gives other logits than this machine" in error


def test_an_unknown_accelerator_is_refused_with_the_known_ones(copy, capsys):
    error = fails(capsys, copy, "simulate_hardware", "--smoke", "--accelerator", "ethos-u99")
    assert "ethos-u99" in error and "ethos-u55-128" in error


# ---- the committed figures ---------------------------------------------------------------------


RUNS = [run for run in COMMITTED_RUNS if (REPOSITORY / f"results/{run}/hardware.json").exists()]


def test_int8_costs_at_worst_what_readme_says():
    rows = []
    for path in (REPOSITORY / "results").glob("*/metrics.json"):
        rows += json.loads(path.read_text())
    worst = min(r["accuracy_change_points"] or 0 for r in rows if r["precision"] == "int8")
    (said,) = re.findall(
        r"INT8 is nearly free\*\*: (-0\.\d\d)", (REPOSITORY / "README.md").read_text()
    )
    assert float(said) == worst


@pytest.mark.parametrize("run", RUNS)
def test_what_the_pages_say_of_every_committed_variant(run):
    rows = json.loads((REPOSITORY / f"results/{run}/metrics.json").read_text())
    for row in (row for row in rows if "m4_instructions" in row):
        assert row["stm32f405_fits"] is True
        assert row.get("u55_128_operators_on_npu_percent", 100) == 100
        if row["tflite_micro_images"] == 10_000:
            assert abs(row["tflite_micro_accuracy_percent"] - row["accuracy_percent"]) <= 0.15


@pytest.mark.parametrize("run", ["reference", "headline"])
def test_committed_break_even_figures_fall_with_zeros(run):
    rows = json.loads((REPOSITORY / f"results/{run}/break_even.json").read_text())
    for key in ("m4_sparse_instructions", "m4_sparse_flash_bytes"):
        assert [row[key] for row in rows] == sorted((row[key] for row in rows), reverse=True)


def test_committed_artifacts_agree_with_pytorch_on_every_test_image(committed):
    for row in int8_rows(committed):
        result = json.loads((REFERENCE / f"edge/{row['variant']}.json").read_text())
        assert result["checkpoint_sha256"] == row["checkpoint_sha256"]
        assert result["parity_images"] == 10_000 and result["agreement_percent"] >= 99.5
        assert result["c_vs_exact_integers_bit_exact_images"] == 10_000
        assert result["c_vs_fbgemm_bit_exact_images"] == 10_000
