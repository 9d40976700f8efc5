"""Facts about the files: which imports which, what they may not hold, and how long they may be."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import ROOT

NOT_OURS = {".git", ".venv", "runs", "__pycache__"}


def all_files(pattern="*"):
    files = []
    for file in sorted(ROOT.rglob(pattern)):
        parts = file.relative_to(ROOT).parts
        if file.is_file() and not NOT_OURS & set(parts) and not parts[0].endswith("_cache"):
            files.append(file)
    return files


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in all_files("*.py")}


def imports(name):
    """(what is imported, whether it stands at the top of the file), for each import of a module."""
    tree = ast.parse(MODULES[name].read_text())
    found = []
    for node in ast.walk(tree):
        on_top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, on_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole if whole in MODULES else node.module, on_top))
    return found


def graph():
    """For each module of the project those of the project that it imports, anywhere."""
    return {
        name: {imported for imported, _ in imports(name) if imported in MODULES} for name in MODULES
    }


# An arrow, an import, points down or stays on its floor: ../README.md has the map
FLOORS = {
    "templates": 1,
    "toy": 1,
    "support": 2,
    "drgrpo": 3,
    "eval": 4,
    "plan": 4,
    "findings": 4,
    "forks": 4,
    "benchmarks": 5,
    "tests": 6,
    "test_drgrpo": 6,
}


def top(name):
    return name.partition(".")[0]


def test_every_file_has_a_floor_and_arrows_point_down():
    assert {top(name) for name in MODULES} <= set(FLOORS)
    upwards = []
    for name, imported in graph().items():
        for other in imported:
            if FLOORS[top(other)] > FLOORS[top(name)]:
                upwards.append(f"{name} imports {other}")
    assert upwards == []


def test_imports_have_no_circle():
    order = list(TopologicalSorter(graph()).static_order())  # raises CycleError
    assert order.index("templates") < order.index("support.grader") < order.index("drgrpo")


def test_nothing_below_it_imports_the_script():
    importers = {top(name) for name, imported in graph().items() if "drgrpo" in imported}
    assert importers <= {"eval", "plan", "benchmarks", "findings", "forks", "tests", "test_drgrpo"}


# Packages that are imported where they are used: heavy, optional, or only of one benchmark
OPTIONAL = {"vllm", "wandb", "torch.utils.tensorboard", "openai", "trl", "peft", "tensorboard"}


def test_imports_are_at_the_top_but_for_a_few_packages():
    inside = []
    for name in MODULES:
        for imported, on_top in imports(name):
            if not on_top and not OPTIONAL & {imported, top(imported)}:
                inside.append(f"{name} imports {imported}")
    of_trl = ("datasets", "transformers")  # TRL is told about them in a process without vLLM
    assert [line for line in inside if line.split()[-1] not in of_trl] == []
    assert all(line.startswith("benchmarks.vs_trl ") for line in inside)


def test_the_script_is_short_and_its_loop_comes_early():
    lines = MODULES["drgrpo"].read_text().splitlines()
    assert len(lines) <= 900
    (loop,) = [i for i, line in enumerate(lines, 1) if line.startswith("def train_step")]
    assert loop <= 330


def test_no_function_is_longer_than_a_screen():
    wrong = []
    for name in ("drgrpo", "eval", "templates", *(n for n in MODULES if top(n) == "support")):
        for node in ast.walk(ast.parse(MODULES[name].read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 70:
                wrong.append(f"{name}.{node.name}: {node.end_lineno - node.lineno} lines")
    assert wrong == []


def texts():
    for file in all_files():
        try:
            yield file, file.read_text()
        except UnicodeDecodeError:  # a picture
            continue


def test_no_file_names_a_place_on_somebodys_machine():
    home, here = str(Path.home()), str(ROOT)
    private = re.compile(r"/(?:home|Users|root|work)/\w")
    wrong = []
    for file, text in texts():
        if (
            file == Path(__file__) or file.name == "test_findings.py"
        ):  # they name what they look for
            continue
        if here in text or f"{home}/" in text or private.search(text):
            wrong.append(str(file.relative_to(ROOT)))
    assert wrong == []


def test_no_path_leads_out_of_the_project():
    wrong = []
    for file, text in texts():
        for path in re.findall(r"(?<![\w./])(?:\.\./)+[\w.-]*", text):
            if not (file.parent / path).resolve().is_relative_to(ROOT):
                wrong.append(f"{file.relative_to(ROOT)}: {path}")
    assert wrong == []


@pytest.mark.parametrize("file", all_files("*.md"), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_in_documents_lead_to_files(file):
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (file.parent / link).exists()] == []
