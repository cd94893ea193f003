"""``dcafy.usage`` and ``complexity``: what a connection says, what it costs to cut it, and what a network costs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from networks import CBAM, SELinear, with_attention
from torch import nn
from torch.nn import functional as F
from trained import moved, seeded, trained_like, with_betas
from training_data import CLASSES, SIZE, Stripes, connected, network

import dcafy
from dcafy import Connection
from dcafy.amounts import fixed
from dcafy.analysis import attention_values
from dcafy.analysis.complexity import complexity
from dcafy.analysis.tapped import tapped
from dcafy.analysis.usage import message_shares
from dcafy.errors import InputError


def batches(length: int = 24, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = Stripes(length, noise=0.0)
    rows = [data[index] for index in range(length)]
    images, labels = torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])
    return list(zip(images.split(size), labels.split(size), strict=True))


@torch.no_grad()
def rows_of(model: nn.Module, data) -> torch.Tensor:
    """(loss, right) of each image."""
    outputs = torch.cat([model(images) for images, _ in data])
    labels = torch.cat([labels for _, labels in data])
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return torch.stack([losses, (outputs.argmax(1) == labels).to(losses)], 1).double()


def with_beta(model: nn.Module, name: str, value: float) -> nn.Module:
    """A copy with that β in one connection."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        dcafy.connections(twin)[name].beta.fill_(value)
    return twin


def converted(attention: Callable[..., nn.Module], topology: str, widths: tuple[int, ...] = (8, 8, 12)) -> nn.Module:
    with seeded(0):
        network = trained_like(with_attention(attention, widths), torch.cat([images for images, _ in batches()]))
        return dcafy.convert(network, example_inputs=torch.zeros(2, 3, SIZE, SIZE), topology=topology)


@torch.no_grad()
def scores(model: nn.Module, data) -> tuple[float, float]:
    outputs = torch.cat([model(images) for images, _ in data])
    labels = torch.cat([labels for _, labels in data])
    return F.cross_entropy(outputs, labels).item(), (outputs.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("topology", ["chain", "tree", "hub"])
def test_cutting_is_what_setting_beta_to_zero_does(topology):
    model = connected() if topology == "chain" else converted(SELinear, topology, (8, 8, 8, 8))
    model, data = with_betas(model, 0.4, 0.1).eval(), batches()
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
        cut = rows_of(with_beta(model, row.name, 0.0), data) - rows_of(model, data)
        errors = cut.std(0) / len(cut) ** 0.5
        assert (row.cut.loss_error, row.cut.accuracy_error) == pytest.approx(tuple(errors.tolist()), rel=1e-4, abs=1e-9)
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


Matched = Callable[..., torch.Tensor]


@contextlib.contextmanager
def heard_as(change: Callable[[Connection, Matched, tuple[Any, ...]], torch.Tensor]) -> Iterator[None]:
    """Inside it every connection hears what ``change`` makes of (itself, how it hears, what it is given)."""
    matched = Connection.matched
    Connection.matched = lambda self, *given: change(self, matched, given)
    try:
        yield
    finally:
        Connection.matched = matched


@pytest.mark.parametrize("topology", ["chain", "dense"])
def test_another_images_message_is_that_of_the_other_one_of_two(topology):
    model = moved(converted(SELinear, topology)).eval()
    data = batches(size=2)
    before = rows_of(model, data)
    found = dcafy.usage(model, data)
    own = {connection: name for name, connection in dcafy.connections(model).items()}
    for name in (*own.values(), ""):

        def swapped(self, matched, given, name=name):
            message = matched(self, *given)
            return message.flip(0) if name in ("", own[self]) else message

        with heard_as(swapped):
            expected = rows_of(model, data) - before
        effect = next((row.shuffled for row in found.connections if row.name == name), found.shuffled)
        assert effect.loss == pytest.approx(expected[:, 0].mean().item(), abs=1e-7)
        assert effect.loss_error == pytest.approx((expected[:, 0].std() / 24**0.5).item(), rel=1e-4)
        assert effect.loss != 0
    assert found.alike == 0  # of two neighbours one shows rows, the other columns


@pytest.mark.parametrize("attention", [SELinear, CBAM])
def test_the_average_message_and_what_varies_of_it(attention):
    model = moved(converted(attention, "chain")).eval()
    data = batches(20, 8)  # the last batch is a smaller one
    heard: dict[Any, list[torch.Tensor]] = {}
    turns: dict[Connection, int] = {}

    def noted(self, matched, given):
        message = matched(self, *given)
        turns[self] = turns.get(self, 0) + 1
        heard.setdefault((self, turns[self]), []).append(message)
        return message

    before = []
    with heard_as(noted):
        for batch in data:
            turns.clear()
            before.append(rows_of(model, [batch]))
    means = {key: torch.cat(parts).double().mean(0) for key, parts in heard.items()}
    found = dcafy.usage(model, data)
    for name, connection in dcafy.connections(model).items():
        row = next(row for row in found.connections if row.name == name)
        own = [(torch.cat(parts).double(), means[key]) for key, parts in heard.items() if key[0] is connection]
        varying = sum((all_ - mean).square().sum() for all_, mean in own) / sum(all_.square().sum() for all_, _ in own)
        assert row.varying == pytest.approx(varying.item(), rel=1e-5)

        def averaged(self, matched, given, connection=connection):
            message = matched(self, *given)
            turns[self] = turns.get(self, 0) + 1
            return message if self is not connection else means[self, turns[self]].to(message).expand_as(message)

        after = []
        with heard_as(averaged):
            for batch in data:
                turns.clear()
                after.append(rows_of(model, [batch]))
        difference = torch.cat(after) - torch.cat(before)
        assert row.mean.loss == pytest.approx(difference[:, 0].mean().item(), abs=1e-7)
        assert row.mean.loss != 0


def test_a_message_that_is_the_same_for_all_is_told_from_one_that_says_something():
    model = moved(converted(SELinear, "chain")).eval()
    (name, connection) = list(dcafy.connections(model).items())[-1]
    with torch.no_grad():
        connection.match[-2].weight.zero_()  # of the LayerNorm: what is left is its bias
        connection.match[-2].bias.fill_(1.5)
    row = next(row for row in dcafy.usage(model, batches()).connections if row.name == name)
    assert row.varying == pytest.approx(0, abs=1e-12)
    assert row.message_share > 0.1
    assert row.cut.loss != 0
    assert row.shuffled.loss == 0
    assert row.mean.loss == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("attention", [SELinear, CBAM])
def test_how_far_T_moves_is_what_its_values_say(attention):
    model = moved(converted(attention, "chain")).eval()
    data = batches()
    images = torch.cat([images for images, _ in data])
    before = {block.name: block for block in attention_values(model, images)}
    for row in dcafy.usage(model, data).connections:
        after = {block.name: block for block in attention_values(with_beta(model, row.name, 0.0), images)}
        moves = (after[row.name].values - before[row.name].values).double().square().mean() ** 0.5
        assert row.moved == pytest.approx(moves.item() / before[row.name].values.double().std(correction=0).item())
        assert row.moved > 0


def test_what_nobody_listens_to_is_named_and_what_is_listened_to_is_not():
    model = moved(converted(SELinear, "chain")).eval()
    first, _ = dcafy.connections(model).items()
    with torch.no_grad():
        first[1].beta.fill_(1e-7)
        model.head.weight.mul_(20)
    found = dcafy.usage(model, batches())
    assert found.unheard == (first[0],)
    assert not found.connections[1].cut.is_negligible
    assert f"model = dcafy.drop(model, [{first[0]!r}])" in str(found)
    assert f"the loss changes by {fixed(found.without.loss, sign=True)} ±" in str(found)
    assert "-0.0000" not in str(found)
    with torch.no_grad():
        first[1].beta.zero_()  # which has said nothing yet
    assert dcafy.usage(model, batches()).unheard == ()


@pytest.mark.parametrize("kind", ["cut", "shuffled", "mean"])
def test_the_table_has_the_loss_and_the_accuracy_of_each_change_with_their_errors(kind):
    found = dcafy.usage(moved(converted(SELinear, "chain")).eval(), batches())
    effect = dataclasses.replace(getattr(found, kind), accuracy=-0.4321, accuracy_error=0.0123)
    lines = str(dataclasses.replace(found, **{kind: effect})).splitlines()
    of_all = next(n for n, line in enumerate(lines) if line.startswith("all"))
    column = ["cut", "shuffled", "mean"].index(kind)
    assert lines[of_all].split(" ± ")[column].split()[-1] == fixed(effect.loss, sign=True)
    assert re.split(r"\s{2,}", lines[of_all + 1].strip())[column] == "-43.21 ± 1.23"


def test_what_is_worth_something_together_is_not_dropped_together(monkeypatch):
    model = with_betas(converted(SELinear, "chain"), 2.0, 2.0).eval()
    found = dcafy.usage(model, batches())
    uppers = [effect.loss + effect.half for _, effect, _, _ in found.rows("all")]
    assert uppers[2] > max(uppers[:2])
    monkeypatch.setattr("dcafy.analysis.listening.NEGLIGIBLE", uppers[2] + 1e-9)
    assert len(dcafy.usage(model, batches()).unheard) == 2
    monkeypatch.setattr("dcafy.analysis.listening.NEGLIGIBLE", uppers[2] - 1e-9)
    again = dcafy.usage(model, batches())
    assert again.unheard == (min(found.connections, key=lambda row: row.cut.loss).name,)
    assert again.without == min((row.cut for row in found.connections), key=lambda cut: cut.loss)


def test_what_a_cell_has_read_is_left_out_at_the_end_only():
    """Without the others, what the ones behind hear would be another state; the call does what is said of it."""
    model = moved(converted(SELinear, "hub", (8, 8, 8, 8))).eval()
    first, middle, last = dcafy.connections(model)
    with torch.no_grad():
        model.head.weight.mul_(20)
        for name in (middle, last):
            dcafy.connections(model)[name].beta.fill_(1e-7)
    found, data = dcafy.usage(model, batches()), batches()
    assert found.unheard == (middle, last)
    after = scores(dcafy.drop(model, found.unheard).eval(), data)
    assert found.without.loss == pytest.approx(after[0] - found.loss, abs=1e-6)
    model = with_beta(model, first, 1e-7)
    looks = ((twin, dcafy.usage(twin, data)) for twin in (with_beta(model, last, value) for value in (2.0, -2.0)))
    model, found = next(look for look in looks if not look[1].connections[-1].cut.is_negligible)
    assert [row.cut.is_negligible for row in found.connections] == [True, True, False]
    assert found.unheard == ()
    assert scores(dcafy.drop(model, middle).eval(), data) != pytest.approx(scores(model, data), abs=1e-5)


def test_attention_that_was_put_in_and_is_not_trained_has_said_nothing_yet():
    model = dcafy.convert(torchvision.models.resnet18(num_classes=CLASSES), attention="se")
    assert all(connection.beta.item() == 0.5 for connection in dcafy.connections(model).values())
    found = dcafy.usage(model, batches())
    assert found.cut.loss == 0
    assert found.unheard == ()


def test_two_images_are_too_few_to_say_that_nobody_listens():
    model = with_betas(converted(SELinear, "chain"), 1e-7).eval()
    with torch.no_grad():
        model.head.weight.mul_(3000)
    found = dcafy.usage(model, [(images[:2], labels[:2]) for images, labels in batches()[:1]])
    assert found.cut.half == pytest.approx(12.706 * found.cut.loss_error, rel=1e-3)
    assert dcafy.usage(model, batches()).cut.half == pytest.approx(
        2.0687 * dcafy.usage(model, batches()).cut.loss_error, rel=1e-3
    )


def test_a_loader_that_is_used_up_is_told():
    model = moved(connected())
    for loader in ((batch for batch in batches()), iter(batches())):
        with pytest.raises(InputError, match=r"none the second time.*no generator"):
            dcafy.usage(model, loader)


def test_a_model_of_which_all_connections_were_dropped():
    model = moved(connected())
    model = dcafy.drop(model, list(dcafy.connections(model)))
    with pytest.raises(InputError, match="all of them have been dropped"):
        dcafy.usage(model, batches())


def test_batches_that_are_sorted_by_class_are_told():
    data = batches()
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    order = labels.argsort()
    found = dcafy.usage(moved(connected()), list(zip(images[order].split(6), labels[order].split(6), strict=True)))
    assert found.alike == 1
    assert "sorted by class" in str(found)
    assert dcafy.usage(moved(connected()), [(images, labels)]).alike < 0.5


def test_a_single_image_has_no_error_and_no_other_one():
    found = dcafy.usage(moved(connected()), batches(1, 1))
    assert found.shuffled is None
    assert found.cut.loss_error is None
    assert found.connections[0].shuffled is None
    assert not found.unheard
    str(found)


def test_batches_of_one_are_left_out_of_the_shuffling_and_counted_elsewhere():
    model, data = moved(connected()), batches(9, 8)
    found = dcafy.usage(model, data)
    assert found.images == 9
    assert found.shuffled == dcafy.usage(model, data[:1]).shuffled


def test_images_that_come_in_another_order_each_time():
    """Only what was computed on one batch is compared: nothing but a connection makes a difference."""
    model = converted(SELinear, "chain").eval()

    class Anew:
        def __iter__(self):
            data = batches(24, 4)
            random.shuffle(data)
            return iter(data)

    found = dcafy.usage(model, Anew())
    assert all(effect.loss == effect.loss_error == 0 for _, *effects in found.rows("all") for effect in effects)


def test_a_model_that_is_compiled_or_spread_is_looked_into():
    model, data = moved(connected()), batches()
    expected = dcafy.usage(model, data)
    assert dcafy.usage(torch.nn.DataParallel(model, device_ids=[]), data) == expected
    assert dcafy.usage(torch.compile(model, backend="eager"), data) == expected
    model.blocks[1].compile(backend="eager")
    assert dcafy.usage(model, data) == expected


def test_a_copy_that_computes_otherwise_is_not_looked_at(monkeypatch):
    model, data = moved(connected()).eval(), batches()
    expected = dcafy.usage(model, data)

    def other(network, example):
        copied = tapped(network, example)
        copied.model.register_forward_hook(lambda module, given, output: 2 * output)
        return copied

    monkeypatch.setattr("dcafy.analysis.looked.tapped", other)
    found = dcafy.usage(model, data)
    assert "computes otherwise" in str(found)
    assert [row.moved for row in found.connections] == [None, None]
    assert found.cut == expected.cut


def test_a_model_around_the_connected_one():
    model, data = moved(connected()), batches()
    found = dcafy.usage(torch.nn.Sequential(nn.Identity(), model), data)
    assert found.connections == dcafy.usage(model, data).connections
    assert found.connections[0].moved > 0


def test_a_fresh_connection_says_nothing_and_the_model_is_left_alone():
    model = connected().train()
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = dcafy.usage(model, batches())
    assert all(
        row.message_share == row.loss_change == row.accuracy_change == row.moved == 0 for row in found.connections
    )
    assert found.loss_change == 0
    assert found.unheard == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("matched" in connection.__dict__ for connection in dcafy.connections(model).values())


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
