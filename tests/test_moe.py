"""The router loss: shares over ranks add up to what transformers computes from the whole batch."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from easyctx.check.float64 import float64_throughout
from easyctx.mesh import make_mesh
from easyctx.moe import router_loss_share
from tests.models import ragged_batch, tiny_model

EXPERTS, TOP_K, BATCH, LENGTH = 5, 2, 2, 24


def random_logits(layers: int = 3, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Router logits `[B * S, E]` of all tokens, for each layer; the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, BATCH * LENGTH, EXPERTS, generator=generator, dtype=torch.float64) * 2
    return tuple(layer.to(dtype).requires_grad_() for layer in logits)


def padding_mask(padded: int) -> torch.Tensor:
    """bool `[B, S]`, False for the last `padded` tokens of the first row and half as many of the others."""
    counted = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    counted[0, LENGTH - padded :] = False
    counted[1:, LENGTH - padded // 2 :] = False
    return counted


def stock_loss(logits: tuple[torch.Tensor, ...], counted: torch.Tensor | None) -> torch.Tensor:
    """transformers' loss, which adds up probabilities and counts in float32, in float64."""
    with float64_throughout(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        return load_balancing_loss_func(logits, EXPERTS, TOP_K, counted)


@pytest.mark.parametrize("padded", [None, 0, 7, LENGTH])
def test_one_process_is_transformers(padded):
    counted = padding_mask(padded or 0)
    ours, theirs = random_logits(), random_logits()
    got = router_loss_share(ours, EXPERTS, TOP_K, counted, None)
    want = stock_loss(theirs, None if padded is None else counted)
    got.backward()
    want.backward()
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)  # dtypes are compared as well
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_transformers(dtype):
    logits, counted = random_logits(dtype=dtype), padding_mask(3)
    got = router_loss_share(logits, EXPERTS, TOP_K, counted, None)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, load_balancing_loss_func(logits, EXPERTS, TOP_K, counted), rtol=1e-6, atol=0)


def test_padding_is_not_read():
    clean, dirty = random_logits(), random_logits()
    counted = padding_mask(7)
    with torch.no_grad():
        for layer in dirty:
            layer.view(BATCH, LENGTH, EXPERTS)[~counted] = float("nan")
    losses = [router_loss_share(logits, EXPERTS, TOP_K, counted, None) for logits in (clean, dirty)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(clean, dirty, strict=True))


def test_no_token_counts():
    logits = random_logits()
    loss = router_loss_share(logits, EXPERTS, TOP_K, torch.zeros(BATCH, LENGTH), None)
    loss.backward()
    assert loss == 0
    assert not any(layer.grad.any() for layer in logits)


@pytest.mark.parametrize(("shape", "experts"), [((3, 4), 5), ((2, 4), 4), (None, 4)])
def test_shapes_that_do_not_fit(shape, experts):
    logits = () if shape is None else (torch.zeros(3, experts), torch.zeros(shape))
    with pytest.raises(ValueError, match="router logits"):
        router_loss_share(logits, experts, 2, torch.ones(1, 3), None)


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_beyond_the_experts(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, but there are 4 experts"):
        router_loss_share((torch.zeros(3, 4),), 4, top_k, torch.ones(1, 3), None)


def share_job(rank: int, world: int, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share and the gradient of the logits `[L, B, S/P, E]` it holds: every P-th token, from its own."""
    counted = padding_mask(padded)
    local = tuple(x.detach().view(BATCH, LENGTH, EXPERTS)[:, rank::world].flatten(0, 1) for x in random_logits())
    for layer in local:
        layer.requires_grad_()
    loss = router_loss_share(local, EXPERTS, TOP_K, counted[:, rank::world], make_mesh().sp_group)
    loss.backward()
    return loss.detach(), torch.stack([layer.grad.view(BATCH, -1, EXPERTS) for layer in local])


@pytest.mark.parametrize("padded", [0, 7])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_shares_add_up(ranks, world, padded):
    whole = random_logits()
    want = router_loss_share(whole, EXPERTS, TOP_K, padding_mask(padded), None)
    want.backward()
    gradients = torch.stack([layer.grad.view(BATCH, LENGTH, EXPERTS) for layer in whole])
    answers = ranks(world).run(share_job, padded)
    torch.testing.assert_close(sum(loss for loss, _ in answers), want.detach(), rtol=1e-14, atol=0)
    for rank, (_, gradient) in enumerate(answers):
        torch.testing.assert_close(gradient, gradients[:, :, rank::world], rtol=1e-12, atol=1e-18)


def idle_job(rank: int, world: int) -> tuple[float, bool]:
    """Rank 0 holds padding only."""
    logits = random_logits()
    counted = torch.full((BATCH, LENGTH), rank > 0)
    loss = router_loss_share(logits, EXPERTS, TOP_K, counted, make_mesh().sp_group)
    loss.backward()
    return float(loss.detach()), all(bool(layer.grad.isfinite().all()) for layer in logits)


def test_rank_of_padding_only(ranks):
    (idle, finite), (busy, _) = ranks(2).run(idle_job)
    assert idle == 0
    assert finite
    whole = random_logits()
    want = router_loss_share(whole, EXPERTS, TOP_K, torch.ones(BATCH, LENGTH), None)
    assert busy == pytest.approx(float(want.detach()), rel=1e-14)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_models_report_what_it_takes(family):
    """`outputs.router_logits` and configurations as they come: equal to the model's own `aux_loss`."""
    model = tiny_model(family)
    ids, _ = ragged_batch(BATCH, LENGTH)
    with float64_throughout():
        out = model(ids, output_router_logits=True, use_cache=False)
    config = model.config
    got = router_loss_share(
        out.router_logits, config.num_local_experts, config.num_experts_per_tok, torch.ones_like(ids), None
    )
    torch.testing.assert_close(got, out.aux_loss.double(), rtol=1e-6, atol=0)
