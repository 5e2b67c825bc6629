"""Seeded mutations of files: each works or ends in one line on stderr, exit code 2, nothing written."""

import contextlib
import copy as copying
import io
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_main

from edgecnn.checkpoint import float_module, load_checkpoint
from edgecnn.deploy.plan import planned
from edgecnn.errors import user_errors_exit_2
from edgecnn.figures import layers_of
from edgecnn.files import read_table
from edgecnn.graph import from_plain, to_plain
from edgecnn.hardware import read_break_even, with_hardware
from edgecnn.quantized import int8_module
from edgecnn.tables import blocks

# numpy's overflows would stand above the one line
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
REFERENCE = REPOSITORY / "checkpoints/reference"
RESULTS = REPOSITORY / "results/reference"
PLAIN = (None, True, -1, 0, 1, 2.5, 1e308, 10**30, float("nan"), float("inf"), -(2**63), "", " ")
PLAIN += (
    "x",
    "7",
    "a\nb",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "| <!-- -->",
    "$x^$",
    "../../x",
    "y" * 9999,
)
PLAIN += ([], {}, [[[[[[[[[[1]]]]]]]]]], {"a": [1]}, [None], "\u202e", {"": {}})
NODES = ("conv", "add", "relu6", "batch_norm", "flatten", "fc1", "input", "none", "forward", "int8")
NODES += (2, 3, 32, 255, 65_536, 1e-9, 1e9, [1, 1], [2, 2], [7, 7], ["fc1"], ["input", "input"])
TENSORS = (
    torch.zeros(2, 2),
    torch.zeros(1).expand(10**5, 10**5),
    torch.zeros(0),
    torch.tensor(1.0),
)


def place(value, chance: random.Random):
    """(container, key) somewhere in nested dictionaries and lists, near the root as often as deep."""
    while True:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not (isinstance(value[key], dict | list) and value[key]) or chance.random() < 0.3:
            return value, key
        value = value[key]


def mutate(value, chance: random.Random, pool: tuple) -> None:
    """Change one to three places of nested data: another value, another key, one less, one twice."""
    for _ in range(chance.randint(1, 3)):
        if not value:
            return
        container, key = place(value, chance)
        what = chance.choice(("replace", "replace", "replace", "remove", "move", "swap"))
        if what == "replace":
            container[key] = copying.deepcopy(chance.choice(pool))
        elif what == "remove":
            del container[key]
        elif what == "move" and isinstance(container, dict):
            container[chance.choice(("", "x", "a; b", "\x00", "variant", "y" * 300))] = (
                container.pop(key)
            )
        else:
            other, where = place(value, chance)
            with contextlib.suppress(IndexError, KeyError):
                container[key], other[where] = other[where], container[key]


def damage(content: bytes, chance: random.Random) -> bytes:
    """The bytes with some flipped, cut off, doubled or overwritten."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.choice(
            (chance.randrange(len(content)), len(content) - chance.randint(1, 2000))
        )
        what = chance.choice(("flip", "cut", "insert", "zero"))
        if what == "flip":
            changed[place % len(changed)] ^= 1 << chance.randrange(8)
        elif what == "cut":
            del changed[max(place % len(changed), 1) :]
        elif what == "insert":
            changed[place:place] = chance.randbytes(chance.randint(1, 64))
        else:
            changed[place : place + 16] = bytes(16)
    return bytes(changed)


def survives(capsys, folder, use) -> bool:
    """Whether `use()` works; else it has to refuse in one line, and leave the folder as it was."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    try:
        user_errors_exit_2(use)()
        return True
    except SystemExit as stop:
        error = capsys.readouterr().err
        if stop.code == 1:  # a budget that nothing fits is an answer
            return True
        assert stop.code == 2 and error.startswith("error: ")
        assert error.count("\n") == 1 and len(error) < 1200
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        return False


def use_checkpoint(path) -> None:
    """What the steps do with a file: load it, build and run its network, lay it out for C."""
    checkpoint = load_checkpoint(path)
    assert to_plain(from_plain(checkpoint["graph"])) == checkpoint["graph"]
    origin = checkpoint["provenance"]
    assert " ".join(f"{k}={v}" for k, v in origin["arguments"].items()).isprintable()
    assert origin["method"].partition("_") and origin["seed"] >= 0
    if checkpoint["precision"] == "int8":
        int8_module(checkpoint)
        planned(checkpoint, "dense")
    else:
        images = torch.zeros(1, *checkpoint["graph"]["input_shape"])
        logits = float_module(checkpoint).eval()(images)
        assert logits.shape == (1, len(checkpoint["data"]["classes"]))


def parts(checkpoint: dict, chance: random.Random) -> list:
    """The places whose mutations find each kind of check: deep ones would be rare by chance."""
    node = chance.choice(checkpoint["graph"]["nodes"])
    found = [checkpoint, checkpoint["graph"], node, node["options"], checkpoint["data"]]
    if "quantization" in checkpoint:
        quantization = checkpoint["quantization"]
        one = quantization["activations"][node["name"]]
        found += [quantization, quantization["activations"], one, quantization["weights"]]
    return found


@pytest.mark.parametrize(
    "name", ["headline/baseline_fp32", "reference/pruned_95_energy_int8", "resnet8/baseline_int8"]
)
def test_mutated_values_of_a_checkpoint(tmp_path, capsys, name):
    original = torch.load(REFERENCE.parent / f"{name}.pt", weights_only=True)
    chance, path, kept = random.Random(name), tmp_path / Path(name).with_suffix(".pt").name, 0
    for _ in range(150):
        checkpoint = copying.deepcopy(original)
        pool = chance.choice((NODES, PLAIN + NODES + TENSORS))
        mutate(chance.choice(parts(checkpoint, chance)), chance, pool)
        torch.save(checkpoint, path)
        kept += survives(capsys, tmp_path, lambda: use_checkpoint(path))
    assert 0 < kept < 60


@pytest.mark.parametrize("name", ["baseline_int8", "pruned_95_energy_int8"])
def test_damaged_bytes_of_a_checkpoint(tmp_path, capsys, name):
    content = (REFERENCE / f"{name}.pt").read_bytes()
    chance, path = random.Random(name), tmp_path / f"{name}.pt"
    for _ in range(40):
        path.write_bytes(damage(content, chance))
        survives(capsys, tmp_path, lambda: use_checkpoint(path))


def json_uses(folder) -> dict:
    """What reads each JSON file: as the steps do, in the folder `folder`."""
    metrics = json.loads((RESULTS / "metrics.json").read_text())

    def hardware():
        rows = read_table(folder / "hardware.json", "a step", {"checkpoint_sha256": None})
        blocks(with_hardware(metrics, rows), [], everything=True)

    return {
        "metrics.json": lambda: run_main("evaluate", "--budget", "flash_kib=300", "accuracy=80"),
        "hardware.json": hardware,
        "layers.json": lambda: layers_of(folder / "layers.json", "pruned_50_int8"),
        "break_even.json": lambda: read_break_even(folder),
    }


@pytest.mark.parametrize("name", json_uses(REPOSITORY))
def test_mutated_json(workdir, capsys, name):
    folder = workdir / "results"
    folder.mkdir()
    use, text = json_uses(folder)[name], (RESULTS / name).read_text()
    rows, chance = json.loads(text)[-6:], random.Random(name)
    for number in range(100):
        changed = copying.deepcopy(rows)
        mutate(changed, chance, PLAIN)
        content = json.dumps(changed).encode()
        if number % 4 == 0:
            content = damage(text.encode(), chance)
        (folder / name).write_bytes(content)
        with contextlib.redirect_stdout(io.StringIO()):
            survives(capsys, folder, use)


def test_pictures_of_mutated_rows(workdir, capsys):
    folder = workdir / "results"
    folder.mkdir()
    rows, chance = json.loads((RESULTS / "metrics.json").read_text())[:5], random.Random(1)
    kept = 0
    for _ in range(5):
        changed = copying.deepcopy(rows)
        for row in changed:  # what is drawn as text
            row["test_set"] = chance.choice(("$x^$", "a_b^c", r"\$ \frac", "<&>", "%s {x}"))
        mutate(changed, chance, PLAIN)
        (folder / "metrics.json").write_text(json.dumps(changed))
        with contextlib.redirect_stdout(io.StringIO()):
            kept += survives(capsys, folder, lambda: run_main("plot_pareto"))
        for picture in folder.glob("*.[ps][nv]g"):
            picture.unlink()
    assert kept
