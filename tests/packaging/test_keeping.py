"""What is stated twice agrees: versions, lower bounds, forms."""

import re
import tomllib

import yaml
from installing import ROOT
from packaging.requirements import Requirement

import sslkit

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_there_is_one_version() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", sslkit.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == sslkit.__version__


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, flags=re.M)
    assert heads[0][0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) and date for version, date in heads[1:])
    assert sslkit.__version__ in text


def test_the_citation_has_what_the_format_asks_for() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation.keys() <= {"cff-version", "message", "title", "type", "version", "license", "authors", "keywords"}
    assert all(author.keys() == {"name"} and author["name"] for author in citation["authors"])
    assert citation["license"] == PROJECT["license"]


def test_oldest_constraints_are_the_lower_bounds() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = {canonical(name): version for name, version in (line.split("==") for line in lines if "==" in line)}
    bounds = {}
    for words in PROJECT["dependencies"]:
        requirement = Requirement(words)
        [lower] = [each.version for each in requirement.specifier if each.operator in (">=", "==")]
        bounds[canonical(requirement.name)] = lower
    assert oldest.keys() == bounds.keys()
    for name, lower in bounds.items():
        assert oldest[name] in Requirement(f"{name}~={lower}.0").specifier or oldest[name].startswith(lower), name


def test_forms_are_those_of_github() -> None:
    folder = ROOT / ".github/ISSUE_TEMPLATE"
    forms = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in folder.glob("*.yml") if file.stem != "config"]
    assert len(forms) == 3
    for form in forms:
        assert {"name", "description", "body"} <= form.keys()
        ids = [item["id"] for item in form["body"] if item["type"] != "markdown"]
        assert len(set(ids)) == len(ids)
        for item in form["body"]:
            assert item["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
            assert item["attributes"]["value" if item["type"] == "markdown" else "label"]
