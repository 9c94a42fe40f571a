"""``patch``: replaces a host's scoring functions wherever the host has bound them, and puts them back."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import Any, cast

from latemax.compat._inputs import check_padding
from latemax.compat._targets import HOSTS, Target

_lock = threading.RLock()
_active: dict[str, Patch] = {}


class Patch:
    """A patched host: ``undo()`` puts its own functions back, as does leaving a ``with`` block.

    Attributes:
        host: its import name.
        version: the installed version.
        padding: "exact" or "host".
        replaced: what was replaced, as "module.function".
    """

    def __init__(self, host: str, version: str, padding: str, swap: dict[str, tuple[FunctionType, FunctionType]]):
        self.host, self.version, self.padding = host, version, padding
        self.replaced = tuple(swap)
        self._swap = swap

    def undo(self) -> None:
        """Puts the host's functions back wherever the replacements are bound now. A second call does nothing."""
        with _lock:
            if _active.get(self.host) is self:
                del _active[self.host]
                _rebind(self.host, {id(new): old for old, new in self._swap.values()})

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "active" if _active.get(self.host) is self else "undone"
        return f"<Patch of {self.host} {self.version}, padding={self.padding!r}, {state}>"


def patch(host: str, *, padding: str = "exact") -> Patch:
    """Makes a host library score with latemax, until the handle's ``undo()``.

    Replaced are the host's functions in its loaded modules and classes, in modules loaded later, and as defaults of
    its functions' parameters. An object that stored a function before (a loss, a model's ``similarity``) keeps it:
    patch first.

    Args:
        host: the import name: "colpali_engine", "transformers", "sentence_transformers", "pylate", "mteb",
            "qdrant_client" or "vllm".
        padding: "exact": zero padding never has the maximum, float32 scores. "host": the host's rule and dtype.

    Returns:
        The handle, also a context manager. Patching a patched host returns its handle.

    Raises:
        ValueError: an unknown host or padding.
        ImportError: the host is not installed.
        RuntimeError: the installed version lacks a function or gives it other parameters; the host is patched with
            another ``padding``.

    Example:
        >>> with latemax.compat.patch("pylate"):
        ...     trainer.train()
    """
    check_padding(padding)
    if host not in HOSTS:
        raise ValueError(f"host must be one of {', '.join(HOSTS)}; got {host!r}")
    with _lock:
        if host in _active:
            if _active[host].padding != padding:
                raise RuntimeError(f"{host} is patched with padding={_active[host].padding!r}: undo that first")
            return _active[host]
        if importlib.util.find_spec(host) is None:
            raise ImportError(f"{host} cannot be patched: {HOSTS[host].distribution} is not installed", name=host)
        version = _version(host)
        ours = importlib.import_module(f"latemax.compat.{host}")
        swap = {}
        for target in HOSTS[host].targets:
            old = _find(host, version, target)
            _check_parameters(host, version, target, old, getattr(ours, target.ours))
            new = _replacement(old, getattr(ours, target.ours), target, padding)
            swap[f"{target.module}.{target.name}"] = (old, new)
        _rebind(host, {id(old): new for old, new in swap.values()})
        _active[host] = Patch(host, version, padding, swap)
        return _active[host]


def _version(host: str) -> str:
    try:
        return importlib.metadata.version(HOSTS[host].distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _find(host: str, version: str, target: Target) -> FunctionType:
    try:
        found: Any = importlib.import_module(target.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != host:
            raise  # a dependency of the host
        raise RuntimeError(f"{host} {version} has no module {target.module}") from error
    for name in target.name.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, FunctionType):
        raise RuntimeError(f"{host} {version} has no function {target.module}.{target.name}")
    return found


def _check_parameters(host: str, version: str, target: Target, old: FunctionType, ours: Callable[..., Any]) -> None:
    theirs = list(inspect.signature(old).parameters.values())[target.method :]
    wanted = [p for p in inspect.signature(ours).parameters.values() if p.name not in ("padding", *target.attributes)]
    if [(p.name, p.kind, p.default) for p in theirs] != [(p.name, p.kind, p.default) for p in wanted]:
        raise RuntimeError(
            f"{target.module}.{target.name} of {host} {version} takes ({', '.join(p.name for p in theirs)}); "
            f"latemax knows it with ({', '.join(p.name for p in wanted)})"
        )


def _replacement(old: FunctionType, ours: Callable[..., Any], target: Target, padding: str) -> FunctionType:
    """``ours`` under the name of ``old``, so that pickle and documentation find it where the host has it."""
    if target.method:

        @functools.wraps(old)
        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs.update((name, getattr(self, name)) for name in target.attributes)
            return ours(*args, padding=padding, **kwargs)
    else:

        @functools.wraps(old)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, padding=padding, **kwargs)

    return cast(FunctionType, replacement)


def _rebind(host: str, swap: dict[int, FunctionType]) -> None:
    """Puts ``swap[id(f)]`` where a loaded module of the host holds f: its names, classes and parameters' defaults."""
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        if module is not None and name.split(".")[0] == host:
            # vars: a lazy module must not load its contents now
            _rebind_names(host, module, swap, seen)


def _rebind_names(host: str, holder: Any, swap: dict[int, FunctionType], seen: set[int]) -> None:
    for key, value in list(vars(holder).items()):
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if id(function) in swap:
            new = swap[id(function)]
            setattr(holder, key, new if function is value else type(value)(new))
        elif id(function) in seen:
            continue
        elif isinstance(function, FunctionType):
            seen.add(id(function))
            _rebind_defaults(function, swap)
        elif isinstance(function, type) and function.__module__.split(".")[0] == host:
            seen.add(id(function))
            _rebind_names(host, function, swap, seen)


def _rebind_defaults(function: FunctionType, swap: dict[int, FunctionType]) -> None:
    if any(id(value) in swap for value in function.__defaults__ or ()):
        function.__defaults__ = tuple(swap.get(id(value), value) for value in function.__defaults__ or ())
    keywords = function.__kwdefaults__ or {}
    keywords.update({key: swap[id(value)] for key, value in keywords.items() if id(value) in swap})
