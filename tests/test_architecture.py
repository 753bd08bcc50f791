"""The shape of the code: rooms import one way, what must start fast knows no torch, names are documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mechlens"
ROOMS = (
    "core", "data", "carriers", "models", "api", "menagerie", "runs", "pipeline", "results", "lenses",
    "evals", "detect", "benchmark", "cli",
)  # fmt: skip
"""a room imports itself and the rooms listed before it"""
AT_THE_ROOT = {"__init__", "__main__"}
TORCH = {
    "torch", "transformers", "transformer_lens", "peft", "trl", "accelerate", "datasets", "safetensors",
    "tokenizers",
}  # fmt: skip
WITHOUT_TORCH = ("core", "data", "carriers", "api", "runs", "results")
"""rooms whose modules import no torch: lists of runs, the explorer and the analyses start at once"""
LONGEST_FUNCTION = 50
"""lines of a function's body, without its docstring"""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "mechlens"


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room_of(name: str) -> str:
    return name.split(".")[0]


def imported(tree: ast.AST) -> set[str]:
    """Full dotted names that a tree imports; `from a import b` gives a.b too, since b may be a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own_imports(tree: ast.AST) -> set[str]:
    """The package's modules among a tree's imports."""
    names = {name.removeprefix("mechlens.") for name in imported(tree) if name.startswith("mechlens.")}
    return names & set(FILES)


def top_level(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: no function bodies, and nothing for type checkers alone."""
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    runs = [
        node for node in kept if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(runs, [])


def wrong_way(trees: dict[str, ast.Module]) -> list[str]:
    """Imports of a room that stands later, and of the command line by anything else."""
    place = {room: number for number, room in enumerate(ROOMS)}
    edges = [
        (name, other) for name, tree in trees.items() for other in own_imports(tree) if room_of(name) in place
    ]
    return sorted(
        f"{name} imports {other}" for name, other in edges if place[room_of(other)] > place[room_of(name)]
    )


def circles(trees: dict[str, ast.Module]) -> list[str]:
    """Modules that import themselves in the end, through others."""
    edges = {name: own_imports(tree) - {name} for name, tree in trees.items()}
    edges = {
        name: {other for other in others if FILES[other].name != "__init__.py"}
        for name, others in edges.items()
    }
    left = dict(edges)
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_module_stands_in_a_room() -> None:
    assert {room_of(name) for name in FILES} <= {*ROOMS, "mechlens", *AT_THE_ROOT}
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_ROOT


def test_rooms_import_one_way() -> None:
    assert wrong_way(TREES) == []


def test_no_module_imports_itself_through_others() -> None:
    assert circles(TREES) == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("core.errors", "from mechlens.data import corpus"),
        ("models.chat", "import mechlens.pipeline.ask"),
        ("lenses.deltas", "def f():\n    from mechlens.detect import verdict"),
        ("detect.audit", "from mechlens.cli.commands import console"),
    ],
)
def test_a_wrong_import_would_be_found(name: str, code: str) -> None:
    assert len(wrong_way({**TREES, name: ast.parse(code)})) >= 1


@pytest.mark.parametrize("name", [name for name in FILES if room_of(name) in WITHOUT_TORCH])
def test_a_room_without_torch_imports_no_torch(name: str) -> None:
    assert not {module.split(".")[0] for module in imported(top_level(TREES[name]))} & TORCH


@pytest.mark.parametrize("name", [name for name in FILES if room_of(name) != "cli"])
def test_only_the_command_line_imports_rich_and_tyro(name: str) -> None:
    assert not {module.split(".")[0] for module in imported(TREES[name])} & {"rich", "tyro"}


def test_the_command_line_and_the_library_start_without_torch() -> None:
    rooms = [f"mechlens.{name}" for name in FILES if room_of(name) in WITHOUT_TORCH]
    code = (
        "import sys, importlib\n"
        f"for name in {['mechlens', 'mechlens.cli', *rooms]}: importlib.import_module(name)\n"
        "sys.stdout.write(' '.join(name for name in ('torch', 'transformers') if name in sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == ""
    )


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def length(function: ast.FunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("name", FILES)
def test_a_function_fits_a_screen(name: str) -> None:
    long = {one.name: length(one) for one in functions(TREES[name]) if length(one) > LONGEST_FUNCTION}
    assert not long


@pytest.mark.parametrize("name", FILES)
def test_nothing_prints(name: str) -> None:
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert [
        node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"
    ] == []


@pytest.mark.parametrize("name", FILES)
def test_every_except_names_what_it_expects(name: str) -> None:
    broad = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            names = (
                {leaf.id for leaf in ast.walk(node.type) if isinstance(leaf, ast.Name)}
                if node.type
                else {"BaseException"}
            )
            broad += [node.lineno] if names & {"Exception", "BaseException"} else []
    assert broad == []


def is_spec(node: ast.stmt, module: str) -> bool:
    bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
    return module in ("core.spec", "core.model_spec") and bool({"Spec", "BaseModel"} & set(bases))


@pytest.mark.parametrize("name", FILES)
def test_every_public_name_is_documented(name: str) -> None:
    public = [
        node
        for node in TREES[name].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    if name == "pipeline.stages":  # each step calls the stage it is named after, which says what it does
        public = [node for node in public if not isinstance(node, ast.FunctionDef)]
    assert [node.name for node in public if not ast.get_docstring(node) and not is_spec(node, name)] == []


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_does(name: str) -> None:
    assert ast.get_docstring(TREES[name])


def test_the_explorer_keeps_the_same_shape() -> None:
    for path in sorted((PACKAGE.parent / "app").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        heavy = {module.split(".")[0] for module in imported(tree)} & {"torch", "transformers", "safetensors"}
        assert not heavy or path.name == "live_process.py", (
            f"{path} is loaded by the page: it must not import {heavy}"
        )


KEYS = {'"generated"'}
"""also a count of the funnel, not a folder"""
RUN_FILES = re.compile(
    r'"(?:raw|kept|rejected|answers|likelihoods|effects|curve)\.parquet"|"(?:funnel|generation|teacher|said)\.json"'
    r'|"(?:corpora|screened|generated)"|f"(?:students|corpora|asked|teachers|lenses)/'
)
"""names of files and folders in a run, as code would spell them"""


@pytest.mark.parametrize("name", [name for name in FILES if name != "runs.layout"])
def test_only_the_layout_spells_the_run_folder(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert [spelled for spelled in RUN_FILES.findall(text) if spelled not in KEYS] == []


def test_a_file_of_the_run_that_is_spelled_elsewhere_would_be_found() -> None:
    assert RUN_FILES.search('tables.read(run / "kept.parquet")') and RUN_FILES.search('f"students/{arm}"')
