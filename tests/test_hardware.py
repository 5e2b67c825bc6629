"""Step 7: figures joined to their checkpoint, "not measured", the bars, the break-even picture."""

import json
import shutil

import pytest
from conftest import REPOSITORY, fails, run_main

import simulate_hardware
from edgecnn.cortex_m import NotInstalled
from edgecnn.files import read_json
from edgecnn.peers import RESNET8
from evaluate import hardware_table, with_hardware
from plot_pareto import BREAK_EVEN_PANELS, crossing, draw_break_even

REFERENCE = REPOSITORY / "results/reference"
MACS = 10_848_768


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


def test_what_was_not_measured_is_said_and_the_peer_stands_apart():
    table = hardware_table(
        [{"variant": "pruned", "m4_instructions": 6_500_000}, {"variant": "none"}]
    )
    ours, peer = table.splitlines()[2:]
    assert "6.50" in ours and ours.count("not measured") == 9
    assert RESNET8["name"] in peer and "201,747" in peer and "5,496 measured" in peer
    assert "none" not in table and hardware_table([{"variant": "none"}]) == ""


# ---- the step ----------------------------------------------------------------------------------


@pytest.fixture
def exported(copy):
    run_main("export_edge", "--smoke", "--checkpoint", "checkpoints/smoke/pruned_50_int8.pt")
    for path in (copy / "checkpoints/smoke").glob("*.pt"):
        if path.stem != "pruned_50_int8":
            path.unlink()
    return copy


def test_a_variant_is_counted_and_its_figures_reach_the_table(exported):
    run_main("simulate_hardware", "--smoke", "--images", 2)
    (exported / "results/smoke/metrics.json").unlink()  # of variants that are not here
    run_main("evaluate", "--smoke")
    (row,) = read_json(exported / "results/smoke/hardware.json", "")
    assert row["m4_checked_images"] == 2 and row["m4_instructions"] > 1e6
    assert sum(row["m4_instructions_per_layer"].values()) == row["m4_instructions"]
    assert row["u55_128_operators_on_npu_percent"] == 100
    assert row["tflite_micro_arena_bytes"] > 40_960
    metrics = read_json(exported / "results/smoke/metrics.json", "")
    (joined,) = (r for r in metrics if r["variant"] == "pruned_50_int8")
    assert joined["m4_instructions"] == row["m4_instructions"]
    assert "Cortex-M4 instructions" in (exported / "results/smoke/table.md").read_text()


def test_a_missing_tool_is_not_measured_and_nothing_else_is_lost(exported, monkeypatch, capsys):
    def missing(*_):
        raise NotInstalled("qemu-system-arm not installed; sudo apt-get install it")

    monkeypatch.setattr(simulate_hardware, "cortex_m_row", missing)
    monkeypatch.setattr(simulate_hardware, "vela_installed", lambda: False)
    run_main("simulate_hardware", "--smoke")
    (row,) = read_json(exported / "results/smoke/hardware.json", "")
    assert row["tflite_micro_arena_bytes"] > 0
    assert not any(key.startswith(("m4_", "u55_")) for key in row)
    assert "sudo apt-get install" in capsys.readouterr().out
    monkeypatch.setattr(simulate_hardware, "require_tools", missing)
    run_main("simulate_hardware", "--smoke", "--break-even")
    assert read_json(exported / "results/smoke/break_even.json", "") == []
    run_main("plot_pareto", "--smoke", "--break-even")
    assert "not measured, no picture" in capsys.readouterr().out


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


def test_outputs_that_differ_between_the_processors_are_refused(exported, monkeypatch, capsys):
    real = simulate_hardware.cortex_m_row

    def wrong(checkpoint, inputs):
        row = real(checkpoint, inputs)
        row["m4_logits"][0][0] ^= 1
        return row

    monkeypatch.setattr(simulate_hardware, "cortex_m_row", wrong)
    error = fails(capsys, exported, "simulate_hardware", "--smoke", "--images", 1)
    assert "differs from this machine by up to 1" in error


def test_an_unknown_accelerator_is_refused_with_the_known_ones(copy, capsys):
    error = fails(capsys, copy, "simulate_hardware", "--smoke", "--accelerator", "ethos-u99")
    assert "ethos-u99" in error and "ethos-u55-128" in error


# ---- the committed figures ---------------------------------------------------------------------


def test_committed_hardware_figures_meet_the_bars(committed):
    rows = int8_rows(committed)
    assert {"baseline_int8", "pruned_50_int8", "pruned_90_energy_int8"} <= {
        r["variant"] for r in rows
    }
    for row in rows:
        dense = row["sparsity_percent"] < 20
        bound = 1.65 * MACS if dense else 2.0e6 + 2.5 * row["macs_nonzero"]
        assert row["m4_instructions"] <= bound, row["variant"]
        assert row["m4_ram_bytes"] <= 30_000
        assert row["stm32f405_fits"] is True
        assert row["u55_128_operators_on_npu_percent"] == 100
        assert row["tflite_micro_images"] == 10_000
        assert abs(row["tflite_micro_accuracy_percent"] - row["accuracy_percent"]) <= 0.15
    assert committed["pruned_90_energy_int8"]["m4_flash_bytes"] <= 135_000
    assert committed["baseline_fp32"]["stm32f405_fits"] is False


def test_committed_sparse_kernels_meet_the_bar_at_every_share_of_zeros():
    for row in json.loads((REFERENCE / "break_even.json").read_text()):
        nonzero = MACS * (1 - row["zeros_percent"] / 100)
        assert row["m4_sparse_instructions"] <= 2.0e6 + 2.5 * nonzero
        assert row["m4_dense_instructions"] <= 1.65 * MACS
        if row["zeros_percent"] == 90:
            assert row["m4_sparse_flash_bytes"] <= 135_000


def test_committed_artifacts_agree_with_pytorch_on_every_test_image(committed):
    for row in int8_rows(committed):
        result = json.loads((REFERENCE / f"edge/{row['variant']}.json").read_text())
        assert result["checkpoint_sha256"] == row["checkpoint_sha256"]
        assert result["parity_images"] == 10_000 and result["agreement_percent"] >= 99.5
        assert result["c_vs_exact_integers_bit_exact_images"] == 10_000
        assert result["c_vs_fbgemm_bit_exact_images"] == 10_000


# ---- the picture -------------------------------------------------------------------------------


def test_break_even_is_where_the_sparse_line_falls_below_for_good():
    assert crossing([0, 50, 100], [10, 10, 10], [20, 12, 8]) == pytest.approx(75)
    assert crossing([0, 1], [1, 1], [2, 3]) is None
    assert crossing([0, 1], [1, 1], [0.5, 0.2]) is None  # pays from the start
    assert crossing([0, 1, 2, 3], [5] * 4, [4, 6, 6, 4]) == pytest.approx(2.5)


def test_break_even_picture_draws_every_line_of_the_json(workdir, capsys):
    shutil.copytree(REFERENCE, workdir / "results/mine")
    rows = json.loads((REFERENCE / "break_even.json").read_text())
    figure = draw_break_even(rows)
    for panel, (_, unit, lines) in zip(figure.axes, BREAK_EVEN_PANELS, strict=True):
        drawn = {line.get_label(): line.get_ydata() for line in panel.get_lines()}
        for key, name, *_ in lines:
            assert list(drawn[name]) == [row[key] / unit for row in rows]
    run_main("plot_pareto", "--run", "mine", "--break-even")
    del rows[0]["m4_dense_instructions"]
    (workdir / "results/mine/break_even.json").write_text(json.dumps(rows))
    error = fails(capsys, workdir, "plot_pareto", "--run", "mine", "--break-even")
    assert "m4_dense_instructions" in error
