"""Networks and pictures of a user's own through all seven steps, as their owner would run them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import foreign_networks
import numpy as np
import pytest
import torch
from conftest import fails, run_main
from foreign_networks import FOREIGN
from PIL import Image

import simulate_hardware
from edgecnn.checkpoint import dataset_of, load_checkpoint
from edgecnn.data import normalize
from edgecnn.deploy.c_source import C_NAMES
from edgecnn.deploy.cortex_m import NotInstalled
from edgecnn.deploy.integer import exact_logits
from edgecnn.files import sha256
from edgecnn.quantized import quantize_images

# Name -> (class, the form of its data, multiplications an inference). By layer: inputs x outputs x
# kernel x positions, a depthwise layer's inputs 1.
OWN = {
    "lenet": ("LeNet", "npz", 6 * 25 * 24**2 + 6 * 16 * 25 * 8**2 + 256 * 32 + 32 * 4),
    "vgg_like": (
        "VGGLike",
        "split folders",
        3 * 8 * 25 * 16**2 + 8 * 8 * 25 * 16**2 + 8 * 16 * 9 * 4**2 + 64 * 16 + 16 * 4,
    ),
    "mobilenet_v2_like": (
        "MobileNetV2Like",
        "class folders",
        (3 * 8 * 9 + (8 * 16 + 16 * 9 + 16 * 8) + 8 * 24) * 10**2
        + (24 * 9 + 24 * 12 + 12 * 36 + 36 * 9 + 36 * 12) * 5**2
        + 12 * 4,
    ),
    "odd_resnet": (
        "OddResNet",
        "float npz",
        8 * 15 * 14 * 18
        + 2 * 8 * 8 * 9 * 7 * 9
        + (8 * 12 * 9 + 12 * 12 * 9 + 8 * 12) * 4 * 5
        + 12 * 4,
    ),
    "linear_only": ("LinearOnly", "npz", 64 * 24 + 24 * 16 + 16 * 4),
}
EMULATED = ("mobilenet_v2_like",)  # QEMU and its compilers take ten seconds a network
CLASSES = ("bars down", "bars across", "café ü", 'a "dot"')  # names that C has to escape
TRAIN, TEST = 24, 8  # pictures a class
MARKS = ("MLPerf", "CIFAR", "CMSIS")  # what stands beside figures of CIFAR-10 alone


def picture(kind: int, shape, rng) -> np.ndarray:
    """uint8 (H, W, C) with something to learn: bars down or across, a bright half, a dot."""
    channels, height, width = shape
    image = rng.integers(0, 90, (height, width, channels))
    phase = rng.integers(4)
    if kind == 0:
        image[:, phase::4] += 120
    elif kind == 1:
        image[phase::4] += 120
    elif kind == 2:
        image[: height // 2] += 120
    else:
        image[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] += 150
    return image.astype(np.uint8)


def pictures(shape, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` of each class: uint8 (N, H, W, C), labels (N,)."""
    rng, labels = np.random.default_rng(seed), np.tile(np.arange(len(CLASSES)), count)
    return np.stack([picture(label, shape, rng) for label in labels]), labels


def write_data(kind: str, shape) -> str:
    """The pictures in one of the forms that --data takes; its path."""
    x, y = pictures(shape, TRAIN, 0)
    x_test, y_test = pictures(shape, TEST, 1)
    if kind.endswith("npz"):
        if kind == "float npz":
            x, x_test = ((values / 255).astype(np.float32) for values in (x, x_test))
        if shape[0] == 1:
            x, x_test = x[..., 0], x_test[..., 0]  # (N, H, W)
        arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
        np.savez("mine.npz", **arrays, classes=np.array(CLASSES))
        return "mine.npz"
    splits = {"train": (x, y), "test": (x_test, y_test)}
    if kind == "class folders":  # a fifth of them becomes the test set
        splits = {".": (np.concatenate([x, x_test] * 2), np.concatenate([y, y_test] * 2))}
    for split, (images, labels) in splits.items():
        for at, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = Path("mine", split, CLASSES[label])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(folder / f"{at}.png")
    return "mine"


def not_here(*_):
    raise NotInstalled("left out in this test")


def seven_steps(name: str, monkeypatch) -> None:
    """Run them in the current folder; the network's own file is gone after the first."""
    kind, form, _ = OWN[name]
    _, shape, _ = FOREIGN[name]
    shutil.copy(foreign_networks.__file__, "nets.py")
    own = ("--network", f"nets.py:{kind}", "--data", write_data(form, shape))
    small = ("--run", "mine", "--epochs", 1, "--batch-size", 16)
    run_main("train_baseline", *own, "--input-size", *shape, *small)
    Path("nets.py").unlink()
    del sys.modules["network_file_nets"]
    run_main("quantize", "--run", "mine")
    run_main("prune_finetune", "--sparsity", 0.5, *small)
    run_main("quantize", "--run", "mine")
    run_main("evaluate", "--run", "mine")
    run_main("plot_pareto", "--run", "mine")
    run_main("export_edge", "--run", "mine", "--images", 25)
    if name not in EMULATED:
        monkeypatch.setattr(simulate_hardware, "cortex_m_row", not_here)
    run_main("simulate_hardware", "--run", "mine", "--images", 2)
    run_main("evaluate", "--run", "mine")
    assert "network_file_nets" not in sys.modules


def classified(folder: Path, image: np.ndarray) -> str:
    """What the exported C, compiled by itself, prints for uint8 (H, W, C)."""
    height, width, channels = image.shape
    kind = b"P6" if channels == 3 else b"P5"
    picture = folder / "picture.pnm"
    picture.write_bytes(kind + f" {width} {height} 255\n".encode() + image.tobytes())
    subprocess.run("cc *.c", shell=True, cwd=folder, check=True)
    return subprocess.check_output(["./a.out", picture.name], cwd=folder, text=True)


@pytest.mark.parametrize("name", OWN)
def test_all_seven_steps_take_a_network_that_nobody_here_wrote_for_this(
    name, workdir, monkeypatch, capsys
):
    seven_steps(name, monkeypatch)
    results, checkpoints = Path("results/mine"), Path("checkpoints/mine")
    rows = {row["variant"]: row for row in json.loads((results / "metrics.json").read_text())}
    assert rows.keys() == {f"{m}_{p}" for m in ("baseline", "pruned_50") for p in ("fp32", "int8")}
    for row in rows.values():
        assert row["macs"] == OWN[name][-1]
        assert row["test_images"] >= 25 and row["test_set"].startswith("test set of mine")
        assert row["checkpoint_sha256"] == sha256(Path(row["checkpoint"]))
    pruned = rows["pruned_50_fp32"]
    assert pruned["weights_nonzero"] == pruned["weights"] - round(0.5 * pruned["weights"])
    zeros = {
        key: load_checkpoint(checkpoints / f"pruned_50_{key}.pt")["tensors"]
        for key in ("fp32", "int8")
    }
    for key, weight in zeros["int8"].items():  # a zero stays one
        assert weight.ndim == 1 or not weight[zeros["fp32"][key] == 0].any()

    for variant in ("baseline_int8", "pruned_50_int8"):
        row, agreed = rows[variant], json.loads((results / f"edge/{variant}.json").read_text())
        assert agreed["c_vs_exact_integers_bit_exact_images"] == agreed["parity_images"] == 25
        assert agreed["operators_max_difference_lsb"] <= 1
        assert row["u55_128_operators_on_npu_percent"] == 100
        assert (row.get("m4_instructions", 0) > row["macs_nonzero"] / 4) == (name in EMULATED)
        checkpoint, folder = load_checkpoint(row["checkpoint"]), results / "edge" / variant
        assert {path.name for path in folder.iterdir()} == set(C_NAMES)
        _, shape, _ = FOREIGN[name]
        image = picture(2, shape, np.random.default_rng(9))
        said = classified(folder, image).splitlines()
        own = normalize(torch.from_numpy(image).permute(2, 0, 1)[None], dataset_of(checkpoint))
        (logits,) = exact_logits(checkpoint, quantize_images(checkpoint, own)).int()
        output = list(checkpoint["quantization"]["activations"].values())[-1]
        labels = dataset_of(checkpoint).classes  # of folders in the order of the alphabet
        assert sorted(labels) == sorted(CLASSES)
        for line, label, logit in zip(said, labels, logits.tolist(), strict=True):
            assert label in line and line.startswith("->") == (logit == logits.max().item())
            value = (logit - output["zero_point"] + 128) * output["scale"]
            assert float(line.split()[-1]) == pytest.approx(value, abs=1e-3)

    shown = (results / "table_all.md").read_text() + (results / "table.md").read_text()
    shown += (results / "optimization_results.svg").read_text()
    assert not [mark for mark in MARKS if mark in shown]
    capsys.readouterr()
    run_main("evaluate", "--run", "mine", "--budget", "board=stm32f405", "accuracy=20")
    assert "Best: " in capsys.readouterr().out


# ---- smaller things that an owner runs into --------------------------------------------------------


def test_given_weights_say_how_well_they_know_the_pictures(workdir, capsys):
    own = ("--network", "nets.py:LinearOnly", "--data", write_data("npz", (1, 8, 8)))
    shutil.copy(foreign_networks.__file__, "nets.py")
    torch.manual_seed(0)
    network = foreign_networks.LinearOnly()
    torch.save(network.state_dict(), "mine.pt")
    torch.save(network, "whole.pt")
    run_main("train_baseline", *own, "--run", "given", "--weights", "mine.pt")
    assert "% of 96 training pictures" in capsys.readouterr().out
    stored = load_checkpoint(Path("checkpoints/given/baseline_fp32.pt"))["tensors"]
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in stored.items())
    run_main("train_baseline", *own, "--run", "few", "--epochs", 2)
    assert "note: few steps in all, 2: give a smaller --batch-size" in capsys.readouterr().out
    for run, *given in (("few", "--weights", "mine.pt"), ("given",)):
        error = fails(capsys, workdir, "train_baseline", *own, "--run", run, *given)
        assert "was made with" in error and "weights" in error
    said = fails(capsys, workdir, "train_baseline", *own, "--run", "no", "--weights", "whole.pt")
    assert "torch.save(model.state_dict(), FILE)" in said
    for idle in (("--epochs", 3), ("--headline",), ("--label-smoothing", 0.05)):
        given = ("--run", "no", "--weights", "mine.pt", *idle)
        error = fails(capsys, workdir, "train_baseline", *own, *given)
        assert f"not trained: leave out {idle[0]}" in error


def test_a_run_of_ones_own_may_hold_images_out(workdir, capsys):
    own = ("--network", "nets.py:LinearOnly", "--data", write_data("npz", (1, 8, 8)))
    shutil.copy(foreign_networks.__file__, "nets.py")
    run_main("train_baseline", *own, "--run", "mine", "--epochs", 1, "--holdout")
    run_main("evaluate", "--run", "mine", "--holdout")
    (row,) = json.loads(Path("results/mine/metrics.json").read_text())
    assert row["test_set"] == "validation split" and row["test_images"] == 4 * 2
    assert "made with holdout True" in fails(
        capsys, workdir, "train_baseline", *own, "--run", "mine", "--epochs", 1
    )
