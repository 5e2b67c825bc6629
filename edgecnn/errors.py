"""What a user can mend: one line on stderr and exit code 2 instead of a traceback."""

import functools
import os
import sys


class UserError(Exception):
    """A mistake the user can mend: printed as one line on stderr, exit code 2."""


def user_errors_exit_2(main):
    """Wrap a script's main(): what a user causes ends in one clear line instead of a traceback."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped; what was finished is kept", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return wrapped
