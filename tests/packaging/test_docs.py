"""Every relative link of the documents leads somewhere, headings included."""

import re
from pathlib import Path

import pytest

from compression_dags.paths import PROJECT

PAGES = sorted(
    [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md"), *(PROJECT / "data").glob("*.md")],
    key=lambda page: page.as_posix(),
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
#: A path of a page that code, recipes or prose names in words.
NAMED = re.compile(r"\bdocs/[\w./-]+\.(?:md|png|svg)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def test_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page: Path):
    assert dead(page) == []


def test_pages_that_code_names_exist():
    folders = ("compression_dags", "assets", "resources", "benchmarks", "tests", "recipes")
    files = [p for name in folders for kind in ("*.py", "*.sh", "*.yaml") for p in (PROJECT / name).rglob(kind)]
    missing = {
        f"{path.relative_to(PROJECT)}: {name}"
        for path in [*files, PROJECT / "README.md"]
        for name in NAMED.findall(path.read_text(encoding="utf-8"))
        if not (PROJECT / name).exists()
    }
    assert not missing
