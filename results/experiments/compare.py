"""Students of finished runs held against each other, query by query.

    python results/experiments/compare.py NAME=RUN[/iterN][,RUN...] ... [--metric nDCG@10] --out FILE.json
    python results/experiments/compare.py FILE.json ... --plot FILE.png
    python results/experiments/compare.py RUN ... --asked FILE.json

A system is a name and the runs (of run.py, on the same collection and split) that are its seeds; of each the last student
counts (that of --iters), or that of iterN. A query's value is its mean over the seeds. Written are, for each system, the mean
over queries; its 95% interval, by 10,000 bootstrap samples of the queries; the seeds' own means; and the difference to the first
system with the p-value of a paired randomization test (both sides, 10,000 changes of signs). The lines printed are those of the
README's table.

--asked: of the pairs that iteration 1 asked about, those with one passage that answers by the training labels (whether the run
read them or not): the shares that each teacher puts in the right order. sure: the mean of |p - 1/2| over all pairs; position bias: the mean of p_ij + p_ji - 1, which p is without.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import ir_measures
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import distinct_scores
from ranks import Ranks
from run import Config, Run, pair_summary, read

SAMPLES = 10_000


def settings_of(home: Path) -> dict:
    if not (home / "config.json").exists():
        raise ValueError(f"{home} is not a run: it has no config.json")
    return read(home / "config.json")


def opened(home: Path) -> Run:
    settings = settings_of(home)
    preset = settings.pop("preset")
    return Run(Config(**{**settings, "out": str(home)}), preset, None, Ranks(), dry=True)


def asked(home: Path) -> dict:
    """How often the teachers are right about the pairs of iteration 1, by qrels/train.tsv."""
    run, path = opened(home), home / "iter1" / "pairs.npz"
    if not path.exists():
        raise ValueError(f"{home} has no iter1/pairs.npz: no pair was asked about")
    f, labels = read(path), run.data.qrels["train"]
    r, n = np.nonzero(f["pairs"][..., 0] >= 0)
    i, j = f["pairs"][r, n].T
    answers = np.array([[labels.get(run.train_ids[q], {}).get(run.data.passage_ids[p], 0) > 0 for p in row]
                        for q, row in zip(f["queries"], f["passages"])])
    one, first, p = answers[r, i] != answers[r, j], answers[r, i], f["pair_probs"][r, n]
    right = lambda prefers: float((prefers == first)[one].mean()) if one.any() else None
    return {"run": home.name, "on": Path(run.config.data).name, "seed": run.config.seed, "pairs": len(p), "with one": int(one.sum()),
            "pointwise": right(f["teacher"][r, i] > f["teacher"][r, j]), "pairwise": right(p > .5),
            "sure": float(np.abs(p - .5).mean()), "position bias": pair_summary(path.parent)["position_bias"]}


def per_query(folder: Path, metric: str) -> tuple[str, dict[str, float]]:
    """-> the collection and split, {query: value} of one student; a query without results has 0."""
    home = folder.parent if re.fullmatch(r"iter\d+", folder.name) else folder
    if folder == home:
        folder = home / f"iter{settings_of(home)['iters']}"
    if not (folder / "evaluated.npz").exists():
        raise ValueError(f"{folder} has no evaluated.npz: let the run end, or give an iterN of it that was evaluated")
    run = opened(home)
    file, ids = read(folder / "evaluated.npz"), run.data.passage_ids
    found = {q: {ids[p]: float(s) for p, s in zip(row, scores) if p >= 0}
             for q, row, scores in zip(run.eval_ids, file["positions"], file["scores"])}
    found = {q: distinct_scores(scores) for q, scores in found.items()}  # as run.py does: providers break ties differently
    try:
        measure = ir_measures.parse_measure(metric.replace("MRR", "RR"))
    except NameError as e:
        raise ValueError(f"--metric {metric}: {e}; such as nDCG@10, MRR@10, R@100") from None
    values = {row.query_id: row.value for row in ir_measures.iter_calc([measure], run.qrels, found)}
    return f"{Path(run.config.data).name}, {run.config.split}", {q: values.get(q, 0.0) for q in run.qrels}


def interval(values: np.ndarray, draw: np.random.Generator) -> list[float]:
    means = [values[draw.integers(0, len(values), len(values))].mean() for _ in range(SAMPLES)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def p_value(differences: np.ndarray, draw: np.random.Generator) -> float:
    """Of the paired randomization test (Smucker et al. 2007): how often changed signs give as large a mean difference."""
    signs = draw.integers(0, 2, (SAMPLES, len(differences)), dtype=np.int8) * 2 - 1
    return float((1 + (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).sum()) / (1 + SAMPLES))


def compare(systems: dict[str, list[Path]], metric: str) -> tuple[str, list[dict]]:
    draw, rows, first, where = np.random.default_rng(0), [], None, None
    for name, folders in systems.items():
        seeds = []
        for folder in folders:
            here, values = per_query(folder, metric)
            where, first_ids = where or here, first_ids if rows or seeds else list(values)
            if here != where or list(values) != first_ids:
                raise ValueError(f"{folder} was evaluated on other queries ({here}) than the runs before it ({where})")
            seeds.append(np.array(list(values.values())))
        mean = np.mean(seeds, 0)
        rows.append({"system": name, metric: float(mean.mean()), "interval": interval(mean, draw), "queries": len(mean),
                     "seeds": [float(seed.mean()) for seed in seeds]})
        if first is None:
            first = mean
        else:
            rows[-1] |= {"difference": float((mean - first).mean()), "p": p_value(mean - first, draw)}
    return where, rows


def line(row: dict, metric: str) -> str:
    """A row of the README's table."""
    low, high = row["interval"]
    versus = f"{row['difference']:+.3f} | {'< .001' if row['p'] < .001 else format(row['p'], '.3f')}" if "p" in row else " | "
    return f"| {row['system']} | {len(row['seeds'])} | {row[metric]:.3f} | {low:.3f} to {high:.3f} | {versus} |"


def plot(files: list[Path], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    said = [json.loads(file.read_text()) for file in files]
    sizes = [len(one["rows"]) for one in said]
    figure, panels = plt.subplots(len(said), figsize=(9, .8 * len(said) + .28 * sum(sizes)), height_ratios=sizes,
                                  layout="constrained", squeeze=False)
    for axes, one in zip(panels[:, 0], said):
        for y, row in enumerate(one["rows"]):
            axes.plot(row["interval"], [y, y], color="tab:blue")
            axes.plot(row["seeds"], [y] * len(row["seeds"]), "|", color="gray", markersize=12)
            axes.plot(row[one["metric"]], y, "o", color="tab:blue")
        axes.axvline(one["rows"][0][one["metric"]], color="lightgray", zorder=0)
        axes.set(yticks=range(len(one["rows"])), yticklabels=[row["system"] for row in one["rows"]],
                 xlabel=f"{one['metric']} ({one['on']})")
        axes.locator_params(axis="x", nbins=7)
        axes.margins(y=.3)
        axes.invert_yaxis()
    figure.suptitle("mean, and 95% of bootstrap samples of the queries; | is a seed", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="+", metavar="NAME=RUN,...")
    parser.add_argument("--metric", default="nDCG@10")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--asked", type=Path)
    args = parser.parse_args()
    if sum(path is not None for path in (args.out, args.plot, args.asked)) != 1:
        parser.error("one of --out, with NAME=RUN..., --plot, with FILE.json..., and --asked, with RUN..., is needed")
    try:
        if args.asked:
            rows = [asked(Path(run)) for run in args.systems]
            print(*rows, sep="\n")
            args.asked.write_text(json.dumps(rows, indent=1))
            return 0
        if args.plot:
            plot([Path(name) for name in args.systems], args.plot)
            return 0
        systems = {}
        for system in args.systems:
            name, _, folders = system.partition("=")
            if not folders or name in systems:
                parser.error(f"{system}: expected NAME=RUN[,RUN...], each name once")
            systems[name] = [Path(folder) for folder in folders.split(",")]
        where, rows = compare(systems, args.metric)
        print(*(line(row, args.metric) for row in rows), sep="\n")
        args.out.write_text(json.dumps({"on": where, "metric": args.metric, "rows": rows}, indent=1))
        return 0
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
