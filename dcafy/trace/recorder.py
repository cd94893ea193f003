"""One deep trace: every module entered, every node's value known, every call's boundary kept.

A network is recorded once, on a copy without data. Modules are entered wherever they compute
something of their own; the nodes of each entered call are remembered as a :class:`Call`, so that a
call in which nothing of interest happens can later be folded back into the very module the user
built (``fold.py``). That makes the deep graph and the emitted graph one and the same recording.

A module whose forward cannot be recorded (data-dependent control flow, say) is kept whole: the nodes
of the attempt are taken back and the module is called as a leaf.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from dcafy.errors import InputError
from dcafy.graph.copies import is_nothing, running_copy
from dcafy.graph.evaluator import Evaluator
from dcafy.graph.nodes import OWNER, PLACE, VALUE, as_plain, is_record, leaves, mapped, values_of
from dcafy.graph.paths import above, below, joined, within
from dcafy.graph.reading import Beside, named
from dcafy.graph.rewritten import is_rewritten, original_class
from dcafy.threads import ONE_AT_A_TIME
from dcafy.trace.effects import (
    BOOKKEEPING,
    GONE,
    Kept,
    State,
    beside_state,
    changed,
    holds_proxy,
    python_state,
    watched_globals,
    writes,
)
from dcafy.trace.inputs import without_data
from dcafy.trace.named import Scripted
from dcafy.trace.patches import swap_for
from dcafy.trace.proxy import Mode, ValueProxy
from dcafy.trace.recording import Call, Observed, Recording, check_default, passed_through
from dcafy.trace.tracer import ValueTracer
from dcafy.wording import reason_of


@dataclass(frozen=True)
class _State:
    """Where a recording stands, to come back to. ``given``: proxies that are handed on, and their nodes."""

    calls: int
    settled: int
    refused: int
    mode_read: set[tuple[str, str]]
    attributes: dict[str, ValueProxy]
    given: list[tuple[ValueProxy, fx.Node]]


REWRITE = "Write it into a subclass, or as a function of self and set it with types.MethodType(function, module)."
"""What is said of forwards that use modules which are not their own."""

_LAYERS = (nn.modules.container.Sequential, nn.ModuleList, nn.ModuleDict, nn.Module)


def is_layer(module: nn.Module) -> bool:
    """Whether the deep trace calls ``module`` as a leaf.

    A ``torch.nn`` layer is one, and so is a subclass of one that has no parametric children
    (timm's ``BatchNormAct2d``, ``Conv2dSame``): entered, its mode and its padding would be baked.
    """
    kind = type(module)
    if is_rewritten(module):
        return False
    if kind.__module__.startswith(("torch.nn.", "torch.ao.nn.")):
        return not isinstance(module, nn.Sequential)
    from_torch = any(base.__module__.startswith("torch.nn.") and base not in _LAYERS for base in kind.__mro__)
    return from_torch and all(next(child.parameters(), None) is None for child in module.children())


Connections = Literal["kept", "called", "entered"]


class Recorder(ValueTracer):
    """One deep trace of a data-free model on meta values, with the boundaries of the calls in it.

    ``opaque``  paths of the modules that are called as leaves, whatever they are
    """

    def __init__(
        self,
        evaluator: Evaluator,
        model: nn.Module,
        original: nn.Module,
        inputs: Observed,
        opaque: frozenset[str] = frozenset(),
        connections: Connections = "kept",
        training: bool = False,
    ) -> None:
        super().__init__(evaluator, model, original)
        self._inputs = inputs
        self._opaque = opaque
        self.connections = connections
        self.mode = training
        self._originals = {
            id(module): path
            for path, module in original.named_modules()
            if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
        }
        self.outside: str | None = None
        self._written_there: list[fx.Node] = []
        self._plain: list[tuple[Any, Any, Any, Any]] = []
        self._names: dict[int, list[str]] = {}
        self._inner: dict[str, dict[int, nn.Module]] = {}  # path -> what may keep something in Python: it and all below
        for path, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(path)
            if not is_layer(module):
                for around in (path, *above(path)):
                    self._inner.setdefault(around, {})[id(module)] = module
        self._observing: str | None = None
        self._changing: dict[str, tuple[nn.Module, list[str], Any, Any]] = {}
        self._beside = dict(_beside(self.modules.values()))
        self.calls: list[Call] = []
        self.kept_whole: dict[str, str] = {}
        self.observed: dict[str, Observed] = {}

    def record(self) -> Recording:
        """The recording; a recorder makes one."""
        model, modules = self.model, self.modules
        with ONE_AT_A_TIME, watched_globals(modules.values(), self.unwritten.setdefault):
            swap, with_gradients = swap_for(self, modules.values(), self.call_function), torch.is_grad_enabled()
            try:
                swap.put()
                for module in modules.values():
                    module.__dict__.pop("training", None)
                before = self._python_state(model)
                try:
                    graph = self.trace(model)
                finally:
                    for module in modules.values():
                        module.__dict__["training"] = False
                self._tell_written()
                self._put_plain_back()
                self._plain.clear()
                self._watch("", model, before, self._inputs.args, self._inputs.kwargs)
                for path, why in self.refused:
                    self.unwritten.setdefault(path, f"it goes on after an error that only its recording raises: {why}")
                stored = _stored(modules)
                stores = self._stores(stored)
                self._tell_changes(stored)
            finally:
                swap.put_back()
                torch._C._set_grad_enabled(with_gradients)  # a forward may have failed half-way
                if self.outside is not None:
                    raise InputError(
                        f"A forward in {type(model).__name__} calls {self.outside or 'the model'} otherwise than as a "
                        "part of itself (by a closure, a global name or a registry), and in a copy of the model it "
                        f"would go on using that very module. {REWRITE}"
                    )
        return Recording(
            graph,
            tuple(self.calls),
            self._modes_asked(),
            self.kept_whole,
            {**stored, **self.unwritten},
            stores,
            self.observed,
            tuple(dict.fromkeys(self.settled)),
            model,
            modules,
            asked={path: tuple(dict.fromkeys(asked)) for path, asked in self.asked.items()},
            by_dtype=frozenset(self.by_dtype),
            without_gradient=self._always_without_gradient(),
        )

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for what the example gives; defaults stay defaults and are checked at run time."""
        given, by_name = list(self._inputs.args), dict(self._inputs.kwargs)
        args: list[Any] = []
        named: dict[str, Any] = {}
        for parameter in inspect.signature(self.root.forward).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            default = () if parameter.default is parameter.empty else (parameter.default,)
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += [self._placeholder(f"{parameter.name}_{i}", (), value) for i, value in enumerate(given)]
                given = []
            elif parameter.name in by_name:
                named[parameter.name] = self._placeholder(parameter.name, default, by_name.pop(parameter.name))
            elif parameter.kind is parameter.KEYWORD_ONLY or not given:
                if parameter.default is parameter.empty:
                    raise TypeError(f"the example gives no value for the argument {parameter.name!r}")
                proxy = self._placeholder(parameter.name, (parameter.default,), parameter.default)
                self.create_proxy("call_function", check_default, (proxy, parameter.default, parameter.name), {})
                if parameter.kind is parameter.KEYWORD_ONLY or named:
                    named[parameter.name] = parameter.default
                else:
                    args.append(parameter.default)
            else:
                args.append(self._placeholder(parameter.name, default, given.pop(0)))
        self._stand_ins()
        if given or by_name:
            raise TypeError(f"the example has {len(given) + len(by_name)} more inputs than the model's forward takes")
        forward = self.root.forward
        return (lambda root, *values: forward(*values, **named)), [self.root, *args]

    # -- plain tensors ----------------------------------------------------------------------------

    def _stand_ins(self) -> None:
        """Puts proxies where modules keep plain tensors, be it in lists, dictionaries or tuples."""
        for path, module in self.modules.items():
            if is_layer(module):
                continue
            for name, value in list(module.__dict__.items()):
                if name not in BOOKKEEPING and type(value) in _KEEPERS:
                    read = functools.partial(self._read, "get_attr", joined(path, name), ())
                    self._stand_in(module.__dict__, name, value, functools.cache(functools.partial(read, value)))

    def _read(self, kind: str, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        node = self.create_node(kind, target, args, {})
        node.meta[VALUE] = value
        return node

    def _stand_in(self, holder: Any, key: Any, value: Any, read: Callable[[], fx.Node], depth: int = 3) -> None:
        if type(value) is torch.Tensor:
            self._put(holder, key, value, ValueProxy(read(), self))
        elif depth and type(value) in (list, dict, collections.OrderedDict):
            for inner, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if type(item) in _KEEPERS:
                    self._stand_in(value, inner, item, self._item(read, inner, item), depth - 1)
        elif type(value) is tuple and any(type(item) is torch.Tensor for item in value):
            proxies = (
                ValueProxy(self._item(read, i, item)(), self) if type(item) is torch.Tensor else item
                for i, item in enumerate(value)
            )
            self._put(holder, key, value, tuple(proxies))

    def _put(self, holder: Any, key: Any, value: Any, stand_in: Any) -> None:
        self._plain.append((holder, key, value, stand_in))
        holder[key] = stand_in

    def _item(self, read: Callable[[], fx.Node], key: Any, value: Any) -> Callable[[], fx.Node]:
        return functools.cache(lambda: self._read("call_function", operator.getitem, (read(), key), value))

    @contextlib.contextmanager
    def _with_plain(self) -> Iterator[None]:
        """Inside it plain tensors are themselves: the user's own code runs."""
        put = self._put_plain_back()
        try:
            yield
        finally:
            for holder, key, proxy in put:
                holder[key] = proxy

    def _put_plain_back(self) -> list[tuple[Any, Any, Any]]:
        """Plain tensors stand again where they stood; (holder, key, proxy) of those that stood in for them till now."""
        put = [row for row in self._plain if _at(row[0], row[1]) is row[3]]
        for holder, key, value, _ in put:
            holder[key] = value
        return [(holder, key, proxy) for holder, key, _, proxy in put]

    def _python_state(self, module: nn.Module) -> State:
        """What ``module`` keeps in Python, and what stands beside its forward."""
        return {**python_state(module), **beside_state(self._beside.get(id(module), ()))}

    def _watch(self, path: str, module: nn.Module, before: State, args: Any, kwargs: Any) -> None:
        """Remembers a module whose forward has changed what it keeps in Python."""
        names = changed(before, self._python_state(module))
        if names:
            self._changing[path] = module, names, values_of(args), values_of(kwargs)

    def _stores(self, stored: Iterable[str]) -> dict[str, dict[str, fx.Node]]:
        """The modules that store tensors as attributes, for whoever looks at them, and leave nothing else behind."""
        found: dict[str, dict[str, fx.Node]] = {}
        for path in stored:
            own = self.modules[path].__dict__
            names = self._changing[path][1] if path in self._changing else []
            # A graph reads buffers where they stand, so that it may go by what the last call left in them.
            buffers = {name: one for name, one in self.modules[path]._buffers.items() if holds_proxy(one)}
            given = {name: own.get(name) for name in names} | buffers
            tensors = {name: one.node for name, one in given.items() if type(one) is ValueProxy and _is_tensor(one)}
            once = not path or sum(call.path == path for call in self.calls) == 1
            nothing_else = once and path not in self.unwritten and tensors.keys() == given.keys()
            if given and nothing_else and not (names and self._goes_by(path, set(names))):
                found[path] = tensors
        return found

    def _goes_by(self, path: str, names: Set[str]) -> bool:
        """Whether a forward asks for an attribute before it has set it: it goes by what the last call left there."""
        module, _, args, kwargs = self._changing[path]
        spoken = named(module, original_class(module))
        if names.isdisjoint(spoken.attributes | spoken.strings):
            return False
        kept = Kept(self._inner[path].values())
        for inner in self._inner[path].values():
            inner.__dict__["training"] = self.mode
        for name in names:
            module.__dict__.pop(name, None)
        self.asked_for.clear()
        try:
            with self.run(), torch.no_grad():
                module.forward(*args, **kwargs)
        except Exception:  # any forward may raise anything; what cannot be run again counts as one that asks
            return True
        finally:
            kept.put_back()
        return not names.isdisjoint(self.asked_for) or any(hasattr(type(module), name) for name in names)

    def _tell_changes(self, stored: dict[str, str]) -> None:
        """Says which modules change at every call: what was computed once and kept is the same ever after."""
        for path, (module, names, args, kwargs) in self._changing.items():
            if path in stored:
                others = [name for name in names if not holds_proxy(module.__dict__.get(name))]
                if others:  # tensors that it stores may stay, where there is nothing else
                    self.unwritten.setdefault(path, f"its forward changes {_place_of(others[0])}")
                continue
            before = self._python_state(module)
            if not any(within(inner, path) for inner in stored):
                # A forward that cannot be run again, for whatever reason, counts as one that changes.
                with self.run(), torch.no_grad(), contextlib.suppress(Exception):
                    module.forward(*args, **kwargs)
                    names = changed(before, self._python_state(module))
                    if not names:
                        continue
            self.unwritten.setdefault(path, f"its forward changes {_place_of(names[0])}")

    def on_wire(self, function: Callable[..., Any], dca: nn.Module, number: int, *values: Any) -> Any:
        """What a connected module's code does at an end of the wire, as a node: its connections are kept."""
        node = self.create_node("get_attr", joined(self.owner, getattr(dca, "held_as", "dca")), (), {})
        node.meta[VALUE] = dca
        return self.create_proxy("call_function", function, (ValueProxy(node, self), number, *values), {})

    # -- modules --------------------------------------------------------------------------------

    def _modes_asked(self) -> dict[str, frozenset[str]]:
        """Module -> those whose modes its forward decides by, seen from it; only its own parts can be in a graph."""
        asked: dict[str, set[str]] = {}
        for owner, path in self.mode_read:
            if not within(path, owner):
                self.unwritten.setdefault(owner, f"its forward decides by the mode of {path or 'the model'}")
            asked.setdefault(owner, set()).add(below(path, owner))
        return {owner: frozenset(paths) for owner, paths in asked.items()}

    def _always_without_gradient(self) -> frozenset[fx.Node]:
        """But for those where a forward goes by a mode: it may well be in evaluation that it needs none."""
        by_mode = {owner for owner, _ in self.mode_read}
        return frozenset(node for node, owner in self.without_gradient.items() if owner not in by_mode)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self._paths.get(id(m))
        if self.running:
            if self._observing is not None and path is not None and path.startswith(self._observing):
                self.observed.setdefault(path, Observed(*mapped((args, kwargs), lambda own: own)))
            return forward(*args, **kwargs)
        if path is None and id(m) in self._originals:
            self.outside = self._originals[id(m)]
            raise self.refusal(f"its forward calls {self.outside} of the model that was copied")
        if path is None:  # made on the fly (a slice of a Sequential): its children have paths, it has none
            return forward(*args, **kwargs)
        connection = getattr(m, "is_connection", False)
        if is_layer(m) or path in self._opaque or (connection and self.connections == "called"):
            return self._leaf(path, m, args, kwargs)
        return self._enter(path, m, forward, args, kwargs)

    def _leaf(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> ValueProxy:
        node = self.create_node("call_module", path, self.create_arg(args), self.create_arg(kwargs))
        node.meta[PLACE] = self._place(module)
        with self.evaluating(node):
            node.meta[VALUE], given = self._yields(path, module, values_of(args), values_of(kwargs))
        return self._called(node, args, kwargs, given, module)

    def _called(self, node: fx.Node, args: Any, kwargs: Any, given: Any, module: nn.Module) -> ValueProxy:
        """What a leaf returns; what it wrote into lists and dictionaries of the caller's stands in them.

        No graph has that: a node has a list of its own, which nobody reads afterwards.
        """
        own = args, kwargs

        def stands_there(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                self.unwritten.setdefault(self.owner, f"its forward has {node.target} change a list or dictionary")
                return value
            item = self.create_node("call_function", _written_there, (node,), {})
            item.meta[VALUE] = value
            self._written_there.append(item)
            return ValueProxy(item, self)

        written = list(writes(values_of(own), given, own))
        for container, key, _ in reversed([row for row in written if row[2] is GONE]):
            del container[key]
        for container, key, value in written:
            if value is GONE:
                continue
            if isinstance(container, list):
                container[key : key + 1] = [mapped(value, stands_there)]
            else:
                container[key] = mapped(value, stands_there)
        return self._result(node, args, bool(getattr(module, "inplace", False)))

    def _tell_written(self) -> None:
        """Says who reads what a leaf wrote into a list; what nobody reads is no node."""
        unread = {item for item in self._written_there if not item.users}
        for item in self._written_there:
            for node in (*item.users, item) if item.users else ():
                what = f"its forward reads what {item.args[0].target} wrote into a list or dictionary"  # type: ignore[union-attr]
                self.unwritten.setdefault(node.meta[OWNER], what)
        for call in self.calls if unread else ():
            call.nodes = [node for node in call.nodes if node not in unread]
        for item in unread:
            self.graph.erase_node(item)

    def _yields(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The value of what a leaf returns, and what it was given, as it left it."""
        whole = path in self._opaque or path in self.kept_whole
        evaluate = self.evaluator.anew if whole else self.evaluator.module  # each one is looked into
        given = mapped((args, kwargs), lambda own: own) if whole else (args, kwargs)  # it may write into lists
        outer, self._observing = self._observing, f"{path}." if whole else self._observing
        try:
            with self._with_plain() if whole else contextlib.nullcontext():
                return evaluate(module, *given), given
        except Exception as error:  # it may fail on meta tensors in any way, and need values
            if not self.knows_data(*given) or sum(map(_has_weight, module.modules())) > _MOST_LAYERS:
                raise
            return self._yields_on_data(path, args, kwargs, error)
        finally:
            self._observing = outer

    def _yields_on_data(self, path: str, args: Any, kwargs: Any, error: Exception) -> tuple[Any, Any]:
        """As ``_yields``, whatever the data; raises what it raises, or where that differs."""

        def run(*given: Any) -> tuple[Any, Any]:
            before = list(leaves(given))
            known = {id(leaf): value for leaf, value in zip(before, leaves((args, kwargs)), strict=True)}
            output = running_copy(self.original.get_submodule(path))(*given[0], **given[1])
            return output, mapped(given, lambda leaf: known[id(leaf)] if id(leaf) in known else without_data(leaf))

        (output, given), again = (self.with_data(run, args, kwargs, seed) for seed in (0, 1))
        results = output, again[0]
        described = [[_layout(leaf) for leaf in leaves(result)] for result in results]
        if described[0] != described[1] or None in described[0]:
            raise self.refusal("its forward goes by the content of a tensor") from error
        return without_data(output), given

    def _enter(self, path: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = Call(path, self.create_arg(args), self.create_arg(kwargs))
        before = _last(self.graph)
        outer = self.owner, self.place
        self.owner, self.place = path, self._place(module)
        state, own = self._state(args, kwargs), self._python_state(module)
        kept = Kept(self._inner[path].values(), (*args, *kwargs.values()))
        self.calls.append(call)
        try:
            output = self._leave(forward(*args, **kwargs), before)
            call.output, call.record = self.create_arg(as_plain(output)), is_record(type(output))
        except Exception as error:  # any forward may raise anything; what cannot be entered is kept whole
            self.owner, self.place = outer
            left = kept.now()
            kept.put_back()  # a detector's head writes into the list that it is given
            self.kept_whole[path] = reason_of(error)
            try:
                with self.run():
                    value, given = self._yields(path, module, values_of(args), values_of(kwargs))
            except Exception:  # it is the user's own error, who may catch it: what was done so far is done
                del self.kept_whole[path]
                self.calls.remove(call)
                left.put_back()
                raise error from None
            self._take_back(before, state)
            return self._kept_whole(path, module, args, kwargs, value, given)
        finally:
            self.owner, self.place = outer
        self._watch(path, module, own, call.args, call.kwargs)
        call.nodes = list(_after(before, self.graph))
        return output

    def _kept_whole(self, path: str, module: nn.Module, args: Any, kwargs: Any, value: Any, given: Any) -> ValueProxy:
        node = self.create_node("call_module", path, self.create_arg(args), self.create_arg(kwargs))
        node.meta.update({PLACE: self._place(module), VALUE: value})
        return self._called(node, args, kwargs, given, module)

    def _place(self, module: nn.Module) -> str:
        """The path of ``module`` that is nearest to where it is called: one activation may serve all blocks."""
        names = self._names[id(module)]
        here = self.place.split(".")

        def apart(name: str) -> tuple[int, int]:
            parts = name.split(".")
            same = next((i for i, (a, b) in enumerate(zip(here, parts, strict=False)) if a != b), None)
            return -(min(len(here), len(parts)) if same is None else same), len(parts)

        return names[0] if len(names) == 1 else min(names, key=apart)

    def _leave(self, output: Any, before: fx.Node) -> Any:
        """``output`` with what came from outside the call marked, so that the call has nodes of its own."""
        inside = set(_after(before, self.graph))

        def mark(value: Any) -> Any:
            if type(value) is not ValueProxy or value.node in inside:
                return value
            return self.create_proxy("call_function", passed_through, (value,), {})

        return mapped(output, mark)

    def _state(self, args: Any, kwargs: Any) -> _State:
        """Where the recording stands before something is called with these arguments."""
        plain = (proxy for *_, proxy in self._plain)
        given = [(value, value.node) for value in (*args, *kwargs.values(), *plain) if type(value) is ValueProxy]
        return _State(
            len(self.calls), len(self.settled), len(self.refused), set(self.mode_read), dict(self._attributes), given
        )

    def _take_back(self, before: fx.Node, state: _State) -> None:
        for node in reversed(list(_after(before, self.graph))):
            self.graph.erase_node(node)
        self.mode_read, self._attributes = state.mode_read, state.attributes
        del self.calls[state.calls :], self.settled[state.settled :], self.refused[state.refused :]
        for proxy, node in state.given:  # which may have come to stand for what was altered in place
            proxy.node = node

    # -- functions that are told the mode ---------------------------------------------------------

    def call_function(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``function`` returns; one that takes another path in training is a node of its own.

        ``drop_path(x, 0.1, self.training)`` would otherwise make the module around it one that cannot be entered,
        with the attention in it. The same goes for a function that works on tensors and not on proxies (einops).
        """
        given = (*args, *kwargs.values())
        if self.running or not _TRACED.intersection(_kinds(given)) or any(isinstance(v, nn.Module) for v in given):
            return function(*args, **kwargs)
        if type(function) is Scripted:
            return self.create_proxy("call_function", function, args, kwargs)
        before, state, kept = _last(self.graph), self._state(args, kwargs), Kept((), given)
        try:
            result = function(*args, **kwargs)
        except Exception:  # any function may raise anything; the error is the caller's where values raise one, too
            if not self._holds_functions_only(before, state):
                raise
            self._take_back(before, state)
            kept.put_back()
            with contextlib.suppress(Exception):  # on values it fails as well: what it raised first is told
                return self.create_proxy("call_function", function, args, kwargs)
            self._take_back(before, state)
            raise
        if self.mode_read == state.mode_read or len(self.calls) > state.calls:
            return result
        self._take_back(before, state)
        kept.put_back()
        return self.create_proxy("call_function", function, args, kwargs)

    def _holds_functions_only(self, before: fx.Node, state: _State) -> bool:
        """Whether what was recorded since used no module: a function that is called anew has the copy's in it."""
        modules_used = any(node.op in ("call_module", "get_attr") for node in _after(before, self.graph))
        return len(self.calls) == state.calls and not modules_used


def _beside(modules: Iterable[nn.Module]) -> Iterator[tuple[int, tuple[Beside, ...]]]:
    """Identity of a module -> what its forward speaks of beside it."""
    known: dict[type, tuple[Beside, ...]] = {}
    for module in modules:
        if not is_layer(module):
            kind = type(module)
            if "forward" in module.__dict__:
                yield id(module), tuple(named(module, original_class(module)).beside.values())
                continue
            if kind not in known:
                known[kind] = tuple(named(module, original_class(module)).beside.values())
            yield id(module), known[kind]


def _place_of(name: str) -> str:
    """An attribute of a module, or what is beside it, as a state has it."""
    return f"the {name}" if " " in name else f"self.{name}"


def _is_tensor(proxy: ValueProxy) -> bool:
    return isinstance(proxy.value, torch.Tensor)


def _written_there(returned: Any) -> Any:
    """Stands for what a leaf wrote into a list that it was given; a graph that has it is none."""
    raise AssertionError("what a module writes into a list is not in its graph")


def _at(holder: Any, key: Any) -> Any:
    """What a list or dictionary has there, if anything."""
    return holder.get(key) if isinstance(holder, dict) else holder[key] if key < len(holder) else None


_KEEPERS = (torch.Tensor, list, tuple, dict, collections.OrderedDict)
"""What may be, or hold, a plain tensor of a module."""

_MOST_LAYERS = 16
"""How many layers with weights a module has at most that is run on data."""


def _has_weight(module: nn.Module) -> bool:
    """Whether a module has parameters of its own."""
    return any(parameter is not None for parameter in module._parameters.values())


def _layout(leaf: Any) -> tuple[Any, ...] | None:
    """What is the same whatever the data; ``None`` for a number, which may be computed from it, and what is empty."""
    if isinstance(leaf, torch.Tensor) and leaf.numel():
        return leaf.shape, leaf.stride(), leaf.dtype
    return () if leaf is None else None


_TRACED = frozenset({Mode, ValueProxy})


def _kinds(values: tuple[Any, ...]) -> Iterator[type]:
    """The types of arguments, and of the items of lists among them."""
    for value in values:
        yield type(value)
        if type(value) in (tuple, list):
            yield from map(type, value)


def _stored(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Modules on which a forward stored what it computed: a side effect that no graph has."""
    found: dict[str, str] = {}
    for path, module in modules.items():
        own = (item for item in (*module._buffers.items(), *module.__dict__.items()) if not is_nothing(item[1]))
        stored = [name for name, value in own if holds_proxy(value)]
        if stored:
            found[path] = f"its forward stores what it computes in self.{stored[0]}"
    return found


def _last(graph: fx.Graph) -> fx.Node:
    return graph._root.prev


def _after(node: fx.Node, graph: fx.Graph) -> Iterator[fx.Node]:
    current = node.next
    while current is not graph._root:
        yield current
        current = current.next
