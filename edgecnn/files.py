"""Atomic writing and checked reading of text and JSON."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path

from edgecnn.errors import UserError
from edgecnn.names import command, criterion_name
from edgecnn.records import plain_problem, row_problem
from edgecnn.text import is_name

LARGEST_JSON_BYTES = 64 * 2**20


def cannot_write(path: Path, error: OSError) -> UserError:
    """The one message for a folder that is unwritable or full."""
    reason = error.strerror or error
    return UserError(
        f"cannot write {path}: {reason}; free space or run where the folder is writable"
    )


def sweep(folder: Path) -> None:
    """Delete the half-written files of dead writers; a living one holds the lock on its own."""
    for path in folder.glob(".partial-*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def locked_file(path: Path) -> tuple[int, Path]:
    """(its handle, a new file beside `path`), locked while the handle is open; sweep() spares it."""
    while True:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".partial-{path.name}.", suffix=path.suffix
        )
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):  # not swept before it was locked
            return handle, Path(name)
        os.close(handle)


@contextlib.contextmanager
def atomic_path(path: Path):
    """Yield a temporary path beside `path`; it replaces `path` only when the block succeeds.

    Raises UserError when the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    handle, temporary = None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        handle, temporary = locked_file(path)
        os.fchmod(handle, 0o644)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
            os.close(handle)


def write_files(contents: dict[Path, bytes]) -> None:
    """Write files so that all of the old ones stay until all of the new ones are whole.

    They are replaced in the order given. Raises UserError when one cannot be written.
    """
    for path in contents:  # found now, not after others were replaced
        if path.is_dir():
            raise cannot_write(path, OSError(errno.EISDIR, os.strerror(errno.EISDIR)))
    with contextlib.ExitStack() as stack:
        for path, content in reversed(contents.items()):  # the stack leaves the last one first
            stack.enter_context(atomic_path(path)).write_bytes(content)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file; raises UserError when it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def require_writable(*folders: Path) -> None:
    """Raise UserError now, not after the work, when a file could not be written to a folder."""
    for folder in folders:
        try:
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise cannot_write(folder, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; raises UserError when it cannot."""
    write_files({path: text.encode()})


def json_bytes(value) -> bytes:
    """Strict JSON (no NaN) as it stands in a file."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value) -> None:
    """Write strict JSON atomically; raises UserError when it cannot."""
    write_files({path: json_bytes(value)})


def read_json(path: Path, made_by: str):
    """Read JSON of plain values; raises UserError naming the step that makes the file otherwise."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise ValueError(f"it is larger than {LARGEST_JSON_BYTES:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        problem = plain_problem(value)
        if problem:
            raise ValueError(problem)
        return value
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it with: {made_by}") from None
    except RecursionError:
        reason = "it is nested too deeply"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path} is not readable JSON ({reason}); make it again with: {made_by}")


def read_record(path: Path, made_by: str, needed: dict) -> dict:
    """One object of JSON, checked as records.row_problem does; raises UserError."""
    record = read_json(path, made_by)
    problem = row_problem(record, needed)
    if problem:
        raise UserError(f"{path}: {problem}; make it again with: {made_by}")
    return record


def read_table(path: Path, made_by: str, needed: dict, optional: dict | None = None) -> list[dict]:
    """A list of rows of JSON, each checked as records.row_problem does; raises UserError."""
    rows = read_json(path, made_by)
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list of rows; make it again with: {made_by}")
    for count, row in enumerate(rows, start=1):
        problem = row_problem(row, needed, optional)
        if problem:
            name = row.get("variant") if isinstance(row, dict) else None
            name = f" ({name})" if is_name(name) else ""
            raise UserError(f"{path}: row {count}{name}: {problem}; make it again with: {made_by}")
    return rows


def read_rows(path: Path, needed: dict, optional: dict | None = None) -> list[dict]:
    """The rows of a metrics.json, at least one, with names and accuracies; raises UserError.

    needed, optional: key -> (low, high), between which its values must lie.
    """
    needed = {"variant": None, "accuracy_percent": (0, 100), **needed}
    made_by = command("evaluate", path.parent)
    rows = read_table(path, made_by, needed, optional)
    if not rows:
        raise UserError(f"{path} is not a list of variants, or an empty one; run: {made_by}")
    names = [row["variant"] for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{path} has {twice} twice; make it again with: {made_by}")
    return [row | {"criterion": criterion_name(row.get("criterion"))} for row in rows]


def rows_before(path: Path, read, *arguments) -> list[dict]:
    """What `read` finds in the file that a step wrote before, none without it; raises UserError."""
    try:
        return read(path, *arguments) if path.exists() else []
    except UserError as error:
        reason = str(error).partition("; ")[0]
        raise UserError(
            f"{reason}; it is damaged: --force or deleting {path} makes it anew"
        ) from None


def elsewhere(rows: list[dict], here: dict[str, str]) -> list[dict]:
    """Those rows whose checkpoint is not `here`, {variant: SHA-256}, by this name or another."""
    return [
        row
        for row in rows
        if row["variant"] not in here and row["checkpoint_sha256"] not in here.values()
    ]
