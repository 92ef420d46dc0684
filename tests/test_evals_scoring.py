"""Scores against brute force: the full logits of one process."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from easyctx import head
from easyctx.evals import scoring
from easyctx.evals.scoring import Scorer
from tests.eval_helpers import (
    mistake_on_main,
    one_process_scorer,
    ragged_targets,
    score_on_ranks,
    share_on_ranks,
    tiny_llama,
)
from tests.pool import RankPool
from tests.test_parity import SHARDED_MODES


def brute_force(model: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = model(ids).logits.float()
    valid = targets != -100
    logprob = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return torch.where(valid, logprob, 0.0), torch.where(valid, logits.argmax(-1), 0)


def assert_exact(got: scoring.Scored, want: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(got.logprob, want[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got.predicted, want[1])


@pytest.mark.parametrize("chunk_elements", [1, 256 * 2 * 5, 1 << 26])
def test_scores_are_those_of_full_logits(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE_ELEMENTS", chunk_elements)
    model = tiny_llama()
    ids = torch.randint(0, 256, (2, 37))
    targets = torch.where(torch.rand(2, 37) < 0.5, torch.randint(0, 256, (2, 37)), -100)
    for wanted in (targets, ids, *ragged_targets(37)[1:]):
        assert_exact(one_process_scorer(model).score_targets(ids, wanted), brute_force(model, ids, wanted))
    assert "forward" not in vars(model.lm_head)


def test_the_head_sees_only_scored_rows_and_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE_ELEMENTS", 256 * 4)
    model, rows = tiny_llama(), []
    original = model.lm_head.forward

    def spy(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.shape[1])
        return original(hidden)

    monkeypatch.setattr(model.lm_head, "forward", spy)
    ids = torch.randint(0, 256, (1, 300))
    one_process_scorer(model).score_answers([ids[0]], [290])
    assert rows == [1, 4, 4, 2]  # the row that is checked, then the answer's ten
    assert model.lm_head.forward is spy


def test_answers_are_scored_as_greedy_decoding_would_give_them() -> None:
    model = tiny_llama()
    prompt = torch.randint(0, 256, (1, 20))
    greedy = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    wrong = greedy.clone()
    wrong[-2] = (wrong[-2] + 1) % 256
    right_score, wrong_score = one_process_scorer(model).score_answers([greedy, wrong], [20, 20])
    assert right_score.predicted == greedy[20:].tolist()
    assert right_score.right == [True] * 5
    assert wrong_score.right[:4] == [True, True, True, False]
    want = brute_force(model, wrong[None, :-1], wrong[None, 1:])[0][0, 19:]
    assert wrong_score.logprob == pytest.approx(want.tolist(), abs=1e-5)


@pytest.mark.parametrize("start", [0, 21])
def test_an_answer_without_anything_before_it_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=f"starts at token {start} of 21"):
        one_process_scorer(tiny_llama()).score_answers([torch.zeros(21, dtype=torch.long)], [start])


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 0.3, "bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_families_that_change_their_logits(family: str, extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5, pad_token_id=0, **extra,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 64, (1, 30))
    assert_exact(one_process_scorer(model).score_targets(ids, ids), brute_force(model, ids, ids))


def test_unknown_changes_to_logits_are_refused() -> None:
    class Doubled(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Doubled(tiny_llama().config).eval()
    ids = torch.randint(0, 256, (1, 10))
    with pytest.raises(ValueError, match="does something to its logits"):
        one_process_scorer(model).score_targets(ids, ids)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("mode", SHARDED_MODES)
@pytest.mark.parametrize("length", [64, 61])
def test_two_ranks_score_as_one(mode: str, length: int, ranks: Callable[[int], RankPool]) -> None:
    ids, targets = ragged_targets(length)
    logprob, predicted = brute_force(tiny_llama(), ids, targets)
    for got_logprob, got_predicted in ranks(2).run(score_on_ranks, mode, 2, length, False):
        np.testing.assert_allclose(got_logprob, logprob.numpy(), rtol=1e-4, atol=1e-4)
        assert np.array_equal(got_predicted, predicted.numpy())


@pytest.mark.parametrize(("mode", "sp_degree"), [("data_parallel", 1), ("zigzag_ring_attn", 2)])
def test_weights_sharded_by_fsdp2(mode: str, sp_degree: int, ranks: Callable[[int], RankPool]) -> None:
    logprob, predicted = brute_force(tiny_llama(), *ragged_targets(61))
    for got_logprob, got_predicted in ranks(2).run(score_on_ranks, mode, sp_degree, 61, True):
        np.testing.assert_allclose(got_logprob, logprob.numpy(), rtol=1e-4, atol=1e-4)
        assert np.array_equal(got_predicted, predicted.numpy())


@pytest.mark.parametrize("num_items", [0, 1, 4, 5])
def test_every_rank_gets_as_much_work_and_each_item_counts_once(
    num_items: int, ranks: Callable[[int], RankPool]
) -> None:
    (first, gathered), (second, gathered_too) = ranks(2).run(share_on_ranks, 1, num_items)
    assert len(first) == len(second) == (num_items + 1) // 2
    assert sorted(gathered) == sorted(gathered_too) == list(range(num_items))
    for shared, gathered in ranks(2).run(share_on_ranks, 2, num_items):  # one sequence over both ranks
        assert shared == [(item, True) for item in range(num_items)]
        assert gathered == list(range(num_items))


def test_a_mistake_of_the_first_rank_is_every_ranks(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(mistake_on_main) == ["rank 0 says no"] * 2


def test_scorer_needs_no_gradient() -> None:
    scorer: Scorer = one_process_scorer(tiny_llama())
    ids = torch.randint(0, 256, (1, 10))
    assert not scorer.score_targets(ids, ids).logprob.requires_grad
