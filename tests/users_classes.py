"""Classes as users write them: with their own way of being copied, made, read and called.

Each stands once as an attention block and once as a whole network; all are importable, so that they can be pickled.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from typing import Any, ClassVar

import networks
import torch
from networks import Classifier, SELinear, with_attention
from torch import Tensor, nn
from trained import images, seeded, trained_like


class DeepcopiesItself(nn.Module):
    """Copies by way of ``__dict__``, and counts the copies."""

    copied = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.copied = self.copied + 1
        return twin


class PicklesLess(nn.Module):
    """Leaves a cache out of what is pickled, and says that it came back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache: Any = {"lock": lambda: None}
        self.restored = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.cache = {}
        self.restored = True


def _remade(kind: type, state: dict[str, Any]) -> Any:
    made = kind.__new__(kind)
    made.__dict__.update(state)
    return made


class ReducesItself(nn.Module):
    """Says itself how it is made again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self.__class__, self.__dict__)


class Slotted(nn.Module):
    """Has a slot, and what copying a slot takes."""

    __slots__ = ("note",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "note", "kept in a slot")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "note": self.note}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        object.__setattr__(self, "note", state.pop("note"))
        super().__setstate__(state)


class Finishing(type):
    """A metaclass that has the last word on what a class makes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.finished = True
        return made


class Finished(nn.Module, metaclass=Finishing):
    """Made by a metaclass of its own."""


class Abstract(nn.Module, abc.ABC):
    """Has a method that every class of its kind needs."""

    @abc.abstractmethod
    def describe(self) -> str: ...


class Registered(nn.Module):
    """Keeps a list of all classes of its kind, each name once."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__ in Registered.known:
            raise TypeError(f"{cls.__name__} is registered already")
        Registered.known[cls.__name__] = cls


class Described(nn.Module):
    """Class attributes, properties and methods that make another of their kind."""

    expansion = 2
    registry: ClassVar[list[str]] = []

    @property
    def width(self) -> int:
        return int(next(self.parameters()).shape[0])

    @classmethod
    def name(cls) -> str:
        return cls.__name__.lower()

    @staticmethod
    def twice(value: int) -> int:
        return 2 * value


class SEByDict(DeepcopiesItself, SELinear): ...


class SEByState(PicklesLess, SELinear): ...


class SEByReduce(ReducesItself, SELinear): ...


class SEWithSlot(Slotted, SELinear): ...


class SEFinished(Finished, SELinear): ...


class SEAbstract(Abstract, SELinear):
    def describe(self) -> str:
        return "attention"


class SERegistered(Registered, SELinear): ...


class SERebuilt(SELinear):
    """Is copied by its constructor and its state dict."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.channels = channels

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self)(self.channels)
        twin.load_state_dict(self.state_dict())
        twin.train(self.training)
        for ours, theirs in zip(self.parameters(), twin.parameters(), strict=True):
            theirs.requires_grad_(ours.requires_grad)
        memo[id(self)] = twin
        return twin


class SEDescribed(Described, SELinear):
    """``super()`` in the forward, the class in a method."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.expansion

    def fresh(self) -> SEDescribed:
        return self.__class__(self.channels)

    def of_its_type(self) -> SEDescribed:
        return type(self)(self.channels)


class SEForwarding(SELinear):
    """Looks in its layers for what it does not have itself."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("excite")[0], name)


class ForwardingBlock(networks.Block):
    """Looks in its attention for what it does not have itself."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("attention"), name)


class BlockBySuperOfType(networks.Block):
    """Neither the root nor what holds an attention's layers: nothing is asked of its class."""

    def forward(self, x: Tensor) -> Tensor:
        return super(type(self), self).forward(x) * 0.5


class SECalling(SELinear):
    """Does something around every call."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **kwargs)


ATTENTIONS: tuple[type[SELinear], ...] = (
    SELinear,
    SEByDict,
    SERebuilt,
    SEByState,
    SEByReduce,
    SEWithSlot,
    SEFinished,
    SEAbstract,
    SERegistered,
    SEDescribed,
    SEForwarding,
    SECalling,
)


class NetByDict(DeepcopiesItself, Classifier): ...


class NetByState(PicklesLess, Classifier): ...


class NetByReduce(ReducesItself, Classifier): ...


class NetWithSlot(Slotted, Classifier): ...


class NetFinished(Finished, Classifier): ...


class NetAbstract(Abstract, Classifier):
    def describe(self) -> str:
        return "network"


class NetRegistered(Registered, Classifier): ...


class NetDescribed(Described, Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.expansion

    def fresh(self) -> NetDescribed:
        return self.__class__(list(copy.deepcopy(self.blocks)))


class NetForwarding(Classifier):
    """Looks in its first block with a connection for what it does not have itself."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("blocks")[1].attention, name)


class NetCalling(Classifier):
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **kwargs)


ROOTS: tuple[type[Classifier], ...] = (
    Classifier,
    NetByDict,
    NetByState,
    NetByReduce,
    NetWithSlot,
    NetFinished,
    NetAbstract,
    NetRegistered,
    NetDescribed,
    NetForwarding,
    NetCalling,
)


def blocks(attention: Callable[[int], nn.Module] = SELinear) -> list[nn.Module]:
    return list(with_attention(attention).blocks)


class _OneTensor(nn.Module):
    """A network whose outputs, however many, are one tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x)
        return torch.stack(output) if isinstance(output, list) else output


def trained_network(build: Callable[[], nn.Module]) -> Any:
    """A new network with trained-like values, in eval mode; the same one at every call."""
    with seeded(0):
        return trained_like(_OneTensor(build()), images(8, 32)).network


# What a graph of the whole cannot have -----------------------------------------------------------


class DecidingNet(Classifier):
    """Decides by what is in its images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.abs().mean() < 1e6 else x


class ListingNet(Classifier):
    """Gives as many outputs as there are bright images."""

    def forward(self, x: Tensor) -> list[Tensor]:
        scores = super().forward(x)
        return [score for score, image in zip(scores, x, strict=True) if image.mean() > -1e6]


class NetWithGraph(Classifier):
    """Has a part that is called ``graph``."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.graph = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(super().forward(x))


class NetWithGraphNote(Classifier):
    """Has an attribute that is called ``graph``."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.graph = {"edges": (1, 2)}


class NetWithGraphMethod(Classifier):
    """Has a method that is called ``graph``."""

    def graph(self) -> str:
        return "the user's"


class Layers(nn.Sequential):
    """A container of the user's own as a network."""

    @property
    def depth(self) -> int:
        return len(self)


class ListOfLayers(nn.ModuleList):
    """A list that can be called."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class NamedLayers(nn.ModuleDict):
    """A dictionary that can be called."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


def _elements() -> list[nn.Module]:
    network = with_attention(SELinear)
    return [network.stem, *network.blocks, network.pool, nn.Flatten(), network.head]


WITHOUT_GRAPH: dict[str, Callable[[], nn.Module]] = {
    "decides": lambda: DecidingNet(blocks()),
    "lists": lambda: ListingNet(blocks()),
    "a part named graph": lambda: NetWithGraph(blocks()),
    "an attribute named graph": lambda: NetWithGraphNote(blocks()),
    "a method named graph": lambda: NetWithGraphMethod(blocks()),
    "a container": lambda: nn.Sequential(*_elements()),
    "a container of the user's": lambda: Layers(*_elements()),
    "a list": lambda: ListOfLayers(_elements()),
    "a dictionary": lambda: NamedLayers({f"layer{i}": layer for i, layer in enumerate(_elements())}),
}
"""Networks that are the user's class and nothing else after the conversion."""


# What cannot be a class of its own ---------------------------------------------------------------


class SEBySuperOfType(SELinear):
    def forward(self, x: Tensor) -> Tensor:
        return super(type(self), self).forward(x) * 0.5


class SEBySuperOfClass(SELinear):
    def forward(self, x: Tensor) -> Tensor:
        return super(self.__class__, self).forward(x) * 0.5


class FunctionalSE(networks.SEDropout):
    """Squeeze-excitation whose pooling and gate are functions: nothing of it but itself could be made to hear."""

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(torch.relu(self.norm(self.reduce(context)))))


class FunctionalBySuperOfType(FunctionalSE):
    def forward(self, x: Tensor) -> Tensor:
        return super(type(self), self).forward(x) * 0.5


class FunctionalBySuperOfClass(FunctionalSE):
    def forward(self, x: Tensor) -> Tensor:
        return super(self.__class__, self).forward(x) * 0.5


class NetBySuperOfType(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return super(type(self), self).forward(x) * 0.5


class NetBySuperOfClass(Classifier):
    def train(self, mode: bool = True) -> NetBySuperOfClass:
        super(self.__class__, self).train(mode)
        return self


# What a forward reads of its module ---------------------------------------------------------------


class SEReading(SELinear):
    """Its forward reads plain values of all kinds."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.scale = 1.0
        self.act_on = True
        self.mode = "mean"
        self.settings = {"shift": 0.0}
        self.norm: nn.Module | None = None
        self.gate: Callable[[Tensor], Tensor] = torch.sigmoid

    def forward(self, x: Tensor) -> Tensor:
        if not self.act_on:
            return x
        context = x.mean((2, 3)) if self.mode == "mean" else x.amax((2, 3))
        scale = self.gate(self.excite[2](self.excite[1](self.excite[0](context)))) * self.scale
        if self.norm is not None:
            scale = self.norm(scale)
        return x * scale[:, :, None, None] + self.settings["shift"]


class InlineReading(networks.InlineBlock):
    """A residual block that does its attention itself, at a strength that can be set."""

    strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(torch.relu(self.conv1(x)))
        w = out.mean((2, 3), keepdim=True)
        w = torch.sigmoid(self.fc2(torch.relu(self.fc1(w))))
        return torch.relu(out * w * self.strength + self.shortcut(x))


def inline_reading() -> Classifier:
    return Classifier([InlineReading(16, 16, 1), InlineReading(16, 24, 2), InlineReading(24, 32, 1)])


# Attention in containers --------------------------------------------------------------------------


class SequentialSE(nn.Sequential):
    """Squeeze-excitation that is itself the container of its layers."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x)


class HoldsSequential(nn.Module):
    """Squeeze-excitation in a plain ``Sequential``, applied by the module around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x)
