# run.py -------------------------------------------------------------------------------------------------------------

import run


def beir_folder(folder: Path, n: int = 120, seed: int = 0) -> Path:
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
    data_folder, out = beir_folder(tmp_path / "data"), tmp_path / "run"
    command = ["--data", str(data_folder), "--out", str(out), *TINY]
    assert run.main(command) == 0
    printed = capsys.readouterr().out
    assert "120 passages, 90 training queries (60 labelled), 30 held-out queries" in printed
    rows = json.loads((out / "metrics.json").read_text())
    assert [(r["system"], r["iteration"]) for r in rows] == [("bm25", 0), ("student", 0), ("pointwise", 0), ("pairwise", 0), ("student", 1)]
    assert all(0 <= r[m] <= 1 for r in rows for m in run.METRICS)
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
    assert "another configuration" in message and "lr (" in message


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
    change(beir_folder(tmp_path / "data"))
    assert says in refused(capsys, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *TINY)


def test_no_training_queries_are_refused(tmp_path, capsys):
    folder = beir_folder(tmp_path / "data")
    (folder / "qrels" / "train.tsv").unlink()
    kept = [line for line in (folder / "queries.jsonl").read_text().splitlines() if int(json.loads(line)["_id"][1:]) % 4 == 0]
    (folder / "queries.jsonl").write_text("\n".join(kept))
    assert "no training queries" in refused(capsys, "--data", str(folder), "--out", str(tmp_path / "run"), *TINY)


def test_a_model_that_cannot_be_loaded_is_refused_with_the_way_to_work_offline(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(capsys, "--data", str(beir_folder(tmp_path / "data")), "--out", str(tmp_path / "run"),
                      "--student", "nobody/nothing", *TINY)
    assert "nobody/nothing" in message and "no network" in message and len(message.splitlines()) == 1


def test_more_gpus_than_there_are_is_refused_with_their_number(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "has 1 CUDA device" in refused(capsys, "--gpus", "2")


@pytest.mark.parametrize("flags, says", [(["--kept", "200"], "--kept 200"), (["--pair-reduction", "max"], "mean or sum"),
                                         (["--batch", "0"], "--batch 0"), (["--split", "dev"], "--split dev")])
def test_a_flag_out_of_range_is_refused_by_name(tmp_path, capsys, flags, says):
    assert says in refused(capsys, "--data", str(beir_folder(tmp_path / "data")), "--out", str(tmp_path / "run"), *TINY, *flags)


def test_ctrl_c_stops_all_ranks_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, str(HERE / "run.py"), "--data", str(beir_folder(tmp_path / "data")), "--out",
               str(tmp_path / "run"), "--gpus", "2", *TINY, "--base-steps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                               env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    for line in process.stdout:
        if line.startswith("iteration 0"):
            break
    time.sleep(5)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130 and "the same command goes on" in output and "Traceback" not in output
    with pytest.raises(ProcessLookupError):  # no rank is left
        os.killpg(process.pid, 0)
