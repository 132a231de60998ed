"""The pages tell of files, names and commands that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from sala.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]
COMMAND = re.compile(r"^ {4,}(?:sala|torchrun .* -m sala\.cli) (?P<rest>.+?)(?: {2,}#.*)?$", re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)#:]*)(?:#(?P<anchor>[^)]*))?\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words after `sala` of every indented command of a page, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for found in COMMAND.finditer(text):
        yield found["rest"].split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_link_leads_to_a_file_and_to_a_heading_of_it(page: Path) -> None:
    for found in LINK.finditer(page.read_text(encoding="utf-8")):
        target = (page.parent / found["target"]).resolve() if found["target"] else page
        assert target.exists(), f"{found.group()} in {page.name} leads nowhere"
        if found["anchor"]:
            assert found["anchor"] in anchors(target), (
                f"{found.group()} in {page.name} names no heading of {target.name}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_command_of_a_page_has_a_verb_and_options_that_exist(page: Path) -> None:
    verbs = typer.main.get_command(app).commands
    for words in commands(page):
        name = " ".join(words[:2]) if " ".join(words[:2]) in verbs else words[0]
        assert name in verbs, f"sala {' '.join(words)} in {page.name}"
        verb = verbs[name].commands[words[1]] if name in ("bench", "eval") else verbs[name]
        known = {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known | {"--help"}, f"sala {' '.join(words)} in {page.name}"


def test_the_glossary_names_what_its_files_hold() -> None:
    files: list[str] = []
    for line in (ROOT / "docs/glossary.md").read_text(encoding="utf-8").splitlines():
        cells = line.split("|")
        if len(cells) != 6 or "`" not in line:  # term, meaning, names and files, between two borders
            continue
        files = re.findall(r"`([^`]+)`", cells[4]) or files  # "the same" as in the row above
        source = "".join(path.read_text(encoding="utf-8") for file in files for path in sources(file))
        for name in re.findall(r"`([^`]+)`", cells[3]):
            word = re.match(r"[\"-]*([\w.-]+?)\b(?=[\" :=]|$)", name)
            assert word, name
            assert re.search(rf"(?<!\w){re.escape(word[1])}(?!\w)", source), f"{name} is not in {', '.join(files)}"


def sources(name: str) -> list[Path]:
    """Return the files at a place of the glossary's: a file, or a folder with all files below."""
    place = ROOT / name if (ROOT / name).exists() else ROOT / "src/sala" / name
    assert place.exists(), name
    return [path for path in place.rglob("*") if path.suffix in (".py", ".yaml")] if place.is_dir() else [place]
