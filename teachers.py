"""The teachers: rerankers that say how good a passage is (pointwise) or which of two is better (pairwise), section 4.1.

Every teacher turns one sequence into one logit:

    pointwise   s_point(q, d)                       raw, never through a sigmoid: L_KD takes a softmax over passages
    pairwise    P(d_i > d_j | q) = sigmoid(logit)   from a sequence that holds the query and both passages

and a sequence is read in one of two ways:

    classifier  [CLS] q [SEP] d_i [SEP] (d_j [SEP])  and the one output of the head: MiniLM, or one trained here
    prompt      T5 or an instruction-tuned LLM, and the logit of one answer word minus that of the other at the first
                position of the answer: monoT5, duoT5 (true, false), flan-t5, Llama, … (Yes, No; A, B), appendix C.1

A pairwise model has a bias for a place, so both orders are asked and averaged: p = (p_ij + 1 - p_ji) / 2. # OURS: the
authors ask (i, j) only, always with the better-ranked passage first.

A classifier trained from scratch on a few thousand labels learns little from words alone. Ours marks, by token type, which
tokens of the query stand in which passage and the reverse (the idea of MarkedBERT, Boualili et al. 2020).
"""
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from pairdistill import LEVELS, MARKS, Batches, cannot_load, digest, fit, half
from ranks import Ranks

TEMPLATES = {  # (role, family): prompt, the answer that speaks for the (first) passage, the other one
    ("pointwise", "t5"): ("Query: {q} Document: {d0} Relevant:", "true", "false"),
    ("pairwise", "t5"): ("Query: {q} Document0: {d0} Document1: {d1} Relevant:", "true", "false"),
    ("pointwise", "instruct"): ("Is the document relevant to the query (Yes or No)?\nQuery: {q}\nDocument: {d0}",
                                "Yes", "No"),
    # PAPER: appendix C.1 prints one "Document: {document}"; the authors' code names them A and B, as here.
    ("pairwise", "instruct"): ("Which document is more relevant to the query? Answer only 'A' or 'B'.\nQuery: {q}\n"
                               "Document A: {d0}\nDocument B: {d1}", "A", "B"),
}


# One sequence, one logit ---------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A sequence classifier with one output. With `config.match_types` exact matches are marked by token type."""

    def __init__(self, model: nn.Module, tokenizer):
        super().__init__()
        self.model, self.tokenizer, config = model, tokenizer, model.config
        self.max_length = min(512, getattr(config, "max_position_embeddings", 512))
        # What train_pointwise and train_pairwise wrote into config.json; of no meaning to other checkpoints.
        self.query_length = getattr(config, "query_length", 64)
        self.passage_length = getattr(config, "passage_length", self.max_length)
        self.match = getattr(config, "match_types", False)

    def sequences(self, items: list[tuple[str, ...]]) -> list[tuple[list[int], list[int]]]:
        """(query, passage, …) -> (ids, segment of each token: 0 query, 1 and 2 passages). All passages are cut alike."""
        t = self.tokenizer
        texts = list(dict.fromkeys(text for item in items for text in item))
        known = dict(zip(texts, t(texts, add_special_tokens=False, truncation=True, max_length=self.max_length,
                                  verbose=False)["input_ids"])) if texts else {}
        out = []
        for query, *passages in items:
            q = known[query][:self.query_length]
            budget = min(self.passage_length, (self.max_length - len(q) - 2 - len(passages)) // len(passages))
            ids, segments = [t.cls_token_id, *q, t.sep_token_id], [0] * (len(q) + 2)
            for n, passage in enumerate(passages, 1):
                p = known[passage][:budget]
                ids += [*p, t.sep_token_id]
                segments += [n] * (len(p) + 1)
            out.append((ids, segments))
        return out

    def forward(self, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """sequences -> logits float32 [n]"""
        device = self.model.device
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [self.tokenizer.pad_token_id] * (length - len(i)) for i, _ in batch], device=device)
        segments = torch.tensor([s + [-1] * (length - len(s)) for _, s in batch], device=device)
        types = self._match_types(ids, segments) if self.match else (segments % 2).clamp(min=0)
        has_types = getattr(self.model.config, "type_vocab_size", 0) > 1
        out = self.model(input_ids=ids, attention_mask=(segments >= 0).long(),
                         **({"token_type_ids": types} if has_types else {}))
        return out.logits[:, 0].float()

    def _match_types(self, ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        """Token types [n, L]: 0-3 the query's tokens by the passages they stand in (bit 0 the first, bit 1 the second);
        4 and 5 the first passage's, unmatched and matched, 8 and 9 the second's; and for [CLS], on a scale of LEVELS,
        how much of the query the passage holds, or how much more of it the first passage holds than the second."""
        word = ids > max(self.tokenizer.all_special_ids)  # special tokens match nothing
        same = (ids[:, :, None] == ids[:, None, :]) & word[:, None, :]
        in_segment = [(same & (segments == s)[:, None, :]).any(-1) & word for s in range(3)]
        query = in_segment[1].long() + 2 * in_segment[2].long()
        types = torch.where(segments == 0, query, 4 * segments.clamp(min=0) + in_segment[0].long())
        # How much: the mean over the query's words of the closest word of the passage, by the model's own word vectors.
        # scratch_encoder numbers tokens from frequent to rare: the logarithm of the number weights a word by its rarity.
        vectors = F.normalize(self.model.get_input_embeddings().weight.detach()[ids], dim=-1)
        similarity = vectors @ vectors.transpose(1, 2)
        weight = ids.float().log1p() * (word & (segments == 0))
        holds = []
        for s in (1, 2):
            closest = similarity.masked_fill(~(word & (segments == s))[:, None, :], 0).amax(-1)
            holds.append((weight * closest).sum(1) / weight.sum(1).clamp(min=1))
        pair = (segments == 2).any(1)
        share = torch.where(pair, 0.5 + holds[0] - holds[1], holds[0]).clamp(0, 1)
        types[:, 0] = MARKS + LEVELS * pair + (share * (LEVELS - 1)).round().long()
        return types


class Prompted(nn.Module):
    """A language model that answers a prompt with one of two words."""

    def __init__(self, model: nn.Module, tokenizer, role: str, family: str, max_length: int = 512):
        super().__init__()
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.template, *answers = TEMPLATES[role, family]
        self.answers = []
        for answer in answers:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ValueError(f"{tokenizer.name_or_path}: the answer {answer!r} is {len(ids)} tokens, not one, so its "
                                 f"probability cannot be read from one position: this model cannot be this teacher")
            self.answers += ids

    def _prompt(self, item: tuple[str, ...]) -> str:
        query, *passages = item
        text = self.template.format(q=query, **{f"d{n}": p for n, p in enumerate(passages)})
        if self.tokenizer.chat_template and not self.model.config.is_encoder_decoder:
            return self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                      add_generation_prompt=True)
        return text

    def sequences(self, items: list[tuple[str, ...]]) -> list[tuple[list[int], None]]:
        """Passages are cut, all alike, until the prompt fits: its end, which asks the question, is never lost."""
        special = not (self.tokenizer.chat_template and not self.model.config.is_encoder_decoder)
        encode = lambda texts: self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        ids = encode([self._prompt(item) for item in items])
        for n, item in enumerate(items):
            if len(ids[n]) <= self.max_length:
                continue
            query, *passages = item
            frame = len(encode([self._prompt((query, *[""] * len(passages)))])[0])
            budget = (self.max_length - frame) // len(passages)
            while len(ids[n]) > self.max_length and budget > 0:  # a cut text can have a token more than it was cut to
                ids[n] = encode([self._prompt((query, *[self._cut(p, budget) for p in passages]))])[0]
                budget -= 1
            if len(ids[n]) > self.max_length:
                raise ValueError(f"the query {query[:60]!r}… leaves no room for passages in {self.max_length} tokens")
        return [(i, None) for i in ids]

    def _cut(self, text: str, budget: int) -> str:
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return text if len(places) <= budget else text[:places[budget - 1][1]]

    def forward(self, batch: list[tuple[list[int], None]]) -> torch.Tensor:
        """sequences -> logit of the first answer minus that of the second, float32 [n], in one decoder step"""
        device, length = self.model.device, max(len(i) for i, _ in batch)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        # Padded on the left, every sequence ends at the same place: the answer's position for a decoder-only model.
        ids = torch.tensor([[pad] * (length - len(i)) + i for i, _ in batch], device=device)
        attended = torch.tensor([[0] * (length - len(i)) + [1] * len(i) for i, _ in batch], device=device)
        if self.model.config.is_encoder_decoder:
            # T5's relative positions do not see padding; its encoder is padded on the right as in training.
            ids = torch.tensor([i + [pad] * (length - len(i)) for i, _ in batch], device=device)
            attended = attended.flip(1)
            start = torch.full((len(batch), 1), self.model.config.decoder_start_token_id, device=device)
            logits = self.model(input_ids=ids, attention_mask=attended, decoder_input_ids=start).logits[:, -1]
        else:
            positions = (attended.cumsum(1) - 1).clamp(min=0)
            logits = self.model(input_ids=ids, attention_mask=attended, position_ids=positions,
                                logits_to_keep=1).logits[:, -1]
        yes, no = self.answers
        return logits[:, yes].float() - logits[:, no].float()


def _load(spec: str, role: str, device: torch.device) -> nn.Module:
    from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM,
                              AutoModelForSequenceClassification, AutoTokenizer)
    try:
        config = AutoConfig.from_pretrained(spec)
        tokenizer = AutoTokenizer.from_pretrained(spec)
        kind = (config.architectures or [""])[0]
        if "SequenceClassification" in kind:
            auto = AutoModelForSequenceClassification
        elif config.is_encoder_decoder:
            auto = AutoModelForSeq2SeqLM
        elif "CausalLM" in kind or "ConditionalGeneration" in kind:
            auto = AutoModelForCausalLM
        else:
            raise ValueError(f"a {kind or config.model_type} has no head that scores text: it is no {role} teacher")
        # Float16 overflows in T5; bfloat16 does not, and scores are read in float32.
        model = auto.from_pretrained(spec, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    except (OSError, ValueError, ImportError) as e:
        raise ValueError(cannot_load(spec, e)) from e
    model.to(device).eval()
    if auto is AutoModelForSequenceClassification:
        if config.num_labels != 1:
            raise ValueError(f"{spec}: a {role} teacher is a classifier with one output, this one has {config.num_labels}")
        return Classifier(model, tokenizer)
    name = spec.lower()
    family = "t5" if ("monot5" in name or "duot5" in name) else "instruct"
    if family == "t5" and ("duot5" in name) != (role == "pairwise"):
        raise ValueError(f"{spec} is a {'pairwise' if 'duot5' in name else 'pointwise'} reranker, not a {role} one")
    return Prompted(model, tokenizer, role, family)


# Teachers -----------------------------------------------------------------------------------------------------------

class Teacher:
    """Logits of sequences, each computed once: batches of similar length, and a cache that outlives the process."""

    def __init__(self, reader: nn.Module, identity: str, cache: "Cache | None" = None, batch_tokens: int = 8192,
                 desc: str | None = None):
        self.reader, self.identity, self.cache, self.batch_tokens, self.desc = reader, identity, cache, batch_tokens, desc

    def logits(self, items: list[tuple[str, ...]]) -> np.ndarray:
        """(query, passage, …) -> float32 [n]. Raises ValueError where the model returns NaN."""
        keys = None
        scores = np.full(len(items), np.nan, dtype=np.float32)
        if self.cache:
            keys = self.cache.keys(self.identity, items)
            scores = self.cache.get(keys)
        missing = np.flatnonzero(np.isnan(scores))
        # Long blocks make batches of even length, short ones lose less when the process is killed.
        with tqdm(total=len(missing), desc=self.desc, disable=self.desc is None, leave=False, mininterval=1.0) as bar:
            for start in range(0, len(missing), 8192):
                block = missing[start:start + 8192]
                scores[block] = self._compute([items[n] for n in block], bar)
                if self.cache:
                    self.cache.add(keys[block], scores[block])
        return scores

    @torch.inference_mode()
    def _compute(self, items: list[tuple[str, ...]], bar: tqdm) -> np.ndarray:
        sequences = self.reader.sequences(items)
        order = sorted(range(len(items)), key=lambda n: -len(sequences[n][0]))  # longest first: memory fails at once
        out = np.empty(len(items), dtype=np.float32)
        while order:
            n = max(1, self.batch_tokens // len(sequences[order[0]][0]))
            batch, order = order[:n], order[n:]
            with half(self.reader.model.device):
                out[batch] = self.reader([sequences[i] for i in batch]).cpu().numpy()
            bar.update(len(batch))
        if np.isnan(out).any():
            raise ValueError(f"the teacher {self.identity} returned NaN for the query {items[int(np.isnan(out).argmax())][0][:80]!r}")
        return out


class Pointwise(Teacher):
    def score(self, items: list[tuple[str, str]]) -> np.ndarray:
        """[(query, passage), …] -> float32 [n]: raw logits"""
        return self.logits(items)


class Pairwise(Teacher):
    orders: str = "both"

    def ask(self, items: list[tuple[str, str, str]]) -> np.ndarray:
        """[(query, d_i, d_j), …] -> float32 [n, 2]: P(d_i > d_j) as asked in this order, and P(d_j > d_i) as asked in
        the other one; with orders="one" the second is 1 minus the first."""
        forward = 1 / (1 + np.exp(-self.logits(items).astype(np.float64)))
        if self.orders == "one":
            return np.stack([forward, 1 - forward], 1).astype(np.float32)
        backward = 1 / (1 + np.exp(-self.logits([(q, dj, di) for q, di, dj in items]).astype(np.float64)))
        return np.stack([forward, backward], 1).astype(np.float32)

    def prefer(self, items: list[tuple[str, str, str]]) -> np.ndarray:
        """[(query, d_i, d_j), …] -> float32 [n]: P(d_i > d_j | q)"""
        return preference(self.ask(items))


def preference(asked: np.ndarray) -> np.ndarray:
    """asked [n, 2] -> P(d_i > d_j) [n], the mean of p_ij and 1 - p_ji, on the grid of 2^-24, where 1 - p is exact."""
    half = (asked[:, 0].astype(np.float64) - asked[:, 1]) / 2
    return (0.5 + np.round(half * 2 ** 24) / 2 ** 24).astype(np.float32)


def _identity(spec: str, model: nn.Module) -> str:
    """Which weights: a digest of a local folder, or a name with the Hub's revision."""
    if Path(spec).is_dir():
        return digest(spec)
    return f"{spec}@{getattr(model.config, '_commit_hash', None)}"


def load_pointwise(spec: str, *, device="cpu", cache: "Cache | None" = None, desc: str | None = None) -> Pointwise:
    """A cross-encoder, monoT5 or instruction LLM by Hub name or local folder. Raises ValueError in one sentence."""
    reader = _load(spec, "pointwise", torch.device(device))
    return Pointwise(reader, "pointwise " + _identity(spec, reader.model), cache, desc=desc)


def load_pairwise(spec: str, orders: str = "both", *, device="cpu", cache: "Cache | None" = None,
                  desc: str | None = None) -> Pairwise:
    """A pair classifier, duoT5 or instruction LLM by Hub name or local folder. Raises ValueError in one sentence."""
    if orders not in ("both", "one"):
        raise ValueError(f"orders {orders!r}: it is both or one")
    reader = _load(spec, "pairwise", torch.device(device))
    teacher = Pairwise(reader, "pairwise " + _identity(spec, reader.model), cache, desc=desc)
    teacher.orders = orders
    return teacher


# Scores asked before ------------------------------------------------------------------------------------------------

class Cache:
    """Scores by a 128-bit digest of teacher and texts, appended to one file a rank, 20 bytes each.

    A row that was being written when the process died is cut off when the file is opened: that row is lost, no other.
    In memory, rows are sorted by the first 64 bits; a row with the same first and other last bits is a miss, never wrong.
    """

    ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("score", "<f4")])

    def __init__(self, folder: str | Path, rank: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank{rank}.scores"
        if self.path.exists():
            whole = self.path.stat().st_size // self.ROW.itemsize * self.ROW.itemsize
            with open(self.path, "r+b") as f:
                f.truncate(whole)
        rows = []
        for path in sorted(folder.glob("rank*.scores")):  # every rank reads what all have written
            data = path.read_bytes()
            rows.append(np.frombuffer(data[:len(data) // self.ROW.itemsize * self.ROW.itemsize], self.ROW))
        self.rows = np.sort(np.concatenate(rows), order="high") if rows else np.empty(0, self.ROW)
        self.asked = self.found = 0

    @classmethod
    def keys(cls, identity: str, items: list[tuple[str, ...]]) -> np.ndarray:
        digests = b"".join(hashlib.blake2b("\0".join((identity, *item)).encode(), digest_size=16).digest() for item in items)
        return np.frombuffer(digests, np.dtype([("high", "<u8"), ("low", "<u8")]))

    def get(self, keys: np.ndarray) -> np.ndarray:
        """float32 [n], NaN where the score was not asked before"""
        scores = np.full(len(keys), np.nan, dtype=np.float32)
        if len(self.rows):
            at = np.searchsorted(self.rows["high"], keys["high"]).clip(max=len(self.rows) - 1)
            hit = (self.rows["high"][at] == keys["high"]) & (self.rows["low"][at] == keys["low"])
            scores[hit] = self.rows["score"][at[hit]]
        self.asked += len(keys)
        self.found += int((~np.isnan(scores)).sum())
        return scores

    def add(self, keys: np.ndarray, scores: np.ndarray) -> None:
        rows = np.empty(len(keys), self.ROW)
        rows["high"], rows["low"], rows["score"] = keys["high"], keys["low"], scores
        with open(self.path, "ab") as f:
            f.write(rows.tobytes())
        rows = np.sort(rows, order="high")
        self.rows = np.insert(self.rows, np.searchsorted(self.rows["high"], rows["high"]), rows)


# Training a teacher (section 4.1) -----------------------------------------------------------------------------------

def _new_classifier(encoder: str | Path, device: torch.device, seed: int, query_length: int,
                    passage_length: int) -> Classifier:
    """Any encoder with a new head of one output; matches are marked where it has token types for it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    config = AutoConfig.from_pretrained(encoder, num_labels=1)
    config.match_types = getattr(config, "type_vocab_size", 0) >= MARKS + 2 * LEVELS
    config.query_length, config.passage_length = query_length, passage_length
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(encoder, config=config, dtype=torch.float32)
    if config.match_types:  # the marks are read off these vectors: trained on a few labels, they say less of other words
        model.base_model.embeddings.requires_grad_(False)
    return Classifier(model.to(device), AutoTokenizer.from_pretrained(encoder))


def _save(reader: Classifier, folder: str | Path) -> None:
    reader.model.save_pretrained(folder)
    reader.tokenizer.save_pretrained(folder)


def train_pointwise(encoder: str | Path, groups: list[tuple[str, str, list[str]]], folder: str | Path, *, steps: int,
                    batch: int, negatives: int, lr: float, query_length: int = 32, passage_length: int = 180,
                    seed: int = 0, ranks: Ranks = Ranks()) -> list[list[float]]:
    """Trains a cross-encoder on (query, relevant passage, other passages) and saves it as a transformers checkpoint.

    Binary cross-entropy on triplets (q, d+, d-): a pointwise model's logit for "d+ is better" is s(q, d+) - s(q, d-).
    Returns [loss, accuracy] of every step.
    """
    reader = _new_classifier(encoder, ranks.device, seed, query_length, passage_length)
    batches = Batches(len(groups), batch, seed)

    def batch_terms(step: int) -> torch.Tensor:
        rows = batches[step]
        share = ranks.share(len(rows))
        items = []
        for r in rows[share.start:share.stop]:
            query, positive, others = groups[r]
            chosen = np.random.default_rng([seed, step, r]).choice(len(others), negatives, len(others) < negatives)
            items += [(query, positive)] + [(query, others[c]) for c in chosen]
        scores = reader(reader.sequences(items)).view(-1, 1 + negatives)
        margin = scores[:, :1] - scores[:, 1:]
        count = len(rows) * negatives
        return torch.stack([F.softplus(-margin).sum() / count, (margin > 0).float().sum() / count])

    history = fit(reader, batch_terms, steps, lr=lr, warmup=steps // 10, ranks=ranks, desc="  train pointwise", seed=seed)
    if ranks.first:
        _save(reader, folder)
    ranks.barrier()
    return history


def train_pairwise(encoder: str | Path, groups: list[tuple[str, str, list[str]]], folder: str | Path, *, steps: int,
                   batch: int, lr: float, query_length: int = 32, passage_length: int = 180, seed: int = 0,
                   ranks: Ranks = Ranks()) -> list[list[float]]:
    """Trains a classifier over (q, d_i, d_j), with y = 1 where d_i is the relevant one: section 4.1's objective.

    Which of the two stands first is drawn for every example. Returns [loss, accuracy] of every step.
    """
    reader = _new_classifier(encoder, ranks.device, seed, query_length, passage_length)
    batches = Batches(len(groups), batch, seed)

    def batch_terms(step: int) -> torch.Tensor:
        rows = batches[step]
        share = ranks.share(len(rows))
        items, y = [], []
        for r in rows[share.start:share.stop]:
            query, positive, others = groups[r]
            draw = np.random.default_rng([seed, step, r])
            pair = (positive, others[draw.integers(len(others))])
            y.append(float(draw.integers(2)))
            items.append((query, *(pair if y[-1] else pair[::-1])))
        logits = reader(reader.sequences(items))
        y = torch.tensor(y, device=logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(rows)
        return torch.stack([loss, ((logits > 0) == (y > 0)).float().sum() / len(rows)])

    history = fit(reader, batch_terms, steps, lr=lr, warmup=steps // 10, ranks=ranks, desc="  train pairwise", seed=seed)
    if ranks.first:
        _save(reader, folder)
    ranks.barrier()
    return history
