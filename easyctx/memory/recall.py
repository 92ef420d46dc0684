"""How an attention operator's result outlives its call: whoever runs a layer says what is to be kept or given back.

The operator asks here (`easyctx.attention`), below autograd, so that to autograd it is one operator either way.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

Result = tuple[torch.Tensor, torch.Tensor]  # out_BSHD, lse_BHS


class Keeper(Protocol):
    """Who runs the layer that attention is called in."""

    def recall(self) -> Result | None:
        """The result of this call from an earlier run of the layer; None to have it computed."""

    def keep(self, result: Result) -> None:
        """Take note of a result that was computed."""


_state = threading.local()  # autograd runs backwards, and what they run again, in threads of its own


def current_keeper() -> Keeper | None:
    return getattr(_state, "keeper", None)


@contextmanager
def keeping(keeper: Keeper | None) -> Iterator[None]:
    """Within it, this thread's attention calls are `keeper`'s."""
    before = current_keeper()
    _state.keeper = keeper
    try:
        yield
    finally:
        _state.keeper = before
