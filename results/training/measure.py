"""A training step of ours beside one of PyLate's, on the same model, texts, batch and lengths, in one run.

    python results/training/measure.py --student FOLDER --data FOLDER --pylate PYTHON [--precision float32 bfloat16]
        [--rounds 3] --out results/training/pylate.json
    python results/training/measure.py --student FOLDER --data FOLDER --compile --out results/training/compile.json

Both train for STEPS steps in turn, each in a process of its own that waits while the other works, over the same 32 queries
with 8 passages each: the labelled one and 7 others, drawn once. Ours computes the whole objective (L_CL, L_KD, L_pair over
12 pairs), PyLate its Distillation loss (L_KD), through its trainer with default settings. PYTHON is the interpreter of an
environment in which `pylate` and `datasets` are installed. The precision bfloat16 is autocast in both, and of use only where
the processor multiplies in it. --compile: beside both, ours with its encoder compiled by torch.compile; "first" are the
seconds of the first two steps, with the compiling.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

QUERIES, PASSAGES, BATCH, STEPS = 32, 8, 4, 8  # a turn goes over every query once

OURS = """
import json, sys, time
sys.path.insert(0, sys.argv[4])
import numpy as np, torch, pairdistill
from ranks import Ranks
rows, model, precision = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3]
if precision == "bfloat16":
    pairdistill.half = lambda device: torch.autocast(device.type, torch.bfloat16)
else:
    pairdistill.half = lambda device: torch.autocast(device.type, enabled=False)
student = pairdistill.Student.from_pretrained(model, dim=128, query_length=32, passage_length=180)
n, k = len(rows), len(rows[0]["documents"])
passages = [text for row in rows for text in row["documents"]]
draw = np.random.default_rng(0)
pairs = np.array([sorted(draw.permutation([(i, j) for j in range(k) for i in range(j)])[:12].tolist()) for _ in rows])
examples = dict(passages=np.arange(n * k).reshape(n, k), teacher=np.array([row["scores"] for row in rows], np.float32),
                pairs=pairs, pair_probs=draw.random((n, 12), dtype=np.float32), positive=np.zeros(n, np.int64))
said = []
for line in sys.stdin:
    start = time.perf_counter()
    pairdistill.train(student, [row["query"] for row in rows], passages, examples, steps=int(line), batch=%d, lr=1e-5,
                      warmup=0, temperature=1.0, tau=1.0, lambda_kd=1.0, lambda_pair=3.0, pair_reduction="mean", seed=0,
                      ranks=Ranks(), desc="ours", note=lambda **row: said.append(row))
    print(json.dumps({"s": time.perf_counter() - start, **said[-1]}), flush=True)
""" % BATCH

# Without our attention and dropout for CPUs, which torch.compile cannot trace, and fuses its own of.
COMPILED = OURS.replace("said = []", """student.encoder = torch.compile(student.encoder, dynamic=True)
import contextlib
pairdistill.plainly = lambda device: contextlib.nullcontext()
said = []""")

PYLATE = """
import json, sys, tempfile, time
import torch
from datasets import Dataset
from pylate import losses, models, utils
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback
rows, model, precision = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3]
model = models.ColBERT(model, embedding_size=128, query_length=32, document_length=180, device="cpu")
class Turns(TrainerCallback):
    left = 0
    def on_step_begin(self, args, state, control, **_):
        if self.left == 0:
            self.left, self.start = int(sys.stdin.readline() or sys.exit()), time.perf_counter()
    def on_step_end(self, args, state, control, **_):
        self.left -= 1
        if self.left == 0:
            print(json.dumps({"s": time.perf_counter() - self.start}), flush=True)
with tempfile.TemporaryDirectory() as folder:
    settings = SentenceTransformerTrainingArguments(
        folder, per_device_train_batch_size=%d, max_steps=10**6, learning_rate=1e-5, use_cpu=True, report_to="none",
        bf16=precision == "bfloat16", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    SentenceTransformerTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows),
                               loss=losses.Distillation(model=model), callbacks=[Turns()],
                               data_collator=utils.ColBERTCollator(model.tokenize)).train()
""" % BATCH


def rows_of(folder: str) -> list[dict]:
    from data import load_collection
    collection, draw = load_collection(folder), np.random.default_rng(0)
    judged = next(iter(collection.qrels.values()))
    rows = []
    for qid, grades in list(judged.items())[::max(1, len(judged) // QUERIES)][:QUERIES]:
        texts = collection.passages
        gold = list(collection.passage_ids).index(next(iter(grades)))
        others = draw.choice(len(texts), PASSAGES - 1, replace=False)
        rows.append({"query": collection.queries[qid], "documents": [texts[gold]] + [texts[int(n)] for n in others],
                     "scores": np.sort(draw.normal(size=PASSAGES))[::-1].tolist()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pylate", metavar="PYTHON")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a turn (default: 8)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    home = Path(__file__).resolve().parents[2]
    sys.path.insert(0, str(home))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.json")
        data.write_text(json.dumps(rows_of(args.data)))
        for precision in args.precision:
            workers = {name: subprocess.Popen([python, "-c", code, str(data), args.student, precision, str(home)], text=True,
                                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                       for name, python, code in (("ours", sys.executable, OURS), ("PyLate", args.pylate, PYLATE),
                                                  ("compiled", args.compile and sys.executable, COMPILED)) if python}

            def turn(name: str, steps: int) -> dict:
                workers[name].stdin.write(f"{steps}\n")
                workers[name].stdin.flush()
                while not (line := workers[name].stdout.readline()).startswith("{"):
                    if not line:
                        raise SystemExit(f"{name} ended with code {workers[name].wait()}")
                said = json.loads(line)
                print(precision, name, f"{said['s'] / steps:.3f} s a step", said, file=sys.stderr, flush=True)
                return {**said, "s": said["s"] / steps}

            first = {name: 2 * turn(name, 2)["s"] for name in workers}  # a warm-up
            turns = [{name: turn(name, args.steps) for name in workers} for _ in range(args.rounds)]
            for worker in workers.values():
                worker.kill()
            row = {"precision": precision, **{name: float(np.median([t[name]["s"] for t in turns])) for name in workers}}
            row["ours, tokens a second"] = int(np.median([t["ours"]["tokens_per_second"] for t in turns]))
            for name in list(workers)[1:]:  # all but ours
                row[f"of {name}'s time"] = float(np.median([t["ours"]["s"] / t[name]["s"] for t in turns]))
            results.append({**row, "first": first, "turns": [{name: round(said["s"], 4) for name, said in t.items()} for t in turns]})
            print(json.dumps(results[-1]), flush=True)
    versions = {"torch": importlib.metadata.version("torch")}
    if args.pylate:
        code = "import importlib.metadata as m; print(m.version('pylate'), m.version('torch'))"
        said = subprocess.run([args.pylate, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        versions |= {"pylate": said[0], "pylate's torch": said[1]}
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    import torch
    args.out.write_text(json.dumps({"student": Path(args.student).name, "data": Path(args.data).name, "batch": BATCH,
                                    "passages a query": PASSAGES, "cpu": cpu, "threads": torch.get_num_threads(),
                                    **versions, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
