"""The type checker that jaxtyping applies to the package while the tests run: beartype, where an int is a float too.

On tensors as small as the tests' a check costs more than the call that it checks, so in each test the first calls of every
function are checked and the later ones are not.
"""

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

CHECKS = 20  # of a function in a test; a call has two, of its arguments and of what it returns

_made: Counter[tuple[str, str]] = Counter()
_unchecked: list[Any] = []


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a signature that jaxtyping made of one of the package's, with its arguments checked."""
    checked = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
    key = function.__module__, function.__qualname__

    @functools.wraps(checked)
    def counted(*arguments: Any, **keywords: Any) -> Any:
        _made[key] += 1
        if _made[key] == CHECKS:
            _stop_checking(*key)
        return checked(*arguments, **keywords)

    return counted


def check_again() -> None:
    """Every function is checked from here on, as at the beginning."""
    for function in _unchecked:
        del function.__no_type_check__
    _unchecked.clear()
    _made.clear()


def _stop_checking(module: str, qualified: str) -> None:
    try:
        found = functools.reduce(inspect.getattr_static, qualified.split("."), sys.modules[module])
    except (AttributeError, KeyError):
        return  # a function within a function: it stays checked
    if isinstance(found, property):
        found = found.fget
    function = inspect.unwrap(getattr(found, "__func__", found))
    if inspect.isfunction(function):
        function.__no_type_check__ = True  # what jaxtyping looks at before it checks
        _unchecked.append(function)
