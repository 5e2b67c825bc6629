"""A module becomes a graph and a module again, the same to the bit; all else is refused in one line."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import digest, same_bits
from foreign_networks import FOREIGN, SHAPES, captured, fresh
from torch import nn
from torch.nn.utils import prune

from edgecnn.capture import capture, check_classes
from edgecnn.errors import UserError
from edgecnn.graph import GraphError, macs_of, tensor_shapes
from edgecnn.module import module_of, tensors_of
from edgecnn.networks import EdgeCNN
from edgecnn.rewrite import deployed
from mac_hooks import count_macs


def images(name, count=4, seed=1):
    return torch.randn(count, *SHAPES[name], generator=torch.Generator().manual_seed(seed))


# ---- captured and rebuilt --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_rebuilt_network_is_the_captured_one_bit_for_bit(name):
    original, (graph, tensors) = fresh(name), captured(name)
    rebuilt = module_of(graph, tensors).eval()
    assert same_bits(tensors_of(original), tensors_of(rebuilt))
    assert {k: tuple(t.shape) for k, t in tensors_of(rebuilt).items()} == tensor_shapes(graph)
    x = images(name)
    with torch.no_grad():
        y, z = original(x), rebuilt(x)
    assert torch.equal(y, F.log_softmax(z, 1) if name == "lenet" else z)


@pytest.mark.parametrize("name", SHAPES)
def test_rebuilt_network_trains_as_the_captured_one_bit_for_bit(name):
    networks = fresh(name), module_of(*captured(name))
    for network in networks:
        torch.manual_seed(3)  # of dropout
        if name != "lenet":  # whose own view() wants the ordinary layout
            network.to(memory_format=torch.channels_last)
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for step in range(2):
            optimizer.zero_grad()
            F.cross_entropy(network(images(name, 4, step)), torch.tensor([0, 1, 1, 0])).backward()
            optimizer.step()
    original, rebuilt = (tensors_of(network) for network in networks)
    if name == "lenet":  # whose log-softmax is left out: the same loss up to rounding
        assert all(torch.allclose(original[n], rebuilt[n], atol=1e-6) for n in original)
    else:
        assert same_bits(original, rebuilt)
    assert not torch.equal(original[min(original)], captured(name)[1][min(original)])


@pytest.mark.parametrize("name", SHAPES)
def test_macs_are_those_that_hooks_count(name):
    graph, tensors = captured(name)
    report = count_macs(module_of(graph, tensors), SHAPES[name])
    assert {row.name: row.macs for row in report.layers if row.macs} == macs_of(graph)
    assert report.macs == count_macs(fresh(name), SHAPES[name]).macs


@pytest.mark.parametrize("name", SHAPES)
def test_deployed_network_computes_the_same(name):
    graph, tensors = captured(name)
    small, folded = deployed(graph, tensors)
    x = images(name)
    with torch.no_grad():
        y, z = module_of(graph, tensors).eval()(x), module_of(small, folded).eval()(x)
    assert torch.allclose(y, z, rtol=1e-4, atol=1e-4 * y.abs().max())


def test_edgecnn_folds_to_the_bits_of_the_committed_weights():
    """SHA-256 of what folded the committed networks gave for seed 5 and drawn BN tensors."""
    torch.manual_seed(5)
    network = EdgeCNN()
    for name, tensor in network.state_dict().items():
        if ".bn." in name and tensor.ndim:
            tensor.uniform_(0.1, 2)
    graph, folded = deployed(*capture(network, (3, 32, 32)))
    expected = "bdbfa607af1e9a1c3d3360da2fbc1a7f7b06acbbc92c844c0ab0b429e2198b7b"
    assert digest(folded) == expected and sum(t.numel() for t in folded.values()) == 620_362
    assert list(folded) == list(tensor_shapes(graph))


def test_rebuilt_network_is_pruned_and_copied_as_any():
    whole = module_of(*captured("odd_resnet")).eval()
    pruned, x = copy.deepcopy(whole), images("odd_resnet")
    assert torch.equal(pruned(x), whole(x))
    layer = pruned.layer1.conv1
    prune.l1_unstructured(layer, "weight", 0.5)
    assert not torch.equal(pruned(x), whole(x))
    assert (layer.weight == 0).sum() == layer.weight.numel() // 2
    assert (
        count_macs(pruned, SHAPES["odd_resnet"]).nonzero_macs
        < count_macs(whole, SHAPES["odd_resnet"]).macs
    )


def test_capture_and_rebuilding_leave_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    network = fresh("linear_only")
    torch.manual_seed(1)
    module_of(*capture(network, SHAPES["linear_only"]))
    assert torch.equal(torch.rand(1), expected)


def test_tensors_that_do_not_fit_are_refused():
    graph, tensors = captured("linear_only")
    for wrong in (tensors | {"out.weight": torch.zeros(3, 3)}, {}, tensors | {"x": torch.zeros(1)}):
        with pytest.raises(GraphError, match="do not fit"):
            module_of(graph, wrong)


def test_outputs_must_be_the_classes():
    graph = captured("linear_only")[0]
    check_classes(graph, FOREIGN["linear_only"][2])
    with pytest.raises(UserError, match="out with 4 outputs, the data have 10 classes"):
        check_classes(graph, 10)


# ---- the many ways to write the same ---------------------------------------------------------------


class Written(nn.Module):
    """A convolution with 4 channels of 8 x 8, what `middle` does, and a Linear layer."""

    def __init__(self, middle, features=None, **parts):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        for name, part in parts.items():
            setattr(self, name, part)
        self.fc = nn.Linear(features, 3) if features else None
        self.middle = middle

    def forward(self, x):
        x = self.middle(self, self.conv(x))
        return self.fc(x) if self.fc else x


class OwnWeight(nn.Module):
    """A convolution and what follows it in one module."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3, 3))
        self.after = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return F.relu(self.after(F.relu(F.conv2d(x, self.weight, stride=2))))


def relu_overwrites_what_is_added(m, x):
    y = F.relu(x, inplace=True)  # x is y from here on
    return (x + y).flatten(1)


def view_is_overwritten(m, x):
    flat = x.view(-1, 256)
    F.relu_(flat)
    return flat


WRITTEN = {
    "flatten": (lambda m, x: x.flatten(1), 256, "flatten"),
    "view with -1": (lambda m, x: x.view(-1, 256), 256, "flatten"),
    "reshape with size": (lambda m, x: x.reshape(x.shape[0], -1), 256, "flatten"),
    "methods": (lambda m, x: x.relu().flatten(1), 256, "relu flatten"),
    "hardtanh": (lambda m, x: F.hardtanh(x, 0.0, 6.0).flatten(1), 256, "relu6 flatten"),
    "add in place": (lambda m, x: x.add_(F.relu(x)).flatten(1), 256, "relu add flatten"),
    "relu in place": (relu_overwrites_what_is_added, 256, "relu add flatten"),
    "view in place": (view_is_overwritten, 256, "flatten relu"),
    "clone": (lambda m, x: (x.clone().relu_() + x).flatten(1), 256, "relu add flatten"),
    "nothing": (lambda m, x: x.contiguous().float().flatten(1), 256, "flatten"),
    "mean": (lambda m, x: x.mean((-2, -1)), 4, "global_avg_pool flatten"),
    "mean kept": (
        lambda m, x: x.mean([2, 3], keepdim=True).flatten(1),
        4,
        "global_avg_pool flatten",
    ),
    "mean of joined": (lambda m, x: x.flatten(2).mean(-1), 4, "global_avg_pool flatten"),
    "squeezed twice": (
        lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
        4,
        "global_avg_pool flatten",
    ),
    "even adaptive": (
        lambda m, x: F.adaptive_avg_pool2d(x, (4, 2)).flatten(1),
        32,
        "avg_pool flatten",
    ),
    "harmless ceil_mode": (
        lambda m, x: F.avg_pool2d(F.max_pool2d(x, 2, ceil_mode=True), 2, 2, ceil_mode=True).flatten(
            1
        ),
        16,
        "max_pool avg_pool flatten",
    ),
    "softmax": (lambda m, x: F.softmax(x.mean((2, 3)), -1), None, "global_avg_pool flatten"),
    "dropout in place": (
        lambda m, x: F.dropout(x.flatten(1), 0.2, m.training, inplace=True),
        256,
        "flatten dropout",
    ),
    "dropout": (lambda m, x: F.dropout(x, 0.2, m.training).flatten(1), 256, "dropout flatten"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_written_otherwise(name):
    middle, features, operations = WRITTEN[name]
    network = Written(middle, features)
    graph, tensors = capture(network, (1, 8, 8))
    found = " ".join(node.op for node in graph.nodes)
    assert found == f"conv {operations}" + (" linear" if features else "")
    x = torch.randn(3, 1, 8, 8)
    expected, logits = network(x), module_of(graph, tensors).eval()(x)
    assert torch.allclose(
        expected, F.softmax(logits, 1) if name == "softmax" else logits, atol=1e-6
    )


def test_a_module_with_weights_of_its_own_keeps_its_names():
    network = Written(lambda m, x: m.own(x).flatten(1), 18, own=OwnWeight())
    graph, tensors = capture(network, (1, 8, 8))
    rebuilt = module_of(graph, tensors)
    assert sorted(rebuilt.state_dict()) == sorted(network.state_dict())
    assert rebuilt.own.stride == (2, 2) and rebuilt.own.after.kernel_size == (1, 1)


# ---- refusals --------------------------------------------------------------------------------------


def twice(m, x):
    return m.part(m.part(x)).flatten(1)


def part(m, x):
    return m.part(x).flatten(1)


def through(module, features=256):
    return lambda: Written(part, features, part=module())


def tied():
    network = Written(lambda m, x: m.b(m.a(x)).flatten(1), 256)
    network.a, network.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    network.b.weight = network.a.weight
    return network


def with_weight_norm():
    return Written(part, 256, part=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))


def frozen():
    network = Written(lambda m, x: x.flatten(1), 256)
    network.conv.weight.requires_grad = False
    return network


def called_input():
    return Written(
        lambda m, x: m.get_submodule("input")(x).flatten(1), 256, input=nn.Conv2d(4, 4, 1)
    )


def decides(m, x):
    return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def lstm(m, x):
    return m.part(x.flatten(2))[0].flatten(1)


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


def middle(function, features=256):
    return lambda: Written(function, features)


def norm_of_what_is_read_twice(m, x):
    return (m.part(x) + x).flatten(1)


REFUSED = {  # what -> (network, what the line must say)
    "SiLU": (through(nn.SiLU), ["part = SiLU()", "silu", "supported are Conv2d"]),
    "transposed convolution": (
        through(lambda: nn.ConvTranspose2d(4, 4, 1)),
        ["part = ConvTranspose2d(4, 4", "conv_transpose2d", "supported are Conv2d"],
    ),
    "LSTM": (
        lambda: Written(lstm, 256, part=nn.LSTM(64, 64, batch_first=True)),
        ["part = LSTM(64, 64", "supported are Conv2d"],
    ),
    "concat": (
        middle(lambda m, x: torch.cat([x, x], 1).flatten(1), 512),
        ["(Written), test_capture.py line ", "runs cat"],
    ),
    "dilation": (
        through(lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
        ["part = Conv2d(4, 4", "dilation (2, 2)"],
    ),
    "dilated pool": (
        through(lambda: nn.MaxPool2d(2, 1, dilation=2), 144),
        ["part", "dilation (2, 2)"],
    ),
    "control flow": (
        middle(decides),
        ["torch.export", "(Written)", "data-dependent", "(test_capture.py line "],
    ),
    "tuple": (middle(lambda m, x: (x, x), None), ["gives a tuple", "one tensor"]),
    "dict": (middle(lambda m, x: {"a": x}, None), ["gives a dict", "one tensor"]),
    "too small": (
        middle(lambda m, x: F.max_pool2d(x, 9).flatten(1)),
        ["image of (1, 8, 8)", "too small"],
    ),
    "channels": (through(lambda: nn.Conv2d(3, 4, 1)), ["part = Conv2d(3, 4", "to have 3 channels"]),
    "reflect": (
        through(lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        ["part = Conv2d", "padding_mode=reflect", "pad"],
    ),
    "uneven padding": (
        through(lambda: nn.Conv2d(4, 4, 2, padding="same")),
        ["part", "even kernel"],
    ),
    "groups": (through(lambda: nn.Conv2d(4, 4, 1, groups=2)), ["part", "groups 2"]),
    "norm first": (
        lambda: Written(lambda m, x: m.part(x.relu()).flatten(1), 256, part=nn.BatchNorm2d(4)),
        ["part (batch_norm)", "does not follow", "right after"],
    ),
    "norm beside": (
        lambda: Written(norm_of_what_is_read_twice, 256, part=nn.BatchNorm2d(4)),
        ["part (batch_norm)", "nothing else reads"],
    ),
    "no scale": (
        through(lambda: nn.BatchNorm2d(4, affine=False)),
        ["part = Batch", "affine=False"],
    ),
    "no statistics": (
        through(lambda: nn.BatchNorm2d(4, track_running_stats=False)),
        ["part = BatchNorm2d(4", "track_running_stats=False"],
    ),
    "no momentum": (through(lambda: nn.BatchNorm2d(4, momentum=None)), ["part", "momentum"]),
    "layer norm": (through(lambda: nn.LayerNorm([4, 8, 8])), ["part = LayerNorm", "layer_norm"]),
    "used twice": (
        lambda: Written(twice, 256, part=nn.Conv2d(4, 4, 1)),
        ["part is used more than"],
    ),
    "tied": (tied, ["a = Conv2d", "belong to a and b"]),
    "computed weight": (with_weight_norm, ["part", "not supported"]),
    "unused": (
        lambda: Written(lambda m, x: x.flatten(1), 256, aux=nn.Linear(2, 2)),
        ["never uses aux.weight, aux.bias"],
    ),
    "frozen": (frozen, ["conv.weight is frozen"]),
    "half": (
        lambda: Written(lambda m, x: x.flatten(1), 256).half(),
        ["conv.weight is torch.float16"],
    ),
    "called input": (called_input, ["must not be called input"]),
    "weights in the root": (lambda: nn.Linear(8, 3), ["Linear", "in the network itself"]),
    "padded mean": (
        through(lambda: nn.AvgPool2d(2, padding=1), 100),
        ["part = AvgPool2d", "padding"],
    ),
    "uneven pool": (through(lambda: nn.AdaptiveAvgPool2d(3), 36), ["part", "evenly"]),
    "ceil_mode": (through(lambda: nn.MaxPool2d(3, 3, ceil_mode=True), 36), ["part", "(4, 3, 3)"]),
    "indices": (
        middle(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0].flatten(1), 64),
        ["max"],
    ),
    "dropout2d": (through(lambda: nn.Dropout2d(0.1)), ["part = Dropout2d", "feature_dropout"]),
    "dropout always": (middle(lambda m, x: F.dropout(x, 0.5).flatten(1)), ["evaluation"]),
    "hardtanh": (through(nn.Hardtanh), ["part = Hardtanh", "-1.0 and 1.0"]),
    "added number": (middle(lambda m, x: (x + 1).flatten(1)), ["no activation"]),
    "scaled sum": (middle(lambda m, x: torch.add(x, x, alpha=2).flatten(1)), ["alpha"]),
    "broadcast": (middle(lambda m, x: (x + x.mean((2, 3), True)).flatten(1)), ["adds"]),
    "product": (middle(lambda m, x: (x * x).flatten(1)), ["runs mul"]),
    "permuted": (middle(lambda m, x: x.permute(0, 2, 3, 1).flatten(1)), ["runs permute"]),
    "mixed images": (middle(lambda m, x: x.view(1, -1).view(2, -1)), ["its own numbers"]),
    "mean of all": (middle(lambda m, x: (x - x.mean()).flatten(1)), ["rows and columns"]),
    "mean of rows": (middle(lambda m, x: x.mean(2).flatten(1), 32), ["rows and columns"]),
    "softmax inside": (middle(lambda m, x: F.softmax(x.flatten(1), 1)), ["ends the network"]),
    "softmax over images": (middle(lambda m, x: F.softmax(x.flatten(1), 0), None), ["dimension 0"]),
    "map": (middle(lambda m, x: x, None), ["(4, 8, 8)", "one number a class"]),
    "nothing": (nn.Identity, ["(1, 8, 8)"]),
    "two inputs": (TwoInputs, ["missing 1 required"]),
    "numpy": (middle(lambda m, x: torch.tensor(x.numpy()).flatten(1)), ["numpy"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(what, capfd):
    network, hints = REFUSED[what]
    with pytest.raises(UserError) as error:
        capture(network(), (1, 8, 8))
    message = str(error.value)
    assert "\n" not in message and len(message) < 800
    assert all(hint in message for hint in hints), message
    assert capfd.readouterr() == ("", "")
