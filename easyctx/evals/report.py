"""One page of results: pictures and tables of any number of eval folders, in a single HTML file.

    python eval/report.py output/64k_needle output/64k_perplexity --output report.html
    python eval/report.py output/ --output report.html

Reads the summary.json and the pictures that the evals left; the page needs no other file and no network.
"""

from __future__ import annotations

import argparse
import base64
import json
from html import escape
from pathlib import Path

from easyctx.evals.command import started_as
from easyctx.evals.report_sections import Section, section_of
from easyctx.evals.results import write_text
from easyctx.evals.session import run_main
from easyctx.parser import Parser

SUMMARY_FILE = "summary.json"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; }
img { max-width: 100%; height: auto; margin: .5rem 0; }
h2 { margin-top: 2.5rem; }
p.small, summary { color: #666; font-size: 13px; }
pre { font-size: 12px; overflow-x: auto; background: #f6f6f6; padding: .7rem; }
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=started_as("report"), description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="--output folders of evals, or folders that hold such")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)")
    parser.add_argument("--title", default="Evals", help="of the page (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder; give the name of an .html file")
    sections = [read_section(folder) for folder in result_folders(args.folders)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, page(args.title, sections))
    print(f"report on {len(sections)} results: {args.output}", flush=True)


def result_folders(given: list[Path]) -> list[Path]:
    """The folders with a summary.json at or below those given, in order, each once."""
    found: dict[Path, None] = {}
    for folder in given:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
        below = [file.parent for file in sorted(folder.rglob(SUMMARY_FILE))]
        if not below:
            raise ValueError(f"{folder} holds no {SUMMARY_FILE}: no eval has finished there")
        found.update(dict.fromkeys(below))
    return list(found)


def read_section(folder: Path) -> Section:
    file = folder / SUMMARY_FILE
    try:
        return section_of(folder, json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what an eval of easyctx writes: {error!r}") from error


def page(title: str, sections: list[Section]) -> str:
    """The whole HTML page: an overview of the models, then a section for each result."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        table(*overview(sections)),
    ]
    for section in sections:
        parts += _section(section)
    return "\n".join([*parts, "</body></html>", ""])


def overview(sections: list[Section]) -> tuple[list[str], list[list[str]]]:
    """A row for each model, a column for each result that it is part of."""
    titles = [section.title for section in sections]
    columns = [
        section.title if titles.count(section.title) == 1 else f"{section.title} ({section.folder})"
        for section in sections
    ]
    # The same eval of several models in several folders is one column.
    shared: dict[str, dict[str, str]] = {}
    for section, long_name in zip(sections, columns, strict=True):
        column = shared.setdefault(section.title, {})
        if column.keys() & section.headlines.keys():
            column = shared.setdefault(long_name, {})
        column.update(section.headlines)
    labels = list(dict.fromkeys(label for column in shared.values() for label in column))
    return ["model", *shared], [[label, *(column.get(label, "") for column in shared.values())] for label in labels]


def _section(section: Section) -> list[str]:
    parts = [f"<h2>{escape(section.title)}</h2>", f'<p class="small">{escape(str(section.folder))}</p>']
    parts += [table(*each) for each in section.tables]
    parts += [_picture(file) for file in section.pictures]
    settings = json.dumps(section.settings, indent=1, ensure_ascii=False)
    parts.append(f"<details><summary>settings and versions</summary><pre>{escape(settings)}</pre></details>")
    return parts


def _picture(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<p><img alt="{escape(file.name)}" src="data:image/png;base64,{data}"></p>'


def table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line(header, "th"), *(line(row, "td") for row in rows), "</table>"])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_main(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
