"""The network: 3 x (Conv3x3 -> BN -> ReLU -> MaxPool2), 3-32-64-128, then 2048-256-10."""

import torch
from torch import nn

ARCHITECTURE = "cnn3-32-64-128-fc256"
CHANNELS = (3, 32, 64, 128)
IMAGE_SHAPE = (3, 32, 32)
CLASSES = (
    "airplane automobile bird cat deer dog frog horse ship truck"  # CIFAR-10's label order
).split()


class ConvBlock(nn.Module):
    """Conv3x3 -> BN -> ReLU -> MaxPool2: (N, C_in, H, W) -> (N, C_out, H/2, W/2).

    The convolution has no bias while it has a BN; folding (`fold_batch_norm`) gives it one.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        # Max and ReLU commute exactly; pooling first leaves ReLU a quarter of the elements.
        return self.relu(self.pool(self.bn(self.conv(x))))


class EdgeCNN(nn.Module):
    """(N, 3, 32, 32) normalized images -> (N, 10) logits; 10,848,768 MACs an image."""

    def __init__(self):
        super().__init__()
        self.block1 = ConvBlock(*CHANNELS[0:2])
        self.block2 = ConvBlock(*CHANNELS[1:3])
        self.block3 = ConvBlock(*CHANNELS[2:4])
        self.fc1 = nn.Linear(CHANNELS[3] * 4 * 4, 256)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(256, len(CLASSES))

    def forward(self, x):
        x = self.block3(self.block2(self.block1(x)))  # (N, 128, 4, 4)
        return self.fc2(self.relu(self.fc1(torch.flatten(x, 1))))  # (N, 2048) -> (N, 10)


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The five layers that own MACs, by name, in forward order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def fold_batch_norm(model: EdgeCNN) -> EdgeCNN:
    """A copy in evaluation mode whose BN layers are folded into the convolutions.

    620,362 parameters remain. The scale of an output channel multiplies all of its weights, so
    zero weights stay zero. Formula: Jacob et al., CVPR 2018 (arXiv 1712.05877), section 3.2.
    """
    folded = EdgeCNN()
    folded.load_state_dict(model.state_dict())
    folded.eval()
    for block in (folded.block1, folded.block2, folded.block3):
        block.conv = torch.nn.utils.fusion.fuse_conv_bn_eval(block.conv, block.bn)
        block.bn = nn.Identity()
    return folded
