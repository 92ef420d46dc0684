"""Modules that treat each token alone, run on a tile of tokens at a time, forward and backward.

Only the input is kept. In the backward, each tile's forward runs once more, and its backward at once after it. The
gradients of the parameters are summed over tiles and handed to autograd once, as whole tensors: engines that act on
finished gradients (DDP, ZeRO-3, FSDP2) see what they see of any module.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from easyctx.kernel import exact_dtype
from easyctx.memory.layers import Run
from easyctx.memory.recall import current_keeper


class Tiles:
    """`modules`, one after the other, tile by tile. It takes the place of the first one's forward.

    Args:
        modules: a layer's MLP, or its MLP and the norm after it, or a norm.
        tokens: of a tile.
        is_last: whether this is the last of its layer that keeps anything, so that its result is not made again in
            the layer's backward where it is only added to the residual stream.
    """

    def __init__(self, modules: list[nn.Module], tokens: int, is_last: bool = False) -> None:
        self.modules, self.tokens, self.is_last = modules, tokens, is_last
        self.stages: list[Callable[..., Any]] = [module.forward for module in modules]
        self.forwards = self.reruns = 0  # in the forward, and each with its backward

    def __call__(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        if hidden_BSD.shape[:-1].numel() <= self.tokens and not self.is_last:
            return self.run(hidden_BSD)
        out = _TileByTile.apply(hidden_BSD, self, *self.parameters())
        run = current_keeper()
        if self.is_last and isinstance(run, Run) and run.phase == "forward":
            run.mlp_node = out.grad_fn
        return out

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained, as they are at this moment: engines exchange them for whole ones and back."""
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]

    def run(self, tile: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            tile = stage(tile)
        return tile

    def is_skipped(self) -> bool:
        """Whether the result is of no use: in the rerun of a layer that only adds it to the residual stream."""
        run = current_keeper()
        return self.is_last and isinstance(run, Run) and run.phase == "backward" and run.mlp_is_only_added


class _TileByTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BSD: torch.Tensor, tiles: Tiles, *parameters: nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(hidden_BSD)
        ctx.tiles, ctx.device_type = tiles, hidden_BSD.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device_type), torch.get_autocast_dtype(ctx.device_type)
        if tiles.is_skipped():
            # Should anything use it after all, that must show.
            return torch.full_like(hidden_BSD, torch.nan)
        tiles.forwards += 1
        rows, out = hidden_BSD.flatten(0, -2), None
        for start in range(0, len(rows), tiles.tokens):
            stretch = slice(start, start + tiles.tokens)
            part = tiles.run(rows[stretch][None])[0]
            if out is None:
                out = part.new_empty(len(rows), part.shape[-1])
            out[stretch] = part
        assert out is not None
        return out.view(hidden_BSD.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [hidden_BSD] = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        parameters = tiles.parameters()
        tiles.reruns += 1
        needs_input = ctx.needs_input_grad[0]
        dhidden_BSD = torch.empty_like(hidden_BSD) if needs_input else None
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        enabled, dtype = ctx.autocast
        rows, drows = hidden_BSD.flatten(0, -2), grads[0].flatten(0, -2)
        with torch.enable_grad(), torch.autocast(ctx.device_type, dtype, enabled):
            for start in range(0, len(rows), tiles.tokens):
                stretch = slice(start, start + tiles.tokens)
                tile = rows[stretch].detach()[None].requires_grad_(needs_input)
                out = tiles.run(tile)
                wanted = [*([tile] if needs_input else []), *parameters]
                found = list(torch.autograd.grad(out, wanted, drows[stretch][None], allow_unused=True))
                if dhidden_BSD is not None:
                    dhidden_BSD.view(rows.shape)[stretch] = found.pop(0)[0]
                _add(sums, found, is_only=len(rows) <= tiles.tokens)
                del tile, out, wanted, found  # none of it beside the next tile's
        weights = [None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)]
        return dhidden_BSD, None, *weights


def _add(sums: list[torch.Tensor | None], found: Sequence[torch.Tensor | None], is_only: bool) -> None:
    """Add a tile's gradients, in float32 (float64 for float64), so that the error does not grow with the tiles."""
    for index, gradient in enumerate(found):
        total = sums[index]
        if gradient is None:
            continue
        if total is None:
            sums[index] = gradient if is_only else gradient.to(exact_dtype(gradient.dtype))
        else:
            total += gradient
