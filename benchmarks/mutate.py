"""Change the code in one place, run the tests, and print the changes that no test noticed.

    python benchmarks/mutate.py drgrpo.py update drgrpo_loss --tests test_drgrpo.py -m "not slow"

A file, and names of functions or classes in it (none: the whole file). What follows `--tests` is
for pytest. The changes: an operator for its neighbour, a
number plus 1, True for False, a condition for its opposite, a statement or method call left out.
"""

import argparse
import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets  # noqa: F401, these imports take seconds: once, before the forks
import pytest
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # of the tests; if they hang after a change, it is noticed, too
SWAPS = {"Lt": "LtE", "LtE": "Lt", "Gt": "GtE", "GtE": "Gt", "Eq": "NotEq", "NotEq": "Eq"}
SWAPS |= {"Is": "IsNot", "IsNot": "Is", "In": "NotIn", "NotIn": "In", "And": "Or", "Or": "And"}
SWAPS |= {"Add": "Sub", "Sub": "Add", "Mult": "Div", "Div": "Mult", "FloorDiv": "Mult"}


def changed(node: Any) -> str | None:
    """The source of a node after a change; None where there is nothing to change."""
    node = copy.deepcopy(node)  # it is part of other nodes
    match node:
        case ast.AugAssign() | ast.Expr(value=ast.Call()):
            return "pass"
        case ast.Constant(value=bool(value)):
            return str(not value)
        case ast.Constant(value=int(value) | float(value)):
            return repr(value + 1)
        case ast.UnaryOp(operand=operand):
            return f"({ast.unparse(operand)})"
        case ast.Call(func=ast.Attribute(value=called), args=[], keywords=[]):
            return f"({ast.unparse(called)})"
        case ast.Compare(ops=[operator]):
            node.ops = [getattr(ast, SWAPS[type(operator).__name__])()]
        case ast.BoolOp() | ast.BinOp() if type(node.op).__name__ in SWAPS:
            node.op = getattr(ast, SWAPS[type(node.op).__name__])()
        case _:
            return None
    return f"({ast.unparse(node)})"


def mutants(source: str, names: list[str]) -> Iterator[tuple[str, str]]:
    """For each change inside the functions of these names: what it is, and the whole source."""
    starts = [0]  # of the lines, in bytes
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source)
    parts = [node for node in ast.walk(tree) if getattr(node, "name", None) in names] or [tree]
    nodes: list[Any] = [node for part in parts for node in ast.walk(part)]
    for node in nodes:
        new = changed(node)
        if new is None:
            continue
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        old = source.encode()[begin:end].decode()
        whole = source.encode()[:begin].decode() + new + source.encode()[end:].decode()
        yield f"line {node.lineno}: {' '.join(old.split())}  ->  {new}", whole


def is_noticed(file: str, source: str, tests: list[str]) -> bool:
    """Whether a test fails in a copy of the project in which the file has this source."""
    with tempfile.TemporaryDirectory() as folder:
        ignore = shutil.ignore_patterns("runs", ".*", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
        Path(folder, file).write_text(source)
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            os.chdir(folder)
            sys.path.insert(0, folder)
            for output in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)
            os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
        return os.waitpid(child, 0)[1] != 0


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("file")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, required=True)
    options = parser.parse_args()
    source = (ROOT / options.file).read_text()
    if is_noticed(options.file, source, options.tests):
        sys.exit("error: the tests fail without any change")
    tried, missed = list(mutants(source, options.names)), 0
    for what, mutant in tried:
        if not is_noticed(options.file, mutant, options.tests):
            missed += 1
            print(what, flush=True)
    print(f"{missed} of {len(tried)} changes were not noticed")


if __name__ == "__main__":
    main()
