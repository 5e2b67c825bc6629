"""INT8 checkpoints as devices read them: signed integers, channels last, and nets with more zeros.

torch's activations are unsigned (quint8), a device's signed: the same bits less 128, so that every
scale stays and every zero point is 128 lower.
"""

import warnings

import numpy as np
import torch

from edgecnn.data import normalize

SIGNED_OFFSET = 128

# Quantized tensors work in the pinned torch, which says that they will go.
warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")


def signed_zero_point(zero_point: int) -> int:
    """The int8 zero point of a quint8 one."""
    return zero_point - SIGNED_OFFSET


def signed(quantized: torch.Tensor) -> np.ndarray:
    """The int8 array of a quint8 tensor: the same real values at the signed zero point."""
    return (quantized.int_repr().to(torch.int16) - SIGNED_OFFSET).to(torch.int8).numpy()


def quantize_images(checkpoint: dict, images: torch.Tensor) -> np.ndarray:
    """uint8 (N, 3, 32, 32) -> int8 (N, 32, 32, 3), the bits that the network's own Quantize gives."""
    scale = checkpoint["quantization"]["input_scale"]
    zero_point = checkpoint["quantization"]["input_zero_point"]
    quantized = torch.quantize_per_tensor(normalize(images), scale, zero_point, torch.quint8)
    return np.ascontiguousarray(signed(quantized).transpose(0, 2, 3, 1))  # (N, 32, 32, 3)


@torch.no_grad()
def integer_logits(model: torch.nn.Sequential, images: torch.Tensor, batch: int = 500):
    """int8 (N, 10) logits of quantize.int8_model's network, before its last module, DeQuantize."""
    return np.concatenate([signed(model[:-1](normalize(part))) for part in images.split(batch)])


def with_zeros(checkpoint: dict, share: float) -> dict:
    """A copy whose smallest |weights| are zero, the same share in every layer; not fine-tuned.

    Such a network predicts badly: it is for the cost of zeros, never for an accuracy.
    """
    tensors = dict(checkpoint["tensors"])
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            count = round(share * tensor.numel())
            smallest = tensor.flatten().to(torch.int16).abs().argsort(stable=True)[:count]
            tensors[name] = tensor.flatten().index_fill(0, smallest, 0).view(tensor.shape)
    return {**checkpoint, "tensors": tensors}
