"""Shared by the tests: the scripts on the path, a way to run one, and one smoke chain for all."""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


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
