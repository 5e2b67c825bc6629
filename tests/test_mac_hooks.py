"""Tests of mac_hooks.py: closed forms, properties, and the figures that torchvision publishes."""

import copy
import dataclasses
import json
import subprocess
import sys
import types
import warnings
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import REPOSITORY
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import mac_hooks
from edgecnn.networks import EdgeCNN
from mac_hooks import count_macs, energy_score

# ---------------------------------------------------------------- closed forms

LAYERS = {
    # weights x output positions
    "conv1d": (nn.Conv1d, (3, 8, 5), {}, (3, 20), 8 * 3 * 5 * 16),
    "conv2d": (nn.Conv2d, (3, 8, 3), {"padding": 1}, (3, 10, 12), 8 * 3 * 9 * 120),
    "conv2d no bias": (nn.Conv2d, (3, 8, 1), {"bias": False}, (3, 4, 5), 8 * 3 * 20),
    "conv2d stride": (nn.Conv2d, (3, 8, 3), {"stride": 2}, (3, 11, 9), 8 * 3 * 9 * 5 * 4),
    "conv2d dilation": (nn.Conv2d, (3, 8, 3), {"dilation": 2}, (3, 10, 12), 8 * 3 * 9 * 6 * 8),
    "conv2d oblong": (nn.Conv2d, (3, 8, (1, 5)), {}, (3, 10, 12), 8 * 3 * 5 * 10 * 8),
    "conv2d same": (nn.Conv2d, (3, 8, 4), {"padding": "same"}, (3, 6, 7), 8 * 3 * 16 * 42),
    "conv2d circular": (
        nn.Conv2d,
        (3, 8, 3),
        {"padding": 1, "padding_mode": "circular"},
        (3, 6, 7),
        8 * 3 * 9 * 42,
    ),
    "conv2d groups": (nn.Conv2d, (6, 9, 3), {"groups": 3}, (6, 7, 8), 9 * 2 * 9 * 5 * 6),
    "conv2d depthwise": (nn.Conv2d, (6, 12, 3), {"groups": 6}, (6, 7, 8), 12 * 1 * 9 * 5 * 6),
    "conv3d": (nn.Conv3d, (2, 3, 3), {"padding": 1}, (2, 4, 5, 6), 3 * 2 * 27 * 120),
    # weights x input positions
    "transposed 1d": (nn.ConvTranspose1d, (3, 8, 4), {"stride": 2}, (3, 10), 3 * 8 * 4 * 10),
    "transposed 2d": (
        nn.ConvTranspose2d,
        (4, 6, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        (4, 5, 7),
        4 * 3 * 9 * 35,
    ),
    "transposed 3d": (nn.ConvTranspose3d, (2, 3, 2), {}, (2, 3, 4, 5), 2 * 3 * 8 * 60),
    # weights x leading positions
    "linear": (nn.Linear, (12, 7), {}, (12,), 12 * 7),
    "linear, leading": (nn.Linear, (12, 7), {"bias": False}, (4, 5, 12), 12 * 7 * 20),
    # (input weights + hidden weights) x gates x time steps
    "rnn": (nn.RNN, (4, 5), {"batch_first": True}, (6, 4), (4 + 5) * 5 * 6),
    "gru": (nn.GRU, (4, 5), {"batch_first": True}, (6, 4), 3 * (4 + 5) * 5 * 6),
    "lstm": (nn.LSTM, (4, 5), {"batch_first": True}, (6, 4), 4 * (4 + 5) * 5 * 6),
    "gru, both ways": (
        nn.GRU,
        (4, 5, 2),
        {"batch_first": True, "bidirectional": True},
        (6, 4),
        2 * 3 * ((4 + 5) + (10 + 5)) * 5 * 6,  # the second layer reads both directions of the first
    ),
    "lstm, both ways": (
        nn.LSTM,
        (4, 5, 2),
        {"batch_first": True, "bidirectional": True, "bias": False},
        (6, 4),
        2 * 4 * ((4 + 5) + (10 + 5)) * 5 * 6,
    ),
    "lstm, projected": (
        nn.LSTM,
        (4, 5),
        {"batch_first": True, "proj_size": 2},
        (6, 4),
        (4 * (4 + 2) * 5 + 5 * 2) * 6,
    ),
    "rnn cell": (nn.RNNCell, (4, 5), {}, (4,), (4 + 5) * 5),
    "gru cell": (nn.GRUCell, (4, 5), {}, (4,), 3 * (4 + 5) * 5),
    "lstm cell": (nn.LSTMCell, (4, 5), {}, (4,), 4 * (4 + 5) * 5),
    # excluded by convention
    "batch norm": (nn.BatchNorm2d, (3,), {}, (3, 4, 4), 0),
    "layer norm": (nn.LayerNorm, ((3, 4, 4),), {}, (3, 4, 4), 0),
    "group norm": (nn.GroupNorm, (2, 4), {}, (4, 5, 5), 0),
    "prelu": (nn.PReLU, (3,), {}, (3, 4, 4), 0),
    "max pool": (nn.MaxPool2d, (2,), {}, (3, 4, 4), 0),
    "average pool": (nn.AdaptiveAvgPool2d, (1,), {}, (3, 4, 4), 0),
    "softmax": (nn.Softmax, (1,), {}, (3, 4, 4), 0),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_has_its_closed_form(kind, device):
    layer_type, args, options, input_size, macs = LAYERS[kind]
    layer = layer_type(*args, **options).to(device)
    report = count_macs(layer, input_size)
    assert (report.macs, report.activation_macs, report.total_macs) == (macs, 0, macs)
    assert report.parameters == sum(p.numel() for p in layer.parameters())
    on_meta = any(p.is_meta for p in layer.parameters())
    if macs:  # initial weights are random: none of these few is exactly zero
        assert report.nonzero_macs == (None if on_meta else macs)
        assert report.layers[0].bits == 32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bilinear_uses_each_weight_once_per_position(device):
    inputs = torch.zeros(1, 6, 3, device=device), torch.zeros(1, 6, 4, device=device)
    report = count_macs(nn.Bilinear(3, 4, 5, device=device), example_inputs=inputs)
    assert (report.macs, report.activation_macs) == (5 * 3 * 4 * 6, 0)


@pytest.mark.parametrize("layer_type", [nn.Embedding, nn.EmbeddingBag])
def test_embedding_is_a_look_up(layer_type):
    model = nn.Sequential(layer_type(10, 4), nn.Linear(4, 3))
    report = count_macs(model, example_inputs=torch.tensor([[1, 2, 9]]))
    positions = 3 if layer_type is nn.Embedding else 1
    assert report.macs == 4 * 3 * positions
    assert (report.layers[0].macs, report.layers[0].parameters) == (0, 40)


def test_project_network_matches_the_arithmetic():
    report = count_macs(EdgeCNN(), (3, 32, 32))
    by_hand = [
        32 * 3 * 9 * 32 * 32,
        64 * 32 * 9 * 16 * 16,
        128 * 64 * 9 * 8 * 8,
        2048 * 256,
        256 * 10,
    ]
    assert by_hand == [884_736, 4_718_592, 4_718_592, 524_288, 2_560]
    assert [row.macs for row in report.layers if row.macs] == by_hand
    assert report.macs == 10_848_768
    assert report.weights == 619_872
    assert report.layers[0].output_shape == (1, 32, 32, 32)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_count_does_not_depend_on_the_grad_mode(grad):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    with grad():
        assert count_macs(model, (3, 8, 8)).macs == 4 * 3 * 9 * 36 + 4 * 36 * 5


# ---------------------------------------------------------------- inputs and outputs


def test_example_inputs_are_left_alone_also_those_of_inference_mode():
    with torch.inference_mode():
        x = torch.ones(1, 3, 3)
        report = count_macs(Functional(lambda m, x: x.neg_() @ x), example_inputs=x)
    assert (report.activation_macs, x.sum()) == (27, 9)


def test_a_product_that_inference_mode_hides_in_a_nested_input_is_named():
    with torch.inference_mode():
        x = torch.ones(1, 3, 3)
        with pytest.raises(ValueError, match=r"aten\.matmul inside \(model\)"):
            count_macs(Functional(lambda m, pair: pair[0] @ pair[1]), example_inputs=((x, x),))


def test_example_inputs_may_be_keyword_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, *, left, scale=1, right):
            return self.linear(left) * scale + right

    inputs = {"left": torch.zeros(1, 4), "right": torch.zeros(1, 5), "scale": 3}
    report = count_macs(Named(), example_inputs=inputs)
    assert (report.macs, report.input_shapes) == (20, [(1, 4), (1, 5)])


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: list


@dataclasses.dataclass(slots=True)
class Slotted:
    logits: torch.Tensor


# what a forward may make of its output, and the shape that its row shows
OUTPUTS = {
    "dataclass": (lambda y: Result(y, [y]), (1, 5)),
    "slotted dataclass": (Slotted, (1, 5)),
    "namespace": (lambda y: types.SimpleNamespace(logits=y, more={"deep": (y,)}), (1, 5)),
    "named tuple": (lambda y: y.max(dim=1), (1,)),
    "dict of lists": (lambda y: {"a": [{"b": y}]}, (1, 5)),
    "numpy array": (lambda y: y.numpy(), (1, 5)),
    "list of floats": (lambda y: y[0].tolist(), ()),
    "float": (lambda y: float(y.sum()), ()),
    "int": (lambda y: int(y.argmax()), ()),
    "itself": (lambda y: _circle(y), (1, 5)),
}


def _circle(y):
    namespace = types.SimpleNamespace(logits=y)
    namespace.itself = namespace
    return namespace


@pytest.mark.parametrize("kind", OUTPUTS)
def test_output_of_any_kind_is_counted(kind):
    make, shape = OUTPUTS[kind]

    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 5))

        def forward(self, x):
            return make(x @ self.w)

    (row,) = count_macs(nn.Sequential(Returns()), (4,)).layers
    assert (row.macs, row.output_shape) == (20, shape)
    report = count_macs(nn.Sequential(Returns()), (4,))
    assert "not run" not in str(report)


@pytest.mark.parametrize("make", [lambda y: y.numpy(), lambda y: float(y.sum())])
def test_weight_used_outside_torch_is_named_whatever_the_output(make):
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 5))

        def forward(self, x):
            return make(torch.from_numpy(x.numpy() @ self.w.detach().numpy()))

    with pytest.raises(ValueError, match=r"w 4x5 of \(model\) \(Outside\): no operation on it"):
        count_macs(Outside(), (4,))


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention(device, training, batch_first):
    length, width = 7, 12
    attention = nn.MultiheadAttention(width, 4, batch_first=batch_first, device=device)
    attention.train(training)
    shape = (1, length, width) if batch_first else (length, 1, width)
    x = torch.zeros(shape, device=device)
    report = count_macs(attention, example_inputs=(x, x, x))
    assert report.macs == 4 * width * width * length  # q, k, v and output projections
    assert report.activation_macs == 2 * length * length * width  # scores and values
    assert [row.name for row in report.layers] == ["(model)", "out_proj"]
    assert report.parameters == 4 * width * width + 4 * width


@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 3}])
def test_cross_attention(widths):
    queries, keys, width = 7, 9, 12
    attention = nn.MultiheadAttention(width, 3, batch_first=True, **widths)
    kdim, vdim = widths.get("kdim", width), widths.get("vdim", width)
    shapes = (1, queries, width), (1, keys, kdim), (1, keys, vdim)
    report = count_macs(attention, example_inputs=tuple(torch.zeros(s) for s in shapes))
    projections = 2 * queries * width * width + keys * width * (kdim + vdim)
    assert (report.macs, report.activation_macs) == (projections, 2 * queries * keys * width)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer_in_both_modes(training, norm_first):
    length, width, hidden = 6, 8, 20
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    report = count_macs(encoder, (length, width))
    assert report.macs == 2 * length * (4 * width * width + 2 * width * hidden)
    assert report.activation_macs == 2 * 2 * length * length * width
    assert torch.backends.mha.get_fastpath_enabled() is fastpath is True


# ---------------------------------------------------------------- captured networks


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_captured_network_counts_as_the_one_it_was_made_from(capture):
    model, x = EdgeCNN().eval(), torch.zeros(1, 3, 32, 32)
    if capture == "symbolic_trace":
        captured = torch.fx.symbolic_trace(model)
    else:
        captured = torch.export.export(model, (x,)).module()
    report, plain = count_macs(captured, example_inputs=x), count_macs(model, example_inputs=x)
    assert (report.macs, report.nonzero_macs) == (plain.macs, plain.nonzero_macs)
    assert (report.parameters, report.weights) == (plain.parameters, plain.weights)


# ---------------------------------------------------------------- zeros and sharing


def test_nonzero_macs_are_nonzero_weights_times_positions():
    conv = nn.Conv2d(2, 4, 3)
    with torch.no_grad():
        conv.weight[0] = 0
        conv.weight[1, 0, 0, 0] = 0
    report = count_macs(conv, (2, 6, 6))
    assert (report.macs, report.nonzero_macs) == (72 * 16, (72 - 18 - 1) * 16)
    assert (report.parameters, report.nonzero_parameters) == (76, 76 - 19)


def test_zeros_are_those_of_weights_without_biases_and_normalisation():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm([4, 4, 4]))
    model.append(nn.PReLU(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight[1:] = 1
    report = count_macs(model, (2, 6, 6))
    assert [row.zeros_percent for row in report.layers] == [25.0, None, None, None]
    assert (report.weights, report.nonzero_weights) == (72, 54)
    assert str(report).splitlines()[-1].split()[-2] == "25.0"


@pytest.mark.parametrize("stale", [True, False])
def test_pruned_layer_counts_the_effective_weight(stale):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    prune.l1_unstructured(model[0], "weight", 0.25)
    prune.random_unstructured(model[2], "weight", amount=100)
    if stale:  # the attribute is refreshed only by the pruned layer's own pre-hook
        model[0].weight = torch.zeros_like(model[0].weight)
    report = count_macs(model, (2, 6, 6))
    assert [row.name for row in report.layers] == ["0", "2"]
    assert [row.macs for row in report.layers] == [72 * 16, 320]
    assert [row.nonzero_macs for row in report.layers] == [54 * 16, 220]
    assert report.nonzero_parameters == 54 + 4 + 220 + 5
    prune.remove(model[0], "weight")
    prune.remove(model[2], "weight")
    assert count_macs(model, (2, 6, 6)).to_dict() == report.to_dict()


@pytest.mark.parametrize(
    "parametrization",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
def test_parametrized_layer_counts_as_the_plain_one(parametrization):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    plain = count_macs(model, (6,))
    model[0] = parametrization(model[0])
    report = count_macs(model, (6,))
    assert [row.name for row in report.layers] == ["0", "2"]
    assert (report.macs, report.parameters) == (plain.macs, plain.parameters)
    assert report.layers[0].output_shape == (1, 4)


def test_sparse_weight_is_counted_by_its_values():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.eye(4).to_sparse())

        def forward(self, x):
            return torch.sparse.mm(self.w, x.T)

    report = count_macs(Sparse(), (4,))
    assert (report.macs, report.nonzero_macs) == (16, 4)


class StatefulRecurrent(nn.Module):
    """A recurrent layer whose input or first state is stored, the other one the model's input."""

    def __init__(self, layer_type, stored):
        super().__init__()
        self.layer, self.stored = layer_type(4, 5), stored
        self.register_parameter("x", nn.Parameter(torch.ones(6, 1, 4)))
        self.register_parameter("state", nn.Parameter(torch.ones(1, 1, 5)))

    def forward(self, given):
        x, state = (self.x, given) if self.stored == "x" else (given, self.state)
        state = (state, state) if isinstance(self.layer, nn.LSTM) else state
        return self.layer(x, state)[0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("layer_type", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize(("stored", "shape"), [("x", (1, 1, 5)), ("state", (6, 1, 4))])
def test_recurrent_layer_with_one_active_input_runs_whole(layer_type, gates, stored, shape, device):
    model = StatefulRecurrent(layer_type, stored).to(device)
    report = count_macs(model, example_inputs=torch.zeros(shape, device=device), unknown="warn")
    assert (report.macs, report.folded_macs) == (gates * (4 + 5) * 5 * 6, 0)
    assert [row.name for row in report.layers if row.macs] == ["layer"]


def test_recurrent_layer_of_stored_tensors_alone_folds():
    class Stored(StatefulRecurrent):
        def forward(self, given):
            return given + self.layer(self.x, (self.state, self.state))[0]

    report = count_macs(Stored(nn.LSTM, ""), example_inputs=torch.zeros(6, 1, 5), unknown="warn")
    assert (report.macs, report.folded_macs) == (0, 4 * (4 + 5) * 5 * 6)


def test_share_of_the_nonzero_weights_is_exact():
    class Tall(nn.Module):  # 3 x 5 weights, used seven times each, of which 4 are not zero
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[1.0, 0, 0, 0, 1]] * 2 + [[0.0] * 5]))

        def forward(self, x):
            return x @ self.w

    report = count_macs(Tall(), (7, 3))
    assert (report.macs, report.nonzero_macs) == (105, 28)


def test_a_weight_rewritten_during_the_forward_is_counted_anew():
    class Halves(nn.Module):
        def forward(self, x):
            w = torch.ones(4, 4)
            y = x @ w
            w[:2] = 0
            return y @ w

    assert count_macs(Halves(), (4,)).nonzero_macs == 16 + 8


def test_packed_sequence_counts_its_steps():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5)

        def forward(self, x):
            return self.lstm(nn.utils.rnn.pack_padded_sequence(x, [6]))[0].data

    report = count_macs(Packed(), example_inputs=torch.zeros(9, 1, 4))
    assert report.macs == 4 * (4 + 5) * 5 * 6


def test_products_of_stored_tensors_are_folded_and_reported():
    class LowRank(nn.Module):
        def forward(self, weight):
            return weight[:, :2] @ weight[:2, :]

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", LowRank())
    report = count_macs(layer, (4,))
    assert report.macs == 16
    assert report.folded_macs == 4 * 2 * 4
    assert "not in the totals: 32 MACs" in str(report)


def test_shared_module_sums_its_calls_and_counts_its_parameters_once():
    layer = nn.Linear(6, 6)
    report = count_macs(nn.Sequential(layer, nn.ReLU(), layer, layer), (5, 6))
    assert len(report.layers) == 1
    assert (report.macs, report.nonzero_macs, report.parameters) == (540, 540, 42)


def test_tied_weight_is_booked_on_the_running_layer():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    report = count_macs(model, example_inputs=torch.tensor([[1, 2, 3]]))
    assert [(row.macs, row.parameters) for row in report.layers] == [(0, 40), (120, 0)]


def test_half_precision_has_sixteen_bits():
    report = count_macs(nn.Linear(4, 5).to(torch.bfloat16), (4,))
    assert report.layers[0].bits == 16
    assert report.energy == energy_score(20, 16)


def test_layer_that_does_not_run_keeps_its_parameters():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.auxiliary = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    report = count_macs(Auxiliary(), (4,))
    assert [(r.name, r.macs, r.parameters) for r in report.layers] == [
        ("head", 8, 10),
        ("auxiliary", 0, 15),
    ]
    assert report.layers[1].output_shape is None
    assert "not run" in str(report)


# ---------------------------------------------------------------- quantized


@pytest.fixture
def qnnpack():
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao.quantization announces one
        warnings.simplefilter("ignore", UserWarning)
        yield
    torch.backends.quantized.engine = engine


def _float_network():
    torch.manual_seed(0)
    layers = [torch.ao.quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU()]
    layers += [nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(98, 8), nn.ReLU()]
    layers += [nn.Linear(8, 2), torch.ao.quantization.DeQuantStub()]
    return nn.Sequential(*layers).eval()


QUANTIZED_MACS = [4 * 3 * 9 * 36, 4 * 2 * 4 * 36, 98 * 8, 8 * 2]


def test_static_quantized_network(qnnpack):
    from torch.ao import quantization
    from torch.ao.nn.intrinsic import quantized as fused

    model = _float_network()
    with torch.no_grad():
        model[1].weight[:2] = 0
        model[5].weight[:, :50] = 0
    float_report = count_macs(model, (3, 8, 8))
    model.qconfig = quantization.get_default_qconfig("qnnpack")
    model = quantization.fuse_modules(model, [["1", "2"], ["5", "6"]])
    model = quantization.prepare(model)
    model(torch.randn(4, 3, 8, 8))
    model = quantization.convert(model)
    assert isinstance(model[1], fused.ConvReLU2d)
    assert isinstance(model[5], fused.LinearReLU)

    report = count_macs(model, (3, 8, 8))
    rows = [row for row in report.layers if row.macs]
    assert [row.name for row in rows] == ["1", "3", "5", "7"]
    assert [row.macs for row in rows] == QUANTIZED_MACS
    assert [row.bits for row in rows] == [8, 8, 8, 8]
    for row, weight in zip(rows, [model[i].weight() for i in (1, 3, 5, 7)], strict=True):
        nonzero = int((weight.int_repr() != weight.q_zero_point()).sum())
        assert row.nonzero_macs * weight.numel() == row.macs * nonzero
    assert rows[0].nonzero_macs <= QUANTIZED_MACS[0] // 2
    assert report.parameters == float_report.parameters
    assert report.energy == pytest.approx(energy_score(report.nonzero_macs, 8))


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
def test_quantized_zero_is_the_zero_point_of_the_channel():
    class Dequantized(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("weight", weight)

        def forward(self, x):
            return F.linear(x, self.weight.dequantize())

    weight = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    scales, points = torch.full((3,), 0.1), torch.tensor([0, 3, -5])
    per_channel = torch.quantize_per_channel(weight, scales, points, 0, torch.qint8)
    per_tensor = torch.quantize_per_tensor(weight, 0.1, 7, torch.qint8)
    for quantized in (per_channel, per_tensor):
        (row,) = count_macs(Dequantized(quantized), (2,)).layers
        assert (row.macs, row.nonzero_macs, row.bits) == (6, 2, 8)


def test_dynamic_quantized_linear(qnnpack):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    report = count_macs(model, (3, 6))
    assert [(row.macs, row.bits) for row in report.layers] == [(90, 8), (60, 8)]
    assert report.parameters == 30 + 5 + 20 + 4


def test_fused_and_fake_quantized_networks_count_as_float(qnnpack):
    from torch.ao import quantization

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(model, nn.Linear(144, 2)).train()
    model.qconfig = quantization.get_default_qat_qconfig("qnnpack")
    trained = quantization.fuse_modules_qat(model, [["0.0", "0.1", "0.2"]])
    trained = quantization.prepare_qat(trained)
    before = copy.deepcopy(trained.state_dict())
    report = count_macs(trained, (3, 8, 8))
    assert report.macs == 4 * 3 * 9 * 36 + 288
    _assert_same(before, trained.state_dict())  # the observers have seen nothing


# layer, input size, gates x directions, layers, steps: each uses (input + hidden) x hidden weights
RECURRENT = {
    "rnn cell": (nn.RNNCell(10, 20), (10,), (10 + 20) * 20),
    "gru cell": (nn.GRUCell(10, 20), (10,), 3 * (10 + 20) * 20),
    "lstm cell": (nn.LSTMCell(10, 20), (10,), 4 * (10 + 20) * 20),
    "gru": (nn.GRU(4, 5, batch_first=True), (6, 4), 3 * (4 + 5) * 5 * 6),
    "lstm": (nn.LSTM(4, 5), (6, 4), 4 * (4 + 5) * 5 * 6),
    "lstm, both ways": (
        nn.LSTM(4, 5, 2, bidirectional=True),
        (6, 4),
        2 * 4 * ((4 + 5) + (10 + 5)) * 5 * 6,
    ),
}


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("kind", RECURRENT)
def test_dynamic_quantized_recurrent_layer(qnnpack, kind, dtype):
    layer, input_size, macs = RECURRENT[kind]
    assert macs in (600, 1800, 2400) or "cell" not in kind
    if dtype is torch.float16:
        torch.backends.quantized.engine = "fbgemm"  # QNNPACK has none
    model = nn.Sequential(copy.deepcopy(layer))
    parameters = sum(p.numel() for p in model.parameters())
    model = torch.ao.quantization.quantize_dynamic(model, {type(layer)}, dtype=dtype)
    report = count_macs(model, input_size)
    (row,) = report.layers
    assert (row.name, row.macs, row.bits) == ("0", macs, 8 if dtype is torch.qint8 else 16)
    assert row.parameters == parameters
    assert row.weights == sum(p.numel() for p in layer.parameters() if p.ndim > 1)
    if dtype is torch.float16:  # rounding to eight bits may make a zero
        assert row.nonzero_macs == macs


def test_float16_dynamic_linear_has_sixteen_bits(qnnpack):
    torch.backends.quantized.engine = "fbgemm"
    model = nn.Sequential(nn.Linear(6, 5))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.float16)
    (row,) = count_macs(model, (6,)).layers
    assert (row.macs, row.bits) == (30, 16)


@pytest.mark.parametrize(
    ("layer_type", "bits"), [(nn.Embedding, 8), (nn.EmbeddingBag, 8), (nn.EmbeddingBag, 4)]
)
def test_quantized_embedding_is_a_look_up(qnnpack, layer_type, bits):
    from torch.ao import quantization

    configs = {
        8: quantization.float_qparams_weight_only_qconfig,
        4: quantization.float_qparams_weight_only_qconfig_4bit,
    }
    model = nn.Sequential(layer_type(10, 12), nn.Linear(12, 3)).eval()
    model[0].qconfig = configs[bits]
    model = quantization.convert(quantization.prepare(model))
    positions = 3 if layer_type is nn.Embedding else 1
    report = count_macs(model, example_inputs=torch.tensor([[1, 2, 9]]))
    assert [(r.name, r.macs, r.parameters) for r in report.layers] == [
        ("0", 0, 120),
        ("1", 12 * 3 * positions, 39),
    ]


def test_packed_weights_that_are_not_understood_are_named(qnnpack):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8)
            self.packed = torch.ops.sparse.qlinear_prepack(weight, None, 1, 4)

        def forward(self, x):
            return torch.ops.sparse.qlinear_dynamic(x, self.packed)

    with pytest.raises(ValueError, match=r"sparse\.qlinear_dynamic inside 0, on packed weights"):
        count_macs(nn.Sequential(Packed()), (8,))


class WidenedWeight(nn.Module):
    """As PT2E leaves a quantized layer: an integer weight made a float before its convolution."""

    def __init__(self, decomposed):
        super().__init__()
        self.register_buffer("weight", torch.ones(4, 3, 1, 1, dtype=torch.int8))
        self.register_buffer("scale", torch.full((4,), 0.1))
        self.register_buffer("zero_point", torch.zeros(4, dtype=torch.int64))
        self.decomposed = decomposed

    def forward(self, x):
        if not self.decomposed:
            return F.conv2d(x, self.weight.float() * self.scale.view(4, 1, 1, 1))
        x = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.1, 0, 0, 255, torch.uint8)
        x = torch.ops.quantized_decomposed.dequantize_per_tensor(x, 0.1, 0, 0, 255, torch.uint8)
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.scale, self.zero_point, 0, -127, 127, torch.int8
        )
        return F.conv2d(x, weight)


@pytest.mark.parametrize("decomposed", [False, True])
def test_width_is_that_of_the_stored_weight_or_the_one_given(decomposed):
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operations

    (row,) = count_macs(WidenedWeight(decomposed), (3, 2, 2)).layers
    assert (row.macs, row.bits) == (4 * 3 * 4, 8)
    (row,) = count_macs(WidenedWeight(decomposed), (3, 2, 2), bits=4).layers
    assert (row.bits, row.energy) == (4, energy_score(48, 4))


def test_given_width_is_that_of_the_layers_with_macs():
    report = count_macs(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), (2,), bits=4)
    assert [row.bits for row in report.layers] == [4, None]
    for bad in (0, -8, 8.0, "8"):
        with pytest.raises(ValueError, match="bits must be a positive integer"):
            count_macs(nn.Linear(2, 2), (2,), bits=bad)


# ---------------------------------------------------------------- functional calls


class Functional(nn.Module):
    """Multiplies in a way of its own by weights that its parent or itself owns."""

    def __init__(self, call, **shapes):
        super().__init__()
        self.call = call
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, x):
        return self.call(self, x)


def _attend(x):
    return F.scaled_dot_product_attention(x, x, x)


# call, weights, input size, weight MACs, activation MACs
CALLS = {
    "linear": (lambda m, x: F.linear(x, m.w), {"w": (5, 4)}, (3, 4), 60, 0),
    "conv2d": (lambda m, x: F.conv2d(x, m.w), {"w": (5, 4, 1, 1)}, (4, 3, 3), 180, 0),
    "conv, own weight": (lambda m, x: F.conv2d(x, x), {}, (2, 3, 3), 0, 18),
    "matmul": (lambda m, x: x @ m.w, {"w": (4, 5)}, (3, 4), 60, 0),
    "matmul, left": (lambda m, x: m.w @ x, {"w": (5, 3)}, (3, 4), 60, 0),
    "vector": (lambda m, x: x @ m.w, {"w": (4,)}, (4,), 4, 0),
    "derived": (lambda m, x: x @ (2 * m.w).T.contiguous(), {"w": (5, 4)}, (3, 4), 60, 0),
    "sliced": (lambda m, x: F.linear(x, m.w[1:3]), {"w": (5, 4)}, (3, 4), 24, 0),
    "einsum": (lambda m, x: torch.einsum("bij,jk->bik", x, m.w), {"w": (4, 5)}, (3, 4), 60, 0),
    "two inputs": (lambda m, x: x @ x.transpose(1, 2), {}, (3, 4), 0, 36),
    "attention": (lambda m, x: _attend(x), {}, (2, 3, 4), 0, 2 * 2 * 3 * 3 * 4),
    "written in place": (
        lambda m, x: torch.zeros(1, 3, 4, device=x.device).copy_(x) @ m.w,
        {"w": (4, 5)},
        (3, 4),
        60,
        0,
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", CALLS)
def test_functional_call_is_counted_in_the_module_that_makes_it(kind, device):
    call, shapes, input_size, macs, activation_macs = CALLS[kind]
    model = nn.Sequential(nn.ReLU(), Functional(call, **shapes)).to(device)
    report = count_macs(model, example_inputs=torch.zeros(1, *input_size, device=device))
    assert [(row.name, row.type) for row in report.layers] == [("1", "Functional")]
    assert (report.macs, report.activation_macs) == (macs, activation_macs)
    assert report.nonzero_macs == (None if device == "meta" and macs else macs)


def test_functional_use_of_a_layer_is_booked_on_that_layer():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 5)

        def forward(self, x):
            return F.linear(x, self.inner.weight)

    report = count_macs(Outer(), (3, 4))
    assert [(r.name, r.macs, r.output_shape) for r in report.layers] == [("inner", 60, (3, 5))]


def test_buffer_counts_as_a_weight():
    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.ones(3, 1, 3, 3) / 9)

        def forward(self, x):
            return F.conv2d(x, self.kernel, groups=3)

    report = count_macs(Blur(), (3, 6, 6))
    assert (report.macs, report.parameters) == (27 * 16, 0)


# ---------------------------------------------------------------- what is not understood


def _forced_kernel(module, x):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _attend(x)


# call, weights, what the message names
HOLES = {
    "hidden product": (
        lambda m, x: (x.unsqueeze(-1) * m.w).sum(-2),
        {"w": (4, 5)},
        r"aten\.mul inside 1, on 1\.w 4x5",
    ),
    "power": (lambda m, x: torch.pow(x, m.w), {"w": (3, 4)}, r"aten\.pow inside 1, on 1\.w 3x4"),
    "distance": (
        lambda m, x: torch.cdist(x, m.w[None]),
        {"w": (5, 4)},
        r"aten\._cdist_forward inside 1, on 1\.w 1x5x4",
    ),
    "outside torch": (
        lambda m, x: x + torch.from_numpy(x.numpy() @ m.w.detach().numpy()),
        {"w": (4, 4)},
        r"1\.w 4x4 of 1 \(Functional\): no operation on it was seen",
    ),
    "no dependence": (
        lambda m, x: torch.from_numpy(x.numpy() * 2),
        {},
        r"the output depends on the input through no operation seen",
    ),
    "fused attention": (
        _forced_kernel,
        {},
        r"aten\._scaled_dot_product_flash_attention_for_cpu inside 1",
    ),
}


@pytest.mark.parametrize("kind", HOLES)
def test_what_cannot_be_counted_is_named(kind):
    call, shapes, message = HOLES[kind]
    model = nn.Sequential(nn.ReLU(), Functional(call, **shapes))
    size = (2, 3, 4) if kind == "fused attention" else (3, 4)
    with pytest.raises(ValueError, match=message):
        count_macs(model, size)
    with pytest.warns(UserWarning, match=message):
        report = count_macs(model, size, unknown="warn")
    assert len(report.uncounted) == 1
    assert f"NOT COUNTED: {report.uncounted[0]}" in str(report)


@pytest.fixture(scope="module")
def foreign():
    """Fused operations of another library, whose kernels show no ATen operation of their own."""
    library = torch.library.Library("test_mac_hooks", "DEF")
    for name in ("fused_attention", "rope_embedding", "swap_norm_", "add"):
        library.define(f"{name}(Tensor q, Tensor k) -> Tensor")
        library.impl(name, lambda q, k: q @ k.transpose(-1, -2) @ k, "CompositeExplicitAutograd")
    yield torch.ops.test_mac_hooks
    library._destroy()


@pytest.mark.parametrize("name", ["fused_attention", "rope_embedding", "swap_norm_", "add"])
@pytest.mark.parametrize("stored", [False, True])
def test_operation_of_another_library_is_named_whatever_its_name(foreign, name, stored):
    operation = getattr(foreign, name)
    call = (lambda m, x: operation(x, m.w)) if stored else (lambda m, x: operation(x, x))
    model = nn.Sequential(nn.ReLU(), Functional(call, **({"w": (3, 4)} if stored else {})))
    message = rf"test_mac_hooks\.{name} inside 1, of another library"
    with pytest.raises(ValueError, match=message):
        count_macs(model, (3, 4))
    with pytest.warns(UserWarning, match=message):
        assert len(count_macs(model, (3, 4), unknown="warn").uncounted) == 1


def test_operations_of_torchvision_that_multiply_are_named_and_the_others_pass():
    boxes = torch.tensor([[0.0, 0, 0, 2, 2]])
    pooled = Functional(lambda m, x: torchvision.ops.roi_align(x, boxes, 2))
    assert count_macs(pooled, (3, 4, 4)).total_macs == 0
    offset = torch.zeros(1, 2, 4, 4)
    deformed = Functional(
        lambda m, x: torchvision.ops.deform_conv2d(x, offset, m.w), w=(2, 3, 1, 1)
    )
    with pytest.raises(ValueError, match=r"torchvision\.deform_conv2d inside \(model\)"):
        count_macs(deformed, (3, 4, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: x + m.w,
        lambda m, x: torch.cat([m.w[None], x], dim=1),
        lambda m, x: torch.where(x > 0, x, m.w),
        lambda m, x: x * m.w[0],
        lambda m, x: F.layer_norm(x, (3, 4), m.w),
        lambda m, x: F.embedding(x.long(), m.w),
    ],
)
def test_addition_selection_look_up_and_scaling_are_understood(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_macs(Functional(call, w=(3, 4)), (3, 4)).total_macs == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_bad_arguments():
    layer = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="unknown must be"):
        count_macs(layer, (4,), unknown="ignore")
    with pytest.raises(ValueError, match="either input_size or example_inputs"):
        count_macs(layer)
    with pytest.raises(ValueError, match="either input_size or example_inputs"):
        count_macs(layer, (4,), example_inputs=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="positive integers"):
        count_macs(layer, (0, 4))
    with pytest.raises(ValueError, match="0 is lazy"):
        count_macs(nn.Sequential(nn.LazyLinear(3)), (4,))
    with pytest.raises(TypeError, match="0 is TorchScript"):
        count_macs(nn.Sequential(torch.jit.trace(layer, torch.zeros(1, 4))), (4,))


# ---------------------------------------------------------------- nothing is left behind


class Restless(nn.Module):
    """A forward that does all that a count must undo, and may fail at its end."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.register_buffer("cache", torch.zeros(3))
        self.register_buffer("calls", torch.zeros(2))
        self.norm.train()
        self.conv.eval()

    def forward(self, x):
        x = F.batch_norm(self.conv(x), self.norm.running_mean, self.norm.running_var, training=True)
        x = self.drop(x) + torch.rand(1)
        self.last = x
        self.cache = torch.ones(5)
        self.calls.resize_(7).fill_(1)
        self.added = nn.Linear(2, 2)
        self.train()
        if self.fails:
            raise KeyError("the forward fails")
        return x


def _attributes(model):
    """Every attribute of every module: the tables (parameters, hooks, ...) and what is in them."""
    modules = [vars(module) for module in model.modules()]
    tables = [list(v.items()) for m in modules for v in m.values() if isinstance(v, dict)]
    contents = [[(key, id(value)) for key, value in table] for table in tables]
    return [{name: id(value) for name, value in m.items()} for m in modules], contents


def _assert_same(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_states_are_as_before(fails):
    model = nn.Sequential(Restless(fails), nn.Flatten(), nn.Linear(144, 2))
    model[2].eval()
    model[2](torch.ones(1, 144)).sum().backward()
    prune.l1_unstructured(model[2], "weight", 0.5)
    weight = model[2].weight
    state = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    attributes = _attributes(model)
    random_state = torch.get_rng_state()

    if fails:
        with pytest.raises(KeyError, match="the forward fails"):
            count_macs(model, (3, 8, 8))
    else:
        assert count_macs(model, (3, 8, 8)).macs == 4 * 3 * 9 * 36 + 288

    _assert_same(state, model.state_dict())
    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is parameter.grad is None or torch.equal(gradient, parameter.grad)
        assert parameter.requires_grad
    assert attributes == _attributes(model)
    assert model[2].weight is weight
    for module in model.modules():
        pruned = int(module is model[2])
        assert len(module._forward_pre_hooks) == pruned
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


class Caching(nn.Module):
    """Keeps what it computes in an attribute of a given kind, and installs hooks at its first run."""

    def __init__(self, kind):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bias_table = nn.Parameter(torch.ones(3, 4))
        self.cache = kind()
        self.nested = {"deep": [kind()]}
        self.order = OrderedDict(first=1, second=2)
        self.hooked = False

    def forward(self, x):
        if not self.hooked:
            self.hooked = True
            self.linear.register_forward_hook(lambda module, args, out: out @ out.transpose(1, 2))
            self.linear.register_forward_pre_hook(lambda module, args: None)
            self.register_full_backward_hook(lambda *args: None)
        self.order.move_to_end("first")
        if not self.cache:
            for cache in (self.cache, self.nested["deep"][0]):
                bias = self.bias_table + 1
                if isinstance(cache, dict):
                    cache["bias"] = bias
                else:
                    (cache.add if isinstance(cache, set) else cache.append)(bias)
        cached = next(iter(self.cache.values() if isinstance(self.cache, dict) else self.cache))
        return self.linear(x + cached)


def _contents(value):
    """Nested containers with the identity of what is in them, in order."""
    if isinstance(value, dict):
        return [(key, _contents(element)) for key, element in value.items()]
    if isinstance(value, (list, set, deque, tuple)):
        return [_contents(element) for element in value]
    return id(value)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("kind", [dict, list, set, deque, lambda: defaultdict(list)])
def test_hooks_and_caches_of_a_forward_are_undone_and_counts_repeat(kind, filled):
    model = nn.Sequential(nn.Linear(4, 4), Caching(kind))
    if filled:
        model(torch.ones(1, 3, 4))
    before = [_contents(vars(module)) for module in model.modules()]
    first = count_macs(model, (3, 4))
    assert [_contents(vars(module)) for module in model.modules()] == before
    second = count_macs(model, (3, 4))
    assert first.to_dict() == second.to_dict()
    assert (first.macs, first.activation_macs) == (2 * 16 * 3, 4 * 3 * 3)
    assert len(model[1].cache) == filled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cache_of_a_weight_is_counted_as_the_weight(dtype):
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 4))
            self.folded = {}

        def forward(self, x):
            if "w" not in self.folded:
                self.folded["w"] = (self.a @ self.b).to(dtype)
            return x @ self.folded["w"]

    model = nn.Sequential(Folds())
    x = torch.zeros(1, 3, 4, dtype=dtype)
    empty = count_macs(model, example_inputs=x)
    model(x)
    filled = count_macs(model, example_inputs=x)
    assert (empty.macs, filled.macs) == (48, 48)
    assert (empty.folded_macs, filled.folded_macs) == (4 * 2 * 4, 0)
    assert [row.name for row in filled.layers] == ["0"]


def test_tensor_kept_in_an_attribute_keeps_its_values():
    class Accumulates(nn.Module):
        def __init__(self):
            super().__init__()
            self.sum = torch.zeros(4)
            self.sums = [torch.zeros(4)]
            self.register_buffer("running", torch.zeros(4))

        def forward(self, x):
            for kept in (self.sum, self.sums[0], self.running):
                kept += 1
            return x + self.sum + self.sums[0] + self.running

    model = Accumulates()
    count_macs(model, (4,))
    for kept in (model.sum, model.sums[0], model.running):
        assert not kept.any()


def test_exception_that_the_model_handles_leaves_the_layers_in_order():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(9, 2), nn.Linear(4, 2)

        def forward(self, x):
            try:
                return self.wide(x)
            except RuntimeError:
                return x @ x.transpose(0, 1) @ self.narrow(x)

    report = count_macs(Tries(), (4,))
    found = [(r.name, r.macs, r.activation_macs) for r in report.layers]
    assert found == [("(model)", 0, 6), ("wide", 0, 0), ("narrow", 8, 0)]


def test_meta_model_stays_on_meta():
    model = EdgeCNN().to("meta")
    report = count_macs(model, (3, 32, 32))
    assert report.macs == 10_848_768
    assert report.nonzero_macs is None
    assert report.nonzero_parameters is None
    assert f"{report.energy:.2f}" == "43.40"  # from the dense MACs
    assert all(tensor.is_meta for tensor in model.state_dict().values())


# ---------------------------------------------------------------- energy and output


def test_energy_score_gives_the_original_rows():
    macs = 10_848_768
    rows = energy_score(macs, 32), energy_score(macs, 8), energy_score(macs // 2, 32)
    assert [f"{score:.2f}" for score in rows] == ["43.40", "10.85", "21.70"]


def test_energy_of_a_row_uses_its_nonzero_and_activation_macs():
    row = mac_hooks.LayerCount("", "", macs=9_000_000, nonzero_macs=2_000_000, bits=8)
    assert row.energy == 2.0
    row.activation_macs = 1_000_000
    assert row.energy == 3.0
    row.nonzero_macs = None
    assert row.energy == 10.0


def test_table_is_aligned_and_dict_is_json():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Functional(lambda m, x: x @ x))
    report = count_macs(model, (3, 8, 8))
    lines = str(report).splitlines()
    assert lines[0] == "input 1x3x8x8"
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[-1].split()[:3] == ["total", "3,888", "3,888"]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["macs"] == sum(row["macs"] for row in data["layers"]) == 3888
    assert data["activation_macs"] == 4 * 6 * 6 * 6
    assert data["total_macs"] == 3888 + 864
    assert data["energy"] == pytest.approx(sum(row["energy"] for row in data["layers"]))


def test_tree_adds_up_every_module_and_its_share():
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))
    model = nn.Sequential(inner, Functional(lambda m, x: x @ x))
    report = count_macs(model, (3, 8, 8))
    macs = {"0": 12 * 64, "1.1": 16 * 64, "1": 4 * 8 * 8 * 8}
    total = sum(macs.values())
    lines = report.tree().splitlines()
    assert lines[0].split() == ["module", "MACs", "share", "%", "params"]
    rows = [(len(line) - len(line.lstrip()), line.split()) for line in lines[2:]]
    expected = [
        (0, "(model)", total, 36),
        (2, "0", macs["0"] + macs["1.1"], 36),
        (4, "0", macs["0"], 16),
        (4, "1", macs["1.1"], 20),
        (6, "1", macs["1.1"], 20),
        (2, "1", macs["1"], 0),
    ]
    assert rows == [
        (indent, [name, f"{n:,}", f"{100 * n / total:.1f}", f"{parameters:,}"])
        for indent, name, n, parameters in expected
    ]


# ---------------------------------------------------------------- torchvision


class EmptyOnMeta(TorchFunctionMode):
    """Makes the parameters of torch.nn layers without memory, and all else as usual.

    Under torch.device("meta") a RegNet, which computes its widths with tensors, cannot be built.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def torchvision_model(name):
    """A torchvision classification model on the meta device, and the input size of its weights."""
    crop = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    # only a vision transformer fixes its input size, in the shape of its position embedding
    options = {"image_size": crop} if name.startswith("vit_") else {}
    with EmptyOnMeta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two models warn that their initialisation may change
        model = models.get_model(name, weights=None, **options).to("meta")
    return model, (3, crop, crop)


# Published figures that differ by more than 1 %: ratio of this count to them, and why.
EXPLAINED = {
    "shufflenet_v2_x0_5": (1.0119, "published as 0.04 GMACs: 40.47 M rounded to three decimals"),
}


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_torchvision_model_agrees_with_its_published_figure(name):
    model, input_size = torchvision_model(name)
    total = count_macs(model, input_size).total_macs
    published = models.get_model_weights(name).DEFAULT.meta["_ops"]
    if name in EXPLAINED:
        ratio, _reason = EXPLAINED[name]
        assert total / (published * 1e9) == pytest.approx(ratio, abs=1e-4)
        assert round(total / 1e9, 3) == published
    else:
        assert total / (published * 1e9) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small", "swin_t", "vit_b_16"])
def test_agrees_exactly_with_pytorchs_flop_counter(name):
    model, input_size = torchvision_model(name)
    report = count_macs(model, input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *input_size, device="meta"))
    assert 2 * report.total_macs == counter.get_total_flops()
    assert name != "resnet50" or report.total_macs == 4_089_184_256  # as in the README


# ---------------------------------------------------------------- command line


def _run(*arguments):
    command = [sys.executable, str(REPOSITORY / "mac_hooks.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("arguments", [[], ["--smoke", "--tree"]])
def test_command_line_counts_resnet18(arguments):
    result = _run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    (total,) = (line.split() for line in lines if line.startswith("total"))
    assert total[:2] == ["total", "1,814,073,344"]
    assert ("share %" in result.stdout) == ("--tree" in arguments)


def test_command_line_counts_a_torchvision_model(capsys):
    assert mac_hooks.main(["--model", "resnet18", "--input-size", "3", "112", "112"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "input 1x3x112x112" in captured.out
    assert "layer4.1.conv2" in captured.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "resnet99"],
        ["--model", "fasterrcnn_resnet50_fpn"],
        ["--model", "inception_v3", "--input-size", "3", "20", "20"],
        ["--model", "vit_b_16", "--input-size", "3", "32", "32"],
        ["--input-size", "3", "0", "32"],
        ["--input-size", "3", "32"],
    ],
)
def test_error_of_the_user_ends_in_one_line(arguments, capsys):
    assert mac_hooks.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("mac_hooks.py: ")
