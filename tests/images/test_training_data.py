"""``--data``: what each spec gives, and data that no classifier can be trained on."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from training_data import CLASSES, SIZE, network

import dcafy
from dcafy.errors import InputError, UsageError
from dcafy.images.data import read_idx, split
from dcafy.images.options import DataOptions
from dcafy.images.order import UnreadableImage, seeded
from dcafy.images.pictures import opened, with_channels
from dcafy.images.preparation import Prepared, preparation
from dcafy.images.sources import open_data
from dcafy.training.head import outputs_of, reheaded

OPTIONS = DataOptions(val_fraction=0.25)


def picture(path: Path, value: int = 100, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 12), value if mode == "L" else (value,) * len(mode)).save(path)


def folders(root: Path, *classes: str, images: int = 4) -> Path:
    for number, name in enumerate(classes):
        for image in range(images):
            picture(root / name / f"{image}.png", 10 * number + image)
    return root


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def fashion(root: Path, packed: bool) -> Path:
    for prefix, length in (("train", 30), ("t10k", 10)):
        images = np.arange(length * 28 * 28).reshape(length, 28, 28) % 256
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", np.arange(length) % 10)):
            content = idx(array)
            path = root / f"{prefix}-{name}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return root


def test_one_folder_is_split_by_class(tmp_path):
    data = open_data(f"imagefolder:{folders(tmp_path, 'cat', 'dog', images=8)}", OPTIONS)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (12, 4)
    assert sorted(label for _, label in data.val.files) == [0, 0, 1, 1]
    assert not {path for path, _ in data.train.files} & {path for path, _ in data.val.files}
    image, label = data.train[0]
    assert (image.size, label) == ((20, 12), 0)


@pytest.mark.parametrize("val", ["val", "valid"])
def test_two_folders(tmp_path, val):
    folders(tmp_path / "train", "cat", "dog")
    folders(tmp_path / val, "cat", "dog", images=1)
    data = open_data(f"imagefolder:{tmp_path}", OPTIONS)
    assert (len(data.train), len(data.val)) == (8, 2)


def test_digits():
    data = open_data("digits", OPTIONS)
    assert len(data.train) + len(data.val) == 1797
    image, label = data.val[0]
    assert image.size == (8, 8)
    assert image.mode == "L"
    assert 0 <= label <= 9


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist(tmp_path, packed):
    data = open_data(f"fashion-mnist:{fashion(tmp_path, packed)}", OPTIONS)
    assert (len(data.train), len(data.val), len(data.classes)) == (30, 10, 10)
    image, label = data.train[1]
    assert label == 1
    assert np.asarray(image).flat[:3].tolist() == [16, 17, 18]  # 784 % 256


def test_an_installed_fashion_mnist_is_found():
    root = Path("/usr/share/datasets/fashion-mnist")
    if not root.is_dir():
        pytest.skip("Fashion-MNIST is not installed (Debian's dataset-fashion-mnist)")
    data = open_data("fashion-mnist", OPTIONS)
    assert (len(data.train), len(data.val)) == (60000, 10000)


def test_a_torchvision_data_set(tmp_path, monkeypatch):
    class Fake(torchvision.datasets.FakeData):
        classes = ("zero", "one", "two")

        def __init__(self, root, train=True, download=False):
            assert not download
            super().__init__(12 if train else 6, image_size=(3, 10, 10), num_classes=3)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = open_data(f"torchvision:CIFAR10:{tmp_path}", OPTIONS)
    assert (len(data.train), len(data.val), data.classes) == (12, 6, ("zero", "one", "two"))


def test_the_class_of_a_data_set_with_several_labels_is_the_first(tmp_path, monkeypatch):
    class Fake(torchvision.datasets.FakeData):
        def __init__(self, root, train=True):
            super().__init__(12 if train else 6, image_size=(3, 10, 10), num_classes=3)
            self.targets = torch.stack([torch.arange(len(self)) % 3, torch.full((len(self),), 7)], dim=1)

    monkeypatch.setattr(torchvision.datasets, "QMNIST", Fake)
    data = open_data(f"torchvision:QMNIST:{tmp_path}", OPTIONS)
    assert [data.train[index][1] for index in range(4)] == [0, 1, 2, 0]
    assert data.classes == ("0", "1", "2")


def test_a_broken_picture_of_a_torchvision_data_set_is_named(tmp_path, monkeypatch):
    class Fake(torchvision.datasets.FakeData):
        classes, targets = ("zero", "one"), [0, 1, 0, 1]

        def __init__(self, root, split):
            super().__init__(4, image_size=(3, 10, 10), num_classes=2)

        def __getitem__(self, index):
            return super().__getitem__(index) if index != 2 else (Image.open(io.BytesIO(b"junk")), 0)

    monkeypatch.setattr(torchvision.datasets, "Country211", Fake)
    data = open_data(f"torchvision:Country211:{tmp_path}", OPTIONS)
    assert data.train[1][1] == 1
    with pytest.raises(UnreadableImage, match="image 2: cannot identify"):
        data.train[2]


def no_val(root):
    folders(root / "train", "cat", "dog")


def empty_val(root):
    folders(root / "train", "cat", "dog")
    (root / "val/cat").mkdir(parents=True)
    (root / "val/dog").mkdir()


def half_empty_val(root):
    folders(root / "train", "cat", "dog")
    folders(root / "val", "cat")
    (root / "val/dog").mkdir()


def other_classes(root):
    folders(root / "train", "cat", "dog")
    folders(root / "val", "cat", "bird")


def empty_class(root):
    folders(root, "cat", "dog")
    (root / "bird").mkdir()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_val, "no folder val"),
        (empty_val, "cat, dog in .*val has no images"),
        (half_empty_val, "dog in .*val has no images"),
        (lambda root: [folders(root / part, "cat", "dog") for part in ("Train", "Val")], "Name them train and val"),
        (other_classes, "dog only in train, bird only in val"),
        (empty_class, "bird in .* has no images"),
        (lambda root: folders(root, "cat"), "one class only"),
        (lambda root: folders(root, "cat", "dog", images=1), "no validation images"),
        (lambda root: None, "has no folders in it"),
    ],
)
def test_folders_that_cannot_be_trained_on(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(InputError, match=says):
        open_data(f"imagefolder:{tmp_path}", OPTIONS)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("imagefoldr:x", "Did you mean 'imagefolder'"),
        ("imagefolder:nowhere", "no folder 'nowhere'"),
        ("torchvision:CIFAR11:data", "Did you mean 'CIFAR10'"),
        ("torchvision:CIFAR10", "names no folder"),
        ("digits:x", "takes no path"),
    ],
)
def test_specs_that_name_no_data(spec, says):
    with pytest.raises(UsageError, match=says):
        open_data(spec, OPTIONS)


def test_a_data_set_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="--download"):
        open_data(f"torchvision:CIFAR10:{tmp_path}", OPTIONS)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8bnot gzip", b"\x00\x00\x08\x01\x00\x00\x00\x09abc", b"\x89PNG...."])
def test_a_broken_idx_file(tmp_path, content):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no whole idx file"):
        read_idx(path)


def test_a_split_is_always_the_same_and_keeps_an_image_of_each_class_to_train():
    labels = [0] * 10 + [1] * 10 + [2]
    train, held_out = split(labels, 0.3)
    assert split(labels, 0.3) == (train, held_out)
    assert sorted(train + held_out) == list(range(21))
    assert [labels[i] for i in held_out].count(0) == 3
    assert 20 in train


# --- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "1", "LA", "I;16", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_picture(mode, channels, tmp_path):
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 5), 32768, np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.full((6, 5), 128.0, np.float32))
    else:
        image = Image.new("L", (5, 6), 128).convert(mode)
    made = np.asarray(with_channels(image, channels))
    assert made.dtype == np.uint8
    assert made.shape == ((6, 5) if channels == 1 else (6, 5, 3))
    if mode != "1":
        assert abs(int(made.flat[0]) - 128) <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("keep", [0, 20, 0.6])
def test_a_broken_picture_is_named(tmp_path, suffix, keep):
    path = tmp_path / f"a.{suffix}"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UnreadableImage, match=rf"a\.{suffix}"):
        opened(path)


def test_images_are_made_ready_as_the_weights_were_trained():
    model = torchvision.models.efficientnet_b3()
    how = preparation(model, "torchvision:efficientnet_b3@IMAGENET1K_V1")
    preset = torchvision.models.EfficientNet_B3_Weights.IMAGENET1K_V1.transforms()
    assert how.size == (300, 300)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8))
    ours, label = Prepared(how)(image, 7)
    assert label == 7
    assert torch.allclose(ours, preset(image), atol=0.02)


def test_images_of_a_folder_are_those_of_the_network_in_it(tmp_path):
    dcafy.save(dcafy.convert(torchvision.models.efficientnet_b3(), verify=False), tmp_path)
    model = dcafy.load(tmp_path)
    assert preparation(model, str(tmp_path)).size == (300, 300)


def test_images_of_a_timm_network():
    timm = pytest.importorskip("timm")
    how = preparation(timm.create_model("test_vit"), "timm:test_vit")
    assert how.size == (160, 160)


def test_an_own_network_decides_channels_and_the_user_the_size():
    how = preparation(nn.Sequential(nn.Conv2d(1, 4, 3)), "module:factory", image_size=40)
    assert (how.channels, how.size) == (1, (40, 40))
    tensor, _ = Prepared(how)(Image.new("RGB", (80, 60), (255, 255, 255)), 0)
    assert tensor.shape == (1, 40, 40)
    assert tensor.max() == pytest.approx(1.0)


@pytest.mark.parametrize("augment", ["shift", "standard", "trivial"])
def test_augmentation_follows_the_seed(augment):
    how = preparation(network(), "own:net", image_size=SIZE)
    varied = Prepared(how, augment)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8))
    made = []
    for seed in (1, 1, 2, 3, 4):
        with seeded(seed):
            made.append(varied(image, 0)[0])
    assert torch.equal(made[0], made[1])
    assert any(not torch.equal(made[0], other) for other in made[2:])


# --- a new classifier ------------------------------------------------------------------------------------


IMAGES = torch.zeros(2, 3, 32, 32)

HEADS = {
    "mobilenet_v3_small": ("classifier.3",),
    "resnet18": ("fc",),
    "squeezenet1_1": ("classifier.1",),
    "densenet121": ("classifier",),
    "convnext_tiny": ("classifier.2",),
}
VIT = {"vit_b_16": ("heads.head",)}
"""It takes images of one size, and time."""


@pytest.mark.parametrize("name", [*HEADS, pytest.param("vit_b_16", marks=pytest.mark.slow)])
def test_the_classifier_of_a_torchvision_network_is_replaced(name):
    model = torchvision.models.get_model(name)
    images = torch.zeros(2, 3, 224, 224) if name == "vit_b_16" else IMAGES
    before = dict(model.named_modules())
    assert reheaded(model, 7, images) == (HEADS | VIT)[name]
    assert outputs_of(model, images) == 7
    changed = {path for path, module in model.named_modules() if before[path] is not module}
    assert changed == set((HEADS | VIT)[name])


def test_the_classifier_of_a_timm_network_is_replaced():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet")
    assert reheaded(model, 7, torch.zeros(2, 3, 64, 64)) == ("fc",)
    assert model.num_classes == 7


def test_a_classifier_that_fits_stays():
    assert reheaded(network(), CLASSES, torch.zeros(2, 3, SIZE, SIZE)) == ()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "is no classifier"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "does not run on images"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "no linear layer"),
    ],
)
def test_networks_without_a_classifier(model, says):
    with pytest.raises(InputError, match=says):
        reheaded(model, 7, IMAGES)
