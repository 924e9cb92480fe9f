# SPDX-License-Identifier: MIT
"""How much each file says, and how tightly it is packed.

    python bench/density.py                # gan.py, metrics.py, the tests, recipes and bench
    python bench/density.py --check        # the same, with status 1 where a file is too dense
    python bench/density.py FILE...

nodes: statements and expressions of Python's syntax tree, without docstrings: a program's size, whatever its layout.
nodes per line: nodes over the lines that hold code; nanoGPT has 5.5 to 6.9, k-diffusion's evaluation 6.8.
complexity: McCabe's, of a function with those inside it. packed: places where one line does the work of two.
"""

import argparse
import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_COMPLEX = 12
MOST_NODES = 7.5  # per line
MOST_NODES_OF_TESTS = 9
FORBIDDEN = ("text x boolean", "joined statements", "noqa", "nested ternaries")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.comprehension, ast.Assert, ast.match_case)
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


@dataclass
class Measure:
    """What a file says."""

    path: Path
    lines: int
    code: int  # lines that hold code
    nodes: int
    functions: list  # [(complexity, name)], the most complex first
    packed: dict  # {kind: number of places}

    def per_line(self):
        return self.nodes / max(1, self.code)

    def faults(self):
        """Lists what `--check` refuses."""
        is_test = self.path.name.startswith("test_")
        most = MOST_NODES_OF_TESTS if is_test else MOST_NODES
        found = [f"{number} {kind}" for kind, number in self.packed.items() if kind in FORBIDDEN]
        if round(self.per_line(), 1) > most:
            found.append(f"{self.per_line():.1f} nodes per line, more than {most}")
        for complexity, name in self.functions:
            if complexity > MOST_COMPLEX and not is_test:
                found.append(f"{name} has complexity {complexity}, more than {MOST_COMPLEX}")
        return found

    def name(self):
        return str(self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path)


def measure(path):
    """Measures a file of Python."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    docs = list(docstrings(tree))
    ignored = {id(node) for doc in docs for node in ast.walk(doc)}
    said = [node for node in ast.walk(tree) if is_said(node) and id(node) not in ignored]
    functions = [(complexity(node), node.name) for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return Measure(
        path=path,
        lines=len(text.splitlines()),
        code=len(code_lines(tokens, docs)),
        nodes=len(said),
        functions=sorted(functions, reverse=True),
        packed=count_packed(tree, tokens),
    )


def is_said(node):
    return isinstance(node, (ast.stmt, ast.expr))


def docstrings(tree):
    """Yields the docstrings of a module, its classes and functions, as statements."""
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
            and ast.get_docstring(node, clean=False) is not None
        ):
            yield node.body[0]


def code_lines(tokens, docs):
    """Finds the lines on which a token of code begins; a string of many lines is one."""
    lines = {token.start[0] for token in tokens if token.type not in LAYOUT}
    for doc in docs:
        lines -= set(range(doc.lineno, doc.end_lineno + 1))
    return lines


def complexity(function):
    """Counts the ways through a function: one, and one more for each branch, condition and filter."""
    ways = 1
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            ways += 1
        if isinstance(node, ast.BoolOp):
            ways += len(node.values) - 1
        if isinstance(node, ast.comprehension):
            ways += len(node.ifs)
    return ways


# ---- Packed places
def count_packed(tree, tokens):
    """Counts packed places by their kind; kinds without any are left out."""
    counts = {"noqa": sum(token.type == tokenize.COMMENT and "noqa" in token.string for token in tokens)}
    for node in ast.walk(tree):
        for kind, matches in PACKED.items():
            counts[kind] = counts.get(kind, 0) + matches(node)
    return {kind: number for kind, number in counts.items() if number}


def is_tuple_assignment(node):
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def is_repeated_text(node):
    """Tells whether a text or a list is multiplied by anything but a number that is written out."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    sides = (node.left, node.right)
    return any(map(is_text_or_list, sides)) and not any(map(is_number, sides))


def is_text_or_list(node):
    return isinstance(node, (ast.JoinedStr, ast.List)) or (isinstance(node, ast.Constant) and type(node.value) is str)


def is_number(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def is_walrus(node):
    return isinstance(node, ast.NamedExpr)


def is_joined(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)


def is_nested_ternary(node):
    inner = [other for other in ast.walk(node) if isinstance(other, ast.IfExp)]
    return isinstance(node, ast.IfExp) and len(inner) > 1


def is_long_chain(node):
    is_simple = isinstance(node, (ast.Assign, ast.Return, ast.Expr, ast.AugAssign))
    return is_simple and sum(map(is_said, ast.walk(node))) > 100


PACKED = {
    "tuple assignments": is_tuple_assignment,
    "text x boolean": is_repeated_text,
    "walrus": is_walrus,
    "joined statements": is_joined,
    "nested ternaries": is_nested_ternary,
    "chains over 100 nodes": is_long_chain,
}


# ---- Command
def find_files():
    """Lists the project's programs and tests."""
    folders = [ROOT / "recipes", ROOT / "recipes" / "tests", ROOT / "bench"]
    found = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return [ROOT / "gan.py", ROOT / "metrics.py", ROOT / "test_gan.py", *found]


def show(measures):
    """Prints a line for each file, what is packed in it, and a line of totals."""
    print(f"{'file':34}{'lines':>7}{'code':>7}{'nodes':>8}{'per line':>10}   most complex; packed")
    for m in measures:
        complex_ones = [f"{name} {complexity}" for complexity, name in m.functions[:3]]
        places = [f"{number} {kind}" for kind, number in m.packed.items()]
        rest = "; ".join(filter(None, [", ".join(complex_ones), ", ".join(places)]))
        print(f"{m.name():34}{m.lines:7,}{m.code:7,}{m.nodes:8,}{m.per_line():10.1f}   {rest}")
    lines, code, nodes = (sum(getattr(m, name) for m in measures) for name in ("lines", "code", "nodes"))
    print(f"{'in all':34}{lines:7,}{code:7,}{nodes:8,}{nodes / max(1, code):10.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="what to measure (the whole project)")
    parser.add_argument("--check", action="store_true", help="end with status 1 where a file is too dense")
    args = parser.parse_args()
    measures = [measure(path) for path in args.files or find_files()]
    show(measures)
    faults = [f"{m.name()}: {fault}" for m in measures for fault in m.faults()]
    if args.check and faults:
        print("\n".join(["", *faults]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
