"""A checkpoint is checked against one schema: damage, foreign files, bombs, values that cannot be."""

import copy
import io
import lzma
import resource
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from edgecnn import checkpoint as module
from edgecnn import torch_files
from edgecnn.checkpoint import load_checkpoint
from edgecnn.deploy.c_source import c_source
from edgecnn.errors import UserError
from edgecnn.files import write_json
from edgecnn.graph import MAX_NODES
from edgecnn.schema import expected_tensors

FP32, INT8, PACKED = "baseline_fp32", "baseline_int8", "pruned_50_int8"
NAN, INFINITE = float("nan"), float("inf")
HEADLINE = REPOSITORY / "checkpoints/headline"


def spoiled(folder: Path, name: str, spoil) -> Path:
    """A committed checkpoint, spoiled, as a file of the same name."""
    checkpoint = torch.load(HEADLINE / f"{name}.pt", weights_only=True)
    spoil(checkpoint)
    path = folder / f"{name}.pt"
    torch.save(checkpoint, path)
    return path


def error_of(path) -> str:
    """The one line with which the loader refuses a file."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def data_read(monkeypatch):
    """Where tensors' data were read to, and whether they were unpacked."""
    seen, load = [], torch.load

    def spy(*args, map_location=None, **kwargs):
        seen.append(map_location)
        return load(*args, map_location=map_location, **kwargs)

    monkeypatch.setattr(torch_files.torch, "load", spy)
    monkeypatch.setattr(module, "unpack", lambda packed: seen.append("unpacked"))
    return seen


def put(*keys):
    """A function that puts its last argument where the keys before lead; a node's key is its name."""
    *keys, value = keys

    def spoil(checkpoint):
        part = checkpoint
        for key in keys[:-1]:
            if isinstance(part, list) and isinstance(key, str):
                (part,) = (node for node in part if node["name"] == key)
            else:
                part = part[key]
        part[keys[-1]] = value

    return spoil


def drop(*keys):
    """A function that removes what the keys lead to."""

    def spoil(checkpoint):
        part = checkpoint
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]

    return spoil


# ---- values --------------------------------------------------------------------------------------

ACTIVATIONS, WEIGHTS = ("quantization", "activations"), ("quantization", "weights")
NODES = ("graph", "nodes")
# What cannot be, by what is refused before any tensor's data is read.
WRONG = {
    "few scales": (INT8, put(*WEIGHTS, "block1.conv", [0.1] * 3), "block1.conv needs 32"),
    "many scales": (INT8, put(*WEIGHTS, "fc1", [0.1] * 256), "fc1 needs 1 weight scale"),
    "no scales": (INT8, put(*WEIGHTS, "fc1", []), "fc1 needs 1"),
    "scale no list": (INT8, put(*WEIGHTS, "fc1", 0.1), "fc1 needs 1"),
    "scale 0": (INT8, put(*WEIGHTS, "fc1", [0.0]), "finite and positive"),
    "scale nan": (INT8, put(*WEIGHTS, "fc1", [NAN]), "is nan, not a number"),
    "scale text": (INT8, put(*WEIGHTS, "fc1", ["1"]), "finite and positive"),
    "scale huge": (INT8, put(*WEIGHTS, "fc1", [1e17]), "finite and positive"),
    "weights missing": (INT8, drop(*WEIGHTS, "fc1"), "not of the graph's layers"),
    "weights extra": (INT8, put(*WEIGHTS, "fc3", [0.1]), "not of the graph's layers"),
    "weights of a pool": (INT8, put(*WEIGHTS, "flatten", [0.1]), "not of the graph's layers"),
    "weights list": (INT8, put(*WEIGHTS, [1]), "not of the graph's layers"),
    "activation scale": (INT8, put(*ACTIVATIONS, "fc1", "scale", INFINITE), "is inf"),
    "image scale": (INT8, put(*ACTIVATIONS, "input", "scale", -1.0), "scale of input"),
    "zero point 999": (INT8, put(*ACTIVATIONS, "input", "zero_point", 999), "from 0 to 255"),
    "zero point -1": (INT8, put(*ACTIVATIONS, "fc2", "zero_point", -1), "from 0 to 255"),
    "zero point 1.0": (INT8, put(*ACTIVATIONS, "fc2", "zero_point", 1.0), "from 0 to 255"),
    "zero point true": (INT8, put(*ACTIVATIONS, "fc2", "zero_point", True), "from 0 to 255"),
    "activation missing": (INT8, drop(*ACTIVATIONS, "flatten"), "not of the graph's nodes"),
    "activation extra": (
        INT8,
        put(*ACTIVATIONS, "fc3", {"scale": 1.0, "zero_point": 0}),
        "not of the graph's nodes",
    ),
    "activation number": (INT8, put(*ACTIVATIONS, "fc1", 7), "no scale and zero point"),
    "activation more": (INT8, put(*ACTIVATIONS, "fc1", "more", 7), "no scale and zero point"),
    "pool of another scale": (
        INT8,
        put(*ACTIVATIONS, "flatten", {"scale": 1.0, "zero_point": 0}),
        "does not keep the scale",
    ),
    "activations list": (INT8, put(*ACTIVATIONS, [1]), "not of the graph's nodes"),
    "quantization list": (INT8, put("quantization", [1]), "lacks `quantization`"),
    "quantization more": (INT8, put("quantization", "more", 1), "no more"),
    "engine number": (INT8, put("quantization", "engine", 3), "engine"),
    "tensors list": (FP32, put("tensors", [1]), "no dictionary"),
    "tensor missing": (FP32, drop("tensors", "fc2.bias"), "fc2.bias is missing"),
    "tensor shape": (
        FP32,
        put("tensors", "fc1.bias", torch.zeros(3)),
        "float32 3, not float32 256",
    ),
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
    "strange tensor": (FP32, put("tensors", "evil", torch.zeros(3)), "no 'evil'"),
    "tensor's name": (FP32, put("tensors", "a; b\n", torch.zeros(3)), r"no 'a; b\n'"),
    "version tensor": (FP32, put("format_version", torch.zeros(2)), "of type Tensor"),
    "version true": (FP32, put("format_version", True), "format version True"),
    "version 1": (FP32, put("format_version", 1), "format version 1"),
    "format tensor": (FP32, put("format", torch.zeros(2)), "not a checkpoint of this project"),
    "precision list": (FP32, put("precision", ["fp32"]), "precision is no text"),
    "precision fp16": (FP32, put("precision", "fp16"), "precision 'fp16'"),
    "float as int8": (FP32, put("precision", "int8"), "not that of a deployed network"),
    "provenance": (FP32, put("provenance", [1]), "provenance"),
    "arguments": (FP32, put("provenance", "arguments", 7), "arguments"),
    "method": (FP32, put("provenance", "method", 7), "method"),
    "seed": (FP32, put("provenance", "seed", "1"), "seed"),
    "escape codes": (FP32, put("provenance", "parent", "\x1b[31m"), "not text that can be shown"),
    "object inside": (FP32, put("provenance", "more", torch.zeros(2)), "not plain data"),
    "graph missing": (FP32, drop("graph"), "lacks `graph`"),
    "graph list": (FP32, put("graph", [1]), "no graph"),
    "data missing": (FP32, drop("data"), "lacks `data`"),
    "data more": (FP32, put("data", "more", 1), "no more"),
    "classes 9": (FP32, lambda c: c["data"]["classes"].pop(), "not an output a class"),
    "other shape": (FP32, put("data", "shape", [3, 32, 31]), "differ in shape"),
    "unknown op": (FP32, put(*NODES, "fc2", "op", "eval"), "unknown operation"),
    "cycle": (FP32, put(*NODES, "fc1", "inputs", ["fc2"]), "not 1 earlier nodes"),
    "a name that is code": (FP32, put(*NODES, "fc2", "name", "x; int evil"), "no proper name"),
    "a name of torch's": (FP32, put(*NODES, "fc2", "name", "forward"), "has a use for the name"),
    "int8, torch's name": (INT8, put(*NODES, "fc2", "name", "training"), "has a use for the name"),
    "option extra": (FP32, put(*NODES, 0, "options", "dilation", [2, 2]), "its options are not"),
    "option text": (FP32, put(*NODES, 0, "options", "kernel", "33"), "not two whole numbers"),
    "groups": (FP32, put(*NODES, "block2.conv", "options", "groups", 2), "groups 2 is neither"),
    "depthwise": (FP32, put(*NODES, 0, "options", "groups", 3), "no multiple of its groups"),
    "norm behind a ReLU": (
        FP32,
        put(*NODES, 0, "options", "activation", "relu"),
        "does not follow a conv",
    ),
    "packed no bytes": (PACKED, put("tensors", "fc1.weight", "coded", 3), "no bytes"),
    "packed shape": (PACKED, put("tensors", "fc1.weight", "shape", [2048, 256]), "shape"),
    "packed dtype": (PACKED, put("tensors", "fc1.weight", "dtype", "float32"), "dtype"),
    "packed count": (PACKED, put("tensors", "fc1.weight", "stored_values", 10**9), "stores"),
    "packed sparse": (PACKED, put("tensors", "fc1.weight", "sparse", 1), "stores"),
    "packed lengths": (PACKED, put("tensors", "fc1.weight", "coded_lengths", [1]), "2 streams"),
}


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_before_data_are_read(tmp_path, data_read, name, spoil, message):
    path = spoiled(tmp_path, name, spoil)
    data_read.clear()
    error = error_of(path)
    assert message in error and f"{name}.pt" in error and data_read == ["meta"]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (INT8, lambda c: c["tensors"]["fc1.weight"][0].fill_(-128), "-128"),
        (FP32, lambda c: c["tensors"]["block1.bn.running_var"].fill_(-1.0), "negative variance"),
        (FP32, lambda c: c["tensors"]["fc2.bias"].fill_(NAN), "not finite"),
    ],
)
def test_tensors_that_cannot_be_are_refused(tmp_path, name, spoil, message):
    assert message in error_of(spoiled(tmp_path, name, spoil))


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
    content = (HEADLINE / "baseline_int8.pt").read_bytes()
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


# ---- sizes -------------------------------------------------------------------------------------


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


def conv_of(**options):
    """A function that makes other options of a float network's first convolution."""
    return lambda c: c["graph"]["nodes"][0]["options"].update(options)


def image_of(*shape):
    """A function that makes the announced image another one."""

    def spoil(checkpoint):
        checkpoint["graph"]["input_shape"] = checkpoint["data"]["shape"] = list(shape)

    return spoil


def many_branches(checkpoint):
    """Half of MAX_NODES ReLUs of one large map, all of them alive until they are added up."""
    checkpoint["graph"]["input_shape"] = checkpoint["data"]["shape"] = [3, 512, 512]
    names = [f"relu{i}" for i in range(MAX_NODES // 2 - 10)]
    nodes = [{"name": n, "op": "relu", "inputs": ["input"], "options": {}} for n in names]
    last = names[0]
    for name in names[1:]:
        inputs = [last, name]
        last = f"{name}.sum"
        nodes.append({"name": last, "op": "add", "inputs": inputs, "options": {}})
    first = checkpoint["graph"]["nodes"][0]
    checkpoint["graph"]["nodes"] = nodes + checkpoint["graph"]["nodes"]
    first["inputs"] = [last]


def shared_lists(checkpoint):
    """2^30 values in 30 lists of two."""
    value = [1]
    for _ in range(30):
        value = [value, value]
    checkpoint["precision"] = value


BOMBS = {
    "lzma": (PACKED, bomb_of_lzma, "shape"),
    "stride 0": (FP32, expanded(200_000, 200_000), "200000x200000"),
    "stride 0, right shape": (FP32, expanded(256, 2048), "view of other data"),
    "large storage": (
        FP32,
        put("tensors", "fc2.bias", torch.zeros(5_000_000)[:10]),
        "view of other data",
    ),
    "tensor beside": (FP32, put("more", [torch.zeros(2_000_000)]), "of type Tensor"),
    "shared lists": (FP32, shared_lists, "nested too deeply"),
    "huge outputs": (FP32, conv_of(outputs=10**9), "not a whole number from 1"),
    "many outputs": (FP32, conv_of(outputs=65_536), "output is too large"),
    "wide padding": (FP32, conv_of(padding=[60_000, 60_000], stride=[60_000] * 2), "padded input"),
    "large kernel": (
        FP32,
        conv_of(outputs=1, kernel=[2001] * 2, padding=[1000] * 2),
        "multiplications an image",
    ),
    "large image": (FP32, image_of(3, 4096, 4096), "image is too large"),
    "many weights": (FP32, image_of(3, 512, 512), "too many weights"),
    "many nodes": (FP32, lambda c: c["graph"]["nodes"].extend([{}] * MAX_NODES), "no list"),
    "many branches": (FP32, many_branches, "too many"),
}


@pytest.mark.parametrize(("name", "spoil", "message"), BOMBS.values(), ids=BOMBS)
def test_sizes_are_checked_before_data_are_read(tmp_path, data_read, name, spoil, message):
    path = spoiled(tmp_path, name, spoil)
    data_read.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in error_of(path) and data_read == ["meta"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_byte_array_is_refused_before_it_is_allocated(tmp_path, data_read):
    class Bytes:
        def __reduce__(self):
            return bytearray, (2**46,)

    path = spoiled(tmp_path, FP32, put("more", Bytes()))
    data_read.clear()
    assert "refused, never executed" in error_of(path) and data_read == []


def test_compressed_records_are_never_unpacked(tmp_path, data_read):
    path = tmp_path / "baseline_fp32.pt"
    original = HEADLINE / "baseline_fp32.pt"
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            large = record.file_size > 10**6
            content = bytes(10**7) if large else source.read(record)
            method = zipfile.ZIP_DEFLATED if large else zipfile.ZIP_STORED
            target.writestr(record.filename, content, method)
    assert path.stat().st_size < 10**6
    assert "compressed" in error_of(path) and data_read == []


LONG = {
    "norms": ("conv", "batch_norm"),
    "drops": ("dropout",),
    "relus": ("relu",),
    "pools and relus": ("max_pool",) * (MAX_NODES // 2) + ("relu",) * (MAX_NODES // 2),
}


@pytest.mark.parametrize("pattern", LONG.values(), ids=LONG)
def test_long_networks_are_judged_in_linear_time(tmp_path, pattern):
    """At most seconds for as many nodes as there may be; quadratic rewriting took minutes."""
    norm = {"eps": 1e-5, "momentum": 0.1}
    window = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0]}
    options = {"conv": {**window, "outputs": 3, "groups": 1, "bias": 0}, "batch_norm": norm}
    options |= {"max_pool": window, "dropout": {"share": 0.5}}

    def lengthened(checkpoint):
        old, last, made = checkpoint["graph"]["nodes"], "input", []
        ops = ("conv", *(pattern * MAX_NODES)[: MAX_NODES - len(old) - 3 & ~1])
        for i, op in enumerate(ops):
            node = {"name": f"n{i}", "op": op, "inputs": [last], "options": options.get(op, {})}
            made.append(copy.deepcopy(node))
            last = f"n{i}"
        old[0]["inputs"] = [last]
        checkpoint["graph"]["nodes"] = made + old
        checkpoint["precision"] = "int8"

    path = spoiled(tmp_path, FP32, lengthened)
    began = time.process_time()
    assert "not that of a deployed network" in error_of(path)
    assert time.process_time() - began < 5


# ---- names -------------------------------------------------------------------------------------


def test_expected_tensors_are_those_that_files_hold():
    for name in (FP32, INT8, PACKED):
        checkpoint = load_checkpoint(HEADLINE / f"{name}.pt")
        held = {n: (t.dtype, tuple(t.shape)) for n, t in checkpoint["tensors"].items()}
        assert held == expected_tensors(checkpoint)


def renamed(value, names: dict):
    """Nested data with other names in keys and values."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [renamed(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value


def test_names_by_number_and_of_any_length_load(tmp_path):
    """torch.nn.Sequential's are numbers; a tensor's name is longer than its node's."""

    def rename(checkpoint):
        names = {"fc2": "7.0", "fc1": "y" * 200}
        checkpoint["graph"] = renamed(checkpoint["graph"], names)
        kinds = ("weight", "bias")
        tensors = {f"{old}.{k}": f"{new}.{k}" for old, new in names.items() for k in kinds}
        checkpoint["tensors"] = renamed(checkpoint["tensors"], tensors)

    checkpoint = load_checkpoint(spoiled(tmp_path, FP32, rename))
    assert "7.0.weight" in checkpoint["tensors"]


def test_generated_c_uses_no_name_of_a_file():
    checkpoint = load_checkpoint(HEADLINE / "baseline_int8.pt")
    plain = c_source(checkpoint)
    nodes = checkpoint["graph"]["nodes"]
    names = {n["name"]: f"evil_{i}" for i, n in enumerate(nodes) if n["name"] != n["op"]}
    tensors = {f"{old}.{k}": f"{new}.{k}" for old, new in names.items() for k in ("weight", "bias")}
    other = {
        **checkpoint,
        "graph": renamed(checkpoint["graph"], names),
        "quantization": renamed(checkpoint["quantization"], names),
        "tensors": renamed(checkpoint["tensors"], tensors),
    }
    found = c_source(other)
    assert "layer_0" in plain.code and "evil" not in found.code + found.header
    assert (found.code, found.header) == (plain.code, plain.header)
