"""The monkey patch: whom it touches, whom it does not, and that it comes off."""

import copy

import pytest
import torch

from easyctx import apply_seq_parallel_monkey_patch, make_mesh, prepare_seq_parallel_inputs
from easyctx.documents import Documents
from easyctx.memory.choices import Choices, LayerChoice
from easyctx.memory.install import apply_choices
from easyctx.patch import IMPLEMENTATION, use_own_attention
from tests.models import tiny_model

MODE = "zigzag_ring_attn"


def sharded_logits(mesh, model, ids):
    local = prepare_seq_parallel_inputs(MODE, ids, None, None, mesh.sp_rank, mesh.sp_size, "cpu")
    return model(local["local_input_ids"], position_ids=local["local_position_ids"]).logits


def lives_with_stock_models(rank, world, family):
    """A patched model, a stock one with the same config object, and one of another family, in turns."""
    mesh, ids = make_mesh(), torch.randint(3, 60, (1, 24))
    patched = tiny_model(family)
    stock = type(patched)(patched.config).double()
    other = tiny_model("qwen3")
    want, other_want, patched_want = stock(ids).logits, other(ids).logits, patched(ids).logits
    padded = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)
    want_padded = stock(ids, attention_mask=padded).logits
    patch = apply_seq_parallel_monkey_patch(MODE, patched)
    for _ in range(2):
        got = sharded_logits(mesh, patched, ids)
        torch.testing.assert_close(stock(ids).logits, want)
        got_padded = stock(ids, attention_mask=padded).logits
        torch.testing.assert_close(got_padded, want_padded, equal_nan=True)  # of rows that see nothing
        torch.testing.assert_close(other(ids).logits, other_want)
    assert got.shape[1] == 24 // world
    patch.remove()
    assert patched.config._attn_implementation != IMPLEMENTATION
    assert "forward" not in vars(patched.model)
    torch.testing.assert_close(patched(ids).logits, patched_want)


def family_patch_reaches_old_and_new_models(rank, world):
    mesh, ids = make_mesh(), torch.randint(3, 60, (1, 24))
    old = tiny_model("llama")
    want = old(ids).logits
    old.set_attn_implementation("eager")
    with apply_seq_parallel_monkey_patch(MODE, "llama"):
        new = tiny_model("llama")
        positions = prepare_seq_parallel_inputs(MODE, ids, None, None, rank, world, "cpu")["local_position_ids"]
        for model in (old, new):
            torch.testing.assert_close(sharded_logits(mesh, model, ids), want[:, positions[0]])
        torch.testing.assert_close(sharded_logits(mesh, copy.deepcopy(new), ids), want[:, positions[0]])
    assert old.config._attn_implementation == "eager"
    torch.testing.assert_close(old(ids).logits, want, rtol=1e-3, atol=1e-4)  # eager's softmax is float32
    torch.testing.assert_close(new(ids).logits, want)


def patching_again_replaces(rank, world):
    ids = torch.randint(3, 60, (1, 24))
    model = tiny_model("llama")
    want = model(ids).logits
    apply_seq_parallel_monkey_patch(MODE, model)
    apply_seq_parallel_monkey_patch("ring_attn", model)
    apply_seq_parallel_monkey_patch("ring_attn", model)
    local = prepare_seq_parallel_inputs("ring_attn", ids, None, None, rank, world, "cpu")
    half = want.chunk(world, dim=1)[rank]
    torch.testing.assert_close(model(input_ids=local["local_input_ids"]).logits, half)
    apply_seq_parallel_monkey_patch("data_parallel", model)
    torch.testing.assert_close(model(ids).logits, want)


def labels_are_refused(rank, world, by_family):
    """transformers would shift them within a shard, and train on the wrong next tokens without a word."""
    ids = torch.randint(3, 60, (1, 24))
    model = tiny_model("llama")
    want = model(ids, labels=ids).loss
    patch = apply_seq_parallel_monkey_patch(MODE, "llama" if by_family else model)
    local = prepare_seq_parallel_inputs(MODE, ids, None, None, rank, world, "cpu")
    given = dict(input_ids=local["local_input_ids"], position_ids=local["local_position_ids"])
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM was given labels=.*zigzag.*local_target_ids"):
            one(**given, labels=local["local_input_ids"])
        assert one(**given).loss is None
        with pytest.raises(ValueError, match="was given labels="):
            one(local["local_input_ids"], None, local["local_position_ids"], None, None, local["local_input_ids"])
    with pytest.raises(ValueError, match=r"without past_key_values; to generate.*Generator"):
        model.generate(ids, max_new_tokens=2)
    if by_family:  # an instance's own patch holds, and with whole rows labels are right
        with use_own_attention(model):
            torch.testing.assert_close(model(ids, labels=ids).loss, want)
    patch.remove()
    torch.testing.assert_close(model(ids, labels=ids).loss, want)


def shards_must_match(rank, world):
    """Batches that differ, as without prepare_dataloader: an error on every rank where messages would not match."""
    model = tiny_model("llama")
    apply_seq_parallel_monkey_patch(MODE, model)

    def refusal(length=12, rows=1, **given):
        with pytest.raises(ValueError, match="of the sequence|attention_mask has shape") as error:
            model(torch.randint(3, 60, (rows, length)), **given)
        return str(error.value)

    def refused_ids(whole):
        local = prepare_seq_parallel_inputs(MODE, whole, None, None, rank, world, "cpu")
        with pytest.raises(ValueError, match="of the sequence") as error:
            model(local["local_input_ids"], position_ids=local["local_position_ids"])
        return str(error.value)

    rows = torch.arange(3, 51).view(2, 24)
    same = prepare_seq_parallel_inputs(MODE, rows, None, None, rank, world, "cpu")
    model(same["local_input_ids"], position_ids=same["local_position_ids"])
    documents = Documents(24 + 8 * rank, ((0, 5),))
    mask = torch.ones(1, 12, dtype=torch.long)
    return {
        "length": refusal(12 + 4 * rank),
        "length, packed": refusal(12 + 4 * rank, documents=documents),
        "rows": refusal(rows=1 + rank),
        "mask": refusal(**({"attention_mask": mask} if rank else {})),
        "documents": refusal(**({"documents": documents} if rank else {})),
        "misfit": refusal(attention_mask=mask[:, rank:]),
        "other rows": refused_ids(rows + rank),
        "another order": refused_ids(rows.flip(0) if rank else rows),
    }


def checkpointed_layers_keep_the_patch(rank, world, attention):
    """Layers run again in the backward, outside the decoder's forward: same gradients as without."""
    ids = torch.randint(3, 60, (1, 24))
    mesh, grads = make_mesh(), []
    for layer in (LayerChoice(everything=True), LayerChoice("gpu", attention)):
        model = tiny_model("llama").train()
        apply_seq_parallel_monkey_patch(MODE, model)
        apply_choices(model, Choices.alike(model.config.num_hidden_layers, layer))
        sharded_logits(mesh, model, ids).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def refusals(rank, world):
    model, ids = tiny_model("llama"), torch.randint(3, 60, (1, 12))
    apply_seq_parallel_monkey_patch(MODE, model)
    cases = [
        (
            "attention_mask hides position 0 of row 0 and shows position 23 behind it",
            dict(input_ids=ids, attention_mask=(torch.arange(12) > 1).long()[None]),
        ),
        ("attention_mask has shape (1, 9)", dict(input_ids=ids, attention_mask=torch.ones(1, 9))),
        (
            "not those of the zigzag layout for 12 of 24 tokens: row 0 has 1 where the layout holds position 0",
            dict(input_ids=ids, position_ids=torch.arange(12)[None] + 1),
        ),
        (
            "documents are those of rows of 20 tokens, but the rows have 24",
            dict(input_ids=ids, documents=Documents(20, ((0, 3),))),
        ),
        (
            "documents are those of 2 rows, but the batch has 1",
            dict(input_ids=ids, documents=Documents(24, ((0, 3), (0, 4)))),
        ),
        ("cu_seqlens end at 20, but the row has 24 tokens", dict(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 20]))),
        ("with keywords", dict()),
    ]
    messages = []
    for _, arguments in cases:
        try:
            model(**arguments)
            messages.append("nothing was raised")
        except ValueError as error:
            messages.append(str(error))
    return [(expected, got) for (expected, _), got in zip(cases, messages, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_leaves_other_models_alone(ranks, family):
    """Also those whose stock attention is not "sdpa", which knows neither softcap nor sinks."""
    ranks(2).run(lives_with_stock_models, family)


@pytest.mark.parametrize("job", [family_patch_reaches_old_and_new_models, patching_again_replaces])
def test_patch(ranks, job):
    ranks(2).run(job)


@pytest.mark.parametrize("attention", ["recompute", "gpu"])
def test_checkpointing(ranks, attention):
    ranks(2).run(checkpointed_layers_keep_the_patch, attention)


def test_refused_calls(ranks):
    for expected, got in [pair for answers in ranks(2).run(refusals) for pair in answers]:
        assert expected in got


def test_shards_must_match(ranks):
    for rank, said in enumerate(ranks(2).run(shards_must_match)):
        for name in ("length", "length, packed"):
            assert "rank 1 of the sequence holds 1 rows of 16 tokens, and rank 0 1 of 12: all ranks" in said[name]
        assert "rank 1 of the sequence holds 2 rows of 12 tokens, and rank 0 1 of 12: all ranks" in said["rows"]
        assert (
            "rank 1 of the sequence was given an attention_mask, and rank 0 nothing beside its tokens" in said["mask"]
        )
        assert "rank 1 of the sequence was given documents, and rank 0 nothing beside" in said["documents"]
        for name in ("other rows", "another order"):
            assert "rank 1 of the sequence holds a shard of other rows than rank 0" in said[name]
        own = "attention_mask has shape (1, 11), and the shard 1 rows of 12 tokens"
        other = "rank 1 of the sequence was given an attention_mask of another shape than its 12 tokens"
        assert (own if rank else other) in said["misfit"]


def test_refused_patches():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="unknown parallel mode 'zigzag': choose one of data_parallel, "):
        apply_seq_parallel_monkey_patch("zigzag", model)
    with pytest.raises(ValueError, match="'starcoder2' is not one that was tested"):
        apply_seq_parallel_monkey_patch(MODE, "starcoder2")
    with pytest.raises(ValueError, match="'qwen3_next' has recurrent, convolution or linear-attention layers"):
        apply_seq_parallel_monkey_patch(MODE, "qwen3_next")
    with pytest.raises(ValueError, match="'bert' attends in both directions"):
        apply_seq_parallel_monkey_patch(MODE, "bert")
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        apply_seq_parallel_monkey_patch(MODE, tiny_model("llama", attention_dropout=0.1))
    with pytest.raises(ValueError, match=r"router_jitter_noise is 0\.2"):
        apply_seq_parallel_monkey_patch(MODE, tiny_model("mixtral", router_jitter_noise=0.2))
    with pytest.raises(ValueError, match="gemma2 configuration has use_bidirectional_attention=True"):
        apply_seq_parallel_monkey_patch(MODE, tiny_model("gemma2", use_bidirectional_attention=True))
    with pytest.raises(ValueError, match="sliding_attention, but use_sliding_window is False"):
        apply_seq_parallel_monkey_patch(MODE, tiny_model("smollm3", use_sliding_window=False))
    with pytest.raises(ValueError, match="holds no transformers model"):
        apply_seq_parallel_monkey_patch(MODE, torch.nn.Linear(2, 2))
    apply_seq_parallel_monkey_patch(MODE, model)
    with pytest.raises(ValueError, match="this run has 1 process: launch more"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_ulysses_names_the_degrees_that_divide(ranks):
    assert (
        "cannot share 4 query and 2 key/value heads out to 3 ranks: use a Ulysses degree of 1, 2, 4 "
        in (ranks(3).run(refused_heads)[0])
    )


def refused_heads(rank, world):
    with pytest.raises(ValueError, match="heads out to 3 ranks") as refusal:
        apply_seq_parallel_monkey_patch("ulysses_attn", tiny_model("llama"))
    return str(refusal.value)


@pytest.mark.parametrize("by_family", [False, True])
def test_labels_are_refused(ranks, by_family):
    ranks(2).run(labels_are_refused, by_family)
