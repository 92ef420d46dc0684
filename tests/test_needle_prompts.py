"""Needle prompts, for any tokenizer: exact length, the needle in its place, the answer's own tokens."""

import random
import re
from functools import cache

import pytest

from easyctx.evals import encoding, needle_settings
from easyctx.evals.encoding import PieceEncoder, Span
from easyctx.evals.haystack import MAX_OVERSHOOT, SENTENCE_END, Haystack
from easyctx.evals.needle_prompts import NeedlePrompts, Prompt
from easyctx.evals.needle_settings import Cell, NeedleSettings, check_numbers
from easyctx.evals.numbers import CITIES, _permute, needle_number
from tests.eval_helpers import TOKENIZERS, encoder, english, tokenizer, tokens_of

FAST = sorted(set(TOKENIZERS) - {"slow"})
SHORT = NeedleSettings(prefix="", needle="[K={number}]", question=" ", answer_stub="[K=", digits=4)


@cache
def builder(name: str, settings: NeedleSettings | None = None, max_length: int = 6000) -> NeedlePrompts:
    return NeedlePrompts(encoder(name), english(), max_length, settings or NeedleSettings())


def needle_of(prompt: Prompt) -> str:
    found = re.search(r"The special magic \w+ number is " + prompt.answer + r"\.", prompt.text)
    assert found
    return found.group()


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_prompt_is_the_tokenised_text_of_exactly_the_length(name: str) -> None:
    prompts = builder(name)
    lengths = (500, 777, 1024, 6000) if name != "slow" else (500, 1024)
    for length in lengths:
        for depth in (0, 10, 33.3, 50, 90, 100):
            prompt = prompts.build(Cell(length, depth, 0))
            assert tokens_of(prompt.ids) == tokenizer(name)(prompt.text)["input_ids"]
            assert len(prompt.ids) == length
            assert prompt.text.count(needle_of(prompt)) == 1
            assert prompt.text.endswith(f"number is {prompt.answer}")
            decoded = tokenizer(name).decode(prompt.ids[prompt.answer_start :].tolist())
            assert decoded.strip() == prompt.answer


@pytest.mark.parametrize(("name", "bos"), [("byte_bpe", 0), ("metaspace_bpe", 1), ("unigram", 1), ("slow", 1)])
def test_bos_follows_the_tokenizers_policy(name: str, bos: int) -> None:
    prompt = builder(name).build(Cell(600, 50, 0))
    assert encoder(name).leading == [1] * bos
    if bos:
        assert tokens_of(prompt.ids).count(1) == 1
        assert prompt.ids[0] == 1


def test_eos_policy_is_left_out() -> None:
    from tokenizers import processors

    with_eos = TOKENIZERS["metaspace_bpe"]()
    with_eos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert encoding.leading_special_ids(with_eos) == [1]


@pytest.mark.parametrize("name", FAST)
def test_taken_over_haystack_tokens_are_those_of_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = PieceEncoder(encoder(name), english(), margin=200)
    longest = 0
    original = encoding.TextEncoder.encode

    def spy(self: encoding.TextEncoder, text: str) -> encoding.Encoded:
        nonlocal longest
        longest = max(longest, len(text))
        return original(self, text)

    monkeypatch.setattr(encoding.TextEncoder, "encode", spy)
    rng = random.Random(0)
    for _ in range(8):
        a, b, c = sorted(rng.sample(range(len(english())), 3))
        longest = 0
        laid_out: list[str | Span] = ["Prefix:", Span(0, a), " new text. ", Span(a, b), "x", Span(b, c), "\nEnd 12345"]
        got = pieces.encode_pieces(laid_out)
        assert longest < 2000  # nothing but the borders was tokenised
        want = original(encoder(name), pieces.text_of(laid_out))
        for field in ("ids", "starts", "ends"):
            assert getattr(got, field).tolist() == getattr(want, field).tolist()


def test_borders_that_never_meet_fall_back_to_the_whole_text() -> None:
    """A tokenizer whose tokens all depend on how far it is to the end of its text."""

    class Restless(encoding.TextEncoder):
        def encode(self, text: str) -> encoding.Encoded:
            encoded = super().encode(text)
            return encoding.Encoded(encoded.ids[::-1].copy().cumsum()[::-1], encoded.starts, encoded.ends)

    pieces = PieceEncoder(Restless(tokenizer("bytes")), english()[:20_000], margin=300)
    laid_out: list[str | Span] = [Span(0, 5000), "new", Span(5000, 20_000), "end"]
    got = pieces.encode_pieces(laid_out)
    assert got.ids.tolist() == pieces.encoder.encode(pieces.text_of(laid_out)).ids.tolist()


def test_needle_follows_the_first_sentence_end_at_or_past_the_depth() -> None:
    prompts = builder("byte_bpe", max_length=6000)
    settings = prompts.settings
    for depth in (10, 20, 35, 50, 65, 80, 90):
        prompt = prompts.build(Cell(6000, depth, 0))
        body = prompt.text[len(settings.prefix) :]
        at = body.index(needle_of(prompt))
        before = body[:at].rstrip(" ")
        book = body[: body.index("\n</book>")].replace(needle_of(prompt), "")
        ends = [match.end() for match in SENTENCE_END.finditer(prompts.haystack.text)]
        assert len(before) in ends
        # The haystack is cut after the needle is placed, so the depth is met up to a token or two.
        earlier = [end for end in ends if end < len(before)]
        assert len(before) >= depth / 100 * len(book) - 20
        assert earlier[-1] < depth / 100 * len(book) + 20


def test_depth_goes_from_first_to_last_without_overshoot() -> None:
    for length in (400, 6000):
        prompts = builder("byte_bpe")
        starts = []
        for depth in range(0, 101, 10):
            prompt = prompts.build(Cell(length, depth, 0))
            assert prompt.needle_start is not None
            starts.append(prompt.needle_start)
            room = prompt.text.index("\n</book>") - len(prompts.settings.prefix) - len(needle_of(prompt))
            reached = (prompt.text.index(needle_of(prompt)) - len(prompts.settings.prefix)) / room
            assert depth / 100 - 0.02 <= reached <= depth / 100 + MAX_OVERSHOOT + 0.02
        assert starts == sorted(starts)
        first, last = prompts.build(Cell(length, 0, 0)), prompts.build(Cell(length, 100, 0))
        assert first.text.startswith(prompts.settings.prefix + needle_of(first))
        assert last.text.split(needle_of(last))[1].startswith("\n</book>")
        decoded = encoder("byte_bpe").decode(last.ids[last.needle_start :])
        assert decoded.strip().startswith(needle_of(last))


@pytest.mark.parametrize("name", ["byte_bpe", "metaspace_bpe"])
def test_a_prompt_does_not_depend_on_the_rest_of_the_grid(name: str) -> None:
    small, big = builder(name, max_length=1500), builder(name, max_length=20_000)
    cells = [Cell(length, depth, sample) for length in (700, 1500) for depth in (0, 50, 100) for sample in (0, 1)]
    want = {cell: small.build(cell).hash for cell in cells}
    assert {cell: big.build(cell).hash for cell in reversed(cells)} == want
    assert len(set(want.values())) == len(cells)
    other_seed = builder(name, NeedleSettings(seed=7))
    assert all(other_seed.build(cell).hash != want[cell] for cell in cells)


def test_cells_never_share_a_number() -> None:
    grid = [Cell(50_000 * k, depth, s) for k in range(1, 21) for depth in range(0, 101, 10) for s in range(5)]
    quickstart = [Cell(256 * 2**k, depth, s) for k in range(5) for depth in range(0, 101, 10) for s in range(8)]
    for seed in range(3):
        check_numbers(NeedleSettings(seed=seed), grid)
        check_numbers(NeedleSettings(seed=seed, digits=4), quickstart)
    numbers = {needle_number(1, 7, cell.length, cell.depth, cell.sample) for cell in grid}
    assert len(numbers) == len(grid)
    assert all(len(number) == 7 and number[0] != "0" for number in numbers)
    with pytest.raises(ValueError, match=r"same number.*--digits 3"):
        check_numbers(NeedleSettings(digits=2), grid)


def test_permutation_is_one() -> None:
    assert sorted(_permute(index, 900, "key") for index in range(900)) == list(range(900))


def test_distractors_name_other_cities_and_numbers() -> None:
    prompts = builder("byte_bpe", NeedleSettings(distractors=3))
    layouts = set()
    for sample in range(3):
        prompt = prompts.build(Cell(3000, 50, sample))
        hidden = re.findall(r"The special magic (\w+) number is (\d{7})\.", prompt.text)
        assert len(prompt.ids) == 3000
        assert len({city for city, _ in hidden}) == len({number for _, number in hidden}) == 4
        assert [city for city, number in hidden if number == prompt.answer] == re.findall(
            r"Question: What is the special magic (\w+)", prompt.text
        )
        layouts.add(tuple(match.start() for match in re.finditer("The special magic", prompt.text)))
    assert len(layouts) == 3


@pytest.mark.parametrize("name", ["byte_bpe", "metaspace_bpe", "gemma"])
def test_several_needles_lie_from_the_depth_on_and_are_all_asked_for(name: str) -> None:
    several = NeedleSettings(
        needles=3, distractors=2, question=needle_settings.QUESTION_FOR_SEVERAL,
        answer_stub=needle_settings.ANSWER_STUB_FOR_SEVERAL,
    )  # fmt: skip
    prompts = builder(name, several)
    for length, depth in ((2000, 0), (2001, 40), (3000, 100)):
        prompt = prompts.build(Cell(length, depth, 0))
        hidden = re.findall(r"The special magic (\w+) number is (\d{7})\.", prompt.text)
        asked = re.findall(r"magic numbers of ([\w, ]+), in this order", prompt.text)[0].split(", ")
        by_city = dict(hidden)
        assert len(prompt.ids) == length
        assert len(by_city) == len(set(by_city.values())) == len(hidden) == 5
        assert prompt.answer == ", ".join(by_city[city] for city in asked)
        assert prompt.text.endswith(f"are, in this order, {prompt.answer}")
        assert encoder(name).decode(prompt.ids[prompt.answer_start :]).strip() == prompt.answer
        begins = [prompt.text.index(f"The special magic {city} number is") for city in asked]
        assert begins == sorted(begins)
        end = prompt.text.index("\n</book>")
        for i, begin in enumerate(begins):
            assert begin / end == pytest.approx(depth / 100 + (1 - depth / 100) * i / 3, abs=0.15)


def test_templates_without_a_city_at_256_bytes() -> None:
    prompts = NeedlePrompts(encoder("bytes"), english(), 2048, SHORT)
    for length in (64, 256, 1024, 2048):
        for depth in (0, 30, 100):
            prompt = prompts.build(Cell(length, depth, 0))
            assert len(prompt.ids) == len(prompt.text.encode()) == length
            assert prompt.text.endswith(f" [K={prompt.answer}")
            assert prompt.text.count(f"[K={prompt.answer}]") == 1
            assert prompt.ids[prompt.answer_start :].tolist() == tokenizer("bytes")(prompt.answer)["input_ids"]


def test_shifted_haystacks_begin_with_other_sentences() -> None:
    prompts = NeedlePrompts(encoder("bytes"), english()[:9000], 512, NeedleSettings(digits=4, shift_haystack=True))
    begins = {prompts.build(Cell(512, 100, sample)).text[len(prompts.settings.prefix) :][:40] for sample in range(4)}
    assert len(begins) == 4


def test_a_short_haystack_is_repeated() -> None:
    prompts = NeedlePrompts(encoder("byte_bpe"), "One sentence. Another one.", 1000, NeedleSettings())
    prompt = prompts.build(Cell(1000, 50, 0))
    assert len(prompt.ids) == 1000
    assert prompt.text.count("Another one.") > 20


def test_characters_of_several_tokens_are_made_up_for() -> None:
    """Three bytes a character: two of three lengths are met only with a filler."""
    prompts = NeedlePrompts(encoder("bytes"), "書を読むことは楽しい。" * 50, 700, SHORT)
    for length in range(600, 607):
        prompt = prompts.build(Cell(length, 50, 0))
        assert len(prompt.ids) == len(prompt.text.encode()) == length


def test_chinese_sentences_end_without_a_space() -> None:
    haystack = Haystack(encoder("bytes"), "書を読む。空を見る。", 100)
    assert haystack.sentence_end(1) == 5


@pytest.mark.parametrize("name", ["byte_bpe", "slow"])
def test_too_short_a_length_names_both_numbers(name: str) -> None:
    prompts = builder(name)
    with pytest.raises(ValueError, match=r"--lengths has 20, but .* take \d+; give at least \d+"):
        prompts.check_length(20)
    with pytest.raises(ValueError, match="--lengths has 20"):
        prompts.build(Cell(20, 50, 0))


def test_a_number_that_the_tokenizer_cannot_spell_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["?", *sorted(set(re.findall(r"\w+|[^\w\s]", english())))])}
    words = {word: number for word, number in words.items() if not word.isdigit()}
    tokens = Tokenizer(models.WordLevel(vocab=words, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    prompts = NeedlePrompts(
        encoding.TextEncoder(PreTrainedTokenizerFast(tokenizer_object=tokens)), english(), 500, NeedleSettings()
    )
    with pytest.raises(ValueError, match="cannot spell the answer"):
        prompts.build(Cell(300, 50, 0))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"needle": "no number"}, "no {number}"),
        ({"needle": "[K={number}]"}, "names a {city}"),
        ({"digits": 0}, "--digits is 0"),
        ({"distractors": len(CITIES)}, f"at most {len(CITIES)}"),
        ({"needles": 0}, "--needles is 0"),
        ({"needle": "{number}", "question": "?", "answer_stub": "", "distractors": 1}, "need {city}"),
        ({"needles": 2, "depth_by": "position"}, "--needles 2 lie at fractions"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        NeedleSettings(**wrong)


@pytest.mark.parametrize("depth", [-1, 100.5])
def test_a_depth_outside_is_refused(depth: float) -> None:
    with pytest.raises(ValueError, match="outside 0 to 100"):
        Cell(100, depth, 0)
