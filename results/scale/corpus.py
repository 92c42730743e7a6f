"""What it costs to open a corpus of MS MARCO's size, made here: python results/scale/corpus.py --out results/scale/corpus.json

Makes a BEIR folder of 8.8 million passages of random words (3 GB), converts it once, and then opens it in several processes at
a time, as the ranks of a run do. Each resolves the judged passages and reads 200,000 others, in random order. In MB, beyond
what Python and numpy took before: peak, the most that a process has held; rss and pss (which counts a page that n processes
share as 1/n) in the end. opens_s: the collection is there, its 100,000 judgements read; reads_s: of the 200,000 passages.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HOME = Path(__file__).resolve().parents[2]

READER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import numpy as np, data
def held(name, file="smaps_rollup"):
    return int(next(l for l in open(f"/proc/self/{file}") if l.startswith(name + ":")).split()[1]) / 1e3
rss, pss, start = held("Rss"), held("Pss"), time.perf_counter()
corpus = data.load_collection(sys.argv[1])
number = corpus.judged_positions()
opened, start = time.perf_counter() - start, time.perf_counter()
assert all(corpus.passage_ids[n] == p for p, n in list(number.items())[::100])
for n in np.random.default_rng().integers(0, len(corpus.passages), 200_000):
    corpus.passages[n]
print(json.dumps(dict(opens_s=opened, reads_s=time.perf_counter() - start, peak=held("VmHWM", "status") - rss, rss=held("Rss") - rss,
                      pss=held("Pss") - pss)), flush=True)
sys.stdin.read()  # the others are to be counted beside it
"""


def make(folder: Path, n: int) -> None:
    """n passages of about 56 words, as MS MARCO's have, and 100,000 queries with a judged passage each."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("etaoinshrdlu"), size)) for size in draw.integers(2, 10, 30_000)]
    phrases = [" ".join(words[int(w)] for w in draw.zipf(1.2, 14) % len(words)) for _ in range(20_000)]
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w") as file:
        for first in range(0, n, 100_000):
            rows = draw.integers(0, len(phrases), (min(100_000, n - first), 4)).tolist()
            file.writelines(f'{{"_id": "{first + i}", "title": "", "text": "{first + i} {phrases[a]} {phrases[b]} {phrases[c]} {phrases[d]}"}}\n'
                            for i, (a, b, c, d) in enumerate(rows))
    judged = draw.integers(0, n, 100_000).tolist()
    (folder / "queries.jsonl").write_text("".join(f'{{"_id": "q{q}", "text": "{phrases[q % 20_000]}"}}\n' for q in range(len(judged))))
    (folder / "qrels" / "train.tsv").write_text("".join(f"q{q}\t{p}\t1\n" for q, p in enumerate(judged)))


def readers(folder: Path, n: int) -> list[dict]:
    processes = [subprocess.Popen([sys.executable, "-c", READER, str(folder), str(HOME)], text=True, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE) for _ in range(n)]
    said = [json.loads(process.stdout.readline()) for process in processes]
    for process in processes:
        process.communicate("")
    return [{k: round(v, 3 if k.endswith("_s") else 0) for k, v in one.items()} for one in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=8_800_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the corpus is made, or lies already; default: a temporary one")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder, start = args.folder or Path(temporary) / "corpus", time.perf_counter()
        if not folder.exists():
            make(folder, args.passages)
        made = time.perf_counter() - start
        (first,) = readers(folder, 1)
        out = {"passages": args.passages, "corpus_gb": round((folder / "corpus.jsonl").stat().st_size / 1e9, 2),
               "made_s": round(made, 1), "first": first, "ranks": readers(folder, args.ranks)}
    print(json.dumps(out, indent=1))
    args.out.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
