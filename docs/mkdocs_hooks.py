"""Hooks of `mkdocs.yml`: pages that stand outside of docs/ become part of the site, and links that leave docs/ name a
file of the repository, or are links to those pages. A link to nothing is a warning, which ends a strict build.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # of the site: where its text stands in the repository
    "index.md": "README.md",
    "embedded-model.md": "experiments/scenes/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`(?!\]))", re.M | re.S)
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere, and the images on them."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
        for mark, _, target in LINK.findall(text):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            if mark and not path.startswith("docs/") and (ROOT / path).is_file():
                files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site, outside code."""
    here = page.file.src_uri
    if not here.endswith(".md"):
        return markdown
    source = PAGES.get(here, f"docs/{here}")
    parts = CODE.split(markdown)
    return "".join(
        part if i % 2 else LINK.sub(lambda found: _link(found, here, source), part) for i, part in enumerate(parts)
    )


def _link(found: re.Match[str], here: str, source: str) -> str:
    """One link of the page `here`, whose text stands in the file `source`."""
    mark, text, target = found.groups()
    path, hash_, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    pages = {file: page for page, file in PAGES.items()}
    if path in pages:
        place = pages[path]
    elif path.startswith("docs/"):
        place = path.removeprefix("docs/")
    elif mark and (ROOT / path).is_file():
        place = f"repository/{path}"
    elif (ROOT / path).exists():
        return f"`{path}`" if text.strip("`") in (path, posixpath.basename(path)) else f"{text} (`{path}`)"
    else:
        log.warning("%s links to '%s', which is not there", source, target)
        return found[0]
    return f"{mark}[{text}]({os.path.relpath(place, posixpath.dirname(here) or '.')}{hash_}{anchor})"
