"""An .npz of arrays as uint8 tensors: x_train, y_train, x_test, y_test, and, if wanted, classes.

x   uint8, or float in 0..1 or in 0..255 (x_train decides: 0..1 where nothing in it is above 1);
    (N, H, W), or (N, H, W, C) with 1 or 3 channels. Floats are rounded to the 256 levels of a pixel.
y   integers (N,) or (N, 1) from 0 to K - 1, every class with pictures in y_train
classes   K names as text; else "0", "1", ... are the names

Nothing in the file is executed (allow_pickle=False), and training reads no x_test.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

from edgecnn.dataset import MAX_CLASSES, classes_problem
from edgecnn.errors import UserError
from edgecnn.split import MIN_PER_CLASS, Split, require_enough, require_memory

NEEDED = ("x_train", "y_train", "x_test", "y_test")
CHUNK = 1000  # pictures converted at a time


def announced(archive, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array from its header alone. Raises ValueError when it has none."""
    with archive.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        one = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    return shape, dtype


def read_x(archive, path: Path, split: str) -> torch.Tensor:
    """x_train or x_test as uint8 (N, C, H, W). Raises UserError, saying what is supported."""
    name = f"x_{split}"
    shape, dtype = announced(archive, name)
    if dtype != np.uint8 and dtype.kind != "f":
        raise UserError(
            f"{path}: {name} is {dtype}; supported: uint8, or float32 in 0..1 or 0..255"
        )
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape:
        hint = ""
        if len(shape) == 4 and shape[1] in (1, 3):
            hint = f"; numpy.moveaxis({name}, 1, -1) puts the channels last"
        raise UserError(
            f"{path}: {name} has the shape {shape}; supported: (N, H, W), or (N, H, W, C) with 1 "
            f"or 3 channels{hint}"
        )
    count, height, width = shape[:3]
    channels = shape[3] if len(shape) == 4 else 1
    require_memory(count, (channels, height, width), str(path), dtype.itemsize)
    values = archive[name].reshape(count, height, width, channels)
    if dtype.kind == "f":
        values = rounded(values, unit(archive, path, split, values), f"{path}: {name}")
    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))


def checksums(path: Path, split: str) -> str:
    """The zip's CRC-32 of each array that a split depends on, as text; empty where it is none.

    x_train decides the unit of both x, y_train the classes.
    """
    others = {"x_test.npy", "y_test.npy"} if split == "train" else set()
    try:
        with zipfile.ZipFile(path) as archive:
            found = {i.filename: i.CRC for i in archive.infolist() if i.filename not in others}
    except (OSError, zipfile.BadZipFile):
        return ""
    return " ".join(f"{name} {found[name]:08x}" for name in sorted(found))


def unit(archive, path: Path, split: str, values: np.ndarray) -> int:
    """What one unit of the floats is in pixel levels, 255 or 1: x_train decides for both."""
    if split == "test":
        dtype = announced(archive, "x_train")[1]
        if dtype.kind != "f":
            raise UserError(f"{path}: x_train is {dtype}, x_test is float; give both one dtype")
        values = archive["x_train"]
    return 255 if values.max() <= 1 else 1


def rounded(values: np.ndarray, levels: int, where: str) -> np.ndarray:
    """Floats (N, H, W, C) -> uint8, times `levels`. Raises UserError for what is no pixel."""
    if np.isnan(values.min()):
        raise UserError(f"{where} holds NaN, which is no pixel; supported: 0..1 or 0..255")
    if not (values.min() >= 0 and values.max() * levels <= 255):
        raise UserError(
            f"{where} goes from {values.min():g} to {values.max():g}; "
            f"supported: {'0..1' if levels == 255 else '0..255'}, as in x_train"
        )
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), CHUNK):
        part = slice(start, start + CHUNK)
        result[part] = np.rint(values[part].astype(np.float64) * levels)
    return result


def read_y(archive, path: Path, split: str, count: int) -> torch.Tensor:
    """y_train or y_test as int64 (N,). Raises UserError, saying what is supported."""
    name = f"y_{split}"
    shape, dtype = announced(archive, name)
    if dtype.kind not in "iu" or shape not in ((count,), (count, 1)):
        raise UserError(
            f"{path}: {name} is {dtype} of the shape {shape}; supported: integers ({count},), "
            f"a label for each picture of x_{split}"
        )
    return torch.from_numpy(archive[name].reshape(-1).astype(np.int64))


def read_classes(archive, path: Path, labels: torch.Tensor) -> tuple[str, ...]:
    """The class names that the training labels and the array `classes` give. Raises UserError."""
    low, high, found = labels.min().item(), labels.max().item(), labels.unique()
    if low != 0 or high + 1 != len(found) or not 2 <= len(found) <= MAX_CLASSES:
        raise UserError(
            f"{path}: y_train goes from {low} to {high} with {len(found)} different labels; "
            f"supported: 0 to K - 1 without a gap, K from 2 to {MAX_CLASSES}"
        )
    if "classes" not in archive.files:
        return tuple(map(str, range(len(found))))
    shape, dtype = announced(archive, "classes")
    if dtype.kind != "U" or shape != (len(found),):
        raise UserError(
            f"{path}: classes is {dtype} of the shape {shape}; supported: {len(found)} texts, as "
            'numpy.array(["cat", "dog"])'
        )
    names = tuple(map(str, archive["classes"]))
    problem = classes_problem(names)
    if problem:
        raise UserError(f"{path}: {problem}")
    return names


def load_arrays(path: Path, split: str) -> tuple[tuple[str, ...], Split]:
    """The class names and the `train` or `test` part: uint8 (N, C, H, W), int64 (N,).

    Raises UserError for a file that does not hold the arrays that the module describes.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in NEEDED if name not in archive.files]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}; needed: {', '.join(NEEDED)}")
            images = read_x(archive, path, split)
            labels = read_y(archive, path, split, len(images))
            training = labels
            if split == "test":
                training = read_y(archive, path, "train", announced(archive, "x_train")[0][0])
            classes = read_classes(archive, path, training)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in numpy, zip or zlib alike
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} is not readable as an .npz of plain arrays ({reason}); "
            f"numpy.savez_compressed writes one, with {', '.join(NEEDED)}"
        ) from None
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"{path}: y_{split} goes from {labels.min()} to {labels.max()}, and y_train has the "
            f"classes 0 to {len(classes) - 1}"
        )
    require_enough(labels, classes, MIN_PER_CLASS if split == "train" else 1, f"{path}: y_{split}")
    return classes, (images, labels)
