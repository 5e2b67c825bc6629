"""Pictures and arrays of the user's own: one input shape, one order, one cache, errors that help."""

import io
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same_bits
from PIL import Image

from edgecnn import data, pictures, split
from edgecnn.cli import Parser, add_data_arguments, data_source
from edgecnn.dataset import CIFAR10, DataSet, channel_statistics
from edgecnn.errors import UserError
from edgecnn.networks import EdgeCNN
from edgecnn.train import Recipe, fit

SIZE = (3, 8, 10)


def noise(count: int, height=8, width=10, channels=3, seed=0) -> np.ndarray:
    """Random uint8 (N, H, W, C) pixels."""
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(root, counts: dict, seed=0) -> None:
    """PNGs root/<class>/<index>.png, `counts` of each class, named in one running count."""
    index = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for pixels in noise(count, seed=seed + index):
            Image.fromarray(pixels).save(root / name / f"{index}.png")
            index += 1


@pytest.fixture
def folder(workdir):
    """my_images/ with a train and a test part of two classes."""
    write_folder(workdir / "my_images/train", {"cat": 6, "dog": 7})
    write_folder(workdir / "my_images/test", {"cat": 2, "dog": 1}, seed=100)
    return workdir / "my_images"


@pytest.fixture
def archive(workdir):
    """A function that writes a good .npz with some arrays replaced (None: left out)."""

    def write(**changes):
        arrays = {
            "x_train": noise(20),
            "y_train": np.arange(20) % 2,
            "x_test": noise(6, seed=1),
            "y_test": np.arange(6) % 2,
        } | changes
        np.savez("set.npz", **{k: v for k, v in arrays.items() if v is not None})
        return "set.npz"

    return write


def read(image: Image.Image, path, shape=(3, 8, 8), **options) -> np.ndarray:
    image.save(path, **options)
    return pictures.read_picture(str(path), shape)


# ---- one picture -------------------------------------------------------------------------------


def test_a_picture_of_the_input_size_keeps_its_pixels(tmp_path):
    pixels = noise(1)[0]
    assert np.array_equal(
        read(Image.fromarray(pixels), tmp_path / "a.png", SIZE), pixels.transpose(2, 0, 1)
    )
    grey = Image.fromarray(pixels[..., 0])
    assert np.array_equal(read(grey, tmp_path / "g.png", (1, 8, 10)), pixels[None, ..., 0])
    three = read(grey, tmp_path / "g.png", SIZE)
    assert all(np.array_equal(channel, pixels[..., 0]) for channel in three)


def test_palette_and_bilevel_pictures_show_their_colours(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read(palette, tmp_path / "p.png")[:, 3, 3].tolist() == [10, 20, 30]
    assert (read(Image.new("1", (8, 8), 1), tmp_path / "b.png") == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(tmp_path, mode):
    if mode == "P":
        image, options = Image.new("P", (8, 8), 0), {"transparency": 0}
    else:
        image, options = Image.new(mode, (8, 8), (9, 9, 9, 0) if mode == "RGBA" else (9, 0)), {}
    assert (read(image, tmp_path / "t.png", **options) == 255).all()
    half = read(Image.new("RGBA", (8, 8), (0, 0, 0, 51)), tmp_path / "h.png")
    assert (half == 204).all()  # 255 * (1 - 51 / 255)


def test_sixteen_bit_pictures_keep_the_high_byte(tmp_path):
    values = np.array([[0, 255], [256, 65535]], np.uint16)
    image = Image.fromarray(values)
    assert read(image, tmp_path / "s.png", (1, 2, 2)).tolist() == [[[0, 0], [1, 255]]]
    with pytest.raises(UserError, match=r"f\.tif .*floating-point"):
        read(Image.fromarray(values.astype(np.float32)), tmp_path / "f.tif")


def test_a_turned_photo_is_turned_back(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[0] = 200  # the bright side is on top as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the top goes to the right
    image = read(Image.fromarray(pixels), tmp_path / "e.png", (3, 8, 4), exif=exif)
    assert (image[:, :, 3] == 200).all() and (image[:, :, :3] == 0).all()


def test_a_wide_picture_is_cut_at_its_sides_and_not_squeezed(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 250
    image = read(Image.fromarray(pixels), tmp_path / "w.png", (3, 8, 8))
    assert (image[:, :, 1:7] == 250).all() and (image > 200).all()  # the edge is half blended


def test_scaling_averages_what_it_drops(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)  # a fine chess board
    image = read(Image.fromarray(board), tmp_path / "c.png", (1, 8, 8))
    assert abs(image.astype(int) - 127.5).max() < 4  # without antialiasing: all 0 or all 255


def test_a_large_jpeg_decodes_small_and_alike(tmp_path):
    ramp = np.linspace(0, 255, 640).astype(np.uint8)[None].repeat(640, 0)
    ramp = np.stack([ramp, ramp.T, ramp], 2)
    small = read(Image.fromarray(ramp), tmp_path / "j.jpg", (3, 16, 16), quality=95)
    exact = read(Image.fromarray(ramp), tmp_path / "j.png", (3, 16, 16))
    assert abs(small.astype(int) - exact).max() <= 4


# ---- folders -----------------------------------------------------------------------------------


def test_the_order_is_that_of_the_numbers_in_the_names():
    names = ["10.png", "9.png", "a2.png", "a10.png", "007.png"]
    assert sorted(names, key=pictures.natural) == [
        "007.png",
        "9.png",
        "10.png",
        "a2.png",
        "a10.png",
    ]


def test_the_sample_written_as_png_folders_trains_to_the_same_bits(workdir):
    """As CIFAR-10 written out: same order, classes, statistics, batches, weights."""
    builtin, train, _ = data.load_training("sample", workdir / "cache")
    images, labels = train
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        place = workdir / "png/train" / builtin.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{index}.png")
        (workdir / "png/test" / builtin.classes[label]).mkdir(parents=True, exist_ok=True)
    dataset, pictures_train, _ = data.load_training("png", workdir / "cache")
    assert all(torch.equal(a, b) for a, b in zip(train, pictures_train, strict=True))
    assert dataset.fingerprint == builtin.fingerprint and dataset.classes == builtin.classes
    assert (dataset.mean, dataset.std) == channel_statistics(images)

    def epoch(split_of, like):
        torch.manual_seed(0)
        model = EdgeCNN()
        fit(model, split_of, like, Recipe(1, 64, 0.1, 0, ""), torch.device("cpu"))
        return model.state_dict()

    whole = replace(builtin, mean=dataset.mean, std=dataset.std)  # the sample's are all CIFAR-10's
    assert same_bits(epoch(train, whole), epoch(pictures_train, dataset))


def test_training_opens_no_test_picture(folder):
    for path in (folder / "test").rglob("*.png"):
        path.write_text("no picture")
    dataset, (images, labels), _ = data.load_training("my_images", "cache", SIZE)
    assert images.shape == (13, *SIZE) and labels.tolist() == [0] * 6 + [1] * 7
    with pytest.raises(UserError, match=r"test/cat/0\.png cannot be read as a picture"):
        data.load_test(dataset, "cache")


def test_a_folder_without_a_split_gives_a_fifth_of_each_class_to_the_test(workdir):
    write_folder(workdir / "all", {"a": 10, "b": 15, "c": 5})
    dataset, train, _ = data.load_training("all", "cache", SIZE)
    test = data.load_test(dataset, "cache")
    assert train[1].bincount().tolist() == [8, 12, 4] and test[1].bincount().tolist() == [2, 3, 1]
    whole = torch.cat([train[0], test[0]]).flatten(1)
    assert len(whole.unique(dim=0)) == 30  # disjoint, nothing lost
    again = data.load_training("all", "elsewhere", SIZE)
    assert again[0].fingerprint == dataset.fingerprint


def test_holdout_is_a_tenth_of_the_training_part_with_the_same_statistics(workdir):
    write_folder(workdir / "all/train", {"a": 20, "b": 30})
    write_folder(workdir / "all/test", {"a": 1, "b": 1})
    whole, (images, _), none = data.load_training("all", "cache", SIZE)
    dataset, train, held = data.load_training("all", "cache", SIZE, holdout=True)
    assert none is None and dataset == whole
    assert held[1].bincount().tolist() == [2, 3] and train[1].bincount().tolist() == [18, 27]
    both = torch.cat([train[0], held[0]]).flatten(1)
    assert torch.equal(both.unique(dim=0), images.flatten(1).unique(dim=0))


def test_pictures_are_decoded_once_and_again_when_a_file_changes(folder, monkeypatch, capsys):
    first, (images, _), _ = data.load_training("my_images", "cache", SIZE)
    (cache,) = folder.parent.glob("cache/*")
    read_picture = pictures.read_picture
    monkeypatch.setattr(pictures, "read_picture", lambda *a: pytest.fail("decoded again"))
    for name in ("my_images", "./my_images/", str(folder)):
        assert torch.equal(data.load_training(name, "cache", SIZE)[1][0], images)

    calls = []
    monkeypatch.setattr(pictures, "read_picture", lambda *a: calls.append(a) or read_picture(*a))
    torch.save({**torch.load(cache), "images": images ^ 1}, cache)  # as a flipped bit
    assert torch.equal(data.load_training("my_images", "cache", SIZE)[1][0], images)
    assert len(calls) == 13 and "damaged" in capsys.readouterr().err

    path = folder / "train/cat/3.png"
    Image.fromarray(noise(1, seed=9)[0]).save(path)
    os.utime(path, ns=(1, 1))
    second = data.load_training("my_images", "cache", SIZE)[0]
    assert len(calls) == 26 and second.fingerprint != first.fingerprint
    with pytest.raises(UserError, match="not what this run was trained on"):
        data.reload_training(first, "cache")
    assert data.reload_training(second, "cache")[0][0].shape == (13, *SIZE)


def test_pictures_are_the_same_until_one_is_added_removed_or_another(folder, archive):
    both = [data.picture_digests("my_images", split) for split in ("train", "test")]
    shutil.copytree(folder, folder.with_name("again"))  # with other times of change
    assert [data.picture_digests("again", split) for split in ("train", "test")] == both
    write_folder(folder / "test", {"more": 1})
    (folder / "test/more/0.png").rename(folder / "test/cat/99.png")
    (folder / "test/more").rmdir()
    assert data.picture_digests("my_images", "train") == both[0]
    assert data.picture_digests("my_images", "test").keys() == both[1].keys()
    assert data.picture_digests("my_images", "test") != both[1]
    other = {"x_test": noise(6, seed=5)}, {"classes": np.array(["a", "b"])}, {}
    trained, tested = (
        [data.picture_digests(archive(**changes), split) for changes in other]
        for split in ("train", "test")
    )
    assert trained[0] == trained[2] != trained[1] and tested[0] != tested[2] != tested[1]
    Path("empty").mkdir()
    for nothing in ("not_here", "empty", "x" * 400):
        assert data.picture_digests(nothing, "test") == {"test pictures": ""}
    assert data.picture_digests("cifar10", "test") == {}


def test_hidden_files_and_what_windows_leaves_are_passed_over(folder):
    (folder / "train/cat/.DS_Store").write_text("x")
    (folder / "train/dog/Thumbs.db").write_text("x")
    (folder / "train/.ipynb_checkpoints").mkdir()
    (folder / "labels.csv").write_text("x")
    assert len(data.load_training("my_images", "cache", SIZE)[1][1]) == 13


def test_other_input_shapes_of_arrays_equal_those_of_files(folder, archive):
    images, labels = data.load_training("my_images", "cache", SIZE)[1]
    x = images.permute(0, 2, 3, 1).numpy()
    source = archive(x_train=x, y_train=labels.numpy())
    for shape in ((1, 8, 10), (3, 5, 5), (1, 12, 9)):
        ours = data.load_training(source, "cache", shape)[0]
        assert ours.fingerprint == data.load_training("my_images", "cache", shape)[0].fingerprint
        assert data.load_training(source, "cache", shape)[0] == ours  # from its cache


# ---- arrays ------------------------------------------------------------------------------------


def test_arrays_of_every_supported_form_are_the_same_pictures(archive):
    x = noise(20, channels=1)
    x[0, 0, 0] = 255
    forms = [x, x[..., 0], x.astype(np.float32), (x / 255).astype(np.float32), x / 255]
    loaded = [data.load_training(archive(x_train=form), "cache") for form in forms]
    assert {dataset.fingerprint for dataset, _, _ in loaded} == {loaded[0][0].fingerprint}
    dataset, (images, labels), _ = loaded[0]
    assert np.array_equal(images.numpy(), x.transpose(0, 3, 1, 2)) and labels.dtype == torch.int64
    assert dataset.classes == ("0", "1") and dataset.shape == (1, 8, 10) and dataset.name == "set"


def test_the_training_arrays_decide_the_unit_of_both(archive):
    x = noise(20).astype(np.float32)
    dark = np.ones((6, 8, 10, 3), np.float32)
    dataset, _, _ = data.load_training(archive(x_train=x, x_test=dark), "cache")
    assert (data.load_test(dataset, "cache")[0] == 1).all()
    dataset, _, _ = data.load_training(archive(x_train=x / 255, x_test=dark), "cache")
    assert (data.load_test(dataset, "cache")[0] == 255).all()


def test_an_npz_can_name_its_classes(archive):
    dataset = data.load_training(archive(classes=np.array(["cat", "dog"])), "cache")[0]
    assert dataset.classes == ("cat", "dog")


def test_training_reads_no_test_array(archive):
    source = archive(x_test=np.array([[{}]], dtype=object))
    dataset = data.load_training(source, "cache")[0]
    with pytest.raises(UserError, match="x_test is object"):
        data.load_test(dataset, "cache")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": None, "x_test": None}, "lacks y_train, x_test"),
        ({"x_train": noise(20).astype(np.int64)}, "x_train is int64; supported: uint8"),
        ({"x_train": noise(20).transpose(0, 3, 1, 2)}, r"numpy\.moveaxis\(x_train, 1, -1\)"),
        ({"x_train": noise(20, channels=2)}, "with 1 or 3 channels"),
        ({"x_train": noise(0)}, "supported: "),
        ({"x_train": noise(20) - 1e-3}, "goes from .* supported: 0..255"),
        ({"x_train": np.full((20, 8, 8), np.nan)}, "holds NaN, which is no pixel"),
        ({"x_train": np.full((20, 8, 8), 7, np.uint8)}, "every pixel of a channel is the same"),
        ({"x_train": np.array([[Bomb()]], dtype=object)}, "x_train is object"),
        ({"y_train": np.array([Bomb()] * 20, dtype=object)}, "y_train is object"),
        ({"classes": np.array([Bomb()] * 2, dtype=object)}, "classes is object"),
        ({"y_train": np.arange(20) % 2 + 0.0}, "y_train is float64"),
        ({"y_train": np.arange(19) % 2}, r"supported: integers \(20,\)"),
        ({"y_train": np.arange(20) % 2 + 1}, "from 1 to 2 with 2 different labels"),
        ({"y_train": np.arange(20) % 2 * 10**12}, "without a gap"),
        ({"y_train": np.zeros(20, int)}, "K from 2"),
        ({"y_train": np.arange(20) // 17}, r"too few pictures of 1 \(3\)"),
        ({"classes": np.array(["a", "b", "c"])}, "supported: 2 texts"),
        ({"classes": np.array(["a", "a\nb"])}, r"class name 'a\\nb' is not"),
    ],
)
def test_a_wrong_npz_is_refused_in_one_line(archive, workdir, changes, message):
    source = archive(**changes)
    with pytest.raises(UserError, match=message) as error:
        data.load_training(source, "cache")
    assert "\n" not in str(error.value) and os.listdir() == ["set.npz"]


def test_wrong_test_arrays_are_refused(archive):
    for changes, message in (
        ({"y_test": np.full(6, 2)}, "y_test goes from 2 to 2, and y_train has the classes 0 to 1"),
        ({"y_test": np.zeros(6, int)}, r"too few pictures of 1 \(0\)"),
        ({"x_test": noise(6) / 255.0}, "give both one dtype"),
    ):
        dataset = data.load_training(archive(**changes), "cache")[0]
        with pytest.raises(UserError, match=message):
            data.load_test(dataset, "cache")


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "npy", "pickle"])
def test_a_damaged_npz_is_refused_and_nothing_executed(archive, workdir, damage):
    path = workdir / archive()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[2000] ^= 1
    array = io.BytesIO()
    np.save(array, noise(3))
    path.write_bytes(
        {
            "empty": b"",
            "truncated": content[:-500],
            "flipped": content,
            "npy": array.getvalue(),
            "pickle": pickle.dumps(Bomb()),
        }[damage]
    )
    with pytest.raises(UserError, match=r"set\.npz is not readable as an \.npz"):
        data.load_training("set.npz", "cache")
    assert os.listdir() == ["set.npz"]


# ---- wrong input -------------------------------------------------------------------------------


def few(folder):
    for path in sorted((folder / "train/cat").iterdir())[2:]:
        path.unlink()


def corrupt(folder):
    path = folder / "train/dog/8.png"
    path.write_bytes(path.read_bytes()[:60])


def other_classes(folder):
    (folder / "test/dog").rename(folder / "test/wolf")


def one_class(folder):
    for part in ("train", "test"):
        (folder / part / "dog").rename(folder / f"{part}-dog")


def odd_name(folder):
    for part in ("train", "test"):
        (folder / part / "dog").rename(folder / part / "a\x1b[31m\nb")


def no_test(folder):
    (folder / "test").rename(folder / "val")


def empty(folder):
    folder.rename(folder.with_name("old"))
    folder.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (few, r"too few pictures of cat \(2\); each class needs 5 or more"),
        (corrupt, r"train/dog/8\.png cannot be read as a picture"),
        (lambda f: (f / "train/cat/notes.txt").write_text("x"), r"cat/notes\.txt cannot be read"),
        (lambda f: os.mkfifo(f / "train/cat/pipe"), "cat/pipe is not an ordinary file"),
        (lambda f: (f / "train/cat/a\nb.png").write_text("x"), r"cat/a\\nb\.png cannot be read"),
        (
            lambda f: (f / "train/cat/l.png").symlink_to("gone"),
            r"cannot read .*cat/l\.png: No such",
        ),
        (other_classes, r"different classes \(dog, wolf\)"),
        (one_class, "one class only, cat"),
        (odd_name, r"class name 'a\\x1b\[31m\\nb' is not"),
        (no_test, "has train/ and no test/ beside it"),
        (lambda f: (f / "train").rename(f / "Train"), "my_images has Train/: call it train/"),
        (empty, r"no class folders; supported: train/<class>/\* and"),
    ],
)
def test_a_wrong_folder_is_refused_in_one_line_and_nothing_written(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        data.load_training("my_images", "cache", SIZE)
    assert "\n" not in str(error.value) and not (folder.parent / "cache").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_pictures_that_are_gone_are_asked_back(folder, split):
    found = data.load_training("my_images", "cache", SIZE)[0]
    folder.rename(folder.with_name("elsewhere"))
    again = data.reload_training if split == "train" else data.load_test
    with pytest.raises(UserError, match="my_images, which this run was trained on, is not there"):
        again(found, "cache")


@pytest.mark.parametrize("source", ["nowhere", "x" * 300, "a\nb", "picture.png"])
def test_data_that_is_neither_says_what_is_supported(workdir, source):
    (workdir / "picture.png").write_text("x")
    with pytest.raises(UserError, match="supported: cifar10, a folder with .* or an .npz") as error:
        data.load_training(source, "cache")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["cifar10", "my_images"])
def test_a_data_dir_with_pictures_in_it_is_left_alone(folder, source):
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="holds test, and is for .* cache alone: .* go to --data"):
        data.load_training(source, folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 8, 8), r"4 channels; supported: 1 \(grey\) or 3"),
        ((3, 0, 8), "a side outside 1 to 4096"),
        ((3, 8, 10**9), "a side outside"),
    ],
)
def test_an_absurd_input_size_is_refused(folder, shape, message):
    with pytest.raises(UserError, match=f"--input-size: shape has {message}"):
        data.load_training("my_images", "cache", shape)


def test_data_larger_than_memory_is_refused_before_it_is_read(folder, archive, monkeypatch):
    monkeypatch.setattr(split, "free_memory_bytes", lambda: 2**20)
    monkeypatch.setattr(pictures, "read_picture", lambda *a: pytest.fail("read"))
    message = (
        r"13 pictures of 3x400x400 take 23\.8 MiB while training, and 1\.0 MiB .* smaller --inp"
    )
    with pytest.raises(UserError, match=message):
        data.load_training("my_images", "cache", (3, 400, 400))
    with pytest.raises(UserError, match=r"20 pictures of 3x400x400 take 36\.6 MiB"):
        data.load_training(archive(), "cache", (3, 400, 400))
    monkeypatch.setattr(split, "free_memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"set\.npz: 20 pictures of 3x8x10"):
        data.load_training(archive(), "cache")


# ---- what travels, what is said ----------------------------------------------------------------


def test_a_data_set_survives_its_plain_form_and_nothing_else_does(archive):
    dataset = data.load_training(archive(), "cache")[0]
    plain = dataset.to_dict()
    assert DataSet.from_dict(plain) == dataset
    assert DataSet.from_dict(CIFAR10.to_dict()) == CIFAR10
    wrong = [
        {**plain, key: value}
        for key, values in {
            "name": ["", 3, "a\nb"],
            "kind": ["zip", None, ["npz"]],
            "source": [None, "x" * 5000],
            "classes": [None, ["a"], ["a", "a"], ["a", 1], ["a", "b\x00"], ["a", "b" * 101], "ab"],
            "mean": [[0.5], [0.5, 0.5, "0.5"], [0.5, 0.5, float("nan")], [0, 0, 0]],
            "std": [[0.0, 0.2, 0.2], [-1.0, 0.2, 0.2], [0.2, 0.2, float("inf")]],
            "shape": [[3, 8], [2, 8, 8], [3, 0, 8], [3, 8, 10**9], [True, 8, 8], [3.0, 8, 8]],
            "fingerprint": ["", "A" * 64, 5],
            "augment": ["", "mixup", None, ["both"]],
        }.items()
        for value in values
    ]
    wrong += [None, [], {}, {**plain, "more": 1}, {k: v for k, v in plain.items() if k != "std"}]
    for values in wrong:
        with pytest.raises(ValueError, match="data set"):
            DataSet.from_dict(values)


def test_what_training_sees_is_described(folder):
    loaded = data.load_training("my_images", "cache", SIZE)
    text = data.describe(*loaded)
    assert "my_images: 13 training pictures of 3x8x10 in 2 classes" in text
    assert "cat 6, dog 7" in text and "MiB" in text


def test_every_command_line_names_one_data(workdir):
    parser = Parser("")
    parser.add_argument("--smoke", action="store_true")
    add_data_arguments(parser)
    args = parser.parse_args(["--data", "x", "--input-size", "1", "28", "28", "--augment", "crop"])
    assert (data_source(args), args.input_size, args.augment) == ("x", [1, 28, 28], "crop")
    assert data_source(parser.parse_args([])) == "cifar10"
    assert data_source(parser.parse_args(["--smoke"])) == "sample"
    with pytest.raises(UserError, match="leave out --data or --smoke"):
        data_source(parser.parse_args(["--smoke", "--data", "x"]))
    for wrong in (["--augment", "mixup"], ["--input-size", "3", "0", "8"], ["--input-size", "3"]):
        with pytest.raises(UserError):
            parser.parse_args(wrong)


# ---- statistics and batches --------------------------------------------------------------------


def test_statistics_are_those_of_all_pixels_to_four_decimals():
    images = torch.from_numpy(noise(50).transpose(0, 3, 1, 2).copy())
    mean, std = channel_statistics(images)
    exact = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == tuple(round(v, 4) for v in exact.mean(1).tolist())
    assert std == tuple(round(v, 4) for v in exact.std(1, correction=0).tolist())


@pytest.mark.parametrize("augment", ["both", "flip", "crop", "none"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 5), (1, 49, 10), (1, 1, 6)])
def test_augmentation_does_what_its_name_says(shape, augment):
    count = 40
    images = torch.from_numpy(noise(count, *shape[1:], shape[0]).transpose(0, 3, 1, 2).copy())
    mean, std = (0.5,) * shape[0], (0.25,) * shape[0]
    dataset = replace(CIFAR10, shape=shape, mean=mean, std=std, augment=augment)
    pad = data.crop_padding(dataset)
    padded = data.pad_reflect(images, pad)
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count)
    ((batch, order),) = data.augmented_batches(padded, labels, count, generator, dataset)
    plain = data.normalize(images, dataset)[order]
    same = (batch == plain).flatten(1).all(1)
    flipped = (batch == plain.flip(3)).flatten(1).all(1)
    assert order.sort().values.equal(labels) and not order.equal(labels)
    assert (pad > 0) == (augment in ("crop", "both") and min(shape[1:]) > 1)
    if augment == "none":
        assert same.all()
    elif augment == "flip":
        assert (same ^ flipped).all() and 5 < flipped.sum() < 35
    elif augment == "crop":
        windows = data.normalize(
            padded.unfold(2, shape[1], 1).unfold(3, shape[2], 1)[order].permute(0, 2, 3, 1, 4, 5)
            .reshape(-1, *shape), dataset
        ).reshape(count, -1, *shape)  # fmt: skip
        assert (windows == batch[:, None]).flatten(2).all(2).any(1).all()


def test_the_order_of_an_epoch_does_not_depend_on_the_augmentation():
    images = torch.from_numpy(noise(30, 32, 32).transpose(0, 3, 1, 2).copy())

    def order(augment):
        dataset = replace(CIFAR10, augment=augment)
        padded = data.pad_reflect(images, data.crop_padding(dataset))
        generator = torch.Generator().manual_seed(5)
        batches = data.augmented_batches(padded, torch.arange(30), 10, generator, dataset)
        return torch.cat([part for _, part in batches])

    assert all(order(augment).equal(order("both")) for augment in ("flip", "crop", "none"))
