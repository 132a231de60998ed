"""What imports what: no cycle in the tree, imports for type checkers and inside functions included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    named = {}
    for path in (SOURCE / "sala").rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imported(path: Path, known: set[str]) -> set[str]:
    """Return the modules that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            # a name of a package is its module where there is one, and else something that the package holds
            found |= below & known or {str(node.module)}
    return found & known


def test_no_import_leads_back() -> None:
    paths = modules()
    known = set(paths)
    graph = {name: imported(path, known) - {name} for name, path in paths.items()}
    assert len(graph) > 100
    # raises CycleError, which names the modules
    TopologicalSorter(graph).prepare()
