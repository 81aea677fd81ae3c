"""Every function of the packages checks its annotations while the tests run, shapes included.

`jaxtyping`'s own import hook puts `jaxtyping.jaxtyped` on each function, which binds the arguments
and checks them twice in each call, and does the same to each function that is made inside of
another one. That took more than half of the time of the tests. Here the hook is the same, and what
it puts on a function is lighter: one check by beartype, in one scope of dimensions' names.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

CONF = BeartypeConf(violation_type=TypeError)  # what Python raises for a wrong argument
_scope = jaxtyping.jaxtyped  # with "context", a scope in which a dimension's name has one size


def check_annotations(*packages: str) -> None:
    """Check what is called in these packages, which must not have been imported yet."""
    jaxtyping.install_import_hook(list(packages), "beartype.beartype")
    jaxtyping.jaxtyped = _decorator


def _decorator(*context: str, typechecker: object = None) -> Any:
    return _scope(*context) if context else checked


def checked(thing: Any) -> Any:
    """The same function, or the same class, with its annotations checked."""
    if not inspect.isclass(thing):
        return _checked_function(thing)
    if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
        thing.__init__ = _checked_function(thing.__init__)
    return thing


def _checked_function(function: Callable[..., Any]) -> Callable[..., Any]:
    if "<locals>" in function.__qualname__ or inspect.isgeneratorfunction(function):
        return function  # made in each call of another one; or it gives values after its scope
    names = (getattr(hint, "__name__", "") for hint in function.__annotations__.values())
    if "constexpr" in names:
        return function  # Triton compiles its source; newer releases of jaxtyping leave it out
    hints = {n: _resolved(hint, function) for n, hint in function.__annotations__.items()}
    function.__annotations__ = hints
    checked = beartype(function, conf=CONF)
    if not any(map(_has_shape, hints.values())):
        return checked

    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with _scope("context"):
            return checked(*args, **kwargs)

    return scoped


def _resolved(hint: Any, function: Callable[..., Any]) -> Any:
    """What an annotation in quotes names; anything, where that is not there yet, or never."""
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, function.__globals__)
    except (NameError, AttributeError):
        return Any


def _has_shape(hint: Any) -> bool:
    """Whether an annotation is of an array, or has one in it."""
    is_array = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(_has_shape(part) for part in get_args(hint))
