"""Recording and folding: what must be seen is entered, everything else stays the user's module, nothing is baked."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import SELinear, conv_norm
from torch import Tensor, nn
from trained import seeded, trained_like

import dcafy
from dcafy.trace.recording import check_decision

try:
    import einops
except ImportError:
    einops = None

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem, a body that the tests vary, a head."""

    def __init__(self, *body: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, width, stride=2), nn.ReLU())
        self.body = nn.ModuleList(body)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for module in self.body:
            x = module(x)
        return self.head(x.mean((2, 3)))


def converted(model: nn.Module, example: Tensor = IMAGES) -> tuple[nn.Module, nn.Module]:
    """A trained-like model and its conversion, both in eval."""
    model = trained_like(model, example)
    return model, dcafy.convert(model, example_inputs=example).eval()


def same_everywhere(model: nn.Module, connected: nn.Module) -> None:
    """Equal outputs at the example's and at other batch and image sizes."""
    with torch.no_grad(), seeded(1):
        for shape in ((2, 3, 64, 64), (5, 3, 64, 64), (1, 3, 96, 80), (3, 3, 65, 71)):
            images = torch.rand(shape)
            assert torch.equal(model(images), connected(images)), shape


class Residual(nn.Module):
    """A residual unit with attention at the end of its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_norm(16, 16)
        self.se = SELinear(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se(F.relu(self.conv(x)))


class AsksItsInput(Residual):
    """Branches on rank, channels, type and length, as several families do."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 16 or len(x.shape) != 4:
            raise ValueError("a map of 16 channels is needed")
        n, c, *size = x.shape
        assert isinstance(c, int)
        if isinstance(size, list) and "cuda" not in str(x.device):
            x = x.view(n, c, *size)
        return super().forward(x) if x.dtype.is_floating_point else x


def test_values_settle_control_flow() -> None:
    model, connected = converted(Net(AsksItsInput(), AsksItsInput(), AsksItsInput()))
    assert len(dcafy.connections(connected)) == 2
    same_everywhere(model, connected)


class MakesTensors(Residual):
    """Tensor factories in a forward: sized by the input, and random."""

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
        x = x + torch.zeros(x.shape[0], 16, 1, 1) + ramp * 1e-3
        if self.training:
            return self.se(self.conv(x))
        return self.se(x * torch.ones_like(x) + torch.zeros(()).new_full((1,), 0.5))


class Noisy(Residual):
    """Adds noise of its own in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.conv(x) + torch.randn(x.shape) * 0.1)


def test_random_numbers_are_drawn_anew() -> None:
    model = trained_like(Net(Noisy(), Noisy()), IMAGES)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    with torch.no_grad():
        first, second = connected(IMAGES), connected(IMAGES)
        assert not torch.equal(first, second)
        with seeded(3):
            expected = model(IMAGES)
        with seeded(3):
            assert torch.equal(connected(IMAGES), expected)


class SizedByHand(Residual):
    """``int()`` of a size: a number that would be right for the example only."""

    def forward(self, x: Tensor) -> Tensor:
        rows = int(x.shape[2])
        return self.se(self.conv(x)) * torch.sigmoid(x.sum(2, keepdim=True) / rows)


def test_a_baked_size_is_never_emitted() -> None:
    """Such a module is left alone, or entered below the line that bakes; the result runs at other sizes."""
    model = trained_like(Net(SizedByHand(), Residual(), Residual(), SizedByHand()), IMAGES)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    same_everywhere(model, connected)
    links = dcafy.inspect(model, example_inputs=IMAGES).links
    assert {"body.1.se", "body.2.se"} <= {name for link in links for name in (link.source, link.target)}


class SizedByLen(Residual):
    """``len(x)`` where ``x.size(0)`` is meant."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.se(x.view(len(x), -1).view(len(x), 16, *x.shape[2:]))


def test_the_length_of_a_tensor_stays_symbolic() -> None:
    real = len
    model, connected = converted(Net(SizedByLen(), SizedByLen(), SizedByLen()))
    assert len(dcafy.connections(connected)) == 2
    assert not dcafy.inspect(model, example_inputs=IMAGES).skipped
    same_everywhere(model, connected)
    assert len is real


class GoesBySize(Net):
    """A network in whose forward ``changed`` depends on the size of the image."""

    def __init__(self, decides: Callable[[torch.Size], Any]) -> None:
        super().__init__(Residual(), Residual(), Residual())
        self.decides = decides

    def forward(self, x: Tensor) -> Tensor:
        decided = self.decides(x.shape)
        return super().forward(x) * (2 if decided else 1)


@pytest.mark.parametrize(
    ("decides", "other"),
    [
        (lambda shape: shape[2] % 8 or shape[3] % 8, (2, 3, 64, 70)),
        (lambda shape: shape[2] > shape[3], (2, 3, 96, 64)),
        (lambda shape: shape[3] < 40, (2, 3, 32, 32)),
        (lambda shape: max(shape[2:]) > 130, (2, 3, 160, 64)),
        (lambda shape: len(range(min(shape[2], 48))) < 48, (2, 3, 32, 64)),
        (lambda shape: shape[2:] == (70, 64), (2, 3, 70, 64)),
    ],
    ids=["multiples", "landscape", "small", "large", "loop", "equal"],
)
def test_a_path_around_attention_that_goes_by_the_size_is_taken_at_each_size(decides, other) -> None:
    """That forward stays Python: at another size it decides otherwise, and the connections are heard all the same."""
    model, connected = converted(GoesBySize(decides))
    assert list(dcafy.connections(connected)) == ["body.1.se", "body.2.se"]
    decided = []
    with torch.no_grad():
        for shape in ((2, 3, 64, 64), (1, 3, 64, 64), (3, 3, 128, 128), other):
            images = torch.rand(shape)
            assert torch.equal(model(images), connected(images)), shape
            decided.append(bool(decides(images.shape)))
            for connection in dcafy.connections(connected).values():
                connection.beta.fill_(0.5)
                assert not torch.equal(model(images), connected(images)), shape
                connection.beta.zero_()
    assert decided[-1] is not decided[0]


class AttentionBySize(SELinear):
    """Attention that computes otherwise on some maps."""

    def __init__(self, decides: Callable[[torch.Size], Any]) -> None:
        super().__init__(16)
        self.decides = decides

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.decides(x.shape) else 1)


@pytest.mark.parametrize(
    ("decides", "other"),
    [
        (lambda shape: shape[2] > shape[3], (2, 3, 96, 64)),
        (lambda shape: shape[3] < 20, (2, 3, 64, 32)),
        (lambda shape: max(shape[2:]) > 70, (2, 3, 160, 64)),
        (lambda shape: len(range(min(shape[2], 24))) < 24, (2, 3, 32, 64)),
    ],
    ids=["landscape", "small", "large", "loop"],
)
def test_attention_that_goes_by_the_size_is_connected_for_that_size_only(decides, other) -> None:
    """What its graph has decided the same way at every size tried is checked when it runs: never a wrong result."""
    model = Net(*[Residual() for _ in range(3)])
    for block in model.body:
        block.se = AttentionBySize(decides)
    model, connected = converted(model)
    assert list(dcafy.connections(connected)) == ["body.1.se", "body.2.se"]
    with torch.no_grad():
        for shape in ((2, 3, 64, 64), (1, 3, 64, 64), (3, 3, 128, 128)):
            images = torch.rand(shape)
            assert torch.equal(model(images), connected(images)), shape
        with pytest.raises(dcafy.DcafyError, match=r"body\.0\.se goes by the size of its input"):
            connected(torch.rand(other))


def test_no_check_is_made_of_what_no_size_changes() -> None:
    _, connected = converted(Net(AsksItsInput(), AsksItsInput(), AsksItsInput()))
    assert not [node for node in connected.graph.nodes if node.target is check_decision]


class AllBody(Net):
    """Calls its body as one module, and treats a batch of one image by itself."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.body(self.stem(x)).mean((2, 3)))
        return scores * 2 if x.shape[0] == 1 else scores


def test_one_image_may_be_treated_by_itself() -> None:
    model, connected = converted(AllBody(Residual(), Residual(), Residual()))
    assert len(dcafy.connections(connected)) == 2
    same_everywhere(model, connected)


class BatchLoop(nn.Module):
    """A loop over images, as detectors have: its length is the batch size."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(image[None]) for image in x])


def test_a_loop_over_images_treats_every_image_alike() -> None:
    """However many images the example has: a block has one connection, and no image depends on its place."""
    model = trained_like(BatchLoop(Net(Residual(), Residual(), Residual())), IMAGES)
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert any("batch size" in item.reason for item in plan.skipped)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert isinstance(connected, BatchLoop)
    same_everywhere(model, connected)
    connections = dcafy.connections(connected)
    assert list(connections) == ["inner.body.1.se", "inner.body.2.se"]
    with torch.no_grad():
        for i, connection in enumerate(connections.values()):
            connection.beta.fill_(0.5 + i)
        for count in (1, 2, 5):
            image = torch.rand(1, 3, 64, 64)
            scores = connected(image.expand(count, 3, 64, 64))
            assert torch.equal(scores, connected.inner(image).expand(count, 10))
            assert not torch.equal(scores, model(image.expand(count, 3, 64, 64)))
        for connection in connections.values():
            connection.beta.zero_()
    reverted = dcafy.revert(connected)
    assert reverted.state_dict().keys() == model.state_dict().keys()
    same_everywhere(model, reverted)


class DecidesByContent(nn.Module):
    """A branch on what the input holds."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.net = Net(*body)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean().item() > 0.9:
            x = x * 0.5
        return self.net(x)


def test_a_branch_on_content_makes_an_island() -> None:
    model = trained_like(DecidesByContent(Residual(), Residual()), IMAGES)
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert plan.islands == ("net",)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    same_everywhere(model, connected)
    assert torch.equal(model(torch.ones(1, 3, 64, 64)), connected(torch.ones(1, 3, 64, 64)))


def dropped(x: Tensor, rate: float, training: bool = False) -> Tensor:
    """Stochastic depth as a function, as many networks have it: another path in training."""
    if not training:
        return x
    return x * (torch.rand(x.shape[0], 1, 1, 1) > rate)


class DropsByFunction(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x + dropped(self.se(self.conv(x)), 0.5, training=self.training)


def test_a_function_that_is_told_the_mode() -> None:
    """It is called as it is in the graph; the module around it is entered, and its attention connected."""
    before = dropped
    model, connected = converted(Net(DropsByFunction(), DropsByFunction(), DropsByFunction()))
    assert len(dcafy.connections(connected)) == 2
    assert not dcafy.inspect(model, example_inputs=IMAGES).skipped
    assert dropped is before
    same_everywhere(model, connected)
    for net in (model, connected):
        net.body[1].train(mode=True)
    with seeded(5):
        expected = model(IMAGES)
    assert not torch.equal(expected, model.eval()(IMAGES))
    with seeded(5):
        assert torch.equal(connected(IMAGES), expected)
    again = dcafy.inspect(connected, example_inputs=IMAGES)
    assert [block.name for block in again.blocks] == ["body.0.se", "body.1.se", "body.2.se"]


class TwoPaths(nn.Module):
    """A root that takes another path in training (an auxiliary head)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU(), Residual(), Residual())
        self.head, self.aux = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.trunk(x).mean((2, 3))
        if self.training:
            return self.head(x), self.aux(x)
        return self.head(x)


def test_both_paths_of_a_root_stay_alive() -> None:
    """No island is needed: the root runs its own Python in both modes, and what it holds is heard in both."""
    model = trained_like(TwoPaths(), IMAGES)
    connected = dcafy.convert(model, example_inputs=IMAGES)
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert plan.islands == ()
    assert ["no graph of the whole can be written" in item.reason for item in plan.skipped] == [True]
    assert list(dcafy.connections(connected)) == ["trunk.3.se"]
    same_everywhere(model.eval(), connected.eval())

    def both(network: nn.Module) -> tuple[Tensor, Tensor]:
        with seeded(2), torch.no_grad():
            outputs = copy.deepcopy(network).train()(IMAGES)
        assert len(outputs) == 2
        return outputs

    expected = both(model)
    assert all(torch.equal(a, b) for a, b in zip(both(connected), expected, strict=True))
    with torch.no_grad():
        dcafy.connections(connected)["trunk.3.se"].beta.fill_(0.5)
    assert not any(torch.equal(a, b) for a, b in zip(both(connected), expected, strict=True))
    assert not torch.equal(connected.eval()(IMAGES), model.eval()(IMAGES))


class Dropping(Residual):
    """Functional dropout under the module's own mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se(F.dropout(self.conv(x), 0.5, self.training))


def test_the_mode_is_read_when_the_graph_runs() -> None:
    model, connected = converted(Net(Dropping(), Dropping()))
    for train, partly in ((False, False), (True, False), (True, True)):
        for network in (model, connected):
            network.train(train)
            if partly:
                network.body[0].eval()
        with seeded(4):
            expected = model(IMAGES)
        with seeded(4):
            assert torch.equal(connected(IMAGES), expected)


class Untouched(nn.Module):
    """Holds no attention: it has to stay the very module, with its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_norm(16, 16)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


def test_modules_without_attention_are_called_and_not_inlined() -> None:
    connected = converted(Net(Residual(), Untouched(), Residual()))[1]
    called = {str(node.target) for node in connected.graph.nodes if node.op == "call_module"}
    assert "body.1" in called
    assert "body.1.conv" not in called
    assert type(connected.body[1]) is Untouched
    seen: list[int] = []
    connected.body[1].register_forward_hook(lambda *_: seen.append(1))
    connected(IMAGES)
    assert seen == [1]


def test_hooks_around_attention_fire() -> None:
    """Of blocks, and of the attention itself; in a conversion they see no stand-ins for tensors, and nobody warns."""
    model = trained_like(Net(Residual(), Residual()), IMAGES)
    seen: list[tuple[nn.Module, type, bool]] = []
    for module in (model.body[0], model.body[1].se, model.body[1]):
        module.register_forward_hook(lambda m, _, y: seen.append((m, type(y), y.is_meta)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        connected = dcafy.convert(model, example_inputs=IMAGES)
    assert {(kind, meta) for _, kind, meta in seen} <= {(Tensor, False)}
    seen.clear()
    connected(IMAGES)
    assert [module for module, *_ in seen] == [connected.body[0], connected.body[1].se, connected.body[1]]


class Optional(nn.Module):
    """Defaulted arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(Residual(), Residual())

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        if mask is not None:
            x = x * mask
        return {"out": self.net(x) * scale}


def test_defaulted_arguments_keep_their_defaults_and_may_be_given() -> None:
    model = Optional().eval()
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    expected = model(IMAGES)["out"]
    assert torch.equal(connected(IMAGES)["out"], expected)
    assert torch.equal(connected(IMAGES, None)["out"], expected)
    assert torch.equal(connected(IMAGES, mask=None, scale=1.0)["out"], expected)
    mask = (IMAGES > 0.5).float()
    assert torch.equal(connected(IMAGES, scale=2.0)["out"], model(IMAGES, scale=2.0)["out"])
    assert torch.equal(connected(IMAGES, mask)["out"], model(IMAGES, mask)["out"])
    assert not torch.equal(connected(IMAGES, mask)["out"], expected)
    with torch.no_grad():
        dcafy.connections(connected)["net.body.1.se"].beta.fill_(0.5)
    assert not torch.equal(connected(IMAGES, mask, 2.0)["out"], model(IMAGES, mask, 2.0)["out"])


class Caching(Residual):
    """Stores on itself what it computed: a side effect that no graph has."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.mean()
        return super().forward(x)


def test_a_module_that_stores_what_it_computes_is_kept() -> None:
    model = trained_like(Net(Caching(), Residual(), Residual()), IMAGES)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    connected(IMAGES)
    assert isinstance(connected.body[0].last, Tensor)
    assert connected.body[0].last.device.type == "cpu"
    assert not hasattr(model.body[0], "last") or isinstance(model.body[0].last, Tensor)
    same_everywhere(model, connected)


class Kept:
    """A plain object that modules put things in."""

    def __init__(self) -> None:
        self.value: Any = None


SEEN: list[Any] = []


def counts(module: Remembers, x: Tensor) -> Tensor:
    module.steps += 1
    return x * min(1.0, module.steps / 3)


def appends(module: Remembers, x: Tensor) -> Tensor:
    module.log.append(1)
    return x / len(module.log)


def keeps_in_an_object(module: Remembers, x: Tensor) -> Tensor:
    module.kept.value = x.mean()
    return x


def keeps_in_a_global(module: Remembers, x: Tensor) -> Tensor:
    SEEN.append(x.mean())
    return x


def gives_a_buffer_new_data(module: Remembers, x: Tensor) -> Tensor:
    x = x - module.ema[:, None, None]
    module.ema.data = 0.9 * module.ema + 0.1 * x.detach().mean((0, 2, 3))
    return x


class Remembers(Residual):
    """Changes more than tensors in its forward."""

    def __init__(self, remember: Callable[[Remembers, Tensor], Tensor]) -> None:
        super().__init__()
        self.remember = remember
        self.steps, self.log, self.kept = 0, list[int](), Kept()
        self.register_buffer("ema", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.remember(self, x))


@pytest.mark.parametrize("remember", [counts, appends, keeps_in_an_object, keeps_in_a_global, gives_a_buffer_new_data])
def test_what_a_forward_around_attention_changes_in_python_is_changed_at_each_run(remember: Any) -> None:
    """Once for each run, and not while it is converted; the attention inside is connected like any other."""
    SEEN.clear()
    model = trained_like(Net(Remembers(remember), Residual(), Residual()), IMAGES)
    SEEN.clear()
    dcafy.inspect(model, example_inputs=IMAGES)
    assert [type(item) for item in SEEN if type(item) is not Tensor] == []
    connected = dcafy.convert(model, example_inputs=IMAGES, verify=False).eval()
    assert list(dcafy.connections(connected)) == ["body.1.se", "body.2.se"]
    for _ in range(4):
        SEEN.clear()
        expected = model(IMAGES)
        assert torch.equal(connected(IMAGES), expected)
        assert len(SEEN) == (2 if remember is keeps_in_a_global else 0)
        ours, theirs = connected.body[0], model.body[0]
        assert torch.equal(ours.ema, theirs.ema)
        assert (ours.steps, ours.log, type(ours.kept.value)) == (theirs.steps, theirs.log, type(theirs.kept.value))


class MakesOnce(Residual):
    """Works something out at its first call, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.groups is None:
            self.groups = [8, 8]
        return super().forward(torch.cat(x.split(self.groups, 1), 1))


def test_what_is_made_once_and_kept_is_in_nobodys_way() -> None:
    model, connected = converted(Net(MakesOnce(), MakesOnce()))
    assert list(dcafy.connections(connected)) == ["body.1.se"]
    same_everywhere(model, connected)


class Switching(Residual):
    """Runs its attention in full precision whatever the caller does: an effect that no graph has."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            return x + self.se(self.conv(x.float()))


def test_contexts_inside_a_forward_are_not_lost() -> None:
    """They are its own Python; the attention that runs in them hears and is heard, in whatever precision that is."""
    model = trained_like(Net(Switching(), Residual(), Residual()), IMAGES)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    connections = dcafy.connections(connected)
    assert list(connections) == ["body.1.se", "body.2.se"]
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert ["no graph of the whole" in item.reason and "autocast" in item.reason for item in plan.skipped] == [True]
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.no_grad():
            expected = model(IMAGES)
            assert torch.equal(connected(IMAGES), expected)
            for connection in connections.values():
                connection.beta.fill_(2.0)
                assert not torch.equal(connected(IMAGES), expected)
                connection.beta.zero_()
    for network in (model, connected):
        types: list[torch.dtype] = []
        linear = network.body[0].se.excite[0]
        handle = linear.register_forward_hook(lambda _m, _x, y, types=types: types.append(y.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            network(IMAGES)
        handle.remove()
        assert types == [torch.float32]


class FreezesByCall(nn.Module):
    """Computes no gradients for its first half: a call, not a context."""

    def __init__(self, mode: type) -> None:
        super().__init__()
        self.first, self.second = Net(Residual(), Residual()).stem, nn.Sequential(Residual(), Residual())
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        self.mode(False)
        x = self.first(x)
        self.mode(True)
        return self.second(x)


def test_gradients_that_a_forward_switches_off_stay_off() -> None:
    model = trained_like(FreezesByCall(torch.set_grad_enabled), IMAGES)
    connected = dcafy.convert(model, example_inputs=IMAGES)
    assert list(dcafy.connections(connected)) == ["second.1.se"]
    for network in (model, connected):
        network(IMAGES).sum().backward()
        assert all(parameter.grad is None for parameter in network.first.parameters())


class FreezesAndFails(Net):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        return super().forward(x.no_such_thing())


def test_a_trace_that_fails_leaves_gradients_as_they_were() -> None:
    with pytest.raises(dcafy.DcafyError):
        dcafy.inspect(FreezesAndFails(Residual(), Residual()), example_inputs=IMAGES)
    assert torch.is_grad_enabled()


class ShapesInPlace(Residual):
    """Adds an axis to what a layer returned, in place, as many write selective kernels."""

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.cat([self.conv(x).unsqueeze_(1), self.conv(x).unsqueeze_(1)], 1)
        return self.se(branches.sum(1).transpose_(2, 3))


def test_axes_that_are_added_in_place() -> None:
    model, connected = converted(Net(ShapesInPlace(), ShapesInPlace(), ShapesInPlace()))
    assert len(dcafy.connections(connected)) == 2
    assert not dcafy.inspect(model, example_inputs=IMAGES).skipped
    same_everywhere(model, connected)


class Group(nn.Module):
    """Two attention blocks under a forward that takes another path in training."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(Residual(), Residual())

    def forward(self, x: Tensor) -> Tensor:
        y = self.units(x)
        if self.training:
            y = F.dropout(y, 0.1)
        return x + y


def test_every_one_of_identical_modules_is_looked_into() -> None:
    """What decides by the mode around attention parts no chain."""
    model, connected = converted(Net(Group(), Group(), Group()))
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert [block.name for block in plan.blocks] == [f"body.{i}.units.{j}.se" for i in range(3) for j in range(2)]
    assert list(dcafy.connections(connected)) == [block.name for block in plan.blocks[1:]]
    assert [(link.source, link.target) for link in plan.links] == [
        (one.name, other.name) for one, other in itertools.pairwise(plan.blocks)
    ]
    same_everywhere(model, connected)


class SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return gradient * gate * (1 + x * (1 - gate))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # scripting is deprecated, and still in many repositories

    @torch.jit.script
    def scripted_swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def sees_tensors_only(x: Tensor) -> Tensor:
    """Asks for the very type, as libraries for several frameworks do."""
    if type(x) is not Tensor:
        raise RuntimeError(f"unknown type {type(x)}")
    return x * torch.sigmoid(x)


class Calls(Residual):
    """Calls a function that works on tensors, and not on what stands for them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.name == "function":
            x = SwishFunction.apply(x)
        elif self.name == "scripted":
            x = scripted_swish(x)
        else:
            x = sees_tensors_only(x)
        return self.se(x)


@pytest.mark.parametrize("name", ["function", "scripted", "tensors only"])
def test_functions_that_take_no_proxies(name: str) -> None:
    model, connected = converted(Net(*[Calls(name) for _ in range(3)]))
    assert list(dcafy.connections(connected)) == ["body.1.se", "body.2.se"]
    assert not dcafy.inspect(model, example_inputs=IMAGES).skipped
    same_everywhere(model, connected)
    for again in (copy.deepcopy(connected), pickle.loads(pickle.dumps(connected))):
        same_everywhere(model, again)
    gradients = []
    for network in (model, connected):
        network(IMAGES).sum().backward()
        gradients.append(network.stem[0][0].weight.grad)
    assert torch.equal(*gradients)


class Einops(Residual):
    """Squeeze-excitation with einops."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        context = einops.reduce(x, "n c h w -> n c", "mean")
        return x * einops.rearrange(self.se.excite(context), "n c -> n c 1 1")


@pytest.mark.skipif(einops is None, reason="einops is not installed")
def test_attention_in_the_words_of_einops() -> None:
    model, connected = converted(Net(Einops(), Einops(), Einops()))
    assert list(dcafy.connections(connected)) == ["body.1", "body.2"]
    assert {block.gate for block in dcafy.inspect(model, example_inputs=IMAGES).blocks} == {"sigmoid"}
    same_everywhere(model, connected)


class AsksWhetherTensor(Residual):
    """Takes tensors and lists."""

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor) and torch.is_tensor(x) and not isinstance(x, nn.Parameter | list):
            return super().forward(x * 2)
        return super().forward(x)


def test_a_tensor_says_that_it_is_one() -> None:
    model, connected = converted(Net(AsksWhetherTensor(), AsksWhetherTensor()))
    assert list(dcafy.connections(connected)) == ["body.1.se"]
    same_everywhere(model, connected)
    assert "isinstance" not in globals()


class Sliced(Net):
    """Runs a slice of a Sequential, which is a module that is in no tree."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Residual(), Residual(), Residual(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[1:](self.body[:1](self.stem(x)))
        return self.head(x.mean((2, 3)))


def test_slices_of_a_sequential() -> None:
    model, connected = converted(Sliced())
    assert list(dcafy.connections(connected)) == ["body.1.se", "body.2.se"]
    same_everywhere(model, connected)


class GrowsItsList(nn.Module):
    """Fills a dict of stages, and hands a list on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU())
        self.stages = nn.ModuleDict({"a": Residual(), "b": Residual()})
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for stage in self.stages.values():
            maps.append(stage(maps[-1]))
        return self.head(torch.cat(maps, 1).mean((2, 3)))


def test_lists_of_maps() -> None:
    model, connected = converted(GrowsItsList())
    assert list(dcafy.connections(connected)) == ["stages.b.se"]
    same_everywhere(model, connected)


def test_settled_factories_and_modes_together() -> None:
    """Control flow on the mode in a block keeps that block whole; the others are connected all the same."""
    model = trained_like(Net(MakesTensors(), Residual(), Residual()), IMAGES)
    connected = dcafy.convert(model, example_inputs=IMAGES)
    assert "body.2.se" in dcafy.connections(connected)
    for mode in (False, True):
        with seeded(5):
            expected = model.train(mode)(IMAGES)
        with seeded(5):
            assert torch.equal(connected.train(mode)(IMAGES), expected)


# Other tensors -----------------------------------------------------------------------------------------


class Signal(nn.Module):
    """Squeeze-excitation on sound: [N, C, L]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 16, 7, stride=2, padding=3)
        self.convs = nn.ModuleList([nn.Conv1d(16, 16, 3, padding=1) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(16, 4) for _ in range(3)])
        self.up = nn.ModuleList([nn.Linear(4, 16) for _ in range(3)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, down, up in zip(self.convs, self.down, self.up, strict=True):
            x = F.relu(conv(x))
            x = x * torch.sigmoid(up(F.relu(down(x.mean(2))))).unsqueeze(-1)
        return self.head(x.mean(2))


class Video(nn.Module):
    """Squeeze-excitation on [N, C, T, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, stride=2, padding=1)
        self.convs = nn.ModuleList([nn.Conv3d(8, 8, 3, padding=1) for _ in range(2)])
        self.gates = nn.ModuleList([nn.Conv3d(8, 8, 1) for _ in range(2)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, gate in zip(self.convs, self.gates, strict=True):
            x = F.relu(conv(x))
            x = x * torch.sigmoid(gate(F.adaptive_avg_pool3d(x, 1)))
        return self.head(x.mean((2, 3, 4)))


class Tokens(nn.Module):
    """Squeeze-excitation on [N, L, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 24)
        self.mix = nn.ModuleList([nn.Linear(24, 24) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(24, 6) for _ in range(3)])
        self.up = nn.ModuleList([nn.Linear(6, 24) for _ in range(3)])
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for mix, down, up in zip(self.mix, self.down, self.up, strict=True):
            x = F.gelu(mix(x))
            x = x * torch.sigmoid(up(F.relu(down(x.mean(1, keepdim=True)))))
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("network", "shape", "other", "channels"),
    [
        (Signal, (2, 2, 256), (3, 2, 300), 16),
        (Video, (2, 3, 8, 32, 32), (1, 3, 12, 40, 24), 8),
        (Tokens, (2, 64, 12), (3, 50, 12), 24),
    ],
    ids=["sound", "video", "tokens"],
)
def test_other_tensors(network: type[nn.Module], shape: tuple[int, ...], other: tuple[int, ...], channels: int) -> None:
    with seeded(6):
        model = network().eval()
        example, images = torch.rand(shape), torch.rand(other)
    plan = dcafy.inspect(model, example_inputs=example)
    assert {(block.dimension, block.channels) for block in plan.blocks} == {("channel", channels)}
    connected = dcafy.convert(model, example_inputs=example).eval()
    assert torch.equal(model(images), connected(images))
    for connection in dcafy.connections(connected).values():
        with torch.no_grad():
            connection.beta.fill_(0.5)
        assert not torch.equal(model(images), connected(images))
        with torch.no_grad():
            connection.beta.zero_()


# Attention that is not ours ------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """softmax(QKᵀ)V by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2) * 0.2).softmax(-1) @ v)


class Transformer(nn.Module):
    """Self-attention in its three usual forms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 24)
        self.by_hand = SelfAttention()
        self.module = nn.MultiheadAttention(24, 2, batch_first=True)
        self.q = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.by_hand(x)
        x = x + self.module(x, x, x)[0]
        return x + F.scaled_dot_product_attention(self.q(x), x, x)


def test_self_attention_is_listed_and_is_no_block() -> None:
    plan = dcafy.inspect(Transformer().eval(), example_inputs=torch.rand(2, 10, 12))
    assert plan.blocks == ()
    listed = {item.name for item in plan.skipped if "self-attention" in item.reason}
    assert listed == {"by_hand", "module", "root"}
