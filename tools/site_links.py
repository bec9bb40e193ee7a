"""A hook of mkdocs: README.md is the first page, and links that leave docs/ become names of files, which a site does not have."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_HOME = "index.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the first page, and the records to the table of contents."""
    from mkdocs.structure.files import File

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, _HOME, content=text))
    records = sorted((ROOT / "docs" / "records").glob("*.md"), reverse=True)
    for section in config["nav"]:
        if "Records" in section:
            section["Records"] = [f"records/{path.name}" for path in records]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page as the site has them."""
    source = page.file.src_uri
    folder = "" if source == _HOME else posixpath.join("docs", posixpath.dirname(source))

    def mend(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        full = posixpath.normpath(posixpath.join(folder, path))
        if full.startswith("docs/") and files.get_file_from_path(full.removeprefix("docs/")) is not None:
            inside = posixpath.relpath(full.removeprefix("docs/"), posixpath.dirname(source) or ".")
            return f"{image}[{text}]({inside}{'#' + anchor if anchor else ''})"
        return f"{text} (`{full}`)" if text.strip("`") != full else text

    return _LINK.sub(mend, markdown)
