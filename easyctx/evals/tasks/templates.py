"""Wording of the prompts: our own by default; a JSON file replaces any of it."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from easyctx.evals.textio import read_text

PLACEHOLDER = re.compile(r"{(\w+)}")


def add_template_argument(parser: argparse.ArgumentParser, defaults: dict[str, str]) -> None:
    """--templates FILE, with the names and placeholders of the defaults in its help."""
    known = ", ".join(sorted(defaults))
    parser.add_argument(
        "--templates",
        type=Path,
        metavar="FILE",
        help=f"JSON object of texts that replace the prompts' wording, with the same {{placeholders}}: {known}",
    )


def read_templates(file: Path | None, defaults: dict[str, str]) -> dict[str, str]:
    """The defaults with what the file replaces. Raises ValueError for names or placeholders that do not exist."""
    if file is None:
        return defaults
    try:
        given = json.loads(read_text(file))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--templates {file} is not a JSON file: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise ValueError(f"--templates {file} is not an object of texts")
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        raise ValueError(f"--templates {file} has {unknown[0]!r}; known are {', '.join(sorted(defaults))}")
    for name, text in given.items():
        known, used = (set(PLACEHOLDER.findall(each)) for each in (defaults[name], text))
        if used != known:
            wanted = ", ".join(f"{{{each}}}" for each in sorted(known)) or "no placeholder"
            raise ValueError(f"--templates {file}: {name!r} must hold {wanted}, it is {text!r}")
    return {**defaults, **given}


def fill(template: str, **values: object) -> str:
    """Puts the values in place of {name}s; other braces stay, also in the values."""
    return PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), template)
