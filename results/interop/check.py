"""Our students opened by colbert-ai, PyLate and sentence-transformers, and theirs by us: the largest difference of any number.

    python results/interop/check.py --encoder FOLDER [--pylate PYTHON] [--sentence-transformers PYTHON] [--colbert PYTHON]

PYTHON is the interpreter of an environment in which that library is installed; each named one is checked (they want different
versions of transformers, and none of them is needed otherwise). FOLDER is a BERT-like encoder such as all-MiniLM-L6-v2.
Writes check.json, where the rows of a library that is not named stay: one for each direction, library and kind of student.
`queries` and `passages` are the largest absolute difference between two embeddings of the same token, in float32, over TEXTS;
`vectors` is how many were compared. Where the two disagree on how many tokens a text has, or a library does not open the
folder, `error` says so. Ends with 1 if a row has one or is above 1e-4.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pairdistill import Student

ALLOWED = 1e-4
TEXTS = ["", " ", ".", "?!, .", "...", "-- (!) --", "#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "a", "What is late interaction?",
         "who wrote the origin of species", "PairDistill: Pairwise Relevance Distillation for Dense Retrieval",
         "state-of-the-art, e.g. U.S.A.'s 3.5% (2024)", "Ünïcödé, naïve café, Åse Østergård", "Zażółć gęślą jaźń",
         "日本語の文章です。", "中文 mixed with English，full-width！", "Привет, мир!", "مرحبا بالعالم", "👩‍🔬 emoji 🚀 and \u200bzero width",
         "e\u0301 combining", "tabs\tand\nnew lines\r\n", "   leading and trailing   ", "[MASK] and [SEP] written out", "[Q] what [D]",
         "UPPER lower MiXeD", "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis", "x" * 300,
         "word " * 31, "word " * 29, "long " * 400, "many, many; commas. " * 90, "the cat sat on the mat. " * 60]
OURS = {  # kind of student: from_pretrained's arguments
    "markers, expansion": dict(),
    "markers": dict(query_expansion=False, query_length=48),
    "expansion": dict(markers=False),
    "neither": dict(markers=False, query_expansion=False, passage_length=300),
    "neither, no projection": dict(markers=False, query_expansion=False, dim=None),
    "dpr": dict(architecture="dpr", dim=None, query_length=64, passage_length=64),
    "dpr, projected": dict(architecture="dpr", dim=128, query_length=64, passage_length=64),
}

# What runs in the other environments: make(encoder, kind) -> model for each kind in KINDS, load(folder), save(model, folder),
# encode(model, texts, query) -> a list of arrays [tokens, E].
PYLATE = """
from pylate import models
KINDS = {"as PyLate makes it": {}, "attends to [MASK]s": dict(attend_to_expansion_tokens=True, query_length=24),
         "no prefix, no expansion": dict(query_prefix="", document_prefix="", do_query_expansion=False, query_length=48,
                                         document_length=300, skiplist_words=["the", "."])}
make = lambda encoder, kind: models.ColBERT(encoder, device="cpu", **KINDS[kind])
load = lambda folder: models.ColBERT(folder, device="cpu")
save = lambda model, folder: model.save_pretrained(folder)
encode = lambda model, texts, query: model.encode(texts, is_query=query, batch_size=7, show_progress_bar=False)
"""
SENTENCE_TRANSFORMERS = """
import string
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
KINDS = ["as sentence-transformers makes it", "expansion and skiplist", "dense"]
def make(encoder, kind):
    if kind == "dense":
        return SentenceTransformer(encoder, device="cpu")
    model = MultiVectorEncoder(encoder, device="cpu")
    if kind == "expansion and skiplist":
        model[0].query_expansion = {"strategy": "fixed", "attend": True, "length": 32}
        model[0].document_length = 180
        model[2].skiplist_words = list(string.punctuation)
        model[2].resolve_with_tokenizer(model.tokenizer)
    return model
def load(folder):
    dense = json.load(open(folder + "/config_sentence_transformers.json"))["model_type"] == "SentenceTransformer"
    return (SentenceTransformer if dense else MultiVectorEncoder)(folder, device="cpu")
save = lambda model, folder: model.save_pretrained(folder)
def encode(model, texts, query):
    said = (model.encode_query if query else model.encode_document)(texts, batch_size=7, convert_to_numpy=True)
    return [v[None] for v in said] if isinstance(model, SentenceTransformer) else said
"""
COLBERT = """
from colbert.infra import ColBERTConfig
from colbert.modeling.checkpoint import Checkpoint
KINDS = {"as colbert-ai makes it": {}, "attends to [MASK]s": dict(attend_to_mask_tokens=True, query_maxlen=24, doc_maxlen=300)}
make = lambda encoder, kind: Checkpoint(encoder, ColBERTConfig(**{"checkpoint": encoder, **KINDS[kind]}), verbose=0)
load = lambda folder: Checkpoint(folder, ColBERTConfig(), verbose=0)
save = lambda model, folder: model.save(folder)
def encode(model, texts, query):
    return list(model.queryFromText(texts)) if query else model.docFromText(texts, bsize=7, keep_dims=False)[0]
"""
DRIVER = """
import json, os, sys, traceback
import numpy as np, torch
exec(sys.argv[1])
jobs, texts, encoder, ours = json.loads(sys.argv[2])
def write(model, out):
    np.savez(out, **{f"{side}{n}": np.asarray(v, np.float32) for side in "qd"
                     for n, v in enumerate(encode(model, texts, side == "q"))})
def attempt(out, job):
    try:
        torch.manual_seed(0)
        job()
    except Exception as e:
        traceback.print_exc()
        open(out + ".error", "w").write(f"{type(e).__name__}: {e}"[:300])
for folder in jobs:
    attempt(folder + ".theirs", lambda: write(load(folder), folder + ".theirs.npz"))
for n, kind in enumerate(KINDS):
    def job():
        model = make(encoder, kind)
        save(model, f"{ours}{n}")
        write(model, f"{ours}{n}.theirs.npz")
    attempt(f"{ours}{n}.theirs", job)
import importlib.metadata as m
print(json.dumps({"kinds": list(KINDS), "versions": {p: m.version(p) for p in
      ("pylate", "sentence-transformers", "colbert-ai", "transformers", "torch") if any(d.name == p for d in m.distributions())}}))
"""
LIBRARIES = {"pylate": PYLATE, "sentence-transformers": SENTENCE_TRANSFORMERS, "colbert": COLBERT}


@torch.no_grad()
def embeddings(student: Student, path: Path) -> None:
    q, q_mask = student.encode_queries(TEXTS)
    d, offsets = student.encode_passages(TEXTS)
    np.savez(path, **{f"q{n}": q[n][q_mask[n]].numpy() for n in range(len(TEXTS))},
             **{f"d{n}": d[offsets[n]:offsets[n + 1]].numpy() for n in range(len(TEXTS))})


def difference(folder: str, unit: bool = False) -> dict:
    """FOLDER.ours.npz against FOLDER.theirs.npz; unit: vectors are brought to length 1 first."""
    if (error := Path(f"{folder}.theirs.error")).exists():
        return {"error": error.read_text()}
    ours, theirs, row = np.load(f"{folder}.ours.npz"), np.load(f"{folder}.theirs.npz"), {"vectors": 0}
    for side, name in (("q", "queries"), ("d", "passages")):
        row[name] = 0.0
        for n, text in enumerate(TEXTS):
            a, b = ours[f"{side}{n}"], theirs[f"{side}{n}"]
            if a.shape != b.shape:
                return {"error": f"{name[:-1]} {text[:30]!r}: shape {a.shape} here and {b.shape} there"}
            if unit:
                a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
            row[name] = max(row[name], float(np.abs(a - b).max(initial=0)))
            row["vectors"] += len(a)
    return row


def check(library: str, python: str, encoder: str) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        kinds = [kind for kind in OURS if library == "sentence-transformers" or "dpr" not in kind]
        kinds = kinds[:1] if library == "colbert" else kinds  # it has no word for another: it always marks and expands
        folders = [f"{tmp}/ours{n}" for n in range(len(kinds))]
        for folder, kind in zip(folders, kinds):
            student = Student.from_pretrained(encoder, **OURS[kind])
            student.save_pretrained(folder)
            embeddings(student, Path(f"{folder}.ours.npz"))
        done = subprocess.run([python, "-c", DRIVER, LIBRARIES[library], json.dumps([folders, TEXTS, encoder, f"{tmp}/theirs"])],
                              stdout=subprocess.PIPE, text=True, check=True, cwd=tmp)
        said = json.loads(done.stdout.strip().splitlines()[-1])
        for folder, kind in zip(folders, kinds):
            rows.append(dict(direction="ours, loaded by them", library=library, kind=kind, **difference(folder)))
        for n, kind in enumerate(said["kinds"]):
            folder = f"{tmp}/theirs{n}"
            row = dict(direction="theirs, loaded by us", library=library, kind=kind)
            if not Path(f"{folder}.theirs.error").exists():
                # A dense encoder's own lengths and normalisation are not a student's: it scores by the dot product.
                more = dict(architecture="dpr", dim=None, query_length=256, passage_length=256) if kind == "dense" else {}
                embeddings(Student.from_pretrained(folder, **more), Path(f"{folder}.ours.npz"))
            rows.append(row | difference(folder, unit=kind == "dense"))
    for row in rows:
        print(json.dumps(row), flush=True)
    return [row | {"versions": said["versions"]} for row in rows]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", required=True)
    p.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    for library in LIBRARIES:
        p.add_argument(f"--{library}", metavar="PYTHON")
    a = p.parse_args()
    out, rows = Path(a.out), []
    old = json.loads(out.read_text())["rows"] if out.exists() else []
    for library in LIBRARIES:
        python = getattr(a, library.replace("-", "_"))
        rows += check(library, python, str(Path(a.encoder).resolve())) if python else [r for r in old if r["library"] == library]
    out.write_text(json.dumps({"texts": len(TEXTS), "allowed": ALLOWED, "rows": rows}, indent=1))
    sys.exit(any("error" in row or max(row["queries"], row["passages"]) > ALLOWED for row in rows))
