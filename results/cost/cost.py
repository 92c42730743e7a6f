"""GPU-hours of the paper's run, stage by stage, from the throughputs that results/h200/throughput.py measured.

    python results/cost/cost.py results/h200/throughput.json [--out results/cost/cost.json]
    python results/cost/cost.py --predict --out results/cost/prediction.json      # from operations and assumptions, no GPU

The run: ColBERTv2 (a BERT-base) as student, MiniLM and duoT5-3B as teachers, table 7's values, on MS MARCO's 8.8 million
passages and 808,000 queries, 502,000 of them labelled (appendix B.1); dryrun.amounts counts what each stage has to do. A
question that was asked in an earlier iteration is not asked again, so the teachers' hours are upper bounds. Evaluation is not
counted: 6,980 queries, of which the teachers' table asks a hundredth of an iteration's questions.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dryrun import ALL_COMPARED, LISTED, amounts
from run import Config

PASSAGES, QUERIES, LABELLED, JUDGED = 8_800_000, 808_000, 502_000, 6_980
TOKENS = 6.0e8  # of all passages: ColBERT's count

# What --predict assumes.
PEAK = 989e12  # operations a second in bfloat16, of an H100 or H200 by its data sheet
BERT_BASE = 12 * (4 * 768**2 + 2 * 768 * 3072)  # weights that a token is multiplied with; attention adds a few percent
MINILM = 6 * (4 * 384**2 + 2 * 384 * 1536)
T5_3B = 24 * (4 * 1024 * 4096 + 2 * 1024 * 16384) + 24 * 2 * 1024 * 4096  # the encoder, and the decoder's cross-attention
PASSAGE, POINTWISE, PAIRWISE = 80, 86, 169  # tokens of a passage and of each kind of question, special ones included
USED = {"encode": 0.3, "train": 0.3, "pointwise": 0.15, "pairwise": 0.3}  # shares of PEAK
HOST = 5_000  # questions a second that a process tokenizes and batches: 205 us each on two CPU cores, with MiniLM's tokenizer
AT_ONCE, VISITS = 256, 65_536  # queries searched together: 2^29 / (65,536 centroids x 32 tokens); the lists that they visit
LAUNCHES, LAUNCH = 12, 10e-6  # kernels for each list (retrieve.py, _find: counted), and the seconds of one
CODED = 60_000  # tokens a second: what two CPU cores reached (results/retrieval); more cores have not been measured


def predicted() -> tuple[dict, dict]:
    """{stage: rate}, {stage: what it rests on}"""
    rate = {"encode": USED["encode"] * PEAK / (2 * BERT_BASE * PASSAGE), "code": CODED,
            "retrieve": AT_ONCE / (VISITS * LAUNCHES * LAUNCH),
            "pointwise": min(USED["pointwise"] * PEAK / (2 * MINILM * POINTWISE), HOST),
            "pairwise": USED["pairwise"] * PEAK / (2 * T5_3B * PAIRWISE), "train": USED["train"] * PEAK / (6 * BERT_BASE)}
    of_peak = lambda name, weights: f"{USED[name]:.0%} of {PEAK / 1e12:.0f} TFLOP/s, {weights / 1e6:,.0f} million weights a token"
    how = {"encode": f"{of_peak('encode', BERT_BASE)}, {PASSAGE} tokens a passage",
           "code": f"{CODED:,} tokens/s, as on two CPU cores",
           "retrieve": f"{AT_ONCE} queries visit {VISITS:,} lists, {LAUNCHES} launches of {LAUNCH * 1e6:.0f} us for each",
           "pointwise": f"the process that tokenizes: {HOST:,} questions/s; the GPU at {of_peak('pointwise', MINILM)} could do more",
           "pairwise": f"{of_peak('pairwise', T5_3B)}, {PAIRWISE} tokens a question",
           "train": f"{of_peak('train', BERT_BASE)}, three products of matrices each, recomputation aside"}
    return rate, how


def measured(said: dict) -> tuple[dict, dict]:
    """The same, from what throughput.py wrote; a stage that was not measured is in neither."""
    def row(part: str, **wanted) -> dict | None:
        return next((r for r in said.get(part, []) if all(r.get(k) == v for k, v in wanted.items())), None)

    rate, how = {}, {}
    if found := row("encode", model="BERT-base"):
        rate["encode"], how["encode"] = found["passages/s"], "passages encoded by a BERT-base"
    if found := row("train", model="BERT-base", **{"tokens a passage": "MS MARCO's"}):
        rate["train"], how["train"] = found["tokens/s"], f"a BERT-base, {found['s a step']:.2f} s a step"
    for role, model in (("pointwise", "MiniLM"), ("pairwise", "T5-3B")):
        if found := row("teachers", model=model, role=role):
            rate[role], how[role] = found["items/s"], f"{model}, {found['tokens an item']:.0f} tokens a question"
    if indexes := [r for r in said.get("retrieve", []) if r["engine"] == "index"]:
        largest = max(indexes, key=lambda r: r["tokens"])
        rate["code"], how["code"] = largest["build tokens/s"], f"at {largest['tokens']:,} tokens, training the tables included"
        listed = [r for r in indexes if r["tokens"] >= ALL_COMPARED]
        power, source = -LISTED, "as it was on a CPU"
        if len({r["tokens"] for r in listed}) > 1:
            power, source = np.polyfit(*(np.log([r[k] for r in listed]) for k in ("tokens", "q/s")), 1)[0], "as measured"
        rate["retrieve"] = largest["q/s"] * (TOKENS / largest["tokens"]) ** power
        how["retrieve"] = (f"{largest['q/s']:,.0f} queries/s at {largest['tokens']:,} tokens, extrapolated to {TOKENS:,.0f} by the "
                           f"power {power:.2f}, {source}")
    return rate, how


def stages(config: Config) -> list[tuple[str, str, float, int]]:
    """(stage, unit, amount each time, times beyond one an iteration)"""
    n = {name: amount for name, (amount, _) in amounts(config, PASSAGES, QUERIES, LABELLED, JUDGED).items()}
    tokens = config.batch * (config.kept * PASSAGE + 9)  # a query has about 9 that are attended to
    return [("encode", "passages", n["index"], 1), ("code", "tokens", TOKENS, 1), ("retrieve", "queries", n["retrieve"], 0),
            ("pointwise", "questions", n["pointwise"], 0), ("pairwise", "questions", n["pairwise"], 0),
            ("train", "tokens", n["train"] * tokens, 0)]


def cost(rate: dict, how: dict, config: Config = Config()) -> list[dict]:
    """A row a stage: GPU-hours of 2 and of 3 iterations; the index is built once more, for the last student."""
    rows = []
    for stage, unit, amount, more in stages(config):
        hours = {f"hours, {k} iterations": amount * (k + more) / rate[stage] / 3600 if stage in rate else None for k in (2, 3)}
        rows.append({"stage": stage, "unit": unit, "an iteration": amount, "a second": rate.get(stage), **hours,
                     "how": how.get(stage, "not measured")})
    return rows


def line(row: dict) -> str:
    """A row of the README's table."""
    cell = lambda x: "" if x is None else f"{x:,.1f}"
    amount = f"{row['an iteration']:,.0f} {row['unit']}" if "unit" in row else ""
    numbers = " | ".join(cell(row.get(key)) for key in ("a second", "hours, 2 iterations", "hours, 3 iterations"))
    return f"| {row['stage']} | {amount} | {numbers} | {row['how']} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="?", type=Path, help="what results/h200/throughput.py wrote")
    parser.add_argument("--predict", action="store_true", help="from operations at an assumed share of the peak, instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.predict:
        what, (rate, how) = "predicted, not measured", predicted()
    elif args.measured is None or not args.measured.exists():
        print(f"{args.measured or 'no file'}: no throughputs of a GPU have been measured, so there is no cost to tell; "
              "bash results/h200/collect.sh measures them, --predict shows what may be expected", file=sys.stderr)
        return 2
    else:
        try:
            said = json.loads(args.measured.read_text())
        except ValueError as error:
            print(f"{args.measured} is no JSON ({error}): have results/h200/throughput.py write it again", file=sys.stderr)
            return 2
        what = f"measured on {said['machine']}"
        if said["tiny"] or said["machine"].startswith("CPU"):
            what = f"no measurement ({said['machine']}{', tiny models' * said['tiny']}): this shows the arithmetic alone"
        rate, how = measured(said)
    rows = cost(rate, how)
    print(f"the paper's run, {what}")
    totals = {key: sum(row[key] for row in rows if row[key] is not None) for key in ("hours, 2 iterations", "hours, 3 iterations")}
    missing = [row["stage"] for row in rows if row["a second"] is None]
    print("| stage | an iteration | a second | 2 iterations, h | 3 iterations, h | by |\n|---|---|---|---|---|---|")
    print(*map(line, rows), sep="\n")
    print(line({"stage": "in all", **totals, "how": f"without {', '.join(missing)}" if missing else ""}))
    if args.out:
        args.out.write_text(json.dumps({"what": what, **totals, "not measured": missing, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
