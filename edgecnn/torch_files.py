"""Files of torch.save: written whole or not at all, read without executing anything in them."""

import io
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization_config

from edgecnn.errors import UserError
from edgecnn.files import write_files

SLACK_BYTES = 2**22  # of a file beside its tensors: names, scales, provenance
MODULES = ("collections", "torch", "torch._utils", "torch.serialization")  # all that tensors need
OBJECTS = "it holds Python objects besides tensors, which are refused, never executed"


def torch_bytes(value) -> bytes:
    """What torch.save writes; to a file of its own it would name every record after the path."""
    buffer = io.BytesIO()
    with serialization_config.patch("save.storage_alignment", 8):  # 64 pads every small tensor
        torch.save(value, buffer)
    return buffer.getvalue()


def write_torch(path: Path, value) -> None:
    """torch.save, atomically; raises UserError when the folder is unwritable or full."""
    write_files({path: torch_bytes(value)})


def check_archive(file) -> int:
    """The bytes of all records of torch.save's zip file; raises ValueError for a damaged one.

    Records lie in it as they are, so that reading them takes no more memory than the file is long;
    torch itself would unpack compressed ones, and looks at no CRC.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError("truncated, or not written by torch.save")
    with zipfile.ZipFile(file) as archive:
        records, length = archive.infolist(), file.seek(0, io.SEEK_END)
        total = sum(record.file_size for record in records)
        if any(record.compress_type != zipfile.ZIP_STORED for record in records) or total > length:
            raise ValueError("its records are compressed or larger than the file")
        if any(
            r.file_size > SLACK_BYTES for r in records if not re.search(r"/data/\d+$", r.filename)
        ):
            raise ValueError("it holds more than tensors and their names")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the record {damaged} is damaged: its CRC does not fit")
        for record in (r for r in records if r.filename.endswith(".pkl")):
            for opcode, argument, _ in pickletools.genops(archive.read(record)):
                # weights_only lets bytearray pass, which takes as much memory as it is told
                if "GLOBAL" in opcode.name and str(argument).split(" ")[0] not in MODULES:
                    raise ValueError(OBJECTS)
    return total


def read_torch(path: Path, check=None):
    """torch.load of plain values and tensors; raises ValueError, in one line, for any other file.

    `check` gets what the file holds with its tensors on the meta device, before their data are read,
    and the bytes of its records.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            total = check_archive(file)
            if check is not None:
                file.seek(0)
                check(torch.load(file, map_location="meta", weights_only=True), total)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # torch, zip and pickle each have errors of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "weights only" in reason.lower():
            reason = OBJECTS
        raise ValueError(reason) from None
