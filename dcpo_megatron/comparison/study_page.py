"""A page of headings, paragraphs, tables and pictures, as Markdown and as one HTML file with its pictures inside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcpo_megatron.monitor.pages import picture, render


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

    def source(self) -> str:
        """The picture itself, for HTML. Raises OSError."""
        return picture("png", self.file.read_bytes())


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
    return render("blocks.html", title=title, blocks=[(type(block).__name__, block) for block in blocks])
