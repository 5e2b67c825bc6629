"""The shipped networks as plain modules, and how a user's own network and its weights come in.

`edgecnn` is this project's first network. The others have the shapes of MLPerf Tiny's reference
models (github.com/mlcommons/tiny, benchmark/training), which are Keras models: where TensorFlow's
SAME padding is uneven, the padding here is symmetric and gives the same output sizes, and a
convolution before a batch norm has no bias.

Only training imports this module: from then on a network is data (edgecnn/graph.py).
"""

import contextlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import sys
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from edgecnn.errors import UserError
from edgecnn.split import Shape
from edgecnn.torch_files import read_torch


def conv_bn(inputs, outputs, kernel=3, stride=1, padding=1, groups=1, **after) -> nn.Sequential:
    """conv -> bn -> what `after` names: (N, inputs, H, W) -> (N, outputs, H', W')."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs), **after))


class EdgeCNN(nn.Module):
    """3 x (conv3x3 -> BN -> max-pool -> ReLU), 32-64-128 channels, then two Linear layers.

    10,848,768 MACs an image of (3, 32, 32) with 10 classes; any size from 8 x 8.
    """

    def __init__(self, classes: int = 10, input_shape: Shape = (3, 32, 32)):
        super().__init__()
        channels, rows, columns = input_shape

        def block(inputs, outputs):
            # Max and ReLU commute exactly; pooling first leaves ReLU a quarter of the elements.
            return conv_bn(inputs, outputs, pool=nn.MaxPool2d(2), relu=nn.ReLU())

        self.block1 = block(channels, 32)
        self.block2 = block(32, 64)
        self.block3 = block(64, 128)
        self.fc1 = nn.Linear(128 * (rows // 8) * (columns // 8), 256)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(256, classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(x)))  # (N, 128, H / 8, W / 8)
        return self.fc2(self.relu(self.fc1(torch.flatten(x, 1))))


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride, relu=nn.ReLU())
        self.second = conv_bn(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet8(nn.Sequential):
    """MLPerf Tiny's image classification model: 12,501,632 MACs, 3 x 32 x 32 -> 10 classes."""

    def __init__(self, classes: int = 10, input_shape: Shape = (3, 32, 32)):
        super().__init__()
        self.stem = conv_bn(input_shape[0], 16, relu=nn.ReLU())
        self.stack1 = Residual(16, 16, stride=1)
        self.stack2 = Residual(16, 32, stride=2)
        self.stack3 = Residual(32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes)


class EdgeResNet(nn.Sequential):
    """This project's answer to ResNet-8: 11,649,344 MACs, 72,176 weights, 3 x 32 x 32 -> 10 classes.

    Two convolutions, then twice one of stride 2 to `width` channels; so many residual `blocks` follow
    at each of the three resolutions. Stride-2 convolutions in the open need no shortcut of their own,
    and leave most of the work to 8x8 and 16x16; of channels in sixteens, as here, neither SIMD
    kernels nor an NPU waste any.
    """

    def __init__(
        self,
        classes: int = 10,
        input_shape: Shape = (3, 32, 32),
        width: int = 32,
        blocks: tuple[int, int, int] = (0, 1, 2),
    ):
        super().__init__()
        self.stem = conv_bn(input_shape[0], 16, relu=nn.ReLU())
        self.stem2 = conv_bn(16, 16, relu=nn.ReLU())
        channels, numbers = 16, itertools.count(1)
        for stage, count in enumerate(blocks):
            if stage:
                self.add_module(f"down{stage}", conv_bn(channels, width, stride=2, relu=nn.ReLU()))
                channels = width
            for _ in range(count):
                block = Residual(channels, channels, stride=1)
                self.add_module(f"block{next(numbers)}", block)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A depthwise 3x3 convolution, then a pointwise one: each with BN and ReLU."""
    depthwise = conv_bn(inputs, inputs, stride=stride, groups=inputs, relu=nn.ReLU())
    pointwise = conv_bn(inputs, outputs, 1, padding=0, relu=nn.ReLU())
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


class MobileNetV1(nn.Sequential):
    """MLPerf Tiny's visual wake words model, width 0.25: 7,489,664 MACs, 3 x 96 x 96 -> 2 classes."""

    def __init__(self, classes: int = 2, input_shape: Shape = (3, 96, 96)):
        super().__init__()
        self.stem = conv_bn(input_shape[0], 8, stride=2, relu=nn.ReLU())
        inputs = 8
        widths = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
        for count, outputs in enumerate(widths, start=1):
            stride = 2 if count in (2, 4, 6, 12) else 1
            self.add_module(f"block{count}", separable(inputs, outputs, stride))
            inputs = outputs
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, classes)


class DSCNN(nn.Sequential):
    """MLPerf Tiny's keyword spotting model: 2,656,768 MACs, 1 x 49 x 10 -> 12 classes."""

    def __init__(self, classes: int = 12, input_shape: Shape = (1, 49, 10)):
        super().__init__()
        # (49 + 2 * 5 - 10) // 2 + 1 = 25 rows, (10 + 2 * 1 - 4) // 2 + 1 = 5 columns
        self.stem = conv_bn(input_shape[0], 64, (10, 4), stride=2, padding=(5, 1), relu=nn.ReLU())
        self.dropout1 = nn.Dropout(0.2)
        for count in range(1, 5):
            self.add_module(f"block{count}", separable(64, 64))
        self.dropout2 = nn.Dropout(0.4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes)


class Mixer(nn.Module):
    """Depthwise, pointwise to `expand` times the channels, ReLU, pointwise back; added to the input.

    Only the pointwise convolutions have many weights and only they see all channels, so most zeros go
    there; the depthwise one works on the few channels, not on the many.
    """

    def __init__(self, channels: int, expand: int, kernel: int):
        super().__init__()
        self.depthwise = conv_bn(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.expand = conv_bn(channels, expand * channels, 1, padding=0, relu=nn.ReLU())
        self.project = conv_bn(expand * channels, channels, 1, padding=0)

    def forward(self, x):
        return x + self.project(self.expand(self.depthwise(x)))


class EdgeMixer(nn.Sequential):
    """For the fewest MACs: a convolution of stride 2 between resolutions, Mixer blocks at each.

    `widths` channels and so many `blocks` from 32x32 on, each resolution half of the one before.
    """

    def __init__(
        self,
        classes: int = 10,
        input_shape: Shape = (3, 32, 32),
        widths: tuple[int, ...] = (16, 24, 64),
        blocks: tuple[int, ...] = (0, 1, 3),
        expand: int = 2,
        kernel: int = 5,
    ):
        super().__init__()
        channels, numbers = input_shape[0], itertools.count(1)
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            name, stride = (f"down{stage}", 2) if stage else ("stem", 1)
            self.add_module(name, conv_bn(channels, width, stride=stride, relu=nn.ReLU()))
            channels = width
            for _ in range(count):
                self.add_module(f"block{next(numbers)}", Mixer(channels, expand, kernel))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)


class Shipped(NamedTuple):
    """A network of this project, with the image and the classes that it was drawn for."""

    make: Callable[[int, Shape], nn.Module]
    input_shape: Shape
    classes: int


NETWORKS = {
    "edgecnn": Shipped(EdgeCNN, (3, 32, 32), 10),
    "resnet8": Shipped(ResNet8, (3, 32, 32), 10),
    "mobilenet_v1_025": Shipped(MobileNetV1, (3, 96, 96), 2),
    "ds_cnn": Shipped(DSCNN, (1, 49, 10), 12),
    "edgeresnet": Shipped(EdgeResNet, (3, 32, 32), 10),
    # drawn to lose weights: 35.8 M MACs and 270,640 weights, 35.7 M and 171,904
    "edgeresnet_wide": Shipped(partial(EdgeResNet, width=64), (3, 32, 32), 10),
    "edgeresnet_deep": Shipped(partial(EdgeResNet, width=40, blocks=(1, 3, 2)), (3, 32, 32), 10),
    "edgemixer": Shipped(EdgeMixer, (3, 32, 32), 10),
    # drawn to teach: 130.2 M MACs, 1,054,640 weights
    "edgeresnet_large": Shipped(partial(EdgeResNet, width=128), (3, 32, 32), 10),
}


# ---- a network by its name -----------------------------------------------------------------------


def default_input_shape(text: str) -> Shape | None:
    """(C, H, W) that a shipped network was drawn for; None for a user's own."""
    return NETWORKS[text].input_shape if text in NETWORKS else None


def load_network(text: str, classes: int, input_shape: Shape) -> nn.Module:
    """A shipped network by its name, or `file.py:Name`: a class or function of the user's.

    Name is called with those of `classes` (`num_classes` too, torchvision's word) and `input_shape`
    that it takes by these names. The file is executed; its folder can be imported from meanwhile.
    Weights come from torch's random state.
    Raises UserError where there is no such file or name, where either raises, or gives no module.
    """
    make = NETWORKS[text].make if text in NETWORKS else user_callable(text)
    offered = {"classes": classes, "num_classes": classes, "input_shape": tuple(input_shape)}
    with user_code(text), warnings.catch_warnings():
        # of layers without an element, for an image too small: capture says so in one line
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        taken = inspect.signature(make).parameters
        module = make(**{name: value for name, value in offered.items() if name in taken})
    if not isinstance(module, nn.Module):
        raise UserError(f"{text} gives a {type(module).__name__}, not a torch.nn.Module")
    return module


def network_file(text: str) -> Path | None:
    """The user's file in `file.py:Name`, None for a shipped name; raises UserError for neither."""
    if text in NETWORKS:
        return None
    file, _, name = text.rpartition(":")
    if not file or not name:
        known = ", ".join(NETWORKS)
        raise UserError(f"{text}: no network of that name; give {known}, or file.py:Name")
    if not Path(file).is_file():
        raise UserError(f"{file} is missing; --network takes file.py:Name")
    return Path(file)


def user_callable(text: str) -> Callable:
    """The class or function that `file.py:Name` names; raises UserError."""
    path, name = network_file(text), text.rpartition(":")[2]
    module = execute(path)
    found = getattr(module, name, None)
    if found is None:
        here = [
            n for n, v in vars(module).items() if getattr(v, "__module__", 0) == module.__name__
        ]
        raise UserError(f"{path} defines no {name}; it defines {', '.join(here) or 'nothing'}")
    if isinstance(found, nn.Module) or not callable(found):
        raise UserError(f"{text} is a {type(found).__name__}; name a class or a function")
    return found


def execute(path: Path):
    """The module of a user's Python file; its folder is on the path while it is imported."""
    name = f"network_file_{path.stem}"  # under a name of ours, so that it hides no other module
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with user_code(str(path)):
            loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def user_line(error: BaseException) -> str:
    """`nets.py line 12`: the innermost line of an error that is neither torch's nor ours, or ""."""
    if isinstance(error, SyntaxError):  # which has a place of its own
        return f"{Path(error.filename or '').name} line {error.lineno}"
    libraries = ("<", str(Path(torch.__file__).parent), str(Path(__file__).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(libraries):
            return f"{Path(frame.filename).name} line {frame.lineno}"
    return ""


@contextlib.contextmanager
def user_code(what: str):
    """Turn whatever the user's code raises into one line that names the error and its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        where = user_line(error)
        raise UserError(f"{what} failed with {message[:300]}{where and f' ({where})'}") from None


# ---- weights that someone has trained ------------------------------------------------------------


def load_weights(module: nn.Module, path: Path) -> None:
    """Put a float state_dict, as torch.save writes it, into the module it belongs to.

    Nothing in the file is executed, and one larger than the module can need is refused unread.
    Raises UserError for another file, and where names, shapes or values do not fit.
    """
    path, expected = Path(path), module.state_dict()
    if not path.is_file():
        raise UserError(f"{path} is missing; --weights takes a state_dict written by torch.save")
    limit = 2 * sum(t.nbytes for t in expected.values()) + 2**20  # float64, names and all

    def check(state, size: int) -> None:
        if size > limit:
            raise ValueError(f"it holds {size:,} bytes; this network's weights at most {limit:,}")

    try:
        state = read_torch(path, check)
    except ValueError as error:
        raise UserError(
            f"{path} is no state_dict ({error}); write one with torch.save(model.state_dict(), FILE)"
        ) from None
    problem = misfit(state, expected)
    if problem:
        raise UserError(f"{path} does not fit the network: {problem}")
    module.load_state_dict(state, strict=False)  # only counters may lack, by misfit


def misfit(state, expected: dict[str, torch.Tensor]) -> str | None:
    """Why a loaded state_dict is not one of these names, shapes and types; None where it is."""
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        return "it is not a plain dict of tensors (give model.state_dict() alone)"
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    lacking = [name for name in expected if name not in state and name not in counters]
    unknown = [f"{name!s:.60}" for name in state if name not in expected]
    if lacking or unknown:
        lists = {"it lacks": lacking, "the network has no": unknown}
        return "; ".join(
            f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in lists.items()
            if names
        )
    for name, tensor in state.items():
        want = expected[name]
        if tensor.shape != want.shape:
            return f"{name} is {tuple(tensor.shape)}, not {tuple(want.shape)}"
        if tensor.is_floating_point() != want.is_floating_point() or tensor.layout != want.layout:
            return f"{name} is {tensor.dtype}, not {want.dtype}"
        if not tensor.isfinite().all():
            return f"{name} holds values that are not finite"
    return None
