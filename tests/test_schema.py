"""A checkpoint is checked against one schema: damage, foreign files, bombs, values that cannot be."""

import io
import lzma
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from edgecnn import checkpoint as module
from edgecnn.c_source import c_source, int8_layers, stored_layers
from edgecnn.checkpoint import load_checkpoint
from edgecnn.files import UserError, write_json
from edgecnn.schema import TENSOR_NAME, tensor_shapes

FP32, INT8, PACKED = "baseline_fp32", "baseline_int8", "pruned_50_int8"
NAN, INFINITE = float("nan"), float("inf")


def spoiled(folder: Path, name: str, spoil) -> Path:
    """A committed checkpoint, spoiled, as a file of the same name."""
    checkpoint = torch.load(REPOSITORY / f"checkpoints/reference/{name}.pt", weights_only=True)
    spoil(checkpoint)
    path = folder / f"{name}.pt"
    torch.save(checkpoint, path)
    return path


def error_of(path) -> str:
    """The one line with which the loader refuses a file."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    return str(caught.value)


def put(*keys):
    """A function that puts its last argument where the keys before lead."""
    *keys, value = keys

    def spoil(checkpoint):
        place = checkpoint
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return spoil


LAYERS = ("quantization", "layers")
WRONG = {
    "empty scales": (INT8, put(*LAYERS, "block1", "weight_scale", []), "1 or 32 weight scales"),
    "few scales": (INT8, put(*LAYERS, "block1", "weight_scale", [0.1] * 3), "1 or 32"),
    "scale 0": (INT8, put(*LAYERS, "fc1", "weight_scale", [0.0]), "finite and positive"),
    "scale nan": (INT8, put(*LAYERS, "fc1", "weight_scale", [NAN]), "finite and positive"),
    "scale text": (INT8, put(*LAYERS, "fc1", "weight_scale", ["1"]), "finite and positive"),
    "scales no list": (INT8, put(*LAYERS, "fc1", "weight_scale", 0.1), "1 or 256"),
    "output scale": (INT8, put(*LAYERS, "fc1", "output_scale", INFINITE), "output scale of fc1"),
    "input scale": (INT8, put("quantization", "input_scale", -1.0), "input scale"),
    "zero point 999": (INT8, put("quantization", "input_zero_point", 999), "from 0 to 255"),
    "zero point -1": (INT8, put(*LAYERS, "fc2", "output_zero_point", -1), "from 0 to 255"),
    "zero point 1.0": (INT8, put(*LAYERS, "fc2", "output_zero_point", 1.0), "from 0 to 255"),
    "zero point true": (INT8, put(*LAYERS, "fc2", "output_zero_point", True), "from 0 to 255"),
    "weights' zero": (INT8, put(*LAYERS, "fc2", "weight_zero_point", 3), "not 0"),
    "quantization list": (INT8, put("quantization", [1]), "lacks `quantization`"),
    "layers list": (INT8, put(*LAYERS, [1]), "no layers"),
    "layer number": (INT8, put(*LAYERS, "fc1", 7), "no dictionary"),
    "engine number": (INT8, put("quantization", "engine", 3), "engine"),
    "tensors list": (FP32, put("tensors", [1]), "no dictionary"),
    "tensor text": (FP32, put("tensors", "fc1.weight", "hi"), "no tensor"),
    "tensor type": (
        FP32,
        put("tensors", "fc1.weight", torch.zeros(256, 2048, dtype=torch.complex64)),
        "complex64 256x2048, not float32",
    ),
    "sparse layout": (
        FP32,
        put("tensors", "fc1.weight", torch.zeros(256, 2048).to_sparse()),
        "no dense tensor",
    ),
    "strange tensor": (FP32, put("tensors", "evil", torch.zeros(3)), "no evil"),
    "tensor's name": (FP32, put("tensors", "a; b", torch.zeros(3)), "no name of a tensor"),
    "-128": (INT8, lambda c: c["tensors"]["fc1.weight"][0].fill_(-128), "-128"),
    "variance": (
        FP32,
        lambda c: c["tensors"]["block1.bn.running_var"].fill_(-1.0),
        "negative variance",
    ),
    "version tensor": (FP32, put("format_version", torch.zeros(2)), "format version"),
    "version true": (FP32, put("format_version", True), "format version True"),
    "format tensor": (FP32, put("format", torch.zeros(2)), "not a checkpoint of this project"),
    "architecture": (FP32, put("architecture", [1]), "architecture"),
    "precision": (FP32, put("precision", ["fp32"]), "precision"),
    "provenance": (FP32, put("provenance", [1]), "provenance"),
    "arguments": (FP32, put("provenance", "arguments", 7), "arguments"),
    "method": (FP32, put("provenance", "method", 7), "method"),
    "seed": (FP32, put("provenance", "seed", "1"), "seed"),
    "escape codes": (FP32, put("provenance", "parent", "\x1b[31m"), "not text that can be shown"),
    "object inside": (FP32, put("provenance", "more", torch.zeros(2)), "not plain data"),
    "packed no bytes": (PACKED, put("tensors", "fc1.weight", "coded", 3), "no bytes"),
    "packed shape": (PACKED, put("tensors", "fc1.weight", "shape", [2048, 256]), "shape"),
    "packed dtype": (PACKED, put("tensors", "fc1.weight", "dtype", "float32"), "dtype"),
    "packed count": (PACKED, put("tensors", "fc1.weight", "stored_values", 10**9), "stores"),
    "packed sparse": (PACKED, put("tensors", "fc1.weight", "sparse", 1), "stores"),
    "packed lengths": (PACKED, put("tensors", "fc1.weight", "coded_lengths", [1]), "2 streams"),
}


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(tmp_path, name, spoil, message):
    error = error_of(spoiled(tmp_path, name, spoil))
    assert message in error and f"{name}.pt" in error and "\n" not in error


def test_a_plain_state_dict_is_told_what_this_project_reads(tmp_path):
    for name, content in (
        ("mine", {"conv.weight": torch.zeros(3)}),
        ("net", torch.nn.Linear(2, 2)),
    ):
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        assert "this project reads the .pt files that its own" in error_of(path)
    assert "this project reads" in error_of(tmp_path / "not there.pt")


# ---- damage ------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_record_is_found(tmp_path):
    content = (REPOSITORY / "checkpoints/reference/baseline_int8.pt").read_bytes()
    path = tmp_path / "baseline_int8.pt"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        places = [content.index(archive.read(r)) for r in archive.infolist() if r.file_size > 99]
    assert len(places) > 8
    for place in places:
        flipped = bytearray(content)
        flipped[place + 50] ^= 4
        path.write_bytes(flipped)
        assert "CRC" in error_of(path)


def test_a_file_other_than_its_json_says_is_told_once(workdir, capsys):
    for folder in ("checkpoints/mine", "results/mine"):
        (workdir / folder).mkdir(parents=True)
    module.note_other_digest.cache_clear()
    path = spoiled(workdir / "checkpoints/mine", FP32, lambda c: None).relative_to(workdir)
    for digest, lines in ((module.sha256(path), 0), ("0" * 64, 1)):
        write_json(workdir / "results/mine/baseline_fp32.json", {"checkpoint_sha256": digest})
        module.note_other_digest.cache_clear()
        load_checkpoint(path)
        load_checkpoint(path)
        error = capsys.readouterr().err
        assert error.count("\n") == lines and ("SHA-256 differs" in error) == bool(lines)


# ---- size bombs --------------------------------------------------------------------------------


def bomb_of_lzma(checkpoint):
    """2^24 zeros in some 3 kB: announced, and coded so that they would unpack."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0}]
    coded = lzma.compress(bytes(2**24), lzma.FORMAT_RAW, filters=filters)
    checkpoint["tensors"]["fc1.weight"] = {
        "dtype": "int8",
        "shape": [2**24],
        "sparse": False,
        "stored_values": 2**24,
        "coded_lengths": [len(coded)],
        "coded": torch.frombuffer(bytearray(coded), dtype=torch.uint8),
    }


def expanded(*shape):
    return put("tensors", "fc1.weight", torch.zeros(1).expand(*shape))


BOMBS = {
    "lzma": (PACKED, bomb_of_lzma, "shape"),
    "stride 0": (FP32, expanded(200_000, 200_000), "200000x200000"),
    "stride 0, right shape": (FP32, expanded(256, 2048), "view of other data"),
    "large storage": (
        FP32,
        put("tensors", "fc2.bias", torch.zeros(5_000_000)[:10]),
        "view of other data",
    ),
    "more tensors": (FP32, put("more", [torch.zeros(2_000_000)]), "more than its network needs"),
}


@pytest.fixture
def data_read(monkeypatch):
    """Whether tensors' data were read or unpacked."""
    seen, load = [], torch.load

    def spy(*args, map_location=None, **kwargs):
        seen.append(map_location)
        return load(*args, map_location=map_location, **kwargs)

    monkeypatch.setattr(module.torch, "load", spy)
    monkeypatch.setattr(module, "unpack", lambda packed: seen.append("unpacked"))
    return seen


@pytest.mark.parametrize(("name", "spoil", "message"), BOMBS.values(), ids=BOMBS)
def test_sizes_are_checked_before_data_are_read(tmp_path, data_read, name, spoil, message):
    path = spoiled(tmp_path, name, spoil)
    data_read.clear()
    assert message in error_of(path) and data_read == ["meta"]


def test_compressed_records_are_never_unpacked(tmp_path, data_read):
    path = tmp_path / "baseline_fp32.pt"
    original = REPOSITORY / "checkpoints/reference/baseline_fp32.pt"
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            large = record.file_size > 10**6
            content = bytes(10**7) if large else source.read(record)
            method = zipfile.ZIP_DEFLATED if large else zipfile.ZIP_STORED
            target.writestr(record.filename, content, method)
    assert path.stat().st_size < 10**6
    assert "compressed" in error_of(path) and data_read == []


# ---- names -------------------------------------------------------------------------------------


def test_names_of_tensors():
    good = ("a", "block1.conv.weight", "_x.0.bias", "features.12.weight")
    bad = ("", "1a", "a b", "a;b", "a..b", "a.", ".a", "a\n", "é")
    assert all(TENSOR_NAME.fullmatch(name) for name in good)
    assert not any(TENSOR_NAME.fullmatch(name) for name in bad)


def test_expected_tensors_are_those_that_files_hold():
    for name in (FP32, INT8, PACKED):
        checkpoint = load_checkpoint(REPOSITORY / f"checkpoints/reference/{name}.pt")
        held = {n: (t.dtype, tuple(t.shape)) for n, t in checkpoint["tensors"].items()}
        assert held == tensor_shapes(checkpoint)


def test_generated_c_uses_no_name_of_a_file():
    checkpoint = load_checkpoint(REPOSITORY / "checkpoints/reference/baseline_int8.pt")
    renamed = {name: f"x; int evil_{name}" for name in checkpoint["quantization"]["layers"]}
    plain = c_source(stored_layers(checkpoint), "int8")
    assert "block1" not in plain and "layer_0" in plain
    layers = [layer | {"name": renamed[layer["name"]]} for layer in stored_layers(checkpoint)]
    assert c_source(layers, "int8") == plain
    assert [layer["name"] for layer in int8_layers(checkpoint)] == list(renamed)
