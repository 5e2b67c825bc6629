"""Networks that this project was not drawn for: plain modules as users write them, small.

FOREIGN gives for each its class, image (C, H, W) and number of classes; each class takes `classes`.
`captured` gives the graph of one of them or of a shipped network.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from edgecnn.capture import capture
from edgecnn.networks import NETWORKS, load_network


class LeNet(nn.Module):
    """Functional activations and pools, unpadded 5x5, biases, no batch norm, a log-softmax."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(F.relu(self.fc1(x)), 0.3, self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class VGGLike(nn.Module):
    """nn.Sequential with numbers for names, 5x5 kernels, in-place ReLU, overlapping pools."""

    def __init__(self, classes=4):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 5, padding="same"),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(16 * 2 * 2, 16),
            nn.ReLU(),
            nn.Linear(16, classes),
        )

    def forward(self, x):
        return self.classifier(self.features(x))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand 1x1, depthwise 3x3, project 1x1 without activation, add."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2Like(nn.Module):
    """Residual bottlenecks without an activation after the add, ReLU6, depthwise, mean over H, W."""

    def __init__(self, classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.blocks = nn.Sequential(
            InvertedResidual(8, 8, 1, 2),
            InvertedResidual(8, 12, 2, 3),
            InvertedResidual(12, 12, 1, 3),
        )
        self.classifier = nn.Linear(12, classes)

    def forward(self, x):
        x = self.blocks(F.relu6(self.stem_bn(self.stem(x))))
        return self.classifier(x.mean([2, 3]))


class OddResNet(nn.Module):
    """1x1 shortcuts with batch norm, `+=`, a ReLU used twice, sides that no stride divides."""

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.relu = nn.ReLU(inplace=True)
            self.downsample = None
            if stride != 1 or inputs != outputs:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x):
            identity = x if self.downsample is None else self.downsample(x)
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            out += identity
            return self.relu(out)

    def __init__(self, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, (3, 5), stride=2, padding=(1, 2))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self.Block(8, 8, 1)
        self.layer2 = self.Block(8, 12, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        x = self.layer2(self.layer1(self.maxpool(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class LinearOnly(nn.Module):
    """No convolution at all; a batch norm after a Linear layer."""

    def __init__(self, classes=4):
        super().__init__()
        self.hidden = nn.Linear(1 * 8 * 8, 24, bias=False)
        self.norm = nn.BatchNorm1d(24)
        self.middle = nn.Linear(24, 16)
        self.out = nn.Linear(16, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.hidden(x.flatten(1))))
        return self.out(F.relu(self.middle(x)))


FOREIGN = {  # name -> (class, input shape, classes)
    "lenet": (LeNet, (1, 28, 28), 4),
    "vgg_like": (VGGLike, (3, 16, 16), 4),
    "mobilenet_v2_like": (MobileNetV2Like, (3, 20, 20), 4),
    "odd_resnet": (OddResNet, (1, 27, 35), 4),
    "linear_only": (LinearOnly, (1, 8, 8), 4),
}

SHAPES = {name: shipped.input_shape for name, shipped in NETWORKS.items()}
SHAPES |= {name: shape for name, (_, shape, _) in FOREIGN.items()}


def fresh(name):
    """A network of FOREIGN or a shipped one, the same weights every time, BN's statistics moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in FOREIGN:
            kind, shape, classes = FOREIGN[name]
            network = kind(classes)
        else:
            _, shape, classes = NETWORKS[name]
            network = load_network(name, classes, shape)
        with torch.no_grad():
            network.train()(torch.randn(4, *shape))
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                    module.weight.uniform_(-1, 1.5)  # negative scales too
                    module.bias.normal_()
    return network.eval()


@functools.cache
def captured(name):
    """(graph, tensors) of `fresh(name)`, captured once. Read only: tests share it."""
    return capture(fresh(name), SHAPES[name])
