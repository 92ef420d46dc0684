"""Memory choices on tiny models, in float64 also where a layer runs again in the backward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from easyctx.check.float64 import float64_throughout
from easyctx.memory import install
from easyctx.memory.choices import Choices, LayerChoice
from easyctx.memory.install import MemoryPlan, apply_choices
from easyctx.memory.pool import HostPool
from easyctx.memory.spill import Spill

MLP_TILE, NORM_TILE = 10, 7  # tokens; neither divides a shard

# From nothing to everything at once. `n` is the number of layers.
CHOICES: dict[str, Callable[[int], Choices]] = {
    "kept on the GPU": lambda n: Choices.alike(n),
    "attention again": lambda n: Choices.alike(n, LayerChoice("gpu", "recompute")),
    "on the host": lambda n: Choices.alike(n, LayerChoice("host", "host")),
    "every other input": lambda n: Choices.alike(n, LayerChoice("gpu", "host"), every=2),
    "every third input": lambda n: Choices.alike(n, LayerChoice("host", "recompute"), every=3),
    "tiled": lambda n: Choices.alike(n, mlp_tile=MLP_TILE, tiled_norms=True),
    "some unchecked": lambda n: Choices((LayerChoice(everything=True), *(LayerChoice("host", "gpu"),) * (n - 1))),
    "all": lambda n: Choices.alike(
        n, LayerChoice("host", "host"), every=3, mlp_tile=MLP_TILE, tiled_norms=True, head_groups=2
    ),
}


def float64_again(model: nn.Module) -> None:
    """`float64_throughout` holds for a forward; here also for what runs again in a backward."""

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def exact(*args: Any, **kwargs: Any) -> Any:
            with float64_throughout():
                return forward(*args, **kwargs)

        return exact

    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "DecoderLayer")):
            module.forward = wrapped(module.forward)


def put_choices(model: Any, name: str) -> MemoryPlan:
    """Apply the choices of that name, with a small pool, in float64 throughout."""
    float64_again(model)
    install.NORM_TILE = NORM_TILE
    choices = CHOICES[name](model.config.num_hidden_layers)
    return apply_choices(model.train(), choices, Spill(HostPool(1 << 20, pin=False, block=1024), torch.device("cpu")))
