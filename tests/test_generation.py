"""Generated tokens against one process's `model.generate`, under every mode, and what ends an answer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from easyctx.generation import Generator, calls, prefix
from easyctx.generation.text import Sampling
from easyctx.kernel.torch_cpu import TorchCpu
from easyctx.layout import Run
from easyctx.modes import MODES
from tests.generation_helpers import (
    EOS,
    Case,
    Letters,
    by_transformers,
    generate_after_scoring,
    generate_on_ranks,
    generate_with_fsdp2,
)
from tests.models import WINDOW
from tests.pool import RankPool

SHARDED = [name for name, mode in MODES.items() if mode.is_sequence_parallel]
FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "smollm3"]


def case_of(family: str, **settings: Any) -> Case:
    return Case(family, overrides={"sliding_window": WINDOW} if family == "mistral" else {}, **settings)


def tokens(answers: list[Any]) -> list[list[int]]:
    return [ids for _, ids, _ in answers]


@pytest.mark.parametrize("family", [*FAMILIES, "phi3", "qwen3_moe"])
def test_one_process_generates_what_transformers_does(family: str) -> None:
    case = case_of(family)
    want = by_transformers(case)
    assert len({tuple(ids) for ids in want}) > 1
    assert tokens(generate_on_ranks(0, 1, case)) == want


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_generate_what_transformers_does(family: str, ranks: Callable[[int], RankPool]) -> None:
    case = case_of(family)
    want = by_transformers(case)
    for world, mode in ((2, "zigzag_ring_attn"), (3, "striped_attn")):
        for answers in ranks(world).run(generate_on_ranks, dataclasses.replace(case, mode=mode), True):
            assert tokens(answers) == want


@pytest.mark.parametrize("mode", SHARDED)
@pytest.mark.parametrize("context", [3, 61])
def test_every_mode_and_length(mode: str, context: int, ranks: Callable[[int], RankPool]) -> None:
    case = Case("gemma3_text", context=context, mode=mode, prefill_chunk=13, new_tokens=6)
    want = by_transformers(case)
    for answers in ranks(2).run(generate_on_ranks, case, False):
        assert tokens(answers) == want


@pytest.mark.parametrize("mode", ["zigzag_ring_attn", "usp_attn"])
def test_four_ranks_in_float32_with_keys_on_the_host(mode: str, ranks: Callable[[int], RankPool]) -> None:
    case = Case("qwen3", context=150, mode=mode, offload=True, dtype=torch.float32)
    want = by_transformers(case)
    for answers in ranks(4).run(generate_on_ranks, case, True):
        assert tokens(answers) == want


@pytest.mark.parametrize("mode", SHARDED)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_without_a_cache(family: str, mode: str, ranks: Callable[[int], RankPool]) -> None:
    """Each token computes its text again, sharded, and keeps nothing; greedily and drawn alike."""
    case = Case(family, mode=mode, use_cache=False, new_tokens=5)
    want = by_transformers(case)
    for answers in ranks(2).run(generate_on_ranks, case, True):
        assert tokens(answers) == want
    alone = dataclasses.replace(case, mode="data_parallel")
    drawn_with = generate_on_ranks(0, 1, dataclasses.replace(alone, use_cache=True), temperature=1.0, seed=5)
    assert generate_on_ranks(0, 1, alone, temperature=1.0, seed=5) == drawn_with
    assert tokens(drawn_with) != want


def test_without_a_cache_nothing_is_kept_and_the_last_tokens_logits_alone_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = Case().model(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    monkeypatch.setattr("easyctx.generation.store.KeyStore.put", lambda *_: pytest.fail("keys were kept"))
    generator = Generator(model, Letters(), use_cache=False)
    (answer,) = generator.answer([5] * 30, max_new_tokens=4)
    assert calls == [1] * len(answer.token_ids)
    with pytest.raises(ValueError, match="offload_cache is True and use_cache False"):
        Generator(model, Letters(), offload_cache=True, use_cache=False)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 1.5, 2.0, 4.0],
        "original_max_position_embeddings": 32,
    },
}
LENGTHS = {
    "dynamic": {"max_position_embeddings": 32},
    "longrope": {"max_position_embeddings": 128, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize(("kind", "context"), [("dynamic", 20), ("dynamic", 37), ("longrope", 12), ("longrope", 37)])
def test_rope_that_looks_at_the_length(kind: str, context: int, ranks: Callable[[int], RankPool]) -> None:
    family = {"dynamic": "llama", "longrope": "phi3"}[kind]
    case = Case(family, context, mode="striped_attn", overrides=LENGTHS[kind] | {"rope_parameters": ROPES[kind]})
    want = by_transformers(case)
    assert tokens(generate_on_ranks(0, 1, dataclasses.replace(case, mode="data_parallel"))) == want
    assert [tokens(answers) for answers in ranks(2).run(generate_after_scoring, case)] == [want] * 2


def test_answers_that_cross_longropes_switch_are_refused() -> None:
    case = Case("phi3", 25, overrides=LENGTHS["longrope"] | {"rope_parameters": ROPES["longrope"]})
    with pytest.raises(ValueError, match="25 tokens and 12 new ones cross 32"):
        generate_on_ranks(0, 1, dataclasses.replace(case, questions=(0,)))


def test_short_prompts_without_a_context() -> None:
    case = Case("gpt_oss", context=0, questions=(3, 1, 20, 7, 7), prefill_chunk=40, batch_size=3)
    assert tokens(generate_on_ranks(0, 1, case)) == by_transformers(case)


def test_long_prompts_given_as_questions_are_sharded(ranks: Callable[[int], RankPool]) -> None:
    case = Case("mistral", context=9, questions=(3, 30, 8), mode="ring_attn", prefill_chunk=8)
    for answers in ranks(2).run(generate_on_ranks, case):
        assert tokens(answers) == by_transformers(case)


def test_questions_do_not_disturb_each_other(ranks: Callable[[int], RankPool]) -> None:
    case = Case("gemma2", questions=(4, 9, 1, 4), mode="striped_attn", prefill_chunk=40)
    together = ranks(2).run(generate_on_ranks, case)[0]
    for batch_size in (1, 3):
        assert ranks(2).run(generate_on_ranks, dataclasses.replace(case, batch_size=batch_size))[0] == together


def test_few_queries_over_many_keys_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "PIECE", 5)
    case = Case("smollm3", context=64)
    assert tokens(generate_on_ranks(0, 1, case)) == by_transformers(case)


@pytest.mark.parametrize("family", ["smollm3", "mistral", "gpt_oss"])
def test_few_queries_go_to_the_kernel_that_shares_out_keys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharing(TorchCpu):
        calls = 0

        def forward(self, *given: Any) -> Any:
            Sharing.calls += 1
            return super().forward(*given)

    monkeypatch.setattr(prefix, "_SPLITTING", Sharing())
    monkeypatch.setattr(prefix, "_attend_in_pieces", lambda *_: pytest.fail("taken in pieces"))
    case = Case(family, context=64, questions=(1, 5, 0, 20))
    assert tokens(generate_on_ranks(0, 1, case)) == by_transformers(case)
    assert Sharing.calls > 0


def test_the_context_is_computed_once_and_logits_of_last_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    case, seen, rows = Case(context=41, questions=(2, 3), new_tokens=4, prefill_chunk=16), [], []
    model = case.model()
    model.model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True)
    model.lm_head.register_forward_pre_hook(lambda _m, args: rows.append(args[0].shape[1]))
    context, questions = case.prompt()
    Generator(model, Letters(), prefill_chunk=16).answer(context, questions, max_new_tokens=4)
    # 40 tokens in chunks, then the last one before either question, then two answers at a time.
    assert seen == [16, 16, 8, 2 * 1 + 2 + 3, 2, 2, 2]
    assert rows == [1, 1, 1, 2, 2, 2, 2]
    assert model.config._attn_implementation == "sdpa"


def spelled(case: Case, **settings: Any) -> tuple[str, list[int], str]:
    return generate_on_ranks(0, 1, case, **settings)[0]


def test_stop_strings_across_token_borders(ranks: Callable[[int], RankPool]) -> None:
    case = Case(questions=(1,), new_tokens=10)
    text, ids, stopped_by = spelled(case)
    assert stopped_by == "length"
    assert len(text) == 10
    stop = text[3:6]
    first = text.find(stop)
    assert spelled(case, stop=["~~", stop]) == (text[:first], ids[: first + 3], "stop")
    assert spelled(case, stop=["~~"]) == (text, ids, "length")
    sharded = dataclasses.replace(case, mode="ring_attn")
    assert ranks(2).run(generate_on_ranks, sharded, False) == [[(text, ids, "length")]] * 2


def test_the_end_of_a_text_also_as_a_stop_string() -> None:
    case = Case(questions=(5,), new_tokens=30)
    text, ids, stopped_by = spelled(case)
    assert (stopped_by, ids[-1]) == ("eos", EOS)
    assert len(text) == len(ids) - 1
    model, (context, questions) = case.model(), case.prompt()
    model.generation_config.eos_token_id = None
    special = Letters()
    special.eos_token_id = None
    [answer] = Generator(model, special).answer(context, questions, max_new_tokens=30, stop=["<eos>"])
    assert (answer.text, answer.token_ids, answer.stopped_by) == (text, ids, "stop")


def test_sampling_is_seeded_alike_on_all_ranks_and_for_each_question(ranks: Callable[[int], RankPool]) -> None:
    case = Case(mode="zigzag_ring_attn", questions=(2, 2), new_tokens=8)
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    one, two = (
        generate_on_ranks(0, 1, dataclasses.replace(case, mode="data_parallel"), **settings),
        ranks(2).run(generate_with, case, settings),
    )
    assert two == [one, one]
    assert tokens(one) != by_transformers(case)
    assert generate_on_ranks(0, 1, Case(questions=(2, 2), new_tokens=8), **settings | {"seed": 4}) != one


def generate_with(rank: int, world: int, case: Case, settings: dict[str, Any]) -> list[Any]:
    return generate_on_ranks(rank, world, case, **settings)


def test_draws_follow_the_probabilities_of_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.2, 0.25, 0.05]).log()

    def drawn(sampling: Sampling, count: int) -> list[int]:
        return [sampling.draw(logits[None], [0], step)[0] for step in range(count)]

    likeliest = drawn(Sampling(1.0, 0.7), 2000)
    assert set(likeliest) == {0, 2}
    assert likeliest.count(0) / 2000 == pytest.approx(0.5 / 0.75, abs=0.04)
    assert set(drawn(Sampling(1.0, 1e-6), 20)) == {0}
    assert drawn(Sampling(0.1), 200).count(0) > 190
    assert len(set(drawn(Sampling(1.0), 200))) == 4


def test_weights_sharded_by_fsdp2_and_answers_of_different_lengths(ranks: Callable[[int], RankPool]) -> None:
    cases = [Case(context=30, questions=(1, 2), new_tokens=3), Case(context=55, new_tokens=9)]
    got = ranks(2).run(generate_with_fsdp2, cases)
    assert [tokens(answers) for answers in got] == [by_transformers(case) for case in cases]
    shared = Case(context=30, mode="zigzag_ring_attn")
    got = ranks(2).run(generate_with_fsdp2, [shared, shared])
    assert [tokens(answers) for answers in got] == [by_transformers(shared)] * 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": "END"}, "give a list of strings"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"context_ids": [5, 61]}, "context_ids holds token ids from 5 to 61, but the model's vocabulary is 0 to 60"),
        ({"context_ids": "a text"}, "context_ids is to be a sequence of token ids, .*, not str"),
        ({"context_ids": torch.ones(1, 4, dtype=torch.long)}, r"not Tensor of shape \(1, 4\)"),
        ({"questions": [5, 6]}, r"questions\[0\] is to be a sequence of token ids, .*, not int"),
        ({"context_ids": []}, "both empty"),
    ],
)
def test_wrong_requests_are_refused_before_the_model_runs(settings: dict[str, Any], says: str) -> None:
    model = Case().model()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=says):
        Generator(model, Letters()).answer(**{"context_ids": [4, 5], "max_new_tokens": 3} | settings)


def test_what_is_not_exact_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="give at least 1"):
        Generator(Case().model(), Letters(), prefill_chunk=0)
    dropping = Case(overrides={"attention_dropout": 0.1}).model()
    with pytest.raises(ValueError, match="attention_dropout is 0.1"):
        Generator(dropping, Letters())
    with pytest.raises(ValueError, match="2 or more processes"):
        Generator(Case().model(), Letters(), "zigzag_ring_attn")


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_blocks_cover_the_keys_that_queries_see(step: int, window: int | None) -> None:
    runs, stop, queries = (Run(2, 4, step), Run(20, 7, step), Run(50, 5, step)), 38, Run(38, 6)
    held = [run.start + i * run.step for run in runs for i in range(run.count)]
    seen = torch.zeros(queries.count, len(held), dtype=torch.int)
    for block in prefix.visible_blocks(runs, stop, queries, window):
        rows, columns = block.q.stop - block.q.start, block.k.stop - block.k.start
        seen[block.q, block.k] += block.band.allowed(rows, columns).int()
    want = [[k < stop and (window is None or 38 + q - k < window) for k in held] for q in range(6)]
    assert torch.equal(seen, torch.tensor(want).int())


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("old", "new"), [(0, 1), (0, 5), (7, 1), (7, 5)])
def test_blocks_of_a_tail_are_causal(old: int, new: int, window: int | None) -> None:
    seen = torch.zeros(new, old + new, dtype=torch.int)
    for block in calls.tail_blocks(old, new, window):
        rows, columns = block.q.stop - block.q.start, block.k.stop - block.k.start
        seen[block.q, block.k] += block.band.allowed(rows, columns).int()
    want = [[j <= old + i and (window is None or old + i - j < window) for j in range(old + new)] for i in range(new)]
    assert torch.equal(seen, torch.tensor(want).int())
