"""What the shell and the machine can get wrong: one line on stderr, exit code 2, never a traceback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, fails, run_main, snapshot

from edgecnn.cells import markdown_table
from edgecnn.deploy import ethos_u, tools
from edgecnn.deploy.c_source import host_compiler
from edgecnn.errors import UserError, user_errors_exit_2
from edgecnn.files import read_json, write_json
from edgecnn.text import is_name, markdown_cell, one_line, picture_text
from simulate_hardware import exported

RESULTS = REPOSITORY / "results/reference"
NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_too_little_memory_ends_in_one_line(error, capsys):
    @user_errors_exit_2
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "--batch-size" in said and said.count("\n") == 1


def test_another_runtime_error_is_a_programming_error():
    @user_errors_exit_2
    def main():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        main()


@pytest.fixture
def folder(workdir):
    """A current folder with a few measured rows in results/."""
    (workdir / "results").mkdir()
    rows = json.loads((RESULTS / "metrics.json").read_text())[:3]
    (workdir / "results/metrics.json").write_text(json.dumps(rows))
    for name in ("layers.json", "break_even.json"):
        shutil.copy(RESULTS / name, workdir / "results")
    return workdir


def shell(command: str, **environment) -> subprocess.CompletedProcess:
    """A command line in which $PY stands for Python and $HOUSE for the repository."""
    known = {"PY": sys.executable, "HOUSE": str(REPOSITORY), **environment}
    return subprocess.run(
        ["bash", "-c", command], env=os.environ | known, capture_output=True, text=True
    )


BUDGET = "$PY $HOUSE/evaluate.py --budget accuracy=50"


@pytest.mark.parametrize("command", [BUDGET, "$PY $HOUSE/plot_pareto.py"])
def test_closed_stdout(folder, command):
    before = snapshot(folder)
    result = shell(f"{command} >&-")
    assert result.returncode == 2 and "standard output is closed" in result.stderr
    assert result.stderr.count("\n") == 1 and snapshot(folder) == before


@pytest.mark.parametrize("command", [BUDGET, "$PY $HOUSE/plot_pareto.py --break-even"])
def test_full_disk_behind_stdout(folder, command):
    result = shell(f"{command} >/dev/full")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr == "error: cannot use the output: No space left on device\n"


def test_closed_stderr_and_a_reader_that_leaves(folder):
    result = shell(f"{BUDGET} --run none 2>&-")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")
    result = shell(f"{BUDGET} | head -c 1; exit ${{PIPESTATUS[0]}}")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_notebooks_backend_does_no_harm(folder):
    result = shell("$PY $HOUSE/plot_pareto.py --break-even", **NOTEBOOK)
    assert (result.returncode, result.stderr) == (0, "")


def test_stdout_without_unicode(folder):
    rows = json.loads((folder / "results/metrics.json").read_text())
    rows = [row | {"variant": f"é{n}"} for n, row in enumerate(rows)]
    (folder / "results/metrics.json").write_text(json.dumps(rows))
    result = shell(BUDGET, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "") and r"\xe9" in result.stdout


def test_interrupt_ends_in_one_line(workdir):
    script = "import signal, time\nfrom edgecnn.errors import user_errors_exit_2\n"
    # a test runner in the background may have left the signal ignored
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "user_errors_exit_2(lambda: (print('ready', flush=True), time.sleep(60)))()"
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "stopped; what was finished is kept\n"


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("evaluate", ("--inspect", LONG), "no name for a table"),
        ("evaluate", (f"{LONG[:250]}.pt",), "no name for a table"),
        ("evaluate", ("--run", LONG), "not a name"),
        ("plot_pareto", ("--metrics", LONG), "name too long"),
        ("evaluate", ("b\udcff.pt",), "not UTF-8"),
        ("evaluate", ("a\nb.pt",), "control characters"),
        ("train_baseline", ("--epochs", "9" * 30), "above 1,000,000"),
        ("train_baseline", ("--epochs", "9" * 5000), "--epochs"),
        ("train_baseline", ("--epochs", "ten"), "ten is not a whole number"),
        ("train_baseline", ("--learning-rate", "fast"), "fast is not a number"),
        ("train_baseline", ("--batch-size", "9" * 30), "above 1,000,000"),
        ("quantize", ("--calibration-images", "9" * 30), "above 1,000,000"),
        ("export_edge", ("--images", "9" * 30), "above 1,000,000"),
        ("simulate_hardware", ("--images", "9" * 30), "above 1,000,000"),
        ("plot_pareto", ("--run", "../../x"), "not a name"),
        ("plot_pareto", ("--layers", "../../x"), "no such variant"),
    ],
)
def test_absurd_arguments(folder, capsys, script, arguments, message):
    error = fails(capsys, folder, script, *arguments)
    assert message in error and len(error) < 1200


def test_a_file_beside_the_runs_never_leads_out_of_them(folder, capsys):
    assert "missing" in fails(capsys, folder, "quantize", "--checkpoint", "checkpoints/../a.pt")
    assert not (folder.parent / "results").exists()


def test_an_unbalanced_quote_in_cc(monkeypatch):
    monkeypatch.setenv("CC", 'gcc "')
    with pytest.raises(UserError, match="CC is no command line"):
        host_compiler()


def test_vela_imports_nothing_from_where_the_user_works(workdir, monkeypatch):
    (workdir / "numpy.py").write_text("open('executed', 'w')\nraise SystemExit(9)")
    seen = {}

    def spy(command, **kwargs):
        probe = [*command[: command.index("-m")], "-c", "import numpy"]
        seen["done"] = run(probe, **kwargs | {"capture_output": True})
        return subprocess.CompletedProcess(command, 1, "", "stopped")

    run = subprocess.run
    monkeypatch.setattr(tools.subprocess, "run", spy)
    (workdir / "out").mkdir()
    with pytest.raises(UserError, match="stopped"):
        ethos_u.run_vela(b"", "ethos-u55-128", workdir / "out")
    assert seen["done"].returncode == 0 and not list(workdir.rglob("executed"))


# ---- JSON and what is shown --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": [[[[[[[[[1]]]]]]]]]}', "nested too deeply"),
        ('{"a": NaN}', '"a" is nan'),
        ('{"a": 1e999}', '"a" is inf'),
        ('{"a": 1' + "0" * 400 + "}", '"a" is 1000'),
        ('{"a": 1' + "0" * 5000 + "}", "limit"),
        (r'{"a": "\ud800"}', "not text that can be shown"),
        (r'{"a": "\u001b[31m"}', "not text that can be shown"),
        (r'{"\u0000": 1}', "a key is not text"),
        (b"\xff", "decode"),
    ],
)
def test_json_that_cannot_be_right(tmp_path, content, problem):
    path = tmp_path / "a.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match="not readable JSON") as caught:
        read_json(path, "a step")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "command"),
    [
        ("layers.json", {"macs_nonzero": "many"}, ("--layers", "baseline_int8")),
        ("layers.json", {"variant": [1]}, ("--layers", "baseline_int8")),
        ("layers.json", {"layer": "a\nb"}, ("--layers", "baseline_int8")),
        ("layers.json", {"variant": "../../x"}, ("--layers", "../../x")),
        ("break_even.json", {"m4_dense_instructions": None}, ("--break-even",)),
        ("break_even.json", {"zeros_percent": "7"}, ("--break-even",)),
        ("metrics.json", {"test_set": 5}, ()),
        ("metrics.json", {"test_set": "x\x02"}, ()),
        ("metrics.json", {"precision": [1]}, ()),
        ("metrics.json", {"variant": "a\ud800b"}, ()),
        ("metrics.json", {"seed": True}, ()),
        ("metrics.json", {"m4_flash_bytes": "many"}, ("--budget", "flash_kib=1")),
    ],
)
def test_wrong_values_in_json(folder, capsys, name, change, command):
    path = folder / "results" / name
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row | change for row in rows]))
    error = fails(capsys, folder, "plot_pareto", *command)
    assert name in error and "make it again with" in error


@pytest.mark.parametrize(
    "change", [{"tflite_bytes": "many"}, {"accuracy_percent": 101}, {"parity_images": [1]}, None]
)
def test_wrong_values_in_the_json_of_an_artifact(tmp_path, change):
    (tmp_path / "a.tflite").write_bytes(b"")
    right = json.loads((RESULTS / "edge/baseline_int8.json").read_text())
    write_json(tmp_path / "a.json", right)
    assert exported(tmp_path, "a", right["checkpoint_sha256"])[0] is None  # of another file
    write_json(tmp_path / "a.json", right | change if change else [right])
    with pytest.raises(UserError, match="a.json: .*python export_edge.py"):
        exported(tmp_path, "a", right["checkpoint_sha256"])


def test_dollars_are_no_mathematics(folder, capsys):
    for name in ("metrics.json", "layers.json"):
        path = folder / "results" / name
        rows = [
            row | {"variant": "$x^$", "test_set": "$x^$", "layer": f"$y^{n}$"}
            for n, row in enumerate(json.loads(path.read_text())[:3])
        ]
        if name == "metrics.json":  # in which no name stands twice
            rows = [row | {"variant": f"$x^{n}$"} for n, row in enumerate(rows)]
        path.write_text(json.dumps(rows))
    run_main("plot_pareto", "--budget", "accuracy=50")
    run_main("plot_pareto", "--layers", "$x^$")
    assert (folder / "results/layers_$x^$.svg").exists()


def test_text_is_escaped_where_it_is_shown():
    assert markdown_cell("a | b <!-- [c](d) `e`") == r"a \| b &lt;!-- \[c\](d) \`e\`"
    table = markdown_table(["A", "B"], [["x | y", "<!-- end -->"]])
    assert len(table.splitlines()) == 3 and "<!--" not in table
    assert picture_text("$x^$") == r"\$x^\$"
    assert one_line("a\nb\x1b[31m\ud800") == r"a b\x1b[31m\ud800"
    assert len(one_line("x" * 10**6)) < 1100
    assert is_name("my own (v2)") and is_name("é")
    assert not any(map(is_name, ("", " ", "a/b", "a\nb", "\u202e", "x" * 201, None, 7)))
