"""The rows of a stage: novels in which recall tasks are hidden, and LongChat's records of lines.

    python -m train_scripts.proof.rows --text output/proof/text --tokenizer output/proof/start \\
        --length 2048 --rows 40000 --output output/proof/rows/2k

Writes a folder that the train loop reads, of `input_ids` and `labels`. Distances between what is told and where it
is asked for are short as often as long, so that every length has all shorter ones in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from easyctx.data.load import load_tokenised
from easyctx.data.rows import RowWriter
from easyctx.data.store import without_loss
from easyctx.evals.needle_settings import PREFIX
from easyctx.evals.tasks.longchat_prompts import LINES
from train_scripts.proof.tasks import COPY_SHARE, Piece, Tasks, line_keys, line_number

# Recall begins in short rows that are full of tasks, with little else to learn; text comes in as rows grow.
CROWDED = 512  # tokens of a row, up to which tasks may fill it
LINES_SHARE = 0.4  # of the rows; the others are text
TASK_SHARES, CROWDED_SHARES = (0.25, 0.6), (0.6, 1.0)  # of the tokens of a short text, told and asked together
ASKED_AGAIN = 0.5  # chance that what was asked is asked once more: more to learn for the same tokens
MOST_PAIRS = 256  # in one text
LEAST_LENGTH = 64  # of a row: room for the longest thing told and asked
QUESTION_SHARE = 0.25  # of the tokens of a record with its questions
MOST_QUESTIONS = 400
LINE_AGAIN = 0.3  # share of questions that are the line again: easier, and the others are learnt from it
SHORTEST_RECORD = 160  # tokens, with what LongChat says before it; shorter rows have a few lines and questions
AT_END = 0.25  # share of questions after all the text, as in the evals
TEXT_TO_ANSWERS = {128: 0.25, CROWDED: 0.5, 4096: 2, 1 << 62: 4}  # learnt tokens of text for one of an answer, up to
ROWS_AT_ONCE = 1 << 18  # tokens to a piece of work


class Rows:
    """Draws rows of `length` tokens."""

    def __init__(self, text: np.ndarray, tasks: Tasks, length: int, text_to_answers: float | None = None) -> None:
        self.text, self.tasks, self.length = text, tasks, length
        by_length = next(ratio for longest, ratio in TEXT_TO_ANSWERS.items() if length <= longest)
        self.text_to_answers = by_length if text_to_answers is None else text_to_answers
        # Words can take several tokens: the most of some keys, and a little.
        keys = line_keys(np.random.default_rng(0), 64)
        self.line_length = max(len(tasks.line(key, "00000", learnt=False)) for key in keys) + 1
        self.question_length = max(len(tasks.line_question(key, "00000")) for key in keys) + 2
        self.task_shares = CROWDED_SHARES if length <= CROWDED else TASK_SHARES

    def draw(self, rng: np.random.Generator) -> Piece:
        return self.lines(rng) if rng.random() < LINES_SHARE else self.novel(rng)

    def novel(self, rng: np.random.Generator) -> Piece:
        """A stretch of a novel with tasks in it."""
        has_prefix = self.length >= SHORTEST_RECORD and rng.random() < 0.5
        prefix = [self.tasks.plain(PREFIX)] if has_prefix else []
        room = self.length - sum(map(len, prefix))
        asked = self._asked(rng, room)
        num_text = room - sum(len(told) + sum(map(len, again)) for told, again in asked)
        placed = list(_placed(rng, asked, num_text))
        rng.shuffle(placed)  # type: ignore[arg-type]
        placed.sort(key=lambda item: item[:2])
        start = int(rng.integers(len(self.text) - num_text))
        running = self.text[start : start + num_text].astype(np.int32)
        num_answers = sum(int(piece.learnt.sum()) for _, _, piece in placed)
        is_learnt = rng.random(num_text) < (self.text_to_answers * num_answers / max(num_text, 1) if num_answers else 1)
        parts, here = prefix, 0
        for place, _, piece in placed:
            parts += [Piece(running[here:place], is_learnt[here:place]), piece]
            here = place
        return _joined([*parts, Piece(running[here:], is_learnt[here:])])

    def _asked(self, rng: np.random.Generator, room: int) -> list[tuple[Piece, list[Piece]]]:
        """What is told, and asked for once or more; at least one that fits."""
        taken: set[str] = set()
        asked: list[tuple[Piece, list[Piece]]] = []
        left = rng.uniform(*self.task_shares) * room
        while len(asked) < MOST_PAIRS:
            is_copy = rng.random() < COPY_SHARE
            pair = self.tasks.copy(rng, self.text) if is_copy else self.tasks.pair(rng, taken)
            size = len(pair.told) + len(pair.asked)
            if size > left and (asked or size > room):
                if asked:
                    break
                continue
            left -= size
            asked.append((pair.told, [pair.asked]))
            while len(pair.asked) <= left and rng.random() < ASKED_AGAIN:
                left -= len(pair.asked)
                asked[-1][1].append(pair.asked)
        return asked

    def lines(self, rng: np.random.Generator) -> Piece:
        """Records of lines with questions on each; what is left is a novel, without loss."""
        parts = self._few_lines(rng) if self.length < SHORTEST_RECORD else []
        left = self.length - sum(map(len, parts))
        while left >= SHORTEST_RECORD:
            size = left if rng.random() < 0.5 else max(SHORTEST_RECORD, int(left ** rng.uniform(0.6, 1)))
            parts += self._record(rng, size)
            left = self.length - sum(map(len, parts))
        left = max(left, 0)
        start = int(rng.integers(len(self.text) - self.length))
        ids = self.text[start : start + left].astype(np.int32)
        row = _joined([*parts, Piece(ids, np.zeros(left, dtype=bool))])
        return Piece(row.ids[: self.length], row.learnt[: self.length])

    def _few_lines(self, rng: np.random.Generator) -> list[Piece]:
        """Some lines and as many questions on them as there is room for, at least a line again."""
        most = max(self.length // self.line_length - 1, 1)
        lines = [(key, line_number(rng)) for key in line_keys(rng, int(rng.integers(1, most + 1)))]
        parts = [self.tasks.line(*line, learnt=False) for line in lines]
        left = self.length - sum(map(len, parts))
        while left >= self.line_length:
            line = lines[rng.integers(len(lines))]
            asked = self._question(rng, line)
            parts.append(asked if len(asked) <= left else self.tasks.line(*line, learnt=True))
            left -= len(parts[-1])
        return parts

    def _question(self, rng: np.random.Generator, line: tuple[str, str]) -> Piece:
        again = rng.random() < LINE_AGAIN
        return self.tasks.line(*line, learnt=True) if again else self.tasks.line_question(*line)

    def _record(self, rng: np.random.Generator, size: int) -> list[Piece]:
        """A record with questions of about `size` tokens together, rather fewer than more."""
        tasks = self.tasks
        intro = tasks.plain(LINES["lines_intro"])
        num_questions = min(max(int(QUESTION_SHARE * size) // self.question_length, 1), MOST_QUESTIONS)
        num_lines = max((size - len(intro) - num_questions * self.question_length) // self.line_length, 2)
        lines = [(key, line_number(rng)) for key in line_keys(rng, num_lines)]
        questions = [self._question(rng, lines[asked]) for asked in rng.integers(num_lines, size=num_questions)]
        return [intro, *(tasks.line(*line, learnt=False) for line in lines), *questions]


def _placed(
    rng: np.random.Generator, tasks: list[tuple[Piece, list[Piece]]], num_text: int
) -> Iterator[tuple[int, int, Piece]]:
    """(tokens of text before it, order there, piece)."""
    for told, asked in tasks:
        first = num_text if rng.random() < AT_END else int(rng.integers(num_text + 1))
        distance = rng.random() * first if rng.random() < 0.5 else (first + 1) ** rng.random() - 1
        place = first - int(distance)
        yield place, 0, told
        yield first, 1, asked[0]
        for again in asked[1:]:
            yield int(rng.integers(place, num_text + 1)), 1, again


def _joined(parts: list[Piece]) -> Piece:
    return Piece(np.concatenate([part.ids for part in parts]), np.concatenate([part.learnt for part in parts]))


def read_stream(folder: str) -> np.ndarray:
    """The tokens of a folder that `easyctx data` made, row after row: [T] int32."""
    rows = load_tokenised(folder).with_format("numpy")
    return np.concatenate([np.asarray(batch).reshape(-1) for batch in rows["input_ids"]]).astype(np.int32)


@cache
def _drawer(text: str, tokenizer: str, length: int, text_to_answers: float | None) -> Rows:
    """Made once in each process."""
    return Rows(read_stream(text), Tasks(AutoTokenizer.from_pretrained(tokenizer)), length, text_to_answers)


def _draw_some(work: tuple[tuple[str, str, int, float | None], int, range]) -> list[np.ndarray]:
    """Some rows by number, as `easyctx.data.store` keeps tokens; each follows from the seed and its number alone."""
    settings, seed, numbers = work
    rows = _drawer(*settings)
    drawn = [rows.draw(np.random.default_rng([seed, number])) for number in numbers]
    return [np.where(row.learnt, row.ids, without_loss(row.ids)) for row in drawn]


def write_rows(args: argparse.Namespace) -> None:
    if args.length < LEAST_LENGTH:
        raise ValueError(f"--length is {args.length}, and the longest task takes {LEAST_LENGTH} tokens")
    num_tokens = len(read_stream(str(args.text)))
    if num_tokens <= args.length:
        raise ValueError(f"--text {args.text} has {num_tokens:,} tokens, too few for rows of --length {args.length:,}")
    partial = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    at_once = max(1, ROWS_AT_ONCE // args.length)
    settings = (str(args.text), str(args.tokenizer), args.length, args.text_to_answers)
    numbers = [range(args.rows)[first : first + at_once] for first in range(0, args.rows, at_once)]
    work = [(settings, args.seed, some) for some in numbers]
    with (
        get_context("spawn").Pool(args.processes) as pool,
        RowWriter(partial, args.length, labels=True) as writer,
    ):
        for number, rows in enumerate(tqdm(pool.imap(_draw_some, work), total=len(work), desc=args.output.name)):
            for row in rows:
                writer.add(row, number)
        pool.close()  # the processes end by themselves: killed, they would leave tqdm's semaphores behind
        pool.join()
        writer.finish()
        writer.save()
    shutil.rmtree(args.output, ignore_errors=True)
    os.replace(partial, args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of `easyctx data`: the novels")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--length", type=int, required=True, help="tokens of a row")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument(
        "--text-to-answers", type=float, help="learnt tokens of text for one of an answer (default: by length)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    args = parser.parse_args()
    try:
        write_rows(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
