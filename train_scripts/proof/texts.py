"""Novels as plain text, one paragraph a line: what training, haystacks and perplexity read.

python -m train_scripts.proof.texts --input BOOKS/ --output output/proof/texts/train
"""

from __future__ import annotations

import argparse
import gzip
import re
from pathlib import Path

from train_scripts.quickstart.folders import write_text

PARAGRAPH_BORDER = re.compile(r"\n\s*\n")


def unwrapped(text: str) -> str:
    """The text with the line breaks inside paragraphs, which are the edition's, as spaces."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in PARAGRAPH_BORDER.split(text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def read_text(path: Path) -> str:
    """A .txt or .txt.gz file; ValueError where it is not UTF-8."""
    try:
        return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def convert(source: Path, target: Path) -> list[Path]:
    """Writes every text of a folder, unwrapped, into another; the files written. ValueError where there is none."""
    files = sorted([*source.glob("*.txt"), *source.glob("*.txt.gz")])
    if not files:
        raise ValueError(f"{source} holds no .txt and no .txt.gz: give a folder of novels")
    written = [target / file.name.removesuffix(".gz") for file in files]
    for file, made in zip(files, written, strict=True):
        write_text(made, unwrapped(read_text(file)))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="folder of .txt or .txt.gz")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    args = parser.parse_args()
    try:
        written = convert(args.input, args.output)
    except ValueError as error:
        parser.error(str(error))
    write_text(args.output / ".made", "\n".join(path.name for path in written) + "\n")


if __name__ == "__main__":
    main()
