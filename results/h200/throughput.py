"""How fast the stages of the paper's run are on this machine's GPU, and whether its kernels are right there.

    python results/h200/throughput.py [kernels encode train teachers retrieve] [--minilm FOLDER] [--out FILE]
    python results/h200/throughput.py --tiny --out FILE     # the same code in seconds, small enough for a CPU: no measurement

Speed needs no trained weights: the models have the published ones' shapes and random weights (MiniLM's own where --minilm
names its folder), and the texts are made of words that are one token each, in MS MARCO's lengths. A part's rows replace those
that FILE has of it; `results/cost/cost.py` makes the paper's run of them.

kernels   scores and gradients at the paper's 32 queries x 64 passages x 180 tokens, in three types and both layouts, against
          float64, and whether a second run gives the same bits; the same of the objective. Ends with 1 where one is wrong.
encode    passages a second as the index encodes them, tokenizing included
train     steps of the whole objective, as run.py makes them: with 180 tokens a passage, and with MS MARCO's lengths
teachers  questions a second, tokenizing included
retrieve  index and search of made embeddings: words mixed with their passage's topic and noise
"""
import argparse
import gc
import importlib.metadata
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HOME = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOME), str(HOME / "results" / "retrieval")]
import maxsim_kernel as mk
from bench import commit
from pairdistill import Student, automatic_chunk, peak_flops, sample_pairs, train
from ranks import Ranks, has_bfloat16

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WORDS = ["".join(letters) for letters in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=3)]
BERTS = {"MiniLM": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
         "BERT-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)}
T5S = {"T5-3B": dict(d_model=1024, d_ff=16384, num_layers=24, num_heads=32, d_kv=128)}  # monoT5's and duoT5's
SIZES = dict(B=32, K=64, L=180, seconds=4.0, block=1024, passages=(8_000, 20_000), queries=512)
TINY = dict(B=2, K=3, L=20, seconds=0.05, block=16, passages=(200,), queries=4)
SMALL_BERT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
SMALL_T5 = dict(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16)


def forget() -> None:
    """Frees what the last model took, and counts the most memory held anew."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gpu_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if GPU else 0.0


# Models ---------------------------------------------------------------------------------------------------------------

def bert(folder: str, name: str, args, head: str | None = None) -> str:
    """A checkpoint in a folder: an encoder, or a teacher's classifier for the role `head`."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import (AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification,
                              BertModel, BertTokenizerFast)
    given = args.minilm if name == "MiniLM" else None
    if given and not head:
        return given
    if given:
        tokenizer = AutoTokenizer.from_pretrained(given)
        model = AutoModelForSequenceClassification.from_pretrained(given, num_labels=1)
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
        words = BertWordPieceTokenizer({word: n for n, word in enumerate(special + WORDS)}, lowercase=True)
        tokenizer = BertTokenizerFast(tokenizer_object=words._tokenizer, do_lower_case=True)
        config = BertConfig(vocab_size=30522, num_labels=1, **(SMALL_BERT if args.tiny else BERTS[name]))
        model = BertForSequenceClassification(config) if head else BertModel(config, add_pooling_layer=False)
    if head:
        model.config.teacher_role = head
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def duot5(name: str, args):
    """A prompted pairwise teacher with random weights, made on the device, and a tokenizer that knows whole words only."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, T5Config
    import teachers
    known = ["<pad>", "</s>", "<unk>", "true", "false", ":", "Query", "Document0", "Document1", "Relevant", *WORDS]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(known)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(vocab_size=32128, decoder_start_token_id=0, **(SMALL_T5 if args.tiny else T5S[name]))
    with DEVICE:
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.bfloat16 if has_bfloat16(DEVICE) else torch.float32).eval()
    reader = teachers.Prompted(model, tokenizer, "pairwise", "t5")
    model.set_output_embeddings(teachers.answer_in_float32(model.get_output_embeddings(), reader.answers))
    return teachers.Pairwise(reader, f"pairwise {name}")


def weights_a_token(model: torch.nn.Module) -> int:
    """Weights that each token of the input is multiplied with: T5's decoder reads it in its cross-attention alone."""
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "shared" not in name
               and "relative" not in name and ("decoder" not in name or "EncDecAttention.k" in name or "EncDecAttention.v" in name))


def share_of_peak(operations_a_second: float) -> float:
    return operations_a_second / peak_flops(DEVICE)


# Parts: each yields its rows ------------------------------------------------------------------------------------------

def kernels(args, size: dict):
    B, K, L, Q, E, wrong = size["B"], size["K"], size["L"], 5 if args.tiny else 32, 24 if args.tiny else 128, 0
    for dtype, paired, masked in itertools.product((torch.float32, torch.float16, torch.bfloat16), (True, False), (True, False)):
        torch.manual_seed(0)
        lengths = torch.randint(0, L + 1, (B * K,)) if masked else torch.full((B * K,), L)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
        q, d = (F.normalize(torch.randn(*n, E, device=DEVICE), dim=-1).to(dtype).requires_grad_() for n in ((B, Q), (int(offsets[-1]),)))
        q_mask = (torch.rand(B, Q) < 0.7).to(DEVICE) if masked else None
        upstream = torch.randn(B, K if paired else B * K).to(DEVICE)
        pairs = torch.randint(0, K, (B, 50, 2)).to(DEVICE)
        losses = torch.randn(B, K).to(DEVICE), pairs, torch.rand(B, 50).to(DEVICE), torch.zeros(B, dtype=torch.int64, device=DEVICE)

        def scores_and_gradients() -> list[torch.Tensor]:
            scores = (mk.maxsim_paired if paired else mk.maxsim)(q, d, offsets, q_mask, max_length=L)
            return [scores.detach(), *torch.autograd.grad(scores, (q, d), upstream)]

        def objective() -> list[torch.Tensor]:
            total = mk.pairdistill_objective(q, d, offsets, *losses, q_mask, in_batch=not paired, max_length=L).total
            return [total.detach(), *torch.autograd.grad(total, (q, d))]

        got, again, trained, retrained = scores_and_gradients(), scores_and_gradients(), objective(), objective()
        q64, d64 = (x.detach().double().requires_grad_() for x in (q, d))
        scores = mk.maxsim_eager(q64, d64, offsets, q_mask, paired)
        true = [scores.detach(), *torch.autograd.grad(scores, (q64, d64), upstream.double())]
        del scores
        row = dict(dtype=str(dtype)[6:], layout="own block" if paired else "all pairs", ragged_and_masked=masked,
                   scores=((got[0] - true[0]).abs().max() / true[0].abs().max()).item(),
                   gradients=max(((a - b).norm() / b.norm()).item() for a, b in zip(got[1:], true[1:])),
                   same_bits=all(map(torch.equal, got + trained, again + retrained)))
        # Where two of a passage's tokens differ by less than rounding, another wins, and a whole row of a gradient moves.
        row["right"] = row["same_bits"] and row["scores"] <= (1e-5 if dtype == torch.float32 else 2e-3) and row["gradients"] <= 1e-2
        wrong += not row["right"]
        yield row
    if wrong:
        raise ValueError(f"{wrong} of the kernels' cases are wrong")


def student_of(name: str, folder: str, args) -> Student:
    student = Student.from_pretrained(bert(folder, name, args), dim=128, query_length=32, passage_length=180).to(DEVICE)
    student.chunk = automatic_chunk(student)
    return student


@torch.inference_mode()
def encode(args, size: dict):
    import retrieve
    from teachers import made_lengths, made_texts
    for name in reversed(BERTS):  # the cost is of BERT-base
        with tempfile.TemporaryDirectory() as folder:
            student = student_of(name, folder, args)
        rng = np.random.default_rng(0)
        texts = made_texts(student.tokenizer, made_lengths(size["block"], rng), rng)
        retrieve._encode(student, texts)
        start, passages, tokens = time.perf_counter(), 0, 0
        while time.perf_counter() - start < size["seconds"]:
            passages, tokens = passages + len(texts), tokens + len(retrieve._encode(student, texts)[0])  # which it brings to the CPU
        spent = time.perf_counter() - start
        yield {"model": name, "passages/s": passages / spent, "tokens/s": tokens / spent,
               "share of peak": share_of_peak(2 * weights_a_token(student) * tokens / spent)}


def training(args, size: dict):
    from teachers import made_lengths, made_texts
    B, K = size["B"], size["K"]
    for name, full in itertools.product(reversed(BERTS), (False, True)):  # the cost is of BERT-base, at MS MARCO's lengths
        student = None
        forget()
        with tempfile.TemporaryDirectory() as folder:
            student = student_of(name, folder, args)
        rng = np.random.default_rng(0)
        lengths = np.full(2 * B * K, 177) if full else made_lengths(2 * B * K, rng)  # and [CLS], the marker and [SEP]
        passages, queries = made_texts(student.tokenizer, lengths, rng), made_texts(student.tokenizer, [6] * 2 * B, rng)
        pairs = [sample_pairs(K, 50, 10, torch.Generator().manual_seed(n)).numpy() for n in range(2 * B)]
        examples = dict(passages=np.arange(2 * B * K).reshape(2 * B, K), teacher=rng.standard_normal((2 * B, K)).astype(np.float32),
                        pairs=np.array(pairs), pair_probs=rng.random((2 * B, len(pairs[0])), dtype=np.float32),
                        positive=np.zeros(2 * B, np.int64))
        start = time.perf_counter()
        tokens = student.tokenize_passages(passages[:B * K])[1]
        tokenized, said = len(tokens) / (time.perf_counter() - start), []

        def run(steps: int) -> float:
            start = time.perf_counter()
            train(student, queries, passages, examples, steps=steps, batch=B, lr=1e-5, warmup=0, temperature=1.0, tau=1.0,
                  lambda_kd=1.0, lambda_pair=3.0, pair_reduction="mean", seed=0, ranks=Ranks(device=DEVICE), desc=name,
                  note=lambda **row: said.append(row))
            return time.perf_counter() - start

        run(1)  # warms up
        two = run(2)
        steps = int(np.clip(2 * size["seconds"] / two, 4, 60))
        whole = run(steps)
        each = max(whole - two, 1e-9) / (steps - 2)  # the first batch, which is tokenized while nothing runs, is in both
        per_step = int(lengths.sum() / 2 + B * (3 * K + 9))
        yield {"model": name, "tokens a passage": "180" if full else "MS MARCO's", "queries": B, "passages a query": K,
               "tokens/s": per_step / each, "share of peak": said[-1]["share_of_peak"] * whole / steps / each, "s a step": each,
               "steps": steps, "tokens a step": per_step, "passages at once": min(student.chunk, B * K),
               "tokenized tokens/s": tokenized, "gpu_gb": gpu_gb()}


def questions(args, size: dict):
    import teachers
    for name, role in (("T5-3B", "pairwise"), ("MiniLM", "pointwise"), ("MiniLM", "pairwise")):
        teacher = None
        forget()
        if name in BERTS:
            with tempfile.TemporaryDirectory() as folder:
                load = teachers.load_pointwise if role == "pointwise" else teachers.load_pairwise
                teacher = load(bert(folder, name, args, head=role), device=DEVICE)
        else:
            teacher = duot5(name, args)
        row = teachers.speed(teacher, role, size["seconds"], teachers.WINDOW if name in BERTS else 2048)  # three of them are asked
        weights = weights_a_token(teacher.reader.model)
        yield {"model": name, **row, "weights a token": weights, "share of peak": share_of_peak(2 * weights * row["tokens/s"]),
               "gpu_gb": gpu_gb()}


def retrieval(args, size: dict):
    import retrieve
    from measure import Stored, one_by_one
    from teachers import made_lengths
    E, rng = 128, np.random.default_rng(0)
    for n in size["passages"]:
        torch.manual_seed(0)
        lengths = torch.from_numpy(made_lengths(n, rng))
        words, topic = F.normalize(torch.randn(20_000, E), dim=1), F.normalize(torch.randn(n, E), dim=1).repeat_interleave(lengths, 0)
        word = torch.from_numpy(rng.zipf(1.2, len(topic)) % 20_000)  # few are frequent
        d = F.normalize(words[word] + 0.7 * topic + torch.randn(len(topic), E) * 0.5 * E ** -0.5, dim=1).half()
        stored = Stored(d, retrieve._bounds(lengths))
        stored.device = DEVICE
        q = d[(torch.randint(len(d), (size["queries"], 1)) + torch.arange(32)) % len(d)].float()  # 32 tokens of one place
        q = F.normalize(q + torch.randn_like(q) * 0.7 * E ** -0.5, dim=-1)
        mask = torch.ones(q.shape[:2], dtype=torch.bool)
        for _ in range(2):  # the first one warms up
            best, start = retrieve._Best(q.to(DEVICE), mask.to(DEVICE), min(100, n)), time.perf_counter()
            for first in range(0, n, 8192):
                rows = stored.offsets[first:first + 8193]
                best.add(d[rows[0]:rows[-1]].to(DEVICE).float(), (rows - rows[0]).to(DEVICE), first)
            exact = best.positions.cpu()
        yield {"engine": "exact, not coded", "passages": n, "tokens": len(d), "q/s": len(q) / (time.perf_counter() - start)}
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            index = retrieve.Index.build(stored, [str(i) for i in range(n)], Path(folder, "index"))
            build = time.perf_counter() - start - stored.seconds
            search = lambda q, k, mask, exact=False: tuple(x.cpu() for x in index.search(q, k, mask, exact))
            for engine, whole in (("index", False), ("index, exact=True", True)):
                search(q[:64], 100, mask[:64], whole)  # warms up, and sorts the lists
                start = time.perf_counter()
                found = search(q, 100, mask, whole)[1]
                row = {"engine": engine, "passages": n, "tokens": len(d), "q/s": len(q) / (time.perf_counter() - start),
                       "recall@100": float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found)]))}
                if not whole:
                    row |= {"lists": len(index.centroids), "build tokens/s": len(d) / build, "build_s": build,
                            **one_by_one(search, q, mask, exact)}
                yield row


PARTS = {"kernels": kernels, "encode": encode, "train": training, "teachers": questions, "retrieve": retrieval}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minilm", metavar="FOLDER", help="MiniLM's weights; else random ones of its shape")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("throughput.json"))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{' '.join(unknown)}: no such part")
    size, failed = TINY if args.tiny else SIZES, 0
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    machine = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    about = {"machine": machine, "tiny": args.tiny, **versions, "triton": getattr(mk.triton, "__version__", None), "commit": commit()}
    for part in args.parts or PARTS:
        rows = []
        try:
            for row in PARTS[part](args, size):
                rows.append(row)
                print(part, json.dumps(row), flush=True)
                known = json.loads(args.out.read_text()) if args.out.exists() else {}
                if (known.get("machine"), known.get("tiny")) != (machine, args.tiny):
                    known = {}
                args.out.with_suffix(".writing").write_text(json.dumps(known | about | {part: rows}, indent=1))
                args.out.with_suffix(".writing").replace(args.out)  # a part that is stopped leaves what there was
        except Exception as error:  # the other parts go on
            failed += 1
            print(f"{part}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
