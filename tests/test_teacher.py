"""A teacher of any run and network: it is a parent, sees the same input, and saw no held-out image."""

import json
import shutil

import pytest
import torch
from conftest import changed, fails, run_main

from edgecnn.checkpoint import dataset_of, float_module, load_checkpoint
from edgecnn.files import sha256
from edgecnn.teacher import load_teacher
from edgecnn.train import LATER

BASELINE = "checkpoints/smoke/baseline_fp32.pt"
TAUGHT = ("train_baseline", "--smoke", "--seed", 5, "--network", "resnet8", "--epochs", 1)


@pytest.fixture
def other(copy):
    """Another run's network of the same name, and with other weights."""
    return changed(
        BASELINE,
        copy / "checkpoints/other/baseline_fp32.pt",
        lambda c: c["tensors"]["fc2.bias"].add_(1),
    )


def test_a_baseline_of_another_network_is_taught_and_names_its_teacher(copy, capsys):
    run_main(*TAUGHT, "--teacher", BASELINE)
    path = copy / "checkpoints/smoke/baseline_seed5_fp32.pt"
    origin = load_checkpoint(path)["provenance"]
    assert origin["teacher_sha256"] == sha256(BASELINE) and origin["parent"] is None
    assert origin["arguments"]["distillation"] == 0.7
    record = json.loads((copy / "results/smoke/baseline_seed5_fp32.json").read_text())
    assert record["parents"] == {"baseline_fp32.pt": sha256(BASELINE)}
    capsys.readouterr()
    run_main(*TAUGHT, "--teacher", BASELINE)
    assert capsys.readouterr().out.startswith("kept: ")
    error = fails(capsys, copy, *TAUGHT)
    assert f"made with distillation 0.7, teacher {BASELINE}; give the same" in error


def test_a_teacher_of_the_parents_name_is_a_parent_of_its_own(copy, other, capsys):
    arguments = ("prune_finetune", "--smoke", "--sparsity", 0.6, "--epochs", 1, "--teacher", other)
    run_main(*arguments)
    record = json.loads((copy / "results/smoke/pruned_60_fp32.json").read_text())
    name = f"{other.parent.name}/{other.name}"
    assert record["parents"] == {"smoke/baseline_fp32.pt": sha256(BASELINE), name: sha256(other)}
    assert record["teacher_sha256"] == sha256(other) != record["parent_sha256"]
    capsys.readouterr()
    run_main(*arguments)
    assert capsys.readouterr().out.startswith("kept: ")
    changed(other, other, lambda c: c["tensors"]["fc2.bias"].add_(1))
    run_main(*arguments)
    assert f"anew: {name} changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "holdout", "message"),
    [
        (lambda c: c["data"].update(mean=[0.5, 0.5, 0.5]), (), "differs in mean from CIFAR-10"),
        (lambda c: c["data"].update(classes=list("abcdefghij")), (), "differs in classes"),
        (lambda c: None, ("--holdout",), "trained on the validation images too"),
        (
            lambda c: (
                c["provenance"].update(holdout=True),
                c["data"].update(fingerprint=64 * "a"),
            ),
            ("--holdout",),
            "differs in fingerprint",
        ),
    ],
)
def test_a_teacher_of_other_input_or_of_held_out_images_is_refused(
    copy, capsys, change, holdout, message
):
    teacher = changed(BASELINE, copy / "checkpoints/other/baseline_fp32.pt", change)
    error = fails(capsys, copy, *TAUGHT, "--teacher", teacher, *holdout)
    assert message in error


def test_a_step_does_not_replace_its_own_teacher(copy, capsys):
    arguments = ("train_baseline", "--smoke", "--force", "--teacher", BASELINE)
    assert "would replace what it is made from" in fails(capsys, copy, *arguments)
    shutil.copy(BASELINE, copy / "w.pt")
    arguments = ("train_baseline", "--smoke", "--weights", copy / "w.pt", "--teacher", BASELINE)
    assert "leave out --teacher" in fails(capsys, copy, *arguments)


def test_decay_and_smoothing_decide_and_older_records_had_the_defaults(copy, capsys):
    path = copy / "results/smoke/baseline_fp32.json"
    record = json.loads(path.read_text())
    record["arguments"] = {k: v for k, v in record["arguments"].items() if k not in LATER}
    path.write_text(json.dumps(record))
    run_main("train_baseline", "--smoke")
    assert capsys.readouterr().out.startswith("kept: ")
    arguments = ("--weight-decay", 3e-4, "--label-smoothing", 0.05)
    error = fails(capsys, copy, "train_baseline", "--smoke", *arguments)
    assert "made with weight_decay 0.0005, label_smoothing 0.1; give the same" in error
    assert "outside [0, 1)" in fails(capsys, copy, "train_baseline", "--weight-decay", -1)


def test_a_teacher_is_as_its_checkpoint_evaluates(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    checkpoint = load_checkpoint(BASELINE)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    teacher = load_teacher(BASELINE, dataset_of(checkpoint), holdout=False)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), float_module(checkpoint).eval()(images))
