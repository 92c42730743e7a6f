"""retrieve.py against exact search and, in the same run and on the same embeddings, PyLate's PLAID index.

    python results/retrieval/measure.py --student FOLDER --data SPEC --split test [--sizes 1000 10000 100000]
        [--queries 300] [--architecture dpr] [--seeds 3] [--plaid PYTHON] --out results/retrieval/NAME.json
    python results/retrieval/measure.py --predict results/retrieval/medquad*.json --out results/retrieval/prediction.json
                                                                       # MS MARCO's size, from the growth seen

One row for each size and engine. A size above the collection's is reached by perturbed copies of its passages: each token
is mixed with a token of another passage, so that it stays near the real ones, at a cosine of about .9 from its own. PYTHON
is the interpreter of an environment in which `pylate` is installed (nothing of it is needed otherwise).

recall: of the best 100 passages by exact MaxSim on the uncoded embeddings. nDCG@10: where all passages are real.
one_ms: median of one query at a time, for the best 10, encoding aside; recall@10: these queries' share of the exact best
10. q/s: all queries in one call, for the best 100.
build tokens/s: training of the tables, coding and writing, past encoding. gb: the most memory held while building, beyond
what the process (which keeps all embeddings) held before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import retrieve
from data import evaluate, load_collection
from pairdistill import Student

DEPTH, ONES = 100, 50  # passages of a recall, and queries that are timed one by one


class Stored:
    """Stands where the student does: hands out embeddings that are there already, and counts the seconds it took."""

    def __init__(self, d: torch.Tensor, offsets: torch.Tensor):
        self.d, self.offsets, self.seconds, self.device = d, offsets, 0.0, torch.device("cpu")

    def encode_passages(self, numbers: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.perf_counter()
        number = torch.tensor([int(n) for n in numbers], dtype=torch.int64)
        real, copy = number % (len(self.offsets) - 1), number // (len(self.offsets) - 1)
        lengths = self.offsets[real + 1] - self.offsets[real]
        d = self.d[retrieve._ragged(self.offsets[real], lengths)].float()
        copied = copy.repeat_interleave(lengths) > 0
        other = torch.from_numpy(np.random.default_rng(int(number.sum())).integers(0, len(self.d), int(copied.sum())))
        mixed = .9 * d[copied] + .45 * self.d[other].float()
        d[copied] = torch.nn.functional.normalize(mixed, dim=1)
        self.seconds += time.perf_counter() - start
        return d, retrieve._bounds(lengths).int()


def peak_gb(reset: bool = False) -> float:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def one_by_one(search, q: torch.Tensor, mask: torch.Tensor, exact: torch.Tensor) -> dict:
    times, recalls = [], []
    for n in range(min(ONES, len(q)) + 3):  # the first three are a warm-up
        n, start = n % len(q), time.perf_counter()
        found = search(q[n:n + 1, :int(mask[n].sum())], 10, mask[n:n + 1, :int(mask[n].sum())])[1]
        times.append(time.perf_counter() - start)
        recalls.append(float(np.isin(exact[n, :10], found).mean()))
    return {"one_ms": 1e3 * float(np.median(times[3:])), "recall@10": float(np.mean(recalls[3:]))}


def measure(student: Stored, q: torch.Tensor, mask: torch.Tensor, n: int, ndcg, plaid: str | None, seeds: int = 1) -> list[dict]:
    rows, numbers = [], [str(i) for i in range(n)]

    def truth(q, k, mask):
        best = retrieve._Best(q, mask, k)
        for first in range(0, n, retrieve.BLOCK):
            d, offsets = student.encode_passages(numbers[first:first + retrieve.BLOCK])
            best.add(d, offsets, first)
        return best.scores, best.positions

    def row(engine: str, found: torch.Tensor, exact: torch.Tensor, seconds: float, **more) -> None:
        recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found)]))
        rows.append({"passages": n, "engine": engine, "recall@100": recall, "nDCG@10": ndcg(found, n),
                     "q/s": len(q) / seconds, **more})
        print(json.dumps(rows[-1]), flush=True)

    def timed(search) -> tuple[torch.Tensor, float]:
        start, before = time.perf_counter(), student.seconds
        found = search(q, min(DEPTH, n), mask)[1]
        return found, time.perf_counter() - start - (student.seconds - before)

    exact, seconds = timed(truth)
    row("exact, not coded", exact, exact, seconds, bytes_per_token=4.0 * q.shape[2])

    def indexed(folder: str, seed: int) -> None:
        before, student.seconds, start = peak_gb(reset=True), 0.0, time.perf_counter()
        retrieve.Index.build(student, numbers, Path(folder) / "index", seed=seed)
        build = time.perf_counter() - start - student.seconds
        gb, start = peak_gb() - before, time.perf_counter()
        index = retrieve.Index.load(Path(folder) / "index")
        same = {"seed": seed, "tokens": len(index.codes), "lists": len(index.centroids), "build_s": build,
                "build tokens/s": len(index.codes) / build, "bytes_per_token": index.bytes_per_token, "gb": gb}
        opened = 1e3 * (time.perf_counter() - start)
        one = one_by_one(index.search, q, mask, exact)
        found, seconds = timed(index.search)
        row("index", found, exact, seconds, **same, open_ms=opened, **one)
        found, seconds = timed(lambda q, k, mask: index.search(q, k, mask, exact=True))
        row("index, exact=True", found, exact, seconds, seed=seed, tokens=len(index.codes))

    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            indexed(folder, seed)
    if plaid:
        with tempfile.TemporaryDirectory() as folder:
            d, offsets = student.encode_passages(numbers)
            np.savez(Path(folder) / "in.npz", d=d.half().numpy(), offsets=offsets.numpy(), q=q.numpy(), mask=mask.numpy())
            subprocess.run([plaid, "-c", PLAID, folder, str(DEPTH), str(ONES)], check=True)
            said = json.loads((Path(folder) / "out.json").read_text())
            row("PLAID (PyLate)", torch.from_numpy(np.load(Path(folder) / "found.npy")), exact, said.pop("batch_s"),
                tokens=len(d), bytes_per_token=said.pop("bytes") / len(d), **said, **{"build tokens/s": len(d) / said["build_s"]})
    return rows


PLAID = """
import json, sys, time
from pathlib import Path
import numpy as np, torch
from pylate import indexes, retrieve
folder, depth, ones = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
z = np.load(folder / "in.npz")
d, offsets, q = z["d"].astype(np.float32), z["offsets"], [a[m] for a, m in zip(z["q"].astype(np.float32), z["mask"])]
start = time.perf_counter()
index = indexes.PLAID(str(folder), "plaid", override=True, show_progress=False)
index.add_documents([str(n) for n in range(len(offsets) - 1)], [torch.from_numpy(x) for x in np.split(d, offsets[1:-1])])
build = time.perf_counter() - start
search = retrieve.ColBERT(index=index)
ask = lambda q, k: search.retrieve(queries_embeddings=[torch.from_numpy(x) for x in q], k=k)
times = []
for x in (q[:3] + q)[:ones + 3]:
    start = time.perf_counter(); ask([x], 10); times.append(time.perf_counter() - start)
start = time.perf_counter(); found = ask(q, depth); batch = time.perf_counter() - start
rows = np.full((len(q), min(depth, len(offsets) - 1)), -1)
for row, hits in zip(rows, found):
    row[:len(hits)] = [int(hit["id"]) for hit in hits][:len(row)]
np.save(folder / "found.npy", rows)
size = sum(p.stat().st_size for p in (folder / "plaid").rglob("*") if p.is_file())
(folder / "out.json").write_text(json.dumps({"build_s": build, "one_ms": 1e3 * float(np.median(times[3:])), "batch_s": batch,
                                             "bytes": size}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student")
    parser.add_argument("--data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="default: the whole collection")
    parser.add_argument("--queries", type=int, default=300, help="the first so many of the split (default: 300)")
    parser.add_argument("--architecture", default="colbert", help="or dpr: one vector of the encoder's width")
    parser.add_argument("--seeds", type=int, default=1, help="indexes, each by another seed")
    parser.add_argument("--plaid", metavar="PYTHON", help="where `pylate` is installed; measured at the collection's own size")
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help="an .npz that keeps them for the next time")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--predict", type=Path, nargs="+", metavar="FILE")
    args = parser.parse_args()
    if not args.out or not (args.predict or args.student and args.data):
        parser.error("--out and either --predict, or --student and --data, are needed")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.predict:
        args.out.write_text(json.dumps(rows := predict(args.predict), indent=1))
        return print(*(f"{r['cost']:<28}{r['value']:10.1f} {r['unit']:<6} (tokens^{r['power']:.2f})" for r in rows), sep="\n")
    collection, student = load_collection(args.data), load_student(args.student, args.architecture)
    speed = encoding_speed(student, collection.passages[:512])
    qids = list(collection.qrels[args.split])[:args.queries]
    if args.embeddings and args.embeddings.exists():
        z = {name: torch.from_numpy(array) for name, array in np.load(args.embeddings).items()}  # made by encode before
    else:
        z = encode(student, collection.passages, [collection.queries[qid] for qid in qids])
        if args.embeddings:
            np.savez(args.embeddings, **{name: tensor.numpy() for name, tensor in z.items()})
    q, mask, real = z["q"][:len(qids)].float(), z["mask"][:len(qids)], len(z["offsets"]) - 1

    def ndcg(found: torch.Tensor, n: int) -> float | None:
        if n != real:
            return None
        run = {qid: {collection.passage_ids[p]: float(-rank) for rank, p in enumerate(row) if p >= 0}
               for qid, row in zip(qids, found.tolist())}
        return evaluate(run, {qid: collection.qrels[args.split][qid] for qid in qids}, ["nDCG@10"])["nDCG@10"]

    rows = [row for n in args.sizes or [real] for row in measure(Stored(z["d"], z["offsets"]), q, mask, n, ndcg,
                                                                  args.plaid if n == real else None, args.seeds)]
    out = {"data": Path(args.data).name, "threads": torch.get_num_threads(), "queries": len(qids),
           "query tokens": float(mask.sum(1).float().mean()), "encode tokens/s": speed, "rows": rows}
    args.out.write_text(json.dumps(out, indent=1))


TOKENS, QUERIES = 6.0e8, 800_000  # MS MARCO's: ColBERT counts 600 million tokens in its 8.8 million passages


def predict(files: list[Path]) -> list[dict]:
    """Fits cost = a tokens^power to each index of 10,000 passages and more -> what it is at MS MARCO's size."""
    said = [json.loads(file.read_text()) for file in files]
    rows = [row for one in said for row in one["rows"] if row["engine"] == "index" and row["passages"] >= 10_000]
    tokens = np.log([row["tokens"] for row in rows])
    speed = np.mean([one["encode tokens/s"] for one in said])
    out = [{"cost": "encode", "value": TOKENS / speed / 3600, "unit": "hours", "power": 1.0}]
    for name, cost, scale, unit in (("build", lambda r: r["build_s"], 1 / 3600, "hours"),
                                    ("best 100 of 800,000 queries", lambda r: 1 / r["q/s"], QUERIES / 3600, "hours"),
                                    ("one query", lambda r: r["one_ms"], 1, "ms"),
                                    ("disk", lambda r: r["bytes_per_token"] * r["tokens"], 1e-9, "GB"),
                                    ("memory while building", lambda r: r["gb"], 1, "GB")):
        power, a = np.polyfit(tokens, np.log([cost(row) for row in rows]), 1)
        out.append({"cost": name, "value": scale * np.exp(a + power * np.log(TOKENS)), "unit": unit, "power": power})
    return out


def load_student(name: str, architecture: str = "colbert") -> Student:
    return Student.from_pretrained(name, architecture, dim=128 if architecture == "colbert" else None, query_length=64,
                                   passage_length=180, query_expansion=False, markers=False, seed=0).eval()


@torch.inference_mode()
def encoding_speed(student: Student, passages: list[str]) -> float:
    start = time.perf_counter()
    return len(retrieve._encode(student, passages)[0]) / (time.perf_counter() - start)


@torch.inference_mode()
def encode(student: Student, passages, queries: list[str]) -> dict[str, torch.Tensor]:
    parts = []
    for first in range(0, len(passages), retrieve.BLOCK):
        parts.append(retrieve._encode(student, passages[first:first + retrieve.BLOCK]))
        print(f"encoded {first + len(parts[-1][1]):,} of {len(passages):,} passages", file=sys.stderr)
    q, mask = retrieve._encode_queries(student, queries)
    return {"d": torch.cat([d for d, _ in parts]), "offsets": retrieve._bounds(torch.cat([n for _, n in parts])),
            "q": q.half(), "mask": mask}


if __name__ == "__main__":
    main()
