"""A page of headings, paragraphs, tables and pictures, as Markdown and as one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1a1a1a;
  background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2rem }
img { max-width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
.reproduced { color: #116329; font-weight: 600 } .not-reproduced { color: #a40e26; font-weight: 600 }
.undecided, .not-measured { color: #6b5900; font-weight: 600 }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #161616 } th, td { border-color: #444 }
  img { background: #fff }
  .reproduced { color: #57c76c } .not-reproduced { color: #ff7b8a } .undecided, .not-measured { color: #e0c64a } }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """``mark``: the column whose text is also the class of its cell in HTML, such as a verdict."""

    head: list[str]
    rows: list[list[str]]
    mark: int | None = None


@dataclass(frozen=True)
class Picture:
    """``file``: a PNG beside the Markdown file."""

    file: Path
    caption: str


Block = Heading | Paragraph | Table | Picture


def as_markdown(blocks: list[Block]) -> str:
    """The page as Markdown, with links to its pictures."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Paragraph):
            parts.append(block.text)
        elif isinstance(block, Table):
            lines = [block.head, ["---"] * len(block.head), *block.rows]
            parts.append(
                "\n".join("| " + " | ".join(cell.replace("\n", "<br>") for cell in row) + " |" for row in lines)
            )
        else:
            parts.append(f"![{block.caption}]({block.file.name})")
    return "\n\n".join(parts) + "\n"


def as_html(blocks: list[Block], title: str) -> str:
    """The page as one HTML file. Raises OSError where a picture cannot be read."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h{block.level}>{html.escape(block.text)}</h{block.level}>")
        elif isinstance(block, Paragraph):
            parts.append(f"<p>{html.escape(block.text)}</p>")
        elif isinstance(block, Table):
            parts.append(f'<div class="scroll"><table>{_table(block)}</table></div>')
        else:
            data = base64.b64encode(block.file.read_bytes()).decode()
            caption = html.escape(block.caption)
            parts.append(f'<p><img alt="{caption}" src="data:image/png;base64,{data}"></p>')
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f' initial-scale=1"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _table(table: Table) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head) + "</tr>"]
    for row in table.rows:
        cells = []
        for place, cell in enumerate(row):
            mark = f' class="{cell.replace(" ", "-")}"' if place == table.mark else ""
            cells.append(f"<td{mark}>" + html.escape(cell).replace("\n", "<br>") + "</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join(lines)
