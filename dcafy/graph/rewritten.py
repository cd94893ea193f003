"""A module whose forward is a graph, and whose class is still the user's: a generated subclass of it.

::

    class SEBlock(nn.Module): ...        ─▶        class SEBlock(SEBlock):  # made here, set by ``__class__``
        def forward(self, x): ...                      def forward(self, *args, **kwargs):
                                                           if usual: the graph's code
                                                           else:     the user's own forward

A ``GraphModule`` made of the module would be of another class, and would lose what is not in the graph. Here the very
object stays, with its hooks, attributes and submodules; copies and pickles are made in the user's own way and given
the generated class again. Modules of one class and code share one generated class.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import itertools
import linecache
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from dcafy.errors import InputError
from dcafy.graph.nodes import leaves
from dcafy.graph.reading import found_again
from dcafy.graph.rows import Rows, found, portable
from dcafy.graph.source import source_of
from dcafy.graph.usual import Usual, same
from dcafy.wording import reason_of, warn

_WRITTEN, SAID = "dcafy: written", "dcafy: said"
"""Under which a generated class has what it was made of, and a module what it was warned of: no identifiers, as every
one of those may be the name of something of the user's."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Classes that are never changed: a slice of a ``Sequential`` makes a new one of its class from all its children."""


# --- the generated class ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward:
    """What a generated class is made of, besides the user's own.

    ``rows``     the graph as data; ``None``: the user's own forward
    ``usual``    what the graph was recorded for; ``None``: everything
    ``behind``   what the output goes through, called with the module and the output
    ``around``   the context that the forward runs in, made of the module
    ``mixins``   classes that stand behind the user's
    ``needs``    the submodule without which the user's own forward runs
    ``training`` the graph in training, where it is another one
    ``own``      the user's own forward, where the module had one that is not its class's
    ``below``    what the class was generated from before, if it was: attention was put in, then it was connected
    ``stores``   the graph returns, beside the output, what goes into attributes of the module, by name
    """

    rows: Rows | None = None
    usual: Usual | None = field(default_factory=Usual)
    behind: Callable[[nn.Module, Any], Any] | None = None
    around: Callable[[nn.Module], Any] | None = None
    mixins: tuple[type, ...] = ()
    needs: str = "dca"
    own: Callable[..., Any] | None = None
    training: Rows | None = None
    below: Forward | None = None
    stores: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return self

    def __reduce__(self) -> Any:
        rows, training = (None if one is None else portable(one) for one in (self.rows, self.training))
        rest = self.usual, self.behind, self.around, self.mixins, self.needs, self.own
        return _forward_from, (rows, *rest, training, self.below, self.stores)


def _forward_from(rows: Any, *rest: Any) -> Forward:
    forward = Forward(None if rows is None else found(rows), *rest[:6])
    later: tuple[Any, ...] = rest[6:]
    training, below, stores = later + (None, None, False)[len(later) :]  # what was pickled before lacks them
    return replace(forward, training=None if training is None else found(training), below=below, stores=stores)


def rewrite(module: nn.Module, forward: Forward) -> None:
    """Gives ``module`` the generated class; ``TypeError`` where Python does not let an object change its class."""
    module.__class__ = rewritten_class(original_class(module), forward)


def restore(module: nn.Module) -> None:
    """Gives ``module`` the class back that it had before, and the forward of its own, if it had one."""
    forward = forward_of(module)
    if forward is not None and forward.below is not None:
        rewrite(module, forward.below)
    elif forward is not None:
        module.__class__ = original_class(module)
        if isinstance(forward.own, Filled):
            module.__dict__["forward"] = forward.own.of(module)
        elif forward.own is not None:
            module.__dict__["forward"] = types.MethodType(forward.own, module)


def taken_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that ``module`` has of its own, as a function of it; it has none any more."""
    own = module.__dict__.pop("forward", None)
    if isinstance(own, functools.partial):
        return Filled(own.func, own.args[1:], own.keywords)
    return None if own is None else getattr(own, "__func__", own)


@dataclass(frozen=True, eq=False)
class Filled:
    """A function of a module whose other arguments are given in part, as by ``functools.partial(function, module)``."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.of(module)(*args, **kwargs)

    def of(self, module: nn.Module) -> functools.partial[Any]:
        """The partial function, as the module had it."""
        return functools.partial(self.function, module, *self.args, **self.named)


def _is_method(function: Any, module: nn.Module) -> bool:
    """Whether a copy of ``module`` has a copy of the function that is about itself: a method, or a partial one."""
    if not isinstance(function, functools.partial):
        return getattr(function, "__self__", None) is module
    given = leaves((function.args[1:], function.keywords))
    return function.args[:1] == (module,) and not any(isinstance(one, (nn.Module, Tensor)) for one in given)


def is_rewritten(module: nn.Module) -> bool:
    """Whether the class of ``module`` was generated here."""
    return _WRITTEN in type(module).__dict__


def forward_of(module: nn.Module) -> Forward | None:
    """What the class of ``module`` was generated from, if it was."""
    written = type(module).__dict__.get(_WRITTEN)
    return None if written is None else written[1]


def written_globals(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The global names of the code that was written for ``module``: what its graphs call is found there."""
    forward, kind = forward_of(module), original_class(module)
    while forward is not None:
        scope = rewritten_class(kind, forward).forward.__globals__
        yield from scope["scopes"]
        forward = forward.below


def original_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of ``module``."""
    written = type(module).__dict__.get(_WRITTEN)
    return type(module) if written is None else written[0]


_CLASSES: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


def rewritten_class(kind: type[nn.Module], forward: Forward) -> type[nn.Module]:
    """The one generated subclass of ``kind`` with that forward."""
    known = _CLASSES.get((kind, id(forward)))
    if known is not None:
        return known
    codes = [source_of(rows) for rows in (forward.rows, forward.training) if rows is not None]
    spoken = tuple(tuple(sorted((name, id(value)) for name, value in code.globals.items())) for code in codes)
    below = None if forward.below is None else rewritten_class(kind, forward.below)
    runs = below if forward.below is not None and forward.below.rows is not None else None
    rest = forward.behind, forward.around, forward.mixins, forward.needs, forward.own, below, forward.stores
    key = kind, tuple(code.src for code in codes), spoken, repr(forward.usual), rest
    made = _CLASSES.get(key)
    if made is None:
        space: dict[str, Any] = {
            # To tracers what is of torch is a leaf, and they would not see what is heard and told in it.
            "__module__": __name__ if kind.__module__.startswith("torch.") else kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "__reduce_ex__": _reduce_ex,
            "__setstate__": _set_state,
            "__prepare_scriptable__": _no_script,
            "forward": _forward(runs or kind, forward, codes),
            _WRITTEN: (kind, forward),
        }
        metaclass: Any = type(kind)
        if "__deepcopy__" in dir(kind) and kind.__deepcopy__ is not None:  # type: ignore[attr-defined]
            space["__deepcopy__"] = _deepcopy
        quiet = () if kind.__init_subclass__.__qualname__ == "object.__init_subclass__" else (_Quiet,)
        try:
            made = metaclass(kind.__name__, (*quiet, kind, *forward.mixins), space)
        except Exception as error:  # any metaclass may refuse a class in any way
            raise InputError(
                f"{kind.__name__} cannot be connected: its metaclass {metaclass.__name__} refuses the subclass of the "
                f"same name that dcafy gives it ({reason_of(error)}). Let the metaclass take a class whose base has "
                "the name already, or leave the blocks of this class out with plan.without(...)."
            ) from error
        _CLASSES[key] = _CLASSES[kind, id(forward)] = made  # it keeps this very forward, and so the number is its own
    assert made is not None
    return made


class _Quiet:
    """Stands before a class that keeps a register of its subclasses, each name once."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


_TEMPLATE = """
def forward(self, *args, **kwargs):
    if needs not in self._modules and needs not in self.__dict__:  # made anew, by its class
        return original(self, *args, **kwargs)
{body}
"""

_BODIES = {
    "whole": "    return written(self, *args, **kwargs)",
    "graph": """    if usual.differs(self) is None:
        if usual.fits(args, kwargs):
            return written(self, *args, **kwargs)
        again = other_way(self, usual, original, args, kwargs)
        if again is not None:
            return written(self, *again[0], **again[1])
        say_called(self)
    else:
        say(self, usual)
    return original(self, *args, **kwargs)""",
    "own": "    return original(self, *args, **kwargs)",
    "behind": """    return behind(self, original(self, *args, **kwargs))""",
}
"""What the forward does: a graph whatever it is given, a graph where all is usual, the user's, what lies behind it."""


def _body(forward: Forward) -> str:
    if forward.rows is not None:
        return _BODIES["whole" if forward.usual is None else "graph"]
    return _BODIES["own" if forward.behind is None else "behind"]


_numbers = itertools.count()


def _forward(kind: type[nn.Module], forward: Forward, codes: list[Any]) -> Callable[..., Any]:
    """The forward of a generated class.

    Its source is one of the fixed texts above and no name of the user's is in it. It is compiled anew for each class:
    ``torch.compile`` counts what it compiled by code object.
    """
    original = forward.own or kind.forward
    body = _body(forward)
    if forward.around is not None:
        inner = "\n".join(f"    {line}" for line in body.splitlines())
        body = f"    with around(self):\n{inner}"
    scope: dict[str, Any] = {
        "original": original,
        "usual": forward.usual,
        "behind": forward.behind,
        "around": forward.around,
        "needs": forward.needs,
        "other_way": _other_way,
        "say": _say,
        "say_called": _say_called,
    }
    written = [_compiled(code.src, "forward", dict(code.globals)) for code in codes]
    if written:
        one = written[0] if len(written) == 1 else _by_mode(*written)
        scope["written"] = _storing(one) if forward.stores else one
    scope["scopes"] = tuple(one.__globals__ for one in written)
    made = _compiled(_TEMPLATE.format(body=body), "forward", scope)
    return functools.update_wrapper(made, original)


def _by_mode(evaluating: Callable[..., Any], training: Callable[..., Any]) -> Callable[..., Any]:
    def written(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (training if self.training else evaluating)(self, *args, **kwargs)

    return written


def _storing(written: Callable[..., Any]) -> Callable[..., Any]:
    """``written``, and what it says goes into attributes, as in the user's own forward."""

    def stored(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, values = written(self, *args, **kwargs)
        for name, value in values.items():
            setattr(self, name, value)
        return output

    return stored


def _compiled(source: str, name: str, scope: dict[str, Any]) -> Callable[..., Any]:
    file = str(Path(__file__).with_name(f"<written {next(_numbers)}>"))  # of the package, as warnings look at it
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    exec(compile(source, file, "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function


def _other_way(
    module: nn.Module, usual: Usual, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A call that says the same in other words (by keyword, with a default written out), as the recorded one was."""
    signature = inspect.signature(original)
    kinds = {p.kind for p in signature.parameters.values()}
    if usual.arguments is None or kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    try:
        given = signature.bind(module, *args, **kwargs)
    except TypeError:  # the user's own forward says what is wrong with it
        return None
    given.apply_defaults()
    values = dict(itertools.islice(given.arguments.items(), 1, None))
    named = dict(usual.named)
    again_named = {name: values.pop(name) for name in named if name in values}
    again = tuple(values.values())[: len(usual.arguments)]
    rest = list(values)[len(usual.arguments) :]
    defaults = all(same(values[name], signature.parameters[name].default) for name in rest)
    return (again, again_named) if defaults and usual.fits(again, again_named) else None


def _say(module: nn.Module, usual: Usual) -> None:
    name = str(usual.differs(module))
    part, inside = name.removesuffix(".training"), usual.place(module, name)
    kind = type(module).__name__
    if part != name and part in usual.modes:
        what = f"{kind}.{part} is in another mode than what it is a part of, which decides by both"
    elif any(name == one.title for one, _ in usual.beside):
        what = f"The {name}{inside}, by which {kind} goes, is no longer what it was when the model was converted"
    elif name.startswith("torch."):
        what = f"{name}, by which {kind} goes, is no longer what it was when the model was converted"
    else:
        what = f"{kind}.{name}{inside} is no longer what it was when the model was converted"
    _once(
        module,
        name,
        f"{what}, so that its own forward runs and its attention block is not connected. Set it back, or take "
        "dcafy.revert(model) and convert that anew.",
    )


def _say_called(module: nn.Module) -> None:
    _once(
        module,
        "",
        f"{type(module).__name__} is given other arguments than when the model was converted, so that its own forward "
        "runs and its attention block is not connected. Convert it with example_inputs with which it is called so.",
    )


def _once(module: nn.Module, about: str | None, message: str) -> None:
    said = module.__dict__.setdefault(SAID, set())
    if about not in said:
        said.add(about)
        warn(message)


def _no_script(self: nn.Module) -> NoReturn:
    raise InputError(
        f"{type(self).__name__} runs code that dcafy wrote, which TorchScript cannot compile. Script the plain graph "
        "of the whole model: torch.jit.script(dcafy.flat(model))."
    )


# --- copies and pickles -------------------------------------------------------------------------------------


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    kind, forward = getattr(type(self), _WRITTEN)
    reduced = kind.__reduce_ex__(self, protocol)
    if not isinstance(reduced, tuple):
        return reduced
    make, args, *rest = reduced
    if any(getattr(kind, way) is not getattr(nn.Module, way, None) for way in _WAYS):
        rest[:1] = [_Beside(tuple(rest[:1]), *_held(self, forward))]
    make, *args = (kind if one is type(self) else one for one in (make, *args))
    return (_remade, (kind, forward, make, tuple(args)), *rest)


_WAYS = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
"""In which a class may leave out of its copies and pickles what is not its own (einops: all but a pattern)."""


@dataclass(frozen=True)
class _Beside:
    """The state as the user's class has it, if it has one, and beside it what was put into the module."""

    own: tuple[Any, ...]
    modules: dict[str, Any]
    attributes: dict[str, Any]


def _set_state(self: nn.Module, state: Any) -> None:
    kind, forward = getattr(type(self), _WRITTEN)
    beside = state if isinstance(state, _Beside) else _Beside((state,), {}, {})
    for one in beside.own:
        if one is not None:
            kind.__setstate__(self, one)
    if forward.usual is not None:
        again = found_again(forward.usual.beside, self, kind, forward.own)
        if again is not forward.usual.beside:  # what code encloses is in no pickle
            rewrite(self, replace(forward, usual=replace(forward.usual, beside=again)))
    held = {name for names in _held(self, forward) for name in names}
    for there, names in ((self._modules, beside.modules), (self.__dict__, beside.attributes)):
        there.update((name, module) for name, module in names.items() if name not in held)


def _held(module: nn.Module, forward: Forward) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was put into a module: as submodules, and beside them."""
    places: tuple[dict[str, Any], dict[str, Any]] = module._modules, module.__dict__
    of_module, of_object = ({name: at[name] for name in _needs(forward) if name in at} for at in places)
    return of_module, of_object


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The user's own copy of the module without what was put into it, which is copied as well."""
    kind, forward = getattr(type(self), _WRITTEN)
    plain, needs = object.__new__(kind), set(_needs(forward))
    own = {name: value for name, value in self.__dict__.items() if name not in needs}
    own["_modules"] = {name: module for name, module in self._modules.items() if name not in needs}
    object.__setattr__(plain, "__dict__", own)
    twin: nn.Module = kind.__deepcopy__(plain, memo)
    memo[id(self)] = twin
    for held, of_twin in ((self._modules, twin._modules), (self.__dict__, twin.__dict__)):
        # The twin may be made, and not filled yet.
        of_twin.update((name, copy.deepcopy(value, memo)) for name, value in held.items() if name in needs)
    twin.__class__ = type(self)
    return twin


def _needs(forward: Forward | None) -> Iterator[str]:
    """What a module has of ours, without which the user's own forward runs."""
    while forward is not None:
        yield forward.needs
        forward = forward.below


def hold(module: nn.Module, name: str, held: nn.Module) -> None:
    """Puts ``held`` under ``name`` of ``module``: as a submodule where it has any of its own, else beside them.

    ``nn.Sequential(*module.children())`` has no use for what holds nothing.
    """
    if next(held.children(), None) is None and next(held.parameters(), None) is None:
        module.__dict__[name] = held
    else:
        module._modules[name] = held


def _remade(kind: type[nn.Module], forward: Forward, make: Callable[..., Any], args: tuple[Any, ...]) -> nn.Module:
    module: nn.Module = make(*args)
    module.__class__ = rewritten_class(kind, forward)
    return module


# --- what cannot be rewritten -------------------------------------------------------------------------------


def refusal(module: nn.Module) -> str | None:
    """Why no subclass can take the place of the class of ``module``, if there is a reason."""
    kind = original_class(module)
    own_names = (module.__dict__, module._modules, module._parameters, module._buffers)
    if not is_rewritten(module) and any("dca" in names for names in own_names):
        return f"{kind.__name__} has a 'dca' of its own"
    own = module.__dict__.get("forward")
    if own is not None and not _is_method(own, module):
        return f"the forward of {kind.__name__} was replaced by what is no method of it"
    if isinstance(module, CONTAINERS):
        return f"{kind.__name__} is a container, whose class stays as it is"
    for name, function in _methods(kind):
        if _asks_super_of_its_type(function):
            return (
                f"{kind.__name__}.{name} calls super(type(self), self), which finds itself again in any subclass; "
                "write super() there"
            )
    return None


def taken_of_graphs(module: nn.Module) -> str | None:
    """A name that ``module`` has of its own, and a ``GraphModule`` has for something else."""
    kind = original_class(module)
    if issubclass(kind, fx.GraphModule):
        return None
    own = {*module.__dict__, *module._modules, *module._parameters, *module._buffers}
    return next((name for name in sorted(_OF_GRAPHS) if name in own or hasattr(kind, name)), None)


_OF_GRAPHS = frozenset(
    name
    for name in {*dir(fx.GraphModule), "meta", "_graph", "_code"} - {*dir(nn.Module)}
    if not name.endswith("__")  # of copying and pickling, in which a user's class may have ways of its own
)


def _methods(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.nn.", "builtins")):
            continue
        for name, value in vars(base).items():
            value = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(value, types.FunctionType):
                yield name, value


@functools.lru_cache(maxsize=4096)
def _asks_super_of_its_type(function: types.FunctionType) -> bool:
    """Whether the code has ``super(type(self), ...)`` or ``super(self.__class__, ...)``."""
    code = function.__code__
    if "super" not in code.co_names or not ({"type", "__class__"} & set(code.co_names)):
        return False
    after: list[Any] | None = None
    for step in dis.get_instructions(code):
        if step.argval == "super":
            after = []
        elif after is not None:
            after.append(step.argval)
            if step.argval in ("type", "__class__") and len(after) <= 4:
                return True
    return False
