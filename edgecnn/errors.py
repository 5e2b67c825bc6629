"""What a user can mend: one line on stderr and exit code 2 instead of a traceback."""

import contextlib
import functools
import os
import re
import sys

from edgecnn.text import one_line

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


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
        # torch has an error of its own for each device.
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
                raise
            stop("error: not enough memory; a training needs less with a smaller --batch-size")

    return wrapped
