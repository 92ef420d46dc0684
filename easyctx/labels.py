"""`labels` given to a sharded model: refused, since the model would shift them within a shard."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

Check = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]  # of a call: the model, args, kwargs


def refuse_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str) -> None:
    """ValueError for a call with labels, by name or position.

    The model would make a loss of them by itself: it shifts them within a shard, where the next token of most is on
    another rank or far away, and takes the mean of this rank's alone.
    """
    by_name = dict(zip(_parameters_of(type(model)), args, strict=False)) | kwargs
    if by_name.get("labels") is not None:
        raise ValueError(
            f"{type(model).__name__} was given labels=…, which it would shift within this rank's shard, where {mode} "
            "has other neighbours: call it without, and take the loss of its logits and of local_target_ids from "
            "prepare_seq_parallel_inputs(…, shift_labels(labels), …), the sum over this rank's tokens divided by the "
            "number of targets on all ranks"
        )


def watch_models(model: nn.Module, check: Check) -> Iterator[Callable[[], None]]:
    """Check the calls of all models in `model` that take labels. Gives what undoes it."""

    # A function, which copies of the model share.
    def watch(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check(head, args, kwargs)

    for head in model.modules():
        if isinstance(head, PreTrainedModel) and "labels" in _parameters_of(type(head)):
            yield head.register_forward_pre_hook(watch, with_kwargs=True).remove


def watch_family(family: Any, check: Check) -> Callable[[], None]:
    """Check the calls of all models of a class. Gives what undoes it."""
    original = family.forward

    @functools.wraps(original)
    def watched(head: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check(head, args, kwargs)
        return original(head, *args, **kwargs)

    family.forward = watched
    return lambda: setattr(family, "forward", original)


def _parameters_of(model_class: type[nn.Module]) -> tuple[str, ...]:
    """The names of what its forward takes."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]
