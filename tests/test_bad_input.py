"""What a user can get wrong ends in one clear line on stderr, exit code 2, and nothing overwritten."""

import errno
import json
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, fails, run_main, snapshot

from edgecnn.errors import UserError
from edgecnn.files import atomic_path
from edgecnn.train import Recipe, train_epoch

FOLDER = "checkpoints/smoke"
PACKED = ("tensors", "fc1.weight", "coded")


class Exploit:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    ("script", "arguments", "step"),
    [
        ("quantize", (), "python train_baseline.py"),
        ("quantize", ("--smoke",), "python train_baseline.py --smoke"),
        ("prune_finetune", ("--run", "mine"), "python train_baseline.py --run mine"),
        ("prune_finetune", (), "python train_baseline.py"),
        ("prune_finetune", ("--seed", 4), "python train_baseline.py --seed 4"),
        ("evaluate", (), "python train_baseline.py"),
        (
            "quantize",
            ("--checkpoint", "checkpoints/pruned_70_l1_fp32.pt"),
            "python prune_finetune.py --sparsity 0.7 --criterion l1",
        ),
        (
            "evaluate",
            ("checkpoints/control_seed1_int8.pt",),
            "python quantize.py --checkpoint checkpoints/control_seed1_fp32.pt",
        ),
        (
            "evaluate",
            ("--inspect", "checkpoints/control_seed1_fp32.pt"),
            "python prune_finetune.py --sparsity 0 --seed 1",
        ),
    ],
)
def test_missing_checkpoint_names_the_step_that_makes_it(workdir, capsys, script, arguments, step):
    assert step in fails(capsys, workdir, script, *arguments)


@pytest.mark.parametrize("script", ["quantize", "prune_finetune", "evaluate"])
def test_truncated_checkpoint(copy, capsys, script):
    path = copy / FOLDER / "baseline_fp32.pt"
    path.write_bytes(path.read_bytes()[:100_000])
    assert "not a readable checkpoint" in fails(capsys, copy, script, "--smoke")


@pytest.mark.parametrize(
    "writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_a_pickle_with_code_is_refused_and_never_executed(copy, capsys, writer):
    path = copy / FOLDER / "baseline_fp32.pt"
    writer({"format": "edgecnn-checkpoint", "tensors": Exploit()}, path)
    fails(capsys, copy, "quantize", "--smoke")
    assert not (copy / "executed").exists()


@pytest.mark.parametrize(
    ("name", "keys", "value", "message"),
    [
        ("pruned_50_fp32", PACKED, torch.zeros(100, dtype=torch.uint8), "damaged weight"),
        ("baseline_int8", ("quantization", "engine"), "future", "no engine future"),
    ],
)
def test_what_shows_only_when_a_checkpoint_is_used(copy, capsys, name, keys, value, message):
    checkpoint = part = torch.load(copy / FOLDER / f"{name}.pt", weights_only=True)
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path = copy / f"{name}.pt"
    torch.save(checkpoint, path)
    assert message in fails(capsys, copy, "evaluate", "--smoke", path)


@pytest.mark.parametrize("script", ["quantize", "prune_finetune"])
def test_an_int8_file_where_fp32_is_needed_names_its_parent(copy, capsys, script):
    int8 = f"{FOLDER}/baseline_int8.pt"
    error = fails(capsys, copy, script, "--smoke", "--force", "--checkpoint", int8)
    assert "takes fp32" in error and "baseline_fp32" in error


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("prune_finetune", ("--sparsity", "1"), "outside [0, 1)"),
        ("prune_finetune", ("--sparsity", "-0.1"), "outside [0, 1)"),
        ("prune_finetune", ("--sparsity", "nan"), "outside [0, 1)"),
        ("prune_finetune", ("--sparsity", "half"), "--sparsity"),
        ("prune_finetune", ("--criterion", "magic"), "layer-rank"),
        ("prune_finetune", ("--epochs", "0"), "at least 1"),
        ("train_baseline", ("--epochs", "0"), "at least 1"),
        ("train_baseline", ("--epochs", "-3"), "at least 1"),
        ("train_baseline", ("--batch-size", "0"), "at least 1"),
        (
            "train_baseline",
            "--batch-size 1 --smoke --network mobilenet_v1_025 --input-size 3 32 32".split(),
            "two images or more",
        ),
        ("train_baseline", ("--run", "edge"), "another purpose"),
        ("train_baseline", ("--batch-size", "-256"), "at least 1"),
        ("train_baseline", ("--learning-rate", "nan"), "above 0"),
        ("train_baseline", ("--seed", "-1"), "outside"),
        ("train_baseline", ("--seed", str(2**31)), "outside"),
        ("prune_finetune", ("--epochs", "-1"), "at least 1"),
        ("prune_finetune", ("--batch-size", "0"), "at least 1"),
        ("prune_finetune", ("--sparsity", "0.50001"), "hundredth"),
        ("train_baseline", ("--device", "tpu"), "cpu"),
        ("quantize", ("--engine", "magic"), "qnnpack"),
        ("quantize", ("--calibration-images", "0"), "at least 1"),
        ("evaluate", ("--device", "tpu"), "cpu"),
        ("evaluate", ("--no-such-flag",), "--help"),
        ("export_edge", ("--images", "0"), "at least 1"),
    ],
)
def test_arguments_out_of_range(workdir, capsys, script, arguments, message):
    assert message in fails(capsys, workdir, script, *arguments)


NETS = """
from torch import nn

def net(part, outputs):
    return nn.Sequential(part, nn.Flatten(), nn.Linear(3 * 32 * 32, outputs))

def silu():
    return net(nn.SiLU(), 10)

def seven():
    return net(nn.ReLU(), 7)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--network", "nets.py:silu"), "0 = SiLU(): it runs silu, which is not supported"),
        (("--network", "nets.py:seven"), "7 outputs, the data have 10 classes"),
        (("--network", "nets.py:Absent"), "nets.py defines no Absent; it defines net, silu"),
        (("--network", "resnet9"), "no network of that name; give edgecnn, resnet8"),
        (("--input-size", 3, 4, 4), "cannot take an image of (3, 4, 4): block3.pool = MaxPool2d"),
        (("--weights", "foreign.pt"), "foreign.pt does not fit the network: it lacks block1.conv"),
        (("--network", "resnet8", "--weights", "gone.pt"), "gone.pt is missing; --weights takes"),
        (("--data", "photos"), "one class only, cat"),
    ],
)
def test_what_cannot_be_trained_ends_before_training(
    workdir, tmp_path_factory, capsys, recwarn, monkeypatch, arguments, message
):
    monkeypatch.setattr("train_baseline.fit", lambda *_: pytest.fail("trained"))
    nets = tmp_path_factory.mktemp("nets") / "nets.py"  # elsewhere: Python may cache it there
    nets.write_text(NETS)
    arguments = [str(word).replace("nets.py", str(nets)) for word in arguments]
    torch.save({"fc.weight": torch.zeros(2, 2)}, "foreign.pt")
    for split in ("train", "test"):
        (workdir / f"photos/{split}/cat").mkdir(parents=True)
        (workdir / f"photos/{split}/cat/1.png").write_text("no picture")
    sample = () if "--data" in arguments else ("--smoke",)
    assert message in fails(capsys, workdir, "train_baseline", *sample, *arguments)
    assert not recwarn.list  # they would stand above the one line


def test_cuda_where_there_is_none(workdir, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in fails(capsys, workdir, "train_baseline", "--smoke", "--device", "cuda")


def test_resume_with_other_arguments_is_refused(copy, capsys):
    state = {"recipe": {"epochs": 7}, "source": {}, "model": {}, "optimizer": {}, "history": []}
    torch.save(state, copy / FOLDER / "baseline_seed5_fp32.resume.pt")
    error = fails(capsys, copy, "train_baseline", "--smoke", "--seed", 5)
    assert "was written with epochs 7" in error
    run_main("train_baseline", "--smoke", "--epochs", 1, "--seed", 5, "--force")


def test_resume_of_another_start_begins_anew(copy, capsys):
    (copy / FOLDER / "baseline_fp32.pt").unlink()
    (copy / "results/smoke/baseline_fp32.json").unlink()
    path = copy / FOLDER / "baseline_fp32.resume.pt"
    recipe = {**vars(Recipe(1, 256, 0.2, 0, "other images")), "start": "other images"}
    torch.save({"recipe": recipe, "source": {}, "model": {}, "optimizer": {}, "history": []}, path)
    run_main("train_baseline", "--smoke", "--epochs", 1)
    assert "belongs to another start" in capsys.readouterr().out
    assert not path.exists()


def test_resume_on_another_machine_is_refused_and_loses_nothing(workdir, capsys, monkeypatch):
    real, epochs = train_epoch, []

    def stop_after_one(*arguments):
        if epochs:
            raise RuntimeError("stopped")
        epochs.append(real(*arguments))
        return epochs[-1]

    command = ("train_baseline", "--smoke", "--epochs", 2)
    with monkeypatch.context() as stopping, pytest.raises(RuntimeError, match="stopped"):
        stopping.setattr("edgecnn.train.train_epoch", stop_after_one)
        run_main(*command)
    threads = torch.get_num_threads()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch, "get_num_threads", lambda: threads + 1)
        error = fails(capsys, workdir, *command)
    assert f"was written with threads {threads}, and here it is threads {threads + 1}" in error
    run_main(*command)
    assert "resuming after epoch 1 of 2" in capsys.readouterr().out


def test_damaged_resume_file(copy, capsys):
    (copy / FOLDER / "baseline_seed5_fp32.resume.pt").write_bytes(b"torn")
    error = fails(capsys, copy, "train_baseline", "--smoke", "--seed", 5)
    assert "--force starts from the beginning" in error


@pytest.mark.parametrize(
    "script",
    ["train_baseline", "quantize", "prune_finetune", "evaluate", "plot_pareto", "export_edge"],
)
def test_unwritable_output_folder_is_found_before_the_work(copy, capsys, script):
    # A file where the folder should be refuses every user, root included.
    metrics = (copy / "results/smoke/metrics.json").read_bytes()
    shutil.rmtree(copy / "results/smoke")
    (copy / "results/smoke").write_bytes(metrics)
    error = fails(capsys, copy, script, "--smoke")
    assert "cannot write" in error or script == "plot_pareto"


def test_full_disk_during_training_leaves_what_was_there(copy):
    """A real limit on the size of files stands in for the full disk: the long step must survive it."""
    before = snapshot(copy)
    command = [sys.executable, str(REPOSITORY / "train_baseline.py"), "--smoke", "--force"]
    limit = 1_000_000  # bytes; the state after an epoch takes five times as much
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: cannot write ") and process.stderr.count("\n") == 1
    assert snapshot(copy) == before


def test_failed_write_leaves_the_old_file_and_no_half_written_one(workdir):
    path = workdir / "results.json"
    path.write_text("old")
    with pytest.raises(UserError, match="No space left"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [file.name for file in workdir.iterdir()] == ["results.json"]
    assert path.read_text() == "old"


def test_one_run_never_writes_into_anothers_folder(copy, capsys):
    assert "different folders" in fails(
        capsys, copy, "train_baseline", "--smoke", "--run", "reference"
    )
    assert "not a name" in fails(capsys, copy, "train_baseline", "--run", "../elsewhere")
    before = snapshot(copy / "checkpoints/smoke").keys()
    shutil.copytree(copy / "checkpoints/smoke", copy / "checkpoints/mine")
    run_main("evaluate", "--inspect", "checkpoints/mine/baseline_fp32.pt")
    assert snapshot(copy / "checkpoints/smoke").keys() == before


def test_two_files_of_one_name(copy, capsys):
    shutil.copytree(copy / FOLDER, copy / "other")
    files = (f"{FOLDER}/baseline_fp32.pt", "other/baseline_fp32.pt")
    before = snapshot(copy)
    with pytest.raises(SystemExit) as stop:
        run_main("evaluate", "--smoke", *files)
    assert stop.value.code == 2 and "have one name" in capsys.readouterr().err
    assert snapshot(copy) == before


def test_files_given_to_evaluate_are_printed_and_not_written(copy, capsys):
    before = snapshot(copy)
    run_main("evaluate", "--smoke", f"{FOLDER}/baseline_fp32.pt")
    assert "baseline_fp32" in capsys.readouterr().out and snapshot(copy) == before


def test_a_variant_measured_on_other_images_is_not_dropped_in_silence(copy, capsys):
    (copy / FOLDER / "pruned_50_int8.pt").unlink()
    path = copy / "results/smoke/metrics.json"
    path.write_text(path.read_text().replace('"test_images": 130', '"test_images": 129'))
    error = fails(capsys, copy, "evaluate", "--smoke")
    assert "pruned_50_int8" in error and "--force" in error
    run_main("evaluate", "--smoke", "--force")
    assert "pruned_50_int8" not in path.read_text()
    assert "pruned_50_int8" not in (path.parent / "layers.json").read_text()


def test_figures_that_another_wrote_are_not_taken_for_the_step_s(copy, capsys):
    path = copy / "results/smoke/metrics.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([rows[0] | {"accuracy_percent": 99.0}, *rows[1:]]))
    run_main("evaluate", "--smoke", "--docs")
    run_main("evaluate", "--smoke")
    assert "is not the file that this step wrote" in capsys.readouterr().out
    assert "99.0" not in path.read_text()
    path.write_text(json.dumps([*rows, rows[0]]))
    (copy / FOLDER / f"{rows[0]['variant']}.pt").unlink()
    assert f"{rows[0]['variant']} twice" in fails(capsys, copy, "evaluate", "--smoke")


def test_a_damaged_table_of_figures_can_be_made_again(copy, capsys):
    path = copy / "results/smoke/metrics.json"
    path.write_text("<<<<<<< ours\n" + path.read_text())
    assert f"deleting {path.relative_to(copy)}" in fails(capsys, copy, "evaluate", "--smoke")
    path.unlink()
    run_main("evaluate", "--smoke")


def test_a_checkpoint_s_run_is_the_same_by_whatever_path(copy, capsys):
    (copy / "checkpoints/smoke").rename(copy / "checkpoints/mine")
    again = ("--calibration-images", 64, "--force")
    (copy / "checkpoints/mine").rename(copy / "elsewhere")
    (copy / "checkpoints/mine").symlink_to(copy / "elsewhere")
    for folder in ("checkpoints/mine", copy / "checkpoints/mine", "results/../checkpoints/mine"):
        run_main("quantize", "--checkpoint", Path(folder) / "baseline_fp32.pt", *again)
        assert "checkpoints/mine/baseline_int8.pt" in capsys.readouterr().out
    assert not (copy / "checkpoints/baseline_int8.pt").exists()


def test_validation_figures_of_weights_that_saw_the_images_are_refused(copy, capsys):
    path = f"{FOLDER}/baseline_fp32.pt"
    for script, arguments in (
        ("evaluate", (path,)),
        ("prune_finetune", ("--checkpoint", path)),
    ):
        assert "validation images" in fails(capsys, copy, script, "--holdout", *arguments)


def test_unknown_variant_names_are_welcome(copy, capsys):
    shutil.copy(copy / FOLDER / "baseline_int8.pt", copy / FOLDER / "my own (v2).pt")
    run_main("evaluate", "--smoke")
    assert "my own (v2)" in (copy / "results/smoke/table_all.md").read_text()
