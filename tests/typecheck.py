"""How annotations are checked in tests: strictly, except that an int may stand for a float."""

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from beartype import BeartypeConf, FrozenDict, beartype

# of futures only those that Python made are of the class that users know
_FUTURES = FrozenDict({torch.futures.Future[torch.Tensor]: torch._C.Future})
_check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=_FUTURES))
_seen: set[CodeType] = set()


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations executed.

    One inside of another is made anew by each call of that, and checking it anew takes a
    millisecond: only the first that is made is checked.
    """
    if "<locals>" in function.__qualname__:
        if function.__code__ in _seen:
            return function
        _seen.add(function.__code__)
    return _check(function)
