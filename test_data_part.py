# data.py -------------------------------------------------------------------------------------------------------------

import gzip
import hashlib
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data

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
    assert collection.passage_ids == ["d1", "d2"] and collection.passages == ["Paths join them", "other"]
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


def test_ir_datasets_subsets_become_splits(monkeypatch):
    fake = type(sys)("ir_datasets")
    passages = [FakeText("d1", "title text "), FakeText("d2", "other")]
    fake.registry = {
        "set": FakeSet(passages),
        "set/train": FakeSet(passages, [FakeText("q1", "one"), FakeText("q2", "two")], [FakeQrel("q1", "d1", 1)]),
        "set/dev": FakeSet(passages, [FakeText("q4", "the large one")], [FakeQrel("q4", "d2", 1)]),
        "set/dev/small": FakeSet(passages, [FakeText("q3", "three")], [FakeQrel("q3", "d2", 2)]),
        "nopassages": FakeSet(),
    }
    fake.load = fake.registry.__getitem__
    monkeypatch.setitem(sys.modules, "ir_datasets", fake)
    collection = data.load_collection("ir_datasets:set")
    assert collection.passages == ["title text", "other"]
    assert collection.queries == {"q1": "one", "q2": "two", "q3": "three"}
    assert collection.qrels == {"train": {"q1": {"d1": 1}}, "dev": {"q3": {"d2": 2}}}
    assert data.load_collection("ir_datasets:set/train").qrels == {"train": {"q1": {"d1": 1}}}
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
