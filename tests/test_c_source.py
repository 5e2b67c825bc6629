"""Generated C on this machine: networks bit for bit, memory by arithmetic, a folder that compiles."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from deploying import (
    conv,
    deployed_network,
    differing_step,
    ended,
    random_checkpoint,
    random_images,
)
from foreign_networks import FOREIGN

from edgecnn.checkpoint import load_checkpoint
from edgecnn.deploy import c_source, kernels
from edgecnn.deploy.integer import exact_logits
from edgecnn.deploy.plan import arrange, clash, planned
from edgecnn.errors import UserError
from edgecnn.graph import INPUT, Node
from edgecnn.networks import NETWORKS

# ---- the integers --------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0.0, 0.85])
def test_shipped_networks_equal_exact_integers(library, zeros):
    for name in NETWORKS:
        graph = deployed_network(name)
        checkpoint, image = random_checkpoint(graph, zeros=zeros), random_images(graph, 1)[0]
        for storage in ("fastest", "balanced", "sparse"):
            plan = planned(checkpoint, storage)
            assert differing_step(library, plan, checkpoint, image) is None, (name, storage)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_networks_equal_exact_integers(library, name):
    graph = deployed_network(name)
    for zeros, clamped, storage in (
        (0.0, False, "dense"),
        (0.8, True, "fastest"),
        (0, 1, "sparse"),
    ):
        checkpoint = random_checkpoint(graph, 1, zeros, clamped)
        image = random_images(graph, 1)[0]
        plan = planned(checkpoint, storage)
        assert differing_step(library, plan, checkpoint, image) is None, (name, storage)


@pytest.mark.parametrize("name", ["image", "flipped", "input.flipped"])
def test_a_layer_may_have_any_name(library, name):
    pool = Node(
        "pool", "max_pool", (INPUT,), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
    )
    wide = conv(name, "pool", 16, (3, 3), padding=(1, 1), activation="relu")
    checkpoint = random_checkpoint(ended((3, 16, 16), pool, wide), clamped=True)
    image = random_images(ended((3, 16, 16), pool), 1)[0]
    assert differing_step(library, planned(checkpoint), checkpoint, image) is None


def test_generated_file_equals_exact_integers_on_many_images():
    graph = deployed_network("resnet8")
    checkpoint = random_checkpoint(graph)
    noise, levels = random_images(graph, 20), torch.linspace(-100, 100, 20)
    images = (0.2 * noise + levels.view(20, 1, 1, 1)).to(torch.int8)  # of other brightness
    logits = c_source.host_logits(checkpoint, images)
    assert torch.equal(logits, exact_logits(checkpoint, images))
    assert len(logits.unique()) > 8


def test_the_headline_network_equals_torchs_kernels():
    path = REPOSITORY / "checkpoints/headline/pruned_93_energy_int8.pt"
    checkpoint = load_checkpoint(path)
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = c_source.host_parity(checkpoint, images, ("qnnpack",))
    assert found["exact_integers"]["bit_exact_images"] == 20
    assert found["qnnpack"]["max_difference_lsb"] <= 2


# ---- memory --------------------------------------------------------------------------------------


def test_resnet8_keeps_two_maps_and_the_scratch():
    """The addition happens in place, so that the second stack takes most: one map of 32 x 32 x 16 and
    two of 16 x 16 x 32 and Winograd's tiles of 32 channels."""
    plan = planned(random_checkpoint(deployed_network("resnet8")), "dense")
    second = next(step for step in plan.steps if step.node == "stack1.second.conv")
    assert second.output != "stack1.second.conv"  # it took the addition along
    assert plan.offsets[second.output] == plan.offsets[second.inputs[1]]
    winograd = (16 * 2 * 4 + 32) * 32 * 2 + 32
    assert plan.arena_bytes == 32 * 32 * 16 + 2 * 16 * 16 * 32 + winograd


def test_the_first_network_runs_in_place():
    """Every convolution over its input; the largest use is the third one's, of 8 x 8 x 64 values."""
    plan = planned(random_checkpoint(deployed_network("edgecnn")), "dense")
    assert {plan.offsets[step.output] for step in plan.steps[:-1]} == {0}
    assert plan.arena_bytes == 8 * 8 * 64 + (16 * 2 * 4 + 32) * 64 * 2 + 64


def test_nothing_in_use_overlaps():
    for name in NETWORKS:
        graph = deployed_network(name)
        plan = planned(random_checkpoint(graph))
        last = {name: at for at, s in enumerate(plan.steps) for name in (*s.inputs, s.output)}
        first = {step.output: at for at, step in enumerate(plan.steps)}
        for at, step in enumerate(plan.steps):
            places = [(plan.scratch_offsets[at], step.scratch_bytes)]
            for name in plan.offsets:
                if first[name] <= at <= last[name] and not (name in step.over and last[name] == at):
                    places.append((plan.offsets[name], plan.sizes[name]))
            places.sort()
            for (offset, size), (following, _) in zip(places, places[1:], strict=False):
                assert offset + size <= following
            assert places[-1][0] + places[-1][1] <= plan.arena_bytes


def test_places_are_the_closed_form():
    uses = [{0: 8, 1: 8}, {1: 16, 2: 16}, {2: 24}, {3: 40}]
    peak, offsets = arrange(uses)
    assert peak == 40  # the largest sum at one step: 16 + 24, or 40 alone
    pairs = [(i, j) for i in range(4) for j in range(i)]
    assert not any(clash(uses[i], offsets[i], uses[j], offsets[j]) for i, j in pairs)


# ---- which kernel --------------------------------------------------------------------------------


def kernel_of(weight: np.ndarray, storage: str) -> str:
    return kernels.chosen({"layer": kernels.linear_choices(weight)}, storage)["layer"].kernel


def test_the_fewest_instructions_or_their_product_with_flash_decide():
    """Three in four zeros: as many bytes as half the weights, at a few more instructions."""
    few, some, many = (np.zeros((256, 2048), np.int8) for _ in range(3))
    few[:], some[:, ::5], many[:, ::50] = 1, 1, 1
    assert [kernel_of(w, "fastest") for w in (few, some, many)] == [
        "linear_dense",
        "linear_dense",
        "linear_sparse",
    ]
    assert kernel_of(some, "balanced") == "linear_sparse"
    assert kernel_of(few, "balanced") == "linear_dense"
    assert [kernel_of(many, s) for s in ("dense", "sparse")] == ["linear_dense", "linear_sparse"]


def test_python_and_c_agree_on_what_is_taken_at_once():
    for file, name, value in (
        ("conv_sparse.c", "MOST", kernels.SPARSE_ENTRIES),
        ("conv_sparse.c", "COPIED", kernels.COPIED),
        ("conv_direct.c", "MOST_GROUPS", kernels.DIRECT_GROUPS),
    ):
        assert f"#define {name} {value} " in (c_source.FIRMWARE / file).read_text()


# ---- the text ------------------------------------------------------------------------------------


@pytest.fixture
def tiny():
    """A network of one step whose class names are hostile."""
    checkpoint = random_checkpoint(ended((3, 6, 5), conv("a", INPUT, 3, (3, 3), padding=(1, 1))))
    checkpoint["data"]["classes"] = ['"); system("x', "a\\b\n??/", "Öl */"]
    return checkpoint


def test_text_of_a_file_is_an_escaped_string(tiny):
    code = c_source.c_source(tiny).code
    assert "system(" not in code and "??/" not in code and "a\\134b\\012\\077\\077\\057" in code
    assert c_source.c_string("cat 9") == '"cat 9"'
    assert c_source.c_string("1\x00\x019") == '"1\\000\\0019"'


def test_pixels_become_what_torch_quantizes(tiny, tmp_path):
    source = c_source.c_source(tiny)
    library = c_source.compile_host([c_source.write_source(source, tmp_path)], tmp_path / "m.so")
    pixels = torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8)
    found = torch.empty(6, 5, 3, dtype=torch.int8)
    import ctypes

    library.image_from_pixels.argtypes = [ctypes.c_void_p] * 2
    library.image_from_pixels(pixels.data_ptr(), found.data_ptr())
    own = tiny["quantization"]["activations"][INPUT]
    real = (pixels.double() / 255 - 0.4) / 0.3
    expected = (torch.round(real / own["scale"]) + own["zero_point"]).clamp(0, 255) - 128
    assert (found.double() - expected).abs().max() <= 1  # float32 on a tie
    assert (found.double() == expected).double().mean() > 0.95


def test_exported_folder_compiles_by_itself_and_classifies(tiny, tmp_path):
    texts = c_source.c_files(tiny)
    assert tuple(sorted(texts)) == tuple(sorted(c_source.C_NAMES))
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    subprocess.run("cc *.c", shell=True, cwd=tmp_path, check=True)
    pixels = torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8)
    picture = tmp_path / "p.ppm"
    picture.write_bytes(b"P6\n# made here\n5 6\n255\n" + pixels.numpy().tobytes())

    def classify(path: Path):
        command = [str(tmp_path / "a.out"), str(path)]
        return subprocess.run(command, capture_output=True, encoding="utf-8")

    done = classify(picture)
    table = torch.from_numpy(c_source.pixel_table(tiny)).long()
    image = torch.stack([table[c][pixels[..., c].long()] for c in range(3)])
    logits = exact_logits(tiny, image[None].to(torch.int8))[0]
    own = tiny["quantization"]["activations"]["logits"]
    scores = (logits.double() + 128 - own["zero_point"]) * own["scale"]
    assert done.returncode == 0 and "Öl */" in done.stdout
    shown = [
        float(line.split()[-1]) for line in done.stdout.strip().split("\n") if line[-1].isdigit()
    ]
    assert shown == pytest.approx(scores.tolist(), abs=1e-4)
    picture.write_bytes(b"P6 6 6 255\n" + bytes(108))
    wrong = classify(picture)
    assert (
        wrong.returncode == 1 and "5 x 6 pixels" in wrong.stderr and wrong.stderr.count("\n") == 1
    )
    assert classify(tmp_path / "none").returncode == 1


def test_classes_must_be_the_logits(tiny):
    tiny["data"]["classes"] = ["one"]
    with pytest.raises(UserError, match="names 1 classes and gives 3 logits"):
        c_source.c_source(tiny)


def test_numbers_that_do_not_fit_are_user_errors(tiny):
    tiny["quantization"]["activations"]["a"]["scale"] = 1e-9
    with pytest.raises(UserError, match="a: .*overflow"):
        c_source.c_source(tiny)


def test_missing_and_failing_compilers_are_user_errors(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not installed"):
        c_source.compile_host([], tmp_path / "x.so")
    monkeypatch.delenv("CC")
    (tmp_path / "bad.c").write_text("int f(void) { return; }")
    with pytest.raises(UserError, match="failed with exit code 1: .*error"):
        c_source.compile_host([tmp_path / "bad.c"], tmp_path / "x.so")
    assert not (tmp_path / "x.so").exists()
    (tmp_path / "cc").write_text("#!/bin/sh\nprintf '\\351' >&2; exit 3\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(UserError, match="failed with exit code 3: \N{REPLACEMENT CHARACTER}"):
        c_source.compile_host([], tmp_path / "x.so")
