"""A LoRA layer that adds its adapter's part into the frozen layer's result, in place.

peft writes that part, scales it, and adds it to a copy: at a hundred thousand tokens these passes over memory take as
long as a tenth of all products. Here the last product adds to the result itself, and its backward scales the narrow
side. The gradients are the same.
"""

from typing import Any

import torch
from torch import nn


def fuse_lora(model: nn.Module) -> int:
    """Have a model's LoRA layers add in place where they can; returns how many may."""
    from peft.tuners.lora import LoraLayer

    found = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            module.forward = FusedLora(module)  # type: ignore[assignment]
            found += 1
    return found


class FusedLora:
    """In the place of a LoRA layer's forward. peft's own runs wherever anything is out of the ordinary."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.original = layer, layer.forward

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.layer
        names = list(layer.active_adapters)
        if args or kwargs or layer.merged or layer.disable_adapters or not all(self._is_plain(n) for n in names):
            return self.original(x, *args, **kwargs)
        result = layer.base_layer(x)
        if not self._is_computed_in(result):
            return self.original(x)
        for name in names:
            down, up = (part[name].weight.to(result.dtype) for part in (layer.lora_A, layer.lora_B))
            with torch.autocast(result.device.type, enabled=False):
                result = _AddLowRank.apply(result, x.to(result.dtype), down, up, float(layer.scaling[name]))
        return result

    def _is_computed_in(self, result: torch.Tensor) -> bool:
        """Whether the adapters' products are of the result's dtype: theirs, or what autocast makes of it."""
        weights = [self.layer.lora_A[name].weight for name in self.layer.active_adapters]
        is_cast = torch.is_autocast_enabled(result.device.type)
        return all(is_cast or weight.dtype == result.dtype for weight in weights)

    def _is_plain(self, name: str) -> bool:
        layer = self.layer
        has_dropout = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
        return name in layer.lora_A and not (has_dropout or name in layer.lora_variant or layer.lora_bias[name])


class _AddLowRank(torch.autograd.Function):
    """result + scale * x downᵀ upᵀ. Shapes: result `[…, N]`, x `[…, K]`, down `[R, K]`, up `[N, R]`; of one dtype."""

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
    ) -> torch.Tensor:
        narrow = x.flatten(0, -2) @ down.T
        result.view(-1, result.shape[-1]).addmm_(narrow, up.T, alpha=scale)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, narrow, down, up)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, narrow, down, up = ctx.saved_tensors
        needs_x, needs_down, needs_up = ctx.needs_input_grad[1:4]
        of_result = grads[0].flatten(0, -2)
        dup = of_result.T @ narrow * ctx.scale if needs_up else None
        dx = ddown = None
        if needs_x or needs_down:
            dnarrow = of_result @ up * ctx.scale
            ddown = dnarrow.T @ x.flatten(0, -2) if needs_down else None
            dx = (dnarrow @ down).view(x.shape) if needs_x else None
        return grads[0], dx, ddown, dup, None
