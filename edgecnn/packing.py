"""Lossless packing of weight tensors: a bitmap of where the non-zeros are, then their byte planes.

Plane k holds byte k of every value, so that the few distinct sign-and-exponent bytes of FP32 weights
stand together; every stream is then LZMA-coded where that is shorter. +0.0 alone counts as zero, so
a packed tensor reloads bit for bit.
"""

import lzma

import numpy as np
import torch

LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
DTYPES = {"float32": torch.float32, "int8": torch.int8}


def encode_stream(stream: bytes) -> bytes:
    """LZMA where it is shorter, else the bytes themselves (told apart by their length)."""
    coded = lzma.compress(stream, lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    return coded if len(coded) < len(stream) else stream


def decode_stream(coded: bytes, length: int) -> bytes:
    """Inverse of encode_stream for a stream of `length` bytes; never expands beyond it.

    Raises ValueError or lzma.LZMAError when the bytes are not such a stream.
    """
    if len(coded) == length:
        return coded
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    stream = decoder.decompress(coded, max_length=length)
    if len(stream) != length:
        raise ValueError(f"a stream of {len(stream)} bytes where {length} were announced")
    return stream


def split_streams(tensor: torch.Tensor) -> tuple[bool, list[bytes]]:
    """(whether a bitmap leads, streams): [bitmap,] plane 0, plane 1, ... of the stored values."""
    values = tensor.detach().cpu().contiguous().numpy().reshape(-1)
    planes = values.view(np.uint8).reshape(len(values), values.itemsize)  # (N, bytes a value)
    nonzero = planes.any(axis=1)
    # A bitmap costs one bit a weight; without enough zeros it does not pay.
    sparse = len(values) / 8 < (len(values) - nonzero.sum()) * values.itemsize
    stored = planes[nonzero] if sparse else planes
    streams = [np.packbits(nonzero).tobytes()] if sparse else []
    return bool(sparse), streams + [stored[:, k].tobytes() for k in range(values.itemsize)]


def pack(tensor: torch.Tensor) -> dict:
    """Pack a float32 or int8 tensor into plain values and one uint8 tensor; `unpack` inverts it."""
    sparse, streams = split_streams(tensor)
    coded = [encode_stream(stream) for stream in streams]
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sparse": sparse,
        "stored_values": len(streams[-1]),
        "coded_lengths": [len(part) for part in coded],
        "coded": torch.frombuffer(bytearray(b"".join(coded)), dtype=torch.uint8),
    }


def stream_lengths(packed: dict, dtype: torch.dtype, count: int) -> list[int]:
    """The lengths of the streams of a packed tensor of `count` values, the bitmap's first."""
    bitmap = [(count + 7) // 8] if packed["sparse"] else []
    return bitmap + [packed["stored_values"]] * dtype.itemsize


def check_packed(packed: dict, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError where a packed tensor would not unpack to this dtype and shape, no larger.

    Looks at no data: `coded` may lie on the meta device.
    """

    def counts(values, most: int) -> bool:
        return isinstance(values, list) and all(type(x) is int and 0 <= x <= most for x in values)

    count, coded = int(np.prod(shape)), packed.get("coded")
    if packed.get("dtype") != str(dtype).removeprefix("torch."):
        raise ValueError(f"its dtype is not {str(dtype).removeprefix('torch.')}")
    if not counts(packed.get("shape"), count) or tuple(packed["shape"]) != shape:
        raise ValueError(f"its shape is not {'x'.join(map(str, shape))}")
    if not isinstance(packed.get("sparse"), bool) or not counts(
        [packed.get("stored_values")], count
    ):
        raise ValueError("it does not say what it stores")
    if not packed["sparse"] and packed["stored_values"] != count:
        raise ValueError(f"it stores {packed['stored_values']} of {count} values without a bitmap")
    if type(coded) is not torch.Tensor or coded.dtype != torch.uint8 or coded.ndim != 1:
        raise ValueError("its data are no bytes")
    lengths = stream_lengths(packed, dtype, count)
    parts = packed.get("coded_lengths")
    if not counts(parts, coded.numel()) or len(parts) != len(lengths):
        raise ValueError(f"it has no lengths of {len(lengths)} streams")
    if sum(parts) != coded.numel() or any(p > n for p, n in zip(parts, lengths, strict=True)):
        raise ValueError("its streams are longer than what they stand for")


def unpack(packed: dict) -> torch.Tensor:
    """The tensor that was packed, bit for bit. Raises ValueError on inconsistent data."""
    dtype, shape = DTYPES[packed["dtype"]], packed["shape"]
    count = int(np.prod(shape))
    data, streams = packed["coded"].numpy().tobytes(), []
    lengths = stream_lengths(packed, dtype, count)
    for length, coded_length in zip(lengths, packed["coded_lengths"], strict=True):
        streams.append(decode_stream(data[:coded_length], length))
        data = data[coded_length:]
    planes = np.zeros((count, dtype.itemsize), np.uint8)
    where = slice(None)
    if packed["sparse"]:
        where = np.unpackbits(np.frombuffer(streams.pop(0), np.uint8), count=count).astype(bool)
    planes[where] = np.stack([np.frombuffer(stream, np.uint8) for stream in streams], axis=1)
    return torch.from_numpy(planes.reshape(-1)).view(dtype).reshape(shape)


def storage_bytes(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Bytes of a tensor under three codings, so that their gains are not mixed.

    Every value at its own width; non-zeros plus a one-bit-a-value bitmap where that is smaller,
    uncoded; the same streams after lossless coding.
    """
    streams = split_streams(tensor)[1]
    coded = sum(len(encode_stream(stream)) for stream in streams)
    return tensor.nbytes, sum(map(len, streams)), coded
