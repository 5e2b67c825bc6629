"""Whether a .tflite file is its checkpoint: each operator against exact integers, on the same inputs.

Logits alone cannot tell. TFLite and torch each round in their own way, and a network with many zeros
or little training turns one unit of an early layer into several logits and another class. A wrong
order of weights, a missing layer or a padding on the wrong side is more than one unit at its operator.
"""

import torch

from edgecnn.deploy.integer import INTEGER, integer_nodes
from edgecnn.deploy.tflite import tflite_values
from edgecnn.graph import INPUT, WEIGHTED
from edgecnn.quantized import SIGNED_OFFSET


def operator_differences(checkpoint: dict, data: bytes, images: torch.Tensor) -> dict[str, tuple]:
    """{node: (largest difference in LSB, the largest that rounding explains)} of a .tflite file.

    images: int8 (N, C, H, W). Rounding explains one LSB, and where a unit of the sum is more than an
    LSB of the output half of that: a file holds the bias as a whole number of such units.
    """
    found, values = tflite_values(data, images), {INPUT: images.double() + SIGNED_OFFSET}
    differences = {}
    for n in integer_nodes(checkpoint):
        exact = INTEGER[n.node.op]([values[name] for name in n.node.inputs], n)
        values[n.node.name] = exact
        if n.node.name in found:  # a flatten is no operator
            own = found[n.node.name].reshape(exact.shape).double() + SIGNED_OFFSET
            unit = float(n.multiplier.max()) if n.node.op in WEIGHTED else 0.0
            differences[n.node.name] = int((own - exact).abs().max()), 1 + int(unit / 2)
            values[n.node.name] = own
    return differences
