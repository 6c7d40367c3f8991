"""What the documents name, and whether it is there: links, paths, modules, targets of `make`; whether Python parses."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

FOLDERS = ("sparse_compile", "passes", "kernels", "tests", "benchmarks", "examples", "docs")
"""Folders of the repository whose paths a document may name."""

READERS_OWN = {"quick_start.py"}
"""Files that a document tells its reader to make."""

WRITTEN_LATER = ("kernels/configs/",)
"""Folders that a program fills on a user's machine; the repository may have nothing in them."""

_FENCE = re.compile(r"^(```+)([\w-]*)[^\n]*\n(.*?)^\1[ ]*$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6}[ ]+(.+?)[ ]*$", re.MULTILINE)
_PATH = re.compile(rf"(?<![\w./~$<>-])(?:{'|'.join(FOLDERS)})/[\w./<>*-]*")
_FILE = re.compile(r"[\w./-]+\.py")
_MODULE = re.compile(r"(?<![\w./-])sparse_compile(?:\.[A-Za-z_]\w*)+(?![\w/])")
_TARGET = re.compile(r"(?:^|[\s;&`])make[ ]+([a-z][a-z-]*)")
_SHELLS = {"", "bash", "sh", "shell", "console"}


def faults(document: Path, root: Path) -> list[str]:
    """Return, in words, everything that a document names and that is not there."""
    text = document.read_text(encoding="utf-8")
    code = [body for _, body in fences(text)] + spans(text)
    shell = [body for language, body in fences(text) if language in _SHELLS] + spans(text)
    python = [body for language, body in fences(text) if language == "python"]
    found = [
        *(f"no Python: {fault}" for body in python if (fault := syntax_fault(body))),
        *(f"link {target}: {fault}" for target in links(text) if (fault := link_fault(target, document))),
        *(f"no path {path}" for path in named(_PATH, code) if not path_exists(path, root)),
        *(f"no file {file}" for file in files_named(text) if not file_exists(file, root)),
        *(f"no module or name {name}" for name in named(_MODULE, code) if not name_exists(name)),
        *(f"no target make {target}" for target in named(_TARGET, shell) if target not in make_targets(root)),
    ]
    return [f"{document.relative_to(root).as_posix()}: {fault}" for fault in found]


# --- What a document says ---------------------------------------------------------------------------------------------


def fences(text: str) -> list[tuple[str, str]]:
    """Return the language and the text of every fenced block."""
    return [(language, body) for _, language, body in _FENCE.findall(text)]


def spans(text: str) -> list[str]:
    """Return what stands in backticks in prose, headings and tables."""
    return [body for _, body in _SPAN.findall(_FENCE.sub("", text))]


def links(text: str) -> list[str]:
    """Return the relative targets of links and pictures."""
    prose = _SPAN.sub("`code`", _FENCE.sub("", text))
    return [target for target in _LINK.findall(prose) if not re.match(r"[a-z]+:", target)]


def named(pattern: re.Pattern[str], code: Iterable[str]) -> Iterator[str]:
    """Yield every match of a pattern in pieces of code, each once."""
    yield from dict.fromkeys(match for piece in code for match in pattern.findall(piece))


def files_named(text: str) -> Iterator[str]:
    """Yield the Python files that stand alone in backticks, maybe with the name of a test behind them."""
    parts = (span.split("::")[0] for span in spans(text))
    yield from dict.fromkeys(part for part in parts if _FILE.fullmatch(part) and part not in READERS_OWN)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    counts: dict[str, int] = {}
    found = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = counts.get(slug, 0)
        counts[slug] = count + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def tables(text: str) -> list[list[list[str]]]:
    """Return every table as lines of cells, its head first."""
    found: list[list[list[str]]] = [[]]
    for line in _FENCE.sub("", text).splitlines():
        if not line.startswith("|"):
            found.append([])
        elif not re.fullmatch(r"[|\s:-]+", line):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [table for table in found if table]


def syntax_fault(code: str) -> str:
    """Say why a block is no Python; empty where it is."""
    try:
        ast.parse(code)
    except SyntaxError as error:
        return str(error)
    return ""


# --- What is there ----------------------------------------------------------------------------------------------------


def link_fault(target: str, document: Path) -> str:
    """Say what is wrong with a relative link; empty where it resolves."""
    name, _, anchor = target.partition("#")
    file = document.parent / name if name else document
    if not file.exists():
        return "no such file"
    if anchor and (file.suffix != ".md" or anchor not in anchors(file.read_text(encoding="utf-8"))):
        return "no such heading"
    return ""


def path_exists(path: str, root: Path) -> bool:
    """Say whether a path of the repository is there; `<name>` and `*` stand for anything."""
    return path.startswith(WRITTEN_LATER) or any(root.glob(re.sub(r"<[^>]*>", "*", path).rstrip("./")))


def file_exists(name: str, root: Path) -> bool:
    """Say whether some file of the repository has this name, or a path that ends in it."""
    return any(f"/{path}".endswith(f"/{name}") for path in python_files(root))


@cache
def python_files(root: Path) -> tuple[str, ...]:
    """Return the paths of all Python files of the repository."""
    inside = [file for folder in FOLDERS for file in (root / folder).rglob("*.py")]
    return tuple(file.relative_to(root).as_posix() for file in (*root.glob("*.py"), *inside))


def name_exists(name: str) -> bool:
    """Say whether a dotted name is a module of the package, or something that a module has."""
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return defined_in_source(name)
    return True


def defined_in_source(name: str) -> bool:
    """Say whether a class or function stands in a module that needs a library which is not installed."""
    module, _, attribute = name.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    if spec is None or spec.origin is None:
        return False
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute for node in body)


def make_targets(root: Path) -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
