"""Hooks of `mkdocs build`: pages that also read well as plain files become pages of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# a link to a file of the repository that is no page
OUTSIDE = re.compile(r"\[(?P<text>[^\]]+)\]\(\.\./(?P<file>[^)#]+)(?:#[^)]*)?\)")
# pages made of files outside docs/: what a link in them means here
ROOT_LINKS = re.compile(r"\]\(docs/")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Includes ``CONTRIBUTING.md`` and the README, and puts empty lines where Python-Markdown needs them."""
    markdown = re.sub(r"^{{ (\S+) }}$", lambda found: _included(found[1]), markdown, flags=re.MULTILINE)
    markdown = OUTSIDE.sub(_named, markdown)
    parts = FENCE.split(markdown)
    return "".join(f"{part}\n" if part.startswith("```") else _spaced(part) for part in parts)


def _included(name: str) -> str:
    text = ROOT_LINKS.sub("](", (ROOT / name).read_text())
    text = text.replace("](CONTRIBUTING.md)", "](contributing.md)")
    # other files of the root
    return re.sub(r"\]\((?=(?:benchmarks/|CHANGELOG|CITATION))", "](../", text)


def _named(link: re.Match[str]) -> str:
    if not (ROOT / link["file"]).exists():
        raise ValueError(f"{link[0]}: no such file in the repository")
    return f"{link['text']} (`{link['file']}`)" if link["text"] != link["file"] else f"`{link['file']}`"


def _spaced(text: str) -> str:
    """Text without the markers of generated tables, and with an empty line before each list and table."""
    text = re.sub(r"^<!-- .*? -->$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(?![-|>#\s]|\d+\. )(.+)\n(?=(?:- |\d+\. |\|))", r"\1\n\n", text, flags=re.MULTILINE)
    # an item of a list continues with two spaces here, with four in Python-Markdown
    return re.sub(r"^  (?=\S)", "    ", text, flags=re.MULTILINE)
