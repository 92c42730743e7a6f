"""Collections to train and search, and the metrics that judge a run.

    collection = load_collection("docs")                     # no download: the documentation of the installed packages
    collection = load_collection("path/to/beir/scifact")     # corpus.jsonl[.gz], queries.jsonl[.gz], qrels/SPLIT.tsv
    collection = load_collection("ir_datasets:beir/scifact")
    run = bm25_run(collection, collection.queries, k=100)    # {qid: {passage_id: score}}
    evaluate(run, collection.qrels["test"], ["MRR@10", "nDCG@10"])

`docs` makes a labelled collection of a docstring: its summary line is the query ("Join two or more pathname
components, inserting '/' as needed"), its qualified name and the rest of it the one relevant passage. Sources are
parsed with `ast`; nothing is imported, so it takes seconds and needs neither a GPU nor the network.

A corpus is converted once, into a file of texts that is memory-mapped: 8.8 million passages open in seconds and take no
process more than some hundred megabytes. `corpus.texts` beside the corpus (or in ~/.cache/pairdistill) may be deleted.

Two decisions are not obvious. Ties are broken here, before ir_measures sees a run: trec_eval compares scores in
float32 and puts the higher passage id first, but the provider that ir_measures uses for RR@k compares in float64 and
puts the lower one first. And whatever a user can get wrong about a collection is a `DataError` whose one sentence
names the file, the line and the mend.
"""
from __future__ import annotations

import ast
import contextlib
import gc
import gzip
import hashlib
import importlib.util
import inspect
import itertools
import json
import mmap
import os
import re
import shutil
import sysconfig
import tempfile
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Run = Mapping[str, Mapping[str, float]]  # {qid: {passage_id: score}}
Qrels = Mapping[str, Mapping[str, int]]  # {qid: {passage_id: grade}}; a grade of 1 or more is relevant


class DataError(ValueError):
    """A collection, or what was asked of it, is wrong: one sentence that says what, where, and how to mend it."""


@dataclass(frozen=True)
class Collection:
    """N passages, and queries with their judgements.

    `passages` and `passage_ids` are only ever asked for their length and their items: they may live on disk (Texts). A
    query that no split of `qrels` names is unlabelled.
    """

    name: str
    passage_ids: Sequence[str]  # [N]
    passages: Sequence[str]  # [N], the text of passage_ids[n]
    queries: dict[str, str]  # {qid: text}
    qrels: dict[str, dict[str, dict[str, int]]]  # {split: {qid: {passage_id: grade}}}
    answers: dict[str, list[str]] = field(default_factory=dict)  # {qid: strings, one of which a right passage contains}

    def positions(self, ids: Iterable[str]) -> dict[str, int]:
        """{passage_id: n} of these ids, as far as there are such passages. (Of all of them it would take gigabytes.)"""
        ids = set(ids)
        if not isinstance(self.passage_ids, Ids):
            return {p: n for n, p in enumerate(self.passage_ids) if p in ids}
        return {p: n for p, n in zip(ids, self.passage_ids.find(ids).tolist()) if n >= 0}

    def judged_positions(self) -> dict[str, int]:
        return self.positions(p for split in self.qrels.values() for grades in split.values() for p in grades)


def load_collection(spec: str) -> Collection:
    """Loads "docs", "ir_datasets:NAME" or the BEIR folder at that path. Raises DataError."""
    if spec == "docs":
        return load_docs()
    if spec.startswith("ir_datasets:"):
        return load_ir_datasets(spec.removeprefix("ir_datasets:"))
    return load_beir(Path(spec))


# docs: the documentation of the installed packages -------------------------------------------------------------------

PACKAGES = ("numpy", "torch", "matplotlib", "transformers")  # and the standard library: pinned, and large enough
SKIPPED = frozenset(  # folders and modules of tests, copies of other projects, and internals that nobody asks about
    "test tests testing testing_utils site-packages dist-packages idlelib lib2to3 turtledemo ensurepip pydoc_data "
    "encodings distutils f2py ao fx onnx distributed models exporters".split()
)
PUBLIC_NAMES = (  # where the implementation lives -> where users find it; the private ones are read all the same
    (r"_py(datetime|decimal|io)\b", r"\1"),
    (r"posixpath\b", "os.path"),
    (r"numpy\.(?:lib\._\w+|_core\.\w+)\.", "numpy."),
    (r"numpy\.ma\.(?:core|extras)\.", "numpy.ma."),
    (r"numpy\.matrixlib\.defmatrix\.", "numpy."),
    (r"matplotlib\.axes\._\w+\.", "matplotlib.axes."),
    (r"torch\.(?:functional|_torch_docs|_tensor_docs|_tensor)\.", "torch."),
    (r"torch\.nn\.modules\.\w+\.", "torch.nn."),
)
QUERY_WORDS = (4, 40)  # at least, at most
PASSAGE_WORDS = 12  # at least, the name not counted
MIN_PAIRS = 1000  # with fewer, sources are missing
HELD_OUT = 8  # one query in this many is a test query


def load_docs() -> Collection:
    """Summary line -> rest of the docstring, for public names of the standard library and of PACKAGES.

    Texts are unique (letter case and punctuation aside), no passage holds its query, every query has one relevant
    passage, and all is sorted by name. A query is held out by the hash of its name: the same package versions give
    the same split on every machine. Raises DataError when fewer than MIN_PAIRS are found.
    """
    found: dict[str, tuple[str, str]] = {}
    collecting = gc.isenabled()
    gc.disable()  # saves a fifth of the time: syntax trees are many small objects, none of which is a cycle
    try:
        for name, docstring in _docstrings():
            if name not in found and (pair := _split_docstring(docstring)):
                found[name] = pair
    finally:
        if collecting:
            gc.enable()

    passages: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, dict[str, int]]] = {"train": {}, "test": {}}
    seen: set[str] = set()
    for name, (summary, rest) in sorted(found.items()):
        summary_key, rest_key = (" ".join(re.findall(r"\w+", text.lower())) for text in (summary, rest))
        if summary_key in seen or rest_key in seen or summary_key in rest_key:
            continue
        seen |= {summary_key, rest_key}
        qid = f"q:{name}"  # no query has a passage's id: in some sets that means "never return this passage"
        passages[name], queries[qid] = f"{name} {rest}", summary
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
        qrels["test" if held_out else "train"][qid] = {name: 1}
    if len(passages) < MIN_PAIRS:
        raise DataError(
            f"docs: the sources of the standard library and of {', '.join(PACKAGES)} hold only {len(passages)} usable "
            f"docstrings, expected at least {MIN_PAIRS}: install requirements.txt where .py files are kept."
        )
    return Collection("docs", list(passages), list(passages.values()), queries, qrels)


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yields (public qualified name, docstring), located and parsed without importing what is read."""
    for module, path in _modules():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):  # unreadable, for another Python, not UTF-8: not a user's concern
            continue
        for name, docstring in _documented(tree, module):
            for pattern, public in PUBLIC_NAMES:
                name = re.sub(r"\A" + pattern, public, name)
            if "._" not in name:
                yield name, docstring


def _modules() -> Iterator[tuple[str, Path]]:
    roots = {"": sysconfig.get_path("stdlib")}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            roots[f"{package}."] = os.path.dirname(spec.origin)
    for prefix, root in roots.items():
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f.isidentifier() and f not in SKIPPED)
            inside = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, ".") + "."
            for stem in sorted(f.removesuffix(".py") for f in files if f.endswith(".py")):
                module = (prefix + inside + stem).removesuffix(".__init__")
                known = any(re.match(pattern, module + ".") for pattern, _ in PUBLIC_NAMES)
                if known or stem not in SKIPPED and not re.search(r"\b_", module):
                    yield module, Path(folder, stem + ".py")


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if not isinstance(node, (ast.If, ast.Try)) and (docstring := ast.get_docstring(node)):
        yield name, docstring
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    for child in node.body + getattr(node, "orelse", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if not child.name.startswith("_"):
                yield from _documented(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _documented(child, name)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _attached_docstring(child.value)


def _attached_docstring(call: ast.Call) -> Iterator[tuple[str, str]]:
    """What numpy and torch write for compiled code: add_newdoc("numpy", "ndarray", ("shape", "...")) and the like."""
    function = getattr(call.func, "id", None)
    if function not in ("add_newdoc", "add_docstr", "add_docstr_all") or len(call.args) < 2:
        return
    *names, text = call.args
    texts = [n.value for n in ast.walk(text) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    names = [n.value if isinstance(n, ast.Constant) else ast.unparse(n) for n in names]
    if function == "add_newdoc":
        names[0] = "numpy"
        if isinstance(text, ast.Tuple) and len(texts) == 2:
            names.append(texts.pop(0))
    elif function == "add_docstr_all":
        names.insert(0, "torch.Tensor")
    if texts:
        yield ".".join(names), inspect.cleandoc(max(texts, key=len))


_SIGNATURE = re.compile(r"\A(?:[\w., ]+ = )?[\w.]+\((?:[^()]|\([^()]*\))*\)[^\n.]*\n(?:--\n)?\s*")
_SENTENCE = re.compile(r"(.+?[\w)\]'\"]{2}[.!?:])\s+(?=[A-Z(\"'])")
_MARKUP = tuple(
    (re.compile(pattern, re.MULTILINE), plain)
    for pattern, plain in (
        (r"^\s*>>>.*(\n(?!\s*$).*)*", ""),  # an interpreter session, up to the next blank line
        (r"^\s*(\.\. +(?![\w:-]+::).*|:[a-z-]+:(?!`).*|([-=~^*+#])\2{2,}\s*)$", ""),  # comments, options, underlines
        (r"^\s*\.\. +(version\w+:: *\S*|deprecated:: *\S*|[\w:-]+::)", ""),  # a directive; its text stays
        (r":(?:[a-z]+:)*[a-z]+:`[~!.]?([^`<]*)(<[^`]*>)?`", r"\1"),  # :func:`~os.path.join`
        (r"`([^`<]+)\s<[^`]*>`_*|\[([^\]]+)\]\(\S*\)", r"\1\2"),  # `text <link>`_, [text](link)
        (r"\[?`+[~!.]*([^`]*)`+_*\]?", r"\1"),  # `code`, ``code``, [`code`]
        (r"\*(\w[^*\n]*)\*", r"\1"),  # *emphasis*
        (r"\[Discouraged\]|%\(\w+\)s|https?://\S+|\*\*|\\[a-zA-Z]+|[{}$\\]|::", " "),  # what is left, and mathematics
        (r"\s+", " "),
    )
)


def _split_docstring(docstring: str) -> tuple[str, str] | None:
    """(summary, rest) in plain words, or None where either is too short, or the summary is code and not a phrase."""
    if len(docstring) < 80 or "Copyright" in docstring:
        return None
    while docstring != (docstring := _SIGNATURE.sub("", docstring)):
        pass
    summary, _, rest = docstring.partition("\n\n")
    for pattern, plain in _MARKUP:
        summary, rest = pattern.sub(plain, summary), pattern.sub(plain, rest)
    if sentence := _SENTENCE.match(summary):
        summary, rest = sentence[1], f"{summary[sentence.end():].strip()} {rest.strip()}"
    summary, rest = summary.strip(" .:!+-"), rest.strip()
    fewest, most = QUERY_WORDS
    if not fewest <= len(summary.split()) <= most or len(rest.split()) < PASSAGE_WORDS:
        return None
    return None if re.search(r"=|->|^\W*\w*\(", summary) else (summary, rest)


# Texts on disk --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole(folder: Path):
    try:
        yield
    except (OSError, ValueError, EOFError, IndexError) as e:
        raise DataError(f"{folder}: the corpus's texts are damaged ({e}); remove this folder, and they are made again.") from None


class Texts(Sequence):
    """N strings in one UTF-8 file that is memory-mapped: item n lies at offsets[n]:offsets[n + 1] - 1, a newline after it."""

    def __init__(self, folder: Path, name: str):
        with _whole(folder):
            self.offsets = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            with open(folder / f"{name}.txt", "rb") as file:
                self.text, self.asked = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 0
            if len(self.text) != self.offsets[-1]:
                raise ValueError(f"{name}.txt has {len(self.text):,} bytes, expected {self.offsets[-1]:,}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, n):
        if isinstance(n, slice):
            return [self[i] for i in range(*n.indices(len(self)))]
        if not -len(self) <= n < len(self):
            raise IndexError(n)
        self.asked += 1
        if self.asked % 4096 == 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.text.madvise(mmap.MADV_DONTNEED)  # pages once read would count as this process's memory for ever
        n = n % len(self)
        return self.text[self.offsets[n]:self.offsets[n + 1] - 1].decode()


class Ids(Texts):
    """Texts that are all different, and where each of them is, by the 64 bits of its hash: hashes [N] ascending, order [N]."""

    def __init__(self, folder: Path, name: str):
        super().__init__(folder, name)
        with _whole(folder):
            self.hashes, self.order = (np.asarray(np.load(folder / f"{name}.{part}.npy", mmap_mode="r")) for part in ("hashes", "order"))
            if not len(self.hashes) == len(self.order) == len(self):
                raise ValueError(f"{name} has {len(self.hashes):,} hashes and {len(self.order):,} positions, expected {len(self):,}")

    def find(self, ids: Iterable[str]) -> np.ndarray:
        """Their positions, int64 [n]; -1 for one that is not there."""
        wanted = np.frombuffer(b"".join(map(_hash, ids)), np.uint64)
        at = np.searchsorted(self.hashes, wanted).clip(max=len(self) - 1)
        return np.where(self.hashes[at] == wanted, self.order[at], -1)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def _on_disk(folder: Path, records: Callable[[], Iterator[tuple[str, str, str]]]) -> tuple[Ids, Texts]:
    """The ids and the texts of `records` (where it stands, id, text), written into `folder` the first time.

    Written beside and renamed: several processes may do so at once, and the last ones take what the first one wrote.
    """
    if not folder.exists():
        corpus = folder.parent
        corpus.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="writing.", dir=corpus.parent))
        try:
            _write_texts(partial, records)
            partial.chmod(0o755)
            corpus.mkdir(exist_ok=True)
            for stale in corpus.iterdir():  # of the corpus before it was changed; who has it open still reads it
                if stale != folder:
                    shutil.rmtree(stale, ignore_errors=True)
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Ids(folder, "ids"), Texts(folder, "passages")


def _write_texts(folder: Path, records: Callable[[], Iterator[tuple[str, str, str]]]) -> None:
    hashes, offsets = bytearray(), (array("q", [0]), array("q", [0]))  # at most 24 bytes a passage in memory, and to sort
    with open(folder / "ids.txt", "wb") as ids, open(folder / "passages.txt", "wb") as passages:
        for _, key, text in records():
            hashes += _hash(key)
            for file, ends, item in zip((ids, passages), offsets, (key, text)):
                ends.append(ends[-1] + file.write(item.encode("utf-8", "replace") + b"\n"))
    hashes = np.frombuffer(hashes, np.uint64)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    # Different ids with the same 64 bits: once in 400,000 corpora of MS MARCO's size.
    if len(again := order[1:][hashes[1:] == hashes[:-1]]):
        where, key, _ = next(itertools.islice(records(), int(again.min()), None))
        raise DataError(f'{where}: "_id" {key!r} is on an earlier line too; make ids unique.')
    for name, values in (("ids", offsets[0]), ("passages", offsets[1]), ("ids.hashes", hashes), ("ids.order", order)):
        np.save(folder / f"{name}.npy", np.asarray(values))


def _cache(corpus: Path | str, *version) -> Path:
    """The folder of this version of its texts: in CORPUS.texts beside it, or among the user's caches where that may not be
    written (root may write everywhere: the folder's mode counts)."""
    digest = lambda x: hashlib.blake2b(repr(x).encode(), digest_size=8).hexdigest()
    if isinstance(corpus, str) or not (os.access(corpus.parent, os.W_OK) and corpus.parent.stat().st_mode & 0o222):
        users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairdistill"
        return users / digest(str(corpus)) / digest(version)
    return corpus.with_name(f"{corpus.name}.texts") / digest(version)


# BEIR folders --------------------------------------------------------------------------------------------------------


def load_beir(folder: Path) -> Collection:
    """Reads corpus.jsonl[.gz], queries.jsonl[.gz] and qrels/SPLIT.tsv (columns query-id, corpus-id, score).

    A passage is title + " " + text, stripped. Without a qrels folder every query is unlabelled. A query may have "answers", a
    list of strings, in queries.jsonl (there or in its "metadata") or in answers.jsonl[.gz]. Raises DataError.
    """
    if not folder.is_dir():
        raise DataError(f'{folder}: no such folder; data is "docs", "ir_datasets:NAME" or the path of a BEIR folder.')
    path = _jsonl(folder, "corpus")
    cache = _cache(folder.resolve() / "corpus", path.name, path.stat().st_size, path.stat().st_mtime_ns)
    ids, passages = _on_disk(cache, lambda: ((where, key, _text(where, key, record)) for where, key, record in _objects(path)))
    queries, answers = read_queries(_jsonl(folder, "queries"))
    if any((folder / f"answers.jsonl{gz}").is_file() for gz in ("", ".gz")):
        for where, key, record in _objects(_jsonl(folder, "answers")):
            if key not in queries:
                raise DataError(f"{where}: unknown query {key!r}; add it to queries.jsonl or remove the line.")
            answers[key] = _answers(where, record)
    qrels = {path.stem: _read_qrels(path, queries, ids) for path in sorted(folder.glob("qrels/*.tsv"))}
    return Collection(folder.resolve().name, ids, passages, queries, qrels, answers)


def read_queries(path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """{qid: text} and {qid: answers, where it has any} of a jsonl file, gzipped or not. Raises DataError."""
    queries: dict[str, str] = {}
    answers: dict[str, list[str]] = {}
    for where, key, record in _objects(path):
        if key in queries:
            raise DataError(f'{where}: "_id" {key!r} is on an earlier line too; make ids unique.')
        queries[key] = _text(where, key, record)
        if found := _answers(where, record):
            answers[key] = found
    return queries, answers


def save_collection(collection: Collection, folder: Path) -> None:
    """Writes a BEIR folder that load_beir reads back; the folder appears when it is complete."""
    partial = folder.with_name(folder.name + ".tmp")
    (partial / "qrels").mkdir(parents=True, exist_ok=True)
    answers = lambda key: {"answers": collection.answers[key]} if key in collection.answers else {}
    for name, records in (("corpus", ((key, text, {}) for key, text in zip(collection.passage_ids, collection.passages))),
                          ("queries", ((key, text, answers(key)) for key, text in collection.queries.items()))):
        lines = [json.dumps({"_id": key, "text": text, **more}) + "\n" for key, text, more in records]
        (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for split, judged in collection.qrels.items():
        rows = [f"{qid}\t{passage_id}\t{grade}\n" for qid, grades in judged.items() for passage_id, grade in grades.items()]
        (partial / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), encoding="utf-8")
    os.replace(partial, folder)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ("PATH, line 7", text) of every line that is not blank."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {number}: not UTF-8 text ({error.reason}); save it as UTF-8.") from None
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: cannot be read ({error}); copy it here again.") from None


def _jsonl(folder: Path, name: str) -> Path:
    path = next((p for p in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: has no {name}.jsonl or {name}.jsonl.gz, and a BEIR folder needs one.")
    return path


def _objects(path: Path) -> Iterator[tuple[str, str, dict]]:
    """Yields ("PATH, line 7", _id, what the line holds)."""
    where = None
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error}); write one JSON object a line.") from None
        if not isinstance(record, dict):
            raise DataError(f'{where}: a JSON {type(record).__name__}, expected an object with an "_id".')
        if not isinstance(key := record.get("_id"), (str, int)) or key == "":
            raise DataError(f'{where}: lacks "_id"; give it a string that no other line has.')
        yield where, str(key), record
    if where is None:
        raise DataError(f"{path}: is empty; write one JSON object a line.")


def _text(where: str, key: str, record: dict) -> str:
    if not isinstance(text := record.get("text"), str):
        raise DataError(f'{where}: "_id" {key!r} lacks "text"; give it a string.')
    text = f"{record.get('title') or ''} {text}".strip().encode("utf-8", "replace").decode()  # no tokenizer takes half a pair
    if not text:
        raise DataError(f'{where}: "_id" {key!r} is empty; remove the line or give it text.')
    return text


def _answers(where: str, record: dict) -> list[str]:
    metadata = record.get("metadata")
    answers = record.get("answers", metadata.get("answers") if isinstance(metadata, dict) else None) or []
    if not (isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers)):
        raise DataError(f'{where}: its "answers" are not a list of texts; write ["one way to say it", "another"].')
    return answers


def _read_qrels(path: Path, queries: Mapping[str, str], ids: Ids) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    judged: list[tuple[str, str]] = []
    for where, line in _lines(path):
        columns = [column.strip() for column in line.split("\t")]
        if columns[0] == "query-id" and where.endswith(", line 1"):
            continue
        if len(columns) != 3:
            raise DataError(f"{where}: {len(columns)} columns, expected 3 between tabs: query-id, corpus-id, score.")
        qid, passage_id, grade = columns
        if qid not in queries:
            raise DataError(f"{where}: unknown query {qid!r}; add it to queries.jsonl or remove the row.")
        if not re.fullmatch(r"[+-]?[0-9]+", grade):
            raise DataError(f"{where}: score {grade!r} is not an integer; write 1 for relevant, 0 for not.")
        if qrels.setdefault(qid, {}).setdefault(passage_id, int(grade)) != int(grade):
            raise DataError(f"{where}: {qid!r} and {passage_id!r} have another score above; keep one of the rows.")
        judged.append((where, passage_id))
    for (where, passage_id), n in zip(judged, ids.find(passage_id for _, passage_id in judged)):
        if n < 0:
            raise DataError(f"{where}: unknown passage {passage_id!r}; add it to corpus.jsonl or remove the row.")
    return qrels


def sample_digest(about: object, *columns: Sequence[str]) -> str:
    """Of `about` and of 10,000 rows of the columns, evenly spaced: hashing MS MARCO's would cost minutes at each start. A change
    in another row goes unnoticed."""
    h = hashlib.blake2b(json.dumps(about).encode(), digest_size=8)
    for n in range(0, len(columns[0]), -(-len(columns[0]) // 10_000)):
        h.update("".join(f"{column[n]}\0" for column in columns).encode())
    return h.hexdigest()


# ir_datasets ---------------------------------------------------------------------------------------------------------

SUBSETS = ("train", "train/judged", "dev/small", "dev", "test", "trec-dl-2019/judged", "trec-dl-2020/judged")


def load_ir_datasets(name: str) -> Collection:
    """The set of that name ("beir/scifact", "msmarco-passage"), downloaded by ir_datasets, with its SUBSETS as splits.

    Judgements of the named set itself, where it has any, are its split: "train" or "dev" if the name says so, else
    "test". Empty passages are kept. A train judgement of a passage that the set lacks is left
    out; in the other splits it stays, as published figures count it. Raises DataError.
    """
    try:
        import ir_datasets
    except ImportError:
        raise DataError(f"ir_datasets:{name} needs a package that is not installed: pip install ir_datasets") from None
    try:
        base = ir_datasets.load(name)
    except KeyError:
        base = None
    if base is None or not base.has_docs():
        raise DataError(f"ir_datasets:{name} is not a set with passages: choose a name from https://ir-datasets.com")
    known = {name, *ir_datasets.registry}
    named = next((word for word in name.split("/") if word in ("train", "dev")), "test")
    parts = [(named, name)] + [(subset.split("/")[0], f"{name}/{subset}") for subset in SUBSETS]
    queries: dict[str, str] = {}
    answers: dict[str, list[str]] = {}
    qrels: dict[str, dict[str, dict[str, int]]] = {}
    try:
        ids, passages = _on_disk(_cache(f"ir_datasets:{name}"), lambda: (
            (f"ir_datasets:{name}", doc.doc_id, doc.default_text().strip()) for doc in base.docs_iter()))
        for split, part in parts:
            if split in qrels or part not in known:
                continue
            data = ir_datasets.load(part)
            if data.has_queries():
                found = list(data.queries_iter())
                queries |= {query.query_id: query.default_text().strip() for query in found}
                answers |= {query.query_id: list(query.answers) for query in found if getattr(query, "answers", None)}
            if data.has_qrels():
                judged, rows = {}, list(data.qrels_iter())
                qrels[split] = judged
                for qrel, n in zip(rows, ids.find(qrel.doc_id for qrel in rows)):
                    if qrel.query_id in queries and (split != "train" or n >= 0):
                        judged.setdefault(qrel.query_id, {})[qrel.doc_id] = qrel.relevance
    except (OSError, RuntimeError) as error:
        raise DataError(f"ir_datasets:{name} could not be downloaded or read: {error}") from None
    return Collection(name, ids, passages, queries, qrels, answers)


# Metrics and the BM25 baseline ---------------------------------------------------------------------------------------

METRICS = ("MRR@10", "nDCG@10", "R@5", "R@100", "R@1000", "Success@5")


def evaluate(run: Run, qrels: Qrels, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Means over all queries of `qrels`, between 0 and 1; a query without results counts 0, as does one without a
    relevant passage. Other queries of `run` are ignored. A metric is MRR, nDCG, R or Success with any cutoff.

    Ranks as trec_eval does: by score in float32, ties by passage id, both descending. Raises DataError.
    """
    import ir_measures  # here, as searching needs no metrics

    for metric in metrics:
        if not re.fullmatch(r"(MRR|nDCG|R|Success)@[1-9]\d*", metric):
            raise DataError(f"unknown metric {metric!r}: choose among {', '.join(METRICS)}, or another cutoff.")
    if not qrels:
        raise DataError("nothing to evaluate: the qrels hold no query.")
    measures = {metric: ir_measures.parse_measure(metric.replace("MRR", "RR")) for metric in metrics}
    ranked = {qid: distinct_scores(run[qid]) for qid in qrels if run.get(qid)}
    means = ir_measures.calc_aggregate(list(measures.values()), qrels, ranked)
    return {metric: float(means[measure]) for metric, measure in measures.items()}


def answer_metrics(run: Run, collection: Collection, qids: Sequence[str]) -> dict[str, float]:
    """Table 2: where a passage is right that contains one of the query's answers. "answer R@5" is the share of queries with
    such a passage among the best five (DPR's and ColBERTv2's Recall@5); beside it MRR@10."""
    firsts = []
    for qid in qids:
        best = list(distinct_scores(run.get(qid, {})))[:10]
        where, answers = collection.positions(best), collection.answers[qid]
        firsts.append(next((n for n, p in enumerate(best, 1) if has_answer(collection.passages[where[p]], answers)), np.inf))
    return {"MRR@10": float(np.mean(1 / np.array(firsts))), "answer R@5": float(np.mean(np.array(firsts) <= 5))}


def has_answer(passage: str, answers: Iterable[str]) -> bool:
    """Whether the tokens of an answer follow one another in the passage: has_answer of DPR and of ColBERT's
    utility/evaluate/annotate_EM.py, to which the title belongs too."""
    text = _answer_tokens(passage)
    return any(answer.strip() and answer in text for answer in map(_answer_tokens, answers))


def _answer_tokens(text: str) -> str:
    """DPR's SimpleTokenizer on NFD, lower case: a space before, between and after tokens."""
    return f" {' '.join(unicodedata.normalize('NFD', text).translate(_TOKENS).split())} ".lower()


class _Tokens(dict):
    """For str.translate: letters, numbers and marks run together, another visible character stands alone, others part."""

    def __missing__(self, code: int) -> str:
        character, kind = chr(code), unicodedata.category(chr(code))[0]
        self[code] = character if kind in "LNM" else " " if kind in "ZC" else f" {character} "
        return self[code]


_TOKENS = _Tokens()


def distinct_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores n, n - 1, ..., 1 in trec_eval's order, so that no provider of ir_measures meets a tie."""
    order = sorted(zip(np.array(list(scores.values()), dtype=np.float32).tolist(), scores), reverse=True)
    return {passage_id: float(len(order) - rank) for rank, (_, passage_id) in enumerate(order)}


_WORD = re.compile(r"[^\W_]+")
_SUFFIX = re.compile(r"(?<=[a-z]{3})(?:ies|ied|y|ions?|ings?|ed|ly|es|s|e)$")


def _stems(text: str) -> list[str]:
    """OURS: one regular expression for Porter's stemmer, because that would be a dependency; no stopwords."""
    return [_SUFFIX.sub("", word) for word in _WORD.findall(text.lower())]


def bm25_run(collection: Collection, queries: Mapping[str, str], k: int) -> dict[str, dict[str, float]]:
    """Lucene's BM25 with Anserini's k1 and b: the k best passages of each query, fewer where fewer share a word."""
    import bm25s

    bm25 = bm25s.BM25(k1=0.9, b=0.4, method="lucene", backend="numpy")
    vocabulary: dict[str, int] = {}  # ids instead of words: for MS MARCO, gigabytes less
    words = [[vocabulary.setdefault(w, len(vocabulary)) for w in _stems(text)] for text in collection.passages]
    bm25.index((words, vocabulary), show_progress=False)
    tokens = [_stems(text) for text in queries.values()]
    k = min(k, len(collection.passages))
    positions, scores = bm25.retrieve(tokens, k=k, show_progress=False, backend_selection="numpy")
    return {
        qid: {collection.passage_ids[n]: float(score) for n, score in zip(row, row_scores) if score > 0}
        for qid, row, row_scores in zip(queries, positions, scores)
    }
