"""Float64 models that are float64 throughout."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class float64_throughout(TorchFunctionMode):
    """Inside it, no operation on a float64 tensor goes down to float32.

    transformers computes norms, the softmax of eager attention and that of MoE routers in float32, whatever the
    model's dtype, by `x.float()`, `x.to(torch.float32)` and `softmax(x, dtype=torch.float32)`. What is computed for
    each token by itself is rounded alike in both runs of a comparison, unless a value lies within 1e-16 of the middle
    between two float32 numbers. What is summed over tokens in float32 depends on their order, to 1e-7 of it: the
    gradient of Gemma's norm weights (`1.0 + self.weight.float()`; with the tokens permuted, 2e-7 for Gemma 2 and 3 and
    below 1e-14 for all other families) and the value of the router loss. Inside this mode all of them agree to 1e-14.
    It changes nothing where the first tensor is not float64: the angles of RoPE come from integers.

    It holds for this thread: the forward must run inside, and a backward that recomputes checkpointed layers too.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(_lift(value) for value in args)
            kwargs = {name: _lift(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _lift(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
