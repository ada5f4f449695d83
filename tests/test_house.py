"""The house: who may import whom, how large files and functions are, names that say nothing, and docs/traps.md."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import started
from conftest import ROOT

STAGES = sorted(path.stem for path in ROOT.glob("0*.py"))
OUTSIDE = ("bench", "forks", "tests", "tiny", "smollm2")  # may import anything, and nothing of the house imports them
ABOVE = {"plumbing": [], "common": ["plumbing"], "engines": ["common", "plumbing"]}
ABOVE["judges"] = ["engines", *ABOVE["engines"]]
ALLOWED = {room: {room, *others} for room, others in ABOVE.items()}
ALLOWED |= {stage: {"judges", *ABOVE["judges"]} for stage in STAGES}
FILES = sorted(
    path for room in ALLOWED for path in [ROOT / f"{room}.py", *(ROOT / room).glob("**/*.py")] if path.exists()
)
EVERY_FILE = [*FILES, *(path for room in OUTSIDE for path in sorted((ROOT / room).glob("**/*.py")))]
# bare names of files outside, as scripts import them that lie beside each other
BARE = {path.stem: room for room in OUTSIDE for path in (ROOT / room).glob("**/*.py") if path.stem != "__init__"}
SIZES = {
    "common.py": 500,
    **{"01_generate.py": 100, "02_verify_sft.py": 290, "03_steer_selfgen.py": 300},
    **{"04_grpo.py": 430, "05_eval.py": 440},
}
LOADERS = ("import_module", "__import__", "run_path", "run_module", "spec_from_file_location")
VAGUE = {"found", "made", "known", "there", "beside", "apart"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    """engines/hf.py is engines.hf, engines/__init__.py is engines."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def imports_of(path: Path, late: bool = True) -> list[tuple[int, str]]:
    """(line, module) of all that a file imports, also by name as in import_module("04_grpo"); `late`: in functions too."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    imported, todo = [], [tree_of(path)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            imported += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) + 1 - node.level], *filter(None, [base])]
                )
            for alias in node.names:  # a file of the package, or a name in its __init__.py
                is_file = (ROOT / f"{base}.{alias.name}".replace(".", "/")).with_suffix(".py").exists()
                imported.append((node.lineno, f"{base}.{alias.name}" if is_file else base))
        elif isinstance(node, ast.Call) and called(node) in LOADERS:
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            texts = [text.removesuffix(".py").replace("/", ".") for text in texts if isinstance(text, str)]
            imported += [(node.lineno, text.strip(".")) for text in texts]
        if late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return imported


def room_of(module: str) -> str:
    """The room that a module is in; "" where it is not ours."""
    top = module.partition(".")[0]
    return top if top in ALLOWED or top in OUTSIDE else BARE.get(module, "")


# Imports --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    """Stages import the four rooms, judges the three below, and so on; no stage another one; nothing what is outside."""
    room = room_of(name_of(path))
    up = [f"line {line}: {name}" for line, name in imports_of(path) if room_of(name) not in ALLOWED[room] | {""}]
    assert not up, f"{name_of(path)} imports upward or outward: {up}"


def test_no_circle_of_modules():
    """At the top of files; an import inside a function may come late."""
    graph = {name: {other for _, other in imports_of(path, late=False)} for name, path in MODULES.items()}
    assert sum(bool(others & MODULES.keys()) for others in graph.values()) > 20  # it is the house's graph
    try:
        TopologicalSorter({name: others & MODULES.keys() for name, others in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


# Sizes ----------------------------------------------------------------------------------------------------------------
def test_sizes_of_files():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in SIZES}
    assert {*SIZES} == {"common.py", *(f"{stage}.py" for stage in STAGES)}
    assert {name: f"{n} lines, {SIZES[name]} at most" for name, n in lines.items() if n > SIZES[name]} == {}
    assert sum(lines.values()) < 2_000


@pytest.mark.parametrize("file", SIZES)
def test_no_function_is_long(file):
    defs = [n for n in ast.walk(tree_of(ROOT / file)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert defs and [(n.name, n.end_lineno - n.lineno + 1) for n in defs if n.end_lineno - n.lineno >= 90] == []


# Words ----------------------------------------------------------------------------------------------------------------
WORDED = [path for path in FILES if path.parent.name != "judges" or path.name == "judge.py"]


def bound_names(node: ast.AST) -> list[str]:
    """Names that a node gives to something: a variable, an attribute, a parameter, an alias."""
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.id if isinstance(node, ast.Name) else node.attr]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.alias):
        return [node.asname or ""]
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
        return [node.name or ""]
    return []


def is_ceiling_by_minus(node: ast.AST) -> bool:
    """-(-a // b)"""
    if not (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.BinOp)):
        return False
    op, left = node.operand.op, node.operand.left
    return isinstance(op, ast.FloorDiv) and isinstance(left, ast.UnaryOp) and isinstance(left.op, ast.USub)


def is_return_or_fail(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Return) and isinstance(node.value, ast.BoolOp) and isinstance(node.value.op, ast.Or)):
        return False
    last = node.value.values[-1]
    return isinstance(last, ast.Call) and called(last) == "fail"


@pytest.mark.parametrize("path", WORDED, ids=name_of)
def test_words(path):
    """No name that only says that something is there, no riddle where math.ceil or an `if` says it."""
    wrong = []
    for node in ast.walk(tree_of(path)):
        wrong += [f"line {node.lineno}: {name}" for name in bound_names(node) if name in VAGUE]
        if is_ceiling_by_minus(node) or is_return_or_fail(node):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not wrong, f"{path.relative_to(ROOT)}: {wrong}"


# Help -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["to_gguf", "counting", "compare", "transcripts", "verdicts"])
def test_help_says_what_a_script_does_and_does_nothing(script):
    done = started.run([f"bench/{script}.py", "--help"])
    first = ast.get_docstring(tree_of(ROOT / f"bench/{script}.py")).split()[:8]
    assert done.returncode == 0 and " ".join(first) in " ".join(done.stdout.split()), done.stderr
    assert not (ROOT / "--help").exists()


# docs/traps.md --------------------------------------------------------------------------------------------------------
TRAPS = (ROOT / "docs/traps.md").read_text()
CITED = re.compile(r"\btraps?(?:\.md,)?\s+(?:#\s+)?(\d+(?:(?:,| and)\s+\d+)*)", re.I)


def sections() -> dict[int, str]:
    parts = re.split(r'^<a id="trap-(\d+)"></a>\n', TRAPS, flags=re.M)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


def defined_in(path: Path) -> set[str]:
    """Functions, classes, methods as Class.method, and constants at the top of a file."""
    names = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            names |= {f"{node.name}.{part.name}"} if isinstance(part, ast.FunctionDef) else set()
        for target in node.targets if isinstance(node, ast.Assign) else []:
            names |= {name for part in ast.walk(target) for name in bound_names(part)}
    return names


def test_every_trap_has_its_place_on_the_page():
    assert list(sections()) == list(range(1, 22))
    for number, text in sections().items():
        assert text.startswith(f"## {number}. ") and f"| [{number}](#trap-{number}) " in TRAPS
        _, wrong, handled, tests = re.split(r"^(?:Goes wrong|Handled|Tests): ", text, flags=re.M)
        assert len(wrong) > 40, number
        assert re.search(r"`[\w.]+`\s+in\s+`[\w/.]+\.py`", handled), number
        assert re.search(r"`tests/\w+\.py::\w+`", tests) or "no test" in tests, number


def test_every_cited_trap_is_on_the_page():
    cited = {}
    for path in EVERY_FILE:
        for match in CITED.finditer(path.read_text()):
            for number in re.findall(r"\d+", match[1]):
                cited.setdefault(int(number), []).append(path.name)
    assert len(cited) >= 12, "the pattern misses citations"
    assert {number: files for number, files in cited.items() if number not in sections()} == {}


def test_what_the_page_names_exists():
    spans = re.findall(r"`([\w/.]+\.(?:py|md))(?:::(\w+))?`", TRAPS)
    places = re.findall(r"`([\w.]+)`\s+in\s+`([\w/.]+\.py)`", TRAPS)
    assert len(spans) > 80 and len(places) > 35
    assert [file for file, _ in spans if not (ROOT / file).is_file()] == []
    named = [(name, file) for file, name in spans if name] + places
    assert [(name, file) for name, file in named if name not in defined_in(ROOT / file)] == []
    assert [file for file, name in spans if name and not (file.startswith("tests/") and name.startswith("test_"))] == []
