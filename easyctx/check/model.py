"""The small model itself: random weights that make attention matter."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

GAIN = 1.0  # of every matrix: scores of attention spread by about GAIN^2, so that it is far from uniform


def make_model(
    config: Any, *, dtype: torch.dtype, seed: int, device: torch.device | str, rounded_to: torch.dtype | None = None
) -> PreTrainedModel:
    """A model of `config` in `dtype` on `device`, with the same weights for a seed whatever the dtype and device.

    Matrices are drawn with a standard deviation of GAIN / sqrt(inputs); norms, biases and attention sinks get noise
    on top of what the family starts them with.

    Args:
        rounded_to: round the weights to this dtype first, to be the exact counterpart of a half-precision model.
    """
    # The plain experts run in every dtype, and route alike however many tokens a rank has.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                start = torch.ones_like(noise) if _starts_at_one(parameter) else torch.zeros_like(noise)
                values = start + (noise if name.endswith("sinks") else 0.2 * noise)
            else:
                values = noise * GAIN / _inputs(parameter) ** 0.5
            parameter.copy_(values if rounded_to is None else values.to(rounded_to))
    return model.to(device).eval()


def _starts_at_one(parameter: torch.Tensor) -> bool:
    return bool((parameter == 1).all())


def _inputs(parameter: torch.Tensor) -> float:
    """Inputs to an output; experts come as [E, in, out] or [E, out, in], so the mean of both serves."""
    return float(parameter.shape[-1]) if parameter.dim() == 2 else (parameter.shape[-1] * parameter.shape[-2]) ** 0.5
