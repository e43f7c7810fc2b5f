"""How types and shapes are checked while tests run (``--jaxtyping-packages`` in pyproject.toml).

It is here because it has to happen before tests/conftest.py imports the package.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping
from jaxtyping._storage import pop_shape_memo, push_shape_memo

_jaxtyped = jaxtyping.jaxtyped


def jaxtyped(function: Any = None, *, typechecker: Any = None) -> Any:
    """Checks all that jaxtyping's own decorator checks, in a third of the time.

    That one binds the arguments of every call to the signature and checks them twice, so that its messages
    name the wrong one. With it training in tests took 1.5 times as long.
    """
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if isinstance(function, classmethod | staticmethod):
        return type(function)(jaxtyped(function.__func__, typechecker=typechecker))
    if not inspect.isfunction(function):
        return _jaxtyped(function, typechecker=typechecker)
    annotations = function.__annotations__
    if not annotations:
        return function
    hints = {name: _resolved(hint, function.__globals__) for name, hint in annotations.items()}
    function.__annotations__ = hints  # beartype reads them as it decorates
    checked = beartype.beartype(function)
    function.__annotations__ = annotations
    if checked is not function:
        checked.__annotations__ = annotations
    return _with_shapes(checked) if any(map(_has_shape, hints.values())) else checked


def _with_shapes(checked: Callable[..., Any]) -> Callable[..., Any]:
    """Compares the sizes of all axes of one name within a call."""

    @functools.wraps(checked)
    def call(*given: Any, **named: Any) -> Any:
        push_shape_memo({})
        try:
            return checked(*given, **named)
        finally:
            pop_shape_memo()

    return call


def _has_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """The hint without strings; ``Any`` where its names are not defined yet, as jaxtyping has it."""

    def function(value: hint) -> None: ...  # pyrefly: ignore[not-a-type]

    try:
        return typing.get_type_hints(function, names, include_extras=True)["value"]
    except Exception:
        return Any


jaxtyping.jaxtyped = jaxtyped
