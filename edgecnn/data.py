"""What a network is trained and judged on: CIFAR-10, a folder of pictures or an .npz, by one text.

`cifar10` and `sample` (its small part for --smoke) are names; anything else is a path (so `./sample`
is a folder). Whatever the source, a split is uint8 (N, C, H, W) images and int64 (N,) labels, and a
DataSet says the rest. Training never opens the test set.
"""

import functools
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from edgecnn import cifar10
from edgecnn.arrays import checksums, load_arrays
from edgecnn.cifar10 import load_sample
from edgecnn.dataset import (
    CIFAR10,
    MAX_TEXT,
    DataSet,
    channel_statistics,
    plain_text,
    shape_problem,
)
from edgecnn.errors import UserError
from edgecnn.names import TEST_SET
from edgecnn.pictures import LAYOUT, load_folder, names_and_sizes, resized, resized_split
from edgecnn.split import (
    Shape,
    Split,
    fingerprint,
    gibibytes,
    memory_bytes,
    printable,
    stratified,
)

HOLDOUT_ONE_IN = 10  # of each class; for CIFAR-10 the same 5,000 images in every run
CACHE_NAME = re.compile(r"(cifar10|pictures_.+)_(train|test)\.pt")
SUPPORTED = f"cifar10, a folder with {LAYOUT}, or an .npz with x_train, y_train, x_test, y_test"
# What augment is unless it is given. An .npz may hold digits or spectrograms, where a mirrored picture
# is another class or none; pictures in folders are taken for photographs.
AUGMENT = {"cifar10": "both", "sample": "both", "folder": "both", "npz": "crop"}
CROP_SHARE = 8  # a crop shifts by up to an eighth of the shorter side: 4 pixels at 32


# ---- loading -----------------------------------------------------------------------------------


def kind_of(source: str) -> str:
    """The kind of data that a --data text names; raises UserError when there is none such."""
    if source in ("cifar10", "sample"):
        return source
    path = Path(source)
    try:
        if path.is_dir():
            return "folder"
        if path.is_file() and path.suffix == ".npz":
            return "npz"
        found = "is neither a folder nor an .npz" if path.exists() else "does not exist"
    except OSError as error:  # such as a name that is too long
        found = f"cannot be read ({error.strerror})"
    raise UserError(f"--data {printable(source):.200} {found}; supported: {SUPPORTED}")


def require_cache_folder(data_dir: Path) -> None:
    """Raise UserError when --data-dir holds anything but this project's cache."""
    if not data_dir.exists():
        return
    try:
        names = sorted(path.name for path in data_dir.iterdir())
    except OSError as error:
        raise UserError(f"cannot read --data-dir {data_dir}: {error.strerror}") from None
    foreign = [n for n in names if not n.startswith(".") and not CACHE_NAME.fullmatch(n)]
    if foreign:
        raise UserError(
            f"--data-dir {data_dir} holds {printable(foreign[0])}, and is for this project's own "
            "cache alone: give it an empty or new folder; your own pictures go to --data"
        )


def read_split(
    source: str, split: str, data_dir: Path, shape: Shape | None
) -> tuple[tuple[str, ...], Split]:
    """The class names and the whole `train` or `test` split, brought to `shape`.

    Without a shape an .npz keeps its own, all else is 3x32x32. Raises UserError for what is missing,
    damaged or of no supported form.
    """
    kind, path, data_dir = kind_of(source), Path(source), Path(data_dir)
    problem = shape_problem(shape) if shape is not None else None
    if problem:
        raise UserError(f"--input-size: {problem}")
    if kind == "sample":
        images, labels = load_sample()[split == "test"]
        return CIFAR10.classes, (resized(images, shape or CIFAR10.shape), labels)
    require_cache_folder(data_dir)
    if kind == "folder":
        return load_folder(path, split, data_dir, shape or CIFAR10.shape)
    if kind == "npz":
        classes, data = load_arrays(path, split)
    else:
        classes, data = CIFAR10.classes, cifar10.load_split(split, data_dir)
    return classes, resized_split(data, path, split, data_dir, shape or tuple(data[0].shape[1:]))


def load_training(
    source: str,
    data_dir: Path,
    shape: Shape | None = None,
    holdout: bool = False,
    augment: str | None = None,
) -> tuple[DataSet, Split, Split | None]:
    """The data set, its training split and, with `holdout`, a stratified tenth of it to validate on.

    Mean, deviation and fingerprint are of the whole training split, with or without `holdout`. The
    sample's held-out part is its validation split. Without `augment` it is what AUGMENT says of the
    kind. The test set is never opened here. Raises UserError as read_split, and where the pictures
    leave nothing to learn from.
    """
    kind = kind_of(source)
    classes, train = read_split(source, "train", data_dir, shape)
    path = Path(source).resolve()
    name = {"folder": path.name, "npz": path.stem}.get(kind, CIFAR10.name)
    if not (plain_text(name, MAX_TEXT) and plain_text(source, MAX_TEXT)):
        raise UserError(f"--data {printable(source)}: rename it to printable characters")
    try:
        # The sample is a part of CIFAR-10, and is normalized as the whole.
        whole = kind == "sample" and train[0].shape[1] == len(CIFAR10.mean)
        mean, std = (CIFAR10.mean, CIFAR10.std) if whole else channel_statistics(train[0])
    except ValueError as error:
        raise UserError(f"--data {source}: {error}") from None
    shape = tuple(train[0].shape[1:])
    augment = augment or AUGMENT[kind]
    dataset = DataSet(name, kind, source, classes, mean, std, shape, fingerprint(train), augment)
    if not holdout:
        return dataset, train, None
    if kind == "sample":
        return dataset, train, read_split(source, "test", data_dir, shape)[1]
    (images, labels), (rest, held) = train, stratified(train[1], HOLDOUT_ONE_IN)
    return dataset, (images[rest], labels[rest]), (images[held], labels[held])


def require_source(dataset: DataSet) -> None:
    """Raise UserError where a checkpoint's own pictures are no longer where they were."""
    if dataset.kind in ("folder", "npz") and not Path(dataset.source).exists():
        raise UserError(
            f"{printable(dataset.source):.200}, which this run was trained on, is not there; put it "
            "back, or start the command in the folder where the training was started"
        )


def reload_training(
    dataset: DataSet, data_dir: Path, holdout: bool = False
) -> tuple[Split, Split | None]:
    """The training and validation split of a checkpoint's data set, once more.

    Raises UserError when the pictures are not those that the checkpoint was trained on.
    """
    require_source(dataset)
    found, train, validation = load_training(dataset.source, data_dir, dataset.shape, holdout)
    if (found.classes, found.fingerprint) != (dataset.classes, dataset.fingerprint):
        raise UserError(
            f"--data {dataset.source} is not what this run was trained on: pictures or classes "
            "changed, or another Pillow decodes them; put them back, or train again with --force"
        )
    return train, validation


def load_test(dataset: DataSet, data_dir: Path) -> Split:
    """The test split of a data set; raises UserError when its classes are no longer the same."""
    require_source(dataset)
    classes, split = read_split(dataset.source, "test", data_dir, dataset.shape)
    if classes != dataset.classes:
        raise UserError(
            f"--data {dataset.source} has other classes than this run was trained on; train "
            "again with --force"
        )
    return split


def describe(dataset: DataSet, train: Split, validation: Split | None = None) -> str:
    """What training sees, as lines of text: pictures, classes with their counts, memory."""
    images, labels = train
    counts = labels.bincount(minlength=len(dataset.classes)).tolist()
    listed = [f"{name} {count:,}" for name, count in zip(dataset.classes, counts, strict=True)]
    shown = (
        listed
        if len(listed) <= 20
        else [*listed[:18], f"... from {min(counts):,} to {max(counts):,}"]
    )
    held = f", {len(validation[1]):,} more to validate on" if validation else ""
    kept = gibibytes(images.numel())
    return (
        f"{dataset.name}: {len(labels):,} training pictures of "
        f"{'x'.join(map(str, dataset.shape))} in {len(counts)} classes{held}\n"
        f"  {', '.join(shown)}\n"
        f"  {kept} of pixels, up to {gibibytes(memory_bytes(len(images), dataset.shape))} "
        "of memory while training, besides the network's own"
    )


def picture_digests(source: str, split: str) -> dict[str, str]:
    """What tells whether a user's own `train` or `test` pictures are the same, for Step.pictures.

    No picture is opened. {} for shipped data; an empty text for a source that is not here or cannot
    be used: whoever reads it will say what is wrong.
    """
    if source in ("cifar10", "sample"):
        return {}
    try:
        digest = names_and_sizes if kind_of(source) == "folder" else checksums
        return {f"{split} pictures": digest(Path(source), split)}
    except (OSError, UserError):
        return {f"{split} pictures": ""}


def load_judging(dataset: DataSet, data_dir: Path, holdout: bool = False) -> tuple[Split, str]:
    """The images that judge a network trained on a data set, and what they are.

    The test set; with `holdout`, or for the sample, the validation split.
    """
    if dataset.kind == "sample":
        held = reload_training(dataset, data_dir, holdout=True)[1]
        return held, "held-out part of the smoke sample (training images)"
    if holdout:
        return reload_training(dataset, data_dir, holdout=True)[1], "validation split"
    own = TEST_SET if dataset.kind == "cifar10" else f"test set of {dataset.name}"
    return load_test(dataset, data_dir), own


# ---- batches -----------------------------------------------------------------------------------


def normalize(images: torch.Tensor, dataset: DataSet) -> torch.Tensor:
    """uint8 (N, C, H, W) -> float32 of zero mean and unit variance a channel, channels last."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    mean, std = moments(dataset, images.device)
    return images.sub_(mean).div_(std)


@functools.cache
def moments(dataset: DataSet, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation a channel, in steps of a uint8: (1, C, 1, 1), copied to a device once."""
    values = (dataset.mean, dataset.std)
    return tuple(torch.tensor(v, device=device).view(1, -1, 1, 1) * 255 for v in values)


def crop_padding(dataset: DataSet) -> int:
    """Pixels that an augmentation may shift a picture by: an eighth of its shorter side, at least 1."""
    side = min(dataset.shape[1:])
    return (
        min(max(1, round(side / CROP_SHARE)), side - 1)
        if dataset.augment in ("crop", "both")
        else 0
    )


def pad_reflect(images: torch.Tensor, pad: int) -> torch.Tensor:
    """(N, C, H, W) -> (N, C, H + 2 pad, W + 2 pad), the border reflected; pad below either side."""
    return F.pad(images, (pad,) * 4, mode="reflect")


def augmented_batches(
    padded: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    generator: torch.Generator,
    dataset: DataSet,
    share: slice = slice(None),
):
    """One epoch of shuffled, randomly cropped and flipped batches; a short last batch is dropped.

    padded: uint8 (N, C, H + 2 pad, W + 2 pad) on the training device, as pad_reflect gives it for
    crop_padding(dataset). Every random number comes from the CPU generator, and as
    many for every `augment`, so that an epoch's order is the same on any device and for each.
    share: the part of each batch that is wanted, all by default.
    Yields normalized (B, C, H, W), (B,).
    """
    _, height, width = dataset.shape
    windows = padded.unfold(2, height, 1).unfold(
        3, width, 1
    )  # (N, C, 2p + 1, 2p + 1, H, W), a view
    count, device = len(padded), padded.device
    order = torch.randperm(count, generator=generator)
    offsets = torch.randint(windows.shape[2], (2, count), generator=generator)
    flips = torch.rand(count, generator=generator) < (
        0.5 if dataset.augment in ("flip", "both") else 0
    )
    order, offsets, flips = (numbers.to(device) for numbers in (order, offsets, flips))
    batch_size = min(batch_size, count)
    for start in range(0, count - batch_size + 1, batch_size):
        part = range(start, start + batch_size)[share]
        part = slice(part.start, part.stop)
        index, (dy, dx) = order[part], offsets[:, part]
        images = windows[index, :, dy, dx]  # (B, C, H, W)
        images = torch.where(flips[part, None, None, None], images.flip(3), images)
        yield normalize(images, dataset), labels[index]
