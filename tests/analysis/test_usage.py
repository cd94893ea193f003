"""``dcafy.usage`` and ``complexity``: what a connection says, what it costs to cut it, and what a network costs."""

from __future__ import annotations

import pytest
import torch
from networks import CBAM, SELinear, with_attention
from torch import nn
from torch.nn import functional as F
from trained import with_betas
from training_data import CLASSES, SIZE, Stripes, connected, network

import dcafy
from dcafy import Connection
from dcafy.analysis.complexity import complexity
from dcafy.analysis.usage import message_shares
from dcafy.errors import InputError


def batches(length: int = 24, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = Stripes(length, noise=0.0)
    rows = [data[index] for index in range(length)]
    images, labels = torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])
    return list(zip(images.split(size), labels.split(size), strict=True))


@torch.no_grad()
def scores(model: nn.Module, data) -> tuple[float, float]:
    outputs = torch.cat([model(images) for images, _ in data])
    labels = torch.cat([labels for _, labels in data])
    return F.cross_entropy(outputs, labels).item(), (outputs.argmax(1) == labels).double().mean().item()


def test_cutting_is_what_setting_beta_to_zero_does():
    model, data = with_betas(connected(), 0.4, 0.1).eval(), batches()
    found = dcafy.usage(model, data)
    loss, accuracy = scores(model, data)
    assert found.images == 24
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.accuracy == pytest.approx(accuracy)
    own = dcafy.connections(model)
    assert [row.name for row in found.connections] == list(own)
    for row in found.connections:
        before = own[row.name].beta.detach().clone()
        with torch.no_grad():
            own[row.name].beta.zero_()
        cut_loss, cut_accuracy = scores(model, data)
        with torch.no_grad():
            own[row.name].beta.copy_(before)
        assert row.loss_change == pytest.approx(cut_loss - loss, abs=1e-6)
        assert row.loss_change != 0
        assert row.accuracy_change == pytest.approx(cut_accuracy - accuracy)
        assert row.beta == before.item()
    with_betas(model, 0.0, 0.1)
    with torch.no_grad():
        for connection in own.values():
            connection.beta.zero_()
    assert found.loss_change == pytest.approx(scores(model, data)[0] - loss, abs=1e-6)


@pytest.mark.parametrize("topology", ["chain", "dense"])
@pytest.mark.parametrize("attention", [SELinear, CBAM])
def test_the_message_share_is_that_of_the_two_terms(attention, topology):
    torch.manual_seed(0)
    model = dcafy.convert(
        with_attention(attention, (8, 8, 12)), example_inputs=torch.zeros(2, 3, SIZE, SIZE), topology=topology
    )
    with_betas(model, 0.4, 0.1).eval()
    heard: dict[Connection, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    message = Connection.matched

    def noting(self, G, *passed):
        result = message(self, G, *passed)
        heard.setdefault(self, []).append((self.alpha * G, self.beta * result))
        return result

    data = [images for images, _ in batches()]
    Connection.matched = noting
    try:
        with torch.no_grad():
            for images in data:
                model(images)
    finally:
        Connection.matched = message
    found = message_shares(model, data)
    own = dcafy.connections(model)
    assert list(found) == list(own)
    for name, connection in own.items():
        terms = [torch.cat([pair[side].flatten() for pair in heard[connection]]).norm() for side in (0, 1)]
        assert found[name] == pytest.approx((terms[1] / (terms[0] + terms[1])).item(), rel=1e-4)
        assert 0 < found[name] < 1


def test_a_fresh_connection_says_nothing_and_the_model_is_left_alone():
    model = connected().train()
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = dcafy.usage(model, batches())
    assert all(row.message_share == row.loss_change == row.accuracy_change == 0 for row in found.connections)
    assert found.loss_change == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_images_labelled_minus_one_do_not_count():
    model, data = with_betas(connected(), 0.4, 0.1), batches()
    hidden = [(images, torch.where(torch.arange(len(labels)) < 2, -1, labels)) for images, labels in data]
    kept = [(images[2:], labels[2:]) for images, labels in data]
    assert dcafy.usage(model, hidden).loss == pytest.approx(dcafy.usage(model, kept).loss)
    assert dcafy.usage(model, hidden).images == 18


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        ([], "gave no images"),
        (iter([]), "gave no images"),
        ([torch.zeros(2, 3, SIZE, SIZE)], "batches of images and labels"),
    ],
)
def test_a_loader_without_labelled_batches(loader, says):
    with pytest.raises(InputError, match=says):
        dcafy.usage(connected(), loader)


IMAGES = torch.zeros(2, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((IMAGES, torch.tensor([1, CLASSES])), f"A label is {CLASSES}.* {CLASSES} classes"),
        ((IMAGES, torch.tensor([1, -2])), "A label is -2"),
        ((IMAGES, torch.tensor([2**62, 0])), "A label is 4611686018427387904"),
        ((IMAGES, torch.tensor([0.5, 1.0])), "no class numbers"),
        ((IMAGES, torch.tensor([True, False])), "no class numbers"),
        ((IMAGES, torch.tensor([1])), "no class numbers"),
        ((IMAGES, torch.zeros(2, CLASSES)), "no class numbers"),
        ((IMAGES, [1, 2]), "of list"),
        ((["a", "b"], torch.tensor([1, 2])), "of list"),
        ((IMAGES[:, :1], torch.tensor([1, 2])), "does not run on a batch"),
        ((IMAGES.long(), torch.tensor([1, 2])), "does not run on a batch"),
    ],
    ids=str,
)
def test_batches_that_the_model_does_not_take(batch, says):
    model = with_betas(connected(), 0.4, 0.1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=says):
        dcafy.usage(model, [batch])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_labels_of_any_whole_type_count():
    model, data = with_betas(connected(), 0.4, 0.1), batches()
    small = [(images, labels.to(torch.int8)) for images, labels in data]
    assert dcafy.usage(model, small) == dcafy.usage(model, data)


def test_a_model_without_connections():
    with pytest.raises(InputError):
        dcafy.usage(network(), batches())


def test_the_cost_of_a_network_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    ).train()
    found = complexity(model, torch.zeros(4, 3, 10, 10))
    assert found.parameters == 3 * 8 * 9 + 8 + 8 * CLASSES + CLASSES
    assert found.gflops * 1e9 == pytest.approx(10 * 10 * 8 * 27 + 8 * CLASSES)
    assert model.training
