"""One notion of done: a result stands while arguments, parents and code are those that made it.

A step writes its files and, last, a record: a JSON with its `arguments` and the SHA-256 of the
sources (`code`), of the files it read (`parents`) and of those it wrote (`outputs`). Of a variant
the record is results/<run>/<variant>.json; other steps have results/<run>/steps/<step>.json. Asked
again, the step compares: nothing new, and it is kept; other arguments, or another checkpoint from
outside the run, are refused; other parents or code, or a lost file, and it is made anew. Imports no
torch.
"""

import ast
import functools
import hashlib
import json
import re
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from edgecnn.errors import UserError
from edgecnn.files import json_bytes, require_writable, sha256, write_files
from edgecnn.names import (
    COMMITTED_RUNS,
    REPOSITORY,
    STEPS,
    checkpoints_dir,
    criterion_name,
    results_dir,
    run_of_results,
)

# Modules that check, name and store: a change of them makes nothing anew, nor of what they import.
PLUMBING = ("checkpoint", "cli", "describe", "errors", "files", "names", "step")
DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


def git_commit() -> str | None:
    """The repository's commit, `+dirty` appended when tracked sources differ; None outside git.

    What runs write does not count: a run of several steps would spoil its own later ones.
    """
    try:
        git = ["git", "-C", str(REPOSITORY)]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        sources = ["--", ".", ":!results", ":!checkpoints"]
        command = [*git, "diff", "--quiet", "HEAD", *sources]
        dirty = subprocess.run(command, capture_output=True).returncode
        return commit + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


COMMIT = git_commit()  # at the start: the sources may change while a run trains


def imported(path: Path) -> set[Path]:
    """The repository's modules that a source file imports, wherever in it, besides PLUMBING."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {REPOSITORY / f"{name.replace('.', '/')}.py" for name in names}
    return {path for path in paths if path.is_file() and path.stem not in PLUMBING}


@functools.cache
def source_digests(script: str, *patterns: str) -> dict[str, str]:
    """The code a step depends on: its script, what that imports, and files by patterns: SHA-256."""
    found, todo = set(), {REPOSITORY / script}
    while todo:
        path = todo.pop()
        found.add(path)
        todo |= imported(path) - found
    found |= {path for pattern in patterns for path in REPOSITORY.glob(pattern)}
    return {path.relative_to(REPOSITORY).as_posix(): sha256(path) for path in sorted(found)}


@dataclass
class Step:
    """A step's result: where its record lies and what has to be the same for it to stand."""

    run: str
    record: Path
    arguments: dict  # those that decide the result; others under the same name are refused
    parents: tuple[Path, ...]
    outputs: tuple[Path, ...]
    code: dict[str, str]  # source_digests(); versions of outside tools belong here too
    force: bool = False
    defaults: dict = field(default_factory=dict)  # of arguments that older records lack
    pictures: dict[str, str] = field(default_factory=dict)  # data.picture_digests(), as of parents
    digests: dict[str, str] = field(default_factory=dict)  # of the parents, when work begins

    @property
    def resume_path(self) -> Path:
        """Where a training leaves its state, until the result is written."""
        return self.outputs[0].with_suffix(".resume.pt")

    @property
    def named_parents(self) -> dict[str, Path]:
        """The parents by file name; where two share one by run and file name, or by path."""
        paths = dict.fromkeys(self.parents)  # a parent may teach its own child
        for name in (lambda p: p.name, lambda p: f"{p.parent.name}/{p.name}", str):
            named = {name(path): path for path in paths}
            if len(named) == len(paths):
                break
        return named

    def digest_of(self, parent: Path) -> str:
        """The digest of a parent when work began."""
        return next(
            self.digests[name] for name, path in self.named_parents.items() if path == parent
        )

    def kept(self) -> bool:
        """Whether there is nothing to do; says so, or why the result is made anew.

        Raises UserError, before any work, where the result was made with other arguments or from
        another file than one of another run that is given now, or cannot be written.
        """
        self.require_same_arguments()
        self.digests = {n: sha256(path) for n, path in self.named_parents.items() if path.is_file()}
        self.digests |= {name: digest for name, digest in self.pictures.items() if digest}
        reason, note = ("--force", "") if self.force else self.judge()
        if reason is None:
            shown = self.outputs[0] if self.outputs[0].exists() else self.record
            print(f"kept: {shown}" + f"; {note}" * bool(note))
            return True
        if reason:
            print(f"making {self.outputs[0]} anew: {reason}")
        if self.force:
            self.resume_path.unlink(missing_ok=True)
        require_writable(*{path.parent for path in (*self.outputs, self.record)})
        return False

    def require_same_arguments(self) -> None:
        """Raise UserError, saying what differs, where other arguments made the result."""
        record = self.read()
        if record is None or self.force:
            return
        # of old records some stand beside the arguments
        theirs = self.defaults | record | recorded_arguments(record)
        theirs = {key: criterion_name(value) for key, value in theirs.items()}
        ours = json.loads(json.dumps(self.arguments, default=str))  # as the record has them
        differ = [
            k for k in ours if k in theirs and one_spelling(theirs[k]) != one_spelling(ours[k])
        ]
        if differ:
            made = ", ".join(f"{key} {theirs[key]}" for key in differ)
            raise UserError(
                f"{self.outputs[0]} was made with {made}; give the same, or --force to replace it"
            )

    def read(self) -> dict | None:
        """The record; None where there is none that can be read."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) else None

    def judge(self) -> tuple[str | None, str]:
        """(why the result has to be made, empty where there is none, None to keep it; what to add).

        A committed run is kept whatever code made it, and without the files left out of git.
        """
        committed, record = self.run in COMMITTED_RUNS, self.read()
        gone = [path for path in self.outputs if not path.is_file()]
        if record is None and not (committed and not gone):
            return "", ""
        known = [(record or {}).get(key) for key in ("code", "parents", "outputs")]
        if all(isinstance(value, dict) for value in known):
            code, parents, outputs = known
            changed = self.changed_parents(parents, committed)
            other = [
                name for name in {**code, **self.code} if code.get(name) != self.code.get(name)
            ]
            spoiled = [p for p in self.outputs if p.is_file() and outputs.get(p.name) != sha256(p)]
        else:  # of old files that name some digests, but no code
            old = [p for p in (self.record, *self.outputs) if p.suffix == ".json" and p.is_file()]
            text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in old)
            digests = set(DIGEST.findall(text))
            changed = [
                name
                for name, digest in self.digests.items()
                if digests and name.endswith(".pt") and digest not in digests
            ]
            other, spoiled = ["no record of it"], []
        what = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        if changed:
            self.require_own(changed, record)
            return f"{', '.join(changed)} changed", ""
        if spoiled:
            return f"{spoiled[0]} is not the file that this step wrote", ""
        if not committed and (other or gone):
            return (f"other code ({what})" if other else f"{gone[0]} is gone"), ""
        notes = [f"made by other code ({what})"] if other else []
        notes += [f"{gone[0]} is not here"] if gone else []
        return None, "; ".join([*notes, "--force makes it anew"]) if notes else ""

    def require_own(self, changed: list[str], record: dict | None) -> None:
        """Raise UserError where a changed parent is a checkpoint from elsewhere than the record's.

        Where it lay, it was made anew; another place may hold quite another network of that name.
        """
        if record is None:
            return
        given = recorded_arguments(record)
        named = [
            Path(str(given[key])).parent for key in ("checkpoint", "teacher") if given.get(key)
        ]
        known = {folder.resolve() for folder in (checkpoints_dir(self.run), *named)}
        for name, path in self.named_parents.items():
            elsewhere = path.resolve().parent not in known
            if name in changed and path.suffix == ".pt" and elsewhere:
                raise UserError(
                    f"{self.outputs[0]} was made from another file than {path}; give another --run, "
                    "or --force to replace it"
                )

    def changed_parents(self, recorded: dict, committed: bool) -> list[str]:
        """Names of parents that are not those recorded; one that is not here cannot have changed."""
        recorded = self.pictures | recorded  # which older records lack
        changed = [name for name, digest in self.digests.items() if recorded.get(name) != digest]
        dropped = recorded.keys() - self.named_parents.keys() - self.pictures.keys()
        return changed + ([] if committed else sorted(dropped))

    def commit(self, contents: dict[Path, bytes], fields: dict | None = None) -> None:
        """Write the outputs and, last, the record: all of them or none.

        `fields` precede what judge() needs; by default arguments, commit and date. Raises UserError
        when a file cannot be written.
        """
        record = fields or {
            "arguments": self.arguments,
            "commit": COMMIT,
            "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        record = record | {
            "code": self.code,
            "parents": self.digests,
            "outputs": {p.name: hashlib.sha256(data).hexdigest() for p, data in contents.items()},
        }
        write_files(contents | {self.record: json_bytes(record)})
        self.resume_path.unlink(missing_ok=True)

    def amend(self, contents: dict[Path, bytes]) -> None:
        """Write outputs that are derived anew from what the result holds; its record follows.

        Code and arguments stay those that made it. Raises UserError when a file cannot be written.
        """
        record = self.read() or {}
        parts = [record.get(key) for key in ("outputs", "parents")]
        if all(isinstance(part, dict) for part in parts):
            outputs, parents = parts
            for path, data in contents.items():  # one that another wrote stays so
                if path.is_file() and outputs.get(path.name) == sha256(path):
                    outputs[path.name] = hashlib.sha256(data).hexdigest()
            parents |= {name: sha256(path) for name, path in self.named_parents.items()}
            contents = contents | {self.record: json_bytes(record)}
        write_files(contents)


def recorded_arguments(record: dict) -> dict:
    """What a record has under `arguments`; {} of old ones that have text there."""
    return record["arguments"] if isinstance(record.get("arguments"), dict) else {}


def one_spelling(value):
    """An argument's value as it compares: a folder is the same with a slash behind it."""
    return value.rstrip("/") if isinstance(value, str) else value


def variant_step(
    run: str, name: str, script: str, arguments, parents=(), force=False, defaults=None
) -> Step:
    """The step that makes one variant: its checkpoint, and its JSON for a record.

    Raises UserError where the checkpoint is a parent of itself.
    """
    record, output = results_dir(run) / f"{name}.json", checkpoints_dir(run) / f"{name}.pt"
    if output.resolve() in (path.resolve() for path in parents):
        raise UserError(f"{output} would replace what it is made from; give another --run")
    code = source_digests(script)
    return Step(run, record, arguments, tuple(parents), (output,), code, force, defaults or {})


def results_step(
    folder: Path, name: str, code, arguments, parents, outputs: tuple[str, ...], force=False
) -> Step:
    """A step that writes `outputs` into results/ or a run's folder in it, and a record beside."""
    run = run_of_results(folder)
    files = tuple(folder / output for output in outputs)
    record = folder / STEPS / f"{name}.json"
    return Step(run, record, arguments, tuple(parents), files, code, force)
