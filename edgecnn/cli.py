"""Command-line pieces that several scripts share. Imports no torch."""

import argparse
import re
import sys
from pathlib import Path

from edgecnn.errors import UserError
from edgecnn.names import AUGMENTATIONS, EDGE, FRONT, STEPS, run_of_checkpoint
from edgecnn.text import UNSHOWABLE

SMOKE_EPOCHS = 2
TEACHER_SHARE = 0.7  # of the loss, where there is a teacher
MOST = 1_000_000  # of epochs, images, a batch: more is a slip of the finger


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr and exit code 2, like every other user error."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")

    def parse_args(self, *args, **kwargs):
        for word in sys.argv[1:]:
            if UNSHOWABLE.search(word):  # it would reach JSON, tables and pictures
                self.error(f"{word!a} is not UTF-8 text without control characters; rename it")
        return super().parse_args(*args, **kwargs)


def number(text: str, kind: type) -> int | float:
    """Text as an int or a float, or argparse's error."""
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text} is not a {what}") from None


def positive_int(text: str) -> int:
    """An integer from 1 to a million, or argparse's error."""
    value = number(text, int)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"{text} is above {MOST:,}")
    return value


TAKEN = (EDGE, STEPS, FRONT)  # below results/, where the default run and joint tables lie


def run_folder(text: str) -> str:
    """The name of a run's folder below checkpoints/ and results/, or argparse's error."""
    if text and not re.fullmatch(r"[\w-]{1,100}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a name of letters, digits, _ and -")
    if text in TAKEN:
        raise argparse.ArgumentTypeError(f"{text} is a folder of results/ with another purpose")
    return text


def seed(text: str) -> int:
    """An integer in [0, 2^31), or argparse's error."""
    value = number(text, int)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 2^31)")
    return value


def positive_float(text: str) -> float:
    """A finite number above zero, or argparse's error."""
    value = number(text, float)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def share(text: str) -> float:
    """A number in [0, 1), or argparse's error."""
    value = number(text, float)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1)")
    return value


def sparsity(text: str) -> float:
    """A share in [0, 1) whose percent has at most two decimals (it names files), or an error."""
    value = share(text)
    if value != round(value, 4):
        raise argparse.ArgumentTypeError(f"{text} is finer than a hundredth of a percent")
    return value


def add_force_argument(parser: Parser) -> None:
    """--force, of every script whose result is kept when nothing changed."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="make the result anew, from the beginning, whatever is there already",
    )


def add_run_arguments(parser: Parser, several: str = "") -> None:
    """Where a script reads and writes: --run, --smoke, --data-dir.

    several: what the script makes of several runs; then `run` is a list, see run_names.
    """
    parser.add_argument(
        "--run",
        type=run_folder,
        default=[""] if several else "",
        nargs="+" if several else None,
        metavar="NAME",
        help="work in checkpoints/NAME/ and results/NAME/ (default: checkpoints/ and results/)"
        + f"; several: {several}" * bool(several),
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
        help="where CIFAR-10 (about 185 MB) or the prepared pictures are cached (default: data)",
    )


def add_data_arguments(parser: Parser) -> None:
    """What a network is trained on and how it is varied: --data, --input-size, --augment."""
    parser.add_argument(
        "--data",
        default="cifar10",
        metavar="SOURCE",
        help="cifar10, a folder of pictures (train/<class>/* and test/<class>/*, or <class>/* alone), "
        "or an .npz with x_train, y_train, x_test, y_test (default: cifar10)",
    )
    parser.add_argument(
        "--input-size",
        type=positive_int,
        nargs=3,
        metavar=("C", "H", "W"),
        help="channels (1 or 3), rows and columns to which each picture is brought (default: those of a "
        "shipped network, of an .npz its own, else 3 32 32)",
    )
    parser.add_argument(
        "--augment",
        choices=AUGMENTATIONS,
        help="random changes of each training picture: flip left to right, crop after padding by an "
        "eighth of the side (default: both; crop for an .npz). No flip for digits, letters or signs",
    )


def data_source(args: argparse.Namespace) -> str:
    """The data that a command line asks for: --smoke's own sample, or --data.

    Raises UserError when it asks for both.
    """
    source = getattr(args, "data", "cifar10")
    if args.smoke and source != "cifar10":
        raise UserError("--smoke has a small sample of its own; leave out --data or --smoke")
    return "sample" if args.smoke else source


def parse_training_arguments(parser: Parser, recipe: dict, headline: dict) -> argparse.Namespace:
    """Add the flags of the shared training loop and parse them all.

    What the command line leaves open comes from `recipe`, or with --headline from `headline`, whose
    further entries become arguments too.
    """
    parser.add_argument(
        "--headline",
        action="store_true",
        help="the longer recipe of `make headline`; the flags below still overrule it",
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        help=f"passes over the training images (default: {recipe['epochs']}; "
        f"{headline['epochs']} with --headline; {SMOKE_EPOCHS} with --smoke)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        help=f"images a step (default: {recipe['batch_size']})",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_float,
        help=f"peak of the one-cycle schedule (default: {recipe['learning_rate']})",
    )
    parser.add_argument(
        "--weight-decay",
        type=share,
        help=f"of SGD, in [0, 1) (default: {recipe['weight_decay']}; "
        f"{headline['weight_decay']} with --headline)",
    )
    parser.add_argument(
        "--label-smoothing",
        type=share,
        help=f"share of each label spread over all classes (default: {recipe['label_smoothing']})",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="CHECKPOINT",
        help="distillation: an FP32 checkpoint of any run and network on the same data, whose part of "
        f"the loss is {TEACHER_SHARE} (default: none; prune_finetune.py --headline: the baseline)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="seeds weights, order and augmentation; a CPU run repeats bit for bit (default: 0)",
    )
    parser.add_argument(
        "--holdout",
        action="store_true",
        help="train on nine tenths of each class's images and report on the others, in the folders "
        "named holdout/ unless --run names them",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train (default: auto = cuda if there is one)",
    )
    add_force_argument(parser)
    add_run_arguments(parser)
    args = parser.parse_args()
    chosen = headline if args.headline else recipe
    chosen = chosen | ({"epochs": SMOKE_EPOCHS} if args.smoke else {})
    chosen = chosen | ({"distillation": TEACHER_SHARE} if args.teacher else {})
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | chosen | given)


def run_names(args: argparse.Namespace, several: bool) -> list[str]:
    """The folder names of a script whose --run may take several.

    Raises UserError for more than one where not `several`, and as run_name does.
    """
    if len(args.run) > 1 and not several:
        raise UserError(f"--run {' '.join(args.run)}: this takes one run; give one")
    return [run_name(argparse.Namespace(**vars(args) | {"run": run})) for run in args.run]


def run_name(args: argparse.Namespace) -> str:
    """The folder name that the arguments ask for, below checkpoints/ and results/.

    Without --run, --smoke or --holdout a --checkpoint keeps its children in its own run's folder.
    Raises UserError when --run and --smoke ask for different folders.
    """
    implied = "smoke" if args.smoke else "holdout" if getattr(args, "holdout", False) else ""
    if args.smoke and args.run not in ("", implied):
        raise UserError(f"--run {args.run} and --smoke ask for different folders; give one")
    checkpoint = getattr(args, "checkpoint", None)
    if checkpoint and not (args.run or implied):
        return run_of_checkpoint(checkpoint) or ""
    return args.run or implied
