"""A page as a browser's parser sees it."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """Elements, figures and text of an HTML file."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        self.text += " "
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = attributes, before + data
        elif self.inside == "style":
            self.styles.append(data)
        else:
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())

    def panels(self) -> list[str]:
        return [str(attrs["data-panel"]) for _, attrs in self.elements if "data-panel" in attrs]

    def figures(self) -> dict[str, dict[str, Any]]:
        """Plotly's figures by the title of the panel that each stands in."""
        data = {
            attrs["id"]: json.loads(text) for attrs, text in self.scripts if attrs.get("type") == "application/json"
        }
        found, panel = {}, ""
        for _, attrs in self.elements:
            panel = str(attrs["data-panel"]) if "data-panel" in attrs else panel
            if "data-figure" in attrs:
                found[panel] = data[attrs["data-figure"]]
        return found

    def addresses(self) -> list[str]:
        return [
            str(attrs[key]) for _, attrs in self.elements for key in ("src", "href", "action", "srcset") if key in attrs
        ]
