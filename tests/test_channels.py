"""Channels: what goes together, a smaller network that equals the masked one, and the whole chain."""

import json
import shutil

import pytest
import torch
from conftest import fails, run_main
from foreign_networks import SHAPES, captured
from torch import nn

from edgecnn.capture import capture
from edgecnn.channels import (
    CHANNEL_CRITERIA,
    kept_channels,
    macs,
    next_width,
    norm_shares,
    places_of,
    prune_channels,
    weight_bytes,
    widths_of,
    without_channels,
)
from edgecnn.checkpoint import graph_of, load_checkpoint, made_by
from edgecnn.compare import compare, sort_key
from edgecnn.deploy.kernels import chosen
from edgecnn.deploy.plan import choices_of, dense_instructions, network_of
from edgecnn.deploy.tflite import write_tflite
from edgecnn.errors import UserError
from edgecnn.graph import INPUT, from_plain, tensor_shapes, to_plain
from edgecnn.marks import short_label
from edgecnn.module import module_of
from edgecnn.names import NAME_PATTERN, method_name, variant_name

FOLDER = "checkpoints/smoke"


def masked(graph, tensors, kept):
    """The tensors with all that makes a removed channel at zero: weights, biases, batch norms."""
    places, found = places_of(graph), {}
    for name in tensor_shapes(graph):
        group, span = places[name.rpartition(".")[0]]
        found[name] = tensors[name].clone()
        if group in kept:
            found[name][~kept[group].repeat_interleave(span)] = 0
    return found


def logits(graph, tensors, images):
    """In float64, where only the order of a sum is left of rounding."""
    network = module_of(graph, tensors).double().eval()
    network.load_state_dict({k: t.double() for k, t in tensors.items()}, strict=False)
    with torch.no_grad():
        return network(images)


def random_kept(graph, generator):
    """Of every group at random, at least one channel."""
    kept = {}
    for group, width in widths_of(graph, places_of(graph)).items():
        kept[group] = torch.rand(width, generator=generator) < 0.6
        kept[group][torch.randint(width, (1,), generator=generator)] = True
    return kept


# ---- the graph ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("how", ["random", "chosen"])
def test_the_smaller_network_equals_the_masked_one(name, how):
    graph, tensors = captured(name)
    generator = torch.Generator().manual_seed(1)
    kept = random_kept(graph, generator)
    if how == "chosen":
        kept = kept_channels(graph, tensors, 0.8 * macs(graph), 4, macs)
    smaller, rest = without_channels(graph, tensors, kept)
    assert from_plain(to_plain(smaller)) == smaller and macs(smaller) < macs(graph)
    assert {key: tuple(t.shape) for key, t in rest.items()} == tensor_shapes(smaller)
    images = torch.randn(2, *SHAPES[name], generator=generator, dtype=torch.float64)
    expected = logits(graph, masked(graph, tensors, kept), images)
    whole = logits(graph, tensors, images)
    torch.testing.assert_close(logits(smaller, rest, images), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(whole, expected, rtol=1e-3)  # something did go


def test_what_an_addition_joins_goes_together():
    graph, _ = captured("resnet8")
    places = places_of(graph)
    joined = {"stem.conv", "stem.relu", "stack1.second.conv", "stack1.second.bn", "stack1.relu"}
    assert len({places[name].group for name in joined}) == 1
    assert places["stack2.second.conv"].group == places["stack2.shortcut"].group
    widths = widths_of(graph, places)
    assert sorted(widths.values()) == [16, 16, 32, 32, 64, 64]
    assert places["fc"].group == places[INPUT].group == INPUT and INPUT not in widths


def test_a_depthwise_convolution_goes_with_its_input_and_a_flattened_channel_is_many_features():
    places = places_of(captured("mobilenet_v1_025")[0])
    assert places["block3.depthwise.conv"] == places["block2.pointwise.conv"]
    graph, _ = captured("edgecnn")
    places = places_of(graph)
    flat = next(node.name for node in graph.nodes if node.op == "flatten")
    assert places[flat] == (places["block3.conv"].group, 16)
    assert list(widths_of(graph, places).values()) == [32, 64, 128, 256]


class Multiplied(nn.Module):
    """A depthwise convolution that makes two channels of each, and the image added to a map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.back = nn.Conv2d(12, 3, 1)
        self.last = nn.Linear(3 * 6 * 6, 4)

    def forward(self, x):
        x = x + self.back(torch.relu(self.twice(torch.relu(self.first(x)))))
        return self.last(x.flatten(1))


def test_a_channel_multiplier_counts_twice_and_what_meets_the_image_stays():
    graph, tensors = capture(Multiplied().eval(), (3, 6, 6))
    places = places_of(graph)
    assert places["twice"] == ("first", 2) and places["back"].group == INPUT
    assert widths_of(graph, places) == {"first": 6}
    for left in (1, 4):  # one channel left: no longer depthwise, the same function
        kept = {"first": torch.arange(6) < left}
        smaller, rest = without_channels(graph, tensors, kept)
        assert smaller["twice"].options["groups"] == left
        images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        expected = logits(graph, masked(graph, tensors, kept), images)
        torch.testing.assert_close(logits(smaller, rest, images), expected, rtol=1e-10, atol=1e-10)


# ---- which go ----------------------------------------------------------------------------------


def test_shares_sum_to_one_and_follow_rows_and_columns():
    graph, tensors = captured("linear_only")
    for shares in norm_shares(graph, tensors).values():
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
    rows, columns = (tensors[f"{name}.weight"].double().square() for name in ("middle", "out"))
    rows, columns = rows.sum(1) / rows.sum(), columns.sum(0) / columns.sum()
    torch.testing.assert_close(norm_shares(graph, tensors)["middle"], (rows + columns) / 2)


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
def test_so_many_macs_go_and_no_more_than_needed(criterion):
    graph, tensors = captured("resnet8")
    most, cost = 0.7 * macs(graph), CHANNEL_CRITERIA[criterion]
    kept = kept_channels(graph, tensors, most, 4, cost)
    shares, left = norm_shares(graph, tensors), without_channels(graph, tensors, kept)[0]
    assert macs(left) <= most
    for group, mask in kept.items():
        assert int(mask.sum()) % 4 == 0 and mask.any()
        if not mask.all():
            assert shares[group][mask].min() >= shares[group][~mask].max()
            back = shares[group].masked_fill(mask, -1).argsort(descending=True)[:4]
            more = kept | {group: mask.scatter(0, back, True)}
            assert macs(without_channels(graph, tensors, more)[0]) > most


def test_a_price_saves_its_own_cost():
    graph, tensors = captured("edgecnn")
    left = {
        criterion: without_channels(
            graph, tensors, kept_channels(graph, tensors, 0.7 * macs(graph), 8, cost)
        )[0]
        for criterion, cost in CHANNEL_CRITERIA.items()
    }
    assert weight_bytes(left["bytes"]) < 0.8 * weight_bytes(left["macs"])
    assert macs(left["lamp"]) <= 0.7 * macs(graph) and left["lamp"] != left["bytes"]


@pytest.mark.parametrize(("width", "smaller"), [(32, 24), (12, 8), (9, 8), (8, 0), (3, 0)])
def test_next_width(width, smaller):
    assert next_width(width, 8) == smaller


def test_instructions_are_those_of_the_plan(smoke):
    checkpoint = load_checkpoint(smoke / f"{FOLDER}/baseline_int8.pt")
    network = network_of(checkpoint)
    dense = chosen(choices_of(network), "dense")
    counted = sum(stored.instructions for stored in dense.values())
    assert dense_instructions(network.graph) == pytest.approx(counted)


# ---- errors ------------------------------------------------------------------------------------


def test_what_cannot_be_reached_is_said(smoke):
    whole = load_checkpoint(smoke / f"{FOLDER}/baseline_fp32.pt")
    most = macs(graph_of(whole))
    with pytest.raises(UserError, match="with 32 channels left in every group .* lower --sparsity"):
        prune_channels(whole, 0.05 * most, "macs", 32)
    with pytest.raises(UserError, match="no channel can go: every group has at most 256 channels"):
        prune_channels(whole, 0.5 * most, "macs", 256)
    with pytest.raises(UserError, match="10,848,768 MACs already; give a higher --sparsity"):
        prune_channels(whole, 2 * most, "macs", 8)
    zeros = load_checkpoint(smoke / f"{FOLDER}/pruned_50_fp32.pt")
    with pytest.raises(UserError, match="take channels first, then weights"):
        prune_channels(zeros, 0.5 * most, "macs", 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--criterion", "bytes"), "weights go by l1, layer-rank, lamp, energy"),
        (("--structure", "channels", "--criterion", "l1"), "channels go by lamp, energy, macs"),
        (("--multiple", 4), "give --structure channels too"),
        (("--structure", "channels", "--multiple", 0), "not at least 1"),
        (("--structure", "channels", "--multiple", 256), "no channel can go"),
        (("--structure", "channels", "--sparsity", 0.999), "lower --sparsity"),
        (("--structure", "channels", "--sparsity", 0.3, 0.999), "lower --sparsity"),
    ],
)
def test_a_command_that_cannot_be_done_ends_in_one_line(copy, capsys, arguments, said):
    assert said in fails(capsys, copy, "prune_finetune", "--smoke", *arguments)


# ---- names, tables -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "method", "name", "label", "command"),
    [
        (
            ("channels", 0.3, "baseline_fp32", None, 0),
            "channels_30",
            "channels_30_fp32",
            "ch 30 %",
            "--structure channels --sparsity 0.3",
        ),
        (
            ("channels", 0.5, "channels_30_fp32", "bytes", 2),
            "channels_50",
            "channels_50_bytes_seed2_fp32",
            "ch 50 % bytes",
            "--structure channels --sparsity 0.5 --criterion bytes --seed 2",
        ),
        (
            ("weights", 0.8, "channels_30_bytes_seed1_fp32", "energy", 1),
            "channels_30_bytes_pruned_80",
            "channels_30_bytes_pruned_80_energy_seed1_fp32",
            "ch 30 % bytes, 80 % ene…",
            "--checkpoint checkpoints/channels_30_bytes_seed1_fp32.pt --sparsity 0.8 "
            "--criterion energy --seed 1",
        ),
        (
            ("weights", 0.9, "channels_30_pruned_80_fp32", "layer-rank", 0),
            "channels_30_pruned_90",
            "channels_30_pruned_90_fp32",
            "ch 30 %, 90 %",
            "--checkpoint checkpoints/channels_30_fp32.pt --sparsity 0.9",
        ),
        (
            ("weights", 0, "channels_30_fp32", "layer-rank", 0),
            "channels_30_control",
            "channels_30_control_fp32",
            "ch 30 % control",
            "--checkpoint checkpoints/channels_30_fp32.pt --sparsity 0",
        ),
        (
            ("weights", 0.5, "my_own", "l1", 3),
            "pruned_50",
            "pruned_50_l1_seed3_fp32",
            "50 % L1",
            "--sparsity 0.5 --criterion l1 --seed 3",
        ),
    ],
)
def test_names_say_what_went_first(workdir, arguments, method, name, label, command):
    structure, share, parent, criterion, seed = arguments
    assert method_name(structure, share, parent) == method
    assert variant_name(method, "fp32", criterion, seed) == name
    match = NAME_PATTERN.fullmatch(name)
    assert match["method"].startswith(method) and int(match["seed"] or 0) == seed
    assert short_label({"variant": name}) == label
    path = workdir.relative_to(workdir) / "checkpoints" / f"{name}.pt"
    assert made_by(path) == f"python prune_finetune.py {command}"


def test_order_and_the_control_of_the_same_channels():
    methods = {
        "baseline": None,
        "control": "baseline",
        "pruned_50": "baseline",
        "channels_30": "baseline",
        "channels_30_control": "channels_30",
        "channels_30_pruned_80": "channels_30",
        "channels_50": "baseline",
    }
    rows = [
        {
            "variant": f"{method}_fp32",
            "method": method,
            "criterion": None,
            "precision": "fp32",
            "seed": 0,
            "epochs": 5,
            "accuracy_percent": 80.0,
            "size_bytes": 1,
            "relative_energy": 1.0,
            "parent": f"{parent}_fp32",
            "parent_sha256": parent,
            "checkpoint_sha256": method,
        }
        for method, parent in methods.items()
    ]
    assert sorted(reversed(rows), key=sort_key) == rows
    compared = compare(rows, {row["variant"]: [True] for row in rows})
    held = {row["method"] for row in compared if row["mcnemar_p_vs_control"] is not None}
    assert held == {"pruned_50", "channels_30", "channels_30_pruned_80", "channels_50"}


# ---- the chain ---------------------------------------------------------------------------------


def test_channels_then_weights_then_int8_through_all_steps(smoke, workdir, capsys):
    for folder in ("checkpoints/smoke", "results/smoke"):
        (workdir / folder).mkdir(parents=True)
        for path in (smoke / folder).glob("baseline_*"):
            shutil.copy(path, folder)
    few = ("--smoke", "--headline", "--epochs", 1)  # taught by the baseline, a larger network
    run_main("prune_finetune", *few, "--structure", "channels", "--sparsity", 0.3, 0.5)
    parent = f"{FOLDER}/channels_30_fp32.pt"
    run_main("prune_finetune", *few, "--checkpoint", parent, "--sparsity", 0.8)
    names = ("channels_30", "channels_50", "channels_30_pruned_80")
    for name in names[::2]:
        run_main("quantize", "--smoke", "--checkpoint", f"{FOLDER}/{name}_fp32.pt")
    run_main("evaluate", "--smoke")
    said = capsys.readouterr().out

    origins = {n: load_checkpoint(f"{FOLDER}/{n}_fp32.pt")["provenance"] for n in names}
    parents = ("baseline_fp32", "channels_30_fp32", "channels_30_fp32")
    assert [origin["parent"] for origin in origins.values()] == list(parents)
    assert [origin["criterion"] for origin in origins.values()] == ["macs", "macs", "layer-rank"]
    record = json.loads((workdir / "results/smoke/channels_30_fp32.json").read_text())
    for key, value in {"structure": "channels", "multiple": 8, "criterion": "macs"}.items():
        assert record["arguments"][key] == value
    rows = json.loads((workdir / "results/smoke/metrics.json").read_text())
    rows = {row["variant"]: row for row in rows}
    for name, share in (("channels_30", 0.3), ("channels_50", 0.5)):
        row = rows[f"{name}_fp32"]
        assert row["method"] == name and row["macs"] <= (1 - share) * 10_848_768
        assert row["size_bytes"] < rows["baseline_fp32"]["size_bytes"] and row["variant"] in said
    dense, both = rows["channels_30_int8"], rows["channels_30_pruned_80_int8"]
    assert both["macs"] == dense["macs"] and both["sparsity_percent"] >= 80
    assert both["size_bytes"] < dense["size_bytes"]
    files = [
        write_tflite(load_checkpoint(f"{FOLDER}/{name}_int8.pt"), name)
        for name in ("baseline", "channels_30", "channels_30_pruned_80")
    ]
    assert len(files[0]) > len(files[1]) and len(files[1]) == pytest.approx(len(files[2]), abs=99)

    run_main("prune_finetune", *few, "--structure", "channels", "--sparsity", 0.3, 0.5)
    assert "kept: checkpoints/smoke/channels_50_fp32.pt" in capsys.readouterr().out
    other = ("--structure", "channels", "--sparsity", 0.3, "--multiple", 4)
    assert "made with multiple 8" in fails(capsys, workdir, "prune_finetune", *few, *other)
    other = ("--structure", "channels", "--sparsity", 0.6, "--checkpoint")
    pruned = f"{FOLDER}/channels_30_pruned_80_fp32.pt"
    assert "channels first" in fails(capsys, workdir, "prune_finetune", *few, *other, pruned)
