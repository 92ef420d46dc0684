"""The token loss of one micro-batch: through full logits where they are small, else tile by tile."""

from typing import Any

import torch

from easyctx.head import inner_model
from easyctx.loss import token_loss_sum
from easyctx.tiled_loss import can_tile, loss_in_head

SMALL_LOGITS = 1 << 28  # elements: a gigabyte in float32


def token_loss(
    model: Any, inputs: dict[str, Any], targets: torch.Tensor, kind: str = "auto", most_tokens: int = 0
) -> tuple[torch.Tensor, Any]:
    """The cross-entropy summed over this rank's tokens that have a target, and the model's outputs.

    Args:
        model: also wrapped by an engine.
        inputs: keywords of its call.
        targets: int64 `[B, S/P]`, shifted already, -100 where there is no loss.
        kind: "full" makes all logits; "tiled" a tile at a time (`easyctx.tiled_loss`), with the outputs' logits
            being the loss; "auto" the latter where the logits would be large and the model allows it.
        most_tokens: `B * S/P` of the run's longest batch, which alone decides "auto": all batches take one way.
    """
    tokens = max(targets.numel(), most_tokens)
    if kind == "tiled" or (kind == "auto" and _are_large(model, tokens) and can_tile(model)):
        with loss_in_head(model, targets):
            outputs = model(**inputs)
        return outputs.logits.sum(), outputs
    outputs = model(**inputs)
    return token_loss_sum(outputs.logits, targets), outputs


def check_loss(model: Any, kind: str) -> None:
    """ValueError if the tiled loss was asked for and this model's head does not allow it."""
    if kind == "tiled" and not can_tile(model):
        raise ValueError(
            f"--loss tiled takes a head that is one matrix without bias, and {type(model).__name__}'s is "
            f"{inner_model(model).get_output_embeddings()}: use --loss full"
        )


def _are_large(model: Any, tokens: int) -> bool:
    vocabulary = inner_model(model).config.get_text_config().vocab_size
    return bool(tokens * vocabulary > SMALL_LOGITS)
