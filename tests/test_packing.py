"""Packing is lossless, never expands beyond what it announces, and its sizes are arithmetic."""

import lzma

import pytest
import torch

from edgecnn.packing import decode_stream, encode_stream, pack, storage_bytes, unpack


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (5, 3, 3, 3), (64, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_round_trip_is_bit_exact(share, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator)
    if dtype == torch.int8:
        tensor = (40 * tensor).round().clamp(-127, 127).to(dtype)
    tensor[torch.rand(shape, generator=generator) < share] = 0
    restored = unpack(pack(tensor))
    assert restored.dtype == dtype and restored.shape == tensor.shape
    assert torch.equal(bits(restored), bits(tensor))


def test_special_floats_survive():
    values = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45] + [0.0] * 90
    tensor = torch.tensor([values])
    assert torch.equal(bits(unpack(pack(tensor))), bits(tensor))


def test_half_zeros_cost_half_the_values_and_one_bit_each():
    tensor = torch.randn(100, 80)
    tensor.flatten()[::2] = 0.0
    dense, sparse, coded = storage_bytes(tensor)
    assert dense == 32_000 and sparse == 4_000 * 4 + 1_000 and coded < sparse


def test_dense_weights_need_no_bitmap():
    assert storage_bytes(torch.ones(64, 64))[1] == 64 * 64 * 4
    assert not pack(torch.ones(64, 64))["sparse"]


def test_a_stream_never_expands_beyond_the_announced_length():
    bomb = encode_stream(bytes(10_000_000))
    assert len(bomb) < 10_000
    with pytest.raises((ValueError, lzma.LZMAError)):
        decode_stream(bomb[: len(bomb) // 2], 10_000_000)
    assert len(decode_stream(bomb, 1000)) == 1000


def test_cut_data_is_an_error():
    packed = pack(torch.randn(40, 50))
    packed["coded"] = packed["coded"][:-10]
    with pytest.raises((ValueError, lzma.LZMAError)):
        unpack(packed)
