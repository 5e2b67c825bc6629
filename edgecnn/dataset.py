"""What is known of a data set besides its tensors: it travels in the checkpoint as plain values."""

import re
from dataclasses import asdict, dataclass

import torch

from edgecnn import cifar10
from edgecnn.names import AUGMENTATIONS
from edgecnn.split import Shape

KINDS = ("cifar10", "sample", "folder", "npz")
MAX_SIDE = 4096  # pixels
MAX_NAME = 100  # characters of a class name: it is printed, and stands in generated C
MAX_TEXT = 4096  # characters of a path
MAX_CLASSES = 1000


@dataclass(frozen=True)
class DataSet:
    """All that the pipeline needs to know of a data set besides its tensors."""

    name: str  # for people: CIFAR-10, or the folder's or file's own
    kind: str  # one of KINDS
    source: str  # the text of --data that finds it again
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # a channel, in units of 0..1, four decimals
    std: tuple[float, ...]
    shape: Shape
    fingerprint: str  # of the whole training split, see split.fingerprint
    augment: str  # how each training picture is varied, one of AUGMENTATIONS

    def to_dict(self) -> dict:
        """Plain values, for a checkpoint or a JSON."""
        fields = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, values) -> "DataSet":
        """What to_dict gave. Raises ValueError, naming the entry, for anything else."""
        if not isinstance(values, dict) or set(values) != set(cls.__dataclass_fields__):
            raise ValueError(f"a data set needs {', '.join(cls.__dataclass_fields__)}, no more")
        for key in ("name", "source"):
            if not plain_text(values[key], MAX_TEXT):
                raise ValueError(f"the data set's {key} is no plain text")
        if not isinstance(values["kind"], str) or values["kind"] not in KINDS:
            raise ValueError(f"the data set's kind is none of {', '.join(KINDS)}")
        if not (
            type(values["fingerprint"]) is str
            and re.fullmatch("[0-9a-f]{64}", values["fingerprint"])
        ):
            raise ValueError("the data set's fingerprint is no SHA-256")
        if values["augment"] not in AUGMENTATIONS:
            raise ValueError(f"the data set's augment is none of {', '.join(AUGMENTATIONS)}")
        for key in ("classes", "mean", "std", "shape"):
            if not isinstance(values[key], list | tuple):
                raise ValueError(f"the data set's {key} is no list")
        problem = shape_problem(values["shape"]) or classes_problem(values["classes"])
        if problem:
            raise ValueError(f"the data set's {problem}")
        for key, low in (("mean", 0), ("std", 1e-4)):
            numbers = values[key]
            if len(numbers) != values["shape"][0] or not all(
                type(number) is float and low <= number <= 1 for number in numbers
            ):
                raise ValueError(
                    f"the data set's {key} is no number from {low} to 1 for each channel"
                )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# Mean and standard deviation are what channel_statistics gives for the 50,000 training images.
CIFAR10 = DataSet(
    name="CIFAR-10",
    kind="cifar10",
    source="cifar10",
    classes=cifar10.CLASSES,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    shape=cifar10.SHAPE,
    fingerprint="f3120a8fa253dbdad16aeebfcbcdbe65951c58226061082bf1b61dde3add92d7",
    augment="both",
)


def plain_text(value, longest: int) -> bool:
    """Whether a value is text of printable characters, neither empty nor too long."""
    return type(value) is str and 0 < len(value) <= longest and value.isprintable()


def shape_problem(shape) -> str | None:
    """What is wrong with an input shape (C, H, W), or None."""
    if len(shape) != 3 or not all(type(size) is int for size in shape):
        return "shape is not three integers"
    if shape[0] not in (1, 3):
        return f"shape has {shape[0]} channels; supported: 1 (grey) or 3 (colour)"
    if not all(1 <= side <= MAX_SIDE for side in shape[1:]):
        return f"shape has a side outside 1 to {MAX_SIDE} pixels"
    return None


def classes_problem(classes) -> str | None:
    """What is wrong with the names of classes, or None."""
    if not 2 <= len(classes) <= MAX_CLASSES:
        return f"classes are {len(classes)}; supported: 2 to {MAX_CLASSES}"
    for name in classes:
        if not plain_text(name, MAX_NAME):
            return (
                f"class name {ascii(name):.60} is not of 1 to {MAX_NAME} printable characters; "
                "rename it"
            )
    if len(set(classes)) != len(classes):
        return "classes have one name twice"
    return None


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 (N, C, H, W), in units of 0..1.

    Over all pixels, divided by their number, and rounded to four decimals. The sums are integers,
    hence exact and the same in any order. Raises ValueError for a channel of one value.
    """
    levels, count = torch.arange(256), images.numel() // images.shape[1]
    histogram = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in images.split(max(1, 2**22 // images[0].numel())):
        for channel, values in enumerate(part.unbind(1)):
            histogram[channel] += values.flatten().bincount(minlength=256)
    total = (histogram * levels).sum(1), (histogram * levels.square()).sum(1)
    mean = total[0].double() / count
    variance = total[1].double() / count - mean.square()
    if not (variance > 1e-6).all():
        raise ValueError("every pixel of a channel is the same in all training pictures")
    statistics = (mean / 255).tolist(), (variance.sqrt() / 255).tolist()
    means, deviations = (tuple(round(v, 4) for v in values) for values in statistics)
    return means, tuple(max(value, 1e-4) for value in deviations)
