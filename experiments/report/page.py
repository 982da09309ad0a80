"""The page: all that it shows, and the HTML."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

HERE = Path(__file__).parent


@dataclass
class Plot:
    """svg: by scheme, `light` and `dark`; told: the same in words."""

    title: str
    svg: dict[str, bytes]
    told: str

    def uri(self, scheme: str) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg[scheme]).decode()


@dataclass
class Seen:
    """What the forwards of one answer saw.

    ends: where each token of the caption ends in it.
    layers: how many layers each of the g groups joins.
    grid: rows and columns of patches, and where they lie on the picture: left, top, width and height as shares of it;
    or a sentence that says why that is not known.
    left_from: the steps from which another set of patches was left, e of them.
    curve: mean attention to a visual token left, by step, mean over layers.
    blob: base64 of gzip of float32 [m, g] the largest weight of each map, float32 [m, g] its sum, uint8 [m, g, p] the
    weights in 255ths of the largest, uint8 [e, g, p] the
        share of layers in which a patch was left, in 255ths.
    """

    ends: list[int]
    layers: list[int]
    grid: tuple[int, int, list[float]] | str
    left_from: list[int]
    curve: list[float]
    blob: str

    def token(self, start: int) -> int:
        """The token that begins, or goes on, at a place in the caption."""
        return min(bisect_right(self.ends, start), len(self.ends) - 1)


@dataclass
class Said:
    """One stack's caption of a picture.

    row: as in the store.
    seen: what its forwards saw, or why that is not shown; None where nobody asked.
    """

    label: str
    row: dict
    seen: Seen | str | None = None

    @property
    def false(self) -> int | None:
        """Objects hallucinated; None where nobody knows, or where answers say yes or no."""
        return None if self.row["hallucinated"] is None else len(self.row["hallucinated"])

    @property
    def pieces(self) -> list[tuple[str | None, str, list[tuple[str, int]]]]:
        """The caption in pieces: what it is (`false`, `true`, `named` or None), the object, and texts, each with its
        token; -1 for what has none.
        """
        caption, out, at = self.row["caption"], [], 0
        known = self.row["hallucinated"]
        for m in sorted(self.row["mentions"], key=lambda m: m["start"]):
            kind = "named" if known is None else "false" if m["object"] in self.row["hallucinated"] else "true"
            out += [(None, "", at, m["start"]), (kind, m["object"], m["start"], m["end"])]
            at = m["end"]
        out.append((None, "", at, len(caption)))
        cut = []
        for kind, name, start, end in out:
            texts, here = [], start
            for m in re.finditer(r"\S*\w\S*", caption[start:end]) if isinstance(self.seen, Seen) else ():
                texts += [(caption[here : start + m.start()], -1), (m.group(), self.seen.token(start + m.start()))]
                here = start + m.end()
            cut.append((kind, name, [(text, token) for text, token in [*texts, (caption[here:end], -1)] if text]))
        return [piece for piece in cut if piece[2]]

    @property
    def curve(self) -> list[float]:
        return self.seen.curve if isinstance(self.seen, Seen) else self.row.get("attention", [])

    @property
    def facts(self) -> dict:
        """What the page's script is told."""
        out = {
            "curve": self.curve,
            "prunes": self.row["prunes"],
            "rollbacks": [back for back in self.row["rollbacks"] if {"at", "kept"} <= back.keys()],
            "steps": self.row["tokens"],
        }
        if isinstance(self.seen, Seen):
            out |= {"layers": self.seen.layers, "left": self.seen.left_from, "grid": self.seen.grid}
        return out


@dataclass
class Shown:
    """A picture with what all stacks said of it.

    uri: of the picture, made small; None where it could not be read, `why` then says why.
    """

    id: str
    said: list[Said]
    uri: str | None = None
    size: tuple[int, int] = (1, 1)
    why: str = ""

    @property
    def objects(self) -> list[str] | None:
        return self.said[0].row["objects"]

    @property
    def gaps(self) -> list[int]:
        """Objects hallucinated more than by the first stack, by each of the others."""
        return [0 if one.false is None else one.false - self.said[0].false for one in self.said[1:]]

    @property
    def find(self) -> str:
        """What a search looks in."""
        names = {m["object"] for one in self.said for m in one.row["mentions"]} | set(self.objects or [])
        return " ".join([self.id, *sorted(names)]).lower()

    @property
    def rank(self) -> tuple:
        """First where stacks differ most: in objects hallucinated, in objects named, in words."""
        named = [{m["object"] for m in one.row["mentions"]} for one in self.said]
        return (
            -max(map(abs, self.gaps), default=0),
            -max(len(a ^ named[0]) for a in named),
            len({one.row["caption"] for one in self.said}) == 1,
        )


@dataclass
class Page:
    """What is shown.

    title, on: what was asked, and further words about it.
    labels: of the stacks, each a name of its own.
    alike, apart: names and values of settings that all stacks share, and by label those that differ; configs: all of
    them, as JSON, by label.
    about, head, table: the numbers, rows of cells, and what they are.
    notes: what a reader must know beforehand.
    """

    title: str
    on: str
    labels: list[str]
    alike: list[tuple[str, str]]
    apart: dict[str, list[tuple[str, str]]]
    configs: dict[str, str]
    about: str
    head: list[str]
    table: list[list[str]]
    plots: list[Plot]
    pictures: list[Shown]
    notes: list[str] = field(default_factory=list)

    @property
    def objects(self) -> list[str]:
        return sorted(
            {
                name
                for shown in self.pictures
                for name in {*(shown.objects or ()), *(m["object"] for one in shown.said for m in one.row["mentions"])}
            }
        )


def small(image: Image.Image, most: int = 448) -> str:
    """A data URI of the picture, no side longer than `most` pixels."""
    image = image.copy()
    image.thumbnail((most, most))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=82, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def html(page: Page) -> str:
    """The page as one file; scripts and styles other than its own two are forbidden in it, and so is every
    connection.
    """
    css, js = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = lambda text: "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()  # noqa: E731
    policy = (
        f"default-src 'none'; img-src data:; style-src '{digest(css)}'; script-src '{digest(js)}'; base-uri 'none';"
        " form-action 'none'"
    )
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return made.get_template("page.html.jinja").render(page=page, css=Markup(css), js=Markup(js), policy=policy)
