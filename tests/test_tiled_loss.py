"""The loss made tile by tile in the head: the same as through full logits, and never all of them at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from easyctx import head
from easyctx.loss import token_loss_sum
from easyctx.tiled_loss import can_tile, loss_in_head
from easyctx.training.objective import check_loss, token_loss
from tests.models import VOCAB, ragged_batch, tiny_model

TILE_ROWS = 7


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(head, "TILE_ELEMENTS", TILE_ROWS * VOCAB)


def both_ways(model, ids, targets, scale):
    """(loss, gradients) through full logits and in the head."""
    results = []
    for kind in ("full", "tiled"):
        model.zero_grad()
        loss, _ = token_loss(model, {"input_ids": ids}, targets, kind)
        (loss * scale).backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    return results


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_is_the_loss_of_full_logits(family, tied):
    """gemma2 caps its logits; tied, the head's weight also gets the embedding's gradient."""
    model = tiny_model(family, tie_word_embeddings=tied)
    ids, targets = ragged_batch(2, 41)
    (want, want_grads), (got, grads) = both_ways(model, ids, targets, 0.37)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert grads.keys() == want_grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, want_grads[name], rtol=1e-6 if family == "gemma2" else 1e-9, atol=1e-9)
    assert "forward" not in vars(model.lm_head)
    assert model.config.get_text_config().__dict__.get("final_logit_softcapping") == (
        30.0 if family == "gemma2" else None
    )


def test_without_any_target_it_still_runs_backward():
    model = tiny_model("llama")
    ids = torch.randint(3, VOCAB, (1, 12))
    loss, _ = token_loss(model, {"input_ids": ids}, torch.full_like(ids, -100), "tiled")
    loss.backward()
    assert loss == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_a_frozen_head_and_frozen_layers():
    model = tiny_model("llama")
    ids, targets = ragged_batch(1, 30)
    model.lm_head.requires_grad_(False)
    (_, want), (_, got) = both_ways(model, ids, targets, 1.0)
    assert "lm_head.weight" not in got
    torch.testing.assert_close(got["model.norm.weight"], want["model.norm.weight"], rtol=1e-9, atol=1e-12)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    (_, want), (_, got) = both_ways(model, ids, targets, 1.0)
    torch.testing.assert_close(got["lm_head.weight"], want["lm_head.weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_exact_as_full_logits(autocast):
    ids, targets = ragged_batch(2, 64)
    exact = tiny_model("llama", torch.float32)
    half = tiny_model("llama", torch.float32) if autocast else tiny_model("llama", torch.float32).bfloat16()
    if not autocast:
        exact.load_state_dict({name: p.float() for name, p in half.state_dict().items()})
    _, (want, want_grads) = both_ways(exact, ids, targets, 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        full, tiled = both_ways(half, ids, targets, 1.0)

    def error(result):
        return float((result[1]["lm_head.weight"].float() - want_grads["lm_head.weight"]).norm())

    assert error(tiled) < 1.1 * error(full)
    assert abs(float(tiled[0] - want)) < 1.5 * abs(float(full[0] - want)) + 1e-3 * float(want)


class LargestFloat(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return result


def test_never_holds_more_than_a_tile():
    """200 tokens of 61 words: the largest tensors are the model's own, of at most 200 x 48 elements."""
    model = tiny_model("llama")
    ids = torch.randint(3, VOCAB, (1, 200))
    sizes = {}
    for kind in ("full", "tiled"):
        with LargestFloat() as seen:
            loss, _ = token_loss(model, {"input_ids": ids}, ids, kind)
            loss.backward()
        sizes[kind] = seen.largest
    assert sizes["full"] >= 200 * VOCAB
    assert sizes["tiled"] <= 200 * 48


def test_auto_tiles_only_what_is_large(monkeypatch):
    from easyctx.training import objective

    model = tiny_model("llama")
    ids, targets = ragged_batch(1, 30)
    _, outputs = token_loss(model, {"input_ids": ids}, targets)
    assert outputs.logits.shape == (1, 30, VOCAB)
    monkeypatch.setattr(objective, "SMALL_LOGITS", 100)
    loss, outputs = token_loss(model, {"input_ids": ids}, targets)
    assert outputs.logits.shape == (1, 1, 1)
    torch.testing.assert_close(loss, token_loss_sum(model(ids).logits, targets))


def test_heads_that_are_more_than_a_matrix_are_refused():
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(32, VOCAB, bias=True)
    assert not can_tile(model)
    with pytest.raises(ValueError, match=r"--loss tiled takes a head that is one matrix.*bias=True.*--loss full"):
        check_loss(model, "tiled")
    check_loss(model, "auto")


def test_leaves_the_head_as_it_was_after_an_error():
    model = tiny_model("gemma2")
    with pytest.raises(RuntimeError, match="out of luck"), loss_in_head(model, torch.zeros(1, 4, dtype=torch.long)):
        raise RuntimeError("out of luck")
    assert "forward" not in vars(model.lm_head)
    assert model.config.final_logit_softcapping == 30.0
