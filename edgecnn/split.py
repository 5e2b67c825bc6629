"""One part of a data set, a pair of tensors: its fixed stratified share, its check, its memory."""

import hashlib
import os
from pathlib import Path

import torch

from edgecnn.errors import UserError

Split = tuple[torch.Tensor, torch.Tensor]  # uint8 (N, C, H, W), int64 (N,)
Shape = tuple[int, int, int]  # C, H, W of one picture

STRATIFIED_SEED = 20260101
MIN_PER_CLASS = 5  # training pictures; of fewer, a held-out tenth or fifth would say nothing
# Bytes that training holds for each byte of pictures: they, their padded copies, and one on the way.
COPIES = 4


def printable(text) -> str:
    """A path or name as one line of text: what is not printable stands escaped."""
    text = str(text)
    return text if text.isprintable() else ascii(text)[1:-1]


def stratified(labels: torch.Tensor, one_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of (the rest, the share taken), both sorted: one of `one_in` of every class.

    The same labels in the same order always give the same share. At least one of a class is taken.
    """
    generator = torch.Generator().manual_seed(STRATIFIED_SEED)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        taken[members[order[: max(1, round(len(members) / one_in))]]] = True
    return (~taken).nonzero().flatten(), taken.nonzero().flatten()


def fingerprint(split: Split) -> str:
    """Hex SHA-256 over shape, pixels and labels: the same whatever file they came from."""
    images, labels = split
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


def require_enough(labels, classes: tuple[str, ...], minimum: int, where: str) -> None:
    """Raise UserError unless each class has `minimum` of the int64 (N,) labels."""
    counts = torch.as_tensor(labels, dtype=torch.int64).bincount(minlength=len(classes)).tolist()
    few = [
        f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < minimum
    ]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        raise UserError(
            f"{where}: too few pictures of {', '.join(few[:5])}{more}; "
            f"each class needs {minimum} or more"
        )


def gibibytes(size: float) -> str:
    """Bytes as text in GiB, or in MiB below one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def memory_bytes(count: int, shape: Shape) -> int:
    """What `count` uint8 pictures take while a network trains on them."""
    channels, height, width = shape
    return COPIES * count * channels * height * width


def free_memory_bytes() -> int:
    """What the system can give without swapping; all that there is where it does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_memory(count: int, shape: Shape, where: str, value_bytes: int = 1) -> None:
    """Raise UserError, before anything is read, where the pictures would not fit into memory."""
    need, free = value_bytes * memory_bytes(count, shape), free_memory_bytes()
    if need > free:
        raise UserError(
            f"{where}: {count:,} pictures of {'x'.join(map(str, shape))} take {gibibytes(need)} "
            f"while training, and {gibibytes(free)} of memory are free; "
            "give a smaller --input-size, or fewer pictures"
        )
