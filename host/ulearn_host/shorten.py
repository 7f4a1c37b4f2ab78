"""Names that cost a board nothing: the device package's own names become words that MicroPython has anyway.

MicroPython keeps every identifier that it meets for ever: its characters, and 6 bytes of a table that doubles as it
grows. An identifier that the firmware was built with costs neither. So, where the package is compiled for a board, what
nobody outside of it can name (parameters of private functions, names with an underscore, names within the modules that
load a plan and are forgotten again) is renamed, and ``const``, which the compiler has folded by then, is not imported.

A renaming maps different names to different words that occur nowhere else in the package, so no meaning can change.
``python -m ulearn_host.shorten`` prints the table, to read a traceback by.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import ulearn

_PACKAGE = Path(ulearn.__file__).parent
# Modules whose functions nobody else calls with keywords, and what they name that no other module speaks of.
_INNER = (
    "Plan",
    "offsets",
    "section",
    "sections",
    "check_cuts",
    "check_io",
    "check_operand",
    "check_overlap",
    "check_program",
    "check_record",
    "check_shape",
    "check_state",
    "check_tensors",
    "check_use",
    "gains_end",
    "need",
    "refuse",
    "trainable",
    "where",
)
_INTERNAL = ("loader", "loading", "plan", "verify")
# The modules that most boards load; they have the first choice of words.
_FIRST = ("model", "trainer", "samples", "fitting", *_INTERNAL)

# Of builtins, math, str, the collections and errno: in every firmware, as are the keywords (tests/test_shorten.py).
_WORDS = (Path(__file__).with_name("words.txt")).read_text().split()
# Syntax with names of its own, which the package does without.
_STRANGE = (ast.Nonlocal, ast.AsyncFunctionDef, ast.JoinedStr, ast.Match)
_PARAMETERS = 12  # words for them: as many as a function has at most


def sources() -> dict[str, Path]:
    """The package's files by module."""
    return {path.stem: path for path in sorted(_PACKAGE.glob("*.py"))}


def _tokens(text: str) -> set[str]:
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.string for token in found if token.type == tokenize.NAME}


def _is_const(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "const"


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _defined(tree: ast.Module) -> Iterator[str]:
    """Functions, classes, attributes, what is imported under another name, and names of the module itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname
    for body in [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        for statement in body:
            if isinstance(statement, ast.Assign) and not _is_const(statement.value):
                yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


@cache
def _trees() -> dict[str, ast.Module]:
    return {module: ast.parse(path.read_text()) for module, path in sources().items()}


@cache
def _keywords() -> set[str]:
    """What any call in the package gives by keyword."""
    nodes = (node for tree in _trees().values() for node in ast.walk(tree))
    return {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}


@cache
def names() -> tuple[dict[str, str], tuple[str, ...]]:
    """What becomes of each name that is the package's own, and the words that private parameters get."""
    trees = _trees()
    tokens = {module: _tokens(path.read_text()) for module, path in sources().items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    # What is asked for by a string, given by keyword or named by a file stays.
    kept = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    kept |= _keywords() | set(trees)
    others = set().union(*(found for module, found in tokens.items() if module not in _INTERNAL))
    free = [word for word in _WORDS if not any(word in found for found in tokens.values())]
    parameters, words = free[:_PARAMETERS], dict(enumerate(free[_PARAMETERS:]))
    total = len(words)
    chosen: dict[str, str] = {}
    for module in (*(m for m in _FIRST if m in trees), *(m for m in trees if m not in _FIRST)):
        for name in sorted(set(_defined(trees[module])) - kept):
            private = name.startswith("_") and not name.startswith("__")
            inner = module in _INTERNAL and name in _INNER and name not in others
            if (private or inner) and name not in chosen and words:
                # By the name itself, so that a name more changes few others' words, and few files on a board.
                at = int(hashlib.sha256(name.encode()).hexdigest(), 16) % total
                chosen[name] = words.pop(min(words, key=lambda i: (i - at) % total))
    return chosen, tuple(parameters)


class _Renaming(ast.NodeVisitor):
    """Where a module's text gets other names. scopes: what the parameters of the functions around a node have become.

    All else stays as it is written: of ast.unparse, MicroPython would make a tuple where `a, b = c, d` makes none.
    """

    def __init__(self, path: Path) -> None:
        self.lines = path.read_bytes().splitlines(keepends=True)
        self.names, self.parameters = names()
        self.internal = path.stem in _INTERNAL
        self.scopes: list[dict[str, str]] = []
        self.edits: dict[tuple[int, int], tuple[bytes, bytes]] = {}  # line, column: what stands there, what comes

    def text(self) -> str:
        """The module with all edits made."""
        lines = list(self.lines)
        for (line, column), (old, new) in sorted(self.edits.items(), reverse=True):
            row = lines[line - 1]
            assert row[column:].startswith(old), (line, column, old)
            lines[line - 1] = row[:column] + new + row[column + len(old) :]
        return b"".join(lines).decode()

    def named(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return self.names.get(name, name)

    def put(self, line: int, column: int, old: str, new: str) -> None:
        if old != new:
            self.edits[line, column] = (old.encode(), new.encode())

    def find(self, line: int, column: int, name: str, new: str) -> None:
        """The same for the first place of a name from there on, in that line."""
        found = re.compile(rb"\b" + name.encode() + rb"\b").search(self.lines[line - 1], column)
        assert found, (line, name)
        self.put(line, found.start(), name, new)

    def visit_Name(self, node: ast.Name) -> None:
        self.put(node.lineno, node.col_offset, node.id, self.named(node.id))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        end = node.end_col_offset or 0
        self.put(node.end_lineno or 0, end - len(node.attr), node.attr, self.names.get(node.attr, node.attr))

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name and node.type:
            self.find(node.lineno, node.type.end_col_offset or 0, node.name, self.named(node.name))
        self.generic_visit(node)

    def visit_Global(self, node: ast.Global) -> None:
        for name in node.names:
            self.find(node.lineno, node.col_offset, name, self.names.get(name, name))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "compat" and any(alias.name == "const" for alias in node.names):
            # The compiler folds const, and needs no import of it.
            rest = ", ".join(self.names.get(a.name, a.name) for a in node.names if a.name != "const")
            line = self.lines[node.lineno - 1][node.col_offset :].decode().rstrip("\n")
            self.put(node.lineno, node.col_offset, line, f"from .compat import {rest}" if rest else "pass")
            return
        for alias in node.names:
            self.put(alias.lineno, alias.col_offset, alias.name, self.names.get(alias.name, alias.name))
            if alias.asname:
                end = alias.end_col_offset or 0
                self.put(alias.lineno, end - len(alias.asname), alias.asname, self.named(alias.asname))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.find(node.lineno, node.col_offset + len("class"), node.name, self.names.get(node.name, node.name))
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.asname:
                self.find(alias.lineno, alias.col_offset + len(alias.name), alias.asname, self.named(alias.asname))

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for default in node.args.defaults:
            self.visit(default)
        self.scopes.append({argument.arg: argument.arg for argument in node.args.args})
        self.visit(node.body)
        self.scopes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        private = self.internal or (node.name.startswith("_") and not node.name.startswith("__"))
        for expression in [*node.args.defaults, *node.decorator_list]:
            self.visit(expression)
        taken = {word for scope in self.scopes for word in scope.values()}
        free = iter([word for word in self.parameters if word not in taken])
        scope = {}
        for argument in node.args.args:
            name = argument.arg
            scope[name] = next(free, name) if private and name not in _keywords() and name != "self" else name
            self.put(argument.lineno, argument.col_offset, name, scope[name])
        self.find(node.lineno, node.col_offset + len("def"), node.name, self.names.get(node.name, node.name))
        self.scopes.append(scope)
        for statement in node.body:
            self.visit(statement)
        self.scopes.pop()


def shortened(path: Path) -> str:
    """The text of a file of the package as it is compiled for a board."""
    renaming = _Renaming(path)
    tree = ast.parse(path.read_text())
    strange = [node for node in ast.walk(tree) if isinstance(node, _STRANGE)]
    if strange:
        raise NotImplementedError(
            f"{path.name}, line {getattr(strange[0], 'lineno', 0)}: names there are not understood"
        )
    renaming.visit(tree)
    return renaming.text()


def main() -> None:
    """Command line: the table."""
    for name, word in sorted(names()[0].items(), key=lambda pair: pair[1]):
        print(f"{word:30}{name}")


if __name__ == "__main__":
    main()
