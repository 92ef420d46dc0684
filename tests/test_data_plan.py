"""Which documents are drawn: weights, long documents, validation, order."""

import numpy as np
import pytest

from easyctx.data.mix import check_sources, parse_inputs, read_mix
from easyctx.data.packing import OPEN_ROWS, pack
from easyctx.data.plan import Plan, Wishes, make_plan, spread
from easyctx.data.store import Index

RNG = np.random.default_rng(0)
# Source 0: 3,000 documents, few of them long; source 1: 400, half of the tokens in long ones; source 2: none long.
LENGTHS = np.concatenate([RNG.integers(10, 120, 3000), RNG.integers(20, 180, 400), RNG.integers(5, 90, 800)])
SOURCES = np.repeat([0, 1, 2], [3000, 400, 800])
INDEX = Index(LENGTHS, SOURCES, RNG.integers(0, 1 << 63, len(LENGTHS)).astype(np.uint64))
NAMES = ["web", "books", "code"]


def tokens_of(plan: Plan, source: int) -> int:
    return int(LENGTHS[plan.train[SOURCES[plan.train] == source]].sum())


def test_without_wishes_every_document_once_as_read() -> None:
    plan = make_plan(INDEX, NAMES, Wishes())
    np.testing.assert_array_equal(plan.train, np.arange(len(LENGTHS)))
    assert len(plan.validation) == 0
    shuffled = make_plan(INDEX, NAMES, Wishes(shuffle=True)).train
    assert (shuffled != plan.train).any()
    np.testing.assert_array_equal(np.sort(shuffled), plan.train)


def test_weights_are_shares_of_tokens() -> None:
    plan = make_plan(INDEX, NAMES, Wishes(weights=[2, 1, 1]))
    tokens = np.array([tokens_of(plan, source) for source in range(3)])
    np.testing.assert_allclose(tokens / tokens.sum(), [0.5, 0.25, 0.25], atol=2e-3)
    held = np.bincount(SOURCES, LENGTHS)
    assert (tokens <= held).all()
    # As much as can be without repeating: one source is used up, and no document comes twice.
    assert (tokens == held).any()
    assert len(np.unique(plan.train)) == len(plan.train)
    more = make_plan(INDEX, NAMES, Wishes(weights=[2, 1, 1], tokens=1_000_000))
    assert sum(tokens_of(more, source) for source in range(3)) == pytest.approx(1_000_000, rel=1e-3)
    copies = np.bincount(more.train)
    for source in range(3):  # passes are whole but for the last
        assert np.ptp(copies[source == SOURCES]) <= 1


def test_long_documents_are_drawn_within_each_source() -> None:
    natural = [tokens_of(make_plan(INDEX, NAMES, Wishes()), source) for source in range(3)]
    plan = make_plan(INDEX, NAMES, Wishes(long_from=100, long_share=0.65))
    for source, share in ((0, 0.65), (1, None), (2, 0.0)):
        drawn = plan.train[SOURCES[plan.train] == source]
        lengths = LENGTHS[drawn]
        if share is not None:
            assert lengths[lengths >= 100].sum() / lengths.sum() == pytest.approx(share, abs=2e-3)
        # The mix of the sources stays.
        assert lengths.sum() == pytest.approx(natural[source], rel=2e-3)
    own = LENGTHS[SOURCES == 1]
    assert own[own >= 100].sum() / own.sum() > 0.65  # already more: left as it is
    np.testing.assert_array_equal(np.sort(plan.train[SOURCES[plan.train] == 1]), np.flatnonzero(SOURCES == 1))
    np.testing.assert_array_equal(np.sort(plan.train[SOURCES[plan.train] == 2]), np.flatnonzero(SOURCES == 2))


def test_copies_are_far_apart() -> None:
    documents = np.repeat(np.arange(50), 4)
    order = spread(documents, np.random.default_rng(1))
    np.testing.assert_array_equal(np.sort(order), documents)
    for document in range(50):
        quarters = np.flatnonzero(order == document) // 50
        assert len(set(quarters)) >= 3  # one in each quarter, but for those at an edge


def test_seeds() -> None:
    wishes = dict(weights=[1, 1, 1], validation=0.05)
    one, same, other = (make_plan(INDEX, NAMES, Wishes(seed=seed, **wishes)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.train, same.train)
    assert len(one.train) != len(other.train) or (one.train != other.train).any()


def test_validation_is_by_document_and_takes_copies_along() -> None:
    hashes = INDEX.hashes.copy()
    hashes[3000:3400] = hashes[:400]  # books are copies of web pages
    plan = make_plan(Index(LENGTHS, SOURCES, hashes), NAMES, Wishes(validation=0.1))
    assert not set(hashes[plan.train]) & set(hashes[plan.validation])
    assert sorted([*plan.train, *plan.validation]) == [*range(len(LENGTHS))]
    assert (np.bincount(SOURCES[plan.validation]) >= [300, 40, 80]).all()
    tiny = Index(LENGTHS[[0, 1, 3400]], SOURCES[[0, 1, 3400]], hashes[[0, 1, 3400]])
    with pytest.raises(ValueError, match="source code: all 1 documents .*none for training"):
        make_plan(Index(tiny.lengths, np.array([0, 0, 1]), tiny.hashes), ["web", "code"], Wishes(validation=0.1))


def test_a_source_that_gives_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="source empty gives no documents"):
        make_plan(INDEX, [*NAMES, "empty"], Wishes())
    with pytest.raises(ValueError, match=r"source code is to give 1 tokens, but its documents have \d+ at least"):
        make_plan(INDEX, NAMES, Wishes(weights=[1, 1, 3e-5]))


@pytest.mark.parametrize("row_length", [100, 64, 1000])
def test_packing_cuts_nothing_that_fits(row_length: int) -> None:
    documents = [(number, int(length)) for number, length in enumerate(LENGTHS)] + [(9999, 3 * row_length + 1)]
    rows = list(pack(documents, row_length))
    assert all(sum(s.count for s in row) <= row_length for row in rows)
    got: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        for s in row:
            got.setdefault(s.document, []).append((s.start, s.count))
    for document, length in documents:
        tail = length % row_length
        want = [(start, row_length) for start in range(0, length - tail, row_length)]
        want += [(length - tail, tail)] if tail > 1 else []  # a single token predicts nothing
        assert sorted(got.get(document, [])) == want
    filled = sum(s.count for row in rows for s in row) / (len(rows) * row_length)
    assert filled > 0.97
    assert list(pack(documents, row_length)) == rows


def test_open_rows_are_bounded() -> None:
    taken = 0

    def counted():
        nonlocal taken
        for number in range(10 * OPEN_ROWS):
            taken += 1
            yield number, 60

    rows = pack(counted(), 100)
    next(rows)
    assert taken == OPEN_ROWS + 1


def test_sources_on_the_command_line(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:2").mkdir()
    got = [
        (s.path, s.weight) for s in parse_inputs(["books/:0.5", "a:b.jsonl:2e-1", "odd:2", "org/name:3", "plain.txt"])
    ]
    assert got == [("books/", 0.5), ("a:b.jsonl", 0.2), ("odd:2", None), ("org/name", 3.0), ("plain.txt", None)]
    for inputs, message in (
        ([], "no source of text"),
        (["a:0", "b:1"], "source a has the weight 0, which is not positive"),
        (["a:-1", "b:1"], "source a has the weight -1"),
        (["a:1", "b"], r"source a has a weight \(1\) and b has none"),
    ):
        with pytest.raises(ValueError, match=message):
            check_sources(parse_inputs(inputs))


def test_mix_files(tmp_path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text("sources:\n- path: books/\n  weight: 2\n- {path: org/c4, config: en, weight: 1.5, max_tokens: 9}\n")
    books, web = read_mix(str(file))
    assert (books.path, books.weight, web.config, web.weight, web.max_tokens) == ("books/", 2, "en", 1.5, 9)
    for text, message in (
        ("sources: [", "neither YAML nor JSON"),
        ("- a\n", "must hold `sources:`"),
        ('{"sources": []}', "must hold `sources:`"),
        ('{"sources": [{"weight": 1}]}', "source 1 has no `path`"),
        ('{"sources": [{"path": "a", "wieght": 1}]}', "source 1 has wieght, which is none of path, weight"),
        ('{"sources": [{"path": "a", "weight": "much"}]}', "weight is 'much', which is no number"),
        ('{"sources": [{"path": "a", "weight": true}]}', "weight is True, which is no number"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_mix(str(file))
    with pytest.raises(ValueError, match="is no file"):
        read_mix(str(tmp_path / "gone.yaml"))
