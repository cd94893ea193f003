"""DataLoaders in the place of data sets: their batches, their ``collate_fn``, and what they cannot be."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, WeightedRandomSampler
from training_data import Stripes, connected

from dcafy.errors import InputError
from dcafy.training import Listener, TrainingConfig, finetune

CONFIG = TrainingConfig(epochs=2, batch_size=8, seed=3, usage_images=16, cpu=True)
TRAIN, VAL = Stripes(), Stripes(20)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Stop(Exception):
    pass


class Stops(Listener):
    """Ends the training at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def wants(self, step: int) -> bool:
        return step == self.at

    def stepped(self, *_: object) -> None:
        raise Stop


def doubled(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``collate_fn``: images twice as bright."""
    return torch.stack([2 * image for image, _ in samples]), torch.tensor([label for _, label in samples])


def test_one_in_the_order_of_the_data_set_trains_as_it_does():
    """Validation too: the loader's own batches change nothing, and usage is measured on what it shows."""
    ours, theirs = connected(), connected()
    expected = finetune(ours, TRAIN, VAL, CONFIG)
    order = _same_order()
    loaders = DataLoader(TRAIN, batch_sampler=order), DataLoader(VAL, batch_size=8)
    found = finetune(theirs, *loaders, CONFIG)
    assert found.metrics == expected.metrics
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert (found.usage.images, expected.usage.images) == (16, 16)


def _same_order():
    """The batches that a training with data sets has, as a user's sampler gives them."""
    from dcafy.images.order import Batches

    class Given(Batches):
        def __init__(self) -> None:
            super().__init__(len(TRAIN), 8, seed=3, shuffle=True)

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self):
            return ([index for _, index in batch] for batch in super().__iter__())

    return Given()


@pytest.mark.parametrize("own_generator", [False, True])
def test_it_goes_on_from_the_middle_of_an_epoch(own_generator, tmp_path):
    def loader(workers: int = 0) -> DataLoader:
        generator = torch.Generator().manual_seed(7) if own_generator else None
        return DataLoader(
            TRAIN, 8, shuffle=True, generator=generator, collate_fn=doubled, drop_last=True, num_workers=workers
        )

    options = TrainingConfig(epochs=2, seed=3, usage_images=0, cpu=True, checkpoint_steps=1)
    whole = connected()
    history = finetune(whole, loader(), VAL, options)
    assert history.epochs[-1].steps == 12
    cut, given = connected(), loader()
    with pytest.raises(Stop):
        finetune(cut, given, VAL, options, directory=tmp_path, listener=Stops(9))
    again = connected()
    finetune(again, loader(workers=1), VAL, options, directory=tmp_path, resume=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    if own_generator:
        assert torch.equal(given.generator.get_state(), torch.Generator().manual_seed(7).get_state())


def test_its_collate_and_its_sampler_count():
    """Brighter images, soft labels, and a sampler that draws some images twice and others never."""

    class Seen(Listener):
        epoch = None

        def epoch_ended(self, epoch):
            self.epoch = epoch

    def soft(samples):
        images, labels = doubled(samples)
        return images, torch.nn.functional.one_hot(labels, 4).float()

    before = torch.get_rng_state()
    sampler = WeightedRandomSampler([1.0] * 8 + [0.0] * 40, 16)
    seen = Seen()
    options = TrainingConfig(epochs=1, usage_images=8, cpu=True)
    history = finetune(
        connected(),
        DataLoader(TRAIN, 8, sampler=sampler, collate_fn=soft),
        DataLoader(VAL, 8, sampler=range(5), collate_fn=doubled),
        options,
        listener=seen,
    )
    assert seen.epoch.steps == 2
    assert history.metrics["images"] == 5
    assert history.usage.images == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_classes_are_weighed_by_the_labels_of_its_data_set():
    images = torch.stack([TRAIN[i][0] for i in range(16)])
    labels = torch.tensor([0] * 12 + [1, 2, 3, 3])
    loader = DataLoader(TensorDataset(images, labels), 4, shuffle=True)
    options = functools.partial(TrainingConfig, epochs=1, usage_images=0, cpu=True, lr=1e-2)
    with_weights, without = connected(), connected()
    finetune(with_weights, loader, VAL, options(balance=True))
    finetune(without, loader, VAL, options())
    same = [torch.equal(value, without.state_dict()[name]) for name, value in with_weights.state_dict().items()]
    assert not all(same)


class Stream(IterableDataset):
    """Stripes from front to back, without a length."""

    def __init__(self, data=TRAIN, times=1):
        self.data, self.times = data, times

    def __iter__(self):
        for _ in range(self.times):
            yield from (self.data[index] for index in range(len(self.data)))


class Sized(Stream):
    """Stripes that know how many they are, over and over."""

    def __len__(self):
        return len(self.data)


def ways_to_stream():
    """Of the same images, with noise that is drawn as they are read; with workers of its own, and none."""
    counted = pytest.warns(UserWarning, match="train has no length, so it is read through once to be counted")
    known = contextlib.nullcontext()
    return {
        "no length": (Stream(), counted),
        "endless": (Sized(times=10**9), known),
        "loader": (DataLoader(Sized(), 8), known),
        "loader without a length": (DataLoader(Stream(), 8), counted),
        "loader of batches": (DataLoader(Subset(_AtOnce(), range(6)), None), known),
    }


class _AtOnce(TensorDataset):
    def __init__(self):
        pass

    def __len__(self):
        return 6

    def __getitem__(self, number):
        rows = [TRAIN[8 * number + place] for place in range(8)]
        return torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])


STREAMED = dataclasses.replace(CONFIG, usage_images=8, checkpoint_steps=1)


@functools.cache
def streamed() -> dict[str, torch.Tensor]:
    """The weights that an unbroken training on a stream ends with."""
    model = connected()
    finetune(model, Sized(), DataLoader(Sized(VAL), 8), STREAMED)
    return model.state_dict()


@pytest.mark.parametrize("way", ways_to_stream())
def test_streams_train_alike(way):
    before, model = torch.get_rng_state(), connected()
    given, told = ways_to_stream()[way]
    with told:
        history = finetune(model, given, Stream(VAL), STREAMED)
    assert (history.epochs[-1].steps, history.metrics["images"], history.usage.images) == (12, 20, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, streamed()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", ["endless", "loader of batches"])
def test_a_stream_is_gone_on_with_from_the_middle_of_an_epoch(way, tmp_path):
    given, _ = ways_to_stream()[way]
    with pytest.raises(Stop):
        finetune(connected(), given, Stream(VAL), STREAMED, directory=tmp_path, listener=Stops(9))
    model = connected()
    finetune(model, given, Stream(VAL), STREAMED, directory=tmp_path, resume=True)
    assert all(torch.equal(value, streamed()[name]) for name, value in model.state_dict().items())


def test_an_epoch_of_a_stream_is_told_and_its_noise_is_another():
    class Told(Sized):
        epochs, first = [], []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

        def __iter__(self):
            for number, (image, label) in enumerate(super().__iter__()):
                if number == 0:
                    self.first.append(image)
                yield image, label

    options = TrainingConfig(epochs=2, batch_size=8, usage_images=0, cpu=True, balance=True)
    finetune(connected(), Told(), VAL, options)
    assert Told.epochs[-2:] == [0, 1]
    assert not torch.equal(Told.first[-2], Told.first[-1])


def test_a_stream_with_a_wrong_length():
    class Wrong(Stream):
        def __len__(self):
            return 56

    with pytest.warns(UserWarning, match="train says that it has 7 batches and has given 6: make its length right"):
        finetune(connected(), Wrong(), VAL, CONFIG)


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (lambda: DataLoader(TRAIN, None), "gives one image at a time. Give the DataLoader a batch_size"),
        (lambda: Stream(Subset(TRAIN, [])), "train has no images"),
        (lambda: DataLoader(Sized([1]), 4), "gives a Tensor as a batch"),
        (lambda: Sized([1]), "gives int for an index"),
        (lambda: DataLoader(Sized(), 4, num_workers=1, persistent_workers=True), "Leave persistent_workers out"),
        (lambda: iter(TRAIN), r"is a .*iterator; finetune takes DataLoaders, iterable data sets of torch's"),
        (lambda: DataLoader(TRAIN, 4, collate_fn=lambda samples: ({"pixels": 1}, [1])), "gives a dict and a list as a"),
        (lambda: DataLoader(Subset(TRAIN, []), 4), "train has no images"),
        (lambda: DataLoader(TRAIN, 4, collate_fn=lambda samples: {"pixels": 1}), "gives a dict as a batch"),
        (lambda: DataLoader(TRAIN, 4, collate_fn=lambda samples: (1, 2, 3)), "gives 3 things as a batch"),
        (
            lambda: DataLoader(TRAIN, 4, collate_fn=lambda samples: tuple(part[:1] for part in doubled(samples))),
            "makes 1 of them where a tensor with 4 images",
        ),
        (
            lambda: DataLoader(TRAIN, 4, collate_fn=lambda samples: (doubled(samples)[0], torch.zeros(len(samples)))),
            r"labels of float32, \[4\]",
        ),
        (lambda: [1, 2], r"gives int for an index, not \(image, label\)"),
    ],
)
def test_what_they_cannot_be(loader, says):
    model, before = connected(), weights(connected())
    with pytest.raises(InputError, match=says):
        finetune(model, loader(), VAL, CONFIG)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
