# retrieve.py ---------------------------------------------------------------------------------------------------------

import json
import shutil
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import retrieve
from maxsim_kernel import maxsim
from retrieve import Index


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
    assert index.codes.shape == (len(d), 8) and index.lists.element_size() + index.order.element_size() == 6
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


def test_a_single_vector_student_keeps_its_norms_and_is_searched_by_dot_product(corpus, tmp_path):
    student = WordVectors(dpr=True)
    index = Index.build(student, corpus, tmp_path / "index")
    q, q_mask = student.encode_queries(random_texts(97, 8, seed=2))
    assert len(index.codes) == len(corpus) and q.shape[1] == 1
    scores, positions = index.search(q, 20, q_mask)
    exact_scores, exact_positions = index.search(q, 20, q_mask, exact=True)
    assert overlap(positions, exact_positions) > .95
    d, _ = student.encode_passages(corpus)
    decoded = index._decode(torch.arange(len(d)))
    assert (decoded - d).norm() < .3 * d.norm() and decoded.norm(dim=1).std() > .1
    torch.testing.assert_close(exact_scores, (q[:, 0] @ decoded.T).topk(20).values)


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
    (lambda f: (f / "order").unlink(), "damaged index: order has 0 bytes, expected"),
    (lambda f: (f / "manifest.json").write_text("{"), "not an index"),
    (lambda f: (f / "manifest.json").unlink(), "not an index"),
    (lambda f: edit_manifest(f, format=0), "format 0, expected 1"),
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


def test_the_command_line_takes_a_runs_newest_student(searchable, tmp_path, capsys, monkeypatch):
    command(searchable, "anything")
    for number in (2, 10):
        for part in ("student", "index"):
            shutil.copytree(searchable / part, tmp_path / f"iter{number}" / part)
    (tmp_path / "iter11" / "student").mkdir(parents=True)  # not finished
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
    command(searchable, "anything")
    student, index = str(searchable / "student"), str(searchable / "index")
    for words, message in [
        ([str(tmp_path / "none"), "what"], "not a run's folder"),
        ([str(tmp_path / "run"), "what"], "no finished iteration"),
        (["--student", str(tmp_path / "none"), "--data", str(other), "--index", index, "what"], "cannot load"),
        (["--student", student, "--data", str(tmp_path / "none"), "--index", index, "what"], str(tmp_path / "none")),
        (["--student", student, "--data", str(other), "--index", index, "what"], "another collection"),
        (["--student", student, "--data", str(searchable / "data"), "--index", index,
          "--queries", str(tmp_path / "bad.jsonl"), "--run", str(tmp_path / "out")], "bad.jsonl, line 2: expected"),
    ]:
        capsys.readouterr()
        assert retrieve.main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("retrieve.py: ") and message in error[-1]
    assert not (tmp_path / "out").exists()
    for words in ([], ["--student", student], ["run", "--queries", "file"], ["run", "what", "-k", "0"]):
        with pytest.raises(SystemExit) as exit_:
            retrieve.main(words)
        assert exit_.value.code == 2
