"""RULER: prompts that solvers written apart can solve, of exact lengths, with what NVIDIA hides in them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from easyctx.evals.encoding import Encoded, TextEncoder
from easyctx.evals.tasks import ruler, ruler_draft
from easyctx.evals.tasks.ruler_groups import Sources
from easyctx.evals.tasks.ruler_lists import zipf_counts
from easyctx.evals.tasks.ruler_qa import Collection
from easyctx.evals.tasks.ruler_tasks import TASKS, TEMPLATES
from tests.eval_helpers import english
from tests.ruler_helpers import build, read_sources, solve, write_sources


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Collection]:
    return read_sources(write_sources(tmp_path_factory.mktemp("sources")))


@pytest.mark.parametrize("name", ["byte_bpe", "bytes", "metaspace_bpe"])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_their_length_and_can_be_solved(task: str, name: str, collections: dict[str, Collection]) -> None:
    sources = Sources(TEMPLATES, 42, english(), collections)
    for length in (4096, 5003) if name == "byte_bpe" else (6007,):
        text, question = build(task, length, sources, name)
        assert len(question.ids) == length - TASKS[task].max_new_tokens
        if name == "bytes":
            assert len(text.encode()) == len(question.ids)
        solved = solve(text)
        if task.startswith("qa"):
            assert any(solved in reference or reference in solved for reference in question.references)
        else:
            assert set(solved.split()) == set(question.references)
        assert TASKS[task].score(" ".join(question.references), question.references) == 1.0


def test_what_is_hidden_is_what_nvidia_hides(collections: dict[str, Collection]) -> None:
    sources = Sources(TEMPLATES, 42, english(), collections)

    def needles(task: str) -> tuple[int, int, int]:
        text, question = build(task, 4096, sources)
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
        return len({key for key, _ in found}), len(found), len(question.references)

    assert needles("niah_single_1") == needles("niah_single_2") == needles("niah_single_3") == (1, 1, 1)
    assert needles("niah_multikey_1") == (4, 4, 1)
    assert needles("niah_multivalue") == (1, 4, 4)
    assert needles("niah_multiquery") == (4, 4, 4)
    for task in ("niah_multikey_2", "niah_multikey_3"):
        keys, found, asked = needles(task)
        assert keys == found > 40
        assert asked == 1
    text, _ = build("cwe", 4096, sources)
    counts = Counter(re.findall(r"\d+\. ([a-z-]+)", text[text.rindex("numbered list") :])).values()
    assert sorted(counts)[-10:] == [30] * 10
    assert Counter(counts)[3] > 30
    assert len(build("vt", 4096, sources)[1].references) == 5


def test_a_samples_needles_do_not_depend_on_length_or_tokenizer(collections: dict[str, Collection]) -> None:
    sources = Sources(TEMPLATES, 42, english(), collections)
    for task in TASKS:
        small, big = (build(task, length, sources)[1] for length in (3800, 6000))
        assert small.references == big.references or task == "fwe"
        again = build(task, 3800, Sources(TEMPLATES, 42, english(), collections))[1]
        assert small.ids.tolist() == again.ids.tolist()
        other = build(task, 3800, sources, sample=1)[1]
        assert small.ids.tolist() != other.ids.tolist()


@pytest.mark.parametrize("task", ["cwe", "fwe", "qa_1", "vt", "niah_multikey_2"])
def test_a_long_prompt_is_tokenised_once(
    task: str, collections: dict[str, Collection], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, tokenised = Sources(TEMPLATES, 42, english(), collections), []
    original = TextEncoder.encode

    def spy(self: TextEncoder, text: str) -> Encoded:
        tokenised.append(len(text))
        return original(self, text)

    monkeypatch.setattr(TextEncoder, "encode", spy)
    monkeypatch.setattr(ruler_draft, "STRETCH", 512)  # shorter, as the prompt is
    monkeypatch.setattr(ruler_draft, "LONG", 10_000)
    text, question = build(task, 30_000, sources)
    assert len(question.ids) == 30_000 - TASKS[task].max_new_tokens
    assert task == "qa_1" or set(solve(text).split()) == set(question.references)
    assert sum(length > len(text) / 4 for length in tokenised) == 1
    # What was estimated wrongly is counted.
    for estimated in (20, 2 * len(question.ids)):
        monkeypatch.setattr(ruler_draft, "LONG", 2_000)
        monkeypatch.setattr(ruler_draft, "_estimated_units", lambda *_, units=estimated: units // 10)
        assert len(build(task, 4096, sources)[1].ids) == 4096 - TASKS[task].max_new_tokens


def test_frequencies_follow_zipf() -> None:
    assert zipf_counts(3, 49, 2.0) == [36, 9, 4]


def test_other_wording(tmp_path: Path, collections: dict[str, Collection]) -> None:
    file = tmp_path / "templates.json"
    file.write_text(json.dumps({"needle": "{key} hides the {kind} {value} here."}))
    templates = ruler.read_templates(file, TEMPLATES)
    text, question = build("niah_single_2", 4096, Sources(templates, 42, english(), collections))
    assert f"hides the numbers {question.references[0]} here." in text
