"""Shared by the tests: the scripts on the path, a way to run one, and one smoke chain for all."""

import contextlib
import hashlib
import importlib
import shutil
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from edgecnn.names import NAME_PATTERN  # noqa: E402


def run_main(script: str, *arguments) -> None:
    """Run a script's main() in this process, as `python <script>.py <arguments>` would."""
    saved = sys.argv
    sys.argv = [f"{script}.py", *map(str, arguments)]
    try:
        importlib.import_module(script).main()
    finally:
        sys.argv = saved


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """An empty current folder: the scripts' paths are relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """A folder in which the README's six commands ran with --smoke. Read only: tests share it."""
    folder = tmp_path_factory.mktemp("smoke")
    with contextlib.chdir(folder):
        run_main("train_baseline", "--smoke")
        run_main("quantize", "--smoke")
        run_main("prune_finetune", "--smoke")
        run_main("quantize", "--smoke", "--checkpoint", "checkpoints/smoke/pruned_50_fp32.pt")
        run_main("evaluate", "--smoke")
        run_main("plot_pareto", "--smoke")
    return folder


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The C kernels alone, built on this machine as for a network."""
    from edgecnn.deploy.c_source import compile_host

    return compile_host([], tmp_path_factory.mktemp("kernels") / "kernels.so")


@pytest.fixture
def copy(smoke, workdir):
    """A copy of the smoke chain's files that a test may spoil."""
    shutil.copytree(smoke / "checkpoints", workdir / "checkpoints")
    shutil.copytree(smoke / "results", workdir / "results")
    return workdir


def changed(path, target, change):
    """A checkpoint at `target` that differs from the one at `path`."""
    import torch

    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, target)
    return target


def row(variant, accuracy, size_bytes, energy, **fields):
    """A made-up row of metrics.json, as far as comparing needs it."""
    name = NAME_PATTERN.fullmatch(variant)
    return {
        "variant": variant,
        "method": name["method"],
        "precision": name["precision"],
        "seed": int(name["seed"] or 0),
        "accuracy_percent": accuracy,
        "size_bytes": size_bytes,
        "relative_energy": energy,
        "parent": None,
        "parent_sha256": None,
        "checkpoint_sha256": variant,
        **fields,
    }


def hits_of(rows):
    """Made-up images: the first ones right, as many of 10,000 as the accuracy says."""
    counts = {r["variant"]: round(100 * r["accuracy_percent"]) for r in rows}
    return {name: [i < count for i in range(10_000)] for name, count in counts.items()}


def same_bits(a, b):
    """Whether two state_dicts are equal to the bit, names and all."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def digest(tensors) -> str:
    """SHA-256 of a state_dict: names and bytes, in its order."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode() + tensor.numpy(force=True).tobytes())
    return found.hexdigest()


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, folder, script, *arguments) -> str:
    """Run a script that must refuse: its one line of stderr; no file may have changed."""
    before = snapshot(folder)
    with pytest.raises(SystemExit) as stop:
        run_main(script, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    assert snapshot(folder) == before
    return error
