"""Which weights to zero: scores by criterion, one global threshold over all layers, masks that hold."""

import torch
from torch import nn
from torch.nn.utils import prune

from edgecnn.energy import weight_prices_pj
from edgecnn.errors import UserError
from edgecnn.module import Network

CRITERIA = ("l1", "layer-rank", "lamp", "energy")


def lamp_scores(weight: torch.Tensor) -> torch.Tensor:
    """Each weight's square over the sum of its own and all larger squares of the layer, in [0, 1].

    Removing in rising order, that is the share of the layer's remaining squared norm which goes.
    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.
    """
    squares = weight.detach().double().square().flatten()
    order = squares.argsort(stable=True)
    remaining = squares[order].flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = (squares[order] / remaining).nan_to_num(0.0)  # 0 / 0 where all are zero
    return scores.view_as(weight)


def importance(weight: torch.Tensor, criterion: str, energy_pj: float = 1.0) -> torch.Tensor:
    """Scores of a layer's weights, same shape; the lowest of all layers are pruned, zeros first.

    l1: magnitude. layer-rank: the magnitude's rank within its layer, in (0, 1], so that one
    global threshold takes the same share of every layer and MACs fall along with weights.
    lamp: lamp_scores. energy: lamp_scores per picojoule that the weight's removal saves
    (`energy_pj`), so that of two equally dispensable weights the dearer one goes first. Yang et
    al., CVPR 2017, prune whole layers in the order of their energy; here each weight has a price.
    """
    magnitude = weight.detach().abs()
    if criterion == "l1":
        return magnitude
    if criterion == "layer-rank":
        ranks = torch.empty(magnitude.numel(), dtype=torch.float64)
        ranks[magnitude.flatten().argsort(stable=True)] = torch.arange(
            1, magnitude.numel() + 1, dtype=torch.float64
        )
        scores = (ranks / magnitude.numel()).view_as(weight)
        return scores.masked_fill(magnitude == 0, 0.0)  # what an earlier level took stays taken
    return lamp_scores(weight) / (energy_pj if criterion == "energy" else 1.0)


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that own MACs, by name, in the order of the graph's nodes."""
    kinds = nn.Conv2d | nn.Linear
    return {name: part for name, part in model.named_modules() if isinstance(part, kinds)}


def prune_globally(model: Network, sparsity: float, criterion: str) -> dict[str, torch.Tensor]:
    """Zero the given share of all weights (biases and BN excluded), exact to one weight.

    Returns the masks by layer: bool, True where a weight is kept. Weights that are zero already go
    first, so a mask only shrinks. Raises UserError when more of them are zero than asked for.
    """
    layers, prices = weight_layers(model), weight_prices_pj(model._graph)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    count = sum(layer.weight.numel() for layer in layers.values())
    if zeros > round(sparsity * count):
        raise UserError(
            f"{100 * zeros / count:.2f} % of the weights are zero already; "
            f"give a --sparsity above that, or a --checkpoint with fewer zeros"
        )
    prune.global_unstructured(
        [(layer, "weight") for layer in layers.values()],
        prune.L1Unstructured,
        importance_scores={
            (layer, "weight"): importance(layer.weight, criterion, prices[name])
            for name, layer in layers.items()
        },
        amount=sparsity,
    )
    masks = {name: layer.weight_mask.bool() for name, layer in layers.items()}
    for layer in layers.values():
        prune.remove(layer, "weight")
    hold_zeros(model, masks)
    return masks


@torch.no_grad()
def hold_zeros(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Set every masked weight to +0.0 (a product with the mask could leave -0.0)."""
    layers = weight_layers(model)
    for name, mask in masks.items():
        layers[name].weight.masked_fill_(~mask, 0.0)


def layer_sparsity_percent(model: nn.Module) -> dict[str, float]:
    """Zeros in percent, for each layer that owns MACs."""
    return {
        name: 100 * (layer.weight == 0).double().mean().item()
        for name, layer in weight_layers(model).items()
    }
