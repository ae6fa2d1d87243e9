"""Pages of Markdown that are made from a template and numbers: tables, and text filled to the width of a page."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 120
"""The longest line of a page; tables and pictures may be longer."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown.

    Args:
        head: Titles of the columns.
        rows: The cells of each row.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page from a template of Jinja. A value that the template names and that is not there is an error.

    Args:
        template: The text of the template.
        values: The values that it names.
    """
    import jinja2  # the extra `lab` has it

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    return wrapped(environment.from_string(template).render(**values))


def wrapped(page: str) -> str:
    """A page with its paragraphs and list items filled to the width; tables, code, quotes and pictures stay as they are.

    Args:
        page: Text of Markdown.
    """
    blocks: list[str] = []
    for i, part in enumerate(page.split("```")):
        if i % 2:
            blocks.append(f"```{part}```")
            continue
        for block in part.strip("\n").split("\n\n"):
            if block.startswith(("|", "#", "!", ">")):
                blocks.append(block)
            elif block.startswith("* "):
                items = block[2:].split("\n* ")
                blocks.append("\n".join(_filled(x, "* ", "  ") for x in items))
            elif block.strip():
                blocks.append(_filled(block, "", ""))
    return "\n\n".join(blocks) + "\n"


def _filled(words: str, first: str, other: str) -> str:
    return textwrap.fill(
        " ".join(words.split()),
        WIDTH,
        initial_indent=first,
        subsequent_indent=other,
        break_long_words=False,
        break_on_hyphens=False,
    )
