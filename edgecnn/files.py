"""Paths, variant names, user errors and atomic files. Imports no torch, so plots start at once."""

import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from edgecnn.records import plain_problem, row_problem
from edgecnn.text import is_name, one_line

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CRITERION = "l1-normalized"  # left out of a variant's name, like seed 0
NAME_PATTERN = re.compile(
    r"(?P<method>baseline|control|pruned_(?P<percent>\d+(\.\d+)?)(_(?P<criterion>[a-z][a-z0-9-]*?))?)"
    r"(_seed(?P<seed>\d+))?_(?P<precision>fp32|int8)"
)


MADE_BY = "python evaluate.py"  # metrics.json
LARGEST_JSON_BYTES = 64 * 2**20
HEADLINE = ("baseline", "control", "pruned_50")  # the methods that every table and picture names


class UserError(Exception):
    """A mistake the user can mend: printed as one line on stderr, exit code 2."""


def discard(stream_number: int) -> None:
    """Send what is still buffered for a stream that takes no more nowhere, or exiting would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream_number)


def user_errors_exit_2(main):
    """Wrap a script's main(): what a user causes ends in one clear line instead of a traceback.

    So does what the machine refuses: an OSError (a name too long, a full disk behind the output).
    """

    def stop(reason: str, code: int = 2):
        with contextlib.suppress(OSError):
            print(one_line(reason), file=sys.stderr, flush=True)
        sys.exit(code)

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        if sys.stderr is None:  # closed: nothing can be said, and its number must not be reused
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if sys.stdout is None:
            stop("error: the standard output is closed; send it somewhere, such as >/dev/null")
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()  # a full disk behind it shows here, not after the exit code
        except UserError as error:
            stop(f"error: {error}")
        except KeyboardInterrupt:
            stop("stopped; what was finished is kept", 130)
        except BrokenPipeError:  # the reader of our output, such as head, has seen enough
            discard(1)
        except OSError as error:
            if error.filename is None:
                discard(1)
            where = error.filename or "the output"
            stop(f"error: cannot use {where}: {error.strerror or error}")

    return wrapped


def checkpoints_dir(run: str = "") -> Path:
    """`checkpoints/`, or the run's own folder in it (`smoke`, `reference`)."""
    return Path("checkpoints") / run


def results_dir(run: str = "") -> Path:
    """`results/`, or the run's own folder in it (`smoke`, `reference`)."""
    return Path("results") / run


def variant_name(method: str, precision: str, criterion: str = DEFAULT_CRITERION, seed: int = 0):
    """One naming scheme: `baseline_fp32`, `control_seed1_int8`, `pruned_50_l1_seed2_int8`.

    method is `baseline`, `control` or `pruned_<percent>`.
    """
    parts = [method]
    if method.startswith("pruned") and criterion != DEFAULT_CRITERION:
        parts.append(criterion)
    if seed:
        parts.append(f"seed{seed}")
    return "_".join([*parts, precision])


def is_headline(variant: str) -> bool:
    """Whether a variant is one that tables and pictures always name, of whatever seed."""
    match = NAME_PATTERN.fullmatch(variant)
    return match is not None and match["method"] in HEADLINE


def cannot_write(path: Path, error: OSError) -> UserError:
    """The one message for a folder that is unwritable or full."""
    reason = error.strerror or error
    return UserError(
        f"cannot write {path}: {reason}; free space or run where the folder is writable"
    )


@contextlib.contextmanager
def atomic_path(path: Path):
    """Yield a temporary path beside `path`; it replaces `path` only when the block succeeds.

    Raises UserError when the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".partial-{path.name}.", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        os.chmod(temporary, 0o644)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_writable(*folders: Path) -> None:
    """Raise UserError now, not after the work, when a file could not be written to a folder."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise cannot_write(folder, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; raises UserError when it cannot."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """Write strict JSON (no NaN) atomically; raises UserError when it cannot."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


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
    rows = read_table(path, MADE_BY, needed, optional)
    if not rows:
        raise UserError(f"{path} is not a list of variants, or an empty one; run: {MADE_BY}")
    return rows


def lowest_seed_rows(rows: list[dict]) -> list[dict]:
    """The rows of the lowest seed: those that the table, the picture and a budget compare."""
    first = min(row.get("seed", 0) for row in rows)
    return [row for row in rows if row.get("seed", 0) == first]
