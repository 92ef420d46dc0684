"""The oracle against transformers' own attention, wherever that is right."""

from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

from easyctx.check.float64 import float64_throughout
from tests.models import FAMILY_EXTRAS, ragged_batch, tiny_model
from tests.reference_attention import reference_attention, use_reference

NOT_WITH_SDPA = ("gemma2", "gpt_oss")  # refused by transformers: softcap, sinks
LENGTH = 37
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def run(model: PreTrainedModel, ids: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits `[B, S, V]` and the gradients of a loss over all of them, in which every token counts differently."""
    model.zero_grad()
    with float64_throughout():
        logits = model(ids, use_cache=False, **kwargs).logits
        (logits * torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view_as(logits[0])).mean().backward()
    return logits.detach(), [p.grad for p in model.parameters()]


def assert_same(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert (got - want).norm() <= tolerance * want.norm()


def assert_same_run(got: tuple, want: tuple, dtype: torch.dtype) -> None:
    assert_same(got[0], want[0], TOLERANCE[dtype])
    whole = torch.cat([g.flatten() for g in want[1]]).norm()
    for ours, theirs in zip(got[1], want[1], strict=True):
        assert (ours - theirs).norm() <= TOLERANCE[dtype] * theirs.norm().clamp_min(1e-3 * whole)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILY_EXTRAS)
def test_is_stock_attention(family, dtype):
    """Logits and every gradient, against eager (in float64: lifted to float64 throughout) and against sdpa."""
    ids, _ = ragged_batch(2, LENGTH)
    model = tiny_model(family, dtype)
    want = {}
    for stock in ("eager", "sdpa"):
        if stock == "eager" or family not in NOT_WITH_SDPA:
            model.set_attn_implementation(stock)
            want[stock] = run(model, ids)
    got = run(use_reference(model), ids)
    for theirs in want.values():
        assert_same_run(got, theirs, dtype)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "smollm3"])
def test_documents_are_separate_sequences(family):
    """Packed with borders = each document alone; the second row packs others than the first."""
    borders = [[0, 5, 23, LENGTH], [0, 36, LENGTH]]
    overrides = {"sliding_window": 7} if family == "mistral" else {}
    ids, _ = ragged_batch(2, LENGTH)
    token = torch.arange(LENGTH)
    documents = torch.stack([torch.bucketize(token, torch.tensor(row[1:]), right=True) for row in borders])
    starts = torch.tensor([[max(b for b in row if b <= i) for i in range(LENGTH)] for row in borders])
    model = use_reference(tiny_model(family, **overrides))
    packed, _ = run(model, ids, position_ids=token - starts, reference_documents=documents)
    for row, edges in enumerate(borders):
        for start, end in pairwise(edges):
            alone, _ = run(model, ids[row : row + 1, start:end])
            assert_same(packed[row : row + 1, start:end], alone, 1e-12)


def test_padding_mask():
    """Right and left padding: the real tokens are as stock computes them, and no gradient is NaN."""
    ids, _ = ragged_batch(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    mask[1, :4] = 0
    model = tiny_model("llama")
    want = run(model, ids, attention_mask=mask)[0]
    got, gradients = run(use_reference(model), ids, attention_mask=mask)
    assert_same(got[mask.bool()], want[mask.bool()], 1e-12)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_softcap_and_sinks_matter(family):
    """The tiny models' softcap and sinks are large enough that leaving them out would be seen."""
    ids, _ = ragged_batch(2, LENGTH)
    model = use_reference(tiny_model(family))
    logits = model(ids).logits
    for layer in model.model.layers:
        if family == "gemma2":
            layer.self_attn.attn_logit_softcapping = None
        else:
            torch.nn.init.constant_(layer.self_attn.sinks, float("-inf"))
    assert (model(ids).logits - logits).norm() > 0.1 * logits.norm()


@pytest.mark.parametrize("family", [f for f in FAMILY_EXTRAS if FAMILY_EXTRAS[f].get("sliding_window")])
def test_windows_matter(family):
    ids, _ = ragged_batch(1, LENGTH)
    whole = tiny_model(family, sliding_window=1000)
    assert (use_reference(tiny_model(family))(ids).logits - use_reference(whole)(ids).logits).norm() > 1


@pytest.mark.parametrize(("keys", "dropout", "causal"), [(5, 0.0, True), (6, 0.1, True), (6, 0.0, False)])
def test_refuses_what_it_does_not_compute(keys, dropout, causal):
    module = torch.nn.Module()
    module.is_causal = causal
    q, kv = torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, keys, 4)
    with pytest.raises(ValueError, match=f"6 queries, {keys} keys, dropout {dropout}, is_causal {causal}"):
        reference_attention(module, q, kv, kv, None, dropout=dropout)


def test_float64_throughout():
    x = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    with float64_throughout():
        results = [
            x.float(),
            x.to(torch.float32),
            x.to(dtype=torch.float32),
            torch.softmax(x, -1, dtype=torch.float32),
            torch.nn.functional.softmax(x, dim=-1, dtype=torch.float),
        ]
        assert x.int().float().dtype == torch.float32
        assert x.bfloat16().float().dtype == torch.float32
    assert all(r.dtype == torch.float64 for r in results)
    assert torch.equal(results[0], x)
    assert x.float().dtype == torch.float32
