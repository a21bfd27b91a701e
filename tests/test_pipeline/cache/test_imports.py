"""The cache's folders import one way: format and files, the stores, reader and writer, checks."""

import ast
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[3] / "pipeline" / "cache"
ALLOWED = {  # folder or file → what it may import of the cache, itself aside
    "files": set(),
    "format": {"files"},
    "zarr": {"files", "format"},
    "tar": {"files", "format"},
    "stores": {"format", "zarr", "tar"},
    "tables": {"format"},
    "writer": {"files", "format", "stores"},
    "remote": {"files", "format", "stores", "budget"},
    "reader": {"files", "format", "stores", "tables", "remote"},
    "shard_writing": {"format", "writer"},
    "budget": {"format"},
    "card": {"budget", "format"},
    "output": {"files", "format", "stores", "writer", "remote", "budget"},
    "check": {"files", "format", "stores", "reader", "writer", "remote", "budget"},
}


def imports(file: Path) -> list[tuple[str, str]]:
    """(module, name) of what a file imports from the cache."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    found = [(str(node.module), alias.name) for node in nodes for alias in node.names]
    return [(module, name) for module, name in found if module.startswith("pipeline.cache")]


@pytest.mark.parametrize("file", sorted(CACHE.rglob("*.py")), ids=lambda file: str(file.relative_to(CACHE)))
def test_imports_go_one_way(file: Path) -> None:
    place = file.relative_to(CACHE).parts[0].removesuffix(".py")
    assert not [name for _, name in imports(file) if name.startswith("_")]
    if place != "__init__":
        assert {module.split(".")[2] for module, _ in imports(file)} - {place} <= ALLOWED[place]
