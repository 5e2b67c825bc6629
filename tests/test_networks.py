"""The shipped networks by arithmetic; a user's network and weights come in, or end in one line."""

import math
import zipfile

import pytest
import torch
from conftest import digest, same_bits
from foreign_networks import FOREIGN
from torch import nn

from edgecnn.errors import UserError
from edgecnn.networks import (
    NETWORKS,
    EdgeCNN,
    default_input_shape,
    load_network,
    load_weights,
)
from mac_hooks import count_macs


def shipped(name):
    return load_network(name, NETWORKS[name].classes, NETWORKS[name].input_shape)


def refused(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the shipped networks --------------------------------------------------------------------------


def test_resnet8_macs_layer_by_layer():
    macs = 1024 * 27 * 16 + 2 * 1024 * 9 * 16 * 16  # stem, stack 1
    macs += 256 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)  # stack 2 with its 1x1 shortcut
    macs += 64 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64) + 640
    weights = 27 * 16 + 18 * 256 + 9 * 1536 + 512 + 9 * 6144 + 2048 + 640
    norms, biases = 2 * (3 * 16 + 2 * 32 + 2 * 64), 32 + 64 + 10
    report = count_macs(shipped("resnet8"), (3, 32, 32))
    assert report.macs == macs == 12_501_632
    assert report.parameters == weights + norms + biases == 77_946


def test_mobilenet_v1_macs_layer_by_layer():
    widths = [8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]
    macs, side = 48 * 48 * 27 * 8, 48
    for count, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False), start=1):
        side //= 2 if count in (2, 4, 6, 12) else 1
        macs += side * side * (9 * inputs + inputs * outputs)
    assert side == 3
    report = count_macs(shipped("mobilenet_v1_025"), (3, 96, 96))
    assert report.macs == macs + 2 * 256 == 7_489_664
    assert report.parameters == 213_586


def test_ds_cnn_macs_layer_by_layer():
    positions = 25 * 5
    macs = positions * 40 * 64 + 4 * positions * (9 * 64 + 64 * 64) + 64 * 12
    report = count_macs(shipped("ds_cnn"), (1, 49, 10))
    assert report.macs == macs == 2_656_768
    assert report.parameters == 40 * 64 + 4 * (9 * 64 + 64 * 64) + 9 * 2 * 64 + 64 * 12 + 12


@pytest.mark.parametrize(
    ("name", "width", "blocks", "all_macs", "all_weights"),
    [
        ("edgeresnet", 32, (0, 1, 2), 11_649_344, 72_176),
        ("edgeresnet_wide", 64, (0, 1, 2), 35_832_448, 270_640),
        ("edgeresnet_deep", 40, (1, 3, 2), 35_721_616, 171_904),
        ("edgeresnet_large", 128, (0, 1, 2), 130_204_928, 1_054_640),
    ],
)
def test_edgeresnet_macs_layer_by_layer(name, width, blocks, all_macs, all_weights):
    layers = [(32, 27 * 16), (32, 9 * 16 * 16 * (1 + 2 * blocks[0]))]  # (side, weights)
    layers += [(16, 9 * 16 * width), (16, 18 * width * width * blocks[1])]
    layers += [(8, 9 * width * width), (8, 18 * width * width * blocks[2]), (1, 10 * width)]
    macs, weights = sum(side**2 * n for side, n in layers), sum(n for _, n in layers)
    channels = 16 * (2 + 2 * blocks[0]) + width * (2 + 2 * blocks[1] + 2 * blocks[2])
    report = count_macs(shipped(name), (3, 32, 32))
    assert report.macs == macs == all_macs
    assert report.weights == weights == all_weights
    assert report.parameters == weights + 2 * channels + 10


def test_edgemixer_macs_layer_by_layer():
    layers = [(32, 27 * 16), (16, 9 * 16 * 24), (8, 9 * 24 * 64), (1, 10 * 64)]  # (side, weights)
    for side, width, blocks in ((16, 24, 1), (8, 64, 3)):
        layers += [(side, 25 * width), (side, 2 * 2 * width * width)] * blocks
    report = count_macs(shipped("edgemixer"), (3, 32, 32))
    assert report.macs == sum(side**2 * n for side, n in layers) == 6_408_832
    assert report.weights == sum(n for _, n in layers) == 75_208


def test_edgecnn_keeps_its_names_and_its_initial_bits():
    """SHA-256 of seed 5, as when the committed weights were trained."""
    torch.manual_seed(5)
    network = EdgeCNN()
    expected = "d8d37b4b682d4d4e969d5b7a07c7448a287bb17701c163bcf29cc273c8e154e1"
    assert digest(network.state_dict()) == expected
    report = count_macs(network, (3, 32, 32))
    assert report.macs == 10_848_768
    assert {row.name: row.weights for row in report.layers if row.macs} == {
        "block1.conv": 864,
        "block2.conv": 18_432,
        "block3.conv": 73_728,
        "fc1": 524_288,
        "fc2": 2_560,
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_other_sizes_channels_and_classes(name):
    for shape in ((1, 35, 27), (3, 64, 48)):
        network = load_network(name, 5, shape).eval()
        assert network(torch.zeros(2, *shape)).shape == (2, 5)
    assert default_input_shape(name) == NETWORKS[name].input_shape


# ---- a user's network ------------------------------------------------------------------------------

USERS_FILE = """
from dataclasses import dataclass
from torch import nn
from layers_of_mine import make_layer

@dataclass
class Options:
    width: int = 3

class MyNet(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        self.fc = make_layer(12, classes)

def fixed():
    return nn.Linear(Options().width, 2)

def sized(input_shape, classes):
    return nn.Linear(input_shape[1], classes)

def broken():
    return 1 / 0

def wrong():
    return "a string"

instance = nn.Linear(1, 1)
number = 3
"""


@pytest.fixture
def nets(tmp_path):
    (tmp_path / "layers_of_mine.py").write_text("from torch.nn import Linear as make_layer\n")
    (tmp_path / "nets.py").write_text(USERS_FILE)
    return tmp_path / "nets.py"


def test_file_and_name_give_a_network(nets):
    assert load_network(f"{nets}:MyNet", 5, (1, 3, 4)).fc.out_features == 5
    assert load_network(f"{nets}:fixed", 5, (1, 3, 4)).out_features == 2
    assert load_network(f"{nets}:sized", 5, (1, 3, 4)).in_features == 3
    assert default_input_shape(f"{nets}:MyNet") is None


def test_what_names_no_network_is_refused_in_one_line(nets):
    folder = nets.parent
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "imports.py").write_text("\nimport no_such_module_anywhere\n")
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    for text, hints in {
        "resnet": ["edgecnn, resnet8, mobilenet_v1_025, ds_cnn", "file.py:Name"],
        f"{folder}/none.py:Net": ["none.py is missing"],
        f"{folder}:Net": ["is missing"],
        f"{nets}:": ["file.py:Name"],
        f"{nets}:Absent": ["no Absent", "MyNet, fixed"],
        f"{nets}:instance": ["a Linear", "class or a function"],
        f"{nets}:number": ["a int", "class or a function"],
        f"{nets}:broken": ["ZeroDivisionError", "nets.py line 22"],
        f"{nets}:wrong": ["gives a str", "torch.nn.Module"],
        f"{folder}/syntax.py:f": ["SyntaxError", "syntax.py line 1"],
        f"{folder}/imports.py:f": ["no_such_module_anywhere", "imports.py line 2"],
        f"{folder}/leaves.py:f": ["SystemExit"],
    }.items():
        message = refused(load_network, text, 10, (3, 32, 32))
        assert all(hint in message for hint in hints), message


# ---- a user's weights ------------------------------------------------------------------------------


def test_a_network_may_call_the_classes_as_torchvision_does(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\ndef net(num_classes):\n    return nn.Linear(2, num_classes)\n"
    )
    assert load_network(f"{tmp_path}/nets.py:net", 7, (3, 8, 8)).out_features == 7


@pytest.fixture
def weights(tmp_path):
    """A network of class OddResNet with its state_dict in a file."""
    network = FOREIGN["odd_resnet"][0]()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    return network, tmp_path / "weights.pt"


def test_weights_come_in_bit_for_bit(weights):
    network, path = weights
    other = FOREIGN["odd_resnet"][0]()
    load_weights(other, path)
    assert same_bits(network.state_dict(), other.state_dict())


def test_batch_counters_may_lack(weights):
    network, path = weights
    state = {k: t for k, t in network.state_dict().items() if "num_batches" not in k}
    torch.save(state, path)
    load_weights(FOREIGN["odd_resnet"][0](), path)


def test_weights_that_do_not_fit_are_refused_and_change_nothing(weights):
    network, path = weights
    state = network.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    first = state["fc.weight"]
    for wrong, hints in [
        ({**state, "fc.weight": first[:2]}, ["fc.weight is (2, 12), not (4, 12)"]),
        ({**state, "fc.weight": first.to(torch.int8)}, ["torch.int8"]),
        ({**state, "fc.weight": first * math.nan}, ["not finite"]),
        ({**state, "fc.extra": first}, ["no fc.extra"]),
        ({k: t for k, t in state.items() if not k.startswith("fc")}, ["lacks fc.weight, fc.bias"]),
        ({"model": state, "epoch": 3}, ["state_dict()"]),
        ([first], ["state_dict()"]),
        ({"fc.weight": nn.Linear(1, 1)}, ["refused, never executed"]),
        ({"fc.weight": torch.zeros(400_000)}, ["bytes"]),
    ]:
        torch.save(wrong, path)
        message = refused(load_weights, network, path)
        assert all(hint in message for hint in hints), message
    assert same_bits(before, state)


def test_files_that_are_no_weights_are_refused(weights):
    network, path = weights
    path.write_bytes(path.read_bytes()[:-300])
    assert "no state_dict" in refused(load_weights, network, path)
    assert "missing" in refused(load_weights, network, path.with_name("none.pt"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data/0", bytes(2**24))
    assert path.stat().st_size < 2**16 and "compressed" in refused(load_weights, network, path)
