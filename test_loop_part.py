# pairdistill.py -----------------------------------------------------------------------------------------------------

from pairdistill import Batches, Student, fit, sample_pairs, scratch_encoder, train
from ranks import Ranks

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
        kept = [i for i in ids if i not in student.skiplist.tolist()]
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


@pytest.mark.parametrize("settings", [dict(), dict(architecture="dpr", dim=None), dict(query_expansion=False, dim=8)])
def test_a_saved_student_loads_as_it_was(encoder, tmp_path, settings):
    student = student_of(encoder, **settings)
    student.save_pretrained(tmp_path)
    again = Student.from_pretrained(str(tmp_path))
    assert again.settings == student.settings
    assert torch.equal(again.encode_queries(TEXTS[:3])[0], student.encode_queries(TEXTS[:3])[0])
    assert torch.equal(again.encode_passages(TEXTS[:3])[0], student.encode_passages(TEXTS[:3])[0])


def test_a_colbert_checkpoint_gives_its_projection(encoder, tmp_path):
    student = student_of(encoder, dim=24)
    student.save_pretrained(tmp_path)
    (tmp_path / "pairdistill.json").unlink()  # as the colbert-ai package leaves it
    assert torch.equal(Student.from_pretrained(str(tmp_path)).linear.weight, student.linear.weight)


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


@pytest.mark.parametrize("n, wanted, delta", [(16, 12, 4), (64, 50, 10), (5, 100, None), (3, 7, 2), (1, 5, 10), (64, 0, 10)])
def test_pairs_are_near_ordered_distinct_and_as_many_as_there_are(n, wanted, delta):
    pairs = sample_pairs(n, wanted, delta, torch.Generator().manual_seed(1))
    available = sum(1 for i in range(n) for j in range(i + 1, n) if delta is None or j - i < delta)
    assert pairs.shape == (min(wanted, available), 2) and len(set(map(tuple, pairs.tolist()))) == len(pairs)
    assert all(0 <= i < j < n and (delta is None or j - i < delta) for i, j in pairs.tolist())


def test_pairs_follow_the_seed():
    draw = lambda seed: sample_pairs(64, 50, 10, torch.Generator().manual_seed(seed)).tolist()
    assert draw(1) == draw(1) != draw(2)


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
    assert np.mean([t[0] for t in terms[-5:]]) < 0.5 * np.mean([t[0] for t in terms[:5]])
    assert terms == again and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_without_labels_there_is_no_contrastive_loss(encoder):
    examples = {**examples_of(), "positive": np.full(6, -1)}
    assert all(cl == 0 and kd > 0 for _, cl, kd, _ in train_a_little(encoder, examples)[1])


def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(encoder, tmp_path, monkeypatch):
    whole, terms = train_a_little(encoder, examples_of(), steps=8)
    import pairdistill
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


TWO_RANKS = """
import sys, torch, numpy as np
sys.path.insert(0, {here!r})
import ranks
from test_pairdistill import TEXTS, examples_of, train_a_little
me = ranks.init()
student, terms = train_a_little({encoder!r}, examples_of(), me, steps={steps})
if me.first:
    torch.save(dict(terms=terms, weights=[p.detach() for p in student.parameters()]), {out!r})
"""


def on_two_ranks(tmp_path, encoder: str, steps: int) -> dict:
    script, out = tmp_path / "two.py", tmp_path / "two.pt"
    script.write_text(TWO_RANKS.format(here=str(HERE), encoder=encoder, steps=steps, out=str(out)))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
                   check=True, capture_output=True, timeout=300)
    return torch.load(out, weights_only=True)


def test_one_step_on_two_ranks_has_the_losses_and_the_gradient_of_one_rank(encoder, tmp_path):
    one, terms = train_a_little(encoder, examples_of(), steps=5)
    two = on_two_ranks(tmp_path, encoder, 5)
    assert np.allclose(two["terms"], terms, atol=1e-5, rtol=1e-5)  # of later steps too: the gradients agreed
    for a, b in zip(one.parameters(), two["weights"]):
        assert torch.allclose(a, b, atol=1e-4)


# teachers.py --------------------------------------------------------------------------------------------------------

import teachers


@pytest.fixture(scope="module")
def trained_teachers(encoder, tmp_path_factory) -> tuple[str, str]:
    """Both roles, trained to prefer the passage that holds the query's word."""
    folder, words = tmp_path_factory.mktemp("teachers"), "cat dogs bird fish fox feather".split()
    groups = [(w, t, [x for x in TEXTS[:6] if x != t]) for w, t in zip(words, TEXTS[:6])]
    common = dict(steps=60, batch=6, lr=3e-3, query_length=8, passage_length=20)
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
    together = teachers.load_pointwise(trained_teachers[0]).score(items)
    teacher = teachers.load_pointwise(trained_teachers[0])
    teacher.batch_tokens = 1
    tolerance = 1e-5 if not torch.cpu._is_avx512_bf16_supported() else 3e-2
    assert np.allclose(together, teacher.score(items), atol=tolerance, rtol=tolerance)


def test_asking_both_orders_makes_a_swapped_pair_exactly_one_minus_p(trained_teachers):
    teacher = teachers.load_pairwise(trained_teachers[1])
    items = [("cat", a, b) for a in TEXTS[:6] for b in TEXTS[:6] if a != b]
    p, swapped = teacher.prefer(items), teacher.prefer([(q, b, a) for q, a, b in items])
    assert (swapped == 1 - p).all() and ((0 <= p) & (p <= 1)).all()
    one = teachers.load_pairwise(trained_teachers[1], orders="one")
    assert np.allclose(one.prefer(items), teacher.ask(items)[:, 0])


def test_match_types_mark_the_words_that_stand_on_both_sides(encoder):
    reader = teachers._new_classifier(encoder, torch.device("cpu"), 0, 8, 20)
    (ids, segments), = reader.sequences([("cat bird", "the cat sat", "a bird sings")])
    types = reader._match_types(torch.tensor([ids]), torch.tensor([segments]))[0].tolist()
    words = reader.tokenizer.convert_ids_to_tokens(ids)
    of = {(w, s): t for w, s, t in zip(words, segments, types)}
    assert of["cat", 0] == 1 and of["bird", 0] == 2 and of["cat", 1] == 5 and of["bird", 2] == 9
    assert of["[CLS]", 0] == 0 and of["[SEP]", 1] == 4 and of["[SEP]", 2] == 8


def test_a_score_is_asked_once(trained_teachers, tmp_path, monkeypatch):
    items = [("cat", t) for t in TEXTS[:6]]
    first = teachers.load_pointwise(trained_teachers[0], cache=teachers.Cache(tmp_path)).score(items)
    with open(tmp_path / "rank0.scores", "ab") as f:
        f.write(b"half a row")  # as a killed process leaves it
    cache = teachers.Cache(tmp_path, rank=0)
    teacher = teachers.load_pointwise(trained_teachers[0], cache=cache)
    monkeypatch.setattr(teacher, "_compute", lambda *_: pytest.fail("asked again"))
    assert (teacher.score(items) == first).all() and cache.found == cache.asked == 6
    monkeypatch.undo()
    assert len(teacher.score(items + [("dogs", TEXTS[0])])) == 7 and len(cache.rows) == 7
    # Another rank reads what this one wrote; another teacher finds nothing.
    assert not np.isnan(teachers.Cache(tmp_path, rank=1).get(cache.keys(teacher.identity, items))).any()
    assert np.isnan(cache.get(cache.keys("another", items))).all()


def test_a_t5_teacher_reads_true_minus_false_of_one_decoder_step(tmp_path):
    """The prompt reader against plain transformers calls, on a tiny random T5 with a vocabulary trained here."""
    import sentencepiece
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer
    (tmp_path / "text").write_text("\n".join(TEXTS * 5 + ["Query Document Document0 Document1 Relevant true false : 0 1"] * 9))
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"),
                                             vocab_size=110, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
                                             user_defined_symbols=["▁true", "▁false"], minloglevel=2)
    tokenizer = T5Tokenizer(str(tmp_path / "spiece.model"), extra_ids=0)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=64, num_layers=1, num_heads=2,
                                                d_kv=16, decoder_start_token_id=0)).eval()
    reader = teachers.Prompted(model, tokenizer, "pairwise", "t5", max_length=60)
    pairs = [("cat", TEXTS[0], TEXTS[1]), ("birds sing", TEXTS[2], TEXTS[5])]
    scores = teachers.Teacher(reader, "tiny").logits(pairs)
    true, false = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("true", "false"))
    for score, (q, a, b) in zip(scores, pairs):
        ids = tokenizer(f"Query: {q} Document0: {a} Document1: {b} Relevant:", return_tensors="pt")
        with torch.inference_mode():
            logits = model(**ids, decoder_input_ids=torch.tensor([[0]])).logits[0, -1]
        assert abs(score - float(logits[true] - logits[false])) < (1e-5 if not torch.cpu._is_avx512_bf16_supported() else 0.05)
    long, = reader.sequences([("cat", TEXTS[4] * 9, TEXTS[5] * 9)])
    end = tokenizer("Relevant:", add_special_tokens=True)["input_ids"]
    assert len(long[0]) <= 60 and long[0][-len(end):] == end  # passages are cut, never the end of the prompt
