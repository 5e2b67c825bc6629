"""Compilers, Vela and the emulator: one way to run an outside program, and to say that it failed."""

import subprocess
from pathlib import Path

from edgecnn.errors import UserError

TIMEOUT_S = 120  # a compiler and Vela end in seconds


def run_tool(
    command: list[str],
    *,
    name: str = "",
    hint: str = "",
    timeout_s: float = TIMEOUT_S,
    folder: Path | None = None,
) -> subprocess.CompletedProcess:
    """A program that ended, with whatever exit code, run in `folder` and without a terminal.

    Raises UserError, which calls it `name`, where it does not end in time or cannot run; `hint` says
    how to get it.
    """
    name, hint = name or command[0], hint and f"; {hint}"
    try:
        return subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise UserError(f"{name} is not installed{hint}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be run ({error.strerror}){hint}") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{name} did not finish within {timeout_s:g} s; try again on a quieter machine"
        ) from None


def output_of(command: list[str], hint: str = "") -> str:
    """What a program prints. Raises UserError as run_tool does, and with its words where it fails."""
    done = run_tool(command, hint=hint)
    if done.returncode:
        raise UserError(f"{command[0]} failed with exit code {done.returncode}: {complaint(done)}")
    return done.stdout


def first_line(command: list[str]) -> str:
    """The first line of what a program prints, such as its version."""
    return next(iter(output_of(command).splitlines()), "it printed nothing")


def complaint(done: subprocess.CompletedProcess) -> str:
    """The first lines of what a program that failed said, as one."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return " | ".join(" ".join(line.split()) for line in lines[:6]) or "it said nothing"
