"""Having a layer's whole weights outside of its turn, under engines that put them together layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def gathered(module: nn.Module, forward: Callable[..., Any], stays: bool) -> Iterator[Callable[..., Any]]:
    """What runs `module` in the middle of another layer's backward.

    Args:
        forward: the module's forward, without the engine's hooks.
        stays: whether the module's own backward comes next, so that its weights need not be parted again.
    """
    if isinstance(module, FSDPModule):
        # Its hooks would take this for one more forward, and prefetch for one more backward.
        module.unshard()
        yield forward
        if not stays:
            module.reshard()
    elif any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        yield module  # ZeRO-3 fetches weights in the hooks of each module inside
    else:
        yield forward
