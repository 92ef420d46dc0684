"""The load-balancing loss of mixture-of-experts models, when a batch is spread over ranks.

transformers' loss is `E * sum_e f_e * p_e` over the batch and all layers (Switch Transformer, arXiv 2101.03961,
equations 4 to 6; top-k as in Mixtral): f_e is the number of choices of expert e over that of tokens, p_e the mean
probability that the router gives it. A rank that computed both from its own tokens would compute another loss. But only
p_e has a gradient, and it is a mean over tokens: with the f_e and the number of tokens of all ranks, each rank's share
is linear in its own probabilities, and the shares add up to the loss. One integer for each expert travels, and their
number of tokens; no gradient does.
"""

import torch
import torch.distributed as dist


def router_loss_share(
    router_logits: tuple[torch.Tensor, ...],
    num_experts: int,
    top_k: int,
    counted: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """This rank's share of the load-balancing loss over all ranks of `group`; the shares add up to it.

    Their gradients add up too: each rank runs backward on its own share, and the gradients of the parameters are
    summed as those of a loss that is a sum over tokens are. All ranks must call it, as often as each other.

    Args:
        router_logits: for each layer with experts, `[B * S/P, E]` of any floating dtype, rows in the order of
            `counted`: `outputs.router_logits` of a model called with `output_router_logits=True`.
        num_experts: E.
        top_k: experts that a token is sent to.
        counted: bool (or 0 and 1) `[B, S/P]`, False for padding. A rank may have none that count.
        group: the ranks that hold the batch; None for this process alone (not, as elsewhere, for all of them).

    Returns:
        A scalar, float32 (float64 for float64 logits), not yet multiplied by the model's `router_aux_loss_coef`. It
        is what `load_balancing_loss_func` of `transformers.models.mixtral.modeling_mixtral` computes, given all
        ranks' tokens and `attention_mask=counted`; and 0 where no token counts on any rank.

    Raises:
        ValueError: no layer's logits, logits that do not have a row for each token and a column for each expert,
            `top_k` not between 1 and E.
    """
    tokens = counted.reshape(-1).bool()
    _check(router_logits, num_experts, top_k, tokens.numel())
    probability_sum, choices = _local_sums(router_logits, num_experts, top_k, tokens)
    rows = tokens.sum().to(choices.device) * len(router_logits)
    totals = torch.cat([choices, rows[None]])
    if group is not None:
        dist.all_reduce(totals, group=group)
    # Integers up to here: in float32 the counts of a million tokens in every layer would not be exact.
    num_rows = totals[-1].clamp_min(1).to(probability_sum.dtype)
    choice_share = totals[:-1].to(probability_sum.dtype) / num_rows
    return num_experts * (choice_share * probability_sum).sum() / num_rows


def _local_sums(
    router_logits: tuple[torch.Tensor, ...], num_experts: int, top_k: int, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over this rank's tokens and all layers: the sum of probabilities and the number of choices (int64), `[E]` each.

    `tokens` is bool `[B * S/P]`. Layer by layer, so that one layer's probabilities are alive at a time.
    """
    exact = torch.float64 if router_logits[0].dtype == torch.float64 else torch.float32
    device = router_logits[0].device
    probability_sum = torch.zeros(num_experts, dtype=exact, device=device)
    choices = torch.zeros(num_experts, dtype=torch.int64, device=device)
    # Taken out rather than multiplied by 0: what a model makes of padding may be inf or NaN.
    kept = tokens.to(device).nonzero().squeeze(1)
    for logits in router_logits:
        # In the logits' own dtype, as transformers does: after another rounding, topk may choose another expert.
        probabilities = logits.to(device)[kept].softmax(-1)
        chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
        choices.scatter_add_(0, chosen, torch.ones_like(chosen))
        probability_sum = probability_sum + probabilities.to(exact).sum(0)
    return probability_sum, choices


def _check(router_logits: tuple[torch.Tensor, ...], num_experts: int, top_k: int, num_tokens: int) -> None:
    if not router_logits:
        raise ValueError("no router logits: call the model with output_router_logits=True, and one that has experts")
    for layer, logits in enumerate(router_logits):
        if logits.shape != (num_tokens, num_experts):
            raise ValueError(
                f"router logits {layer} have shape {tuple(logits.shape)}, but `counted` has {num_tokens} tokens and "
                f"num_experts is {num_experts}: give this rank's shard of both, and the model's number of experts"
            )
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, but there are {num_experts} experts: take config.num_experts_per_tok")
