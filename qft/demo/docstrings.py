"""The demo's task: from a function's signature to the first sentence of its docstring.

Nothing is shipped and nothing is downloaded: every Python installation has its own standard
library, a few hundred well documented modules, and the rows are read from there when they are asked
for. The modules are parsed, never imported, so reading them has no side effects. Train and test
rows come from different modules, and neither set's modules (nor their tests, nor copies of them)
were in the text the demo's base model was trained on.

The exact rows depend on the Python version. Modules that a version lacks are named, not errors.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from qft.errors import DataError

TRAIN_MODULES: tuple[str, ...] = (
    "ast", "base64", "bz2", "cmd", "code", "codecs", "collections", "contextlib", "datetime",
    "decimal", "dis", "enum", "filecmp", "fileinput", "ftplib", "functools", "genericpath",
    "glob", "gzip", "imaplib", "inspect", "ipaddress", "locale", "logging", "lzma", "mailbox",
    "mimetypes", "netrc", "ntpath", "operator", "optparse", "os", "pickle", "pickletools",
    "platform", "plistlib", "poplib", "posixpath", "pprint", "shelve", "smtplib", "socket",
    "socketserver", "ssl", "subprocess", "sysconfig", "tarfile", "tempfile", "threading",
    "timeit", "trace", "traceback", "typing", "urllib", "uuid", "weakref", "zipfile",
)  # fmt: skip
"""Modules (packages with everything inside) the demo's train rows come from."""

TEST_MODULES: tuple[str, ...] = (
    "bisect", "calendar", "configparser", "copy", "csv", "difflib", "fractions", "graphlib",
    "heapq", "json", "linecache", "pathlib", "queue", "random", "sched", "selectors", "shlex",
    "shutil", "statistics", "textwrap", "warnings",
)  # fmt: skip
"""Modules the demo's test rows come from: none of them is a train module."""

# What repeats a demo module's wording under another name: helpers split off from it, older or
# asynchronous cousins, and test files that do not carry the module's name.
_COPIES: tuple[str, ...] = (
    "_aix_support.py", "_collections_abc.py", "_compression.py", "_opcode_metadata.py",
    "_osx_support.py", "_strptime.py", "_sysconfigdata*", "_threading_local.py", "_weakrefset.py",
    "opcode.py", "sre_*.py", "_ast_unparse.py", "_py_warnings.py", "_colorize.py", "macpath.py",
    "nturl2path.py", "asyncio/locks.py", "asyncio/queues.py", "compression/*",
    "distutils/archive_util.py", "distutils/dep_util.py", "distutils/dir_util.py",
    "distutils/fancy_getopt.py", "distutils/file_util.py", "distutils/spawn.py",
    "distutils/sysconfig.py", "distutils/tests/*", "importlib/resources/*",
    "multiprocessing/dummy/*", "multiprocessing/queues.py", "test/ann_module*",
    "test/archiver_tests.py", "test/datetimetester.py", "test/list_tests.py",
    "test/lock_tests.py", "test/mapping_tests.py", "test/mock_socket.py", "test/pickletester.py",
    "test/pydoc*", "test/seq_tests.py", "test/ssl_servers.py", "test/string_tests.py",
    "test/test__*", "test/test_abstract_numbers.py", "test/test_compile*",
    "test/test_dict_version.py", "test/test_doctest*", "test/test_dynamic.py",
    "test/test_genericalias.py", "test/test_multibytecodec*", "test/test_named_expressions.py",
    "test/test_numeric_tower.py", "test/test_ordered_dict.py", "test/test_strptime.py",
    "test/test_strtod.py", "test/test_thread*", "test/test_unparse.py", "test/test_user*",
    "test/time_hashlib.py", "test/tracedmodules/*", "test/typinganndata/*", "test/xmltests.py",
    "test/_typed_dict_helper.py", "test/_test_venv*", "test/support/_hypothesis*",
    "unittest/_log.py",
)  # fmt: skip


def _patterns_of(module: str) -> tuple[str, ...]:
    """The module's own files, its twin in pure Python (`_pydecimal` of `decimal`), its tests."""
    own = (f"{module}.py", f"{module}/*", f"_py{module}.py", f"_{module}.py", f"_{module}/*")
    tests = (f"test/test_{module}*", f"test/test_py{module}*")
    return (*own, *tests, f"idlelib/idle_test/test_{module}*")


LEFT_OUT: tuple[str, ...] = (
    *(pattern for module in (*TRAIN_MODULES, *TEST_MODULES) for pattern in _patterns_of(module)),
    *_COPIES,
)
"""What no pretraining may see: globs relative to the standard library (`*` also crosses `/`)."""

# Installed packages are not the standard library, lib2to3's test data is broken on purpose, and the
# encodings are number tables rather than code.
_NOT_TEXT: tuple[str, ...] = (
    "site-packages/*", "dist-packages/*", "*__pycache__/*", "lib2to3/tests/data/*",
    "lib2to3/test*data/*", "test/test_lib2to3/data/*", "encodings/*",
)  # fmt: skip

_MIN_WORDS, _MAX_WORDS, _MAX_CHARACTERS, _MAX_PROMPT = 3, 40, 240, 240
_WORDS_TO_COUNT_AS_COPY = 5
# A sentence ends at a mark before white space, but not after an abbreviation or a lone initial.
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\b[A-Z])[.!?](?=\s|$)"
)
_BLANK = re.compile(r"[\s#]+")

Row = dict[str, str]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_root(root: str | Path | None = None) -> Path:
    """The folder to read: `root` where given, else the running Python's standard library."""
    return Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])


def rows(modules: Sequence[str], *, root: str | Path | None = None) -> tuple[list[Row], list[str]]:
    """Reads the task's rows from the standard library's sources.

    A row also found in a test module is dropped unless that module was itself asked for, so that
    `rows(TRAIN_MODULES)` never shares a prompt or a completion with `rows(TEST_MODULES)`.

    Args:
        modules: Top-level module names; a package stands for all its files.
        root: A standard library's folder; default, the running Python's.

    Returns:
        The rows `{"prompt": signature, "completion": sentence}`, in the order of `modules` and of
        their lines, and the names of the modules this Python does not have.

    Raises:
        DataError: Not one row was found.
    """
    folder = stdlib_root(root)
    missing = [module for module in modules if not _files_of(folder, module)]
    held_out = [module for module in TEST_MODULES if module not in modules]
    taken = {key for row in _raw_rows(folder, held_out) for key in _keys(row)}
    kept: list[Row] = []
    for row in _raw_rows(folder, modules):
        keys = _keys(row)
        if taken.isdisjoint(keys):
            taken.update(keys)
            kept.append(row)
    if not kept:
        raise DataError(
            "this Python's standard library has no documented functions for the demo",
            where=folder,
            found=f"{len(missing)} of {len(modules)} modules missing",
            fix="use a Python that was installed with its library's sources",
        )
    return kept, missing


def stdlib_sources(root: str | Path | None = None) -> list[Path]:
    """Lists the sources a demo base may be trained on: the standard library's, less `LEFT_OUT`.

    Returns:
        Paths of files that decode, in an order that depends on their names alone.
    """
    folder = stdlib_root(root)
    named = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    banned = re.compile("|".join(f"(?:{_glob_to_regex(glob)})" for glob in (*LEFT_OUT, *_NOT_TEXT)))
    wanted = (named[name] for name in sorted(named) if not banned.fullmatch(name))
    return [path for path in wanted if _decode(path) is not None]


def pretraining_documents(root: str | Path | None = None) -> tuple[dict[str, str], int]:
    """Reads the pretraining text and cuts out of it whatever repeats a demo sentence.

    Returns:
        Text by path relative to the standard library, and the number of passages cut.
    """
    folder = stdlib_root(root)
    sentences = demo_sentences(folder)
    documents, cuts = {}, 0
    for path in stdlib_sources(folder):
        text, count = cut_sentences(_decode(path) or "", sentences)
        cuts += count
        if text.strip():
            documents[path.relative_to(folder).as_posix()] = text
    return documents, cuts


def demo_sentences(root: str | Path | None = None) -> dict[tuple[str, str, str], list[str]]:
    """The demo's target sentences of five words or more, by their second to fourth word.

    These three are whole words of any text with the sentence in it (the first may have a quote
    before it, the last one behind), so that a text can be searched for all sentences at once.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in _raw_rows(stdlib_root(root), (*TRAIN_MODULES, *TEST_MODULES)):
        words = _BLANK.sub(" ", row["completion"]).split()
        if len(words) >= _WORDS_TO_COUNT_AS_COPY:
            same_key = found.setdefault((words[1], words[2], words[3]), [])
            if (sentence := " ".join(words)) not in same_key:
                same_key.append(sentence)
    return found


def contained_sentences(text: str, sentences: dict[tuple[str, str, str], list[str]]) -> list[str]:
    """Which demo sentences occur in `text`, white space (and a comment's `#`) apart."""
    flat = _BLANK.sub(" ", text)
    words = flat.split()
    hits = sorted(set(zip(words, words[1:], words[2:], strict=False)) & sentences.keys())
    return [sentence for hit in hits for sentence in sentences[hit] if sentence in flat]


def cut_sentences(text: str, sentences: dict[tuple[str, str, str], list[str]]) -> tuple[str, int]:
    """Cuts every docstring with a demo sentence in it; elsewhere, the lines the sentence is on.

    Returns:
        The text without them, and how many passages were cut.
    """
    cuts = 0
    while contained := contained_sentences(text, sentences):
        # Longest first: a sentence can be the beginning of another.
        words = max(contained, key=len).split()
        match = re.search(r"[\s#]+".join(map(re.escape, words)), text)
        if match is None:  # normalised white space and the regex agree by construction
            raise AssertionError(f"cannot locate {words}")
        first, last = _lines_to_cut(text, match.start(), match.end())
        lines = text.splitlines(keepends=True)
        text = "".join(lines[: first - 1] + lines[last:])
        cuts += 1
    return text, cuts


def _lines_to_cut(text: str, start: int, end: int) -> tuple[int, int]:
    """First and last line, from 1, of the docstring around `start:end`, else of `start:end`."""
    # str.splitlines also splits at form feeds, which ast does not: `_decode` leaves none.
    first, last = text.count("\n", 0, start) + 1, text.count("\n", 0, end) + 1
    tree = _parse(text)
    for node in ast.walk(tree) if tree else ():
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        node_end = node.end_lineno or node.lineno
        if isinstance(node.value.value, str) and node.lineno <= first and last <= node_end:
            return node.lineno, node_end
    return first, last


def _files_of(folder: Path, module: str) -> list[Path]:
    plain = [folder / f"{module}.py", folder / f"_py{module}.py"]
    return [path for path in plain if path.is_file()] + sorted((folder / module).rglob("*.py"))


def _raw_rows(folder: Path, modules: Iterable[str]) -> Iterator[Row]:
    for module in modules:
        for path in _files_of(folder, module):
            if (tree := _parse(_decode(path) or "")) is not None:
                yield from _rows_of(tree.body, class_name=None)


def _rows_of(body: Sequence[ast.stmt], class_name: str | None) -> Iterator[Row]:
    """Walks modules and classes, not functions: what is defined inside one is nobody's API."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _rows_of(node.body, node.name)
        elif isinstance(node, ast.If | ast.Try):
            yield from _rows_of([*node.body, *node.orelse], class_name)
        elif isinstance(node, _FUNCTIONS) and not node.name.startswith("_"):
            sentence = first_sentence(ast.get_docstring(node) or "", node.name)
            prompt = _signature(node, class_name)
            if sentence is not None and len(prompt) <= _MAX_PROMPT:
                yield {"prompt": prompt, "completion": sentence}


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, class_name: str | None) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    inside = f"class {class_name}: " if class_name else ""
    return f"{inside}{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def first_sentence(docstring: str, name: str) -> str | None:
    """The docstring's first sentence on one line, or None where it makes no target.

    No target are docstrings that open with a signature in place of a sentence, and those too short
    or too long.
    """
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    end = _SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.end()] if end else paragraph
    if re.match(rf"(?:\w+\.)?{re.escape(name)}\s*\(", sentence) or not sentence[:1].isalpha():
        return None
    if "->" in sentence or ">>>" in sentence:
        return None
    fits = _MIN_WORDS <= len(sentence.split()) <= _MAX_WORDS and len(sentence) <= _MAX_CHARACTERS
    return sentence if fits else None


def _keys(row: Row) -> tuple[str, str]:
    """What two rows must not share: the prompt; the completion without case and final marks."""
    completion = " ".join(row["completion"].casefold().split()).rstrip(".!?:; ")
    return f"prompt {row['prompt']}", f"completion {completion}"


def _decode(path: Path) -> str | None:
    """The file's text as UTF-8 in NFC with plain line ends, or None where it is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    # Whatever else str.splitlines splits at goes, so that a line's number means one thing.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", "", text)
    return unicodedata.normalize("NFC", text)


def _parse(text: str) -> ast.Module | None:
    """The syntax tree, or None: some of the standard library's test files are broken on purpose."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold invalid escapes: no news here
            return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _glob_to_regex(pattern: str) -> str:
    return ".*".join(re.escape(part) for part in pattern.split("*"))
