"""Tests, in sections that follow the files: python -m pytest -q

Each is named as the claim it checks. Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for
before they are imported. What needs the data sets beside the project, or a package that is not required, skips and says so.
"""
import contextlib
import copy
import dataclasses
import gc
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import checkpoints
import data
import dryrun
import maxsim_kernel
import pairdistill
import retrieve
import run
import teachers
from maxsim_kernel import maxsim, maxsim_paired, pairdistill_loss, pairdistill_objective
from pairdistill import LEVELS, MARKS, Batches, Student, _wordpieces, sample_pairs, scratch_encoder, train
from ranks import AfterStep, Ranks, sum_gradients
from retrieve import Index

HERE = Path(__file__).resolve().parent


# data.py -------------------------------------------------------------------------------------------------------------


SHARED_DATA = Path(__file__).resolve().parent.parent / "shared" / "data"  # data sets that the project does not ship


def shared_data(name):
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"needs {name}, which is not part of the project, in ../shared/data")
    return SHARED_DATA / name


@pytest.fixture(scope="module")
def docs():
    return data.load_collection("docs")


def test_docs_has_thousands_of_unique_pairs_with_one_relevant_passage_each(docs):
    assert len(docs.passages) == len(docs.passage_ids) == len(docs.queries) >= 4000
    for texts in (docs.passages, docs.passage_ids, docs.queries.values()):
        assert len(set(texts)) == len(docs.passages)
    assert set(docs.qrels) == {"train", "test"} and len(docs.qrels["test"]) >= 500
    assert not docs.qrels["train"].keys() & docs.qrels["test"].keys()
    judged = docs.qrels["train"] | docs.qrels["test"]
    assert judged.keys() == docs.queries.keys()
    assert Counter(passage_id for q in judged.values() for passage_id in q) == Counter(docs.passage_ids)
    assert list(docs.passage_ids) == sorted(docs.passage_ids)


def test_docs_passage_is_the_name_and_the_rest_of_the_docstring_without_its_query(docs):
    passages = dict(zip(docs.passage_ids, docs.passages))
    assert docs.queries["q:os.path.join"].startswith("Join two or more pathname components")
    assert passages["os.path.join"].startswith("os.path.join If any component is an absolute path")
    for qid, query in docs.queries.items():
        assert query not in passages[qid.removeprefix("q:")] and len(query.split()) >= 4


def test_docs_covers_compiled_functions_whose_docstrings_are_attached_by_calls(docs):
    assert {"numpy.arange", "numpy.ufunc.accumulate", "torch.kthvalue", "torch.Tensor.view"} <= set(docs.passage_ids)


def test_docs_is_the_same_in_another_process_and_imports_nothing_it_reads(docs):
    code = (
        "import sys, hashlib, data; c = data.load_collection('docs'); "
        "assert not {'torch', 'transformers', 'matplotlib', 'turtle'} & set(sys.modules); "
        "print(hashlib.sha256(repr(c).encode()).hexdigest())"
    )
    folder = Path(data.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(repr(docs).encode()).hexdigest()


def test_docs_without_sources_says_what_to_install(monkeypatch):
    monkeypatch.setattr(data, "_modules", lambda: iter([("gone", Path("no/such/file.py"))]))
    with pytest.raises(data.DataError, match="only 0 usable docstrings.*install requirements.txt"):
        data.load_collection("docs")


@pytest.mark.parametrize(
    "docstring, summary, rest",
    [
        (
            "Join :func:`~os.path.join`-style *paths* together.  See `the guide <http://x.y>`_.\n\n"
            ">>> join()\n1\n\n" + "More words. " * 10,
            "Join os.path.join-style paths together",
            "See the guide. " + "More words. " * 10,
        ),
        (
            "sort(a, axis=(0, 1))\n--\n\nReturn a sorted copy of ``a``\n\nNotes\n-----\n.. versionadded:: 3.2\n"
            + "It is stable, really. " * 5,
            "Return a sorted copy of a",
            "Notes " + "It is stable, really. " * 5,
        ),
    ],
)
def test_docstring_is_split_after_its_first_sentence_and_cleaned_of_markup(docstring, summary, rest):
    assert data._split_docstring(docstring) == (summary, rest.strip())


@pytest.mark.parametrize("docstring", ["Short", "Three words only.\n\n" + "rest " * 40, "f(x) -> what\n\n" + "x " * 90])
def test_docstring_that_makes_no_query_is_left_out(docstring):
    assert data._split_docstring(docstring) is None


# Two passages, two queries of which "q2" is unlabelled, one split.
CORPUS = ['{"_id": "d1", "title": "Paths", "text": "join them"}', '{"_id": "d2", "title": "", "text": " other "}']
QUERIES = ['{"_id": "q1", "text": "how to join"}', '{"_id": "q2", "text": "anything"}']
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\td2\t0"]


def beir_folder(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, compress=False):
    (folder / "qrels").mkdir(parents=True)
    for name, lines in (("corpus", corpus), ("queries", queries)):
        text = "".join(f"{line}\n" for line in lines)
        if compress:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "qrels" / "dev.tsv").write_text("".join(f"{line}\n" for line in qrels), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("compress", [False, True])
def test_beir_folder_joins_title_and_text_and_keeps_unlabelled_queries(tmp_path, compress):
    collection = data.load_collection(beir_folder(tmp_path / "mine", compress=compress))
    assert collection.name == "mine"
    assert list(collection.passage_ids) == ["d1", "d2"] and list(collection.passages) == ["Paths join them", "other"]
    assert collection.queries == {"q1": "how to join", "q2": "anything"}
    assert collection.qrels == {"dev": {"q1": {"d1": 1, "d2": 0}}}


def test_beir_folder_without_qrels_has_only_unlabelled_queries(tmp_path):
    folder = Path(beir_folder(tmp_path / "mine"))
    (folder / "qrels" / "dev.tsv").unlink()
    assert data.load_collection(str(folder)).qrels == {}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(corpus=CORPUS + ["{oops"]), r"corpus\.jsonl, line 3: not JSON"),
        (dict(corpus=CORPUS + ["[1, 2]"]), r"corpus\.jsonl, line 3: a JSON list, expected an object"),
        (dict(corpus=CORPUS + ["", '{"text": "no id"}']), r'corpus\.jsonl, line 4: lacks "_id"'),
        (dict(corpus=CORPUS + ['{"_id": "d3"}']), r"corpus\.jsonl, line 3: \"_id\" 'd3' lacks \"text\""),
        (dict(corpus=CORPUS + CORPUS[:1]), r"corpus\.jsonl, line 3: \"_id\" 'd1' is on an earlier line"),
        (dict(corpus=CORPUS + ['{"_id": "d3", "title": " ", "text": "\\n"}']), r"corpus\.jsonl, line 3: .*empty"),
        (dict(corpus=[]), r"corpus\.jsonl: is empty"),
        (dict(queries=QUERIES + ['{"_id": "q3", "text": ""}']), r"queries\.jsonl, line 3: .*empty"),
        (dict(qrels=QRELS + ["q9\td1\t1"]), r"dev\.tsv, line 4: unknown query 'q9'"),
        (dict(qrels=QRELS + ["q1\td9\t1"]), r"dev\.tsv, line 4: unknown passage 'd9'"),
        (dict(qrels=QRELS + ["q1 0 d1 1"]), r"dev\.tsv, line 4: 1 columns, expected 3"),
        (dict(qrels=QRELS + ["q1\td1\t0.5"]), r"dev\.tsv, line 4: score '0\.5' is not an integer"),
        (dict(qrels=QRELS + ["q1\td1\t2"]), r"dev\.tsv, line 4: .*another score above"),
    ],
)
def test_beir_folder_error_names_file_and_line(tmp_path, change, message):
    with pytest.raises(data.DataError, match=message) as error:
        data.load_collection(beir_folder(tmp_path / "bad", **change))
    assert "\n" not in str(error.value)


def test_beir_folder_that_is_missing_or_damaged_is_said_in_one_sentence(tmp_path):
    with pytest.raises(data.DataError, match="nowhere: no such folder"):
        data.load_collection(str(tmp_path / "nowhere"))
    folder = Path(beir_folder(tmp_path / "half", compress=True))
    packed = (folder / "corpus.jsonl.gz").read_bytes()
    (folder / "corpus.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(data.DataError, match=r"corpus\.jsonl\.gz, after line \d+: cannot be read"):
        data.load_collection(str(folder))
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "d1", "text": "\xff"}\n'))
    with pytest.raises(data.DataError, match=r"corpus\.jsonl\.gz, after line 0: not UTF-8"):
        data.load_collection(str(folder))
    (folder / "corpus.jsonl.gz").unlink()
    with pytest.raises(data.DataError, match=r"has no corpus\.jsonl or corpus\.jsonl\.gz"):
        data.load_collection(str(folder))


def caches(folder) -> list[str]:
    return sorted(str(p) for p in Path(folder).rglob("*") if p.parent.name == "corpus.texts" or p.name.startswith("writing."))


def test_a_corpus_is_converted_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    folder = beir_folder(tmp_path / "mine", CORPUS + ['{"_id": "ü", "text": "two\\nlines, é"}'])
    first, (before,) = data.load_collection(folder), caches(folder)
    monkeypatch.setattr(data, "_write_texts", None)  # would fail
    again = data.load_collection(folder)
    assert list(again.passages) == list(first.passages) == ["Paths join them", "other", "two\nlines, é"]
    assert again.passages[-1] == again.passages[np.int64(2)] == "two\nlines, é" and again.passages[1:] == list(again.passages)[1:]
    with pytest.raises(IndexError):
        again.passages[3]
    assert again.passage_ids.find(["ü", "d9", "d1"]).tolist() == [2, -1, 0]
    assert again.judged_positions() == {"d1": 0, "d2": 1}
    monkeypatch.undo()
    with open(Path(folder, "corpus.jsonl"), "a") as file:
        file.write('{"_id": "d4", "text": "new"}\n')
    assert len(data.load_collection(folder).passages) == 4 and len(caches(folder)) == 1 and caches(folder) != [before]
    assert list(first.passages)[1] == "other"  # whoever has the old one open still reads it
    order = Path(caches(folder)[0], "ids.order.npy")
    whole = order.read_bytes()
    for size in (len(whole) - 3, 0):
        order.write_bytes(whole[:size])
        with pytest.raises(data.DataError, match=r"corpus.texts/\w+: the corpus's texts are damaged \(.*; remove this folder"):
            data.load_collection(folder)
    order.write_bytes(whole)
    damaged = Path(caches(folder)[0], "passages.txt")
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(data.DataError, match=r"corpus.texts/\w+: the corpus's texts are damaged \(passages.txt has \d+ bytes, expected"):
        data.load_collection(folder)


def test_a_broken_corpus_leaves_no_cache_and_one_that_may_not_be_written_beside_goes_to_the_users(tmp_path, monkeypatch):
    folder = beir_folder(tmp_path / "bad", corpus=CORPUS + CORPUS[:1])
    with pytest.raises(data.DataError, match="line 3"):
        data.load_collection(folder)
    assert caches(folder) == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = beir_folder(tmp_path / "mine")
    Path(folder).chmod(0o555)
    assert list(data.load_collection(folder).passages)[1] == "other"
    assert caches(folder) == [] and len(list((tmp_path / "cache").rglob("passages.txt"))) == 1


def test_many_processes_convert_one_corpus_at_once(tmp_path):
    folder = beir_folder(tmp_path / "mine", [json.dumps({"_id": f"d{n}", "text": f"text {n}"}) for n in range(20_000)])
    script = f"import data, sys; c = data.load_collection({folder!r}); assert c.passages[c.passage_ids.find(['d777'])[0]] == 'text 777'"
    readers = [subprocess.Popen([sys.executable, "-c", script], cwd=HERE) for _ in range(4)]
    assert [reader.wait(60) for reader in readers] == [0] * 4 and len(caches(folder)) == 1


@pytest.mark.parametrize("answer, passage, there", [
    ("beyonce\u0301", "It was Beyonc\u00e9's.", True),  # one character or two, and any case
    ("U.S. Army", "the u.s.  ARMY of", True), ("U.S. Army", "the US Army", False),
    ("art", "a party", False), ("a-b", "a - b", True), ("1,000", "1000", False), ("x y", "x\u200by", True), ("\u200b", "x", False)])
def test_an_answer_is_found_token_by_token(answer, passage, there):
    assert data.has_answer(passage, ["no such thing", answer]) == there


def test_answer_tokens_are_those_of_dprs_tokenizer():
    regex = pytest.importorskip("regex")
    draw = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(chr(c) for c in draw.choice([32, *range(0x20, 0x500), *range(0x900, 0x980), *range(0x1F600, 0x1F650)], 60))
        tokens = regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", data.unicodedata.normalize("NFD", text))
        assert data._answer_tokens(text).split() == [token.lower() for token in tokens]


def test_answers_are_read_from_queries_their_metadata_or_a_file_and_saved(tmp_path):
    queries = ['{"_id": "q1", "text": "a", "answers": ["x", "y"]}', '{"_id": "q2", "text": "b", "metadata": {"answers": ["z"]}}',
               '{"_id": "q3", "text": "c", "metadata": {}}']
    folder = Path(beir_folder(tmp_path / "mine", queries=queries))
    collection = data.load_collection(str(folder))
    assert collection.answers == {"q1": ["x", "y"], "q2": ["z"]}
    data.save_collection(collection, tmp_path / "copy")
    assert data.load_collection(str(tmp_path / "copy")).answers == collection.answers
    (folder / "answers.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "q3", "answers": ["w"]}\n'))
    assert data.load_collection(str(folder)).answers == {**collection.answers, "q3": ["w"]}
    for line, says in (('{"_id": "q9", "answers": ["w"]}', "line 1: unknown query 'q9'"),
                       ('{"_id": "q3", "answers": "w"}', 'line 1: its "answers" are not a list')):
        (folder / "answers.jsonl").write_text(line + "\n")
        with pytest.raises(data.DataError, match=says):
            data.load_collection(str(folder))


def test_recall_by_answers_counts_queries_with_an_answer_among_the_best_five():
    passages = [f"word{n} x" for n in range(12)]
    collection = data.Collection("", [f"d{n}" for n in range(12)], passages, {}, {}, {"q1": ["Word2"], "q2": ["word7"], "q3": ["no"], "q4": ["x"]})
    best_first = {f"d{n}": -float(n) for n in range(12)}
    got = data.answer_metrics({"q1": best_first, "q2": best_first, "q3": best_first}, collection, ["q1", "q2", "q3", "q4"])
    assert got == {"MRR@10": pytest.approx((1 / 3 + 1 / 8) / 4), "answer R@5": 1 / 4}  # q4 has no results


def test_the_answers_of_squad_are_in_its_relevant_passages():
    squad = data.load_collection(str(shared_data("squad")))
    found = {q: {p: 1.0 for p in grades} for q, grades in squad.qrels["dev"].items()}
    assert data.answer_metrics(found, squad, list(found)[:500])["answer R@5"] > 0.97


class FakeSet:
    """What load_ir_datasets uses of an ir_datasets data set."""

    def __init__(self, docs=None, queries=None, qrels=None):
        self.docs, self.queries, self.qrels = docs, queries, qrels

    def __getattr__(self, name):
        kind, _, what = name.rpartition("_")
        if kind == "has":
            return lambda: getattr(self, what) is not None
        return lambda: iter(getattr(self, kind))


class FakeText:
    def __init__(self, key, text):
        self.doc_id = self.query_id = key
        self.default_text = lambda: text


class FakeQrel:
    def __init__(self, query_id, doc_id, relevance):
        self.query_id, self.doc_id, self.relevance = query_id, doc_id, relevance


def test_ir_datasets_subsets_become_splits(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = type(sys)("ir_datasets")
    passages = [FakeText("d1", "title text "), FakeText("d2", "other")]
    fake.registry = {
        "set": FakeSet(passages),
        "set/train": FakeSet(passages, [FakeText("q1", "one"), FakeText("q2", "two")], [FakeQrel("q1", "d1", 1)]),
        "set/train/judged": FakeSet(passages, [FakeText("q1", "one")], [FakeQrel("q1", "d1", 1)]),
        "set/dev": FakeSet(passages, [FakeText("q4", "the large one")], [FakeQrel("q4", "d2", 1)]),
        "set/dev/small": FakeSet(passages, [FakeText("q3", "three")], [FakeQrel("q3", "d2", 2)]),
        "nopassages": FakeSet(),
    }
    fake.registry["set/train"].queries[0].answers = ("x", "y")  # as DPR's sets have them
    fake.load = fake.registry.__getitem__
    monkeypatch.setitem(sys.modules, "ir_datasets", fake)
    collection = data.load_collection("ir_datasets:set")
    assert list(collection.passages) == ["title text", "other"]
    assert collection.queries == {"q1": "one", "q2": "two", "q3": "three"}
    assert collection.qrels == {"train": {"q1": {"d1": 1}}, "dev": {"q3": {"d2": 2}}}
    assert data.load_collection("ir_datasets:set/train").qrels == {"train": {"q1": {"d1": 1}}}
    assert collection.answers == {"q1": ["x", "y"]}
    for name in ("nopassages", "unknown"):
        with pytest.raises(data.DataError, match="not a set with passages"):
            data.load_collection(f"ir_datasets:{name}")


def test_ir_datasets_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(data.DataError, match="pip install ir_datasets"):
        data.load_collection("ir_datasets:beir/scifact")


def test_metrics_agree_with_a_case_by_hand():
    qrels = {"q1": {"a": 1, "b": 1}, "q2": {"c": 1}, "q3": {"d": 0}}
    run = {"q1": {"x": 3.0, "a": 2.0, "y": 1.0}, "q9": {"a": 1.0}}  # q2 and q3 have no results; q9 is ignored
    got = data.evaluate(run, qrels, ["MRR@10", "MRR@1", "nDCG@10", "R@5", "Success@5"])
    best = 1 + 1 / math.log2(3)
    expected = {"MRR@10": 1 / 2, "MRR@1": 0, "nDCG@10": 1 / math.log2(3) / best, "R@5": 1 / 2, "Success@5": 1}
    assert got == pytest.approx({metric: value / 3 for metric, value in expected.items()}, abs=1e-9)


def test_ties_in_float32_go_to_the_higher_passage_id_in_every_metric():
    qrels = {"q": {"b": 1}}
    metrics = ["MRR@10", "nDCG@10", "R@1", "Success@1"]
    for scores, rank in (({"a": 1, "b": 1}, 1), ({"b": 1, "c": 1}, 2), ({"b": 1 + 1e-12, "c": 1}, 2)):
        got = data.evaluate({"q": scores}, qrels, metrics)
        first = float(rank == 1)
        expected = {"MRR@10": 1 / rank, "nDCG@10": 1 / math.log2(1 + rank), "R@1": first, "Success@1": first}
        assert got == pytest.approx(expected, abs=1e-9)
    assert data.evaluate({"q": {"b": np.float32(2), "c": -1}}, qrels, ["R@1"]) == {"R@1": 1}


def test_unknown_metric_lists_the_known_ones():
    for metric in ("MAP", "R@0", "nDCG"):
        with pytest.raises(data.DataError, match=r"unknown metric.*MRR@10.*Success@5"):
            data.evaluate({"q": {"a": 1.0}}, {"q": {"a": 1}}, [metric])
    with pytest.raises(data.DataError, match="no query"):
        data.evaluate({}, {}, ["MRR@10"])


@pytest.mark.parametrize("reverse", [False, True])
def test_metrics_agree_with_trec_eval_on_its_own_test_data(reverse):
    folder = shared_data("trec_eval")
    qrels, run, expected = {}, {}, {}
    for line in (folder / "qrels.test").read_text().splitlines():
        qid, _, passage_id, grade = line.split()
        qrels.setdefault(qid, {})[passage_id] = int(grade)
    rows = [line.split() for line in (folder / "results.test").read_text().splitlines()]
    for row in rows[::-1] if reverse else rows:
        run.setdefault(row[0], {})[row[2]] = float(row[4])
    for line in (folder / "out.test.aq").read_text().splitlines():
        name, qid, value = line.split()
        expected[name, qid] = value
    names = {
        "MRR@1000": "recip_rank", "nDCG@10": "ndcg_cut_10", "nDCG@100": "ndcg_cut_100", "R@5": "recall_5",
        "R@100": "recall_100", "R@1000": "recall_1000", "Success@5": "success_5",
    }
    for qid in run:
        for metric, value in data.evaluate(run, {qid: qrels[qid]}, list(names)).items():
            assert f"{value:.4f}" == expected[names[metric], qid], (metric, qid)
    for metric, value in data.evaluate(run, {qid: qrels[qid] for qid in run}, list(names)).items():
        assert f"{value:.4f}" == expected[names[metric], "all"], metric


def test_bm25_ranks_passages_that_share_words_and_returns_no_others():
    texts = {"d1": "joining paths", "d2": "a path of paths", "d3": "numbers"}
    collection = data.Collection("three", list(texts), list(texts.values()), {}, {})
    run = data.bm25_run(collection, {"q1": "Join the paths!", "q2": "nothing", "q3": "?"}, k=10)
    assert list(run["q1"]) == ["d1", "d2"] and run["q1"]["d1"] > run["q1"]["d2"] > 0
    assert run["q2"] == run["q3"] == {}
    assert [len(data.bm25_run(collection, {"q": "paths"}, k=k)["q"]) for k in (1, 2, 3)] == [1, 2, 2]


def test_bm25_is_as_strong_as_published_on_scifact():
    collection = data.load_collection(str(shared_data("scifact")))
    queries = {qid: collection.queries[qid] for qid in collection.qrels["test"]}
    run = data.bm25_run(collection, queries, k=100)
    assert data.evaluate(run, collection.qrels["test"], ["nDCG@10"])["nDCG@10"] == pytest.approx(0.676, abs=0.005)


def test_bm25_finds_the_documentation_of_a_summary_line(docs):
    queries = {qid: docs.queries[qid] for qid in docs.qrels["test"]}
    assert 0.35 < data.evaluate(data.bm25_run(docs, queries, k=10), docs.qrels["test"], ["MRR@10"])["MRR@10"] < 0.6


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["eager", "torch"]
if maxsim_kernel.triton is not None:
    # The interpreter of Triton 3.6 does not get on with NumPy 2.4.
    versions = [[int(x) for x in module.__version__.split(".")[:2]] for module in (maxsim_kernel.triton, np)]
    if DEVICE == "cuda" or versions[0] >= [3, 7] or versions[1] < [2, 4]:
        BACKENDS.append("triton")
LAYOUTS = pytest.mark.parametrize("paired", [False, True], ids=["all_pairs", "own_block"])
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
WITH_GRADIENTS_OF_OURS = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
# Largest error allowed, relative to the largest value: (scores, each gradient).
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 1e-2),
             torch.float16: (2e-3, 2e-3)}


# ---- maxsim_kernel.py: MaxSim ----------------------------------------------------------------------------------------


def ragged(lengths, B, Q, E, dtype=torch.float32, seed=0, masked=False):
    """Random q, d, offsets and q_mask."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    q = torch.randn(B, Q, E, generator=generator).to(dtype)
    d = torch.randn(int(offsets[-1]), E, generator=generator).to(dtype)
    q_mask = torch.rand(B, Q, generator=generator) < 0.7 if masked else None
    return [None if x is None else x.to(DEVICE) for x in (q, d, offsets, q_mask)]


def maxsim_numpy(q, d, offsets, q_mask, paired, upstream):
    """Scores and both gradients by the definition, in float64."""
    q, d, upstream = (x.double().cpu().numpy() for x in (q, d, upstream))
    B, N = len(q), len(offsets) - 1
    scores, grad_q, grad_d = np.zeros(upstream.shape), np.zeros_like(q), np.zeros_like(d)
    for b in range(B):
        for column in range(upstream.shape[1]):
            n = b * (N // B) + column if paired else column
            start, end = offsets[n], offsets[n + 1]
            for i in range(q.shape[1] if end > start else 0):
                if q_mask is None or q_mask[b, i]:
                    t = start + int(np.argmax(d[start:end] @ q[b, i]))  # argmax: the lowest of a tie
                    scores[b, column] += d[t] @ q[b, i]
                    grad_q[b, i] += upstream[b, column] * d[t]
                    grad_d[t] += upstream[b, column] * q[b, i]
    return scores, grad_q, grad_d


def scores_and_gradients(q, d, offsets, q_mask, paired, backend, upstream=None):
    q, d = q.clone().requires_grad_(), d.clone().requires_grad_()
    scores = (maxsim_paired if paired else maxsim)(q, d, offsets, q_mask, backend)
    if upstream is None:
        upstream = torch.linspace(-2, 3, scores.numel(), device=scores.device).view_as(scores)
    return [scores.detach(), *torch.autograd.grad(scores, (q, d), upstream.to(scores.dtype)), upstream]


def assert_agrees_with_float64(q, d, offsets, q_mask, paired, backend):
    *got, upstream = scores_and_gradients(q, d, offsets, q_mask, paired, backend)
    assert got[0].dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    for x, like in zip(got[1:], (q, d)):
        assert x.dtype == like.dtype and x.shape == like.shape
    truth, (of_scores, of_gradient) = maxsim_numpy(q, d, offsets.cpu(), q_mask, paired, upstream), TOLERANCE[q.dtype]
    for x, true, tolerance in zip(got, truth, (of_scores, of_gradient, of_gradient)):
        error = np.abs(x.double().cpu().numpy() - true).max(initial=0)
        assert error <= tolerance * max(np.abs(true).max(initial=0), 1e-3)


def test_maxsim_of_two_queries_and_three_passages_by_hand():
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [-1.0, 0.0]]], device=DEVICE)
    d = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, -1.0], [-2.0, -1.0]], device=DEVICE)  # passages of 2, 0, 2 tokens
    offsets = torch.tensor([0, 2, 2, 4], dtype=torch.int32, device=DEVICE)
    # Query 0: max(1, 3) + max(2, 0) = 5; empty; max(0, -2) + max(-1, -1) = -1.
    # Query 1: max(3, 3) + max(-1, -3) = 2; empty; max(-1, -3) + max(0, 2) = 1.
    upstream = torch.tensor([[1.0, 10, 100], [0, 0, 2]], device=DEVICE)
    for backend in BACKENDS:
        scores, grad_q, grad_d, _ = scores_and_gradients(q, d, offsets, None, False, backend, upstream)
        assert scores.tolist() == [[5, 0, -1], [2, 0, 1]]
        # The ties (query 0's second token in the last passage, query 1's first in the first) go to the first token.
        assert grad_q.tolist() == [[[3 + 0, 0 - 100], [1 + 0, 2 - 100]], [[0, -2], [-4, -2]]]
        assert grad_d.tolist() == [[0, 1], [1, 0], [100 + 2, 100 + 2], [-2, 0]]


@LAYOUTS
@EVERY_BACKEND
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_maxsim_and_both_gradients_agree_with_float64(dtype, backend, paired):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton computes in float32")
    assert_agrees_with_float64(*ragged([7, 0, 64, 65, 1, 130], 3, 5, 24, dtype, masked=True), paired, backend)


@EVERY_BACKEND
@pytest.mark.parametrize("B, Q, E, lengths, paired", [
    (1, 1, 1, [1], False), (1, 1, 1, [], False), (2, 3, 8, [0, 0], False), (5, 1, 16, [1] * 5, True),
    (7, 1, 40, [1, 2, 0], False), (2, 33, 16, [63, 64], True), (5, 31, 16, [3, 67], False),
    (1, 130, 16, [70, 2], True), (1, 512, 16, [5], False), (2, 4, 300, [9, 33], False),
], ids=str)
def test_maxsim_at_the_edges_of_its_tiles(B, Q, E, lengths, paired, backend):
    assert_agrees_with_float64(*ragged(lengths, B, Q, E, masked=Q > 2), paired, backend)


@pytest.mark.parametrize("seed", range(200))
def test_triton_and_blockwise_agree_with_float64_on_random_ragged_batches(seed):
    rng = np.random.default_rng(seed)
    B, Q, K, paired = rng.integers(1, 5), rng.integers(1, 8), rng.integers(1, 4), bool(rng.integers(2))
    lengths = rng.integers(0, rng.choice([2, 20, 80, 301]), B * K if paired else rng.integers(0, 6))
    dtype = [torch.float32, torch.bfloat16][seed % 2]
    E, masked = int(rng.choice([3, 16, 32, 50])), bool(rng.integers(2))
    q, d, offsets, q_mask = ragged(lengths, B, Q, E, dtype, seed, masked)
    kind = seed % 5
    if kind == 1:  # exact ties: a few small integers
        q, d = q.sign(), d.round().clamp(-1, 1)
    elif kind == 2:  # duplicated tokens, in quarters, so that no order of summation rounds one of the two
        q, d = (4 * q).round() / 4, (4 * d[torch.arange(len(d), device=DEVICE) // 2 * 2]).round() / 4
    elif kind == 3:  # every similarity negative
        q, d = q.abs() + 0.1, -d.abs() - 0.1
    for backend in BACKENDS[1:]:
        assert_agrees_with_float64(q, d, offsets, q_mask, paired, backend)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_triton_and_blockwise_choose_the_same_winners_at_ties():
    q, d, offsets, _ = ragged([130, 3, 64, 0, 9], 3, 6, 16, seed=5)
    q, d = q.sign(), d.sign()
    forwards = maxsim_kernel._triton_forward, maxsim_kernel._blockwise_forward
    winners = [forward(q, d, offsets, None, False, True, 130)[1] for forward in forwards]
    assert winners[0].dtype == winners[1].dtype == torch.uint8
    filled = offsets.diff() > 0  # an empty passage has no winner
    assert torch.equal(winners[0][filled], winners[1][filled])


@LAYOUTS
@EVERY_BACKEND
def test_a_masked_query_token_scores_as_if_it_were_not_there(backend, paired):
    q, d, offsets, _ = ragged([5, 8, 0, 70], 2, 6, 16)
    q_mask = torch.tensor([True, False, True, True, False, False], device=DEVICE)
    full = scores_and_gradients(q, d, offsets, q_mask.expand(2, -1), paired, backend)
    kept = scores_and_gradients(q[:, q_mask], d, offsets, None, paired, backend)
    torch.testing.assert_close(full[0], kept[0])
    torch.testing.assert_close(full[1][:, q_mask], kept[1])
    torch.testing.assert_close(full[2], kept[2])
    assert (full[1][:, ~q_mask] == 0).all()


@EVERY_BACKEND
def test_permuting_passages_permutes_scores_and_gradients(backend):
    lengths, order = [5, 0, 70, 33], [2, 3, 0, 1]
    q, d, offsets, _ = ragged(lengths, 3, 4, 16)
    tokens = torch.cat([torch.arange(offsets[n], offsets[n + 1]) for n in order]).to(DEVICE)
    permuted_offsets = torch.tensor([0, *(lengths[n] for n in order)], device=DEVICE).cumsum(0).int()
    scores, grad_q, grad_d, upstream = scores_and_gradients(q, d, offsets, None, False, backend)
    permuted = scores_and_gradients(q, d[tokens], permuted_offsets, None, False, backend, upstream[:, order])
    torch.testing.assert_close(permuted[0], scores[:, order])
    torch.testing.assert_close(permuted[1], grad_q)
    torch.testing.assert_close(permuted[2], grad_d[tokens])


@LAYOUTS
@EVERY_BACKEND
def test_two_runs_give_the_same_bits(backend, paired):
    batch = ragged([40, 77, 3, 0, 12, 200], 3, 5, 32)
    first, second = (scores_and_gradients(*batch, paired, backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_scaled_loss_does_not_overflow_float16(backend):
    q, d, offsets, _ = ragged([9, 70], 2, 3, 16, torch.float16)
    q, d = q / 1000, d / 1000
    *_, upstream = scores_and_gradients(q, d, offsets, None, False, backend)
    got = scores_and_gradients(q, d, offsets, None, False, backend, upstream * 1e6)[1:3]
    true = maxsim_numpy(q, d, offsets.cpu(), None, False, upstream * 1e6)[1:]
    for x, y in zip(got, true):
        np.testing.assert_allclose(x.double().cpu().numpy(), y, rtol=0, atol=2e-3 * np.abs(y).max())


def test_a_passage_longer_than_it_was_said_to_be_does_not_go_unnoticed():
    q, d, offsets, _ = ragged([4, 9], 2, 3, 16)
    with pytest.raises(ValueError, match="max_length is 8, but a passage has 9 tokens"):
        maxsim(q, d, offsets, None, "torch", max_length=8)
    if "triton" in BACKENDS:
        assert maxsim(q, d, offsets, None, "triton", max_length=8).isnan().tolist() == [[False, True]] * 2


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's
@LAYOUTS
@EVERY_BACKEND
def test_a_nan_is_not_lost_in_a_maximum(backend, paired):
    q, d, offsets, _ = ragged([5, 70], 2, 3, 16)
    for token in (5, 40, 74):  # the first, one between, the last
        one = d.detach().clone()
        one[token] = torch.nan
        scores = scores_and_gradients(q, one, offsets, None, paired, backend)[0]
        assert scores.isnan().tolist() == ([[False], [True]] if paired else [[False, True]] * 2)


@LAYOUTS
@WITH_GRADIENTS_OF_OURS
def test_a_masked_query_token_that_is_not_finite_reaches_no_gradient(backend, paired):
    q, d, offsets, q_mask = ragged([5, 7], 2, 3, 16, masked=True)
    q_mask[:, 0], q_mask[:, 1] = True, False
    q = q.detach().clone()
    q[:, 1] = torch.nan
    assert all(x.isfinite().all() for x in scores_and_gradients(q, d, offsets, q_mask, paired, backend))


@EVERY_BACKEND
def test_scores_and_losses_can_be_changed_in_place(backend):
    q, d, offsets, _ = ragged([5, 7], 2, 3, 16)
    for paired, rows in itertools.product((True, False), (1, 2)):
        scores = (maxsim_paired if paired else maxsim)(q[:rows].detach().requires_grad_(), d, offsets, backend=backend)
        scores /= 2
        scores.sum().backward()
    inputs = torch.randn(2, 1), torch.zeros(2, 0, 2, dtype=torch.int32), torch.zeros(2, 0), torch.zeros(2, dtype=torch.int32)
    inputs = [x.to(DEVICE) for x in inputs]
    for total in (pairdistill_objective(q.detach().requires_grad_(), d, offsets, *inputs, backend=backend).total,
                  pairdistill_loss(torch.randn(2, 2, device=DEVICE, requires_grad=True), *inputs, backend=backend).total):
        total *= 2
        total += 1
        total.backward()


@EVERY_BACKEND
def test_a_nan_of_the_teacher_is_not_lost_in_the_loss(backend):
    teacher = torch.tensor([[0., torch.nan, 1.], [1., 2., 3.]])
    inputs = [x.to(DEVICE) for x in (torch.randn(2, 3), teacher, torch.zeros(2, 0, 2, dtype=torch.int32), torch.zeros(2, 0))]
    losses = pairdistill_loss(*inputs, backend=backend)
    assert losses.kd.isnan() and losses.total.isnan()


@EVERY_BACKEND
def test_queries_without_tokens_score_nothing(backend):
    q, d, offsets, _ = ragged([5, 7], 2, 3, 16)
    for paired in (True, False):
        scores = (maxsim_paired if paired else maxsim)(q[:, :0], d, offsets, backend=backend)
        assert scores.shape == (2, 1 if paired else 2) and not scores.any()


@LAYOUTS
@WITH_GRADIENTS_OF_OURS
def test_a_gradient_that_nobody_wants_is_not_computed_and_the_other_is_the_same(backend, paired):
    q, d, offsets, _ = ragged([5, 7], 2, 3, 16)
    upstream, function = torch.ones(2, 1 if paired else 2, device=DEVICE), maxsim_paired if paired else maxsim
    q, d = q.detach(), d.detach()
    both = torch.autograd.grad(function(q.requires_grad_(), d.requires_grad_(), offsets, backend=backend), (q, d), upstream)
    only_q = torch.autograd.grad(function(q, d.detach(), offsets, backend=backend), q, upstream)[0]
    only_d = torch.autograd.grad(function(q.detach(), d, offsets, backend=backend), d, upstream)[0]
    assert torch.equal(only_q, both[0]) and torch.equal(only_d, both[1])


@EVERY_BACKEND
def test_autocast_does_not_round_the_similarities(backend):
    batch = ragged([5, 70], 2, 3, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = maxsim(*batch, backend)
    assert torch.equal(inside, maxsim(*batch, backend))


@LAYOUTS
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_gradients_of_maxsim_are_those_of_finite_differences(backend, paired):
    q, d, offsets, q_mask = ragged([3, 0, 5, 2], 2, 3, 4, torch.float64, masked=True)
    inputs, function = (q.requires_grad_(), d.requires_grad_()), maxsim_paired if paired else maxsim
    assert torch.autograd.gradcheck(lambda q, d: function(q, d, offsets, q_mask, backend), inputs)


# ---- maxsim_kernel.py: losses ----------------------------------------------------------------------------------------


def losses_numpy(scores, teacher, pairs, pair_probs, positive, tau, lambda_kd, lambda_pair, pair_reduction):
    """Sections 3.1, 3.3 and 4.2 of the paper, written out in float64."""
    scores, teacher, pair_probs = (x.detach().double().cpu().numpy() for x in (scores, teacher, pair_probs))
    positive, (B, K) = None if positive is None else positive.tolist(), teacher.shape
    cl, kd, pair, n_pairs = [], 0.0, 0.0, 0
    for b in range(B):
        first = b * K if scores.shape[1] != K else 0
        own = scores[b, first : first + K]
        if positive is not None and positive[b] >= 0:
            in_batch = scores.shape[1] != K
            negatives = np.delete(scores[b], range(first, first + K)) if in_batch else np.delete(own, positive[b])
            cl.append(-np.log(np.exp(own[positive[b]]) / (np.exp(own[positive[b]]) + np.exp(negatives).sum())))
        student = np.exp(own) / np.exp(own).sum()
        point = np.exp(teacher[b] / tau) / np.exp(teacher[b] / tau).sum()
        kd += (point[point > 0] * np.log(point[point > 0] / student[point > 0])).sum() / B
        for (i, j), p in zip(pairs[b].tolist(), pair_probs[b]):
            if i >= 0:
                n_pairs += 1
                ours = np.exp(own[i]) / (np.exp(own[i]) + np.exp(own[j]))
                pair += sum(t * np.log(t / s) for t, s in ((p, ours), (1 - p, 1 - ours)) if t > 0)
    cl = np.mean(cl) if cl else 0.0
    pair /= B if pair_reduction == "sum" else max(n_pairs, 1)
    return [cl + lambda_kd * kd + lambda_pair * pair, cl, kd, pair]


def loss_batch(B=4, K=5, P=7, in_batch=True, seed=0, dtype=torch.float64):
    """A mixed batch: query 1 has no label, query 2 no pairs, and some probabilities are exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(B, B * K if in_batch else K, generator=generator, dtype=dtype)
    teacher = 4 * torch.randn(B, K, generator=generator, dtype=dtype)
    pairs = torch.stack([torch.randperm(K, generator=generator)[:2] for _ in range(B * P)]).view(B, P, 2)
    pair_probs = torch.rand(B, P, generator=generator, dtype=dtype)
    pair_probs[0, :2] = torch.tensor([0, 1])
    pairs[2], pairs[3:, 4:] = -1, -1
    positive = torch.randint(0, K, (B,), generator=generator)
    positive[1] = -1
    return [x.to(DEVICE) for x in (scores, teacher, pairs, pair_probs, positive)]


IN_BATCH = pytest.mark.parametrize("in_batch", [True, False], ids=["in_batch", "own_block"])


@IN_BATCH
@EVERY_BACKEND
@pytest.mark.parametrize("pair_reduction", ["mean", "sum"])
@pytest.mark.parametrize("labels", ["labelled", "unlabelled", "mixed", "none given"])
def test_losses_agree_with_the_papers_formulas(labels, pair_reduction, backend, in_batch):
    scores, teacher, pairs, pair_probs, positive = loss_batch(in_batch=in_batch)
    positive = {"labelled": positive.clamp(min=0), "unlabelled": positive.clamp(max=-1), "mixed": positive}.get(labels)
    options = dict(tau=0.7, lambda_kd=0.5, lambda_pair=2.0, pair_reduction=pair_reduction)
    given = scores.float() if backend == "triton" else scores
    got = pairdistill_loss(given, teacher, pairs, pair_probs, positive, backend=backend, **options)
    true = losses_numpy(scores, teacher, pairs, pair_probs, positive, **options)
    fused = 2e-6 if DEVICE == "cpu" else 1e-5  # a GPU's exponential is good to some 2e-7
    np.testing.assert_allclose([x.item() for x in got], true, rtol=fused if backend == "triton" else 1e-12, atol=1e-12)
    assert labels in ("labelled", "mixed") or got.cl == 0


def test_losses_of_two_queries_and_three_passages_by_hand():
    log = np.log
    scores = torch.tensor([[log(2), 0, 0], [0, log(3), 0]], device=DEVICE).float()  # softmax .5 .25 .25 and .2 .6 .2
    teacher = torch.tensor([[0, 0, 0], [0, log(3), 0]], device=DEVICE).float()  # 1/3 1/3 1/3 and .2 .6 .2
    pairs = torch.tensor([[[0, 1], [2, 1]], [[1, 2], [-1, -1]]], device=DEVICE)
    pair_probs = torch.tensor([[1.0, 0.5], [0.0, 0.0]], device=DEVICE)  # the student's: 2/3, 1/2 and 3/4
    positive = torch.tensor([0, -1], device=DEVICE)
    for backend in BACKENDS:
        losses = pairdistill_loss(scores, teacher, pairs, pair_probs, positive, backend=backend)
        assert losses.cl.item() == pytest.approx(log(2), rel=1e-6)
        assert losses.kd.item() == pytest.approx((log(2 / 3) + 2 * log(4 / 3)) / 3 / 2, rel=1e-5)
        assert losses.pair.item() == pytest.approx((log(3 / 2) + 0 + log(4)) / 3, rel=1e-6)
        assert losses.total.item() == pytest.approx((losses.cl + losses.kd + 3 * losses.pair).item())


@IN_BATCH
@pytest.mark.parametrize("pair_reduction", ["mean", "sum"])
def test_gradients_of_the_losses_are_those_of_finite_differences(pair_reduction, in_batch):
    scores, *rest = loss_batch(in_batch=in_batch)
    options = dict(tau=0.7, pair_reduction=pair_reduction)
    losses = lambda s: tuple(pairdistill_loss(s, *rest, **options))
    assert torch.autograd.gradcheck(losses, (scores.requires_grad_(),), nondet_tol=1e-12)  # a GPU adds in any order


@IN_BATCH
@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize("K, P", [(5, 7), (1, 0), (64, 50), (33, 130)])
def test_the_fused_head_agrees_with_eager_in_every_loss_and_gradient(K, P, in_batch):
    scores, *rest = loss_batch(K=max(K, 2), P=max(P, 5), in_batch=in_batch, dtype=torch.float32)
    if K == 1:  # nothing to compare
        scores = scores[:, ::2].contiguous()
        rest = [rest[0][:, :1], rest[1][:, :0], rest[2][:, :0], rest[3].clamp(max=0)]
    scores.requires_grad_()
    for upstream in [(1.7, 0, 0, 0), (0, 1, -2, 3), (2, 0, 0, 0.5)]:
        got = []
        for backend in ("eager", "triton"):
            losses = pairdistill_loss(scores, *rest, tau=1.3, backend=backend)
            weighted = sum(weight * loss for weight, loss in zip(upstream, losses) if weight)
            got.append([*losses, torch.autograd.grad(weighted, scores)[0]])
        for x, y in zip(*got):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@EVERY_BACKEND
def test_extreme_scores_and_probabilities_keep_finite_gradients(backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(dtype=torch.float32)
    scores = (100 * scores).requires_grad_()
    losses = pairdistill_loss(scores, 1000 * teacher, pairs, pair_probs.round(), positive, backend=backend)
    (grad,) = torch.autograd.grad(losses.total, scores)
    assert all(x.isfinite() for x in losses) and grad.isfinite().all()


@EVERY_BACKEND
@pytest.mark.parametrize("pair_reduction", ["mean", "sum"])
def test_the_ranks_losses_and_gradients_add_up_to_the_global_batchs(pair_reduction, backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(B=5, dtype=torch.float32)
    scores.requires_grad_()
    batch = scores, teacher, pairs, pair_probs, positive
    options = dict(pair_reduction=pair_reduction, backend=backend)
    whole = pairdistill_loss(*batch, **options)
    options |= dict(n_queries=5, n_labelled=int((positive >= 0).sum()), n_pairs=int((pairs[..., 0] >= 0).sum()))
    parts = slice(0, 2), slice(2, 3), slice(3, 5)  # the second rank has no pair
    ranks = [pairdistill_loss(*(x[part] for x in batch), first_query=part.start, **options) for part in parts]
    for term, sums in zip(whole, zip(*ranks)):
        torch.testing.assert_close(sum(sums), term)
    totals, upstream = (whole.total, sum(rank.total for rank in ranks)), torch.tensor(1.5, device=DEVICE)
    grads = [torch.autograd.grad(total, scores, upstream)[0] for total in totals]
    torch.testing.assert_close(*grads)


@EVERY_BACKEND
def test_permuting_a_querys_passages_changes_no_loss(backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(B=3, K=4, in_batch=False, dtype=torch.float32)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)  # new position k holds the old order[k]
    new_position = order.argsort()
    moved_pairs = torch.where(pairs >= 0, new_position[pairs.clamp(min=0)], -1)
    moved_positive = torch.where(positive >= 0, new_position[positive.clamp(min=0)], -1)
    moved = scores[:, order], teacher[:, order], moved_pairs, pair_probs, moved_positive
    before = pairdistill_loss(scores, teacher, pairs, pair_probs, positive, backend=backend)
    after = pairdistill_loss(*moved, backend=backend)
    torch.testing.assert_close(tuple(before), tuple(after))


@EVERY_BACKEND
def test_a_swapped_pair_is_the_same_as_one_minus_its_probability(backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(dtype=torch.float32)
    scores.requires_grad_()
    results = []
    for args in ((pairs, pair_probs), (pairs.flip(-1), 1 - pair_probs)):
        losses = pairdistill_loss(scores, teacher, *args, positive, backend=backend)
        results.append((losses.pair.detach(), torch.autograd.grad(losses.total, scores)[0]))
    torch.testing.assert_close(*results)


@EVERY_BACKEND
def test_columns_of_the_own_hard_negatives_are_no_negatives_of_the_contrastive_loss(backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(dtype=torch.float32)
    scores.requires_grad_()
    losses = pairdistill_loss(scores, teacher, pairs, pair_probs, positive, backend=backend)
    (grad,) = torch.autograd.grad(losses.cl, scores)
    K = teacher.shape[1]
    for b, label in enumerate(positive.tolist()):
        own = grad[b, b * K : (b + 1) * K]
        assert (grad[b] != 0).sum() == (0 if label < 0 else grad.shape[1] - K + 1) and (label < 0 or own[label] < 0)


# ---- maxsim_kernel.py: the objective, and its boundary ---------------------------------------------------------------


@IN_BATCH
@EVERY_BACKEND
def test_the_objective_is_the_loss_of_maxsim(backend, in_batch):
    B, K = 3, 4
    q, d, offsets, q_mask = ragged([5, 0, 70, 1, 2, 3, 4, 9, 12, 33, 0, 8], B, 5, 16, masked=True)
    q, d = q.requires_grad_(), d.requires_grad_()
    _, *rest = loss_batch(B, K, dtype=torch.float32)
    options = dict(tau=0.8, lambda_pair=2.0, pair_reduction="sum")
    fused = pairdistill_objective(q, d, offsets, *rest, q_mask=q_mask, in_batch=in_batch, backend=backend, **options)
    scores = (maxsim if in_batch else maxsim_paired)(q, d, offsets, q_mask, "eager")
    composed = pairdistill_loss(scores, *rest, backend="eager", **options)
    torch.testing.assert_close(tuple(fused), tuple(composed), rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        looked_at = pairdistill_objective(q, d, offsets, *rest, q_mask=q_mask, in_batch=in_batch, backend=backend, **options)
    torch.testing.assert_close(tuple(looked_at), tuple(composed), rtol=1e-5, atol=1e-6)
    upstream = torch.tensor(-1.7, device=DEVICE)
    for x, y in zip(*(torch.autograd.grad(losses.total, (q, d), upstream) for losses in (fused, composed))):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_objective_is_that_of_finite_differences():
    q, d, offsets, _ = ragged([2, 0, 3, 1], 2, 2, 3, torch.float64)
    _, *rest = loss_batch(B=4, K=2)
    rest = [x[:2] for x in rest]
    inputs = q.requires_grad_(), d.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, d: pairdistill_objective(q, d, offsets, *rest).total, inputs, nondet_tol=1e-12)


@pytest.mark.parametrize("change, message", [
    (dict(q=torch.zeros(2, 3)), r"q must be float \[B, Lq, dim\]"),
    (dict(q=torch.zeros(2, 3, 4, dtype=torch.int32)), "q must be float"),
    (dict(d=torch.zeros(6, 5)), r"d must be float32 \[T, 4\] on cpu, got float32 \[6, 5\]"),
    (dict(d=torch.zeros(6, 4, dtype=torch.float16)), "d must be float32"),
    (dict(offsets=torch.tensor([0, 2, 6])), "offsets must be int32"),
    (dict(offsets=torch.tensor([0, 2, 5], dtype=torch.int32)), "offsets must .* end with d's 6 rows"),
    (dict(offsets=torch.tensor([0, 7, 6], dtype=torch.int32)), "never fall"),
    (dict(offsets=torch.tensor([0, 1, 2, 6], dtype=torch.int32)), "the same number of passages, got 3 for 2"),
    (dict(q_mask=torch.ones(2, 3)), "q_mask must be bool"),
    (dict(backend="cuda"), "backend must be one of auto, triton, torch, eager"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_maxsim_says_in_one_sentence_what_is_wrong(change, message):
    right = dict(q=torch.zeros(2, 3, 4), d=torch.zeros(6, 4), offsets=torch.tensor([0, 2, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        maxsim_paired(**right | change)


@pytest.mark.parametrize("change, message", [
    (dict(scores=torch.zeros(2, 4)), "scores must be 3 wide"),
    (dict(scores=torch.zeros(2, 6), first_query=1), "of which these are 1 to 2, got 6"),
    (dict(scores=torch.zeros(6)), "scores must be float"),
    (dict(teacher=torch.zeros(3, 3)), r"teacher must be float \[2, K\]"),
    (dict(teacher=[1.0]), "teacher must be a tensor, got a list"), (dict(n_pairs=-1), "n_pairs must be 0 or more, got -1"),
    (dict(teacher=torch.zeros(2, 3, dtype=torch.int64)), "teacher must be float"),
    (dict(pairs=torch.zeros(2, 1, 2)), "pairs must be int"),
    (dict(pairs=torch.tensor([[[0, 3]], [[0, 1]]])), "pairs must lie in 0 to 2, or be -1 twice"),
    (dict(pairs=torch.tensor([[[0, -1]], [[0, 1]]])), "pairs must lie"),
    (dict(pair_probs=torch.zeros(2, 2)), "pair_probs must be float"),
    (dict(pair_probs=torch.tensor([[0.5], [1.5]])), "pair_probs must lie between 0 and 1"),
    (dict(positive=torch.zeros(2)), "positive must be int"),
    (dict(positive=torch.tensor([3, 0])), "positive must lie in -1 to 2"),
    (dict(pair_reduction="max"), "pair_reduction must be 'mean' or 'sum'"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_the_loss_says_in_one_sentence_what_is_wrong(change, message):
    right = dict(scores=torch.zeros(2, 3), teacher=torch.zeros(2, 3), pairs=torch.zeros(2, 1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        pairdistill_loss(**right | dict(pair_probs=torch.zeros(2, 1)) | change)


@pytest.mark.parametrize("hide_triton", [False, True], ids=["triton installed", "no triton"])
def test_without_a_gpu_everything_works_on_cpu_tensors_and_triton_says_why_it_cannot(hide_triton):
    program = f"""
import sys
if {hide_triton}: sys.modules["triton"] = None  # import triton then raises ImportError
import torch
from maxsim_kernel import maxsim, pairdistill_objective
q, d, offsets = torch.ones(1, 2, 4, requires_grad=True), torch.ones(3, 4), torch.tensor([0, 1, 3], dtype=torch.int32)
assert maxsim(q, d, offsets).tolist() == [[8, 8]]
losses = pairdistill_objective(q, d, offsets, torch.zeros(1, 2), torch.tensor([[[0, 1]]]), torch.tensor([[.5]]))
losses.total.backward()
try: maxsim(q, d, offsets, backend="triton")
except ValueError as error: print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    hidden = hide_triton or maxsim_kernel.triton is None
    reason = "which is not installed" if hidden else "needs tensors on a CUDA device"
    assert reason in run.stdout and run.stdout.count("\n") == 1


# pairdistill.py -----------------------------------------------------------------------------------------------------


TEXTS = ["the cat sat on the mat.", "dogs bark at night, loudly!", "a bird sings", "fish swim in the sea; they do",
         "the quick brown fox jumps over the lazy dog", "birds of a feather flock together"] * 3


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    scratch_encoder(folder, TEXTS, vocabulary=200, hidden=32, layers=1, positions=64)
    return str(folder)


def student_of(encoder, **settings) -> Student:
    return Student.from_pretrained(encoder, **{"dim": 16, "query_length": 12, "passage_length": 20, **settings})


def test_a_query_is_cls_marker_words_sep_and_masks_that_score_but_are_not_attended_to(encoder):
    student = student_of(encoder)
    q, mask = student.encode_queries(["the cat sat"])
    assert q.shape == (1, 12, 16) and mask.all()
    assert torch.allclose(q.norm(dim=-1), torch.ones(1, 12), atol=1e-5)
    rows = student._ids(["the cat sat"], student.query_marker, 12)
    t = student.tokenizer
    assert t.convert_ids_to_tokens(rows[0])[:2] == ["[CLS]", "[unused0]"] and rows[0][-1] == t.sep_token_id
    # More [MASK]s change no other vector: nobody attends to them.
    longer = student_of(encoder, query_length=16).encode_queries(["the cat sat"])[0]
    assert torch.allclose(longer[:, :len(rows[0])], q[:, :len(rows[0])], atol=1e-5)


def test_without_expansion_a_querys_padding_does_not_score(encoder):
    q, mask = student_of(encoder, query_expansion=False).encode_queries(["the cat sat on the mat", "fish"])
    assert mask[0].sum() > mask[1].sum() and mask[0].all()


def test_passages_are_ragged_in_their_own_order_and_do_without_punctuation(encoder):
    student = student_of(encoder)
    student.chunk = 2
    d, offsets = student.encode_passages(TEXTS[:5])
    assert offsets[0] == 0 and offsets[-1] == len(d) and offsets.dtype == torch.int32
    for n, text in enumerate(TEXTS[:5]):
        ids = student._ids([text], student.passage_marker, 20)[0]
        kept = [i for i in ids if not student.skipped[i]]
        alone, _ = student.encode_passages([text])
        assert offsets[n + 1] - offsets[n] == len(kept) == len(alone)
        assert torch.allclose(d[offsets[n]:offsets[n + 1]], alone, atol=1e-5)
    assert len(student.encode_passages(["?!, ."])[0]) == 3  # [CLS], marker and [SEP] are left of a passage of punctuation
    assert student.encode_passages([])[1].tolist() == [0]


def test_dpr_is_one_token_a_side_and_not_normalised(encoder):
    student = student_of(encoder, architecture="dpr", dim=None)
    q, mask = student.encode_queries(TEXTS[:3])
    d, offsets = student.encode_passages(TEXTS[:4])
    assert q.shape == (3, 1, 32) and mask.shape == (3, 1) and d.shape == (4, 32) and offsets.tolist() == [0, 1, 2, 3, 4]
    assert not torch.allclose(d.norm(dim=-1), torch.ones(4), atol=1e-2)
    assert torch.allclose(maxsim_kernel.maxsim(q, d, offsets), q[:, 0] @ d.T, atol=1e-5)


LATE = [dict(), dict(markers=False), dict(query_expansion=False, dim=8), dict(dim=None)]
DPR = [dict(architecture="dpr", dim=None), dict(architecture="dpr", dim=8)]


def assert_same_embeddings(a: Student, b: Student, queries=TEXTS[:3], passages=TEXTS[:4] + ["?!, ."]):
    assert all(map(torch.equal, a.encode_queries(queries), b.encode_queries(queries)))
    assert all(map(torch.equal, a.encode_passages(passages), b.encode_passages(passages)))


@pytest.mark.parametrize("settings", LATE + DPR)
def test_a_saved_student_loads_as_it_was(encoder, tmp_path, settings):
    student = student_of(encoder, **settings)
    student.save_pretrained(tmp_path)
    again = Student.from_pretrained(str(tmp_path))
    assert again.settings == student.settings
    assert_same_embeddings(again, student)


@pytest.mark.parametrize("settings, gone", [
    *((settings, ["pairdistill.json", "artifact.metadata"]) for settings in LATE),  # PyLate's files are left
    (dict(), ["pairdistill.json", "modules.json"])])  # colbert-ai's, which have no words for the other settings
def test_each_librarys_files_alone_are_the_same_student(encoder, tmp_path, settings, gone):
    student = student_of(encoder, **settings)
    student.save_pretrained(tmp_path)
    for name in gone:
        (tmp_path / name).unlink()
    again = Student.from_pretrained(str(tmp_path))
    assert_same_embeddings(again, student)
    assert (again.query_length, again.passage_length, again.dim) == (12, 20, student.dim)


def bert_by_hand(folder, rows, linear, attend_all):
    """Rows of ids, padded with -1 for a [MASK] that nobody attends to (unless attend_all) -> normalised token vectors."""
    from transformers import AutoModel, AutoTokenizer
    mask = AutoTokenizer.from_pretrained(folder).mask_token_id
    ids = torch.tensor(rows)
    x = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()(
        input_ids=ids.where(ids >= 0, mask), attention_mask=((ids >= 0) | attend_all).long()).last_hidden_state
    return F.normalize(x @ linear.T, dim=-1)


@pytest.mark.parametrize("attend", [False, True])
def test_a_colbert_checkpoint_brings_its_projection_and_settings(encoder, tmp_path, attend):
    from transformers import AutoModel, AutoTokenizer
    tokenizer, bert = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    tokenizer.save_pretrained(tmp_path)
    bert.config.save_pretrained(tmp_path)
    linear = torch.randn(24, 32)
    torch.save({**{f"bert.{k}": v for k, v in bert.state_dict().items()}, "linear.weight": linear}, tmp_path / "pytorch_model.bin")
    (tmp_path / "artifact.metadata").write_text(json.dumps(dict(
        query_maxlen=9, doc_maxlen=7, dim=24, mask_punctuation=False, attend_to_mask_tokens=attend, query_token_id="[unused1]",
        doc_token_id="[unused0]", doc_token="[D]", resume=False, checkpoint=None)))
    student = Student.from_pretrained(str(tmp_path))
    cls_, sep, one, zero = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", "[unused1]", "[unused0]"])
    words = tokenizer("a bird sings", add_special_tokens=False)["input_ids"]
    row = [cls_, one, *words, sep]
    row = (row + [-1] * 9)[:9] if len(row) < 9 else [*row[:8], sep]
    q, q_mask = student.encode_queries(["a bird sings"])
    assert q_mask.all() and torch.allclose(q, bert_by_hand(tmp_path, [row], linear, attend), atol=1e-5)
    words = tokenizer("dogs bark at night, loudly!", add_special_tokens=False)["input_ids"]
    d, offsets = student.encode_passages(["dogs bark at night, loudly!"])  # seven tokens: its punctuation is kept
    assert torch.allclose(d, bert_by_hand(tmp_path, [[cls_, zero, *words[:4], sep]], linear, False)[0], atol=1e-5)
    longer = Student.from_pretrained(str(tmp_path), query_length=11, passage_length=300, query_expansion=False)
    assert (longer.query_length, longer.passage_length, longer.expand, longer.dim) == (11, 300, False, 24)


def write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def dense_folder(folder, *weights, **config):
    from safetensors.torch import save_file
    folder.mkdir()
    save_file(dict(zip(("linear.weight", "residual.weight", "linear.bias"), weights)), folder / "model.safetensors")
    out, width = weights[0].shape
    write_json(folder / "config.json", {"in_features": width, "out_features": out, "bias": False,
                                        "activation_function": "torch.nn.modules.linear.Identity", **config})


def pylate_folder(encoder, folder, *dense, **config):
    """As PyLate writes one: "[Q] " and "[D] ", with the space, are new tokens, and padding is done with [MASK]."""
    from transformers import AutoModel, AutoTokenizer
    tokenizer, bert = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    bert.resize_token_embeddings(len(tokenizer))
    tokenizer.pad_token = "[MASK]"
    for part in (tokenizer, bert):
        part.save_pretrained(folder)
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}] + [
        {"idx": n, "name": str(n), "path": f"{n}_Dense", "type": "pylate.models.Dense.Dense"} for n in range(1, len(dense) + 1)])
    for n, (weights, dense_config) in enumerate(dense, 1):
        dense_folder(folder / f"{n}_Dense", *weights, **dense_config)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 50, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {
        "similarity_fn_name": "MaxSim", "prompts": {"query": "", "document": ""}, "query_prefix": "[Q] ", "document_prefix": "[D] ",
        "query_length": 9, "document_length": 7, "attend_to_expansion_tokens": False, "skiplist_words": ["at", "!"],
        "do_query_expansion": True, **config})
    return tokenizer


@pytest.mark.parametrize("attend", [False, True])
def test_a_pylate_folder_brings_its_prefixes_lengths_and_skiplist(encoder, tmp_path, attend):
    one, two, residual = torch.randn(24, 32), torch.randn(10, 24), torch.randn(10, 24)
    t = pylate_folder(encoder, tmp_path, ([one], {}), ([two, residual], {"use_residual": True}), attend_to_expansion_tokens=attend)
    student, linear = Student.from_pretrained(str(tmp_path)), (two + residual) @ one
    ids = lambda text: t(text, add_special_tokens=False)["input_ids"]
    row = [t.cls_token_id, t.convert_tokens_to_ids("[Q] "), *ids("a bird"), t.sep_token_id]
    q, q_mask = student.encode_queries(["a bird"])
    assert len(row) < 9 and q_mask.all() and q.shape == (1, 9, 10)
    assert torch.allclose(q, bert_by_hand(tmp_path, [row + [-1] * (9 - len(row))], linear, attend), atol=1e-4)
    row = [t.cls_token_id, t.convert_tokens_to_ids("[D] "), *ids("at the mat, dogs bark")[:4], t.sep_token_id]
    kept = torch.tensor([i not in t.convert_tokens_to_ids(["at", "!"]) for i in row])
    d, _ = student.encode_passages(["at the mat, dogs bark"])
    assert not kept.all() and torch.allclose(d, bert_by_hand(tmp_path, [row], linear, False)[0, kept], atol=1e-4)
    student.save_pretrained(tmp_path / "again")
    assert_same_embeddings(Student.from_pretrained(str(tmp_path / "again")), student)


def multi_vector_folder(encoder, folder, **changes):
    """As sentence-transformers' MultiVectorEncoder writes one."""
    from transformers import AutoModel, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    AutoModel.from_pretrained(encoder).save_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[unused0]", "[unused1]"]})
    tokenizer.save_pretrained(folder)
    at, kinds = "sentence_transformers.", {"": "base.modules.transformer.Transformer", "1_Dense": "base.modules.dense.Dense",
             "2_MultiVectorMask": "multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
             "3_Normalize": "base.modules.normalize.Normalize"}
    dense_folder(folder / "1_Dense", torch.eye(32)[:24], module_input_name="token_embeddings")
    for name, value in {
            "modules.json": [{"idx": n, "name": str(n), "path": p, "type": at + k} for n, (p, k) in enumerate(kinds.items())],
            "sentence_bert_config.json": {"document_length": 20, "query_expansion": {
                "strategy": "fixed", "attend": False, "token": None, "length": 12}},
            "config_sentence_transformers.json": {"model_type": "MultiVectorEncoder", "prompts": {
                "query": "[unused0] ", "document": "[unused1]"}},
            "2_MultiVectorMask/config.json": {"skiplist_words": [*"!,.;?", "[UNK]"], "skiplist_tasks": ["document"]}}.items():
        write_json(folder / name, value | changes.get(name, {}) if isinstance(value, dict) else value)


def test_a_multi_vector_folder_is_the_same_student_as_one_with_our_settings(encoder, tmp_path):
    multi_vector_folder(encoder, tmp_path)
    student = Student.from_pretrained(str(tmp_path))
    ours = student_of(encoder, dim=24)
    ours.linear.weight.data.copy_(torch.eye(32)[:24])
    assert student.settings | {"skiplist": ours.settings["skiplist"]} == ours.settings
    assert_same_embeddings(student, ours)
    without = tmp_path / "without"  # there a word that is no token does not stand for [UNK]
    multi_vector_folder(encoder, without, **{"2_MultiVectorMask/config.json": {"skiplist_words": ["@", "the"]}})
    student = Student.from_pretrained(str(without))
    assert student.skipped.nonzero().flatten().tolist() == [student.token_id("the")] and student.token_id("@") is None
    limited = tmp_path / "limited"
    multi_vector_folder(encoder, limited, **{"sentence_bert_config.json": {"query_expansion": None, "max_seq_length": 15}})
    student = Student.from_pretrained(str(limited))
    assert (student.expand, student.query_length, student.passage_length) == (False, 15, 20)


@pytest.mark.parametrize("config", [{"pooling_mode": "mean"}, {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}])
def test_a_dense_encoder_pools_as_it_was_trained_or_starts_a_colbert(encoder, tmp_path, config):
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / "modules.json", [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in (
        ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))])
    write_json(tmp_path / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **config})
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 50})
    dpr = Student.from_pretrained(str(tmp_path), "dpr")
    assert (dpr.dim, dpr.query_length, dpr.passage_length) == (32, 50, 50)  # no projection is put onto a trained model
    mean = dpr.encoder(**dpr.tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state.mean(1)
    assert torch.allclose(dpr.encode_passages(TEXTS[:1])[0], mean, atol=1e-5)
    assert_same_embeddings(student_of(str(tmp_path)), student_of(encoder))


def test_a_text_longer_than_the_encoder_reads_is_refused(encoder):
    student = Student.from_pretrained(encoder, passage_length=9999)
    student.encode_passages(TEXTS[:1])
    with pytest.raises(ValueError, match="a text has [0-9]+ tokens, and this encoder reads 64 at most: .*passage_length .9999 now"):
        student.encode_passages([TEXTS[0] * 100])


def test_roberta_reads_as_many_tokens_as_it_has_positions_left(tmp_path, encoder):
    from transformers import RobertaConfig, RobertaModel
    tokenizer = Student.from_pretrained(encoder).tokenizer
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                           max_position_embeddings=34, pad_token_id=tokenizer.pad_token_id)
    student = Student(RobertaModel(config, add_pooling_layer=False).eval(), tokenizer, 16, passage_length=99)
    most = 34 - tokenizer.pad_token_id - 1
    assert len(student.encode_passages(["the " * (most - 3)])[0]) == most
    with pytest.raises(ValueError, match=f"this encoder reads {most} at most"):
        student.encode_passages(["the " * (most - 2)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_of_a_half_precision_encoder_keeps_its_small_steps(encoder, tmp_path, dtype):
    from transformers import AutoModel
    shutil.copytree(encoder, tmp_path / "half")
    AutoModel.from_pretrained(encoder, dtype=dtype).save_pretrained(tmp_path / "half")
    student = Student.from_pretrained(str(tmp_path / "half"))
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1 + 1e-4)
    student.save_pretrained(tmp_path / "student")
    assert_same_embeddings(Student.from_pretrained(str(tmp_path / "student")), student)


def test_a_save_that_is_interrupted_leaves_nothing_that_loads(encoder, tmp_path, monkeypatch):
    student = student_of(encoder, markers=False)
    student.save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoints, "_write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot load the folder"):
        Student.from_pretrained(str(tmp_path))


def test_a_hub_file_that_cannot_be_asked_for_is_not_one_that_is_absent(monkeypatch):
    import huggingface_hub as hub
    import huggingface_hub.errors
    answers = dict(raised=hub.errors.LocalEntryNotFoundError("offline"), cached={})

    def download(name, filename):
        raise answers["raised"]
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, filename: answers["cached"].get(filename))
    with pytest.raises(ValueError, match="cannot load 'some/model': .*--local-dir"):
        checkpoints.find("some/model", "modules.json")
    answers["cached"] = {"modules.json": object()}  # asked for before: it is known that there is none
    assert checkpoints.find("some/model", "modules.json") is None
    answers["cached"] = {".gitattributes": "/there"}  # all files were fetched
    assert checkpoints.find("some/model", "modules.json") is None
    answers["raised"] = hub.errors.EntryNotFoundError("404")
    assert checkpoints.find("some/model", "modules.json") is None


@pytest.mark.parametrize("settings, message", [
    (dict(passage_length=3), "passage_length 3: it counts"), (dict(query_length="12"), "query_length '12': it counts"),
    (dict(pooling="max"), "pooling 'max': it is cls or mean")])
def test_settings_that_no_student_has_are_refused(encoder, settings, message):
    student = student_of(encoder)
    with pytest.raises(ValueError, match=message):
        Student(student.encoder, student.tokenizer, 16, **settings)


def test_no_queries_and_no_passages_are_no_vectors(encoder):
    for student in (student_of(encoder), student_of(encoder, architecture="dpr"), student_of(encoder, query_expansion=False)):
        assert student.encode_queries([])[0].shape[::2] == (0, 16) and student.encode_passages([])[0].shape == (0, 16)


def drop_tensors(*suffixes, rename=lambda k: k):
    def damage(folder):
        from safetensors.torch import save_file
        state = load_file(folder / "model.safetensors")
        save_file({rename(k): v for k, v in state.items() if not k.endswith(suffixes)}, folder / "model.safetensors")
    return damage


def edit_json(name, **changes):
    return lambda folder: write_json(folder / name, json.loads((folder / name).read_text()) | changes)


def as_colbert(folder):
    for name in ("pairdistill.json", "modules.json"):
        (folder / name).unlink()


@pytest.mark.parametrize("damage, message", [
    ([drop_tensors("key.weight")], "lack 1 of the model's tensors, such as .*attention.self.key.weight: the file is incomplete"),
    ([drop_tensors("gone", rename=lambda k: k.replace("bert.", "model."))], "lack .* tensors, .*another prefix than 'bert'"),
    ([lambda f: os.truncate(f / "model.safetensors", 9000)], "cannot load the folder .*|cannot be read as weights .*incomplete"),
    ([lambda f: os.truncate(f / "1_Dense" / "model.safetensors", 500)], "1_Dense/model.safetensors cannot be read .*incomplete"),
    ([lambda f: [p.unlink() for p in f.glob("tokenizer*")]], "has no tokenizer|cannot load the folder"),
    ([lambda f: (f / "1_Dense" / "model.safetensors").unlink()], "1_Dense lacks model.safetensors"),
    ([edit_json("1_Dense/config.json", in_features=31)], "linear.weight of shape .16, 32., where its config.json says .16, 31."),
    ([edit_json("1_Dense/config.json", bias=True)], "1_Dense/config.json has a bias or the activation"),
    ([edit_json("1_Dense/config.json", activation_function="torch.nn.modules.activation.Tanh")], "the activation torch.*Tanh"),
    ([edit_json("1_Dense/config.json", use_residual=True)], "1_Dense/model.safetensors has no residual.weight"),
    ([edit_json("pairdistill.json", dim=8)], r"the projection in .* has shape \[16, 32\], and the settings there say \[8, hidden\]"),
    ([edit_json("pairdistill.json", colour="red")], "has the settings .*colour, which are not those of a student"),
    ([edit_json("pairdistill.json", markers=["[q]", "[d]"])], "no \\[q\\] and no \\[d\\] for ColBERT's markers"),
    ([lambda f: (f / "modules.json").unlink(), drop_tensors("linear.weight")],
     "the weights in .* have no linear.weight, and pairdistill.json speaks of a projection"),
    ([as_colbert, drop_tensors("linear.weight")], "have no linear.weight, and artifact.metadata speaks of a projection"),
    ([lambda f: (f / "modules.json").write_text("[{")], "modules.json is no JSON .*save it again"),
    ([lambda f: (f / "pairdistill.json").write_text("[]")], "pairdistill.json holds a list where a dict is expected"),
    ([lambda f: write_json(f / "modules.json", [{"path": "", "type": "a.Transformer"}, {"path": "1_LSTM", "type": "a.LSTM"}])],
     "modules.json lists a.Transformer, a.LSTM; a student is"),
    ([as_colbert, edit_json("artifact.metadata", dim=9)], r"shape \[16, 32\], and the settings there say \[9, hidden\]"),
    ([as_colbert, lambda f: checkpoints._write_tensors(f / "model.safetensors", {
        **load_file(f / "model.safetensors"), "linear.weight": torch.zeros(16, 31)})], "takes 31 dimensions and its encoder gives 32"),
    ([as_colbert, lambda f: checkpoints._write_tensors(f / "model.safetensors", {
        **load_file(f / "model.safetensors"), "linear.bias": torch.zeros(16)})], "has a linear.bias"),
    ([edit_json("pairdistill.json", markers=None)], "cannot load the folder"),
    ([lambda f: (f / "tokenizer.json").write_text("{}")], "cannot load the folder|has no tokenizer"),
    ([lambda f: (f / "modules.json").write_text('[{"type": "a.Transformer"}]')], "cannot load the folder"),
    ([lambda f: write_json(f / "modules.json", [{"path": "", "type": "a.Transformer"}, {"path": "../1_Dense", "type": "a.Dense"}])],
     "modules.json has a path that leaves the folder"),
    ([as_colbert, edit_json("artifact.metadata", similarity="l2")], "artifact.metadata says similarity 'l2'; a student's is 'cosine'"),
    ([lambda f: (f / "model.safetensors").unlink(), lambda f: (f / "pytorch_model.bin").write_bytes(b"")], "cannot load the folder"),
])
def test_a_wrong_or_incomplete_folder_is_refused_in_one_sentence(encoder, tmp_path, damage, message):
    student_of(encoder).save_pretrained(tmp_path)
    for step in damage:
        step(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        Student.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(refusal.value) or "markers" in message
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("changes, message", [
    ({"sentence_bert_config.json": {"query_expansion": {"strategy": "min", "length": 8}}}, "expands queries by .*up to a fixed length"),
    ({"config_sentence_transformers.json": {"prompts": {"query": "the cat: "}}}, "has 'the cat: ' written before texts"),
    ({"2_MultiVectorMask/config.json": {"skiplist_tasks": ["query", "document"]}}, "leaves out tokens by its MultiVectorMask"),
    (dict(), "gives a vector a token: load it with architecture='colbert'")])
def test_what_a_multi_vector_folder_does_and_a_student_does_not_is_refused(encoder, tmp_path, changes, message):
    multi_vector_folder(encoder, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Student.from_pretrained(str(tmp_path), "colbert" if changes else "dpr")


def test_pooling_that_a_student_does_not_do_is_refused(encoder, tmp_path):
    student_of(encoder, architecture="dpr").save_pretrained(tmp_path)
    edit_json("1_Pooling/config.json", pooling_mode_cls_token=False, pooling_mode_max_tokens=True)(tmp_path)
    with pytest.raises(ValueError, match="1_Pooling/config.json pools by max; a student does by cls or mean"):
        Student.from_pretrained(str(tmp_path))


def test_the_model_card_says_how_to_load_it_and_is_no_part_of_the_digest(encoder, tmp_path):
    import yaml
    student_of(encoder, query_expansion=False).save_pretrained(tmp_path)
    _, front, card = (tmp_path / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "PyLate" and {"ColBERT", "sentence-transformers"} <= set(front["tags"])
    assert "base_model" not in front and str(tmp_path) not in card and encoder not in card  # a folder's name is nobody else's
    for words in ("Student.from_pretrained(", "models.ColBERT(", "MultiVectorEncoder(", "Checkpoint(", "its scores differ there",
                  '"query_length": 12,'):
        assert words in card
    before = checkpoints.digest(tmp_path)
    (tmp_path / "README.md").write_text("another")
    assert checkpoints.digest(tmp_path) == before
    edit_json("1_Dense/config.json", out_features=8)(tmp_path)
    assert checkpoints.digest(tmp_path) != before


def test_a_new_projection_keeps_angles(encoder):
    weight = student_of(encoder).linear.weight
    assert torch.allclose(weight @ weight.T, torch.eye(16), atol=1e-5)


def test_chunks_change_memory_not_gradients(encoder):
    gradients = []
    for chunk in (64, 2):
        student = student_of(encoder)
        student.chunk = chunk
        student.encode_passages(TEXTS[:7])[0].square().mul(torch.arange(16)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-4, rtol=1e-4)


def test_the_automatic_chunk_follows_the_length_and_the_free_memory(encoder, monkeypatch):
    from pairdistill import automatic_chunk
    short, long = (automatic_chunk(student_of(encoder, passage_length=n)) for n in (20, 60))
    assert short > 2.5 * long > 0
    monkeypatch.setattr(Student, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    free = 10**9
    some = automatic_chunk(student_of(encoder))
    free = 2 * 10**9
    assert 1.9 < automatic_chunk(student_of(encoder)) / some < 2.1


def test_a_steps_operations_are_those_of_its_products_of_matrices(encoder):
    from pairdistill import Speed
    from torch.utils.flop_counter import FlopCounterMode
    student = student_of(encoder)
    passages = student.tokenize_passages(["the cat sat on the mat"] * 5)  # alike: no padding, which is not counted
    with FlopCounterMode(display=False) as counter:
        student.embed_passages(*passages)[0].sum().backward()
    speed = Speed(student, Ranks())
    for _, attended in passages[0]:
        speed.add(attended.sum(1).numpy())
    assert speed.operations == pytest.approx(counter.get_total_flops(), rel=.05)  # the first layer's input needs none
    speed.peak, speed.since = 10 * speed.operations, time.perf_counter() - 1  # as if they had taken a second
    assert speed.rates()["share_of_peak"] == pytest.approx(.1, abs=.005) and speed.rates()["tokens_per_second"] > 0


def test_cheap_attention_and_dropout_are_what_torch_computes():
    from pairdistill import _dropout, plainly
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    mask, upstream = torch.rand(2, 1, 1, 7) < 0.7, torch.randn(2, 3, 7, 4)
    for mask in (None, mask, torch.zeros(2, 1, 7, 7).masked_fill(~mask, -1e9)):
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        with plainly(torch.device("cpu")):
            ours = F.scaled_dot_product_attention(q, k, v, mask)
        assert torch.allclose(ours, expected, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (ours, expected))):
            assert torch.allclose(a, b, atol=1e-5)
    x = torch.ones(100_003, requires_grad=True)
    y = _dropout(x, 0.1)
    y.sum().backward()
    assert torch.equal(x.grad, y) and y.unique().tolist() == pytest.approx([0, 256 / 230]) and abs((y == 0).float().mean() - 0.1) < 0.01
    assert _dropout(x, 0.1, training=False) is x and _dropout(x, 0.0) is x


def test_what_dropout_dropped_is_not_kept_where_activations_are_recomputed():
    from pairdistill import _dropout
    x = torch.ones(1237, 3, requires_grad=True)
    y = checkpoint(_dropout, x, 0.5, use_reentrant=False)
    kept = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.bool and t.shape == x.shape]
    y.sum().backward()
    assert torch.equal(x.grad, y) and not kept


def test_a_sigterm_in_the_last_step_is_not_forgotten():
    before, came = signal.signal(signal.SIGTERM, lambda *_: came.append("by the handler of before")), []
    try:
        with AfterStep(Ranks()) as sigterm:
            os.kill(os.getpid(), signal.SIGTERM)
            while not sigterm.came:
                time.sleep(.01)
            assert not came
        assert came == ["by the handler of before"]
    finally:
        signal.signal(signal.SIGTERM, before)


def out_of_memory(monkeypatch, times: int, when=lambda student: True) -> list[int]:
    """Encoding runs out of memory so many times; the chunks at which it was tried."""
    embed, tried = Student.embed_passages, []

    def embed_passages(student, *tokens):
        tried.append(student.chunk)
        if len(tried) <= times and when(student):
            raise torch.OutOfMemoryError
        return embed(student, *tokens)
    monkeypatch.setattr(Student, "embed_passages", embed_passages)
    return tried


def test_out_of_memory_once_halves_the_chunk_and_repeats_the_step(encoder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # bfloat16 rounds by batch shape
    whole, terms = train_a_little(encoder, examples_of())
    tried = out_of_memory(monkeypatch, 1)
    smaller, again = train_a_little(encoder, examples_of())
    assert tried == [64] + 6 * [6]  # 4 queries of 3 passages are 12: half of 64 would change nothing
    assert np.allclose(again, terms, rtol=1e-4, atol=1e-5)
    for a, b in zip(whole.parameters(), smaller.parameters()):
        assert torch.allclose(a, b, atol=2e-3)
    assert "memory ran out: --passage-chunk is 6 from here on, and the step is repeated\n" in capsys.readouterr().out


def test_out_of_memory_twice_ends_the_run_in_a_sentence_that_names_the_flag(encoder, monkeypatch):
    out_of_memory(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"memory ran out with 6 passages at once: give a smaller --passage-chunk"):
        train_a_little(encoder, examples_of())


@pytest.mark.parametrize("n, wanted, delta", [(16, 12, 4), (64, 50, 10), (5, 100, None), (3, 7, 2), (1, 5, 10), (64, 0, 10)])
def test_pairs_are_near_ordered_distinct_and_as_many_as_there_are(n, wanted, delta):
    pairs = sample_pairs(n, wanted, delta, torch.Generator().manual_seed(1))
    available = sum(1 for i in range(n) for j in range(i + 1, n) if delta is None or j - i < delta)
    assert pairs.shape == (min(wanted, available), 2) and len(set(map(tuple, pairs.tolist()))) == len(pairs)
    assert all(0 <= i < j < n and (delta is None or j - i < delta) for i, j in pairs.tolist())


def test_pairs_follow_the_seed():
    draw = lambda seed: sample_pairs(64, 50, 10, torch.Generator().manual_seed(seed)).tolist()
    assert draw(1) == draw(1) != draw(2)


def test_pairs_can_be_those_that_the_pointwise_teacher_is_unsure_of():
    scores = torch.tensor([9., 5.1, 5., 4.9, 1., -60.])  # of the 15 pairs three are close, and the last passage's are none
    drawn = Counter(tuple(pair) for seed in range(200)
                    for pair in sample_pairs(6, 3, None, torch.Generator().manual_seed(seed), scores).tolist())
    assert sum(drawn[pair] for pair in ((1, 2), (1, 3), (2, 3))) > 400 and drawn[4, 5] < 2
    pairs = sample_pairs(6, 100, 3, torch.Generator().manual_seed(0), scores)
    assert pairs.tolist() == sample_pairs(6, 100, 3, torch.Generator()).tolist() and len(pairs) == 9


def test_every_epoch_holds_every_row_once():
    batches = Batches(10, 4, seed=0)
    rows = np.concatenate([batches[step] for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and (rows[:10] != rows[10:]).any()


def examples_of(n=6, K=3, P=2) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return dict(passages=draw.integers(0, 6, (n, K)), teacher=draw.normal(size=(n, K)).astype(np.float32),
                pairs=np.tile([[0, 1], [1, 2]], (n, 1, 1))[:, :P], pair_probs=draw.random((n, P), np.float32),
                positive=np.array([0, 1, -1, 2, -1, 0])[:n])


def train_a_little(encoder, examples, ranks=Ranks(), steps=6, **settings):
    student = student_of(encoder)
    terms = train(student, TEXTS[:6], TEXTS[:6], examples, **{**dict(
        steps=steps, batch=4, lr=1e-2, warmup=1, temperature=1.0, tau=1.0, lambda_kd=1.0, lambda_pair=3.0,
        pair_reduction="mean", seed=3, ranks=ranks, desc="test"), **settings})
    return student, terms


def test_training_lowers_the_loss_and_two_runs_give_the_same_bits(encoder):
    (a, terms), (b, again) = (train_a_little(encoder, examples_of(), steps=30) for _ in range(2))
    assert np.mean([t[0] for t in terms[-5:]]) < 0.75 * np.mean([t[0] for t in terms[:5]])
    assert terms == again and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_without_labels_there_is_no_contrastive_loss(encoder):
    examples = {**examples_of(), "positive": np.full(6, -1)}
    assert all(cl == 0 and kd > 0 for _, cl, kd, _ in train_a_little(encoder, examples)[1])


def test_a_group_of_queries_has_its_own_negatives(encoder):
    """As if each group were a batch, the losses still means over the whole one."""
    examples = examples_of()
    _, ((total, cl, kd, pair),) = train_a_little(encoder, examples, steps=1, batch=6, negatives=2)
    _, ((_, all_cl, all_kd, all_pair),) = train_a_little(encoder, examples, steps=1, batch=6)
    rows, student = Batches(6, 6, 3)[0], student_of(encoder)
    expected, labelled = 0, examples["positive"][rows] >= 0
    for group in rows.reshape(3, 2):
        q, q_mask = student.encode_queries([TEXTS[r] for r in group])
        d, offsets = student.encode_passages([TEXTS[p] for p in examples["passages"][group].reshape(-1)])
        inputs = [torch.from_numpy(examples[k][group]) for k in ("teacher", "pairs", "pair_probs", "positive")]
        expected += pairdistill_loss(maxsim(q, d, offsets, q_mask), *inputs).cl.item() * (examples["positive"][group] >= 0).sum()
    assert cl == pytest.approx(expected / labelled.sum(), rel=1e-2) and cl < 0.9 * all_cl  # bfloat16, where there is any
    assert (kd, pair) == pytest.approx((all_kd, all_pair), rel=1e-2) and total == pytest.approx(cl + kd + 3 * pair, rel=1e-5)


def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(encoder, tmp_path, monkeypatch):
    whole, terms = train_a_little(encoder, examples_of(), steps=8)
    save = pairdistill._save_checkpoint

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(pairdistill, "_save_checkpoint", save_and_stop)
    monkeypatch.setattr(pairdistill.fit, "__kwdefaults__", {**pairdistill.fit.__kwdefaults__, "checkpoint_every": 3})
    with pytest.raises(KeyboardInterrupt):
        train_a_little(encoder, examples_of(), steps=8, checkpoint_folder=tmp_path)
    monkeypatch.setattr(pairdistill, "_save_checkpoint", save)
    resumed, again = train_a_little(encoder, examples_of(), steps=8, checkpoint_folder=tmp_path)
    assert again == terms and all(torch.equal(x, y) for x, y in zip(whole.parameters(), resumed.parameters()))


def test_a_loss_that_is_not_finite_stops_training_before_it_reaches_a_checkpoint(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(pairdistill.fit, "__kwdefaults__", {**pairdistill.fit.__kwdefaults__, "checkpoint_every": 2})
    with pytest.raises(ValueError, match=r"the loss of step \d or its gradient is nan, whose queries begin with") as refusal:
        train_a_little(encoder, examples_of(), steps=8, lr=1e30, checkpoint_folder=tmp_path)  # overflows at once
    step = int(re.search(r"step (\d)", str(refusal.value))[1])
    saved = json.loads((tmp_path / f"batch{step}.json").read_text())
    assert step > 0 and [row["query"] for row in saved] == [TEXTS[r] for r in Batches(6, 4, 3)[step]]
    assert all(len(row["passages"]) == len(row["teacher"]) for row in saved)
    assert not (tmp_path / "last.safetensors").exists()  # its first one was due when the loss was no longer finite


@pytest.mark.parametrize("steps", [5, 8])  # at the end, and where a checkpoint is due
def test_a_gradient_that_is_not_finite_is_no_checkpoint_and_no_result(tmp_path, steps):
    model = torch.nn.Linear(1, 1)

    def terms(step):  # 0 * inf in the backward pass alone
        x = model.weight.sum()
        return torch.stack([x + ((x - x.detach()).sqrt() * 0 if step == 4 else 0)])
    with pytest.raises(ValueError, match="the loss of step 4 or its gradient is nan"):
        pairdistill.fit(model, terms, steps, lr=1e-2, warmup=0, ranks=Ranks(), desc="", seed=2**40, checkpoint_folder=tmp_path,
                        checkpoint_every=5)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_is_recomputed_is_sent_to_the_device_before(encoder, monkeypatch):
    """torch keeps the random state, from which dropout is repeated, of those devices that the arguments lie on."""
    student, seen = student_of(encoder).to("meta"), []
    student.chunk = 2
    monkeypatch.setattr(pairdistill, "checkpoint", lambda f, *piece, **_: seen.extend(piece) or torch.zeros(1, 1, 16, device="meta"))
    with contextlib.suppress(Exception):  # on the meta device no row can be taken
        student.encode_passages(TEXTS[:7])
    assert len(seen) >= 8 and all(x.device.type == "meta" for x in seen)


def test_the_last_two_checkpoints_are_kept_and_the_older_one_serves_where_the_newer_is_gone(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pairdistill.fit, "__kwdefaults__", {**pairdistill.fit.__kwdefaults__, "checkpoint_every": 2})
    whole, terms = train_a_little(encoder, examples_of(), steps=7, checkpoint_folder=tmp_path)
    kept = [len(load_file(tmp_path / f"{name}.safetensors")["history"]) for name in ("last", "previous")]
    assert kept == [6, 4] and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "last.safetensors").unlink()  # as when the process was killed between the two renames
    resumed, again = train_a_little(encoder, examples_of(), steps=7, checkpoint_folder=tmp_path)
    assert again == terms and all(torch.equal(x, y) for x, y in zip(whole.parameters(), resumed.parameters()))
    os.truncate(tmp_path / "last.safetensors", 100)  # as when the power failed
    capsys.readouterr()
    assert train_a_little(encoder, examples_of(), steps=7, checkpoint_folder=tmp_path)[1] == terms
    assert capsys.readouterr().out.count("going on from step 4") == 1


TWO_RANKS = """
import contextlib, os, sys, torch
sys.path.insert(0, {here!r})
import pairdistill, ranks
out_of_memory_on = {out_of_memory_on!r}
pairdistill.half = lambda device: contextlib.nullcontext()
from test_pairdistill import TEXTS, examples_of, train_a_little
me = ranks.init()
if me.rank == out_of_memory_on:  # in a backward pass: the other rank is done with its own
    embed = pairdistill.Student.embed_passages
    def embed_passages(student, *tokens):
        def run_out(_):
            raise torch.OutOfMemoryError
        d, offsets = embed(student, *tokens)
        if student.chunk == 64:
            hooks.append(student.linear.weight.register_hook(run_out))
        elif hooks:
            hooks.pop().remove()
        return d, offsets
    hooks, pairdistill.Student.embed_passages = [], embed_passages
student, terms = train_a_little({encoder!r}, examples_of(), me, steps={steps}, **{settings!r})
if me.first:
    torch.save(dict(terms=terms, gradients=[p.grad for p in student.parameters() if p.grad is not None]), {out!r})
me.close()
os._exit(0)  # as run.py does: a thread of gloo can abort an interpreter that is ending
"""


def on_two_ranks(tmp_path, encoder: str, steps: int, out_of_memory_on: int | None = None, **settings) -> dict:
    script, out = tmp_path / "two.py", tmp_path / "two.pt"
    script.write_text(TWO_RANKS.format(here=str(HERE), encoder=encoder, steps=steps, out=str(out),
                                       out_of_memory_on=out_of_memory_on, settings=settings))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
                   check=True, capture_output=True, timeout=300)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("settings", [{}, dict(batch=6, negatives=2)], ids=["", "a group on two ranks"])
def test_one_step_on_two_ranks_has_the_losses_and_the_gradient_of_one_rank(encoder, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(pairdistill, "half", lambda device: contextlib.nullcontext())  # bfloat16 rounds by batch shape
    one, terms = train_a_little(encoder, examples_of(), steps=1, **settings)
    two = on_two_ranks(tmp_path, encoder, 1, out_of_memory_on=1, **settings)  # and the step, repeated on both, is the same
    assert np.allclose(two["terms"], terms, atol=1e-5, rtol=1e-5)
    gradients = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    assert len(two["gradients"]) >= len(gradients) > 10
    shared = [p.grad if p.grad is not None else torch.zeros_like(p) for p in one.parameters()]
    for a, b in zip(shared, two["gradients"], strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_a_scratch_vocabulary_is_the_same_each_time_and_runs_from_frequent_to_rare():
    rng = np.random.default_rng(0)
    texts = ["the " + " ".join("".join(rng.choice(list("abcdefgh"), rng.integers(3, 9))) for _ in range(8)) for _ in range(200)]
    (first, texts_V), (second, _) = _wordpieces(texts, 400), _wordpieces(texts, 400)
    assert first.get_vocab() == second.get_vocab()  # the library's own trainer gives another one each time
    rows = [set(e.tokens) for e in first.encode_batch(texts, add_special_tokens=False)]
    counts = [sum(token in row for row in rows) for token in sorted(first.get_vocab(), key=first.get_vocab().get)[7:]]
    assert counts == sorted(counts, reverse=True) == texts_V[7:].tolist() and counts[0] == 200


def test_a_scratch_encoder_is_drawn_from_its_seed_alone(tmp_path):
    """Not from the random state that the run before it left behind: a resumed run must get the same one."""
    from safetensors.torch import load_file

    def drawn(seed, before):
        torch.manual_seed(before)
        scratch_encoder(tmp_path, TEXTS, vocabulary=200, hidden=32, layers=1, positions=64, teacher=True, seed=seed)
        return load_file(tmp_path / "model.safetensors")

    first, again, other = drawn(0, before=1), drawn(0, before=2), drawn(1, before=1)
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert not torch.equal(first["embeddings.token_type_embeddings.weight"], other["embeddings.token_type_embeddings.weight"])


def test_the_terms_of_a_step_do_not_keep_its_gradients_in_memory(monkeypatch):
    """They go into the history of all steps: as a view of the summed gradients they held these too."""
    model = torch.nn.Linear(100, 100)
    model(torch.ones(1, 100)).sum().backward()
    two = Ranks(0, 2)
    monkeypatch.setattr(Ranks, "sum_", lambda self, x: 2 * x)
    terms = sum_gradients(model, torch.tensor([1.0, 2.0]), two)
    assert terms.tolist() == [2.0, 4.0] and terms.untyped_storage().nbytes() == 8
    assert (model.bias.grad == 2).all()


# teachers.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_teachers(tmp_path_factory) -> tuple[str, str]:
    """Both roles, trained to prefer the passage that holds the query's word."""
    folder, words = tmp_path_factory.mktemp("teachers"), "cat dogs sings fish fox feather".split()
    encoder = folder / "encoder"
    scratch_encoder(encoder, TEXTS, vocabulary=200, hidden=32, layers=1, positions=64, teacher=True)
    groups = [(w, t, [x for x in TEXTS[:6] if x != t]) for w, t in zip(words, TEXTS[:6])]
    common = dict(steps=100, batch=6, lr=5e-3, query_length=8, passage_length=20)
    point = teachers.train_pointwise(encoder, groups, folder / "point", negatives=3, **common)
    pair = teachers.train_pairwise(encoder, groups, folder / "pair", **{**common, "steps": 150})
    assert np.mean([a for _, a in point[-10:]]) > 0.9 and np.mean([a for _, a in pair[-20:]]) > 0.8
    return str(folder / "point"), str(folder / "pair")


def test_a_trained_teacher_is_an_ordinary_checkpoint_that_loads_by_path(trained_teachers):
    from transformers import AutoModelForSequenceClassification
    assert AutoModelForSequenceClassification.from_pretrained(trained_teachers[0]).config.num_labels == 1
    teacher = teachers.load_pointwise(trained_teachers[0])
    scores = teacher.score([("cat", t) for t in TEXTS[:6]])
    assert scores.dtype == np.float32 and scores.argmax() == 0


def test_scores_do_not_depend_on_the_batch(trained_teachers):
    items = [(q, t) for q in ("cat", "the quick fox") for t in TEXTS[:6]]
    together = teachers.load_pointwise(trained_teachers[0], dtype=torch.float32)
    one_by_one = teachers.load_pointwise(trained_teachers[0], dtype=torch.float32)
    one_by_one.batch_tokens = 1
    assert np.allclose(together.score(items), one_by_one.score(items), atol=1e-5, rtol=1e-5)


def test_bfloat16_keeps_scores_in_float32(trained_teachers):
    """A logit of the last layer in bfloat16 has 8 bits."""
    items = [("cat", t) for t in TEXTS]
    scores = teachers.load_pointwise(trained_teachers[0], dtype=torch.bfloat16).score(items)
    exact = teachers.load_pointwise(trained_teachers[0], dtype=torch.float32).score(items)
    assert np.allclose(scores, exact, atol=0.1, rtol=0.05)
    assert (torch.from_numpy(scores).bfloat16().float().numpy() != scores).any()


def test_asking_both_orders_makes_a_swapped_pair_exactly_one_minus_p(trained_teachers):
    teacher = teachers.load_pairwise(trained_teachers[1])
    items = [("cat", a, b) for a in TEXTS[:6] for b in TEXTS[:6] if a != b]
    p, swapped = teacher.prefer(items), teacher.prefer([(q, b, a) for q, a, b in items])
    assert (swapped == 1 - p).all() and ((0 <= p) & (p <= 1)).all()
    one = teachers.load_pairwise(trained_teachers[1], orders="one")
    assert np.allclose(one.prefer(items), teacher.ask(items)[:, 0])


def test_match_types_mark_the_words_that_stand_on_both_sides(encoder):
    reader = teachers._new_classifier(encoder, "pointwise", torch.device("cpu"), 0, 8, 20)
    (ids, segments), = reader.sequences([("cat bird", "the cat sat", "a bird sings")])
    types = reader._match_types(torch.tensor([ids]), torch.tensor([segments]))[0].tolist()
    middle = MARKS + 1.5 * LEVELS  # each passage holds one of the two words: [CLS] stands near the middle of its scale
    assert abs(types[0] - middle) < LEVELS / 4
    words = reader.tokenizer.convert_ids_to_tokens(ids)
    of = {(w, s): t for w, s, t in zip(words, segments, types)}
    assert of["cat", 0] == 1 and of["bird", 0] == 2 and of["cat", 1] == 5 and of["bird", 2] == 9
    assert of["[SEP]", 0] == 0 and of["[SEP]", 1] == 4 and of["[SEP]", 2] == 8


class Stub(torch.nn.Module):
    """A reader without a network: the logit is a function of the words; what it computes is kept in `log`."""

    def __init__(self, log=None, pause: float = 0.0):
        super().__init__()
        self.model, self.log, self.pause = types.SimpleNamespace(device=torch.device("cpu"), dtype="none"), log, pause
        self.prompt, self.cut, self.cut_queries = "prompt", 0, 0

    def sequences(self, items):
        return [(" ".join(item).split(), item) for item in items]

    def forward(self, batch):
        time.sleep(self.pause)
        if self.log:
            with open(self.log, "a") as f:
                f.write("".join(" ".join(item) + "\n" for _, item in batch))
        return torch.tensor([float(len(words)) for words, _ in batch])


def test_a_score_is_asked_once(tmp_path):
    items = [("cat", t) for t in TEXTS[:6]]
    teacher = teachers.Teacher(Stub(tmp_path / "log"), "stub", teachers.Cache(tmp_path))
    teacher.batch_tokens = 1
    scores = teacher.logits(items + items[:2])  # a duplicate is no second question
    assert scores.tolist() == [1 + len(t.split()) for _, t in items + items[:2]]
    assert len((tmp_path / "log").read_text().splitlines()) == 6
    # Another rank finds what this one has asked since both began; another teacher finds nothing.
    cache = teachers.Cache(tmp_path)
    again = teachers.Teacher(Stub(tmp_path / "log"), "stub", cache)
    more = iter(items + [("dogs", TEXTS[0])])  # any iterable
    assert again.logits(more, 7).tolist() == [*scores[:6], 1 + len(TEXTS[0].split())] and (cache.found, cache.asked) == (6, 7)
    assert len((tmp_path / "log").read_text().splitlines()) == 7
    assert cache.get([teachers.key_of("another", item) for item in items]) == {}


def test_windows_of_any_number_of_items_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "WINDOW", 7)
    items = [("q", "word " * int(n)) for n in np.random.default_rng(0).integers(1, 9, 40)]
    log = tmp_path / "log"
    scores = teachers.Teacher(Stub(log), "stub", teachers.Cache(tmp_path)).logits(iter(items))
    assert scores.tolist() == [1 + len(t.split()) for _, t in items]
    assert len(log.read_text().splitlines()) == len({t for _, t in items})


def test_the_same_pair_the_other_way_round_is_no_new_question(tmp_path):
    teacher = teachers.Pairwise(Stub(tmp_path / "log"), "stub", teachers.Cache(tmp_path))
    first = teacher.ask([("cat", TEXTS[0], TEXTS[1])])
    assert teacher.ask([("cat", TEXTS[1], TEXTS[0])]).tolist() == [first[0, ::-1].tolist()]
    assert len((tmp_path / "log").read_text().splitlines()) == 2 and teacher.cache.found == 2


def test_killed_at_ten_moments_no_score_is_lost_and_none_asked_twice(tmp_path):
    items = [("query", f"passage {n}") for n in range(400)]

    def work():
        teacher = teachers.Teacher(Stub(tmp_path / "log", pause=0.004), "stub", teachers.Cache(tmp_path))
        teacher.batch_tokens = 12  # four items
        teacher.logits(items)

    fork, draw = multiprocessing.get_context("fork"), np.random.default_rng(0)
    for _ in range(10):
        process = fork.Process(target=work)
        process.start()
        time.sleep(draw.uniform(0.01, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = (tmp_path / "log").read_text().splitlines()
    assert 0 < len(done) < 400
    work()
    asked = (tmp_path / "log").read_text().splitlines()
    assert len(set(asked)) == 400 and len(asked) - 400 <= 10 * 4  # of each kill, at most the batch in flight
    cache = teachers.Cache(tmp_path)
    keys = [teachers.key_of("stub none prompt", item) for item in items]
    assert list(cache.get(keys)) and [cache.get([key])[key] for key in keys] == [3.0] * 400


def test_a_locked_cache_is_tried_again(tmp_path):
    """SQLite waits for other ranks by itself, but not where two of them switch to WAL at once (seen with two ranks)."""
    cache, refusals = teachers.Cache(tmp_path), [1, 2]
    real = cache.db

    class Locked:
        def execute(self, *statement):
            if refusals and refusals.pop():
                raise sqlite3.OperationalError("database is locked")
            return real.execute(*statement)

    cache.db = Locked()
    assert cache.get([b"x"]) == {} and not refusals


def test_many_ranks_open_one_cache_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")

    def work(rank: int, folder: Path):
        teachers.Cache(folder).add([bytes([rank]) * 16], [float(rank)])

    for trial in range(5):
        ranks = [fork.Process(target=work, args=(rank, tmp_path / str(trial))) for rank in range(8)]
        [process.start() for process in ranks]
        [process.join() for process in ranks]
        assert [process.exitcode for process in ranks] == [0] * 8
        assert len(teachers.Cache(tmp_path / str(trial)).get([bytes([rank]) * 16 for rank in range(8)])) == 8


def test_batches_of_similar_length_have_little_padding():
    draw = np.random.default_rng(0)
    items = [(f"q{k}", "word " * int(n)) for k, n in enumerate((71 * np.exp(0.42 * draw.standard_normal(8192))).clip(8, 180))]
    teacher = teachers.Teacher(Stub(), "stub")
    teacher.logits(items)
    assert teacher.padding < 0.05 * (teacher.tokens + teacher.padding)


def test_what_a_teacher_cannot_do_is_said_in_one_sentence(trained_teachers, tmp_path, encoder):
    from transformers import AutoConfig
    point, pair = trained_teachers
    for load, spec, message in (
            (teachers.load_pairwise, point, "is a pointwise classifier, not a pairwise one"),
            (teachers.load_pointwise, pair, "is a pairwise classifier, not a pointwise one"),
            (teachers.load_pointwise, encoder, "a BertModel has no head that scores text, so it is no pointwise teacher"),
            (teachers.load_pointwise, f"t5:{point}", "is a classifier, not a language model: give it without t5:"),
            (teachers.load_pointwise, "t5:", "the pointwise teacher has an empty name"),
            (teachers.load_pointwise, str(tmp_path / "nowhere"), "cannot load .*nowhere")):
        with pytest.raises(ValueError, match=message):
            load(spec)
    for name in "classifier.weight", "bert.pooler.dense.weight":  # either would be drawn at random
        drop_tensors(name)(Path(shutil.copytree(point, tmp_path / name)))
        with pytest.raises(ValueError, match=f"{name} lack 1 of the model's tensors, such as {name}"):
            teachers.load_pointwise(str(tmp_path / name))
    with pytest.raises(ValueError, match="cannot load .*nowhere"):
        teachers.train_pointwise(str(tmp_path / "nowhere"), [("cat", TEXTS[0], TEXTS[1:2])], tmp_path, negatives=1, steps=1, batch=1,
                                 lr=1e-3, query_length=8, passage_length=20)
    options = dict(negatives=1, steps=1, batch=1, lr=1e-3, query_length=8, passage_length=20)
    for groups in [], [("cat", TEXTS[0], [])]:
        with pytest.raises(ValueError, match="a pointwise teacher is trained on one query or more"):
            teachers.train_pointwise(encoder, groups, tmp_path / "none", **options)
    drop_tensors("encoder.layer.0.output.dense.weight")(Path(shutil.copytree(encoder, tmp_path / "holed")))
    with pytest.raises(ValueError, match="holed lack 1 of the model's tensors"):  # not trained with a layer drawn at random
        teachers.train_pointwise(tmp_path / "holed", [("cat", TEXTS[0], TEXTS[1:2])], tmp_path / "none", **options)
    two = shutil.copytree(point, tmp_path / "two")
    config = AutoConfig.from_pretrained(point, num_labels=2)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(two)
    with pytest.raises(ValueError, match="one output, this one has 2"):
        teachers.load_pointwise(str(two))
    broken = teachers.load_pointwise(point, cache=teachers.Cache(tmp_path))
    for value in torch.nan, torch.inf:
        broken.reader.model.classifier.weight.data.fill_(value)
        with pytest.raises(ValueError, match="returned NaN or an infinite score"):
            broken.score([("cat", TEXTS[0])])
    assert broken.cache.get([teachers.key_of(broken.asks, ("cat", TEXTS[0]))]) == {}
    (tmp_path / "bad.sqlite").write_text("no database " * 100)
    with pytest.raises(ValueError, match="score cache .*bad.sqlite.*remove it"):
        teachers.Cache(tmp_path, "bad")
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(ValueError, match="score cache .*folder.sqlite.*see that it can be read and written"):
        teachers.Cache(tmp_path, "folder")


def test_an_empty_passage_and_one_that_is_cut_are_said_once(trained_teachers):
    teacher = teachers.load_pointwise(trained_teachers[0])
    with pytest.warns(UserWarning) as said:
        teacher.score([("cat", ""), ("cat", "cat " * 50), ("cat " * 9, TEXTS[0])])
    assert [str(w.message) for w in said] == [
        "pointwise teacher: 1 of 3 questions have an empty text, and were scored as they are",
        "pointwise teacher: 1 passages in 3 questions were longer than it reads, and were cut at their end",
        "pointwise teacher: 1 queries in 3 questions were longer than it reads, and were cut at their end"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.score([("dogs", ""), ("dogs", "cat " * 50)])


def test_a_query_leaves_room_for_passages(trained_teachers):
    teacher = teachers.load_pairwise(trained_teachers[1])
    teacher.reader.model.config.query_length = 60  # of 64 positions
    reader = teachers.Classifier(teacher.reader.model, teacher.reader.tokenizer)
    (ids, segments), = reader.sequences([("cat " * 90, "dogs " * 90, "sings " * 90)])
    assert len(ids) <= 64 and segments.count(1) == segments.count(2) >= 14


@pytest.mark.filterwarnings("ignore:.*cut at their end")
def test_a_classifier_is_asked_as_transformers_asks_it(encoder, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    torch.manual_seed(0)
    model, t = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1).eval(), AutoTokenizer.from_pretrained(encoder)
    model.config.query_length, model.config.passage_length = 8, 20
    items = [(q, d) for q in ("cat", "the quick fox") for d in TEXTS[:6]]
    pairs = [(q, a, b) for (q, a), (_, b) in zip(items, items[1:])]
    for role, load in (("pointwise", teachers.load_pointwise), ("pairwise", teachers.load_pairwise)):
        model.config.teacher_role = role
        model.save_pretrained(tmp_path / role)
        t.save_pretrained(tmp_path / role)
        teacher = load(str(tmp_path / role), dtype=torch.float32)
        for item, score in zip(asked := items if role == "pointwise" else pairs, teacher.logits(asked)):
            inputs = t(*item[:2], return_tensors="pt")
            if role == "pairwise":  # [CLS] q [SEP] d_i [SEP] d_j [SEP]
                second = t(item[2], add_special_tokens=False, return_tensors="pt")["input_ids"]
                ids = torch.cat([inputs["input_ids"], second, inputs["input_ids"][:, -1:]], 1)
                inputs = dict(input_ids=ids, token_type_ids=F.pad(inputs["token_type_ids"], (0, second.shape[1] + 1)))
            with torch.inference_mode():
                assert abs(score - float(model(**inputs).logits)) < 1e-5


def sentencepiece_files(folder):
    import sentencepiece
    (folder / "text").write_text("\n".join(
        TEXTS * 5 + ["Query Document Document0 Document1 Relevant true false Yes No A B : 0 1 ? ' ( ) . , Is Which Answer"] * 9))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=120, hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, user_defined_symbols=[f"▁{w}" for w in ("true", "false", "Yes", "No", "A", "B")])


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A tiny T5 with random weights and a sentencepiece vocabulary, as a folder that is asked as duoT5."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer
    folder = tmp_path_factory.mktemp("t5")
    sentencepiece_files(folder)
    tokenizer = T5Tokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=64, num_layers=1, num_heads=2,
                                                d_kv=16, decoder_start_token_id=0)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model, tokenizer


@pytest.mark.parametrize("batch_tokens", [1, 8192], ids=["one by one", "batched"])
@pytest.mark.parametrize("family, role, prompt, answers", [
    ("t5", "pointwise", "Query: {} Document: {} Relevant:", ("true", "false")),
    ("t5", "pairwise", "Query: {} Document0: {} Document1: {} Relevant:", ("true", "false")),
    ("instruct", "pointwise", "Is the document relevant to the query (Yes or No)?\nQuery: {}\nDocument: {}", ("Yes", "No")),
    ("instruct", "pairwise", "Which document is more relevant to the query? Answer only 'A' or 'B'.\nQuery: {}\n"
                             "Document A: {}\nDocument B: {}", ("A", "B")),
])
def test_a_t5_is_asked_as_transformers_asks_it(t5, family, role, prompt, answers, batch_tokens):
    folder, model, tokenizer = t5
    teacher = dict(pointwise=teachers.load_pointwise, pairwise=teachers.load_pairwise)[role](f"{family}:{folder}", dtype=torch.float32)
    teacher.batch_tokens = batch_tokens
    items = [("cat", *TEXTS[:2]), ("birds sing", TEXTS[2], TEXTS[5]), ("the quick fox", TEXTS[3], TEXTS[0])]
    items = items if role == "pairwise" else [item[:2] for item in items]
    first, second = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in answers)
    for score, item in zip(teacher.logits(items), items):
        ids = tokenizer(prompt.format(*item), return_tensors="pt")
        with torch.inference_mode():
            logits = model(**ids, decoder_input_ids=torch.tensor([[0]])).logits[0, -1]
        assert abs(score - float(logits[first] - logits[second])) < 1e-5


def test_a_teacher_whose_scores_are_all_cached_computes_none(t5, tmp_path):
    items = [("cat", *TEXTS[:2]), ("birds sing", TEXTS[2], TEXTS[5])]
    scores = []
    for _ in range(2):
        teacher = teachers.load_pairwise("t5:" + t5[0], cache=teachers.Cache(tmp_path), dtype=torch.float32)
        scores.append(teacher.prefer(items))
    assert (scores[0] == scores[1]).all() and (teacher.asked, teacher.read) == (4, 0)


@pytest.mark.filterwarnings("ignore:.*cut at their end")
def test_a_prompt_is_no_longer_than_the_models_positions(tmp_path, encoder):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.add_tokens(["yes", "no"])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=200, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = teachers.load_pointwise(f"instruct:{tmp_path}", dtype=torch.float32)
    assert np.isfinite(teacher.score([("cat", "the cat sat " * 200)])).all() and teacher.reader.cut == 1


def test_a_long_prompt_keeps_its_end_and_both_passages_are_cut_alike(t5):
    folder, _, tokenizer = t5
    teacher = teachers.load_pairwise("t5:" + folder, dtype=torch.float32)
    teacher.reader.max_length = 60
    (ids, _), = teacher.reader.sequences([("cat", TEXTS[4] * 9, TEXTS[5] * 9)])
    end = tokenizer("Relevant:", add_special_tokens=True)["input_ids"]
    text = tokenizer.decode(ids)
    first, second = (tokenizer(x.split(":", 1)[1])["input_ids"] for x in text.replace("Relevant", "Document").split("Document")[1:3])
    assert 50 < len(ids) <= 60 and ids[-len(end):] == end and abs(len(first) - len(second)) <= 2
    (ids, _), = teacher.reader.sequences([("cat " * 200, TEXTS[4] * 9, "fox")])  # so is a query that leaves no room
    assert 50 < len(ids) <= 60 and ids[-len(end):] == end and (teacher.reader.cut, teacher.reader.cut_queries) == (3, 1)


def test_a_reranker_is_known_by_its_name_in_the_hubs_cache_too_and_not_by_folders_above_it(t5, tmp_path, trained_teachers):
    folder, _, _ = t5
    cached = shutil.copytree(folder, tmp_path / "models--castorini--duot5-3b-msmarco" / "snapshots" / "b99e")
    assert teachers.load_pairwise(str(cached)).reader.template == teachers.TEMPLATES["pairwise", "t5"][0]
    with pytest.raises(ValueError, match="is a pairwise reranker, not a pointwise one"):
        teachers.load_pointwise(str(cached))
    teachers.load_pointwise(shutil.copytree(trained_teachers[0], tmp_path / "duot5-study" / "duot5"))  # a classifier
    plain = shutil.copytree(folder, tmp_path / "duot5-study" / "plain")
    with pytest.warns(UserWarning, match="plain is asked by the instructions of appendix C.1; t5:.*plain asks it as monoT5"):
        assert teachers.load_pairwise(str(plain)).reader.template == teachers.TEMPLATES["pairwise", "instruct"][0]


def test_the_key_of_a_local_teacher_is_its_weights_however_it_is_named(t5):
    folder, model, _ = t5
    assert teachers._identity(f"t5:{folder}", model) == teachers._identity(folder, model) == checkpoints.digest(folder)


def test_an_answer_of_more_than_one_token_is_refused(t5):
    folder, _, tokenizer = t5
    with pytest.raises(ValueError, match="the answer 'true and false' is .* tokens, not one"):
        teachers.TEMPLATES["pointwise", "long"] = ("{q} {d0}", "true and false", "No")
        try:
            teachers.Prompted(None, tokenizer, "pointwise", "long")
        finally:
            del teachers.TEMPLATES["pointwise", "long"]


@pytest.mark.parametrize("role", ["pointwise", "pairwise"])
def test_a_chat_model_is_asked_by_its_template(tmp_path, encoder, role):
    """Decoder-only: padded on the left, the answer is read at the last position of the generation prompt."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.add_tokens(["yes", "no", "a", "b"])
    tokenizer.chat_template = ("{% for m in messages %}[CLS] {{ m.content }} [SEP]{% endfor %}{% if add_generation_prompt %} the{% endif %}"
                               "{% if enable_thinking is not defined or enable_thinking %} cat{% endif %}")  # thinks, as Qwen3's
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = dict(pointwise=teachers.load_pointwise, pairwise=teachers.load_pairwise)[role](str(tmp_path), dtype=torch.float32)
    items = [("cat", TEXTS[0], TEXTS[1]), ("birds sing", TEXTS[2] * 3, TEXTS[5])]
    template, *answers = teachers.TEMPLATES[role, "instruct"]
    first, second = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in answers)
    items = items if role == "pairwise" else [item[:2] for item in items]
    for score, (q, *passages) in zip(teacher.logits(items), items):
        content = template.format(q=q, **{f"d{n}": p for n, p in enumerate(passages)})
        text = f"[CLS] {content} [SEP] the"
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)).logits[0, -1]
        assert abs(score - float(logits[first] - logits[second])) < 1e-5


def test_bench_prints_rates_and_the_cost_of_the_papers_run(trained_teachers):
    done = subprocess.run([sys.executable, "teachers.py", trained_teachers[0], "--bench", "--seconds", "0.2", "--device", "cpu"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"items/s, [\d,]+ tokens/s, padding [0-4]\.\d%\n.*80 million items: [\d,]+ hours", done.stdout)
    done = subprocess.run([sys.executable, "teachers.py", "nowhere/nothing", "--bench"], capture_output=True, text=True)
    assert done.returncode == 2 and "error: cannot load" in done.stderr and "Traceback" not in done.stderr


# retrieve.py ---------------------------------------------------------------------------------------------------------


class WordVectors:
    """A student without a network: a word has a fixed vector, a little shifted by its neighbour, so that the same word
    is many similar tokens, as it is with an encoder. `ignored` words have no token; dpr has their mean instead."""

    device = torch.device("cpu")

    def __init__(self, dim: int = 32, words: int = 400, dpr: bool = False, fail_after: int = 10**9):
        generator = torch.Generator().manual_seed(0)
        self.vectors = torch.randn(words, dim, generator=generator)
        self.dim, self.dpr, self.fail_after = dim, dpr, fail_after

    def vectors_of(self, text: str) -> torch.Tensor:
        words = [int(word) for word in text.split() if word != "ignored"]
        tokens = self.vectors[words] + .5 * self.vectors[words[1:] + words[:1]]
        return tokens.mean(0, keepdim=True) * 3 if self.dpr else F.normalize(tokens, dim=1)

    def encode_passages(self, texts):
        self.fail_after -= len(texts)
        if self.fail_after < 0:
            raise KeyboardInterrupt
        tokens = [self.vectors_of(text) for text in texts]
        lengths = torch.tensor([0] + [len(t) for t in tokens])
        return torch.cat([torch.zeros(0, self.dim), *tokens]), lengths.cumsum(0).int()

    def encode_queries(self, texts):
        tokens = [self.vectors_of(text) for text in texts]
        q = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=7.0)  # masked: must not count
        return q, torch.arange(q.shape[1]) < torch.tensor([len(t) for t in tokens])[:, None]


def random_texts(n: int, longest: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, rng.integers(0, 400, rng.integers(1, longest + 1)))) for _ in range(n)]


@pytest.fixture(scope="module")
def corpus():
    return random_texts(2999, 24, seed=1)


@pytest.fixture(scope="module")
def index(corpus, tmp_path_factory):
    return Index.build(WordVectors(), corpus, tmp_path_factory.mktemp("index") / "index", student_digest="abc",
                       passage_ids=[f"p{n}" for n in range(len(corpus))])


@pytest.fixture(scope="module")
def queries():
    return WordVectors().encode_queries(random_texts(97, 8, seed=2))


def overlap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(np.mean([len(set(f) & set(e)) / len(e) for f, e in zip(found.tolist(), expected.tolist())]))


def truth(student, texts, q, q_mask, k):
    return maxsim(q, *student.encode_passages(texts), q_mask).topk(k)


def test_search_finds_the_passages_of_exact_search(index, corpus, queries, monkeypatch):
    _, exact_positions = index.search(queries[0], 20, queries[1], exact=True)
    monkeypatch.setattr(retrieve, "SMALL", 0)
    monkeypatch.setattr(index, "_search_all", None)  # by the lists alone
    scores, positions = index.search(queries[0], 20, queries[1])
    assert scores.dtype == torch.float32 and positions.dtype == torch.int64 and positions.shape == (97, 20)
    assert overlap(positions, exact_positions) > .97
    assert (scores.diff(dim=1) <= 0).all()
    best = truth(WordVectors(), corpus, *queries, 1).indices
    assert (positions == best).any(1).float().mean() > .98  # the codes, a quarter of a float16 each, lose few


def test_scores_are_maxsim_of_the_decoded_tokens(index, queries):
    q, q_mask = queries
    d = index._decode(torch.arange(len(index.codes)))
    expected = maxsim(q, d, index.offsets.int(), q_mask)
    for exact in (False, True):
        scores, positions = index.search(q, 20, q_mask, exact=exact)
        torch.testing.assert_close(scores, expected.gather(1, positions), atol=1e-4, rtol=1e-5)


def test_codes_decode_to_nearly_the_passages_own_tokens_in_corpus_order(index, corpus):
    d, offsets = WordVectors().encode_passages(corpus)
    decoded = index._decode(torch.arange(len(d)))
    assert torch.equal(index.offsets, offsets.long())
    torch.testing.assert_close(decoded.norm(dim=1), torch.ones(len(d)))
    assert (decoded * d).sum(1).mean() > .95
    assert index.codes.shape == (len(d), 8 + retrieve.REFINEMENTS) and index.lists.element_size() + index.order.element_size() == 6
    assert index.passage_ids[2998] == "p2998"


def test_any_batch_of_queries_gives_each_query_its_own_result(index, queries, monkeypatch):
    q, q_mask = queries
    scores, _ = index.search(q, 20, q_mask)
    monkeypatch.setattr(retrieve, "QUERIES", 41)
    monkeypatch.setattr(retrieve, "QUERIES_LISTED", 13)
    monkeypatch.setattr(retrieve, "QUERIES_RANKED", 5)
    other_scores, _ = index.search(q, 20, q_mask)
    torch.testing.assert_close(scores, other_scores)
    for b in range(9):
        n = int(q_mask[b].sum())
        torch.testing.assert_close(index.search(q[b:b + 1, :n], 20)[0], scores[b:b + 1])


def test_lists_without_a_token_are_searched_too(index, queries, monkeypatch):
    (q, q_mask), emptied = queries, copy.copy(index)
    emptied.list_starts = index.list_starts.clone()
    emptied.list_starts[1::2] = emptied.list_starts[:-1:2]  # every second list; the next one has its tokens
    monkeypatch.setattr(retrieve, "SMALL", 0)
    expected, _ = emptied.search(q, 20, q_mask)
    monkeypatch.setattr(retrieve, "DECODED", 1)  # as where lists are long: each is decoded by itself
    torch.testing.assert_close(emptied.search(q, 20, q_mask)[0], expected)


def test_one_query_finds_without_decoding_what_many_find_with_it(index, queries):
    q, q_mask = queries
    for b in range(9):
        n = int(q_mask[b].sum())
        alone = index._candidates(q[b:b + 1, :n], q_mask[b:b + 1, :n], 20, 80)[0]
        shared = index._candidates(q[[b, b], :n], q_mask[[b, b], :n], 20, 80)[0]
        assert np.isin(alone[:20], shared).mean() > .9


def test_a_token_s_list_is_nearly_always_the_nearest_though_few_are_compared():
    rng = torch.Generator().manual_seed(0)
    centroids = F.normalize(torch.randn(2000, 32, generator=rng), dim=1)
    d = F.normalize(centroids[torch.randint(2000, (3000,), generator=rng)] + .1 * torch.randn(3000, 32, generator=rng), dim=1)
    nearest = torch.cdist(d, centroids)
    chosen = nearest.gather(1, retrieve._Nearest(centroids)(d)[:, None])[:, 0]
    assert (chosen == nearest.amin(1)).float().mean() > .9 and (chosen / nearest.amin(1)).mean() < 1.05


def test_both_ways_to_score_candidates_agree(index, queries):
    q, q_mask = queries
    candidates = index._candidates(q, q_mask, 20, 80)
    candidates[3, 5:] = candidates[4, 0] = -1
    own = candidates >= 0
    shared, paired = index._score_shared(q, q_mask, candidates), index._score_paired(q, q_mask, candidates)
    torch.testing.assert_close(shared[own], paired[own], atol=1e-4, rtol=1e-5)


def test_a_query_without_enough_near_passages_is_compared_with_all(tmp_path):
    # Words 0 to 199 in all passages but seven: what looks for the others finds few lists, and still gets k passages.
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 200, 5))) for _ in range(1493)] + ["399 398 397"] * 7
    index = Index.build(WordVectors(), texts, tmp_path / "index")
    q, q_mask = WordVectors().encode_queries(["399", "5 6 7 8"])
    scores, positions = index.search(q, 40, q_mask)
    exact_scores, _ = index.search(q, 40, q_mask, exact=True)
    assert (positions >= 0).all() and set(positions[0, :7].tolist()) == set(range(1493, 1500))
    torch.testing.assert_close(scores[0], exact_scores[0])


def pack(key, gain):
    return (key << retrieve.GAIN_BITS) + retrieve._gain_bits(gain)


def test_partial_maxsim_takes_each_query_tokens_largest_similarity_and_adds_them(index):
    N, Q = len(index), 2
    key = torch.tensor([(b * N + passage) * Q + i for b, passage, i in
                        [(0, 9, 0), (0, 9, 0), (0, 9, 1), (0, 4, 1), (1, 4, 0), (1, 5, 1), (1, 6, 1)]])
    gain = torch.tensor([.25, .5, .25, 1.0, .125, .5, .25])
    candidates = index._rank(pack(key, gain).sort().values, 3, Q, 4)
    assert candidates.tolist() == [[4, 9, -1, -1], [5, 6, 4, -1], [-1] * 4]  # .5 + .25, not .25 + .5 + .25


def test_packed_similarities_keep_key_order_and_five_digits():
    gain = torch.rand(1000)
    key = torch.randint(0, 1 << 38, (1000,))
    unpacked_key, unpacked_gain = retrieve._unpack(pack(key, gain))
    assert torch.equal(unpacked_key, key)
    torch.testing.assert_close(unpacked_gain, gain, rtol=2e-5, atol=0)
    one_key = pack(torch.zeros_like(key), gain)
    assert (unpacked_gain[one_key.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_builds_the_same_files(index, corpus, tmp_path, world):
    barrier = threading.Barrier(world)
    ranks = [threading.Thread(target=Index.build, args=(WordVectors(), corpus, tmp_path / "index"),
                              kwargs=dict(rank=r, world=world, barrier=barrier.wait, student_digest="abc",
                                          passage_ids=index.passage_ids)) for r in range(world)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    names = sorted(path.name for path in index.folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == names
    assert all((tmp_path / "index" / name).read_bytes() == (index.folder / name).read_bytes() for name in names)


def test_a_new_index_says_how_much_of_exact_search_it_finds_and_how_fast(corpus, tmp_path):
    texts = random_texts(200, 8, seed=2)
    index = Index.build(WordVectors(), corpus, tmp_path / "index", queries=texts)
    q, q_mask = WordVectors().encode_queries(texts[:retrieve.MEASURED])
    recall = overlap(index.search(q, 100, q_mask)[1], truth(WordVectors(), corpus, q, q_mask, 100).indices)
    m = index.manifest["measured"]
    assert m["k"] == 100 and m["queries"] == 32 and abs(m["recall"] - recall) < 0.002 and 0.8 < recall < 1
    assert f"bytes a token, R@100 of exact search {m['recall']:.3f}, " in index.measured
    assert not list((tmp_path / "index").glob("best*"))


def test_a_single_vector_student_keeps_its_vectors_and_is_searched_by_dot_product(corpus, tmp_path, monkeypatch):
    student = WordVectors(dpr=True)
    index = Index.build(student, corpus, tmp_path / "index")
    monkeypatch.setattr(retrieve, "SMALL", 0)  # by lists, as a large corpus
    q, q_mask = student.encode_queries(random_texts(97, 8, seed=2))
    assert len(index.codes) == len(corpus) and q.shape[1] == 1
    scores, positions = index.search(q, 20, q_mask)
    exact_scores, exact_positions = index.search(q, 20, q_mask, exact=True)
    assert overlap(positions, exact_positions) > .95
    d, _ = student.encode_passages(corpus)
    assert torch.equal(index._decode(torch.arange(len(d))), d.half().float()) and d.norm(dim=1).std() > .1
    expected = q[:, 0] @ d.half().float().T
    torch.testing.assert_close(exact_scores, expected.topk(20).values)
    torch.testing.assert_close(scores, expected.gather(1, positions))


@pytest.mark.parametrize("n_passages", [1, 2, 5, 31])
def test_more_passages_asked_for_than_there_are(n_passages, tmp_path, queries):
    texts = random_texts(n_passages, 4, seed=3)
    index = Index.build(WordVectors(), texts, tmp_path / "index")
    scores, positions = index.search(queries[0], 40, queries[1])
    assert (positions[:, n_passages:] == -1).all() and (scores[:, n_passages:] == -torch.inf).all()
    assert (positions[:, :n_passages].sort(1).values == torch.arange(n_passages)).all()
    # Where each token may have a codeword of its own, nothing is lost but float16's digits.
    expected = truth(WordVectors(), texts, *queries, n_passages).values
    torch.testing.assert_close(scores[:, :n_passages], expected, atol=.01, rtol=0)


def test_a_passage_without_tokens_scores_zero_and_no_passages_are_an_error(tmp_path, queries):
    texts = ["1 2 3", "ignored", "4 5", "ignored ignored"]
    index = Index.build(WordVectors(), texts, tmp_path / "index")
    scores, positions = index.search(queries[0], 4, queries[1])
    assert (scores[(positions == 1) | (positions == 3)] == 0).all() and len(index) == 4
    with pytest.raises(ValueError, match="there are no passages"):
        Index.build(WordVectors(), [], tmp_path / "none")
    with pytest.raises(ValueError, match="0 tokens"):
        Index.build(WordVectors(), ["ignored"], tmp_path / "none")
    with pytest.raises(ValueError, match="expected \\[B, Q, 32\\]"):
        index.search(torch.zeros(1, 2, 31), 3)


def test_queries_without_tokens_and_no_queries_at_all_get_results_of_the_right_shape(index):
    scores, positions = index.search(torch.ones(2, 3, 32), 5, torch.zeros(2, 3, dtype=torch.bool))
    assert (scores == 0).all() and (positions >= 0).all()
    assert index.search(torch.zeros(0, 3, 32), 5)[1].shape == (0, 5)


def test_a_build_that_dies_leaves_nothing_that_opens_and_the_next_one_succeeds(tmp_path):
    texts = random_texts(2500, 4, seed=4)
    for fail_after in (0, 1500, 2200):  # while sampling, and in the first and the second block
        with pytest.raises(KeyboardInterrupt):
            Index.build(WordVectors(fail_after=fail_after), texts, tmp_path / "index")
        for folder in (tmp_path / "index", tmp_path / "index.tmp"):
            with pytest.raises(ValueError, match="is not an index"):
                Index.load(folder)
    assert len(Index.build(WordVectors(), texts, tmp_path / "index")) == 2500
    assert not (tmp_path / "index.tmp").exists()


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "codes").write_bytes((f / "codes").read_bytes()[:-1]), "damaged index: codes has"),
    (lambda f: (f / "lists").unlink(), "damaged index: lists has 0 bytes, expected"),
    (lambda f: (f / "vectors").write_bytes(b"00"), "damaged index: vectors has 2 bytes, expected 0"),
    (lambda f: (f / "manifest.json").write_text("{"), "not an index"),
    (lambda f: (f / "manifest.json").unlink(), "not an index"),
    (lambda f: edit_manifest(f, format=1), f"format 1, expected {retrieve.FORMAT}"),
    (lambda f: edit_manifest(f, shapes={}), "damaged index: its manifest"),
    (lambda f: edit_manifest(f, student="xyz"), "index of student xyz, expected abc"),
])
def test_damaged_and_foreign_folders_are_refused_in_one_sentence(index, tmp_path, damage, message):
    folder = tmp_path / "index"
    shutil.copytree(index.folder, folder)
    assert len(Index.load(folder, student_digest="abc")) == len(index)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        Index.load(folder, student_digest="abc")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_build_leaves_alone_what_is_no_index(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_text("weights")
    with pytest.raises(ValueError, match="student: something else is there, which would be lost"):
        Index.build(WordVectors(), ["0"], tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").exists()
    (tmp_path / "student" / "manifest.json").write_text('{"name": "my web app"}')
    with pytest.raises(ValueError, match="student: something else is there, which would be lost"):
        Index.build(WordVectors(), ["0"], tmp_path / "student")
    with pytest.raises(ValueError, match="2 passages and 1 passage_ids"):
        Index.build(WordVectors(), ["0", "1"], tmp_path / "index", passage_ids=["a"])
    broken = WordVectors()
    broken.vectors[1] = torch.nan
    with pytest.raises(ValueError, match="embeddings are not finite"):
        Index.build(broken, ["0", "1"], tmp_path / "index")


def test_an_index_that_is_being_replaced_is_known_as_one_until_it_is_gone(tmp_path, monkeypatch):
    Index.build(WordVectors(), ["0 1", "1 2"], tmp_path / "index")
    unlink, left = Path.unlink, iter(range(4))

    def killed(path, **options):
        if path.parent.name == "index" and next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        Index.build(WordVectors(), ["0 1", "1 2"], tmp_path / "index")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="damaged index"):
        Index.load(tmp_path / "index")
    assert len(Index.build(WordVectors(), ["0 1", "1 2"], tmp_path / "index")) == 2


# The command line: a real student, however small, and a collection in a folder


@pytest.fixture(scope="module")
def searchable(tmp_path_factory):
    from pairdistill import Student, scratch_encoder
    root = tmp_path_factory.mktemp("searchable")
    texts = {"join": "os.path.join joins two or more path components", "sort": "sorted returns a new sorted list",
             "open": "open returns a file object", "sum": "sum adds the items of an iterable"}
    scratch_encoder(root / "encoder", list(texts.values()), vocabulary=200, hidden=32, layers=1)
    student = Student.from_pretrained(str(root / "encoder"), dim=16, query_expansion=False)
    student.save_pretrained(root / "student")
    (root / "data" / "qrels").mkdir(parents=True)
    lines = [json.dumps(dict(_id=name, text=text)) + "\n" for name, text in texts.items()]
    (root / "data" / "corpus.jsonl").write_text("".join(lines))
    (root / "data" / "queries.jsonl").write_text('{"_id": "q1", "text": "joins two path components"}\n'
                                                 '{"_id": "q2", "text": "adds the items"}\n')
    (root / "data" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tjoin\t1\nq2\tsum\t1\n")
    return root


def command(root, *words):
    return retrieve.main(["--student", str(root / "student"), "--data", str(root / "data"),
                          "--index", str(root / "index"), *words])


def test_the_command_line_answers_a_question_with_names_scores_and_text(searchable, capsys):
    for _ in range(2):  # the second time the index is there already
        assert command(searchable, "joins two path components", "-k", "2") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[0] == "1" and lines[0].split()[2] == "join" and "joins two or more path" in lines[1]
        assert sum(line.split()[0] in ("1", "2") for line in lines) == 2


def test_a_question_beyond_the_limit_is_cut_and_a_passage_of_punctuation_has_its_markers_to_be_found_by(searchable, tmp_path):
    from pairdistill import Student
    student = Student.from_pretrained(str(searchable / "student"))
    index = Index.build(student, ["sum adds the items", "?! ...", "open returns a file object"], tmp_path / "index")
    assert index.offsets.diff()[1] == 3  # [CLS], [D], [SEP]
    with torch.no_grad():
        (long, long_mask), (cut, cut_mask) = (student.encode_queries(["adds the items " * n]) for n in (200, 20))
    assert long.shape == cut.shape == (1, student.query_length, 16)
    (scores, positions), (same, _) = index.search(long, 7, long_mask), index.search(cut, 7, cut_mask)
    assert torch.equal(scores, same) and positions[0, 0] == 0 and sorted(positions[0, :3].tolist()) == [0, 1, 2]
    assert scores[0, :3].isfinite().all() and (positions[0, 3:] == -1).all()


def test_the_command_line_takes_a_runs_newest_student(searchable, tmp_path, capsys, monkeypatch):
    command(searchable, "anything")
    for number in (2, 10):
        for part in ("student", "index"):
            shutil.copytree(searchable / part, tmp_path / f"iter{number}" / part)
    (tmp_path / "iter11" / "student").mkdir(parents=True)  # not finished
    shutil.copytree(tmp_path / "iter2", tmp_path / "iter2-old")
    (tmp_path / "config.json").write_text(json.dumps(dict(data=str(searchable / "data"))))
    shutil.rmtree(tmp_path / "iter2" / "student")
    capsys.readouterr()
    answers = iter(["adds the items", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert retrieve.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.split()[:3:2] == ["1", "sum"]


def test_the_command_line_writes_a_run_file_for_trec_eval(searchable, tmp_path):
    queries = str(searchable / "data" / "queries.jsonl")
    assert command(searchable, "--queries", queries, "--run", str(tmp_path / "out.trec")) == 0
    rows = [line.split() for line in (tmp_path / "out.trec").read_text().splitlines()]
    assert len(rows) == 8 and all(len(row) == 6 and row[1] == "Q0" for row in rows)
    assert [(row[0], row[2]) for row in rows if row[3] == "1"] == [("q1", "join"), ("q2", "sum")]
    assert [float(row[4]) for row in rows[:4]] == sorted((float(row[4]) for row in rows[:4]), reverse=True)


def test_mistakes_on_the_command_line_are_one_sentence_and_exit_code_2(searchable, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"_id": "q1", "text": "a"}\n{"_id": "q2"}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"data": "docs"}')
    other = shutil.copytree(searchable / "data", tmp_path / "data")
    (other / "corpus.jsonl").write_text('{"_id": "join", "text": "another corpus"}\n')
    (other / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tjoin\t1\n")
    (tmp_path / "spaced.jsonl").write_text('{"_id": "q 1", "text": "a"}\n')
    edited = shutil.copytree(searchable / "data", tmp_path / "edited")  # the same ids, another text
    (edited / "corpus.jsonl").write_text((edited / "corpus.jsonl").read_text().replace("file object", "file"))
    command(searchable, "anything")
    student, index = str(searchable / "student"), str(searchable / "index")
    for words, message in [
        ([str(tmp_path / "none"), "what"], "not a run's folder"),
        ([str(tmp_path / "run"), "what"], "no finished iteration"),
        (["--student", str(tmp_path / "none"), "--data", str(other), "--index", index, "what"], "cannot load"),
        (["--student", student, "--data", str(tmp_path / "none"), "--index", index, "what"], str(tmp_path / "none")),
        (["--student", student, "--data", str(other), "--index", index, "what"], "another collection"),
        (["--student", student, "--data", str(searchable / "data"), "--index", index,
          "--queries", str(tmp_path / "bad.jsonl"), "--run", str(tmp_path / "out")], 'bad.jsonl, line 2: "_id" \'q2\' lacks "text"'),
        (["--student", student, "--data", str(searchable / "data"), "--index", index,
          "--queries", str(tmp_path / "spaced.jsonl"), "--run", str(tmp_path / "out")], "the id 'q 1' has one"),
        (["--student", student, "--data", str(edited), "--index", index, "what"], "another collection"),
        (["--student", student, "--data", str(searchable / "data"), "--index", str(tmp_path / "run"), "what"],
         "something else is there"),
        (["--student", str(searchable / "encoder"), "--data", str(searchable / "data"), "--index", index, "what"],
         "encoder has no projection to 128 dimensions"),
    ]:
        capsys.readouterr()
        assert retrieve.main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("retrieve.py: ") and message in error[-1]
    assert not (tmp_path / "out").exists()
    for words in ([], ["--student", student], ["run", "--queries", "file"], ["run", "what", "-k", "0"],
                  ["run", "what", "--index", index], ["run", "what", "--queries", "file", "--run", "out"],
                  ["run", "--queries", "file", "--run", str(tmp_path / "none" / "out")]):
        with pytest.raises(SystemExit) as exit_:
            retrieve.main(words)
        assert exit_.value.code == 2


# run.py -------------------------------------------------------------------------------------------------------------


def random_words_folder(folder: Path, n: int = 120, seed: int = 0) -> Path:
    """Passages of random words; a query is three words of its passage. One query in four is held out, one unlabelled."""
    draw = np.random.default_rng(seed)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("lan", "mor", "tix", "zup")]
    passages = [draw.choice(words, 8, replace=False) for _ in range(n)]
    (folder / "qrels").mkdir(parents=True)
    lines = lambda rows: "".join(json.dumps(r) + "\n" for r in rows)
    (folder / "corpus.jsonl").write_text(lines(dict(_id=f"d{k}", title=p[0], text=" ".join(p[1:])) for k, p in enumerate(passages)))
    (folder / "queries.jsonl").write_text(lines(dict(_id=f"q{k}", text=" ".join(draw.choice(p, 3, replace=False)))
                                                for k, p in enumerate(passages)))
    for split, keep in (("train", lambda k: k % 4 > 1), ("test", lambda k: k % 4 == 0)):
        rows = "".join(f"q{k}\td{k}\t1\n" for k in range(n) if keep(k))
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder


TINY = ["--base-steps", "30", "--base-batch", "16", "--teacher-steps", "20", "--steps", "20", "--batch", "8",
        "--retrieve-k", "8", "--kept", "6", "--n-pairs", "4", "--rerank", "6", "--rerank-pairs", "3", "--iters", "1"]


def refused(capsys, *argv: str) -> str:
    """The one sentence on stderr of a command that ends with exit code 2."""
    try:
        code = run.main(list(argv))
    except SystemExit as e:  # argparse
        code = e.code
    assert code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_the_loop_runs_goes_on_where_it_stopped_and_answers_a_question(tmp_path, capsys):
    data_folder, out = random_words_folder(tmp_path / "data"), tmp_path / "run"
    command = ["--data", str(data_folder), "--out", str(out), *TINY]
    assert run.main(command) == 0
    printed = capsys.readouterr().out
    assert "120 passages, 90 training queries (60 labelled), 30 held-out queries" in printed
    rows = json.loads((out / "metrics.json").read_text())
    assert [(r["system"], r["iteration"]) for r in rows] == [("bm25", 0), ("student", 0), ("pointwise", 0), ("pairwise", 0), ("student", 1)]
    assert all(0 <= r[m] <= 1 for r in rows for m in run.METRICS if m != "R@1000") and "R@1000" not in rows[0]  # 100 are retrieved
    student = {r["iteration"]: r["MRR@10"] for r in rows if r["system"] == "student"}
    assert student[0] > 0.3  # 120 passages at random: .02
    pairs = np.load(out / "iter1" / "pairs.npz")
    assert pairs["passages"].shape == (90, 6) and pairs["pairs"].shape == (90, 4, 2)
    labelled = pairs["positive"] >= 0
    assert labelled.sum() == 60
    golds = pairs["passages"][labelled, pairs["positive"][labelled]]
    assert (golds == np.array([int(k) for k in range(120) if k % 4 > 1])).all()  # the positive is always kept
    assert (np.diff(pairs["teacher"][:, :5]) <= 0).all() and (pairs["pairs"][..., 1] - pairs["pairs"][..., 0] < 10).all()
    assert (out / "report.png").stat().st_size > 20_000
    asked, ours = load_script("experiments/compare.py").asked(out), pairs["pairs"] == pairs["positive"][:, None, None]
    first, probs = ours[..., 0][ours.any(-1)], pairs["pair_probs"][ours.any(-1)]  # every query has one label at most
    assert (asked["pairs"], asked["with one"]) == (360, ours.any(-1).sum())
    assert asked["pairwise"] == ((probs > .5) == first).mean() and 0 <= asked["pointwise"] <= 1
    weights = (out / "iter1" / "student" / "model.safetensors").read_bytes()

    for part in ("iter1/student", "iter1/index"):  # as if it had been stopped before the end of training
        shutil.rmtree(out / part)
    (out / "iter1" / "metrics.json").unlink()
    assert run.main(command) == 0
    assert capsys.readouterr().out.count("done before") >= 8
    assert (out / "iter1" / "student" / "model.safetensors").read_bytes() == weights
    assert json.loads((out / "metrics.json").read_text()) == rows

    import retrieve
    assert not retrieve.main([str(out), json.loads((data_folder / "queries.jsonl").read_text().splitlines()[0])["text"]])
    assert "d0" in capsys.readouterr().out

    message = refused(capsys, *command, "--lr", "0.5")
    assert "--lr (0.0006 there, 0.5 now) would change iter1/train; " in message and "--restart-from iter1/train" in message


def test_a_changed_flag_or_file_is_refused_where_it_changes_what_is_finished_and_that_can_be_made_again(tmp_path, capsys):
    data_folder, out = random_words_folder(tmp_path / "run" / "collection"), tmp_path / "run"  # the user's, so it is kept
    command = ["--data", str(data_folder), "--out", str(out), *TINY, "--rerank", "0"]
    assert run.main([*command, "--iters", "0"]) == 0
    student = (out / "iter0" / "student" / "model.safetensors").read_bytes()
    config = lambda: json.loads((out / "config.json").read_text())
    command += ["--lr", "1e-4", "--passage-chunk", "32"]  # no iteration was finished, and chunks change rounding alone
    assert run.main(command) == 0
    assert (config()["lr"], config()["passage_chunk"], config()["iters"]) == (1e-4, 32, 1)
    weights = (out / "iter1" / "student" / "model.safetensors").read_bytes()
    before = sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*"))

    message = refused(capsys, *command, "--n-pairs", "3", "--lambda-pair", "1")  # the first stage, and its flag
    assert "--n-pairs (4 there, 3 now) would change iter1/pairwise; " in message and "--restart-from iter1/pairwise" in message
    assert "would change iter0/student" in refused(capsys, *command, "--query-length", "9", "--restart-from", "iter1/train")
    assert "iter0/student, iter0/index, " in refused(capsys, *command, "--restart-from", "iter1/pairs")
    assert sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*")) == before  # a refusal touches nothing

    assert run.main([*command, "--n-pairs", "3", "--lambda-pair", "0", "--restart-from", "iter1/pairwise"]) == 0
    printed = capsys.readouterr().out
    assert "--lambda-pair 0: nothing learns from these pairs" in printed
    assert re.search(r"^  pointwise .*done before", printed, re.M) and not re.search(r"^  (pairwise|train) .*done before", printed, re.M)
    assert " 540 of 540 scores" in printed and np.load(out / "iter1" / "pairs.npz")["pairs"].shape == (90, 3, 2)
    assert (out / "iter0" / "student" / "model.safetensors").read_bytes() == student
    assert (out / "iter1" / "student" / "model.safetensors").read_bytes() != weights
    stages = out / "stages.json"
    stages.write_text(json.dumps({**json.loads(stages.read_text()), "iter2/retrieve": {}}))
    (out / "iter1" / "reranked.json").write_text("[]")  # from when --rerank was not 0
    with open(out / "log.jsonl", "a") as log:
        log.write('{"iteration": 1, "st')  # the disk was full
    assert run.main([*command, "--restart-from", "iter1/pairwise"]) == 0  # as it was before
    assert not (out / "iter1" / "reranked.json").exists() and all(map(json.loads, open(out / "log.jsonl")))
    assert (out / "iter1" / "student" / "model.safetensors").read_bytes() == weights

    message = refused(capsys, *command, "--eval-k", "50")
    assert "--eval-k (100 there, 50 now) would change iter0/evaluate; " in message
    assert run.main([*command, "--eval-k", "50", "--restart-from", "iter0/evaluate"]) == 0  # and the student is kept
    printed = capsys.readouterr().out
    assert re.search(r"^  train .*done before", printed, re.M) and not re.search(r"^  evaluate .*done before", printed, re.M)
    assert "R@100" not in json.loads((out / "metrics.json").read_text())[-1]
    assert run.main([*command, "--restart-from", "iter0/evaluate"]) == 0
    made = stages.read_text()
    stages.write_text(json.dumps({name: row for name, row in json.loads(made).items() if name != "iter1/train"}))
    assert "iter1/student is there, and stages.json does not say what it was made of" in refused(capsys, *command)
    stages.write_text(made[:9])
    assert f"{stages} is damaged" in refused(capsys, *command)
    stages.write_text(made)

    for name in ("pairs.npz", "metrics.json", "evaluated.npz"):
        whole = (out / "iter1" / name).read_bytes()
        if name != "evaluated.npz":  # which nothing reads where no teacher reranks
            (out / "iter1" / name).write_bytes(whole[:len(whole) // 2])
            message = refused(capsys, *command)
            assert f"iter1/{name} is damaged" in message and "remove it, and the same command makes it again" in message
        (out / "iter1" / name).unlink()
        assert run.main(command) == 0 and (out / "iter1" / name).exists()
        assert name != "metrics.json" or (out / "iter1" / name).read_bytes() == whole
    pairs = dict(np.load(out / "iter1" / "pairs.npz"))
    run.write(out / "iter1" / "pairs.npz", {**pairs, "pair_probs": 1 - pairs["pair_probs"]})
    message = refused(capsys, *command)
    assert f"{out}/iter1/student was made from another iter1/pairs.npz" in message and "--restart-from iter1/train" in message
    qrels = data_folder / "qrels" / "train.tsv"
    qrels.write_text("".join(qrels.read_text().splitlines(keepends=True)[:-1]))
    message = refused(capsys, *command)
    assert "--data or --queries (digest " in message and "--restart-from iter0/student" in message


def test_where_nothing_was_found_no_teacher_ranks_anything(tmp_path):
    """A row that ends with -1, as where a query's own passage was taken out: passages[-1] is no candidate."""
    seen, names = [], ["p0", "p1", "p2"]
    np.savez(tmp_path / "evaluated.npz", positions=np.array([[2, 0, -1]]))
    fake = types.SimpleNamespace(
        config=types.SimpleNamespace(rerank=3, rerank_pairs=2), ranks=Ranks(), eval_ids=["q"], text=lambda qids: qids,
        data=types.SimpleNamespace(passages=names, passage_ids=names), save=lambda *_: None, metrics=lambda: None,
        evaluate=lambda ranked: seen.append(sorted(ranked["q"], key=ranked["q"].get, reverse=True)) or {})
    pointwise = types.SimpleNamespace(score=lambda items, n: np.array([5.0 if d == "p2" else 1.0 for _, d in items]))
    pairwise = types.SimpleNamespace(prefer=lambda items, n: np.array([float(a == "p0") for _, a, b in items]))
    run.rerank_for_table(fake, 0, pointwise, pairwise, tmp_path)
    assert seen == [["p2", "p0"], ["p0", "p2"]]
    fake.config.rerank_pairs = 1
    run.rerank_for_table(fake, 0, pointwise, None, tmp_path)  # nothing to compare: no row
    assert seen[2:] == [["p2", "p0"]]


def test_a_step_with_fewer_queries_than_ranks_is_refused_before_anything_is_made(tmp_path):
    ranks = types.SimpleNamespace(first=True, world=4, barrier=lambda: None)
    config = run.Config(data=str(random_words_folder(tmp_path / "data")), out=str(tmp_path / "run"), batch=3)
    with pytest.raises(ValueError, match="--batch 3: a step has 3 queries for 4 ranks; give more of them"):
        run.Run(config, "msmarco", None, ranks)
    with pytest.raises(ValueError, match="--teacher-batch 6: a step has 3 labelled queries"):
        run.Run(dataclasses.replace(config, batch=4, teacher_batch=6, pointwise="scratch"), "msmarco", None, ranks)
    with pytest.raises(ValueError, match="--batch 32: a step has 2 queries"):
        run.Run(dataclasses.replace(config, batch=32, train_queries=2), "msmarco", None, ranks)
    with pytest.raises(ValueError, match="--base-batch 64: a step has 0 labelled queries"):
        run.Run(dataclasses.replace(config, batch=32, labels=False, base_steps=5), "msmarco", None, ranks)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_stages_counts_and_costs_and_writes_nothing(tmp_path, capsys):
    data_folder, out = random_words_folder(tmp_path / "data"), tmp_path / "run"
    command = ["--data", str(data_folder), "--out", str(out), *TINY]
    assert run.main([*command, "--iters", "0", "--rerank", "0"]) == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*"))
    capsys.readouterr()
    assert run.main([*command, "--dry-run", "--restart-from", "iter0/fit-pairwise"]) == 0
    printed = capsys.readouterr().out
    assert sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*")) == before
    stages = [line.split()[0] for line in printed.splitlines() if line.startswith("iter")]
    assert stages == run.plan(run.parse(command)[1]) and stages[0] == "iter0/student" and stages[-1] == "iter1/evaluate"
    assert re.findall(r"(\S+) .* done before", printed) == stages[:stages.index("iter0/fit-pairwise")]
    # 90 training queries, 8 passages and 4 pairs of each; 30 held-out queries, 6 passages and 3 pairs in both orders of each
    assert "720 to the pointwise teacher, 720 to the pairwise one, 360 for the table of both" in printed
    assert "--steps 20" in printed and "iter1/pairs.npz, iter0/student -> iter1/student" in printed
    assert "iter0/evaluated.npz, teachers/pointwise, teachers/pairwise -> iter0/reranked.json" in printed
    assert re.search(r"\ndisk: [\d.]+ GB more .*\nmemory: [\d.]+ GB .*\ntime: [1-9]\d* s, by two small runs", printed)


def test_every_setting_is_one_that_a_stage_reads_or_one_that_changes_no_result():
    read = {name for _, _, names in run.STAGES.values() for name in names.split()}
    assert {f.name for f in dataclasses.fields(run.Config)} - read == {"data", "queries", "seed", "out", "iters", "gpus",
                                                                         "passage_chunk", "bm25"}
    assert not read & {"out", "iters", "gpus", "passage_chunk", "bm25"}


@pytest.mark.filterwarnings("ignore:.*cut at their end")
def test_teachers_are_trained_from_any_encoder_and_compared_without_an_iteration(tmp_path, capsys, encoder):
    """Table 5: the retriever, and both teachers reranking it; with held-out accuracy."""
    out = tmp_path / "run"
    assert run.main(["--data", str(random_words_folder(tmp_path / "data")), "--out", str(out), *TINY, "--iters", "0",
                     "--eval-queries", "10", "--pointwise", f"train:{encoder}", "--pairwise", f"train:{encoder}"]) == 0
    printed = capsys.readouterr().out
    assert "10 held-out queries" in printed and len(re.findall(r"in the right order: [\d.]+% of held-out pairs", printed)) == 2
    rows = json.loads((out / "metrics.json").read_text())
    assert [r["system"] for r in rows] == ["bm25", "student", "pointwise", "pairwise"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["teacher"] for r in log if "held_out" in r] == ["pointwise", "pairwise"]
    config = json.loads((out / "teachers" / "pairwise" / "config.json").read_text())
    assert config["teacher_role"] == "pairwise" and config["architectures"] == ["BertForSequenceClassification"]


def test_a_teacher_that_has_learned_nothing_is_said_to_have(tmp_path, capsys):
    some = types.SimpleNamespace(out=tmp_path, ranks=Ranks(), log=lambda: run.Run.log(some))
    for accuracy in (.5, .9):
        rows = [dict(teacher="pairwise", step=n, loss=.7, accuracy=accuracy) for n in range(20)] + [dict(teacher="pairwise", held_out=.6)]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run.teacher_accuracy(some, "pairwise").startswith("in the right order: 60.0% of held-out pairs")
        assert ("the pairwise teacher has learned nothing" in capsys.readouterr().out) == (accuracy == .5)


@pytest.mark.parametrize("name, length", [("ir_datasets:beir/arguana", 300), ("my/climate_fever/", 64), ("/data/arguana-like/nfcorpus", None)])
def test_a_collection_is_known_by_its_own_name(name, length):
    assert run.parse(["--preset", "evaluate", "--data", name])[1].query_length == length


def settings_of(flags: str) -> dict:
    """Those of a command that are not the defaults."""
    config = run.parse(flags.split())[1]
    run.check(config)
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}


DEV, DPR_ROW = dict(split="dev"), dict(split="dev", architecture="dpr", dim=0, start="bert-base-uncased")
BEST = dict(iters=0, rerank=0, student="runs/msmarco/iter2/student", passage_length=300)  # what was trained on MS MARCO
FLAN = dict(pointwise="google/flan-t5-xl", pairwise="google/flan-t5-xl", labels=False, iters=1, passage_length=300, steps=4000,
            batch=16, warmup=400)


@pytest.mark.parametrize("row, settings", {
    "1: MS MARCO dev": dict(DEV, out="runs/msmarco"),
    "1: TREC DL 2019": dict(BEST, split="trec-dl-2019", passage_length=180, out="runs/dl2019"),
    "1: TREC DL 2020": dict(BEST, split="trec-dl-2020", passage_length=180, out="runs/dl2020"),
    "1: BEIR, such as NFCorpus": dict(BEST, data="ir_datasets:beir/nfcorpus", out="runs/nfcorpus"),
    "1: ArguAna": dict(BEST, data="ir_datasets:beir/arguana", query_length=300, out="runs/arguana"),
    "1: Climate-FEVER": dict(BEST, data="ir_datasets:beir/climate-fever", query_length=64, out="runs/climate-fever"),
    "1: BEIR, a folder": dict(BEST, data="my/bioasq", out="runs/bioasq"),
    "1: LoTTE, search": dict(BEST, data="ir_datasets:lotte/pooled/test/search", out="runs/lotte-search"),
    "1: LoTTE, forum": dict(BEST, data="ir_datasets:lotte/pooled/test/forum", out="runs/lotte-forum"),
    "1: ColBERTv2, as above": dict(iters=0, rerank=0, passage_length=300, data="ir_datasets:beir/nfcorpus", out="runs/colbertv2-nfcorpus"),
    "2: NQ": dict(BEST, data="ir_datasets:dpr-w100/natural-questions/dev", split="dev", passage_length=180, bm25=False, out="runs/nq"),
    "2: TriviaQA": dict(BEST, data="ir_datasets:dpr-w100/trivia-qa/dev", split="dev", passage_length=180, bm25=False, out="runs/triviaqa"),
    "2: SQuAD, a folder with answers": dict(BEST, data="my/squad", split="dev", passage_length=180, bm25=False, out="runs/squad"),
    "2: ColBERTv2, such as NQ": dict(iters=0, rerank=0, passage_length=180, data="ir_datasets:dpr-w100/natural-questions/dev", split="dev", bm25=False,
                                     out="runs/colbertv2-nq"),
    "3: without L_pair": dict(DEV, lambda_pair=0, n_pairs=0, out="runs/no-pair"),
    "3: without L_KD": dict(DEV, lambda_kd=0, out="runs/no-kd"),
    "3: without the heuristic": dict(DEV, delta=0, out="runs/any-pair"),
    "3: from bert-base-uncased": dict(DEV, start="bert-base-uncased", out="runs/bert"),
    "3: DPR": dict(DPR_ROW, lambda_kd=0, lambda_pair=0, n_pairs=0, out="runs/dpr-cl"),
    "3: DPR + L_KD": dict(DPR_ROW, lambda_pair=0, n_pairs=0, out="runs/dpr-kd"),
    "3: DPR + L_KD + L_pair": dict(DPR_ROW, out="runs/dpr"),
    "3: iterations 1 to 3": dict(DEV, iters=3, out="runs/msmarco"),
    "4: L_KD only, such as FiQA": dict(FLAN, data="ir_datasets:beir/fiqa", lambda_pair=0, n_pairs=0, out="runs/fiqa-kd"),
    "4: + L_pair": dict(FLAN, data="ir_datasets:beir/fiqa", out="runs/fiqa"),
    "4: with queries from a file": dict(FLAN, data="ir_datasets:beir/climate-fever", queries="my/queries.jsonl", query_length=64, out="runs/zeroshot"),
    "5: ColBERTv2, MiniLM, duoT5": dict(DEV, iters=0, out="runs/rerankers"),
    "5: MonoT5": dict(DEV, iters=0, pointwise="castorini/monot5-3b-msmarco", out="runs/monot5"),
    "6: lambda_pair 1": dict(DEV, lambda_pair=1, out="runs/pair1"),
    "6: lambda_pair 3": dict(DEV, out="runs/msmarco"),
    "7: its values are the defaults": dict(DEV, out="runs/msmarco"),
    "as the authors' code did it": dict(DEV, delta=6, orders="one", positive="teacher", negatives=4, n_pairs=8, steps=30_000, batch=8,
                                        out="runs/as-published"),
}.items())
def test_every_row_of_the_paper_is_a_command(row, settings):
    assert settings_of(run.ROWS[row]) == settings


def test_every_row_is_in_help_and_tested_above(capsys):
    rows, = (mark.args[1] for mark in test_every_row_of_the_paper_is_a_command.pytestmark)
    assert [row for row, _ in rows] == list(run.ROWS)
    with pytest.raises(SystemExit):
        run.parse(["--help"])
    printed = capsys.readouterr().out
    assert all(re.search(f"^  {re.escape(row)} +{re.escape(flags)}$", printed, re.M) for row, flags in run.ROWS.items())


def test_what_was_published_is_overridden_by_flags_and_leaves_other_presets_their_size():
    assert settings_of("--preset msmarco --as-published --delta 10 --steps 5000 --negatives 0 --n-pairs 50") == dict(
        split="dev", orders="one", positive="teacher", steps=5000, batch=8, out="runs/msmarco")
    assert settings_of("--as-published") == dict(settings_of(""), delta=6, orders="one", positive="teacher", negatives=4)
    assert settings_of("--preset zeroshot --as-published") == dict(
        FLAN, delta=8, orders="one", positive="teacher", temperature=5.0, batch=4, negatives=2, out="runs/zeroshot")
    assert settings_of("--preset dpr --as-published") == dict(
        DPR_ROW, delta=6, n_pairs=8, orders="one", positive="teacher", lambda_pair=1.0, lr=3e-5, warmup=10_000, batch=36, out="runs/dpr")


def test_lengths_expansion_and_markers_are_the_folders_unless_a_flag_says_otherwise(encoder, tmp_path):
    student_of(encoder, query_length=9, passage_length=21, query_expansion=False, markers=False).save_pretrained(tmp_path / "s")
    load = lambda folder, *flags: run.load_student(
        types.SimpleNamespace(config=run.parse(["--preset", "evaluate", *flags])[1], ranks=Ranks()), folder).settings
    shown = lambda s: [s[k] for k in ("query_length", "passage_length", "query_expansion", "markers")]
    assert shown(load(tmp_path / "s", "--query-length", "7")) == [7, 300, False, ["", ""]]
    flags = ["--passage-length", "30", "--expansion", "--markers"]
    assert shown(load(tmp_path / "s", *flags)) == [9, 30, True, ["[unused0]", "[unused1]"]]
    with pytest.raises(ValueError, match="/s gives a vector a token: load it with architecture='colbert'"):
        Student.from_pretrained(str(tmp_path / "s"), "dpr")
    assert shown(load(encoder)) == [32, 300, True, ["[unused0]", "[unused1]"]]  # a plain encoder's, and the preset's 300


def arguments_folder(folder: Path, qrels: bool) -> Path:
    """12 arguments as passages; the queries are 4 of them, each answered by the next one, and no query is left to train on."""
    passages = [f"{TEXTS[n % 6]} number{n}" for n in range(12)]
    answers = {} if qrels else {"answers": ["Number3", "nowhere"]}
    beir_folder(folder, [json.dumps({"_id": f"a{n}", "text": text}) for n, text in enumerate(passages)],
                [json.dumps({"_id": f"a{n}", "text": passages[n], **answers}) for n in range(4)], [f"a{n}\ta{n + 1}\t1" for n in range(4)])
    if not qrels:
        shutil.rmtree(folder / "qrels")
    return folder


EVALUATE = ["--preset", "evaluate", "--dim", "16", "--query-length", "12", "--passage-length", "20", "--split", "dev", "--eval-k", "10"]


def test_a_student_is_evaluated_without_teachers_or_training_queries_and_a_query_does_not_find_itself(encoder, tmp_path, capsys):
    command = [*EVALUATE, "--data", str(arguments_folder(tmp_path / "data", True)), "--student", encoder, "--out", str(tmp_path / "run")]
    assert run.main(command) == 0
    printed = capsys.readouterr().out
    assert "0 training queries (0 labelled), 4 held-out queries" in printed
    assert "queries of 12 tokens, filled with [MASK]s, passages of 20 at most" in printed
    bm25, student = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (bm25["system"], student["system"]) == ("bm25", "student") and set(run.METRICS) - {"R@100", "R@1000"} <= student.keys()
    found = np.load(tmp_path / "run" / "iter0" / "evaluated.npz")["positions"]
    assert found.shape == (4, 10) and (found >= 0).all() and not any(n in row for n, row in enumerate(found))
    assert "no training queries" in refused(capsys, *command, "--iters", "1")

    (tmp_path / "data" / "qrels" / "dev.tsv").write_text("".join(f"a{n}\ta{n}\t1\n" for n in range(4)))  # ids are row numbers
    assert run.main([*command, "--out", str(tmp_path / "rows")]) == 0
    bm25, student = json.loads((tmp_path / "rows" / "metrics.json").read_text())
    assert bm25["MRR@10"] == 1 and student["MRR@10"] > 0
    assert run.main([*command, "--out", str(tmp_path / "plain"), "--no-bm25"]) == 0
    assert json.loads((tmp_path / "plain" / "metrics.json").read_text()) == [student] and (tmp_path / "plain" / "report.png").exists()


def test_without_judgements_answers_are_looked_for_in_the_passages(encoder, tmp_path, capsys):
    command = [*EVALUATE, "--data", str(arguments_folder(tmp_path / "data", False)), "--out", str(tmp_path / "run"), "--student", encoder]
    assert run.main(command) == 0
    bm25, student = json.loads((tmp_path / "run" / "metrics.json").read_text())
    file = np.load(tmp_path / "run" / "iter0" / "evaluated.npz")
    best = [list(data.distinct_scores({f"a{p}": float(s) for p, s in zip(*row)}))[:5] for row in zip(file["positions"], file["scores"])]
    assert student.keys() == {"system", "iteration", "MRR@10", "answer R@5"}  # the passage with the answer is the one numbered 3
    assert student["answer R@5"] == np.mean(["a3" in five for five in best])
    assert re.search(r"held-out queries +MRR@10 +answer R@5\n", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore:.*cut at their end")
def test_unlabelled_queries_another_start_and_the_teachers_favourite(tmp_path, capsys, trained_teachers, encoder):
    """L_ZS on queries of a file; then L_CL with the teacher's best passage for a DPR that another student retrieves for."""
    folder, out = random_words_folder(tmp_path / "data"), tmp_path / "run"
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"_id": f"q{n}", "text": f"{n} balan bemor"}) + "\n" for n in range(16)))
    point, pair = trained_teachers[:2]
    command = ["--data", str(folder), "--out", str(out), *TINY, "--student", encoder, "--base-steps", "0", "--pointwise", str(point), "--pairwise",
               str(pair), "--rerank", "0", "--dim", "16", "--steps", "3", "--warmup", "1"]
    assert run.main([*command, "--queries", str(tmp_path / "more.jsonl")]) == 0
    examples = np.load(out / "iter1" / "pairs.npz")
    assert len(examples["queries"]) == 16 and (examples["positive"] == -1).all()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(r["cl"] == 0 < r["kd"] for r in log if "kd" in r)

    command[command.index("--out") + 1] = str(out := tmp_path / "dpr")
    assert run.main([*command, "--no-labels", "--positive", "teacher", "--negatives", "2", "--start", encoder, "--architecture", "dpr",
                     "--lambda-pair", "0", "--n-pairs", "0", "--pairwise", "not there, and not asked"]) == 0
    examples = np.load(out / "iter1" / "pairs.npz")
    assert len(examples["queries"]) == 90 and (examples["positive"] == 0).all()
    assert (examples["teacher"][:, 0] == examples["teacher"].max(1)).all()
    kinds = [json.loads((out / f"iter{t}" / "student" / "pairdistill.json").read_text())["architecture"] for t in (0, 1)]
    assert kinds == ["colbert", "dpr"]
    command[command.index("--out") + 1], late = str(tmp_path / "late"), str(out / "iter0" / "student")
    assert "gives a vector a token" in refused(capsys, *command, "--start", late, "--architecture", "dpr")
    assert not (tmp_path / "late" / "iter0").exists()  # at once
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(r["cl"] > 0 == r["pair"] for r in log if "kd" in r)


def test_an_unknown_preset_is_refused_with_the_known_ones(capsys):
    assert "docs" in refused(capsys, "--preset", "msmarko")


@pytest.mark.parametrize("change, says", [
    (lambda f: shutil.rmtree(f), "no such folder"),
    (lambda f: (f / "corpus.jsonl").write_text('{"_id": "d0", "text": "x"}\nnot json\n'), "corpus.jsonl, line 2"),
    (lambda f: (f / "corpus.jsonl").write_text('{"text": "x"}\n'), 'line 1: lacks "_id"'),
    (lambda f: (f / "corpus.jsonl").write_text('{"_id": "d0", "text": "x"}\n' * 2), "line 2"),
    (lambda f: (f / "corpus.jsonl").write_text('{"_id": "d0", "text": " "}\n'), "is empty"),
    (lambda f: (f / "queries.jsonl").write_text('{"_id": "q0", "text": ""}\n'), "is empty"),
    (lambda f: (f / "qrels" / "train.tsv").write_text("q2\td999\t1\n"), "unknown passage 'd999'"),
    (lambda f: (f / "qrels" / "train.tsv").write_text("q999\td2\t1\n"), "unknown query 'q999'"),
])
def test_a_broken_collection_is_refused_with_its_place(tmp_path, capsys, change, says):
    change(random_words_folder(tmp_path / "data"))
    assert says in refused(capsys, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *TINY)


def test_no_training_queries_are_refused(tmp_path, capsys):
    folder = random_words_folder(tmp_path / "data")
    (folder / "qrels" / "train.tsv").unlink()
    kept = [line for line in (folder / "queries.jsonl").read_text().splitlines() if int(json.loads(line)["_id"][1:]) % 4 == 0]
    (folder / "queries.jsonl").write_text("\n".join(kept))
    assert "no training queries" in refused(capsys, "--data", str(folder), "--out", str(tmp_path / "run"), *TINY)


def test_a_model_that_cannot_be_loaded_is_refused_with_the_way_to_work_offline(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(capsys, "--data", str(random_words_folder(tmp_path / "data")), "--out", str(tmp_path / "run"),
                      "--student", "nobody/nothing", *TINY)
    assert "nobody/nothing" in message and "no network" in message and len(message.splitlines()) == 1


def test_more_gpus_than_there_are_is_refused_with_their_number(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "has 1 CUDA device" in refused(capsys, "--gpus", "2")


@pytest.mark.parametrize("flags, says", [(["--kept", "200"], "--kept 200"), (["--pair-reduction", "max"], "mean or sum"),
                                         (["--batch", "0"], "--batch 0"), (["--negatives", "1"], "--negatives 1"),
                                         (["--lr", "inf"], "--lr inf"), (["--delta", "1"], "--delta 1"), (["--eval-k", "5"], "--eval-k 5"),
                                         (["--dim", "50"], "--dim 50"), (["--query-length", "0"], "--query-length 0"),
                                         (["--warmup", "20"], "--warmup 20"), (["--out", "/dev/null/run"], "/dev/null is not a folder"),
                                         (["--no-labels", "--lambda-kd", "0", "--lambda-pair", "0"], "no loss is left"),
                                         (["--no-labels", "--lambda-kd", "0", "--n-pairs", "0"], "no loss is left"),
                                         (["--seed", "3000000000"], "--seed 3000000000"),
                                         (["--start", "nowhere"], "cannot load 'nowhere'"),
                                         (["--pairwise", "train:nowhere"], "cannot load 'nowhere'"),
                                         (["--no-labels", "--base-steps", "0"], "a step has 0 labelled queries for 1 rank"),
                                         (["--split", "train"], "--split train: 60 of its queries, such as 'q10', would be trained on"),
                                         (["--queries", "nowhere"], "nowhere"), (["--split", "dev"], "--split dev")])
def test_a_flag_out_of_range_is_refused_by_name(tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert says in refused(capsys, "--data", str(random_words_folder(tmp_path / "data")), "--out", str(tmp_path / "run"), *TINY, *flags)


def start_a_long_run(tmp_path: Path, *flags: str) -> subprocess.Popen:
    """Two ranks whose iteration 0 does not end; returns when it has begun to train."""
    if not (tmp_path / "data").exists():
        random_words_folder(tmp_path / "data")
    process = on_ranks(tmp_path, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--gpus", "2", *TINY,
                       "--base-steps", "100000", *flags, CHECKPOINT_EVERY="100000")
    for line in process.stdout:  # tqdm's bar is rewritten in place, and its lines end with a carriage return
        if "iteration 0:" in line and "/100000" in line and "?" not in line:  # which it is before the first step
            break
    return process


def no_rank_is_left(process: subprocess.Popen) -> bool:
    """Each rank is in a session of its own: they are known by the folder that they write into."""
    out = process.args[process.args.index("--out") + 1]
    return subprocess.run(["pgrep", "-f", f"run.* --out {out}"], capture_output=True).returncode == 1


def test_ctrl_c_stops_all_ranks_and_says_how_to_go_on_and_meanwhile_no_other_run_enters_the_folder(tmp_path, capsys):
    process = start_a_long_run(tmp_path)
    message = refused(capsys, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *TINY, "--base-steps", "100000")
    assert "another run is at work there" in message
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130 and "the same command goes on" in output and "Traceback" not in output
    assert no_rank_is_left(process)


def test_a_scheduler_s_sigterm_leaves_a_checkpoint_that_the_same_command_goes_on_from(tmp_path):
    process = start_a_long_run(tmp_path)
    start = time.time()
    process.terminate()  # the launcher alone gets it
    output = process.communicate(timeout=20)[0]
    assert time.time() - start < 10 and process.returncode == 143 and no_rank_is_left(process)
    assert "the same command goes on" in output and "Traceback" not in output
    steps = len(load_file(tmp_path / "run" / "iter0" / "checkpoint" / "last.safetensors")["history"])
    process = start_a_long_run(tmp_path)
    process.terminate()
    process.communicate(timeout=20)
    assert len(load_file(tmp_path / "run" / "iter0" / "checkpoint" / "last.safetensors")["history"]) > steps > 0


def test_when_one_rank_is_killed_all_end_and_the_signal_is_named(tmp_path):
    process = start_a_long_run(tmp_path)
    ranks_running = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "on_ranks.py"], capture_output=True, text=True).stdout.split()
    start = time.time()
    os.kill(int(ranks_running[-1]), signal.SIGKILL)
    output = process.communicate(timeout=30)[0]
    assert time.time() - start < 10 and process.returncode > 128 and no_rank_is_left(process)
    assert "was ended by signal 9" in output and "the same command goes on" in output


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(tmp_path, capsys):
    data, disk = random_words_folder(tmp_path / "data"), tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    try:
        command = ["--data", str(data), "--out", str(disk / "run"), *TINY, "--iters", "0", "--rerank", "0"]
        message = refused(capsys, *command)
        assert "is full" in message and len(message.splitlines()) == 1
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        assert run.main(command) == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)])


# run.py on the CPU in float32, with a checkpoint every few steps; the words in BREAK are for one rank to fail in a stage.
ON_RANKS = """
import os, sys, torch
sys.path.insert(0, {here!r})
torch.cpu._is_avx512_bf16_supported = lambda: False  # bfloat16 rounds by batch shape
os.sched_getaffinity = lambda _: range(2)  # --gpus 2 is two ranks, on one core too
torch.set_num_threads(1); torch.set_num_threads = lambda n: None  # on one machine or two
import pairdistill, run, teachers
pairdistill.fit.__kwdefaults__["checkpoint_every"] = int(os.environ.get("CHECKPOINT_EVERY", 7))
run.__file__ = __file__  # what the launcher starts
what = os.environ.get("BREAK") if os.environ.get("RANK") == "1" else None
if what == "teacher":
    load = teachers.load_pointwise
    def broken(*args, **options):
        teacher = load(*args, **options)
        teacher.reader.model.classifier.weight.data.fill_(torch.nan)
        return teacher
    teachers.load_pointwise = broken
elif what:
    def broken(*_):
        raise KeyError("a defect")
    setattr(run, what, broken)
if world := int(os.environ.get("FORK", 0)):  # ranks without a launcher: all is imported once
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification, BertModel
    os.environ.update(WORLD_SIZE=str(world), MASTER_ADDR="localhost")
    os.environ["RANK"] = str(next((rank for rank in range(1, world) if os.fork() == 0), 0))
code = run.main(sys.argv[1:])
sys.stdout.flush(); sys.stderr.flush()
os._exit(code)
"""


def on_ranks(tmp_path: Path, *argv: str, torchrun: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    """Starts run.py, as it is or by torchrun with these options, in a process group of its own."""
    script = tmp_path / "run_on_ranks.py"
    script.write_text(ON_RANKS.format(here=str(HERE)))
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    return subprocess.Popen([sys.executable, *launcher, str(script), *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment})


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def finished(process: subprocess.Popen, code: int = 0, timeout: int = 600) -> str:
    """What it printed, when it has ended with this exit code and left no process behind."""
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == code, output
    assert no_rank_is_left(process)
    return output


def weights_and_metrics(out: Path) -> tuple[dict[str, bytes], list[dict]]:
    return ({p.parent.parent.name: p.read_bytes() for p in out.glob("iter*/student/model.safetensors")},
            json.loads((out / "metrics.json").read_text()))


def test_any_number_of_ranks_retrieves_asks_and_trains_the_same(tmp_path):
    """The scratch models have no dropout. Batches, and so the order of sums in float32, differ with the share of a rank:
    scores agree to 1e-5 and are otherwise the same; passages, their order and pairs are the same."""
    data_folder, base = random_words_folder(tmp_path / "data"), tmp_path / "base"
    assert run.main(["--data", str(data_folder), "--out", str(base), *TINY, "--iters", "0", "--rerank", "0"]) == 0
    command = ["--data", str(data_folder), *TINY, "--rerank", "0", "--base-steps", "0", "--student", str(base / "iter0" / "student"),
               *(f"--{role}={base}/teachers/{role}" for role in ("pointwise", "pairwise"))]
    made = []
    for world in (1, 2, 4):
        out = tmp_path / f"ranks{world}"
        finished(on_ranks(tmp_path, *command, "--out", str(out), FORK=str(world), MASTER_PORT=free_port()))
        stages = {name: dict(np.load(out / "iter1" / f"{name}.npz")) for name in ("retrieved", "pointwise", "pairs")}
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses = np.array([[r[k] for k in ("total", "cl", "kd", "pair")] for r in log if "step" in r])
        made.append((stages, losses))
    (one, losses), *others = made
    assert losses.shape == (20, 4) and (losses > 0).all()
    for stages, again in others:
        for name, arrays in one.items():
            for key, array in arrays.items():
                if array.dtype == np.float32:
                    assert np.allclose(array, stages[name][key], rtol=1e-5, atol=1e-5, equal_nan=True), (name, key)
                else:
                    assert np.array_equal(array, stages[name][key]), (name, key)
        assert np.allclose(losses, again, rtol=1e-4, atol=1e-7)


KILLS = int(os.environ.get("PAIRDISTILL_KILLS", 0))  # of docs; 0: of a tiny run, and fewer


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments_a_run_ends_as_one_that_was_left_alone(tmp_path, ranks):
    """SIGKILL at moments drawn over the time of all stages: of a tiny run, as many as ranks. In full, 20 of docs:

        PAIRDISTILL_KILLS=20 python -m pytest -q -s -k killed_at_random_moments
    """
    flags = [] if KILLS else ["--data", str(random_words_folder(tmp_path / "data")), *TINY]
    environment = {"CHECKPOINT_EVERY": "20"} if KILLS else {}
    finished(on_ranks(tmp_path, *flags, "--out", str(tmp_path / "calm"), FORK=str(ranks), MASTER_PORT=free_port(), **environment),
             timeout=3600)
    flags += ["--gpus", str(ranks)]
    stages = [r for line in open(tmp_path / "calm" / "log.jsonl") if "stage" in (r := json.loads(line))]
    ends = np.cumsum([r["seconds"] for r in stages])
    out, draw = tmp_path / "killed", np.random.default_rng(ranks)
    for moment in np.sort(draw.uniform(0, ends[-1], KILLS // 2 or ranks)):
        n = int(np.searchsorted(ends, moment))
        process = on_ranks(tmp_path, *flags, "--out", str(out), **environment)
        left = n
        while left and (line := process.stdout.readline()):  # the stages before it are over
            left -= bool(re.match(rf"\s*{re.escape(stages[n - left]['stage'])} .*( s|done before)$", line.split("\r")[-1].rstrip()))
        time.sleep(moment - (ends[n - 1] if n else 0) + (0 if n else 6))  # 6 s: to start
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)  # which ends when no rank is left
        print(f"killed {ranks} ranks in {stages[n]['stage']} of iteration {stages[n]['iteration']}")
    finished(on_ranks(tmp_path, *flags, "--out", str(out), **environment), timeout=3600)
    assert weights_and_metrics(out) == weights_and_metrics(tmp_path / "calm")


def test_two_agents_of_torchrun_make_one_run_and_when_one_dies_it_is_gone_on_with(tmp_path):
    command = ["--data", str(random_words_folder(tmp_path / "data")), *TINY, "--rerank", "0"]

    def agents(out: str) -> list[subprocess.Popen]:
        options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}",
                   "--rdzv-id=test")
        return [on_ranks(tmp_path, *command, "--out", str(tmp_path / out), torchrun=options) for _ in range(2)]

    first, second = agents("two")
    while not (tmp_path / "two" / "config.json").exists() and first.poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(second.pid, signal.SIGKILL)
    start = time.time()
    output = first.communicate(timeout=60)[0]
    second.communicate(timeout=20)
    assert time.time() - start < 30 and first.returncode and no_rank_is_left(first)
    assert "the same command goes on" in output, output

    pair = agents("two")
    outputs = [agent.communicate(timeout=120)[0] for agent in pair]
    assert [agent.returncode for agent in pair] == [0, 0] and no_rank_is_left(pair[0]), outputs
    finished(on_ranks(tmp_path, *command, "--out", str(tmp_path / "one"), FORK="2", MASTER_PORT=free_port()))
    assert weights_and_metrics(tmp_path / "two") == weights_and_metrics(tmp_path / "one")


@pytest.mark.parametrize("broken, code, says", [
    ("teacher", 2, r"error: the teacher pointwise \w+ returned NaN or an infinite score: its weights"),
    ("compare_pairs", 1, r"KeyError: 'a defect'[^\0]*the same command goes on")], ids=["a NaN of a teacher", "a defect"])
def test_what_fails_on_one_rank_ends_all_is_said_once_and_the_run_goes_on(tmp_path, trained_teachers, broken, code, says):
    command = ["--data", str(random_words_folder(tmp_path / "data")), "--out", str(tmp_path / "run"), *TINY, "--rerank", "0",
               "--base-steps", "10", "--gpus", "2", "--pointwise", trained_teachers[0], "--pairwise", trained_teachers[1]]
    output = finished(on_ranks(tmp_path, *command, BREAK=broken), code, timeout=60)
    assert len(re.findall(says, output)) == 1 and output.count("Traceback") == (code == 1)
    assert "done before" in finished(on_ranks(tmp_path, *command, FORK="2", MASTER_PORT=free_port()))


# results/ -----------------------------------------------------------------------------------------------------------


def load_script(path):
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location(Path(path).stem, HERE / "results" / path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cost_of_the_papers_run_is_amounts_over_rates_and_what_is_not_measured_has_none():
    cost = load_script("cost/cost.py")
    rows = {row["stage"]: row for row in cost.cost({"encode": 2, "pairwise": 10, "train": 1000}, {})}
    assert rows["encode"]["hours, 2 iterations"] == 3 * 8_800_000 / 2 / 3600  # once more, for the last student
    assert rows["pairwise"]["hours, 3 iterations"] == 3 * 808_000 * 50 * 2 / 10 / 3600  # both orders
    assert rows["train"]["hours, 2 iterations"] == 2 * 100_000 * 32 * (64 * 80 + 9) / 1000 / 3600
    assert rows["code"]["a second"] is rows["retrieve"]["hours, 2 iterations"] is None and rows["pointwise"]["how"] == "not measured"
    said = {"retrieve": [dict(engine="index", tokens=6 * 10**n, **{"q/s": 10 ** (9 - n), "build tokens/s": 7}) for n in (6, 7)]}
    rate, how = cost.measured(said)  # ten times the tokens, a tenth of the speed
    assert rate == {"code": 7, "retrieve": pytest.approx(10)} and "power -1.00, as measured" in how["retrieve"]


def test_the_cost_without_a_gpu_is_predicted_and_says_so(tmp_path):
    kept = json.loads((HERE / "results" / "cost" / "prediction.json").read_text())
    command = [sys.executable, "results/cost/cost.py"]
    done = subprocess.run([*command, "--predict", "--out", tmp_path / "now.json"], cwd=HERE, capture_output=True, text=True)
    assert json.loads((tmp_path / "now.json").read_text()) == kept and kept["what"] == "predicted, not measured" in done.stdout
    done = subprocess.run([*command, tmp_path / "none.json"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and "no throughputs of a GPU have been measured" in done.stderr and not done.stdout


def test_throughputs_are_what_the_cost_reads(tmp_path):
    out = tmp_path / "throughput.json"
    done = subprocess.run([sys.executable, "results/h200/throughput.py", "--tiny", "--out", out], cwd=HERE, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    said, cost = json.loads(out.read_text()), load_script("cost/cost.py")
    assert said["tiny"] and len(said["kernels"]) == 12 and all(row["right"] and row["same_bits"] for row in said["kernels"])
    rate, how = cost.measured(said)
    assert rate.keys() == how.keys() == {row["stage"] for row in cost.cost(rate, how)} and min(rate.values()) > 0


# README.md ----------------------------------------------------------------------------------------------------------

def test_the_readmes_table_is_what_results_hold():
    rows = json.loads((HERE / "results" / "docs" / "metrics.json").read_text())
    table = [line for line in (HERE / "README.md").read_text().splitlines() if line.startswith("| ") and line.count("|") == 6]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table]
    figures = {name: [float(x) for x in row] for name, *row in cells if row[0].startswith("0.")}
    expected = {run.title_of(r): [round(r[m], 3) for m in ("MRR@10", "nDCG@10", "R@5", "R@100")] for r in rows}
    assert figures == expected


def test_the_readmes_table_of_commands_is_that_of_run_py():
    table = "| table: row | `python run.py` |\n|---|---|\n" + "\n".join(f"| {row} | `{flags}` |" for row, flags in run.ROWS.items())
    assert f"<!-- rows -->\n{table}\n" in (HERE / "README.md").read_text()


def test_the_readmes_reranking_table_is_what_results_hold():
    lines = [line.strip() for line in (HERE / "README.md").read_text().splitlines()]
    for name, path in (("SQuAD dev, 500 queries", "squad"), ("SciFact test, 300 queries", "scifact")):
        line, = (line for line in lines if line.startswith(f"| {name} |"))
        rows = json.loads((HERE / "results" / "teachers" / f"{path}.json").read_text())
        assert [float(x) for x in line.split("|")[3:7]] == [round(r["MRR@10"], 3) for r in rows]


def test_the_readmes_loss_table_is_what_results_hold():
    lines = [line.strip() for line in (HERE / "README.md").read_text().splitlines()]
    for name, start in (("full", "| L_CL + L_KD"), ("cl", "| L_CL |")):
        line, = (line for line in lines if line.startswith(start) and line.count("|") == 6)
        rows = [json.loads((HERE / "results" / "docs-losses" / f"{name}-{seed}.json").read_text())[-1] for seed in range(3)]
        means = [r["MRR@10"] for r in rows]
        assert [float(x) for x in line.split("|")[2:6]] == [round(x, 3) for x in (*means, sum(means) / 3)]


def retrieval_row(collection: str, row: dict) -> str:
    cell = lambda name, form: form.format(row[name]) if row.get(name) is not None else "–"
    return (f"| {collection}, {row['passages']:,} | {row['engine']} | {cell('bytes_per_token', '{:.1f}')} | "
            f"{cell('recall@100', '{:.3f}')} | {cell('nDCG@10', '{:.3f}')} | {cell('one_ms', '{:.0f}')} | "
            f"{cell('q/s', '{:.0f}' if row['q/s'] >= 10 else '{:.1f}')} | {cell('build tokens/s', '{:,.0f}')} |")


def test_the_readmes_retrieval_table_is_what_results_hold():
    readme = (HERE / "README.md").read_text()
    for name, collection in (("scifact", "SciFact"), ("squad", "SQuAD"), ("medquad", "MedQuAD"),
                             ("small", "MedQuAD, later"), ("medquad-100k", "MedQuAD, perturbed")):
        for row in json.loads((HERE / "results" / "retrieval" / f"{name}.json").read_text())["rows"]:
            assert retrieval_row(collection, row) in readme


def test_the_readmes_prediction_follows_from_the_indexes_measured():
    measure = load_script("retrieval/measure.py")
    rows = measure.predict(sorted((HERE / "results" / "retrieval").glob("medquad*.json")))
    kept = json.loads((HERE / "results" / "retrieval" / "prediction.json").read_text())
    readme = (HERE / "README.md").read_text()
    for now, then in zip(rows, kept, strict=True):
        assert now["cost"] != "best 100 of 800,000 queries" or round(now["power"], 2) == dryrun.LISTED
        assert now == then | {k: pytest.approx(then[k]) for k in ("value", "power")}
        assert f"| {now['cost']} | {now['value']:,.1f} {now['unit']} | {now['power']:.2f} |" in readme


def test_the_readmes_experiments_are_what_results_hold():
    compare, where = load_script("experiments/compare.py"), HERE / "results" / "experiments"
    readme = (HERE / "README.md").read_text()
    said = [json.loads(file.read_text()) for file in where.glob("*.json")]
    _, _, *table = readme.split("<!-- results/experiments/ -->\n")[1].split("\n\n")[0].splitlines()
    assert said and sorted(compare.line(row, one["metric"]) for one in said for row in one["rows"]) == sorted(table)
    near = lambda x: f"{abs(x):.3f}"
    means = [[row[one["metric"]] for row in one["rows"]] for one in said]
    known = {near(a - b) for rows in means for a in rows for b in [0, *rows]}
    known |= {near(a - b) for one in said for a, b in zip(*(row["seeds"] for row in one["rows"][:2]))}
    p_values = {f"p {row['p']:.{n}f}".replace("0.", ".") for one in said for row in one["rows"] if "p" in row for n in (2, 3)}
    prose = readme.split("experiments/experiments.png)")[1].split("```bash")[0]
    assert set(re.findall(r"\b0\.\d{3}\b", prose)) <= known and set(re.findall(r"p \.\d+", prose)) <= p_values
    held_out = lambda log: {row["teacher"]: f"{row['held_out']:.1%}" for row in map(json.loads, (where / log).read_text().splitlines())
                            if "held_out" in row}.values()  # the last of each
    for number, name in enumerate(("first", "second", "third", "fourth", "fifth"), 1):
        n = f"-{number}" if number > 1 else ""
        known = where / "known" / f"log{n}.jsonl"
        figures = *held_out(f"point{n}.jsonl"), *held_out(f"full{n}.jsonl"), *(held_out(known) if known.exists() else ("", ""))
        assert f"| {name} | {' | '.join(figures)} |" in readme
    student, *reranked = (f"{row['nDCG@10']:.3f}" for row in json.loads((where / "known" / "metrics.json").read_text())[1:])
    assert (f"teachers rerank the 20 best of untrained MaxSim at 180 tokens, whose nDCG@10 is {student}, to "
            f"{' and '.join(reranked)}.") in " ".join(readme.split())


def test_the_readmes_other_figures_are_what_results_hold():
    readme = " ".join((HERE / "README.md").read_text().split())
    result = lambda name: json.loads((HERE / "results" / name).read_text())
    apart = max(max(row["queries"], row["passages"]) for row in result("interop/check.json")["rows"])
    assert f"On {result('interop/check.json')['texts']} texts" in readme and f"more than {math.ceil(apart * 1e7) / 10:.1f}e-6 in any number" in readme
    scale = result("scale/corpus.json")
    assert scale["passages"] == 8_800_000 and f"8.8 million made passages ({scale['corpus_gb']} GB)" in readme
    assert (f"take {scale['first']['opens_s']:.0f} s the first time and {max(r['opens_s'] for r in scale['ranks']):.0f} s after it, "
            f"with four ranks at once, of {max(r['rss'] for r in scale['ranks']) / 1e3:.2f} GB each".replace("0.", ".")) in readme
    for row in result("training/pylate.json")["rows"]:
        share = f"{row['of PyLate' + chr(39) + 's time']:.2f}"
        assert f"{share.lstrip('0')} of the time of PyLate's ({row['ours']:.1f} s and {row['PyLate']:.1f} s" in readme
    row, = result("training/compile.json")["rows"]
    share, longer = f"{row['of compiled' + chr(39) + 's time']:.2f}", row["first"]["compiled"] - row["first"]["ours"]
    assert f"{share.lstrip('0')} of the time of a compiled encoder's step, which took {longer:.0f} s longer to begin" in readme
    log = [json.loads(line) for line in open(HERE / "results" / "docs" / "log.jsonl")]
    stages = [row for row in log if "stage" in row]
    assert (f"above: {sum(row['seconds'] for row in stages):.0f} s of stages, in which both ranks together held at most "
            f"{max(row['peak_gb'] for row in stages):.1f} GB.") in readme
    students = [row["MRR@10"] for row in result("docs/metrics.json") if run.title_of(row).startswith("student")]
    assert students == sorted(students) and f"to {students[-1] / students[0]:.2f} times its baseline" in readme
    again = [f"{row['MRR@10']:.3f}" for row in result("docs/metrics-again.json") if row["system"] == "student"]
    assert f"it goes from {again[0]} to {again[1]} and {again[2]}" in readme
    third = [f"{row['MRR@10']:.3f}" for row in result("docs/metrics-third.json") if row["system"] == "student"]
    assert f"from {third[0]} to {third[1]} and {third[2]}" in readme
    quick = sum(json.loads(line).get("seconds", 0) for line in open(HERE / "results" / "docs" / "log-third.jsonl"))
    assert f"where it took {quick:.0f} s of stages" in readme
    cost = result("cost/prediction.json")
    pairwise, = (row["hours, 2 iterations"] for row in cost["rows"] if row["stage"] == "pairwise")
    assert (f"{cost['hours, 2 iterations']:.0f} H100-hours for two iterations, {pairwise:.0f} of them duoT5-3B's") in readme
    line = load_script("cost/cost.py").line
    assert all(" ".join(line(row).split()) in readme for row in [*cost["rows"], {"stage": "in all", "how": "", **cost}])
    exact, *indexes = [row for row in result("retrieval/scifact-dpr-coded.json")["rows"] if row["engine"] != "index, exact=True"]
    three = lambda form, name: "{}, {} and {}".format(*(form.format(row[name]) for row in indexes))
    assert f"(nDCG@10 {three('{:.3f}', 'nDCG@10')}, uncoded {exact['nDCG@10']:.3f})" in readme
    assert f"keeps less, {three('{:.3f}', 'recall@100')} of the exact top 100 by three seeds" in readme
    assert {row["recall@100"] for row in result("retrieval/scifact-dpr.json")["rows"]} == {1} and "and finds 1.000" in readme
    (*squad, scifact), fourth, fifth = (result(f"experiments/known/asked-{n}.json") for n in (5, 4, "medquad"))
    percent = lambda teacher: "{:.0%}, {:.0%} and {:.0%}".format(*(row[teacher] for row in squad))
    assert f"one passage that answers {percent('pairwise')} (the pointwise one, whose near neighbours they are, {percent('pointwise')})" in readme
    assert {f"{row['sure']:.2f}" for row in squad} == {"0.19"} and "and is 0.19 from 1/2 on average" in readme
    assert f"On SciFact it is as sure ({scifact['sure']:.2f})" in readme
    each = lambda rows, form, name: " and ".join(", ".join(form.format(row[name]) for row in rows).rsplit(", ", 1))
    assert (f"of such pairs it puts {each(fifth, '{:.0%}', 'pairwise')} in order, the pointwise one {each(fifth, '{:.0%}', 'pointwise')}.") in readme
    assert (f"p_ij + p_ji - 1 is {each(fifth, '{:+.2f}', 'position bias')}, the fourth's {each(fourth, '{:+.2f}', 'position bias')})") in readme
    assert f"is {each(fifth, '{:.2f}', 'sure')} from 1/2 on average" in readme
    _, lkd, _ = result("experiments/medquad-4.json")["rows"]
    before, after, _ = result("experiments/medquad-4-lambda.json")["rows"]
    taken = [b - a for a, b in zip(*(row["seeds"] for row in result("experiments/medquad.json")["rows"][:2]))]
    assert f"3 L_pair takes {taken[0]:.3f}, {taken[1]:.3f} and {taken[2]:.3f} in three seeds" in readme
    assert f"took {lkd['difference']:.3f} in two seeds" in readme
    assert f"(seed 0: {after['nDCG@10']:.3f} against {before['nDCG@10']:.3f}, p .{round(100 * after['p']):02d})" in readme
    rows = [row for name in ("scifact", "squad", "medquad") for row in result(f"retrieval/{name}.json")["rows"]
            if row["engine"] == "index" and row["passages"] > 5000 and row["nDCG@10"]]
    one, many = [row["one_ms"] for row in rows], [row["q/s"] for row in rows]
    built = [row for name in ("small", "scifact", "squad", "medquad", "medquad-100k") for row in result(f"retrieval/{name}.json")["rows"]
             if row["engine"] == "index"]
    speeds, largest = [round(row["tokens"] / row["build_s"], -3) for row in built], built[-1]
    assert f"built at {min(speeds):,.0f} to {max(speeds):,.0f} tokens a second" in readme
    assert f"A token takes {largest['bytes_per_token']:.0f} bytes" in readme
    assert f"finds {largest['recall@100']:.3f} of the exact top 100 among perturbed copies".replace("0.", ".") in readme
    assert f"in {min(one):.0f} to {max(one):.0f} ms and batches at {min(many):.0f} to {max(many):.0f} queries a second" in readme


def test_students_of_two_runs_are_compared_query_by_query(tmp_path):
    compare = load_script("experiments/compare.py")
    names = [f"d{n}" for n in range(4)]
    qrels = {"test": {f"q{n}": {names[n]: 1} for n in range(3)}}
    data.save_collection(data.Collection("four", names, names, {f"q{n}": "word" for n in range(3)}, qrels), tmp_path / "data")
    for run_name, order in (("a", [[0, 1], [0, 1], [0, 1]]), ("b", [[0, 1], [1, 0], [0, -1]])):
        folder = tmp_path / run_name / "iter0"
        folder.mkdir(parents=True)
        np.savez(folder / "evaluated.npz", positions=np.array(order), scores=np.array([[2., 1.]] * 3))
        config = run.Config(data=str(tmp_path / "data"), iters=0, pointwise="p", pairwise="p")
        (tmp_path / run_name / "config.json").write_text(json.dumps({"preset": "docs", **dataclasses.asdict(config)}))
    where, (a, b) = compare.compare({"a": [tmp_path / "a"], "b": [tmp_path / "b" / "iter0", tmp_path / "b"]}, "MRR@10")
    assert where == "data, test" and a["MRR@10"] == pytest.approx(.5) and b["MRR@10"] == pytest.approx(2 / 3)
    assert b["difference"] == pytest.approx(1 / 6) and b["p"] == 1 and b["seeds"] == [b["MRR@10"]] * 2
    assert a["interval"][0] == 0 and a["interval"][1] == 1
    draw = np.random.default_rng(0)
    assert compare.p_value(np.full(20, .1), draw) < .001 and compare.p_value(np.tile([.1, -.1], 50), draw) == 1
    with pytest.raises(ValueError, match="is not a run: it has no config.json"):
        compare.per_query(tmp_path, "MRR@10")
    path = tmp_path / "b" / "config.json"  # an older student's figures must not count as the last one's
    path.write_text(json.dumps(json.loads(path.read_text()) | {"iters": 1}))
    with pytest.raises(ValueError, match="iter1 has no evaluated.npz: let the run end"):
        compare.per_query(tmp_path / "b", "MRR@10")
    with pytest.raises(ValueError, match="--metric mrr@10: measure not found"):
        compare.per_query(tmp_path / "a", "mrr@10")
