"""The rules by which a line of code knows its room, read off the syntax trees."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("params", "core", "transforms", "runners", "kernels")
TREES = {
    path.relative_to(ROOT): ast.parse(path.read_text())
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}
NODES = {path: tuple(ast.walk(tree)) for path, tree in TREES.items()}

# Each may import those after it, or of its own line.
ORDERS = (
    (("runners",), ("transforms",), ("core",), ("params",)),
    (
        ("core.foreign",),
        ("core.model",),
        ("core.forward",),
        ("core.explain",),
        ("core.rules",),
        ("core.sites",),
    ),
    (
        ("runners.train", "runners.bench"),
        ("runners.generate",),
        ("runners.eval",),
        ("runners.benchmarks",),
        ("runners.engine", "runners.training"),
        ("runners.data.feeding",),
        ("runners.data.packing",),
        ("runners.data.sources",),
        ("runners.data.encode",),
        ("runners.data",),
        ("runners.training.config", "runners.training.settings"),
        ("runners.shell",),
    ),
)

# Exceptions, to become fewer: one that is none any more fails, too.
STARTS_PROCESSES = {
    "kernels/runtime/resources.py",
    "runners/benchmarks/records.py",
    "runners/training/provenance.py",
}


def imports(path: Path) -> Iterator[str]:
    """Names of the modules, and of what may be modules, that a file imports anywhere in it."""
    for node in NODES[path]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports name their room"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(module: str, order: tuple[tuple[str, ...], ...]) -> int | None:
    """The place of a module in an order, by its longest prefix there."""
    places = {prefix: place for place, each in enumerate(order) for prefix in each}
    found = [prefix for prefix in places if f"{module}.".startswith(f"{prefix}.")]
    return places[max(found, key=len)] if found else None


def test_imports_go_one_way() -> None:
    for path in TREES:
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for name in imports(path):
            for order in ORDERS:
                own, other = rank(module, order), rank(name, order)
                if own is not None and other is not None:
                    assert own <= other, f"{path} imports {name}"


def test_kernels_import_nothing_of_ours_and_their_runtime_no_operation() -> None:
    for path in TREES:
        for name in imports(path):
            room, *rest = name.split(".")
            if path.parts[0] == "kernels" and room in ROOMS:
                assert room == "kernels", f"{path} imports {name}"
                if path.parts[1] == "runtime":
                    assert rest[:1] == ["runtime"], f"{path} imports {name}"


def test_files_are_short() -> None:
    assert not [str(p) for p in TREES if len((ROOT / p).read_text().splitlines()) > 500]


def test_each_class_has_a_name_of_its_own() -> None:
    counts = Counter(
        n.name for nodes in NODES.values() for n in nodes if isinstance(n, ast.ClassDef)
    )
    assert not [name for name, count in counts.items() if count > 1]


def uses(attribute: str) -> dict[str, int]:
    """How often each file takes an attribute of this name of the modules sys or os."""
    found = [
        str(path)
        for path, nodes in NODES.items()
        for node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id in ("sys", "os")
    ]
    return Counter(found)


def test_only_mains_and_their_parser_read_the_command_line() -> None:
    mains = {str(path) for path in TREES if path.parts[0] == "runners" and len(path.parts) == 2}
    assert set(uses("argv")) <= mains | {"runners/shell/cli.py"}


def test_only_the_shell_starts_processes() -> None:
    starting = ("subprocess", "multiprocessing", "os.fork", "os.system", "torch.multiprocessing")
    found = {
        str(path)
        for path in TREES
        for name in imports(path)
        if any(f"{name}.".startswith(f"{each}.") for each in starting)
    }
    found = {path for path in found if not path.startswith("runners/shell/")}
    assert found == STARTS_PROCESSES
    assert not set(uses("fork")) | set(uses("system"))


def test_the_environment_is_for_runners_but_for_one_variable_of_kernels() -> None:
    outside = {path: n for path, n in uses("environ").items() if not path.startswith("runners/")}
    assert outside == {"kernels/runtime/dispatch.py": 1}  # read, by `requested`
    assert not uses("putenv") | uses("getenv")
