"""PairDistill in one command: index, retrieve, rerank pointwise, compare pairs, train, repeat (section 4.3).

    python run.py --iters 2 --gpus 4                       # `docs`: real text, no network; the CPU where there is no GPU
    python run.py --preset msmarco --gpus 4                # the paper's run; --help has a command for every row of its tables
    python run.py --preset evaluate --student S --data D   # a trained student on another collection
    torchrun --nnodes 2 --nproc-per-node 4 run.py …        # several machines, a shared --out

Every stage leaves one finished file or none, in `--out`. The same command goes on where it was stopped; with
`--restart-from iter1/train` it makes that stage again, and all that depends on it.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
import traceback
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from data import METRICS, answer_metrics, bm25_run, evaluate, load_collection, read_queries, sample_digest, save_collection


# Configuration ------------------------------------------------------------------------------------------------------

def option(default, help: str, paper: str = "") -> object:
    return field(default=default, metadata={"help": help, "paper": paper})


@dataclass(frozen=True)
class Config:
    """All settings, once. Groups in --help begin at the fields named in GROUPS. The defaults are the paper's; where
    they are not, --help says both."""
    data: str = option("ir_datasets:msmarco-passage", "docs, a BEIR folder, or ir_datasets:NAME", "MS MARCO")
    out: str = option("", "the run's folder; empty: runs/PRESET")
    iters: int = option(2, "iterations", "2")
    gpus: int = option(1, "ranks on this machine", "4 V100")
    seed: int = option(0, "of everything that is drawn")
    split: str = option("test", "the judged queries that a student is evaluated on", "dev")
    eval_queries: int = option(0, "how many of them, the same whatever the seed; 0: all", "all")
    student: str = option("colbert-ir/colbertv2.0", "Hub name or folder; scratch: a small one with random weights",
                          "ColBERTv2")
    architecture: str = option("colbert", "colbert or dpr", "both, table 3")
    dim: int = option(128, "of a projected vector, where the student's folder has no projection; 0: the encoder's own width", "128")
    query_length: int | None = option(None, "tokens; without this flag, and the next three, as the student's folder has it; "
                                      "for a plain encoder 32, 180, yes and yes. ArguAna's queries: 300, Climate-FEVER's: 64", "32")
    passage_length: int | None = option(None, "tokens", "180")
    expansion: bool | None = option(None, "fill queries up with [MASK]s that score", "yes")
    markers: bool | None = option(None, "ColBERT's query and passage markers", "yes")
    start: str = option("", "what iteration 1 trains, with --architecture and --dim, on what --student retrieved; empty: --student",
                        "bert-base-uncased, table 3")
    base_steps: int = option(0, "steps of iteration 0: L_CL alone, for a student that cannot retrieve yet", "0")
    base_batch: int = option(64, "queries of such a step, each with its labelled passage")
    base_lr: float = option(1e-3, "its learning rate, for random weights; a pretrained encoder wants some 3e-5")
    pointwise: str = option("cross-encoder/ms-marco-MiniLM-L-6-v2", "Hub name or folder; scratch: trained on the labels, from "
                            "random weights; train:ENCODER: the same from this encoder", "MiniLM")
    pairwise: str = option("castorini/duot5-3b-msmarco", "the same; where both are trained from the same start, "
                           "it begins as the pointwise one ended", "duoT5-3B")
    orders: str = option("both", "ask a pair in both orders and average, or in one", "authors' code: one")
    encoder_steps: int = option(100, "steps of training the scratch teachers' encoder to retrieve, by L_CL")
    teacher_steps: int = option(300, "steps of training each scratch or train: teacher")
    teacher_batch: int = option(64, "triplets of such a step: half as many queries, two passages or both orders of each")
    teacher_lr: float = option(1e-3, "their learning rate, likewise")
    teacher_length: int = option(180, "tokens of a passage that such a teacher reads")
    retrieve_k: int = option(100, "passages retrieved for a training query", "100")
    train_queries: int = option(0, "training queries of an iteration, drawn anew in each; 0: all", "all 800K")
    queries: str = option("", "a jsonl file of _id and text, such as generated ones: the training queries, in place of the "
                          "collection's; they have no labels", "table 4")
    labels: bool = option(True, "use the judgements of training queries; --no-labels leaves L_ZS: no L_CL, unless --positive "
                          "teacher", "no in table 4")
    kept: int = option(64, "passages of a query that are trained on, the best by the pointwise teacher", "64")
    n_pairs: int = option(50, "pairs of a query", "50")
    delta: int = option(10, "pairs are closer than this in the pointwise order; 0: any pair", "10")
    pair_sampling: str = option("uniform", "uniform; unsure: of these pairs, rather those that the pointwise teacher is unsure of",
                                "uniform")
    steps: int = option(100_000, "training steps of an iteration", "100,000")
    batch: int = option(32, "queries of a step, over all ranks", "32")
    positive: str = option("label", "of L_CL: label; teacher: the best passage by the pointwise teacher, of every query",
                           "authors' code: teacher")  # OURS
    negatives: int = option(0, "queries of a step that have one another's passages as L_CL's negatives; 0: all", "authors' code: 4")
    passage_chunk: int = option(0, "passages whose activations are held at once in training; 0: what fits into half of the "
                                "GPU's free memory, halved once if it runs out, or into 2 GB of a CPU's")
    lr: float = option(1e-5, "learning rate of AdamW, with linear warm-up and decay", "1e-5")
    warmup: int = option(3000, "warm-up steps", "authors' code: 3,000")
    temperature: float = option(1.0, "divides the student's scores in every loss", "authors' code: 1.0; on FiQA 5.0, not in L_CL")
    tau: float = option(1.0, "temperature of the pointwise teacher", "1.0")
    lambda_kd: float = option(1.0, "weight of L_KD", "1.0")
    lambda_pair: float = option(3.0, "weight of L_pair", "3.0")
    pair_reduction: str = option("mean", "L_pair over all pairs of the batch, or sum over a query's (as written)",
                                 "sum; authors' code: mean")
    eval_k: int = option(1000, "passages retrieved for an evaluation query", "1000")
    bm25: bool = option(True, "rank by BM25 too, once: rank 0 holds some 30 bytes for each word of the collection", "in table 1, cited")
    rerank: int = option(100, "of them, how many the pointwise teacher reranks for the table; 0: no teacher rows", "in table 5, how many is not said")
    rerank_pairs: int = option(10, "of those, how many the pairwise teacher then compares, each with each; 0: no rows of its own", "in table 5, how many is not said")

    @property
    def teacher_queries(self) -> int:
        """Of a step of training a teacher: each has two triplets, by two negatives or two orders."""
        return max(self.teacher_batch // 2, 1)

    @property
    def compares(self) -> bool:
        """Whether the pairwise teacher is asked."""
        return bool(min(self.rerank, self.rerank_pairs) > 1 or self.iters and self.n_pairs)


GROUPS = {"data": "the run", "student": "the student", "base_steps": "iteration 0", "pointwise": "the teachers",
          "retrieve_k": "passages and pairs", "steps": "training", "eval_k": "evaluation"}

SMALL = dict(kept=12, n_pairs=8, eval_k=100, rerank=30, rerank_pairs=4)
PRESETS = {
    "docs": dict(data="docs", student="scratch", pointwise="scratch", pairwise="scratch", query_length=24,
                 passage_length=48, expansion=False, base_steps=30, teacher_length=64, teacher_steps=60,
                 teacher_lr=5e-4, retrieve_k=20, train_queries=640, steps=112, batch=16, lr=6e-4, warmup=8,
                 temperature=0.125, tau=0.25, **SMALL),
    "scifact": dict(data="ir_datasets:beir/scifact", student="sentence-transformers/all-MiniLM-L6-v2",
                    pairwise="castorini/duot5-base-msmarco", markers=False, expansion=False, query_length=64,
                    retrieve_k=50, steps=200, batch=16, lr=2e-5, warmup=20, **SMALL),
    "msmarco": dict(split="dev"),
    "dpr": dict(split="dev", architecture="dpr", dim=0, start="bert-base-uncased"),  # the authors' configuration has this encoder
    # Of table 4 the paper gives the teachers alone; the rest is the run on FiQA in the history of the authors' code.
    "zeroshot": dict(pointwise="google/flan-t5-xl", pairwise="google/flan-t5-xl", labels=False, iters=1, passage_length=300,
                     steps=4000, batch=16, warmup=400),
    "evaluate": dict(iters=0, rerank=0, passage_length=300),  # appendix B.3: BEIR and LoTTE
}
QUERY_LENGTHS = {"arguana": 300, "climate-fever": 64}  # appendix B.3, where no flag and no preset says another

# What the authors' code did where the paper says something else, or nothing: in every preset, and then in one.
AS_PUBLISHED = {
    "": dict(delta=6,  # pairs have j in range(i + 1, i + 6)
             orders="one",  # the better-ranked passage first
             positive="teacher",  # passage 0 of a line is the teacher's best, and L_CL is taken of lines without a label too
             negatives=4),  # those of a GPU's micro-batch: 32 queries / 4 GPUs / 2 micro-batches
    "msmarco": dict(n_pairs=8,  # counted in their notebook
                    steps=30_000, batch=8),  # all 4 ranks read the same rows, so 32 queries a step are 8
    "zeroshot": dict(delta=8,  # range(i + 1, i + 8) with Flan-T5
                     temperature=5.0, batch=4, negatives=2),  # as above, of 16
    "dpr": dict(n_pairs=8, lambda_pair=1.0, lr=3e-5, warmup=10_000, batch=36, negatives=0),  # 6 on each of 6 GPUs, one another's negatives
}

_EVALUATE = "--preset evaluate --student runs/msmarco/iter2/student --data"
ROWS = {  # of the paper's tables
    "1: MS MARCO dev": "--preset msmarco",
    "1: TREC DL 2019": f"{_EVALUATE} ir_datasets:msmarco-passage --split trec-dl-2019 --passage-length 180 --out runs/dl2019",
    "1: TREC DL 2020": f"{_EVALUATE} ir_datasets:msmarco-passage --split trec-dl-2020 --passage-length 180 --out runs/dl2020",
    "1: BEIR, such as NFCorpus": f"{_EVALUATE} ir_datasets:beir/nfcorpus --out runs/nfcorpus",
    "1: ArguAna": f"{_EVALUATE} ir_datasets:beir/arguana --out runs/arguana",
    "1: Climate-FEVER": f"{_EVALUATE} ir_datasets:beir/climate-fever --out runs/climate-fever",
    "1: BEIR, a folder": f"{_EVALUATE} my/bioasq --out runs/bioasq",
    "1: LoTTE, search": f"{_EVALUATE} ir_datasets:lotte/pooled/test/search --out runs/lotte-search",
    "1: LoTTE, forum": f"{_EVALUATE} ir_datasets:lotte/pooled/test/forum --out runs/lotte-forum",
    "1: ColBERTv2, as above": "--preset evaluate --data ir_datasets:beir/nfcorpus --out runs/colbertv2-nfcorpus",
    "2: NQ": f"{_EVALUATE} ir_datasets:dpr-w100/natural-questions/dev --split dev --passage-length 180 --no-bm25 --out runs/nq",
    "2: TriviaQA": f"{_EVALUATE} ir_datasets:dpr-w100/trivia-qa/dev --split dev --passage-length 180 --no-bm25 --out runs/triviaqa",
    "2: SQuAD, a folder with answers": f"{_EVALUATE} my/squad --split dev --passage-length 180 --no-bm25 --out runs/squad",
    "2: ColBERTv2, such as NQ": "--preset evaluate --data ir_datasets:dpr-w100/natural-questions/dev --split dev --passage-length 180 --no-bm25 "
                                "--out runs/colbertv2-nq",
    "3: without L_pair": "--preset msmarco --lambda-pair 0 --n-pairs 0 --out runs/no-pair",
    "3: without L_KD": "--preset msmarco --lambda-kd 0 --out runs/no-kd",
    "3: without the heuristic": "--preset msmarco --delta 0 --out runs/any-pair",
    "3: from bert-base-uncased": "--preset msmarco --start bert-base-uncased --out runs/bert",
    "3: DPR": "--preset dpr --lambda-kd 0 --lambda-pair 0 --n-pairs 0 --out runs/dpr-cl",
    "3: DPR + L_KD": "--preset dpr --lambda-pair 0 --n-pairs 0 --out runs/dpr-kd",
    "3: DPR + L_KD + L_pair": "--preset dpr",
    "3: iterations 1 to 3": "--preset msmarco --iters 3",
    "4: L_KD only, such as FiQA": "--preset zeroshot --data ir_datasets:beir/fiqa --lambda-pair 0 --n-pairs 0 --out runs/fiqa-kd",
    "4: + L_pair": "--preset zeroshot --data ir_datasets:beir/fiqa --out runs/fiqa",
    "4: with queries from a file": "--preset zeroshot --data ir_datasets:beir/climate-fever --queries my/queries.jsonl",
    "5: ColBERTv2, MiniLM, duoT5": "--preset msmarco --iters 0 --out runs/rerankers",
    "5: MonoT5": "--preset msmarco --iters 0 --pointwise castorini/monot5-3b-msmarco --out runs/monot5",
    "6: lambda_pair 1": "--preset msmarco --lambda-pair 1 --out runs/pair1",
    "6: lambda_pair 3": "--preset msmarco",
    "7: its values are the defaults": "--preset msmarco",
    "as the authors' code did it": "--preset msmarco --as-published --out runs/as-published",
}


def parse(argv: list[str]) -> tuple[str, Config, str | None, bool]:
    """-> preset, settings, the stage to restart from, and whether this is a dry run."""
    rows = "\n".join(f"  {row:<34}{flags}" for row, flags in ROWS.items())
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"the paper's tables, row by row: python run.py …\n{rows}")
    parser.add_argument("--preset", choices=PRESETS, default="docs", help="a set of defaults, which the flags override")
    parser.add_argument("--as-published", action="store_true", default=False, help="what the authors' code did where the paper "
                        "says something else or nothing (AS_PUBLISHED in run.py); flags override it")
    parser.add_argument("--restart-from", metavar="STAGE", help="make this stage (such as iter1/pointwise) and all that depends "
                        "on it again; the teachers' scores are kept")
    parser.add_argument("--dry-run", action="store_true", default=False, help="print the stages, and the time, disk and memory "
                        "that they need by small runs of each; nothing is written into --out")
    for f in dataclasses.fields(Config):
        group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        paper = f.metadata["paper"] and f"; {'' if f.metadata['paper'].startswith('authors') else 'paper: '}{f.metadata['paper']}"
        by_preset = ", ".join(f"{name} {p[f.name]}" for name, p in PRESETS.items() if f.name in p)
        type_ = f.type.removesuffix(" | None")
        kind = (dict(action=argparse.BooleanOptionalAction) if type_ == "bool" else
                dict(type={"int": int, "float": float, "str": str}[type_], metavar=type_.upper()))
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                           help=f"{f.metadata['help']} (default: {f.default!r}{'; ' + by_preset if by_preset else ''}{paper})")
    given = vars(parser.parse_args(argv))
    preset, restart, dry = given.pop("preset"), given.pop("restart_from"), given.pop("dry_run")
    published = {**AS_PUBLISHED[""], **AS_PUBLISHED.get(preset, {})} if given.pop("as_published") else {}
    config = Config(**{**PRESETS[preset], **published, **given})
    by_name = QUERY_LENGTHS.get(config.data.rstrip("/").rpartition("/")[2].lower().replace("_", "-"))
    return preset, dataclasses.replace(config, out=config.out or f"runs/{preset}",
                                       query_length=by_name if config.query_length is None else config.query_length), restart, dry


def check(config: Config) -> None:
    """What can be seen to be wrong before anything is loaded."""
    choices = dict(architecture=("colbert", "dpr"), orders=("both", "one"), pair_reduction=("mean", "sum"),
                   positive=("label", "teacher"), pair_sampling=("uniform", "unsure"))
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: it is {' or '.join(allowed)}")
    for f in dataclasses.fields(Config):
        zero = f.name in ("seed", "eval_queries", "dim", "base_steps", "train_queries", "delta", "passage_chunk", "warmup", "lambda_kd", "lambda_pair",
                          "rerank", "rerank_pairs", "n_pairs", "iters", "negatives")
        value = getattr(config, f.name)
        if f.type.startswith(("int", "float")) and value is not None and not (0 if zero else 1e-12) <= value < math.inf:
            raise ValueError(f"--{f.name.replace('_', '-')} {value}: it is {'0 or more' if zero else 'more than 0'}")
    if config.negatives == 1:
        raise ValueError("--negatives 1: a query alone has no negatives; it is 0, for the whole batch, or 2 or more")
    for name in ("query_length", "passage_length"):
        if getattr(config, name) is not None and getattr(config, name) < 4:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected 4 or more, as [CLS], a marker and [SEP] count")
    if config.dim % 4:
        raise ValueError(f"--dim {config.dim}: expected a multiple of 4, as the index codes 4 dimensions in a byte")
    if config.seed > 10**9:
        raise ValueError(f"--seed {config.seed}: expected 1000000000 at most, as seeds of others are made from it in 32 and 64 bits")
    if config.iters and config.kept > config.retrieve_k:
        raise ValueError(f"--kept {config.kept}: more than the --retrieve-k {config.retrieve_k} passages retrieved")
    if config.eval_k < 10:
        raise ValueError(f"--eval-k {config.eval_k}: expected 10 or more, for MRR@10 and nDCG@10")
    if config.iters and config.warmup >= config.steps:
        raise ValueError(f"--warmup {config.warmup}: of --steps {config.steps}, the learning rate would never come down; give less")
    if config.iters and config.n_pairs and (config.delta == 1 or config.kept == 1):
        raise ValueError(f"--delta {config.delta} with --kept {config.kept}: there is no such pair; give 2 or more, or --n-pairs 0")
    out = Path(config.out).absolute()
    there = next(path for path in (out, *out.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {config.out}: {there} is {'not writable' if there.is_dir() else 'not a folder'}; name another one")


# What a stage makes of what --------------------------------------------------------------------------------------------

# Each stage's result and what else it leaves; the files that it reads; the settings that it reads, beside the seed and the
# collection. {t} is its iteration, {s} the one before. --gpus, --passage-chunk, --iters and --bm25 are in no row: they change
# rounding, what dropout draws, or a row of the table at most.
STAGES = {
    "student": ("iter{t}/student iter{t}/checkpoint scratch/student", "",
                "student architecture dim query_length passage_length expansion markers labels base_steps base_batch base_lr "
                "temperature"),
    "index": ("iter{t}/index", "iter{t}/student", ""),
    "evaluate": ("iter{t}/metrics.json iter{t}/evaluated.npz", "iter{t}/student iter{t}/index", "split eval_queries eval_k"),
    "mine": ("iter0/mined.npz", "iter0/student iter0/index", "labels retrieve_k teacher_batch teacher_steps"),
    "encoder": ("scratch/teacher", "", "labels query_length teacher_length encoder_steps base_batch teacher_lr"),
    "fit-pointwise": ("teachers/pointwise", "iter0/mined.npz scratch/teacher",
                      "pointwise query_length teacher_steps teacher_batch teacher_lr teacher_length"),
    "fit-pairwise": ("teachers/pairwise", "iter0/mined.npz scratch/teacher teachers/pointwise",
                     "pairwise pointwise query_length teacher_steps teacher_batch teacher_lr teacher_length"),
    "teachers": ("iter{t}/reranked.json", "iter{t}/evaluated.npz teachers/pointwise teachers/pairwise",
                 "pointwise pairwise orders rerank rerank_pairs"),
    "retrieve": ("iter{t}/retrieved.npz", "iter{s}/student iter{s}/index", "retrieve_k train_queries"),
    "pointwise": ("iter{t}/pointwise.npz", "iter{t}/retrieved.npz teachers/pointwise", "pointwise labels positive"),
    "pairwise": ("iter{t}/pairs.npz", "iter{t}/pointwise.npz teachers/pairwise",
                 "pairwise orders labels positive kept n_pairs delta pair_sampling"),
    "train": ("iter{t}/student iter{t}/checkpoint", "iter{t}/pairs.npz iter{s}/student",
              "start architecture dim steps batch negatives lr warmup temperature tau lambda_kd lambda_pair pair_reduction"),
}


def plan(config: Config) -> list[str]:
    """The stages in the order in which `iterate` runs them: iter0/student, …"""
    roles = [role for role in ("pointwise", "pairwise") if is_trained(getattr(config, role))]
    zero = ["student", "index", "evaluate", *["mine"] * bool(roles),
            *["encoder"] * ("scratch" in (config.pointwise, config.pairwise)), *(f"fit-{role}" for role in roles),
            *["teachers"] * bool(config.rerank)]
    each = ["retrieve", "pointwise", "pairwise", "train", "index", "evaluate", *["teachers"] * bool(config.rerank)]
    stages = [f"iter{t}/{name}" for t in range(config.iters + 1) for name in (each if t else zero)]
    return stages[:-1] if config.rerank and config.iters else stages  # nothing is trained on the last student's candidates


def row_of(stage: str) -> list[list[str]]:
    """[what it writes, what it reads, its settings]"""
    t, name = stage.removeprefix("iter").split("/")
    return [cell.format(t=t, s=int(t) - 1).split() for cell in STAGES[name]]


def digest_of(path: Path) -> str:
    """Which content this is: of arrays, of a model, or of an index the student whose it is."""
    from checkpoints import digest
    if (path / "manifest.json").exists():
        return read(path / "manifest.json")["student"]
    if path.is_dir():
        return digest(path)
    h = hashlib.blake2b(digest_size=8)
    for name, array in read(path).items():  # not the file's bytes: they hold the time at which it was written
        h.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return h.hexdigest()


def digest_of_collection(data) -> str:
    """Of the queries, the judgements, the answers, and of the passages as far as sample_digest looks at them."""
    about = [len(data.passages), data.queries, data.qrels, *[data.answers] * bool(data.answers)]
    return sample_digest(about, data.passage_ids, data.passages)


# Files --------------------------------------------------------------------------------------------------------------

def write(path: Path, content: str | dict[str, np.ndarray]) -> None:
    """Text or arrays, written beside and renamed: a finished file or none."""
    beside = path.with_name("writing." + path.name)
    if isinstance(content, str):
        beside.write_text(content)
    else:
        np.savez(beside, **content)
    os.replace(beside, path)


def read(path: Path):
    """A stage's JSON, or its arrays. Raises ValueError where the file is damaged."""
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else dict(np.load(path))
    except (ValueError, EOFError, zipfile.BadZipFile) as e:
        mend = ("put a copy of it back, or choose another --out" if path.name == "stages.json" else
                "remove it, and the same command makes it again")
        raise ValueError(f"{path} is damaged ({e}): {mend}") from None


def discard(path: Path) -> None:
    """Away at once, as half a folder would pass for a whole one."""
    if path.exists():
        beside = path.with_name("removing." + path.name)
        shutil.rmtree(beside, ignore_errors=True)
        os.replace(path, beside)
        shutil.rmtree(beside) if beside.is_dir() else beside.unlink()


class Run:
    """What every stage needs: the configuration, the rank, the collection, the log."""

    def __init__(self, config: Config, preset: str, restart: str | None, ranks, dry: bool = False):
        self.config, self.ranks, self.out = config, ranks, Path(config.out)
        self.started = time.time()
        copy = self.out / "collection"
        source = lambda: str(copy) if config.data == "docs" and copy.exists() else config.data
        if ranks.first and config.data == "docs" and not copy.exists() and not dry:
            save_collection(load_collection("docs"), copy)  # parsed once, for all ranks and for retrieve.py
        data = load_collection(source()) if ranks.first else None  # converted once, for all ranks
        ranks.barrier()
        self.data = data or load_collection(source())
        self.number = self.data.judged_positions()
        train, qrels = self.data.qrels.get("train", {}), self.data.qrels.get(config.split, {})
        judged = {q for judgements in self.data.qrels.values() for q in judgements}
        judged_splits = [split for split, rows in self.data.qrels.items() if rows]
        others = [split for split in judged_splits if split != "train"]
        self.eval_ids = list(qrels) or [q for q in self.data.answers if q not in judged and not others]  # the latter: table 2
        if not self.eval_ids:
            raise ValueError(f"--split {config.split}: {config.data} has {', '.join(judged_splits) or 'no judged queries'}")
        if qrels and not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
            raise ValueError(f"--split {config.split}: no passage there has a grade above 0, so nothing can be found")
        held_out = {*judged, *self.eval_ids}
        # Queries without judgements are distilled on too (section 5.2): 800K of which 500K are labelled.
        self.train_ids = [q for q in self.data.queries if q in train or q not in held_out]
        if config.queries:
            more = {f"queries:{q}": text for q, text in read_queries(Path(config.queries))[0].items()}
            self.data, self.train_ids = dataclasses.replace(self.data, queries={**self.data.queries, **more}), list(more)
        if 0 < config.eval_queries < len(self.eval_ids):
            drawn = np.random.default_rng(0).permutation(len(self.eval_ids))[:config.eval_queries]  # not by --seed: seeds are compared
            self.eval_ids = [self.eval_ids[n] for n in sorted(drawn)]
        self.qrels = {q: qrels[q] for q in self.eval_ids if q in qrels}
        trained = config.iters or config.base_steps or any(map(is_trained, (config.pointwise, config.pairwise)))
        if trained and (both := set(self.eval_ids) & set(self.train_ids)):
            raise ValueError(f"--split {config.split}: {len(both)} of its queries, such as {min(both)!r}, would be trained on, as they "
                             f"are in qrels/train.tsv; evaluate on another split, or take them out of one")
        # A query's own passage, ArguAna's argument that is to be countered, is no result. As in BEIR (beir/retrieval/evaluation.py,
        # ignore_identical_ids) it is known by its id, in every collection.
        # OURS: unless it is judged, or the query is by answers, because ids may be row numbers.
        self.own = {q: n for q, n in self.data.positions(self.eval_ids).items()
                    if q not in self.qrels.get(q, {}) and q not in self.data.answers}
        if not self.train_ids and trained:
            raise ValueError(f"{config.data}: no training queries: qrels/train.tsv is missing or empty, and every query is "
                             f"judged in another split")
        labels = train if config.labels else {}
        self.positives = {q: [self.number[p] for p, grade in sorted(labels.get(q, {}).items(), key=lambda x: -x[1]) if grade > 0]
                          for q in self.train_ids}
        self.labelled, teachers = sum(map(bool, self.positives.values())), (config.pointwise, config.pairwise)
        if config.iters and not (self.labelled or config.positive == "teacher" or config.lambda_kd or config.lambda_pair and config.n_pairs):
            raise ValueError(f"--lambda-kd {config.lambda_kd}, --lambda-pair {config.lambda_pair}, --n-pairs {config.n_pairs} and no labels: "
                             f"no loss is left to train on")
        for name, kind, queries, used in (
                ("batch", "", min(config.batch, config.train_queries or math.inf, len(self.train_ids)), config.iters),
                ("base_batch", "labelled ", min(config.base_batch, self.labelled), config.base_steps or "scratch" in teachers),
                ("teacher_batch", "labelled ", min(config.teacher_queries, self.labelled), any(map(is_trained, teachers)))):
            if used and queries < ranks.world:  # a rank without a query would leave the exchange of gradients
                raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: a step has {queries} {kind}queries for {ranks.world} "
                                 f"rank{'s' * (ranks.world > 1)}; give more of them, fewer --gpus{', or trained models' * bool(kind)}")
        if ranks.first:
            self._begin(preset, restart, dry)
        ranks.barrier()

    def _begin(self, preset: str, restart: str | None, dry: bool) -> None:
        """Compares the settings with those of the finished stages, removes what is to be made again, writes config.json."""
        c, manifest = self.config, self.out / "stages.json"
        self.collection = digest_of_collection(self.data)
        self.made = read(manifest) if manifest.exists() else {}  # {stage: what it is made of}
        last = max([c.iters, *(int(stage[4:].split("/")[0]) for stage in self.made)])
        planned = plan(dataclasses.replace(c, iters=last))
        if restart and restart not in planned:
            raise ValueError(f"--restart-from {restart}: the stages are {', '.join(planned)}")
        stages = plan(dataclasses.replace(c, iters=last, rerank=1))  # with --rerank 0, what was reranked before goes too
        self.redone = redone = []
        again = set()  # the files that are made again
        for stage in stages[stages.index(restart):] if restart else []:  # the stage, and what depends on it or has other settings
            results, reads, _ = row_of(stage)
            if stage == restart or again & set(reads) or self.differ(stage):
                redone.append(stage)
                again.update(results)
        for stage in [stage for stage in planned if stage not in redone]:
            if self.begun(stage) and stage not in self.made:
                raise ValueError(f"{self.out / row_of(stage)[0][0]} is there, and stages.json does not say what it was made of: remove "
                                 f"it, or add --restart-from {stage}")
            if differ := self.differ(stage):
                raise ValueError(f"{self.out} holds a run with another configuration: {', '.join(differ)} would change {stage}; "
                                 f"choose another --out, or add --restart-from {stage} to go on from there")
        if dry:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock()
        for stage in reversed(redone):  # the last one first: what is left is always the beginning of a run
            for path in row_of(stage)[0]:
                discard(self.out / path)
        log = self.out / "log.jsonl"
        if log.exists() and not (text := log.read_text()).endswith("\n"):  # a full disk cut its last line
            write(log, text[:text.rfind("\n") + 1])
        write(self.out / "config.json", json.dumps({"preset": preset, **dataclasses.asdict(c)}, indent=1))

    def _lock(self) -> None:
        """Until this process ends, however it ends: two runs in one folder would rename and remove each other's files."""
        if fcntl is None:
            return
        self.locked = open(self.out / "lock", "w")
        try:
            fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process's: main may be called again from it
        except (BlockingIOError, PermissionError):
            raise ValueError(f"--out {self.out}: another run is at work there; wait until it has ended, or choose another "
                             f"folder") from None
        except OSError:
            pass  # a file system without locks

    def differ(self, stage: str) -> list[str]:
        """The flags that would make another result of a stage that is there."""
        now = self.settings(stage)
        then = self.made.get(stage, {}).get("settings", now) if self.begun(stage) else now
        flag = lambda k: "--data or --queries" if k == "data" else "--" + k.replace("_", "-")
        return [f"{flag(k)} ({then[k]} there, {now[k]} now)" for k in now if then.get(k, now[k]) != now[k]]

    def settings(self, stage: str) -> dict:
        c, names = self.config, row_of(stage)[2]
        if stage == "iter0/student" and not c.base_steps:
            names = [n for n in names if n not in ("labels", "base_batch", "base_lr", "temperature")]
        if stage == "iter0/student" and c.start:
            c = dataclasses.replace(c, architecture="colbert")  # --architecture is of --start
        return {"data": f"digest {self.collection}", "seed": c.seed, **{n: getattr(c, n) for n in names}}

    def there(self, stage: str) -> bool:
        """Whether its results are: a checkpoint, or what a student from random weights began as, may be gone."""
        result, *others = row_of(stage)[0]
        return all((self.out / name).exists() for name in (result, *(name for name in others if name.endswith(".npz"))))

    def done(self, stage: str) -> bool:
        return self.there(stage) and stage not in self.redone

    def begun(self, stage: str) -> bool:
        """Whether its result is there, or a checkpoint on the way to it."""
        result, *others = row_of(stage)[0]
        checkpoints = [f"{name}/{which}.safetensors" for name in others for which in ("last", "previous")]
        return any((self.out / name).exists() for name in (result, *checkpoints))

    def _record(self, stage: str) -> None:
        """Notes in stages.json what a stage is made of, before it is made; of one that is, compares the files."""
        from teachers import split_spec
        (result, *others), reads, names = row_of(stage)
        specs = {split_spec(getattr(self.config, n).removeprefix("train:"))[1] for n in names
                 if n in ("student", "start", "pointwise", "pairwise")}
        paths = {name: self.out / name for name in reads} | {s: Path(s) for s in specs - {"", "scratch"} if Path(s).is_dir()}
        # teachers/ and scratch/ are there only where they are trained here.
        now = {name: digest_of(path) for name, path in paths.items() if path.exists()}
        begun = self.begun(stage)
        then = self.made.get(stage, {}).get("files", now) if begun else {}
        for name in now:
            if then.get(name, now[name]) != now[name]:
                raise ValueError(f"{self.out}/{result} was made from another {name} than the one that is there now: put that one "
                                 f"back, or add --restart-from {stage} to make it again")
        entry = dict(settings=self.settings(stage), files={**then, **now})
        if self.made.get(stage) != entry:
            for name in () if begun else others:  # what an attempt with other settings left
                discard(self.out / name)
            self.made[stage] = entry
            write(self.out / "stages.json", json.dumps(self.made, indent=1))

    def text(self, qids) -> list[str]:
        return [self.data.queries[q] for q in qids]

    def evaluate(self, found: dict[str, dict[str, float]]) -> dict[str, float]:
        """The metrics of {query: {passage: score}}: by judgements, and by answers where the queries have them."""
        answered = [q for q in self.eval_ids if q in self.data.answers]
        metrics = [m for m in METRICS if int(m.split("@")[1]) <= self.config.eval_k]
        return {**(answer_metrics(found, self.data, answered) if answered else {}),
                **(evaluate(found, self.qrels, metrics) if self.qrels else {})}

    def note(self, **row) -> None:
        if self.ranks.first:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

    def log(self) -> list[dict]:
        path = self.out / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def stage(self, iteration: int, name: str, work, summary=lambda: ""):
        """Runs `work` unless its result is there; all ranks wait for the end; one line says what happened."""
        import torch
        from ranks import peak_memory
        stage = f"iter{iteration}/{name}"
        done, start = self.there(stage), time.time()
        if self.ranks.first:
            self._record(stage)
        self.ranks.barrier()  # without it a rank could see the file of a stage that others have yet to enter
        if not done:
            work()
            peaks = torch.tensor([[peak_memory(), torch.cuda.max_memory_allocated() / 1e9]])
            gb, gpu_gb = self.ranks.gather(peaks).sum(0).tolist()  # all ranks have ended when this returns
            self.note(stage=name, iteration=iteration, seconds=time.time() - start, peak_gb=round(gb, 3), gpu_gb=round(gpu_gb, 3))
        self.ranks.say(f"  {name:<14}{summary():<86} " + ("done before" if done else f"{time.time() - start:6.1f} s"))

    def save(self, path: Path, content) -> None:
        if self.ranks.first:
            write(path, content)

    def metrics(self) -> list[dict]:
        """The rows of all iterations so far, which it writes into metrics.json."""
        names = ["metrics.json", *["reranked.json"] * bool(self.config.rerank)]
        paths = [self.out / f"iter{t}" / name for t in range(self.config.iters + 1) for name in names]
        rows = [row for path in paths if path.exists() for row in read(path)]
        self.save(self.out / "metrics.json", json.dumps(rows, indent=1))
        return rows


# Stages -------------------------------------------------------------------------------------------------------------

def load_student(run: Run, folder: str | Path, architecture: str = "colbert"):
    """A folder of this project knows its architecture; `architecture` is for what iteration 0 or 1 starts from."""
    from pairdistill import Student, automatic_chunk
    c = run.config
    student = Student.from_pretrained(str(folder), architecture, c.dim or None, c.query_length, c.passage_length,
                                      c.expansion, markers=c.markers, seed=c.seed).to(run.ranks.device)
    student.chunk = c.passage_chunk or automatic_chunk(student)
    return student


def save_student(run: Run, student, folder: Path) -> None:
    if run.ranks.first:
        student.save_pretrained(folder / "writing.student")
        os.replace(folder / "writing.student", folder / "student")


def iteration_zero(run: Run, folder: Path) -> None:
    """The student before the first iteration: loaded, or built from random weights, and where it cannot retrieve yet
    trained by L_CL alone."""
    c = run.config
    student = load_student(run, scratch(run, "student") if c.student == "scratch" else c.student,
                           "colbert" if c.start else c.architecture)
    if c.base_steps:
        history = contrast(run, student, c.base_steps, c.base_lr, c.temperature, "  iteration 0", folder / "checkpoint")
        log_losses(run, 0, history)
    elif student.drawn:
        run.ranks.say(f"  {c.student} has no projection to {student.dim} dimensions: it gets one of random numbers; --base-steps trains it, "
                      f"--dim 0 does without")
    save_student(run, student, folder)


def lengths(run: Run, folder: Path) -> str:
    if not run.ranks.first:
        return ""
    s = json.loads((folder / "student" / "pairdistill.json").read_text())
    return (f"queries of {s['query_length']} tokens{', filled with [MASK]s' * s['query_expansion']}, passages of "
            f"{s['passage_length']} at most")


def contrast(run: Run, student, steps: int, lr: float, temperature: float, desc: str, checkpoint: Path | None = None):
    """L_CL alone, against the labelled passages of the other queries in the batch."""
    from pairdistill import train
    qids = [q for q in run.train_ids if run.positives[q]]
    n = len(qids)
    examples = dict(passages=np.array([[run.positives[q][0]] for q in qids]), teacher=np.zeros((n, 1), np.float32),
                    pairs=np.full((n, 0, 2), -1), pair_probs=np.zeros((n, 0), np.float32), positive=np.zeros(n, np.int64))
    return train(student, run.text(qids), run.data.passages, examples, steps=steps, batch=run.config.base_batch, lr=lr,
                 warmup=steps // 10, temperature=temperature, tau=1.0, lambda_kd=0.0, lambda_pair=0.0,
                 pair_reduction="mean", seed=run.config.seed, ranks=run.ranks, desc=desc, checkpoint_folder=checkpoint)


def scratch(run: Run, role: str) -> str:
    """A random encoder with a vocabulary of this collection, as a folder; a teacher's is then trained to retrieve, which
    teaches it which words are close faster than a cross-encoder learns it."""
    from pairdistill import Student, scratch_encoder
    c, folder = run.config, run.out / "scratch" / role
    if not (folder / "config.json").exists():
        run.ranks.barrier()  # without it a rank could see what rank 0 has made meanwhile
        raw = folder.with_name(role + ".random")
        if run.ranks.first:
            scratch_encoder(raw, [*run.data.passages, *run.text(run.train_ids)], teacher=role == "teacher", seed=c.seed)
        run.ranks.barrier()
        if role == "teacher":
            retriever = Student.from_pretrained(str(raw), query_length=c.query_length, passage_length=c.teacher_length,
                                                query_expansion=False, seed=c.seed).to(run.ranks.device)
            contrast(run, retriever, c.encoder_steps, c.teacher_lr, 1 / 8, "  teachers' encoder")
            if run.ranks.first:
                retriever.encoder.save_pretrained(raw)
        if run.ranks.first:
            os.replace(raw, folder)
        run.ranks.barrier()
    return str(folder)


def log_losses(run: Run, iteration: int, history: list[list[float]]) -> None:
    for step, (total, cl, kd, pair) in enumerate(history):
        run.note(iteration=iteration, step=step, total=total, cl=cl, kd=kd, pair=pair)


def build_index(run: Run, folder: Path) -> None:
    from checkpoints import digest
    from retrieve import MEASURED, Index
    Index.build(load_student(run, folder / "student"), run.data.passages, folder / "index",
                passage_ids=run.data.passage_ids, student_digest=digest(folder / "student"), rank=run.ranks.rank,
                world=run.ranks.world, barrier=run.ranks.barrier, seed=run.config.seed,
                queries=run.text((run.train_ids or run.eval_ids)[:MEASURED]))


def search(run: Run, folder: Path, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Each rank searches its share of the queries -> scores float32 [n, k], positions int64 [n, k] on every rank."""
    import torch
    from retrieve import Index
    from tqdm import tqdm
    student, share = load_student(run, folder / "student"), run.ranks.share(len(texts))
    index, k = Index.load(folder / "index", run.ranks.device), min(k, len(run.data.passages))
    parts = [(torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64))]
    bar = tqdm(range(share.start, share.stop, 512), desc="  search", disable=not run.ranks.first, leave=False, mininterval=1.0)
    with torch.inference_mode():
        for start in bar:
            q, q_mask = student.encode_queries(texts[start:min(start + 512, share.stop)])
            parts.append(tuple(x.cpu() for x in index.search(q, k, q_mask)))
    return tuple(run.ranks.gather(torch.cat(x)).numpy() for x in zip(*parts))


def evaluate_student(run: Run, iteration: int, folder: Path) -> None:
    """Retrieves for the held-out queries: metrics.json of the iteration, and the run that the teachers rerank."""
    k = run.config.eval_k
    scores, positions = search(run, folder, run.text(run.eval_ids), k + bool(run.own))
    if not run.ranks.first:
        return
    own = positions == np.array([[run.own.get(q, -1)] for q in run.eval_ids])
    order = np.argsort(own, axis=1, kind="stable")[:, :k]  # a query's own passage to the end
    scores, positions = np.take_along_axis(scores, order, 1), np.take_along_axis(np.where(own, -1, positions), order, 1)
    ids = run.data.passage_ids
    found = {q: {ids[p]: float(s) for p, s in zip(ps, ss) if p >= 0} for q, ps, ss in zip(run.eval_ids, positions, scores)}
    rows = [dict(system="student", iteration=iteration, **run.evaluate(found))]
    if iteration == 0 and run.config.bm25:
        bm25 = bm25_run(run.data, {q: run.data.queries[q] for q in run.eval_ids}, k + bool(run.own))
        for q in run.own:
            bm25[q].pop(q, None)
        rows.insert(0, dict(system="bm25", iteration=0, **run.evaluate(bm25)))
    write(folder / "evaluated.npz", dict(scores=scores, positions=positions))
    write(folder / "metrics.json", json.dumps(rows, indent=1))
    run.metrics()


def retrieve(run: Run, iteration: int, previous: Path, folder: Path) -> None:
    """The top passages of each training query, by the student of the previous iteration."""
    c, queries = run.config, np.arange(len(run.train_ids))
    if c.train_queries and c.train_queries < len(queries):
        queries = np.sort(np.random.default_rng([c.seed, iteration]).permutation(queries)[:c.train_queries])
    scores, positions = search(run, previous, run.text([run.train_ids[q] for q in queries]), c.retrieve_k)
    run.save(folder / "retrieved.npz", dict(queries=queries, positions=positions, scores=scores))


def with_positive(positions: np.ndarray, gold: list[int]) -> np.ndarray:
    """The retrieved passages; where none of them is labelled, the labelled one takes the last place."""
    if gold and not np.isin(positions, gold).any():
        positions = np.append(positions[:-1], gold[0])
    return positions


def rerank_pointwise(run: Run, teacher, folder: Path) -> None:
    import torch
    found = read(folder / "retrieved.npz")
    share = run.ranks.share(len(found["queries"]))
    qids = [run.train_ids[q] for q in found["queries"]]
    gold = run.positives if run.config.positive == "label" else {}
    rows = np.array([with_positive(found["positions"][r], gold.get(qids[r], [])) for r in range(len(qids))])
    items = ((run.data.queries[qids[r]], run.data.passages[p]) for r in share for p in rows[r])
    scores = teacher.score(items, rows[share.start:share.stop].size).reshape(len(share), rows.shape[1])
    scores = run.ranks.gather(torch.from_numpy(scores)).numpy()
    run.save(folder / "pointwise.npz", dict(queries=found["queries"], positions=rows, scores=scores))


def compare_pairs(run: Run, iteration: int, teacher, folder: Path) -> None:
    """Keeps the best passages in the pointwise order, samples pairs of near neighbours, asks the pairwise teacher.

    # PAPER: D_pair is of the k = 100 retrieved passages. # OURS: of the `kept` ones, as training scores no others. A labelled
    # passage that was not retrieved takes the last place (with_positive), so that L_CL has its positive; the paper is silent.
    """
    import torch
    from pairdistill import sample_pairs
    from teachers import preference
    c, ranked = run.config, read(folder / "pointwise.npz")
    if c.n_pairs and not c.lambda_pair:
        run.ranks.say("  --lambda-pair 0: nothing learns from these pairs; --n-pairs 0 saves the asking")
    queries, positions, scores = ranked["queries"], ranked["positions"], ranked["scores"]
    kept = min(c.kept, positions.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")
    by_label = c.positive == "label"
    passages, positive = np.empty((len(order), kept), np.int64), np.full(len(order), -1 if by_label else 0)
    point, pairs = np.empty((len(order), kept), np.float32), np.full((len(order), c.n_pairs, 2), -1)
    for r, row in enumerate(order):
        gold = run.positives[run.train_ids[queries[r]]] if by_label else []
        places = np.flatnonzero(np.isin(positions[r][row], gold))
        n_ranked = kept
        if len(places):
            if places[0] >= kept:  # ranked below what is kept: it takes the last place, and is in no pair
                row = np.append(row[:kept - 1], row[places[0]])
                n_ranked = kept - 1
            positive[r] = min(places[0], kept - 1)
        passages[r], point[r] = positions[r][row[:kept]], scores[r][row[:kept]]
        generator = torch.Generator().manual_seed((c.seed * 1009 + iteration) * 10_000_019 + int(queries[r]))
        unsure = torch.from_numpy(point[r, :n_ranked]) if c.pair_sampling == "unsure" else None
        sampled = sample_pairs(n_ranked, c.n_pairs, c.delta or None, generator, unsure)
        pairs[r, :len(sampled)] = sampled
    share = run.ranks.share(len(order))
    text = run.text([run.train_ids[q] for q in queries])
    r, n = np.nonzero(pairs[share.start:share.stop, :, 0] >= 0)
    r += share.start
    items = ((text[a], run.data.passages[passages[a, i]], run.data.passages[passages[a, j]])
             for a, (i, j) in zip(r, pairs[r, n]))
    asked = np.full((len(share), c.n_pairs, 2), np.nan, np.float32)
    if teacher:
        asked[r - share.start, n] = teacher.ask(items, len(r))
    asked = run.ranks.gather(torch.from_numpy(asked)).numpy()
    real = pairs[..., 0] >= 0
    probs = np.zeros(real.shape, np.float32)
    probs[real] = preference(asked[real])
    run.save(folder / "pairs.npz", dict(queries=queries, passages=passages, teacher=point, pairs=pairs, pair_probs=probs,
                                        asked=asked, positive=positive))


def pair_summary(folder: Path) -> dict[str, float]:
    """Appendix A.2, and the bias that `orders="both"` averages away."""
    f = read(folder / "pairs.npz")
    real = f["pairs"][..., 0] >= 0
    return dict(pairs=int(real.sum()), disagreement=float((f["pair_probs"][real] < 0.5).mean()) if real.any() else 0.0,
                position_bias=float((f["asked"][real].sum(-1) - 1).mean()) if real.any() else 0.0)


def distill(run: Run, iteration: int, previous: Path, folder: Path) -> None:
    from pairdistill import train
    c, f = run.config, read(folder / "pairs.npz")
    examples = {k: f[k] for k in ("passages", "teacher", "pairs", "pair_probs", "positive")}
    student = load_student(run, c.start if c.start and iteration == 1 else previous / "student", c.architecture)
    history = train(student, run.text([run.train_ids[q] for q in f["queries"]]), run.data.passages, examples,
                    steps=c.steps, batch=c.batch, lr=c.lr, warmup=c.warmup, temperature=c.temperature, tau=c.tau, lambda_kd=c.lambda_kd,
                    lambda_pair=c.lambda_pair, pair_reduction=c.pair_reduction, seed=c.seed + iteration, ranks=run.ranks,
                    desc="  train", negatives=c.negatives, checkpoint_folder=folder / "checkpoint",
                    note=lambda **row: run.note(iteration=iteration, **row))
    log_losses(run, iteration, history)
    save_student(run, student, folder)


def is_trained(spec: str) -> bool:
    return spec == "scratch" or spec.startswith("train:")


def train_teacher(run: Run, role: str, iteration_0: Path) -> None:
    """A teacher learns from the labels, against passages that the student of iteration 0 finds (section 4.1)."""
    import teachers
    c, mined = run.config, read(iteration_0 / "mined.npz")
    passages, qids = run.data.passages, [run.train_ids[q] for q in mined["queries"]]
    # A passage that answers no training query is only ever wrong: a teacher would learn the passage, not the question.
    answers = {p for q in qids for p in run.positives[q]}
    groups = [(run.data.queries[q], passages[run.positives[q][0]],
               [passages[p] for p in row if p in answers and p not in run.positives[q]]) for q, row in zip(qids, mined["positions"])]
    groups = [g for g in groups if g[2]]
    if len(groups) < run.ranks.world:
        raise ValueError(f"--{role} {getattr(c, role)}: {len(groups)} labelled queries retrieved a passage that answers another one, "
                         f"too few to train a teacher; give more labels or a larger --retrieve-k, or name a teacher that is trained")
    common = dict(steps=c.teacher_steps, lr=c.teacher_lr, seed=c.seed, ranks=run.ranks, query_length=c.query_length or 32,
                  passage_length=c.teacher_length, batch=c.teacher_queries)
    spec, folder, twin = getattr(c, role), run.out / "teachers" / ("writing." + role), run.out / "teachers" / "pointwise"
    start = scratch(run, "teacher") if spec == "scratch" else spec.removeprefix("train:")
    if role == "pointwise":
        history = teachers.train_pointwise(start, groups, folder, negatives=2, **common)
    else:  # what the pointwise teacher learned is a better start than none
        start = twin if c.pointwise == spec else start
        history = teachers.train_pairwise(start, groups, folder, **common)
    for step, (loss, accuracy) in enumerate(history):
        run.note(teacher=role, step=step, loss=loss, accuracy=accuracy)
    run.note(teacher=role, held_out=held_out_accuracy(run, role, folder, iteration_0))
    if run.ranks.first:
        os.replace(folder, folder.with_name(role))


def held_out_accuracy(run: Run, role: str, teacher: Path, iteration_0: Path) -> float:
    """Of (relevant passage, the best other one that student 0 found), each held-out query's: the share put in order."""
    import torch
    import teachers
    found, share = read(iteration_0 / "evaluated.npz")["positions"], run.ranks.share(len(run.eval_ids))
    asked = []
    for q, row in list(zip(run.eval_ids, found))[share.start:share.stop]:
        relevant = [run.number[p] for p, grade in run.qrels.get(q, {}).items() if grade > 0 and p in run.number]
        other = next((p for p in row if p >= 0 and p not in relevant), None)
        if relevant and other is not None:
            asked.append((run.data.queries[q], run.data.passages[relevant[0]], run.data.passages[other]))
    if role == "pointwise":
        reader = teachers.load_pointwise(str(teacher), device=run.ranks.device)
        margin = reader.score([(q, i) for q, i, _ in asked]) - reader.score([(q, j) for q, _, j in asked])
    else:
        margin = teachers.load_pairwise(str(teacher), run.config.orders, device=run.ranks.device).prefer(asked) - 0.5
    return float(run.ranks.gather(torch.from_numpy((margin > 0).astype(np.float32))).mean())


def teacher_accuracy(run: Run, role: str) -> str:
    if not run.ranks.first:
        return ""
    log = [r for r in run.log() if r.get("teacher") == role]
    if not log:
        return ""
    trained = np.mean([r["accuracy"] for r in log if "accuracy" in r][-10:])
    if trained < .55:  # a constant has .5
        run.ranks.say(f"  the {role} teacher has learned nothing: of the last triplets it puts {trained:.1%} in the right order, and chance "
                      f"50%; give another --teacher-lr, or more --teacher-steps, with --restart-from iter0/fit-{role}")
    return f"in the right order: {log[-1]['held_out']:.1%} of held-out pairs, {trained:.1%} of the last trained on"


def mine(run: Run, iteration_0: Path) -> None:
    """What the student of iteration 0 finds for labelled queries, as many as a teacher's training sees."""
    queries = np.array([n for n, q in enumerate(run.train_ids) if run.positives[q]])
    queries = np.random.default_rng(run.config.seed).permutation(queries)[:run.config.teacher_queries * run.config.teacher_steps]
    found = search(run, iteration_0, run.text([run.train_ids[q] for q in queries]), run.config.retrieve_k)[1]
    run.save(iteration_0 / "mined.npz", dict(queries=queries, positions=found))


def rerank_for_table(run: Run, iteration: int, pointwise, pairwise, folder: Path) -> None:
    """Each teacher reranks what this student found for the held-out queries (table 5): the pointwise one its best
    `rerank`, then the pairwise one the first `rerank_pairs` of that order, each with each (duoT5's sum of wins)."""
    import torch
    c, found = run.config, read(folder / "evaluated.npz")["positions"]
    share, depth = run.ranks.share(len(found)), min(c.rerank, found.shape[1])
    mine, text, passages = found[share.start:share.stop, :depth], run.text(run.eval_ids), run.data.passages
    items = ((text[r], passages[p]) for r, row in zip(share, mine) for p in row)
    scores = np.where(mine < 0, -np.inf, pointwise.score(items, mine.size).reshape(mine.shape))  # -1: nothing was found there
    order = np.argsort(-scores, axis=1, kind="stable")
    by_point = np.take_along_axis(mine, order, 1)
    systems, n, rows = {"pointwise": by_point}, min(c.rerank_pairs, depth), []
    if n > 1:
        i, j = np.triu_indices(n, 1)
        items = ((text[r], passages[row[a]], passages[row[b]]) for r, row in zip(share, by_point) for a, b in zip(i, j))
        p = np.where(by_point[:, j] < 0, 1, pairwise.prefer(items, len(mine) * len(i)).reshape(len(mine), len(i)))
        wins = np.zeros((len(mine), n))
        for column, (a, b) in enumerate(zip(i, j)):
            wins[:, a] += p[:, column]
            wins[:, b] += 1 - p[:, column]
        by_wins = np.argsort(-wins, 1, kind="stable")
        systems["pairwise"] = np.concatenate([np.take_along_axis(by_point, by_wins, 1), by_point[:, n:]], 1)
    for system, top in systems.items():
        top = np.concatenate([run.ranks.gather(torch.from_numpy(top)).numpy(), found[:, depth:]], 1)
        ranked = {q: {run.data.passage_ids[p]: float(-place) for place, p in enumerate(row) if p >= 0}
                  for q, row in zip(run.eval_ids, top)}
        if run.ranks.first:
            rows.append(dict(system=system, iteration=iteration, **run.evaluate(ranked)))
    run.save(folder / "reranked.json", json.dumps(rows, indent=1))
    run.metrics()


# The loop -----------------------------------------------------------------------------------------------------------

def iterate(config: Config, preset: str, restart: str | None, ranks) -> None:
    """Section 4.3, one call a stage."""
    import torch
    from retrieve import Index
    from transformers import AutoConfig
    from checkpoints import loading
    from teachers import Cache, known, load_pairwise, load_pointwise
    run = Run(config, preset, restart, ranks)
    if config.start and config.iters and not run.there("iter1/train"):  # now, not after days of indexing
        load_student(run, config.start, config.architecture)
    for role, asked in (("pointwise", config.iters or config.rerank), ("pairwise", config.compares)):  # now, too
        spec = getattr(config, role)
        if spec.startswith("train:") and not (run.out / "teachers" / role).exists():
            with loading(name := spec.removeprefix("train:")):
                AutoConfig.from_pretrained(name, trust_remote_code=False)
        elif asked and not is_trained(spec):
            known(spec, role)
    folders = [run.out / f"iter{t}" for t in range(config.iters + 1)]
    for folder in (*folders, run.out / "teachers") if ranks.first else ():
        folder.mkdir(exist_ok=True)
    say = ranks.say
    say(f"{config.data}: {len(run.data.passages):,} passages, {len(run.train_ids):,} training queries ({run.labelled:,} labelled), "
        f"{len(run.eval_ids):,} held-out queries; {ranks.world} rank{'s' * (ranks.world > 1)} on {ranks.device.type}; "
        f"{run.out}/config.json has every setting")

    def student_metrics(t: int) -> str:
        rows = read(folders[t] / "metrics.json") if ranks.first else []
        shown = ("MRR@10", "nDCG@10", "R@100", "answer R@5")
        return "; ".join(f"{r['system']} " + ", ".join(f"{m} {r[m]:.3f}" for m in shown if m in r) for r in rows)

    def index_and_evaluate(t: int) -> None:
        run.stage(t, "index", lambda: build_index(run, folders[t]), lambda: Index.load(folders[t] / "index").measured)
        run.stage(t, "evaluate", lambda: evaluate_student(run, t, folders[t]), lambda: student_metrics(t))

    say("iteration 0")
    run.stage(0, "student", lambda: iteration_zero(run, folders[0]), lambda: lengths(run, folders[0]))
    index_and_evaluate(0)

    specs = {role: getattr(config, role) for role in ("pointwise", "pairwise")}
    if any(map(is_trained, specs.values())):
        run.stage(0, "mine", lambda: mine(run, folders[0]))
    if "scratch" in specs.values():
        run.stage(0, "encoder", lambda: scratch(run, "teacher"))
    for role, spec in specs.items():
        if is_trained(spec):
            specs[role] = str(run.out / "teachers" / role)
            run.stage(0, "fit-" + role, lambda: train_teacher(run, role, folders[0]), lambda: teacher_accuracy(run, role))
    if not (config.iters or config.rerank):  # nothing is asked: table 1's zero-shot rows need no teacher
        return finish(run)
    cache = Cache(run.out / "teachers", f"scores{os.environ.get('GROUP_RANK', '0')}")  # torchrun's number of the machine
    show = lambda name: f"  {name}" if ranks.first else None
    pointwise = load_pointwise(specs["pointwise"], device=ranks.device, cache=cache, desc=show("pointwise"))
    pairwise = config.compares and load_pairwise(specs["pairwise"], config.orders, device=ranks.device, cache=cache, desc=show("pairwise"))

    def from_cache() -> str:
        asked, found = ranks.gather(torch.tensor([[cache.asked, cache.found]])).sum(0).tolist()
        cache.found = cache.asked = 0
        return f"{found:,} of {asked:,} scores ({found / max(asked, 1):.0%}) from the cache"

    def rerank(t: int) -> None:
        path = folders[t] / "reranked.json"
        run.stage(t, "teachers", lambda: rerank_for_table(run, t, pointwise, pairwise, folders[t]),
                  lambda: "; ".join(f"{r['system']} MRR@10 {r['MRR@10']:.3f}" for r in read(path)) if ranks.first else "")
        cache.found = cache.asked = 0

    if config.rerank and not config.iters:
        rerank(0)
    for t in range(1, config.iters + 1):
        say(f"iteration {t}")
        previous, folder = folders[t - 1], folders[t]
        if config.rerank:
            rerank(t - 1)
        run.stage(t, "retrieve", lambda: retrieve(run, t, previous, folder))
        run.stage(t, "pointwise", lambda: rerank_pointwise(run, pointwise, folder), from_cache)
        run.stage(t, "pairwise", lambda: compare_pairs(run, t, pairwise, folder),
                  lambda: "{pairs:,} pairs, {disagreement:.0%} disagree with pointwise, position bias {position_bias:+.3f}; ".format(
                      **pair_summary(folder)) + from_cache())
        run.stage(t, "train", lambda: distill(run, t, previous, folder))
        index_and_evaluate(t)
    finish(run)


# The report ---------------------------------------------------------------------------------------------------------

def title_of(row: dict) -> str:
    if row["system"] == "bm25":
        return "BM25"
    return f"student {row['iteration']}" if row["system"] == "student" else f"{row['system']} teacher on student {row['iteration']}"


def finish(run: Run) -> None:
    if not run.ranks.first:
        return
    rows = run.metrics()
    names = [m for m in rows[0] if m not in ("system", "iteration") and all(m in r for r in rows)]
    print(f"\n{len(run.eval_ids):,} held-out queries{'':<18}" + "".join(f"{m:>11}" for m in names))
    for r in sorted(rows, key=lambda r: (r["system"] != "bm25", r["iteration"], r["system"] != "student", r["system"] != "pointwise")):
        print(f"  {title_of(r):<40}" + "".join(f"{r[m]:>11.3f}" for m in names))
    picture(run, rows)
    print(f"\n{run.out}/report.png has the picture; the last student is {run.out}/iter{run.config.iters}/student")
    print(f"search with it: python retrieve.py {run.out} \"how do I join two paths\"   ({time.time() - run.started:.0f} s in all)")


def picture(run: Run, rows: list[dict]) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = run.log()
    figure, ((quality, losses), (agreement, times)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    figure.suptitle(f"PairDistill on {run.config.data}: {len(run.data.passages):,} passages, {len(run.eval_ids):,} held-out queries")

    student = sorted((r["iteration"], r["MRR@10"]) for r in rows if r["system"] == "student")
    quality.plot(*zip(*student), "o-", color="C0", label="student")
    for t, y in student:
        quality.annotate(f"{y:.3f}", (t, y), (0, 7), textcoords="offset points", ha="center", color="C0")
    for system, colour, label in (("pointwise", "C1", "pointwise teacher, reranking it"), ("pairwise", "C2", "pairwise teacher, reranking it")):
        points = sorted((r["iteration"], r["MRR@10"]) for r in rows if r["system"] == system)
        if points:
            quality.plot(*zip(*points), "s", color=colour, label=label)
    for r in rows:
        if r["system"] == "bm25":
            quality.axhline(r["MRR@10"], color="grey", linestyle="--", label="BM25")
    quality.set(title="quality", xlabel="iteration", ylabel="MRR@10", xticks=[t for t, _ in student])
    quality.margins(y=0.2)
    quality.legend(fontsize=8)

    start = 0
    for t in range(run.config.iters + 1):
        steps = [r for r in log if r.get("iteration") == t and "step" in r]
        if not steps:
            continue
        steps = steps[max(n for n, r in enumerate(steps) if r["step"] == 0):]  # as it was last trained
        window = max(1, len(steps) // 20)
        x = start + np.arange(len(steps))[window - 1:]
        for n, (name, label) in enumerate((("cl", "$L_{CL}$"), ("kd", "$L_{KD}$"), ("pair", "$L_{pair}$"))):
            if any(r[name] for r in steps):
                y = np.convolve([r[name] for r in steps], np.ones(window) / window, "valid")
                losses.plot(x, y, color=f"C{n}", label=label if t == run.config.iters else None)
        losses.axvline(start, color="grey", linewidth=0.5)
        losses.text(start, 1.0, f" {t}", transform=losses.get_xaxis_transform(), va="top", fontsize=8, color="grey")
        start += len(steps)
    losses.set(title="loss terms, unweighted; the lines are where iterations begin", xlabel="step", yscale="log")
    if losses.lines:
        losses.legend(fontsize=8)

    summaries = [pair_summary(run.out / f"iter{t}") for t in range(1, run.config.iters + 1)]
    t = np.arange(1, len(summaries) + 1)
    agreement.bar(t - 0.2, [s["disagreement"] for s in summaries], 0.4, label="pairs where the teachers disagree (A.2)")
    agreement.bar(t + 0.2, [s["position_bias"] for s in summaries], 0.4, label="position bias, mean of $p_{ij} + p_{ji} - 1$")
    agreement.axhline(0, color="black", linewidth=0.5)
    agreement.set(title="the teachers", xlabel="iteration", xticks=t)
    agreement.margins(y=0.25)
    agreement.legend(fontsize=8)

    spent: dict[str, float] = {}
    stages = [r for r in log if "stage" in r]
    for r in stages:
        spent[r["stage"]] = spent.get(r["stage"], 0) + r["seconds"]
    times.barh(list(spent)[::-1], list(spent.values())[::-1], color="C0")
    peak = max((r["peak_gb"] for r in stages), default=0)
    times.set(title=f"where the time went: {sum(spent.values()):.0f} s, with at most {peak:.1f} GB in all ranks",
              xlabel="seconds, all iterations")
    figure.savefig(run.out / "writing.report.png", dpi=110)
    plt.close(figure)
    os.replace(run.out / "writing.report.png", run.out / "report.png")


def main(argv: list[str]) -> int:
    preset, config, restart, dry = parse(argv)
    stopped = (f"\nstopped; the same command{', without --restart-from once a stage was named above,' * bool(restart)} goes on from "
               f"the last finished stage in {config.out}")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun's --max-restarts: what was redone is kept
        restart = None
    import ranks
    try:
        check(config)
        if dry and ranks.under_torchrun():
            raise ValueError("--dry-run: start it without torchrun, with --gpus for the ranks of one machine")
        if not ranks.under_torchrun():
            n, why = ranks.how_many(config.gpus)
            if why:
                print(why, flush=True)
            if dry:
                from dryrun import dry_run
                dry_run(Run(config, preset, restart, ranks.Ranks(), dry), plan(config), row_of, n)
                return 0
            if n > 1:
                code = ranks.launch(n, [os.path.abspath(__file__), *argv])
                if code not in (0, 2):
                    print(stopped, flush=True)
                return code
        else:
            ranks.end_with_launcher()
        ranks.exit_on_sigterm()
        me = ranks.init()
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        warnings.formatwarning = lambda message, *_: f"  {message}\n"
        if not me.first:
            warnings.simplefilter("ignore")
        iterate(config, preset, restart, me)
        me.close()
        return 0
    except ValueError as e:
        return ranks.refuse(e)
    except (KeyboardInterrupt, SystemExit) as e:
        if ranks.LAUNCHED not in os.environ:  # else the parent says it
            print(stopped, flush=True)
        return 130 if isinstance(e, KeyboardInterrupt) else e.code
    except Exception as e:
        if "No space left" in str(e) or "requested and" in str(e):  # numpy says so; of the score cache, teachers.Cache says it
            print(f"error: the disk that holds {config.out}, or the texts made of --data, is full; what is finished is kept: make room, "
                  f"and the same command goes on", file=sys.stderr, flush=True)
            return 2
        alone = ranks.LAUNCHED not in os.environ  # else the parent says what ended first, and how to go on
        if not ranks.is_lost(e):
            traceback.print_exc()
        elif alone:
            print(f"error: another rank has ended, and rank {os.environ['RANK']} cannot go on alone", file=sys.stderr, flush=True)
        if alone:
            print(stopped, flush=True)
        return 1


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: a thread of gloo or of the launcher can abort an interpreter that is ending
