"""The site as built: it asks nothing of another host, and every way through it leads somewhere."""

import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlparse

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    docs = ROOT / "docs"
    assert sorted(pages_of(CONFIG["nav"])) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))


def test_every_method_is_in_the_api() -> None:
    page = (ROOT / "docs/api/methods.md").read_text(encoding="utf-8")
    files = {file.stem for file in (ROOT / "sslkit/methods").glob("[a-z]*.py")}
    assert {name for name in files if f"::: sslkit.methods.{name}\n" not in page} == set()


def test_the_theme_takes_no_fonts_from_elsewhere_and_follows_the_system() -> None:
    assert CONFIG["theme"]["font"] is False
    assert {palette.get("scheme") for palette in CONFIG["theme"]["palette"]} == {None, "default", "slate"}


class Page(HTMLParser):
    """What a page loads, where it leads, and the places in it that can be led to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        words = {name: value or "" for name, value in attrs}
        self.places.update(words[key] for key in ("id", "name") if key in words)
        if tag == "a":
            self.links.append(words.get("href", ""))
        else:
            self.loads += [words[key] for key in ("src", "href") if key in words]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Pages by their address, from a strict build in a folder of its own."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("docs", "sslkit"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", root)
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--strict"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    built = root / "site"
    files = [file for file in built.rglob("*") if file.is_file()]
    pages = {}
    for file in files:
        text = file.read_text(encoding="utf-8") if file.suffix == ".html" and file.name != "404.html" else ""
        pages["/" + str(file.relative_to(built)).replace("index.html", "")] = Page(text)
    return pages


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_loaded_from_another_host(site: dict[str, Page]) -> None:
    loads = {(page, load) for page, parsed in site.items() for load in parsed.loads}
    assert len(loads) > 100
    assert [load for load in loads if urlparse(load[1]).netloc] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_link_leads_somewhere(site: dict[str, Page]) -> None:
    dead = []
    for page, parsed in site.items():
        for link in (*parsed.links, *parsed.loads):
            target = urlparse(urljoin(f"http://site{page}", link))
            if target.netloc != "site":
                continue
            path, place = unquote(target.path), unquote(target.fragment)
            if path not in site or (place and place not in site[path].places):
                dead.append((page, link))
    assert dead == []
