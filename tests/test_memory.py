"""Every memory choice leaves loss and gradients as they are, and runs no part of a layer more often than it says."""

import gc

import pytest
import torch

from easyctx import attention
from easyctx.check.float64 import float64_throughout
from easyctx.loss import token_loss_sum
from easyctx.memory.choices import Choices, LayerChoice
from easyctx.memory.install import apply_choices
from easyctx.memory.layers import is_only_added
from easyctx.patch import use_own_attention
from easyctx.schedule.groups import check_head_groups
from tests.engine_jobs import Step, ddp_step, fsdp2_step
from tests.memory_helpers import CHOICES, put_choices
from tests.models import FAMILY_EXTRAS, ragged_batch, tiny_model
from tests.parity import relative_error, worst_gradient_error

MODELS = ["llama", "gemma2", "qwen3", "qwen3_moe", "phi3"]
TOLERANCE = 1e-10


def backward(model, micro_batches=1):
    with float64_throughout():
        for seed in range(micro_batches):
            ids, labels = ragged_batch(2, 37, seed)
            loss = token_loss_sum(model(ids).logits, labels)
            loss.backward()
    return loss.detach()


@pytest.fixture(scope="module")
def stock():
    """Families' models after a backward, as transformers computes it."""
    known = {}

    def of(family):
        if family not in known:
            known[family] = tiny_model(family, use_cache=False).train()
            known[family].easyctx_loss = backward(known[family])
        return known[family]

    return of


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("family", MODELS)
def test_one_process(stock, family, name):
    model = tiny_model(family, use_cache=False)
    use_own_attention(model, head_groups=CHOICES[name](1).head_groups)
    plan = put_choices(model, name)
    loss = backward(model)
    assert relative_error(loss, stock(family).easyctx_loss) < TOLERANCE
    assert worst_gradient_error(model, stock(family)) < TOLERANCE
    if (spill := plan.layers[-1].spill) is not None:
        assert spill.pool.used == 0


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("job", [ddp_step, fsdp2_step])
def test_engines(ranks, job, name):
    """A zigzag ring of two, accumulation, tiled loss."""
    for found in ranks(2).run(job, Step("zigzag_ring_attn", 2, 3, loss="tiled", memory=name)):
        assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    ("job", "family"),
    [
        (ddp_step, "gemma2"),
        (fsdp2_step, "gemma2"),
        (ddp_step, "smollm3"),
        (fsdp2_step, "smollm3"),
        (ddp_step, "mixtral"),
    ],
)
def test_engines_and_families(ranks, job, family):
    """mixtral: the router's logits leave a checkpointed layer, and their loss goes back into it."""
    step = Step("zigzag_ring_attn", 2, 2, family=family, memory="all", packed=family != "mixtral")
    for found in ranks(2).run(job, step):
        assert max(found.values()) < TOLERANCE, found


def test_offloaded_parameters(ranks):
    for found in ranks(2).run(fsdp2_step, Step("zigzag_ring_attn", 2, 2, offload=True, memory="all")):
        assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("mode", ["ulysses_attn", "data_parallel"])
def test_modes(ranks, mode):
    name = "every other input" if mode == "ulysses_attn" else "all"  # two heads cannot be in groups and shared out
    degree = 1 if mode == "data_parallel" else 2
    for found in ranks(2).run(ddp_step, Step(mode, degree, 2, memory=name, packed=True)):
        assert max(found.values()) < TOLERANCE, found


def count_attention(monkeypatch):
    """How often attention is computed, whatever is recalled."""
    calls = []
    original = attention.forward_in_groups
    monkeypatch.setattr(attention, "forward_in_groups", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.mark.parametrize("name", CHOICES)
def test_nothing_runs_more_often_than_it_must(monkeypatch, name):
    model = tiny_model("llama", use_cache=False, num_hidden_layers=4)
    use_own_attention(model, head_groups=CHOICES[name](1).head_groups)
    plan = put_choices(model, name)
    calls = count_attention(monkeypatch)
    backward(model)
    chained = [layer.inputs == "recompute" for layer in plan.choices.layers]
    not_kept = [layer.attention == "recompute" for layer in plan.choices.layers]
    again = sum(again * (1 + chain) for again, chain in zip(not_kept, [*chained[1:], False], strict=True))
    assert len(calls) == 4 + again
    for index, layer in enumerate(plan.layers):
        made_again = index + 1 < len(chained) and chained[index + 1]
        checked = not layer.choice.everything
        assert layer.counts == {"forward": checked, "backward": checked, "input of the next": made_again}
    for index, tiles in enumerate(plan.mlps):
        made_again = index + 1 < len(chained) and chained[index + 1]
        assert (tiles.forwards, tiles.reruns) == (1 + made_again, 1)


def test_an_mlp_whose_result_is_used_otherwise_is_made_again():
    """The result of a tiled MLP is left out of a layer's rerun only where it is merely added."""
    x = torch.ones(3, requires_grad=True)
    result = x * 2
    assert is_only_added((x + result).grad_fn, result.grad_fn)
    assert not is_only_added((x + result * result).grad_fn, result.grad_fn)
    assert not is_only_added((x + result.exp()).grad_fn, result.grad_fn)


def test_the_pool_is_used_again_and_again():
    """Three micro-batches, then a forward without a backward: the pool never holds more than one of them."""
    model = tiny_model("llama", use_cache=False)
    use_own_attention(model)
    plan = put_choices(model, "on the host")
    pool = plan.layers[0].spill.pool
    backward(model)
    most, capacity = pool.most_used, pool.capacity
    assert most > 0
    backward(model, micro_batches=3)
    assert (pool.most_used, pool.capacity, pool.used) == (most, capacity, 0)
    for _ in range(3 * pool.capacity // most):
        model(ragged_batch(2, 37)[0])
    gc.collect()
    assert pool.used == 0


@pytest.mark.parametrize("name", ["on the host", "every third input", "all"])
def test_frozen_weights(name):
    """As under LoRA: the first layers need no backward at all, and some matrices no gradient."""

    def frozen():
        model = tiny_model("llama", use_cache=False, num_hidden_layers=4).train()
        model.requires_grad_(False)
        for layer in model.model.layers[2:]:
            layer.mlp.up_proj.weight.requires_grad_(True)
            layer.self_attn.q_proj.weight.requires_grad_(True)
        return model

    want, model = frozen(), frozen()
    backward(want)
    use_own_attention(model)
    plan = put_choices(model, name)
    backward(model)
    for (which, p), q in zip(model.named_parameters(), want.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), which
        if p.grad is not None:
            assert relative_error(p.grad, q.grad) < TOLERANCE, which
    gc.collect()
    assert plan.layers[0].spill.pool.used == 0


def test_autocast_over_float32_weights():
    """Tiles cast weights as autocast does, in the forward and again in the backward."""
    grads = []
    for name in (None, "tiled", "all"):
        model = tiny_model("llama", torch.float32, use_cache=False).train()
        use_own_attention(model)
        if name:
            put_choices(model, name)
        ids, labels = ragged_batch(1, 37)
        with torch.autocast("cpu", torch.bfloat16):
            loss = token_loss_sum(model(ids).logits, labels)
        loss.backward()
        grads.append({which: p.grad for which, p in model.named_parameters()})
    for got in grads[1:]:
        for which, want in grads[0].items():
            assert got[which].dtype == torch.float32
            assert relative_error(got[which], want) < 0.02, which


def test_evaluation_and_removal_leave_the_model_stock():
    model = tiny_model("gemma2", use_cache=False)
    ids, _ = ragged_batch(2, 37)
    own = [vars(module).get("forward") for module in model.modules()]
    want = model.eval()(ids).logits
    plan = apply_choices(model, Choices.alike(2, LayerChoice("gpu", "gpu"), mlp_tile=8, tiled_norms=True))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-12, atol=1e-12)
    assert all(sum(layer.counts.values()) == 0 for layer in plan.layers)
    plan.remove()
    assert [vars(module).get("forward") for module in model.modules()] == own


def test_what_mixes_tokens_is_left_untiled_by_name():
    model = tiny_model("qwen3_moe")
    plan = apply_choices(model, Choices.alike(3, mlp_tile=8))
    assert plan.untiled == ["Qwen3MoeSparseMoeBlock"] * 2
    assert len(plan.mlps) == 1


def test_refusals():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="choices for 3 layers were given, and the model has 2"):
        apply_choices(model, Choices.alike(3))
    model.model.layers[0].mlp.dropout = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match="--checkpoint-every 1"):
        apply_choices(model, Choices.alike(2, every=2))
    with pytest.raises(ValueError, match=r"--head-groups 3 does not fit 8 key/value heads: use one of 1, 2, 4, 8"):
        check_head_groups(3, 8)
    with pytest.raises(ValueError, match="use one of 1, 2, 4$"):
        check_head_groups(8, 8, ulysses=2)
    assert set(MODELS) <= set(FAMILY_EXTRAS)


def test_a_second_backward_says_why_it_cannot_be():
    model = tiny_model("llama", use_cache=False)
    apply_choices(model.train(), Choices.alike(2))
    loss = model(ragged_batch(1, 20)[0]).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


def test_a_sharded_patch_in_groups_is_another_than_without():
    """Two patches of one process that differ in their groups alone do not share a context."""
    for groups in (1, 2):
        model = tiny_model("llama", use_cache=False)
        use_own_attention(model, head_groups=groups)
        model(ragged_batch(1, 20)[0])
        assert any(context.head_groups == groups for context in attention._contexts)
