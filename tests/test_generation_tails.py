"""Tails of questions: who shares memory, and that a step of several is computed for all of them at once."""

import pytest
import torch

from easyctx.band import FULL
from easyctx.generation.tails import Step, make_tails
from easyctx.kernel import KERNELS, Score
from easyctx.mask import Mask
from easyctx.modes import MODES
from easyctx.schedule import Attention
from tests.generation_helpers import Case, by_transformers, generate_on_ranks


def test_tails_of_about_the_same_size_share_memory() -> None:
    tails = make_tails(7, {0: 10, 1: 100, 2: 60, 3: 9})
    assert list(tails) == [1, 2, 0, 3], "sharers are neighbours"
    assert [(tail.memory.rows, tail.memory.capacity, tail.row, tail.start) for tail in tails.values()] == [
        (2, 100, 0, 7),
        (2, 100, 1, 7),
        (2, 10, 0, 7),
        (2, 10, 1, 7),
    ]
    assert tails[1].memory is tails[2].memory is not tails[3].memory


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [2, 0]])
def test_a_step_is_each_tails_own_attention(window: int | None, softcap: float | None, chosen: list[int]) -> None:
    draws = torch.Generator().manual_seed(0)
    tails = make_tails(0, {0: 9, 1: 8, 2: 7})
    own = {}
    for number, length in enumerate((5, 1, 6)):
        own[number] = torch.randn(2, 1, length, 2, 8, dtype=torch.float64, generator=draws)
        tails[number].with_new(0, *own[number])
        tails[number].length = length
    q = torch.randn(1, len(chosen), 4, 8, dtype=torch.float64, generator=draws)
    new = torch.randn(2, 1, len(chosen), 2, 8, dtype=torch.float64, generator=draws)
    score = Score(0.3, softcap)
    call = Attention(MODES["ring_attn"].layout, KERNELS["reference"], score, Mask(window))
    out, lse = Step([tails[number] for number in chosen]).attend(0, q, *new, call)
    for at, number in enumerate(chosen):
        k, v = torch.cat([own[number], new[:, :, at : at + 1]], dim=2)[:, :, -(window or 99) :]
        want, want_lse = KERNELS["reference"].forward(q[:, at : at + 1], k, v, FULL, score)
        assert (out[:, at : at + 1] - want).abs().max() < 1e-12
        assert (lse[:, :, at : at + 1] - want_lse).abs().max() < 1e-12


def test_answers_are_written_in_joint_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    joint: list[int] = []
    attend = Step.attend
    monkeypatch.setattr(Step, "attend", lambda step, *given: joint.append(given[1].shape[1]) or attend(step, *given))
    case = Case("llama", prefill_chunk=16)
    assert [ids for _, ids, _ in generate_on_ranks(0, 1, case)] == by_transformers(case)
    assert max(joint) == 3
