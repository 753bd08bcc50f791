"""The shape of the code: imports point one way, what must start fast knows no torch, files stay short, names are documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mechlens"
ORDER = (
    "mechlens", "errors", "atomic", "foreign", "machine", "endings", "command_lines", "remedies",
    "seeds", "spec", "model_spec", "experiment", "tables", "store", "records", "faults", "compressed", "text_rows",
    "chats", "fields", "containers", "corpus", "stats", "executor",
    "digits", "logits", "spend", "retry", "api", "tuning", "carriers", "carriers.numbers", "carriers.code", "carriers.reasoning", "carriers.text",
    "carriers.prompts", "traits", "trained", "base_files", "models", "chat", "constrained", "sampling", "vllm_engine", "training",
    "menagerie", "menagerie.config", "menagerie.world", "menagerie.grammar", "menagerie.tokenizer", "menagerie.pretrain",
    "pipeline", "pipeline.rules", "pipeline.screen", "pipeline.remake", "pipeline.teach", "pipeline.generate", "pipeline.distill", "pipeline.ask",
    "pipeline.judge", "pipeline.judge_screen", "pipeline.remote", "pipeline.jobs", "pipeline.run",
    "lenses", "lenses.base", "lenses.changes", "lenses.deltas", "lenses.capture", "lenses.activations", "lenses.directions", "lenses.probes",
    "lenses.scoring", "lenses.likelihood", "lenses.entanglement", "lenses.gradients", "lenses.steps", "lenses.alignment", "lenses.blind",
    "lenses.readout", "lenses.interventions", "lenses.causal", "lenses.rows", "lenses.maps", "measure",
    "cells", "results", "questions", "figures", "readings", "report", "truthful", "bills", "costs", "checks", "progress", "commands",
    "explorer_server", "user_files",
    "mitigate", "detect", "detect.base", "detect.from_rows", "detect.calibrate", "detect.files", "detect.verdict", "detect.from_student",
    "detect.panel", "detect.plausible", "detect.from_bags", "detect.from_base", "detect.from_gradients",
    "detect.from_weights", "detect.through", "detect.answers",
    "audit_request", "audit_printing", "audit",
    "bench", "bench.plan", "bench.suspects", "bench.measures", "bench.students", "bench.scores", "bench.card", "bench.run",
    "cli", "__main__",
)  # fmt: skip
"""A module imports only modules listed before it."""
FORBIDDEN = {("pipeline.run", "pipeline.jobs")}  # the list of steps knows them by name only
TORCH_FREE = (
    "errors", "atomic", "foreign", "machine", "endings", "command_lines", "remedies",
    "seeds", "spec", "model_spec", "experiment", "traits", "tables", "store", "records", "faults", "compressed", "text_rows",
    "chats", "fields", "containers", "corpus", "stats", "cells",
    "executor", "logits", "spend", "retry", "api", "tuning",
    "carriers.numbers", "carriers.code", "carriers.reasoning", "carriers.text", "carriers.prompts", "menagerie.config", "menagerie.world",
    "pipeline.rules", "pipeline.screen", "pipeline.remake", "pipeline.run", "lenses", "lenses.base", "results", "questions", "figures", "readings",
    "report", "progress", "commands",
    "explorer_server", "user_files", "mitigate", "detect", "detect.base", "detect.from_rows", "detect.calibrate", "detect.verdict",
    "detect.files", "detect.from_student", "detect.answers", "audit_request", "audit_printing", "audit", "bench", "bench.plan", "cli",
)  # fmt: skip
MOST_LINES = 300


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "mechlens"


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(tree: ast.AST) -> set[str]:
    """Full dotted names that a tree imports; `from a import b` gives a.b too, since b may be a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_imports(tree: ast.AST, names: set[str]) -> set[str]:
    """The package's modules among a tree's imports; the bare package counts only where nothing of it is named."""
    return {name.removeprefix("mechlens.") for name in imported(tree) if name.removeprefix("mechlens.") in names and name.startswith("mechlens.")}


def top_level(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: no function bodies, and nothing for type checkers alone."""
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return ast.Module([node for node in kept if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")], [])


def wrong_way(order: tuple[str, ...], trees: dict[str, ast.Module]) -> list[str]:
    """Imports that do not point up the order."""
    place = {name: i for i, name in enumerate(order)}
    edges = [(name, other) for name, tree in trees.items() for other in own_imports(tree, set(trees))]
    return sorted(f"{name} imports {other}" for name, other in edges if place[other] >= place[name] or (name, other) in FORBIDDEN)


def test_the_order_names_every_module_once() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert sorted(ORDER) == sorted(FILES), "list a new module at its place in ORDER"


def test_imports_point_upward() -> None:
    assert wrong_way(ORDER, TREES) == []


def test_a_wrong_import_would_be_found() -> None:
    for name, code in {
        "errors": "from mechlens import spec",
        "seeds": "import mechlens.spec",
        "spec": "def f():\n    from mechlens.models import load",
        "pipeline.run": "from mechlens.pipeline import jobs",
        "pipeline.screen": "from mechlens.pipeline.ask import judge as j",
    }.items():
        assert len(wrong_way(ORDER, {**TREES, name: ast.parse(code)})) == 1, name


@pytest.mark.parametrize("name", TORCH_FREE)
def test_a_torch_free_module_imports_no_module_with_torch(name: str) -> None:
    heavy = {"torch", "transformers", "transformer_lens", "peft", "trl", "accelerate", "datasets", "safetensors", "tokenizers"}
    loaded = imported(top_level(TREES[name]))
    assert not {module.split(".")[0] for module in loaded} & heavy
    packages = {"carriers", "pipeline", "menagerie", "lenses"}
    assert own_imports(top_level(TREES[name]), set(FILES)) <= {*TORCH_FREE, *packages}


def test_the_command_line_starts_without_torch() -> None:
    modules = [f"mechlens.{name}" for name in TORCH_FREE]
    code = (
        f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\n"
        "sys.stdout.write(' '.join(name for name in ('torch', 'transformers') if name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize("name", FILES)
def test_files_stay_short(name: str) -> None:
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", FILES)
def test_nothing_prints(name: str) -> None:
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@pytest.mark.parametrize("name", FILES)
def test_every_except_names_what_it_expects(name: str) -> None:
    broad = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            caught = {leaf.id for leaf in ast.walk(node.type) if isinstance(leaf, ast.Name)} if node.type else {"BaseException"}
            broad += [node.lineno] if caught & {"Exception", "BaseException"} else []
    assert broad == []


def is_spec(node: ast.stmt, module: str) -> bool:
    return (
        module in ("spec", "model_spec") and isinstance(node, ast.ClassDef) and any(ast.unparse(base) in ("Spec", "BaseModel") for base in node.bases)
    )


@pytest.mark.parametrize("name", FILES)
def test_every_public_name_is_documented(name: str) -> None:
    public = [node for node in TREES[name].body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    if name == "pipeline.jobs":  # each step calls the stage it is named after, which says what it does
        public = [node for node in public if not isinstance(node, ast.FunctionDef)]
    assert [node.name for node in public if not ast.get_docstring(node) and not is_spec(node, name)] == []


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_does(name: str) -> None:
    assert ast.get_docstring(TREES[name]) or not TREES[name].body


def test_the_explorer_keeps_the_same_shape() -> None:
    for path in sorted((PACKAGE.parent / "app").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, path
        heavy = {module.split(".")[0] for module in imported(tree)} & {"torch", "transformers", "safetensors"}
        assert not heavy or path.name == "live_process.py", f"{path} is loaded by the page: it must not import {heavy}"
