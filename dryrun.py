"""`python run.py … --dry-run`: what a run would do, and what it would take. Nothing is written into its --out.

Speed is not guessed: the real loop makes one iteration with a small part of the collection, twice, in a folder of its own,
with the same models (or models of the same shape, where they are not trained yet), batches, lengths and ranks. A stage's
time is taken as the line through its two small sizes, at its real size: a part that every run pays (loading a model) and a
part for each passage, query, question or step.

Searching is no line in the passages, and its speed is what the small index says of itself: up to some half a million tokens
all passages are compared, and from there on its time grows with the power LISTED of the collection, as results/retrieval measured it
from 10,000 to 100,000 passages. Not counted are reading the collection and BM25's index of it.
"""
from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data import Collection, save_collection

ALL_COMPARED = 500_000  # tokens of a collection whose passages are all compared with a query
LISTED = .66  # a search's time grows with this power of a larger one: on a CPU, results/retrieval/prediction.json
SIZES = 1, 3  # of the two small runs: far enough apart that the first one's cold caches are little beside the difference


def amounts(c, passages: int, train: int, labelled: int, held_out: int) -> dict[str, tuple[int, str]]:
    """How much each stage has to do, as (number, unit), from a configuration and the counts of a collection."""
    train, k, orders = min(c.train_queries or train, train), min(c.retrieve_k, passages), 2 if c.orders == "both" else 1
    kept, depth = min(c.kept, k), min(c.rerank, c.eval_k, passages)
    window = min(c.delta or kept, kept)  # a pair (i, j) has 0 < j - i < window
    pairs = min(c.n_pairs, sum(kept - gap for gap in range(1, window)))
    compared = min(c.rerank_pairs, depth)
    queries = dict(evaluate=held_out, mine=min(labelled, c.teacher_queries * c.teacher_steps), retrieve=train)
    steps = {"student": c.base_steps, "encoder": c.encoder_steps, "fit-pointwise": c.teacher_steps,
             "fit-pairwise": c.teacher_steps, "train": c.steps}
    questions = dict(teachers=held_out * (depth + orders * compared * (compared - 1) // 2), pointwise=train * k,
                     pairwise=train * pairs * orders)
    return {"index": (passages, "passages"), **{k: (n, "queries") for k, n in queries.items()},
            **{k: (n, "steps") for k, n in steps.items()}, **{k: (n, "questions") for k, n in questions.items()}}


def part_of(run, f: int) -> Collection:
    """Some queries with their passages, filled up with passages evenly spaced over the collection."""
    c, data, number = run.config, run.data, run.number
    found = lambda q: any(grade > 0 and p in number for p, grade in run.qrels.get(q, {}).items())
    labelled = [q for q in run.train_ids if run.positives[q]]
    train = (labelled + [q for q in run.train_ids if not run.positives[q]])[:f * max(128, c.base_batch, c.batch)]
    qrels = {"train": {q: {data.passage_ids[p]: 1 for p in run.positives[q]} for q in train if run.positives[q]},
             c.split: {q: {p: g for p, g in run.qrels.get(q, {}).items() if p in number} for q in sorted(run.eval_ids, key=found, reverse=True)[:32 * f]}}
    qrels = {split: {q: {p: g for p, g in grades.items() if data.passages[number[p]].strip()} for q, grades in judged.items()}
             for split, judged in qrels.items()}  # a folder has no empty passages
    rows = {number[p]: 0 for judged in qrels.values() for grades in judged.values() for p in grades}
    wanted = min(f * 500, len(data.passages))
    for n in range(0, len(data.passages), max(1, len(data.passages) // wanted)):
        if len(rows) < wanted and data.passages[n].strip():
            rows.setdefault(n)
    queries = {q: data.queries[q] for q in [*train, *qrels[c.split]]}
    return Collection("part", [data.passage_ids[n] for n in sorted(rows)], [data.passages[n] for n in sorted(rows)], queries, qrels,
                      {q: data.answers[q] for q in queries if q in data.answers})


def small_run(run, folder: Path, f: int) -> tuple[dict, dict, dict]:
    """Runs one iteration of size f -> {stage: seconds}, {stage: (amount, unit)}, and the rest that was measured."""
    c, part = run.config, part_of(run, f)
    folder.mkdir()
    save_collection(part, folder / "data")
    made = {role: str(run.out / "teachers" / role) for role in ("pointwise", "pairwise") if run.done(f"iter0/fit-{role}")}
    if run.done("iter0/student"):
        made.update(student=str(run.out / "iter0" / "student"), base_steps=0)
    at_most = dict(base_steps=6 * f, encoder_steps=6 * f, teacher_steps=6 * f, steps=6 * f, rerank=20, rerank_pairs=4)
    at_most = {k: min(n, getattr(c, k)) for k, n in at_most.items()}
    small = dataclasses.replace(c, data=str(folder / "data"), out=str(folder / "run"), iters=min(c.iters, 1), eval_queries=0, warmup=0,
                                queries="", train_queries=min(f * c.batch, c.train_queries or len(run.train_ids)), **at_most | made)
    flags = [("--" if value is not False else "--no-") + name.replace("_", "-") + ("" if isinstance(value, bool) else f"={value}")
             for name, value in dataclasses.asdict(small).items() if value is not None]
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--preset=msmarco", *flags]  # which sets nothing else
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--dry-run: a small run to measure with ended with {done.returncode}: "
                         f"{(done.stderr.strip().splitlines() or ['no message'])[-1].removeprefix('error: ')}")
    log = [r for line in open(folder / "run" / "log.jsonl") if "stage" in (r := json.loads(line))]
    index = json.loads((folder / "run" / "iter0" / "index" / "manifest.json").read_text())
    labels = len(part.qrels["train"])
    train = [q for q in part.queries if q in part.qrels["train"] or q not in part.qrels[c.split]]
    return ({r["stage"]: r["seconds"] for r in log},  # of iteration 1 where there are two
            amounts(small, len(part.passages), len(train), labels, len(part.qrels[c.split])),
            dict(tokens=index["shapes"]["codes"][0] / len(part.passages), passages=len(part.passages),
                 queries_per_second=index["measured"]["queries_per_second"],
                 peak_gb=max(r["peak_gb"] for r in log), gpu_gb=max(r["gpu_gb"] for r in log)))


def size_of(*paths: Path) -> int:
    return sum(f.stat().st_size for path in paths for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())


def spell(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def dry_run(run, stages: list[str], row_of, ranks: int) -> None:
    """Prints what `run` would do on so many ranks in these stages, of which row_of gives the files."""
    c, started = run.config, time.time()
    print("settings: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in dataclasses.asdict(c).items() if v not in (None, "")))
    full = amounts(c, len(run.data.passages), len(run.train_ids), run.labelled, len(run.eval_ids))
    print(f"{c.data}: {len(run.data.passages):,} passages, {len(run.train_ids):,} training queries ({run.labelled:,} labelled), "
          f"{len(run.eval_ids):,} held-out queries\n")
    with tempfile.TemporaryDirectory() as folder:
        seconds, sizes, measured = zip(*(small_run(run, Path(folder, f"part{f}"), f) for f in SIZES))
        tokens, small = measured[1]["tokens"], Path(folder, f"part{SIZES[1]}", "run")
        compared = lambda passages: (min(passages * tokens, ALL_COMPARED) * max(passages * tokens / ALL_COMPARED, 1) ** LISTED)
        total = disk = arrays = 0
        for stage in stages:
            name, (writes, reads, _) = stage.split("/")[1], row_of(stage)
            (n, unit), (n_1, _), (n_2, _) = full[name], sizes[0][name], sizes[1][name]
            where = ", ".join(p for p in reads if (run.out / p).exists() or any(p in row_of(s)[0] for s in stages))
            line = f"{stage:<20}{n:>12,} {unit:<10}"
            if run.done(stage):
                print(f"{line} {'done before':>12}  {writes[0]}")
                continue
            t_1, t_2 = (t.get(name, 0) for t in seconds)
            # Where the smaller run took longer, no difference tells what an item costs: this much at most.
            each = 0 if n_2 <= n_1 else (t_2 - t_1) / (n_2 - n_1) if t_2 > t_1 else t_2 / n_2
            if name in ("evaluate", "mine", "retrieve"):  # a few queries take no time beside loading: the index counted more
                each = compared(len(run.data.passages)) / compared(measured[1]["passages"]) / measured[1]["queries_per_second"] / ranks
            spent = t_2 + each * max(n - n_2, 0)
            made = size_of(*(small / p for p in row_of(f"iter{min(int(stage[4:].split('/')[0]), 1)}/{name}")[0]))
            grows = unit in ("passages", "queries", "questions")
            checkpoints = 6 * made * (name in ("student", "train") and n >= 500)  # two, of weights and two averages
            disk += made * max(n / max(n_2, 1), 1) if grows else made + checkpoints
            arrays = max(arrays, made * n / max(n_2, 1) if name in ("retrieve", "pointwise", "pairwise") else 0)
            total += spent
            print(f"{line} {spell(spent):>12}  {where or 'the collection'} -> {writes[0]}{' (begun)' * run.begun(stage)}")
    asked = {name: sum(full[name][0] for s in stages if s.endswith("/" + name) and not run.done(s))
             for name in ("pointwise", "pairwise", "teachers")}
    disk += 50 * sum(asked.values())  # a score's row in SQLite
    gpu = f", {measured[1]['gpu_gb']:.1f} GB on all GPUs" if measured[1]["gpu_gb"] else ""
    print(f"\nquestions at most: {asked['pointwise']:,} to the pointwise teacher, {asked['pairwise']:,} to the pairwise one, "
          f"{asked['teachers']:,} for the table of both; what was asked before is not asked again\n"
          f"disk: {disk / 1e9:.2f} GB more in {c.out}\n"
          f"memory: {measured[1]['peak_gb'] + ranks * arrays / 1e9:.1f} GB in all ranks{gpu}\n"
          f"time: {spell(total)}, by two small runs here ({measured[0]['passages']:,} and {measured[1]['passages']:,} passages; "
          f"{spell(time.time() - started)})")
