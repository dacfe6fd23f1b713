"""Labelled examples of every task out of the standard library's source: real data that is on every machine.

- classification: a function -> the family of modules that it is of;
- tagging: the tokens of a line -> the role of each name, which takes its neighbours to tell;
- question_answering: the default of a function's parameter, a span of the function's first lines, or none;
- seq2seq: a line -> the same in words (bigtrain.data.spoken), or with data.pairs=docstring, a function without its
  docstring -> the docstring's first line. The words are the default, for they can be learned from scratch in minutes,
  to a BLEU of 45; in that time docstrings, which take knowing the world, come to 0.5;
- instruction: the same asked in words, from the signature alone.

Only packages that every distribution of Python 3.10 to 3.13 ships are read. Held out are whole files, of every family
of modules some, first those whose hash holds them out where the standard library is split as text: a model that was
pretrained on it has seen as little of them as can be.
"""

from __future__ import annotations

import ast
import io
import re
import sysconfig
import tokenize
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config import StdlibDataConfig
from bigtrain.data.corpus import STDLIB_LEFT_OUT, digest_of, hashed
from bigtrain.data.formats import SourceFile, stamp
from bigtrain.data.records import Record, Records
from bigtrain.data.spoken import spoken
from bigtrain.errors import ConfigError

FORMAT = 1  # raise it when the same library would give other examples
SNIPPET_LINES = (3, 40)
HEAD_LINES = 12  # of a function, which a question is asked of
LINE_TOKENS = (4, 40)
MOST_PER_FAMILY = 400  # classification: the families come out about equal
MOST_LINES = {"": 4000, "rare": 2000}  # tagging; rare: lines with a class or a module
MOST_QUESTIONS = {"answerable": 2700, "unanswerable": 900}
MOST_DOCSTRINGS = 3000
MOST_SPOKEN = 20000
SPOKEN_CHARACTERS = (8, 60)

FAMILIES: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "email": ("email", "mailbox", "smtplib", "imaplib", "poplib"),
    "files": ("tarfile", "zipfile", "gzip", "bz2", "lzma", "_compression", "shutil", "pathlib", "tempfile", "glob",
              "fnmatch", "filecmp", "posixpath", "ntpath", "genericpath", "os", "fileinput"),
    "introspection": ("importlib", "inspect", "dis", "ast", "pkgutil", "runpy", "modulefinder", "zipimport", "pyclbr",
                      "symtable", "traceback", "linecache", "codeop", "opcode", "trace", "bdb", "pdb"),
    "markup": ("xml", "html", "json", "plistlib", "csv", "configparser", "tomllib"),
    "numbers": ("_pydecimal", "fractions", "statistics", "random", "numbers", "datetime", "_pydatetime", "calendar",
                "ipaddress", "zoneinfo", "_strptime", "colorsys", "uuid", "heapq", "bisect"),
    "processes": ("multiprocessing", "concurrent", "threading", "queue", "subprocess", "sched", "selectors", "signal",
                  "_threading_local"),
    "testing": ("unittest", "doctest"),
    "web": ("http", "urllib", "xmlrpc", "ftplib", "socketserver", "wsgiref", "webbrowser", "socket", "ssl"),
}  # fmt: skip
# Well documented modules besides: only what reads docstrings reads them.
OTHERS = ("logging", "collections", "functools", "contextlib", "enum", "typing", "types", "weakref", "operator",
          "codecs", "textwrap", "difflib", "shlex", "pydoc", "_pyio", "_collections_abc", "warnings", "timeit", "code",
          "base64", "quopri", "hmac", "secrets", "sched", "graphlib", "site", "mimetypes", "reprlib",
          "copy")  # fmt: skip
IMPORT = re.compile(r"^\s*(import|from)\s", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One parsed module. `family` is "" outside of all families."""

    name: str  # relative path
    family: str
    text: str
    lines: list[str]
    tree: ast.Module


@dataclass(frozen=True)
class Example:
    """`group`: so many are taken of each. `key`: equal ones are taken once."""

    group: str
    file: str
    key: str
    record: Record


Function = ast.FunctionDef | ast.AsyncFunctionDef


def open_stdlib(data: StdlibDataConfig, task: str, cache: Path) -> Records:
    """The standard library's examples of one task. Raises ConfigError for a task that it has none of."""
    if task == "seq2seq":
        task = data.pairs
    if task not in _TASKS:
        raise ConfigError(
            "data.kind", data.kind, f"the standard library holds no examples of {task}", "data=labelled data.path=FILE"
        )
    make, most, packages = _TASKS[task]
    files = hashed(_files(packages), cache)
    parts = {"stdlib": FORMAT, "files": [(file.name, file.digest) for file in files]}

    def read() -> Iterator[tuple[Record, bool]]:
        taken = _capped((example for source in _parsed(files) for example in make(source)), most)
        held_out = _held_out_files(taken, data.held_out)
        for example in taken:
            yield example.record, example.file in held_out

    return Records(task, data.held_out, ("data.kind", data.kind), read, parts)


def _files(packages: Iterable[str]) -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for package in sorted(packages):
        module = root / f"{package}.py"
        for path in [module] if module.is_file() else sorted((root / package).rglob("*.py")):
            relative = path.relative_to(root)
            if STDLIB_LEFT_OUT.isdisjoint(relative.parts):
                found.append(SourceFile(path, relative.as_posix(), "data.kind", *stamp(path)))
    return found


def _parsed(files: list[SourceFile]) -> Iterator[Source]:
    for file in files:
        try:
            text = file.path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an escape that a later Python will refuse
                tree = ast.parse(text)
        except (SyntaxError, ValueError, OSError):
            continue  # a template, or another encoding: not ours to repair
        yield Source(file.name, _family(file.name), text, text.split("\n"), tree)


def _capped(examples: Iterable[Example], most: dict[str, int]) -> list[Example]:
    """The examples in order, each key once, of every group those whose keys' hashes are the lowest."""
    unique = {example.key: example for example in examples}
    ranked: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for key, example in unique.items():
        ranked[example.group].append((digest_of(key.encode()), key))
    taken = {key for group, keys in ranked.items() for _, key in sorted(keys)[: most.get(group, most.get("", 0))]}
    return [example for key, example in unique.items() if key in taken]


def _held_out_files(examples: list[Example], fraction: float) -> set[str]:
    """The files whose examples are held out: of every family about that fraction of its examples, and some at least.

    A file that would take over half as much again as is wanted stays in training.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        counts[_family(example.file)][example.file] += 1
    chosen = set()
    for files in counts.values():
        wanted, held = max(fraction * sum(files.values()), 1), 0
        for file in sorted(files, key=lambda file: digest_of(file.encode())):
            if held < wanted and held + files[file] <= 1.5 * wanted:
                chosen.add(file)
                held += files[file]
        if not held and len(files) > 1:
            chosen.add(min(files, key=lambda file: files[file]))
    return chosen


def _family(name: str) -> str:
    package = name.split("/")[0].removesuffix(".py")
    return next((family for family, packages in FAMILIES.items() if package in packages), "")


# ------------------------------------------------------------------------------------------------ functions


def _functions(source: Source) -> Iterator[tuple[str, Function]]:
    """(qualified name, function) in the order of the source; functions inside functions left out."""

    def walk(statements: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
        for statement in statements:
            if isinstance(statement, Function):
                yield prefix + statement.name, statement
            elif isinstance(statement, ast.ClassDef):
                yield from walk(statement.body, f"{prefix}{statement.name}.")
            elif isinstance(statement, (ast.If, ast.Try)):
                yield from walk([*statement.body, *statement.orelse], prefix)

    yield from walk(source.tree.body, "")


def _has_docstring(function: Function) -> bool:
    first = function.body[0]
    return (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )  # fmt: skip


def _dedented(source: Source, function: Function, left_out: set[int]) -> list[str] | None:
    """The function's lines but those numbers, moved to the left edge; None where one does not begin that far right."""
    indent = function.col_offset
    found = []
    for number in range(function.lineno, (function.end_lineno or function.lineno) + 1):
        line = source.lines[number - 1]
        if number not in left_out:
            if line[:indent].strip():
                return None
            found.append(line[indent:].rstrip())
    return found


def _snippet(source: Source, function: Function) -> str | None:
    """The function without its docstring, if that has SNIPPET_LINES lines."""
    least, most = SNIPPET_LINES
    left_out: set[int] = set()
    if _has_docstring(function):
        docstring = function.body[0]
        left_out = set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
        if len(function.body) == 1 or function.lineno in left_out:
            return None
    if not least <= (function.end_lineno or 0) - function.lineno + 1 - len(left_out) <= most:
        return None
    lines = _dedented(source, function, left_out)
    return "\n".join(lines) if lines is not None else None


# ---------------------------------------------------------------------------------------------------- tasks


def _classification(source: Source) -> Iterator[Example]:
    # A function that names a module of its family would give the answer away, and so may what it imports.
    names = re.compile(rf"\b({'|'.join(FAMILIES[source.family])})\b")
    for _, function in _functions(source):
        text = _snippet(source, function)
        if text is not None and not names.search(text) and not IMPORT.search(text):
            yield Example(source.family, source.name, text, {"text": text, "label": source.family})


def _question_answering(source: Source) -> Iterator[Example]:
    for name, function in _functions(source):
        lines = _dedented(source, function, set())
        if lines is None or not source.text.isascii():
            continue  # the parser counts bytes
        lines = lines[:HEAD_LINES]
        context = "\n".join(lines)
        for parameter, default in _asked(function):
            question = f"What is the default of parameter {parameter} of {name.rpartition('.')[2]}?"
            answers = []
            if default is not None:
                row = default.lineno - function.lineno
                if row >= len(lines) or default.end_lineno != default.lineno or default.end_col_offset is None:
                    continue
                start = sum(len(line) + 1 for line in lines[:row]) + default.col_offset - function.col_offset
                answer = context[start : start + default.end_col_offset - default.col_offset]
                answers = [{"text": answer, "start": start}]
            record = {
                "id": f"{source.name}:{function.lineno}:{parameter}",
                "question": question,
                "context": context,
                "answers": answers,
            }
            group = "answerable" if answers else "unanswerable"
            yield Example(group, source.name, f"{question}\n{context}", record)


def _asked(function: Function) -> Iterator[tuple[str, ast.expr | None]]:
    """(parameter, its default): at most two that have one, and one that has none."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = [
        *zip(positional, [*defaults, *arguments.defaults], strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    without = [argument.arg for argument, default in pairs if default is None and argument.arg not in ("self", "cls")]
    yield from [(argument.arg, default) for argument, default in pairs if default is not None][:2]
    yield from [(name, None) for name in without[:1]]


def _documented(source: Source) -> Iterator[tuple[Function, str, str]]:
    """(function, its code without the docstring, the docstring's first line where that is a sentence)."""
    for _, function in _functions(source):
        if not _has_docstring(function):
            continue
        first, _, rest = (ast.get_docstring(function) or "").partition("\n")
        first = first.strip()
        whole = first.endswith(".") or not rest.split("\n", 1)[0].strip()
        if whole and 3 <= len(first.split()) <= 25 and (code := _snippet(source, function)) is not None:
            yield function, code, first


def _spoken(source: Source) -> Iterator[Example]:
    """Each whole line once in all files: what is held out is never a line that was trained on."""
    least, most = SPOKEN_CHARACTERS
    for line in map(str.strip, source.lines):
        words = spoken(line) if least <= len(line) <= most and line.isascii() else None
        if words not in (None, line):  # `import sys` is said as it stands
            yield Example("", source.name, line, {"source": line, "target": words})


def _docstring(source: Source) -> Iterator[Example]:
    for _, code, line in _documented(source):
        yield Example("", source.name, code, {"source": code, "target": line})


def _instruction(source: Source) -> Iterator[Example]:
    for function, _, line in _documented(source):
        returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
        kind = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
        signature = f"{kind} {function.name}({ast.unparse(function.args)}){returns}:"
        prompt = f"{signature}\nWrite the docstring's first line."
        yield Example("", source.name, prompt, {"prompt": prompt, "response": line})


def _tagging(source: Source) -> Iterator[Example]:
    roles = _roles(source.tree)
    for line in _logical_lines(source.text):
        words = [token.string for token in line]
        least, most = LINE_TOKENS
        if not least <= len(words) <= most or any(not word.isascii() or len(word.split()) != 1 for word in words):
            continue  # text with spaces is no word, and columns of a line that is not ASCII are counted in bytes
        tags = _module_tags(words) or [
            _tag(roles.get(token.start), words[number - 1] if number else "") for number, token in enumerate(line)
        ]
        if any(tag != "O" for tag in tags):
            group = "rare" if any(tag in ("B-CLASS", "B-MODULE") for tag in tags) else ""
            yield Example(group, source.name, " ".join(words), {"words": words, "tags": tags})


def _roles(tree: ast.Module) -> dict[tuple[int, int], str]:
    """(line, column) at which a name starts -> its role."""
    found: dict[tuple[int, int], str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            found[node.lineno, node.col_offset] = "PARAMETER"
        elif isinstance(node, ast.Attribute) and node.end_lineno and node.end_col_offset:
            found.setdefault((node.end_lineno, node.end_col_offset - len(node.attr)), "ATTRIBUTE")
        elif isinstance(node, ast.Call):  # comes before its own function in the walk
            called = node.func
            if isinstance(called, ast.Name):
                found[called.lineno, called.col_offset] = "CALL"
            elif isinstance(called, ast.Attribute) and called.end_lineno and called.end_col_offset:
                found[called.end_lineno, called.end_col_offset - len(called.attr)] = "CALL"
    return found


def _tag(role: str | None, before: str) -> str:
    role = {"def": "FUNCTION", "class": "CLASS"}.get(before, role)
    return f"B-{role}" if role else "O"


def _module_tags(words: list[str]) -> list[str]:
    """The tags of an import; none for any other line. A dotted name is one span."""
    if words[0] not in ("import", "from"):
        return []
    tags: list[str] = []
    inside, previous = False, "O"
    for word in words:
        if word in ("import", "from") or (word == "," and words[0] == "import"):
            inside = word != "import" or words[0] == "import"
            previous = "O"
        elif word == "as":
            inside, previous = False, "O"
        elif inside:
            previous = "B-MODULE" if previous == "O" else "I-MODULE"
        else:
            previous = "O"
        tags.append(previous)
    return tags


def _logical_lines(text: str) -> Iterator[list[tokenize.TokenInfo]]:
    """The tokens of each logical line without comments; lines with f-strings left out, whose tokens vary by version."""
    line: list[tokenize.TokenInfo] = []
    skip = False
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NEWLINE:
            if line and not skip:
                yield line
            line, skip = [], False
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            line.append(token)
            is_text = token.type == tokenize.STRING
            skip = skip or not (is_text or token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER))
            skip = skip or (is_text and "f" in token.string.split(token.string[-1])[0].lower())


_ALL_FAMILIES = frozenset(package for packages in FAMILIES.values() for package in packages)
_LINES_OF = frozenset(FAMILIES["asyncio"] + FAMILIES["markup"] + FAMILIES["processes"] + FAMILIES["testing"])

# task -> what makes its examples, how many are taken of a group, what they are read from
_TASKS: dict[str, tuple[Callable[[Source], Iterator[Example]], dict[str, int], frozenset[str]]] = {
    "classification": (_classification, {"": MOST_PER_FAMILY}, _ALL_FAMILIES),
    "tagging": (_tagging, MOST_LINES, _LINES_OF),
    "question_answering": (_question_answering, MOST_QUESTIONS, _ALL_FAMILIES),
    "spoken": (_spoken, {"": MOST_SPOKEN}, _ALL_FAMILIES | frozenset(OTHERS)),
    "docstring": (_docstring, {"": MOST_DOCSTRINGS}, _ALL_FAMILIES | frozenset(OTHERS)),
    "instruction": (_instruction, {"": MOST_DOCSTRINGS}, _ALL_FAMILIES | frozenset(OTHERS)),
}
