"""Command-line pieces that several scripts share. Imports no torch, so --help answers at once."""

import argparse

from edgecnn.files import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr and exit code 2, like every other user error."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def positive_int(text: str) -> int:
    """An integer above zero, or argparse's error."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def nonnegative_int(text: str) -> int:
    """An integer of zero or more, or argparse's error."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive_float(text: str) -> float:
    """A finite number above zero, or argparse's error."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def fraction(text: str) -> float:
    """A number in [0, 1), or argparse's error."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1)")
    return value


def add_run_arguments(parser: Parser) -> None:
    """Where a script reads and writes: --run, --smoke, --data-dir."""
    parser.add_argument(
        "--run",
        default="",
        metavar="NAME",
        help="work in checkpoints/NAME/ and results/NAME/ (default: checkpoints/ and results/)",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="seconds-long trial on the small sample in tests/data, in the folders named smoke/",
    )
    parser.add_argument(
        "--data-dir",
        default="data",
        metavar="DIR",
        help="where CIFAR-10 is cached, about 185 MB (default: data)",
    )


def add_training_arguments(parser: Parser, recipe: dict) -> None:
    """The flags of the shared training loop; `recipe` gives the defaults."""
    parser.add_argument(
        "--epochs",
        type=positive_int,
        help=f"passes over the training images (default: {recipe['epochs']}; 2 with --smoke)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=recipe["batch_size"],
        help="images a step (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_float,
        default=recipe["learning_rate"],
        help="peak of the one-cycle schedule (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=nonnegative_int,
        default=0,
        help="seeds weights, order and augmentation; a CPU run repeats bit for bit (default: 0)",
    )
    parser.add_argument(
        "--holdout",
        action="store_true",
        help="train on 45,000 images and report on the other 5,000, in the folders named holdout/",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run of the same arguments; starts anew where there is none",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train (default: auto = cuda if there is one)",
    )


def run_name(args: argparse.Namespace) -> str:
    """The folder name that the arguments ask for, below checkpoints/ and results/."""
    implied = "smoke" if args.smoke else "holdout" if getattr(args, "holdout", False) else ""
    return args.run or implied
