"""A folder of pictures as uint8 tensors: any size and mode brought to one input shape, cached once.

    my_images/train/<class>/*   my_images/test/<class>/*     the user's own split
    my_images/<class>/*                                      a fixed fifth of every class is the test set

How a picture becomes (C, H, W), the same bytes on every machine with the same Pillow: it is turned
as its EXIF entry says; 16 bit keep the high byte; what is transparent shows white; grey or colour as
the channels ask; scaled, with antialiasing, until it just covers the input, and what sticks out of
the centre is cut off. A picture of the input's size keeps its pixels. Of an animation the first frame.

Classes are the folders' names, sorted. Pictures come in the order of their file names with numbers
compared as numbers, across all classes: a set written out as <class>/<index>.png keeps its order.
Hidden files and folders are passed over.
"""

import hashlib
import os
import re
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from edgecnn.dataset import classes_problem
from edgecnn.errors import UserError
from edgecnn.split import (
    MIN_PER_CLASS,
    Shape,
    Split,
    fingerprint,
    printable,
    require_enough,
    require_memory,
    stratified,
)
from edgecnn.torch_files import write_torch

TEST_ONE_IN = 5  # of a folder without a split of its own
TASK = 32  # pictures that a thread takes at a time
PREPARATION = 1  # counts the changes of how pixels are made, so that older caches are not taken
IGNORED = ("Thumbs.db", "desktop.ini")  # what Windows leaves in folders of pictures
LAYOUT = "train/<class>/* and test/<class>/*, or <class>/* alone"


# ---- one picture -------------------------------------------------------------------------------


def fitted(image: Image.Image, shape: Shape) -> np.ndarray:
    """A Pillow image of any mode and size -> uint8 (C, H, W). Raises ValueError, saying why not.

    Pillow's fixed-point resampling gives the same bytes on every processor, torch's float one not.
    """
    channels, height, width = shape
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels; save it with 8 or 16")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def read_picture(path: str, shape: Shape) -> np.ndarray:
    """The picture in a file as uint8 (C, H, W). Raises UserError with its name."""
    try:
        with Image.open(path) as image:
            side = 2 * max(shape[1:])
            image.draft(None, (side, side))  # a large JPEG decodes at 1/2, 1/4 or 1/8, still larger
            return fitted(ImageOps.exif_transpose(image), shape)
    except Exception as error:  # every format fails in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{printable(path)} cannot be read as a picture ({reason}); mend it or take it out"
        ) from None


def resized(images: torch.Tensor, shape: Shape) -> torch.Tensor:
    """uint8 (N, C, H, W) of 1 or 3 channels -> the same pictures at another shape, as from files."""
    pixels = images.permute(0, 2, 3, 1).squeeze(3).numpy()  # (N, H, W) or (N, H, W, 3)

    def fit(index: int) -> np.ndarray:
        return fitted(Image.fromarray(np.ascontiguousarray(pixels[index])), shape)

    return filled(fit, (len(images), *shape), "resizing")


def filled(picture, shape: tuple[int, int, int, int], what: str) -> torch.Tensor:
    """uint8 (N, C, H, W) of picture(0) .. picture(N - 1), made on all cores; an exception ends it."""
    images = np.empty(shape, np.uint8)

    starts = range(0, len(images), TASK)

    def fill(start: int) -> None:
        for index in range(start, min(start + TASK, len(images))):
            images[index] = picture(index)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(fill, starts)
        for _ in tqdm(done, desc=what, total=len(starts), disable=not sys.stderr.isatty()):
            pass
    return torch.from_numpy(images)


# ---- which pictures ----------------------------------------------------------------------------


def natural(name: str) -> list:
    """A sort key in which numbers in a name count as numbers: 2.png before 10.png."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the class folders in a folder, sorted; raises UserError when it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(e.name for e in entries if e.is_dir() and e.name[0] != "."))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None


def pictures_of(folder: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """(path, label) of every file in the class folders, in the order that the module defines."""
    from torchvision.datasets.folder import make_dataset  # seconds to import, needed here alone

    def visible(path: str) -> bool:
        inside = Path(path).relative_to(folder).parts
        return inside[-1] not in IGNORED and not any(part.startswith(".") for part in inside)

    labels = {name: label for label, name in enumerate(classes)}
    found = make_dataset(str(folder), labels, is_valid_file=visible, allow_empty=True)
    return sorted(found, key=lambda item: (natural(Path(item[0]).name), item[1], item[0]))


def list_split(folder: Path, split: str) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The classes, and (path, label) of each picture of `train` or `test`; no picture is opened.

    Raises UserError for a folder that is laid out in no supported way.
    """
    names = class_names(folder)
    own_split = "train" in names
    almost = [name for name in names if name.lower() == "train" and not own_split]
    if almost:
        raise UserError(f"{folder} has {almost[0]}/: call it train/, and the other test/")
    if own_split and "test" not in names:
        raise UserError(f"{folder} has train/ and no test/ beside it; supported: {LAYOUT}")
    if own_split:
        names, others = class_names(folder / "train"), class_names(folder / "test")
        differing = printable(", ".join(sorted(set(names) ^ set(others))[:5]))
        if differing:
            raise UserError(
                f"{folder}: train/ and test/ hold different classes ({differing}); "
                "both need the same folders"
            )
    if len(names) < 2:
        found = f"one class only, {printable(names[0])}" if names else "no class folders"
        where = folder / "train" if own_split else folder
        raise UserError(f"{where} has {found}; supported: {LAYOUT}, of two classes or more")
    problem = classes_problem(names)
    if problem:
        raise UserError(f"{folder}: {problem}")
    where = folder / split if own_split else folder
    pictures = pictures_of(where, names)
    least = MIN_PER_CLASS if split == "train" or not own_split else 1
    labels = torch.tensor([label for _, label in pictures], dtype=torch.int64)
    require_enough(labels, names, least, str(where))
    if not own_split:
        chosen = stratified(labels, TEST_ONE_IN)[split == "test"]
        pictures = [pictures[index] for index in chosen.tolist()]
    return names, pictures


def names_and_sizes(folder: Path, split: str) -> str:
    """Hex SHA-256 over name, label and size of each picture of a split; none is opened.

    The times of change are left out: a copy of the folder is the same data. Raises UserError.
    """
    pictures = list_split(folder, split)[1]
    entries = [(os.path.relpath(p, folder), label, os.path.getsize(p)) for p, label in pictures]
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def state_of(folder: Path, pictures: list[tuple[str, int]], shape: Shape) -> str:
    """Hex SHA-256 over what the cached tensors depend on: input shape, files, labels.

    A file counts by its name in the folder, size and time of change, as in make and git: hashing a
    folder of photos at every step would read it all each time. Raises UserError for what is no
    ordinary file.
    """
    digest = hashlib.sha256(repr((PREPARATION, Image.__version__, tuple(shape))).encode())
    for path, label in pictures:
        try:
            state = os.stat(path)
        except OSError as error:
            raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None
        if not stat.S_ISREG(state.st_mode):
            raise UserError(f"{printable(path)} is not an ordinary file; take it out")
        entry = os.fsencode(os.path.relpath(path, folder)), label, state.st_size, state.st_mtime_ns
        digest.update(repr(entry).encode())
    return digest.hexdigest()


# ---- the cache ---------------------------------------------------------------------------------


def cache_path(data_dir: Path, source: Path, split: str, shape: Shape) -> Path:
    """Where a source's split is kept as a tensor: one file a source, split and input shape."""
    place = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:8]
    name = re.sub("[^A-Za-z0-9-]", "-", source.resolve().stem)[:40]
    size = "x".join(map(str, shape))
    return Path(data_dir) / f"pictures_{name}_{place}_{size}_{split}.pt"


def read_cache(path: Path, state: str) -> Split | None:
    """The cached split, or None when it is missing, damaged or of other files."""
    if not path.is_file():
        return None
    try:
        cache = torch.load(path, weights_only=True)
        split = cache["images"], cache["labels"]
        if cache["state"] != state:
            return None
        if cache["fingerprint"] == fingerprint(split):
            return split
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in torch, zip or pickle alike
        print(f"{path}: {type(error).__name__}", file=sys.stderr)
    print(f"{path} is damaged; reading the pictures again", file=sys.stderr)
    return None


def cached(path: Path, state: str, make) -> Split:
    """The split kept at `path` for this state; else what make() gives, which is kept there."""
    split = read_cache(path, state)
    if split is None:
        split = images, labels = make()
        kept = {"state": state, "fingerprint": fingerprint(split)}
        write_torch(path, {**kept, "images": images, "labels": labels})
    return split


def load_folder(
    folder: Path, split: str, data_dir: Path, shape: Shape
) -> tuple[tuple[str, ...], Split]:
    """The class names and the `train` or `test` pictures: uint8 (N, C, H, W), int64 (N,).

    Decodes each file once and keeps the tensors in data_dir until a file's name, size or time of
    change differs. Raises UserError for a folder or picture that cannot be used.
    """
    classes, pictures = list_split(folder, split)
    require_memory(len(pictures), shape, str(folder))

    def make() -> Split:
        images = filled(
            lambda index: read_picture(pictures[index][0], shape),
            (len(pictures), *shape),
            f"reading {folder.name} ({split})",
        )
        return images, torch.tensor([label for _, label in pictures])

    path = cache_path(data_dir, folder, split, shape)
    return classes, cached(path, state_of(folder, pictures, shape), make)


def resized_split(data: Split, source: Path, split: str, data_dir: Path, shape: Shape) -> Split:
    """A split at another input shape, kept in data_dir as long as its pixels are these."""
    if tuple(data[0].shape[1:]) == tuple(shape):
        return data
    require_memory(len(data[0]), shape, str(source))
    state = f"{PREPARATION} {Image.__version__} {fingerprint(data)}"
    path = cache_path(data_dir, source, split, shape)
    return cached(path, state, lambda: (resized(data[0], shape), data[1]))
