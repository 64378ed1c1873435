"""Links in the repository's pages lead to files and headings that exist."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Every folder with pages, so that build/ and virtual environments are not read.
FOLDERS = (".github", "benchmarks", "docs", "examples", "export", "kernels", "serve", "tests", "training")
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))])
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.MULTILINE | re.DOTALL)


def prose(page):
    """A page's text without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """The names that GitHub gives a page's headings: the second of a name ends in -1, and so on."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found) | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", prose(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    targets = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / unquote(path) if path else page
        assert file.exists(), f"{target}: there is no such file"
        assert file.resolve().is_relative_to(ROOT), f"{target} is outside the repository"
        assert not anchor or anchor in anchors(file), f"{target}: {file.name} has no such heading"


def test_headings_are_named_as_github_names_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`: c_d, é!\n```\n# no heading\n```\n## [Link](x.md) & more\n# A `b`: c_d, é!\n", "utf-8"
    )
    assert anchors(page) == {"a-b-c_d-é", "link--more", "a-b-c_d-é-1"}
