"""One notion of done: what stands is kept, what changed is made anew or refused, none is half done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, snapshot

from edgecnn.errors import UserError
from edgecnn.files import atomic_path, sha256, write_files
from edgecnn.names import COMMITTED_RUNS
from edgecnn.step import results_step, source_digests, variant_step

OUTPUTS = ("figures.json", "table.md")


@pytest.fixture
def make(workdir):
    """Make a step's result from in.txt where it does not stand: whether it was made."""
    (workdir / "in.txt").write_text("1")

    def run(
        folder="results",
        code="a",
        force=False,
        files=OUTPUTS,
        parents=("in.txt",),
        pictures=None,
        **given,
    ):
        given = given or {"images": 20, "smoke": False}
        paths = [Path(name) for name in parents]
        step = results_step(Path(folder), "show", {"show.py": code}, given, paths, files, force)
        step.pictures = pictures or {}
        if step.kept():
            return False
        contents = [f"{[p.read_text() for p in paths]} {name}".encode() for name in files]
        step.commit(dict(zip(step.outputs, contents, strict=True)))
        return True

    return run


def test_a_result_stands_until_something_that_made_it_changes(make, workdir, capsys):
    assert make() and not make()
    assert "kept: results/figures.json\n" in capsys.readouterr().out
    (workdir / "in.txt").write_text("2")
    assert make() and not make()
    assert "making results/figures.json anew: in.txt changed\n" in capsys.readouterr().out
    assert make(code="b") and not make(code="b")
    assert "anew: other code (show.py)\n" in capsys.readouterr().out
    assert make(code="b", force=True)
    assert make(code="b", parents=("in.txt", "results/table.md"))
    assert make(code="b")  # one parent fewer is a change too


def test_other_pictures_are_noticed_and_absent_ones_are_not(make, capsys):
    assert make() and not make(pictures={"test pictures": "1"})  # an older record has none
    assert make(pictures={"test pictures": "1"}, force=True)
    assert not make(pictures={"test pictures": "1"}) and not make(pictures={"test pictures": ""})
    assert make(pictures={"test pictures": "2"})
    assert "making results/figures.json anew: test pictures changed\n" in capsys.readouterr().out


def test_parents_of_one_name_are_told_apart(workdir):
    paths = [workdir / f"{clone}/checkpoints/a.pt" for clone in ("one", "other")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text(str(path))
    step = results_step(Path("results"), "show", {}, {}, paths, OUTPUTS)
    assert not step.kept()
    assert [step.digest_of(path) for path in paths] == [sha256(path) for path in paths]
    assert len(step.digests) == 2


@pytest.mark.parametrize("way", [Path, lambda path: Path(path).absolute()])
def test_a_variant_is_no_parent_of_itself_however_it_is_called(workdir, way):
    with pytest.raises(UserError, match="would replace what it is made from"):
        variant_step("mine", "a", "quantize.py", {}, [way("checkpoints/mine/a.pt")])


def test_a_folder_is_the_same_with_a_slash_behind_it(make):
    assert make(data="pictures/") and not make(data="pictures") and not make(data="pictures/")
    with pytest.raises(UserError, match="was made with data pictures/"):
        make(data="others")


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_lost_or_spoiled_file_is_made_again(make, workdir, name, capsys):
    assert make()
    whole = snapshot(workdir / "results")
    (workdir / "results" / name).unlink()
    assert make() and f"results/{name} is gone" in capsys.readouterr().out
    (workdir / "results" / name).write_text("half")
    assert make() and f"results/{name} is not the file that this step wrote" in (
        capsys.readouterr().out
    )
    assert {p: c for p, c in snapshot(workdir / "results").items() if p.name in OUTPUTS} == {
        p: c for p, c in whole.items() if p.name in OUTPUTS
    }


def test_other_arguments_are_refused_with_what_differs_and_nothing_changes(make, workdir):
    assert make()
    before = snapshot(workdir)
    with pytest.raises(UserError, match=r"figures.json was made with images 20; give the same"):
        make(images=30, smoke=False)
    assert snapshot(workdir) == before
    assert make(images=30, smoke=False, force=True) and not make(images=30, smoke=False)


def test_a_parent_that_is_not_here_cannot_have_changed(make, workdir):
    assert make()
    (workdir / "in.txt").unlink()
    assert not make()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"code": 1}', "{}"])
def test_a_record_that_says_nothing_is_no_record(make, workdir, text):
    assert make()
    (workdir / "results/steps/show.json").write_text(text)
    assert make() and not make()


def test_a_committed_run_is_kept_whatever_code_made_it_but_not_with_other_parents(
    make, workdir, capsys
):
    folder = "results/reference"
    assert make(folder) and not make(folder, code="b")
    assert "made by other code (show.py); --force makes it anew" in capsys.readouterr().out
    (workdir / folder / "table.md").unlink()  # as files that git leaves out
    assert not make(folder, code="b")
    assert "results/reference/table.md is not here" in capsys.readouterr().out
    (workdir / "in.txt").write_text("2")
    assert make(folder, code="b")


def test_a_committed_file_without_a_record_stands_by_the_digests_it_names(make, workdir, capsys):
    folder = workdir / "results/headline"
    parent = workdir / "net.pt"
    parent.write_text("weights")
    assert make("results/headline", parents=("net.pt",))
    digest = json.loads((folder / "steps/show.json").read_text())["parents"]["net.pt"]
    (folder / "steps/show.json").unlink()
    (folder / "figures.json").write_text(json.dumps([{"checkpoint_sha256": digest}]))
    assert not make("results/headline", parents=("net.pt",))
    assert "made by other code (no record of it)" in capsys.readouterr().out
    parent.write_text("other weights")
    assert make("results/headline", parents=("net.pt",))


def test_old_pair_stays_until_the_new_one_is_whole(make, workdir, monkeypatch):
    assert make()
    before = snapshot(workdir)
    write = Path.write_bytes

    def full(path, content):
        if "show.json" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(Path, "write_bytes", full)
        make(force=True)
    assert snapshot(workdir) == before and not make()


def test_files_are_replaced_in_order_the_record_last(workdir, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    write_files({Path("a.pt"): b"1", Path("b.json"): b"2", Path("c.json"): b"3"})
    assert order == ["a.pt", "b.json", "c.json"]


HOLD = """
import sys, time
from pathlib import Path
from edgecnn.files import atomic_path
with atomic_path(Path("result.json")) as path:
    path.write_text("half")
    print(path.name, flush=True)
    time.sleep(60)
"""


def test_left_overs_of_dead_writers_are_swept_and_those_of_living_ones_spared(workdir):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    partial = workdir / process.stdout.readline().strip()
    try:
        write_files({Path("other.json"): b"1"})
        assert partial.read_text() == "half"
    finally:
        process.kill()
        process.wait()
    assert partial.exists()
    with atomic_path(Path("third.json")) as path:
        path.write_text("3")
        assert not partial.exists() and path.exists()
    assert sorted(path.name for path in workdir.iterdir()) == ["other.json", "third.json"]


def test_the_code_of_a_step_is_what_it_imports_besides_plumbing():
    training = source_digests("train_baseline.py")
    assert {
        "train_baseline.py",
        "edgecnn/capture.py",
        "edgecnn/graph.py",
        "edgecnn/data.py",
    } <= training.keys()
    assert not training.keys() & {"edgecnn/cli.py", "edgecnn/step.py", "evaluate.py"}
    pruning = source_digests("prune_finetune.py")
    assert {"edgecnn/pruning.py", "mac_hooks.py"} <= pruning.keys()
    assert "firmware/linear.c" in source_digests("export_edge.py", "firmware/*.[ch]")
    assert all(training[name] == pruning[name] for name in training.keys() & pruning.keys())


def test_deciding_needs_no_torch():
    command = "import sys, edgecnn.step; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=REPOSITORY)


def test_the_runs_that_git_holds_are_those_kept_whatever_code_made_them():
    lines = (REPOSITORY / ".gitignore").read_text().split("\n")
    held = {line.split("/")[2] for line in lines if line.startswith("!/results/")}
    assert held == set(COMMITTED_RUNS)
