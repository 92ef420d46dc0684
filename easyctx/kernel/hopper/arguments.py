"""Blocks and tensors as flash-attn-4 takes them."""

from typing import Any

import torch

from easyctx.band import Band


def mask_arguments(band: Band, num_queries: int, num_keys: int) -> dict[str, Any]:
    """The band as the library's (causal, left, right), counted from the bottom right corner."""
    left, right = band.window(num_queries, num_keys)
    causal = left is None and right == 0
    return {"causal": causal, "left": left, "right": None if causal else right}


def with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """As the library wants it: head dims in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()
