"""Imports run one way: data -> backbone and masks -> head -> models -> trainer -> run; see docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "recbole_hatllm"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# What the models of a family have in common.
SHARED = {f"recbole_hatllm.model.{name}" for name in ("llm", "slots", "writer", "sequential", "counting")}


def imports_of(path: Path) -> set[str]:
    """All modules of this package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys() - {"recbole_hatllm"}


def third_party(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ["masks", "head", "title_head", "whitening"])
def test_masks_and_heads_know_torch_alone(name):
    file = MODULES[f"recbole_hatllm.{name}"]
    assert third_party(file) - {"recbole_hatllm"} == {"torch"}
    assert imports_of(file) <= {"recbole_hatllm.head", "recbole_hatllm.whitening"} | {
        f"recbole_hatllm.head.{n}" for n in ("Extra", "cross_entropy")
    }


def test_no_cycles():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name, way):
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("recbole_hatllm.data")))
def test_data_never_imports_a_model(name):
    assert not {m for m in imports_of(MODULES[name]) if ".model" in m or m.endswith((".backbone", ".head", ".trainer"))}


@pytest.mark.parametrize("name", sorted(name for name in MODULES if ".model." in name and name not in SHARED))
def test_no_model_imports_another(name):
    found = {m.removeprefix("recbole_hatllm.model.") for m in imports_of(MODULES[name]) - SHARED if ".model." in m}
    assert found <= {"sasrecfast"} if name.endswith(".hatllmsasrec") else not found  # that one is a SASRecFast


def test_nothing_below_the_commands_imports_them():
    top = {
        "recbole_hatllm.cli",
        "recbole_hatllm.demo",
        "recbole_hatllm.recommend",
        "recbole_hatllm.doctor",
        "recbole_hatllm.search",
        "recbole_hatllm.search_figures",
        "recbole_hatllm.compare",
        "recbole_hatllm.memory",
        "recbole_hatllm.memory_report",
        *(name for name in MODULES if name.startswith("recbole_hatllm.analysis")),
    }
    for name, path in MODULES.items():
        if name not in top | {"recbole_hatllm"}:
            assert not imports_of(path) & top, name


def test_only_the_command_line_imports_the_analyses():
    for name, path in MODULES.items():
        if not name.startswith("recbole_hatllm.analysis"):
            found = {other for other in imports_of(path) if other.startswith("recbole_hatllm.analysis")}
            assert name == "recbole_hatllm.cli" or not found, name


def test_importing_the_package_is_cheap_and_leaves_ray_alone():
    code = (
        "import sys, recbole_hatllm, recbole_hatllm.quick_start, recbole_hatllm.recommend\n"
        "print([m for m in ('ray', 'recbole.quick_start', 'thop', 'plotly', 'hyperopt', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    light = "import sys, recbole_hatllm; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
