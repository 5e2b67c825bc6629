"""INT8 checkpoints: torch's runnable network of one, and what devices read: signed, channels last.

torch's activations are unsigned (quint8), a device's signed: the same bits less 128, so that every
scale stays and every zero point is 128 lower.
"""

import warnings

import numpy as np
import torch
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from edgecnn.data import normalize
from edgecnn.errors import UserError
from edgecnn.model import ARCHITECTURE, CLASSES, IMAGE_SHAPE

SIGNED_OFFSET = 128
# The deployed order: name -> quantized module type; each convolution is followed by a 2x2 max-pool.
LAYERS = {
    "block1": nniq.ConvReLU2d,
    "block2": nniq.ConvReLU2d,
    "block3": nniq.ConvReLU2d,
    "fc1": nniq.LinearReLU,
    "fc2": nnq.Linear,
}

# Quantized tensors work in the pinned torch, which says that they will go.
warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")


# ---- torch's network ---------------------------------------------------------------------------


def quantized_weight(values: torch.Tensor, scales: list[float]) -> torch.Tensor:
    """A qint8 tensor from its integers and its one scale, or one scale an output channel."""
    if len(scales) == 1:
        return torch._make_per_tensor_quantized_tensor(values, scales[0], 0)
    zero_points = torch.zeros(len(scales), dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(
        values, torch.tensor(scales, dtype=torch.float64), zero_points, 0
    )


def int8_model(checkpoint: dict) -> nn.Sequential:
    """The runnable quantized network of an int8 checkpoint: (N, 3, 32, 32) floats -> (N, 10).

    Raises UserError when this torch lacks the engine or the tensors do not fit.
    """
    set_engine(checkpoint["quantization"].get("engine"))
    try:
        model = int8_graph(checkpoint["tensors"], checkpoint["quantization"]).eval()
        # Layers that do not fit each other show only in a forward.
        if model(torch.zeros(1, *IMAGE_SHAPE)).shape != (1, len(CLASSES)):
            raise ValueError(f"it does not answer with {len(CLASSES)} logits")
        if list(checkpoint["quantization"]["layers"]) != list(LAYERS):
            raise ValueError(f"its layers are not {', '.join(LAYERS)}, in this order")
        return model
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the checkpoint's tensors do not fit {ARCHITECTURE}: {reason}") from None


def int8_graph(tensors: dict[str, torch.Tensor], quantization: dict) -> nn.Sequential:
    """The quantized modules in deployed order, packed for the selected engine."""
    graph = nn.Sequential()
    graph.append(
        nnq.Quantize(quantization["input_scale"], quantization["input_zero_point"], torch.quint8)
    )
    for name, kind in LAYERS.items():
        values, layer = tensors[f"{name}.weight"], quantization["layers"][name]
        outputs, inputs = values.shape[:2]
        module = kind(inputs, outputs, 3, padding=1) if values.ndim == 4 else kind(inputs, outputs)
        module.set_weight_bias(
            quantized_weight(values, layer["weight_scale"]), tensors[f"{name}.bias"]
        )
        module.scale, module.zero_point = layer["output_scale"], layer["output_zero_point"]
        if name == "fc1":
            graph.add_module("flatten", nn.Flatten())
        graph.add_module(name, module)
        if values.ndim == 4:
            graph.add_module(f"{name}_pool", nn.MaxPool2d(2))
    graph.add_module("dequantize", nnq.DeQuantize())
    return graph


def set_engine(engine: str) -> None:
    """Select torch's quantized engine; raises UserError when this build lacks it."""
    supported = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if engine not in supported:
        raise UserError(f"this torch has no engine {engine}; it has {', '.join(supported)}")
    torch.backends.quantized.engine = engine


# ---- what devices read -------------------------------------------------------------------------


def signed_zero_point(zero_point: int) -> int:
    """The int8 zero point of a quint8 one."""
    return zero_point - SIGNED_OFFSET


def signed_integers(quantized: torch.Tensor) -> np.ndarray:
    """The int8 array of a quint8 tensor: the same real values at the signed zero point."""
    return (quantized.int_repr().to(torch.int16) - SIGNED_OFFSET).to(torch.int8).numpy()


def quantize_images(checkpoint: dict, images: torch.Tensor) -> np.ndarray:
    """uint8 (N, 3, 32, 32) -> int8 (N, 32, 32, 3), the bits that the network's own Quantize gives."""
    scale = checkpoint["quantization"]["input_scale"]
    zero_point = checkpoint["quantization"]["input_zero_point"]
    quantized = torch.quantize_per_tensor(normalize(images), scale, zero_point, torch.quint8)
    return np.ascontiguousarray(signed_integers(quantized).transpose(0, 2, 3, 1))  # (N, 32, 32, 3)


@torch.no_grad()
def integer_logits(model: torch.nn.Sequential, images: torch.Tensor, batch: int = 500):
    """int8 (N, 10) logits of int8_model's network, before its last module, DeQuantize."""
    return np.concatenate(
        [signed_integers(model[:-1](normalize(part))) for part in images.split(batch)]
    )


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
