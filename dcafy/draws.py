"""Random numbers of one's own: what is drawn here comes from generators that nobody else draws from."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dcafy.threads import ONE_AT_A_TIME, OwnThread, Patch, Swap


class OwnDraws(OwnThread, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it this thread draws from generators of its own: torch's global ones stay where they are.

    To save their state and put it back would do for one thread; another's draws meanwhile would be taken back, too.

    ``seed``: where the generators start; where absent, as the global ones stand, so that the numbers are those that
    would have been drawn from them.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._generator(torch.device("cpu"))  # where the global one stands now, not at the first draw

    def patches(self) -> Iterator[Patch]:
        """Has this thread seed its own generators, too, and draw what is Python's and numpy's apart."""

        def manual_seed(seed: Any) -> torch.Generator:
            self._seed = int(seed)
            self._generators.clear()
            return self._generator(torch.device("cpu"))

        for owner in (torch, torch.random):
            yield owner, "manual_seed", manual_seed
        yield from plain_draws()

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            made = self._generators[device] = torch.Generator(device)
            if self._seed is not None:
                made.manual_seed(self._seed)
            elif device.type == "cpu":
                made.set_state(torch.get_rng_state())
            else:
                made.set_state(torch.get_device_module(device).get_rng_state(device))
        return self._generators[device]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        device = _device(args, kwargs)
        if device.type == "meta":  # nothing is drawn there
            return func(*args, **kwargs)
        generator = self._generator(device)
        drawing, place = _with_generator(func)
        if drawing is None:
            return _from_global(generator, functools.partial(func, *args, **kwargs))
        if place < len(args):  # some take it by position
            args = (*args[:place], args[place] or generator, *args[place + 1 :])
        else:
            kwargs = {**kwargs, "generator": kwargs.get("generator") or generator}
        return drawing(*args, **kwargs)


def _from_global(generator: torch.Generator, call: Callable[[], Any]) -> Any:
    """What an operation that takes no generator draws, if the global one of the device stood where ``generator`` leads.

    Only that device's is moved and put back: ``torch.manual_seed`` would reach for every GPU's.
    """
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return call()
    module = torch.get_device_module(device)
    with torch.random.fork_rng([device], device_type=device.type), module.device(device):
        module.manual_seed(seed)
        return call()


def plain_draws() -> Iterator[Patch]:
    """Has the functions of ``random`` and of ``numpy.random`` draw from generators that start where they are."""
    python, numpy = random.Random(), np.random.RandomState()
    python.setstate(random.getstate())
    numpy.set_state(np.random.get_state())
    for module, own, names in ((random, python, _PYTHONS), (np.random, numpy, _NUMPYS)):
        for name in names:
            yield module, name, getattr(own, name)


def _methods(module: Any) -> list[str]:
    """The functions of a module that are methods of the one generator that it has for all."""
    shared = module.random.__self__
    return [name for name, function in vars(module).items() if getattr(function, "__self__", None) is shared]


_PYTHONS, _NUMPYS = _methods(random), [*_methods(np.random), "seed"]


def drawing_apart(call: Callable[[], R], seed: int | None = None) -> R:
    """What ``call`` returns, which is others' code: its draws are its own, also where it sets torch's seed."""
    draws = OwnDraws(seed)
    with ONE_AT_A_TIME:
        swap = Swap(draws.patches())
        try:
            swap.put()
            with draws:
                return call()
        finally:
            swap.put_back()


R = TypeVar("R")


def _device(args: Any, kwargs: Any) -> torch.device:
    tensor = next((value for value in args if isinstance(value, Tensor)), None)
    device = torch.device(kwargs.get("device") or (torch.get_default_device() if tensor is None else tensor.device))
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())  # one generator for "cuda"


@functools.cache
def _with_generator(func: Any) -> tuple[Callable[..., Any] | None, int]:
    """The overload of a drawing operation that takes a generator, if there is one, and the generator's place."""
    names = _names(func)
    if "generator" in names:
        return func, names.index("generator")
    others = (getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads())
    same = (other for other in others if set(_names(other)) == {*names, "generator"})
    found = next(same, None)
    return found, len(names) + 1


def _names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]
