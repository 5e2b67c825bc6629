"""Step 6: artifacts of the smoke run that agree with torch; refused and left unwritten where not."""

import hashlib
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import fails, run_main

import export_edge
from edgecnn.deploy import tflite
from edgecnn.deploy.c_source import C_NAMES
from edgecnn.errors import UserError
from edgecnn.packing import pack

FOLDER, EDGE = "checkpoints/smoke", "results/smoke/edge"
ARGUMENTS = ("--smoke", "--images", 50, "--checkpoint", f"{FOLDER}/baseline_int8.pt")


# ---- the step ------------------------------------------------------------------------------------


def test_export_of_the_smoke_run(copy):
    run_main("export_edge", "--smoke", "--images", 50)
    assert {path.name for path in (copy / EDGE).iterdir() if path.is_dir()} == {
        "baseline_int8",
        "pruned_50_int8",
    }
    for name in ("baseline_int8", "pruned_50_int8"):
        result = json.loads((copy / f"{EDGE}/{name}.json").read_text())
        assert result["parity_images"] == 50 and result["max_difference_lsb"] <= 2
        assert result["c_vs_exact_integers_bit_exact_images"] == 50
        assert 40_960 <= result["tflite_micro_arena_bytes"] < 50_000
        content = (copy / f"{EDGE}/{name}.tflite").read_bytes()
        assert result["tflite_bytes"] == len(content)
        assert result["tflite_sha256"] == hashlib.sha256(content).hexdigest()
        assert (
            result["tflite_operators"] == ["CONV_2D", "MAX_POOL_2D"] * 3 + ["FULLY_CONNECTED"] * 2
        )
    folder = copy / EDGE / "baseline_int8"
    assert {path.name for path in folder.iterdir()} == set(C_NAMES)


# ---- parity --------------------------------------------------------------------------------------


def test_parity_figures():
    theirs = np.array([[3, 3, 0], [0, 5, 1], [-128, 0, 1]], np.int8)
    ours = np.array([[3, 3, 0], [0, 4, 1], [127, 0, 1]], np.int8)
    figures = export_edge.compare_logits(theirs, ours, np.array([0, 1, 2]))
    assert figures["differing_images"] == 1 and figures["max_difference_lsb"] == 255
    assert figures["accuracy_percent"] == 100 and figures["torch_accuracy_percent"] == 66.6667
    assert figures["agreement_percent"] == 66.6667


# ---- errors --------------------------------------------------------------------------------------


def test_constant_outputs_are_an_error_and_nothing_is_published(copy, capsys):
    path = copy / FOLDER / "baseline_int8.pt"
    spoiled = torch.load(path, weights_only=True)
    spoiled["tensors"]["fc2.weight"].zero_()
    torch.save(spoiled, path)
    assert "every image alike" in fails(capsys, copy, "export_edge", *ARGUMENTS)


def test_a_file_that_disagrees_is_not_published(copy, capsys, monkeypatch):
    # the classic mistake: what reads a flattened map left in torch's order
    monkeypatch.setattr(tflite, "hwc_columns", lambda weight, channels: weight)
    assert "does not agree" in fails(capsys, copy, "export_edge", *ARGUMENTS)


def test_c_that_disagrees_is_not_published(copy, capsys, monkeypatch):
    real = export_edge.host_parity

    def wrong(*arguments):
        found = real(*arguments)
        return found | {"exact_integers": found["exact_integers"] | {"bit_exact_images": 49}}

    monkeypatch.setattr(export_edge, "host_parity", wrong)
    assert "differs from exact integers" in fails(capsys, copy, "export_edge", *ARGUMENTS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "not a readable checkpoint"),
        (lambda path: path.unlink(), "python quantize.py"),
        (lambda path: shutil.copy(path.with_name("baseline_fp32.pt"), path), "takes int8"),
    ],
)
def test_checkpoints_that_cannot_be_exported(copy, capsys, spoil, message):
    spoil(copy / FOLDER / "baseline_int8.pt")
    assert message in fails(capsys, copy, "export_edge", *ARGUMENTS)


def test_an_emptied_variant_does_not_stop_those_behind_it(copy, capsys):
    path = copy / FOLDER / "baseline_int8.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["tensors"]["fc2.weight"] = pack(torch.zeros(10, 256, dtype=torch.int8))
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit) as stop:
        run_main("export_edge", "--smoke", "--images", 50)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "answers every image alike" in error
    assert not (copy / EDGE / "baseline_int8.tflite").exists()
    assert (copy / EDGE / "pruned_50_int8.tflite").exists()


def test_a_run_without_int8_checkpoints(copy, capsys):
    for path in (copy / FOLDER).glob("*_int8.pt"):
        path.unlink()
    assert "python quantize.py" in fails(capsys, copy, "export_edge", "--smoke")


def test_a_missing_package_is_named(copy, capsys, monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "tflite_micro", None)
    monkeypatch.setitem(importlib.sys.modules, "tflite_micro.python.tflite_micro", None)
    run_main("export_edge", "--smoke")
    said = capsys.readouterr().out
    assert "not measured" in said and "firmware/requirements.txt" in said
    assert not (copy / EDGE).exists()
    with pytest.raises(UserError, match="firmware/requirements.txt"):
        tflite.tflite_micro()
