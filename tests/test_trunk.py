"""A trunk that prompts share: its answers' logits are those of the stock model, with less computed."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from easyctx.evals import trunk
from easyctx.evals.scoring import Scorer
from easyctx.evals.trunk import TrunkScorer, common_length
from easyctx.generation.calls import Call
from easyctx.generation.model import make_ranks
from easyctx.generation.store import KeyStore
from easyctx.mesh import Mesh
from easyctx.modes import make_mode_mesh
from easyctx.patch import apply_seq_parallel_monkey_patch
from tests.models import FAMILY_EXTRAS, VOCAB, tiny_model
from tests.pool import RankPool
from tests.test_parity import SHARDED_MODES

CPU = torch.device("cpu")


def prompts_like_a_grid() -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """A trunk; prompts of five lengths with one insertion, one with another, one unlike the trunk almost at once."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, (count,), generator=generator)

    text, needle_ids, other, question = some(120), some(5), some(5), some(9)
    prompts = [torch.cat([text[:31], needle_ids, text[31:]])[: length - 9] for length in (100, 81, 64, 40, 121)]
    prompts.append(torch.cat([text[:70], other]))
    prompts.append(torch.cat([some(1), text[1:50]]))
    prompts = [torch.cat([prompt, question]) for prompt in prompts]
    return text, prompts, [len(prompt) - 4 for prompt in prompts]


def trunk_logits(
    rank: int, world: int, mode: str, family: str, batch_tokens: int = 0
) -> tuple[list[Any], list[Any], int]:
    """Answers' logits by the trunk, by this mode's scorer, and how many tokens the former took."""
    mesh = make_mode_mesh(mode, None, 2 if mode == "usp_attn" else None) if world > 1 else Mesh()
    model = tiny_model(family).eval()
    if world > 1:
        apply_seq_parallel_monkey_patch(mode, model, mesh=mesh)
    text, prompts, starts = prompts_like_a_grid()
    layers = {"layer_by_layer": batch_tokens > 0, "batch_tokens": batch_tokens}
    shared = TrunkScorer(model, make_ranks(mode, mesh, model.config), CPU, chunk=16, **layers)
    shared.follow(text)
    got = shared.answer_logits(prompts, starts)
    scorer = Scorer(model, mode, mesh, CPU)
    alone = [scorer.answer_logits(prompt, start) for prompt, start in zip(prompts, starts, strict=True)]
    return [t.numpy() for t in got], [t.numpy() for t in alone], shared.num_computed


def stock_logits(family: str) -> list[np.ndarray]:
    model = tiny_model(family).eval()
    _, prompts, starts = prompts_like_a_grid()
    with torch.no_grad():
        return [
            model(prompt[None]).logits[0, start - 1 : -1].numpy() for prompt, start in zip(prompts, starts, strict=True)
        ]


def assert_close(got: list[Any], want: list[Any]) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", sorted(FAMILY_EXTRAS))
def test_logits_over_a_trunk_are_those_of_the_stock_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "LONGEST_BRANCH", 40)
    got, alone, computed = trunk_logits(0, 1, "data_parallel", family)
    want = stock_logits(family)
    assert_close(got, want)
    assert_close(alone, want)
    # The trunk as far as it is needed, the longest prompt, and the tokens that are the others' own.
    assert computed < 0.6 * sum(len(prompt) for prompt in prompts_like_a_grid()[1])


@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_logits_over_a_sharded_trunk(mode: str, ranks: Callable[[int], RankPool]) -> None:
    family = "gemma3_text"
    want = stock_logits(family)
    for got, alone, _ in ranks(2).run(trunk_logits, mode, family):
        assert_close(got, want)
        assert_close(alone, want)


def half_precision_logits(rank: int, world: int, mode: str, answer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In bfloat16 over a trunk of which the last rank holds nothing that the prompt shares; of the stock model in
    bfloat16, and in float32."""
    mesh = make_mode_mesh(mode)
    text = torch.randint(3, VOCAB, (240,), generator=torch.Generator().manual_seed(0))
    prompt = torch.cat([text[:10], text[50:55], text[10:220]])
    half, exact = tiny_model("llama", torch.bfloat16).eval(), tiny_model("llama", torch.float32).eval()
    stock = [model(prompt[None]).logits[0, -answer - 1 : -1].detach().float().numpy() for model in (half, exact)]
    apply_seq_parallel_monkey_patch(mode, half, mesh=mesh)
    scorer = TrunkScorer(half, make_ranks(mode, mesh, half.config), CPU, chunk=16)
    scorer.follow(text)
    [got] = scorer.answer_logits([prompt], [len(prompt) - answer])
    return got.float().numpy(), *stock


@pytest.mark.parametrize("answer", [4, 80])
def test_a_rank_without_keys_sends_what_the_others_expect(answer: int, ranks: Callable[[int], RankPool]) -> None:
    for got, stock, exact in ranks(2).run(half_precision_logits, "ring_attn", answer):
        assert np.linalg.norm(got - exact) < 1.5 * np.linalg.norm(stock - exact)


def test_three_ranks_and_lengths_that_divide_by_nothing(ranks: Callable[[int], RankPool]) -> None:
    for mode, family in (("striped_attn", "smollm3"), ("zigzag_ring_attn", "gpt_oss")):
        want = stock_logits(family)
        for got, _, _ in ranks(3).run(trunk_logits, mode, family):
            assert_close(got, want)


@pytest.mark.parametrize(("batch_tokens", "of_trunk"), [(1, 31 + 70), (1000, 70)])
def test_layer_by_layer_keeps_the_keys_of_one_layer(
    batch_tokens: int, of_trunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyStore, "put", lambda *_: pytest.fail("keys were kept"))
    monkeypatch.setattr(trunk, "LONGEST_BRANCH", 40)
    got, _, computed = trunk_logits(0, 1, "data_parallel", "gemma3_text", batch_tokens)
    assert_close(got, stock_logits("gemma3_text"))
    # Five prompts of one insertion after 31 tokens, the longest of 121; one of 84 after 70; one of 59 unlike the trunk.
    assert computed == of_trunk + (121 - 1 - 31) + 4 * (9 - 1) + (84 - 1 - 70) + (59 - 1)


def test_layer_by_layer_on_ranks(ranks: Callable[[int], RankPool]) -> None:
    for mode, family, world in (("zigzag_ring_attn", "gpt_oss", 2), ("striped_attn", "smollm3", 3)):
        for got, _, _ in ranks(world).run(trunk_logits, mode, family, 1000):
            assert_close(got, stock_logits(family))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_call_that_fails_beside_others_is_no_deadlock(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, before = Call.attend, set(threading.enumerate())

    def failing(self: Call, number: int, *args: Any) -> torch.Tensor:
        if number == layer and len(self.body_ids) == 60:
            raise ValueError("no")
        return original(self, number, *args)

    monkeypatch.setattr(Call, "attend", failing)
    model = tiny_model("llama").eval()
    scorer = TrunkScorer(model, make_ranks("data_parallel", None, model.config), CPU, layer_by_layer=True)
    text = torch.arange(3, 61).repeat(3)
    scorer.follow(text)
    rest = torch.full((90,), 3)
    for shared, own in ((30, 60), (60, 30)):  # the follower has 60 tokens to compute, then the leader
        prompt = torch.cat([text[:shared], rest[: own + 4]])
        with pytest.raises(ValueError, match="no"):
            scorer.answer_logits([prompt], [len(prompt) - 3])
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if type(thread).__name__ != "TMonitor"]  # tqdm's own, which stays


def test_a_trunk_is_computed_once_and_no_further_than_needed() -> None:
    model = tiny_model("llama").eval()
    text, prompts, starts = prompts_like_a_grid()
    scorer = TrunkScorer(model, make_ranks("data_parallel", None, model.config), CPU, chunk=16)
    scorer.follow(text)
    scorer.answer_logits(prompts[:1], starts[:1])
    assert scorer.num_computed == 32 + (len(prompts[0]) - 31 - 1)
    scorer.follow(text.clone())
    scorer.answer_logits(prompts[:1], starts[:1])
    assert scorer.num_computed == 32 + 2 * (len(prompts[0]) - 31 - 1)
    scorer.follow(text.flip(0))
    scorer.answer_logits(prompts[:1], starts[:1])
    assert scorer.num_computed == 32 + 2 * (len(prompts[0]) - 31 - 1) + len(prompts[0]) - 1


def test_common_length() -> None:
    a = torch.tensor([1, 2, 3, 4])
    assert [common_length(a, torch.tensor(b)) for b in ([1, 2, 3, 4, 5], [1, 2, 9, 4], [2], [1])] == [4, 2, 0, 1]
