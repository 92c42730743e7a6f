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

    python teachers.py SPEC --bench         how fast a teacher is here, and what the paper's run would cost with it

A classifier trained from scratch on a few thousand labels learns little from words alone. Ours marks, by token type, which
tokens of the query stand in which passage and the reverse (the idea of MarkedBERT, Boualili et al. 2020).
"""
from __future__ import annotations

import argparse
import hashlib
import itertools
import sqlite3
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoints import digest, load_model, loading, most_tokens, no_truncation
from pairdistill import LEVELS, MARKS, Batches, fit
from ranks import Ranks, has_bfloat16, refuse

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
        self.max_length = min(512, most_tokens(config))
        # What train_pointwise and train_pairwise wrote into config.json; of no meaning to other checkpoints.
        self.query_length = min(getattr(config, "query_length", 512), self.max_length // 2)  # there is room for passages
        self.passage_length = getattr(config, "passage_length", self.max_length)
        self.match = getattr(config, "match_types", False)
        self.prompt = f"[CLS] {self.query_length} [SEP] {self.passage_length} [SEP] {self.max_length}"
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise ValueError(f"{tokenizer.name_or_path}: its tokenizer has no [CLS] and [SEP], which a classifier is asked with")
        # One token between two texts, or two as in RoBERTa.
        self.between = [tokenizer.sep_token_id] * (tokenizer.num_special_tokens_to_add(pair=True) - 2)
        self.cut = self.cut_queries = 0  # those that were longer than what is read of them

    def sequences(self, items: list[tuple[str, ...]]) -> list[tuple[list[int], list[int]]]:
        """(query, passage, …) -> (ids, segment of each token: 0 query, 1 and 2 passages). All passages are cut alike."""
        t = self.tokenizer
        texts = list(dict.fromkeys(text for item in items for text in item))
        known = dict(zip(texts, t(texts, add_special_tokens=False, truncation=True, max_length=self.max_length,
                                  verbose=False)["input_ids"]))
        out = []
        for query, *passages in items:
            q = known[query][:self.query_length]
            room = self.max_length - len(q) - 2 - len(self.between) * len(passages)
            budget = min(self.passage_length, room // len(passages))
            self.cut += sum(len(known[passage]) > budget for passage in passages)
            self.cut_queries += len(known[query]) > len(q)
            ids, segments = [t.cls_token_id, *q], [0] * (len(q) + 1)
            for n, passage in enumerate(passages, 1):
                p = known[passage][:budget]
                ids += [*self.between, *p]
                segments += [n - 1] * len(self.between) + [n] * len(p)
            out.append((ids + [t.sep_token_id], segments + [len(passages)]))
        return out

    def forward(self, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """sequences -> logits float32 [n]"""
        device = self.model.device
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [self.tokenizer.pad_token_id] * (length - len(i)) for i, _ in batch], device=device)
        segments = torch.tensor([s + [-1] * (length - len(s)) for _, s in batch], device=device)
        types = self._match_types(ids, segments) if self.match else segments % 2
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
        vectors = F.normalize(self.model.get_input_embeddings().weight.detach()[ids].float(), dim=-1)
        with torch.autocast(ids.device.type, enabled=False):  # the same in training as when it scores
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

    def __init__(self, model: nn.Module, tokenizer, role: str, family: str):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.template, *answers = TEMPLATES[role, family]
        self.answers = []
        for answer in answers:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ValueError(f"{tokenizer.name_or_path}: the answer {answer!r} is {len(ids)} tokens, not one, so its "
                                 f"probability cannot be read from one position: this model cannot be this teacher")
            self.answers += ids
        # OURS: 512 for T5; the authors' duoT5 reads 360 tokens.
        self.max_length = min(512 if family == "t5" else 1024, most_tokens(model.config))
        self.cut = self.cut_queries = 0  # those that were longer than what is read of them

    @property
    def prompt(self) -> str:
        return f"{self.template} {self.max_length} {self.tokenizer.chat_template or ''}"

    @property
    def chat(self) -> bool:
        return bool(self.tokenizer.chat_template) and not self.model.config.is_encoder_decoder

    def _prompt(self, item: tuple[str, ...]) -> str:
        query, *passages = item
        text = self.template.format(q=query, **{f"d{n}": p for n, p in enumerate(passages)})
        if self.chat:
            return self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True,
                                                      enable_thinking=False)  # Qwen3 and others: the answer comes at once
        return text

    def sequences(self, items: list[tuple[str, ...]]) -> list[tuple[list[int], None]]:
        """Passages are cut, all alike, until the prompt fits, and a query that would take more than half of it is cut to that:
        its end, which asks the question, is never lost."""
        encode = lambda texts: self.tokenizer(texts, add_special_tokens=not self.chat, verbose=False)["input_ids"]
        ids = encode([self._prompt(item) for item in items])
        for n, item in enumerate(items):
            if len(ids[n]) <= self.max_length:
                continue
            query, *passages = item
            query, cut = self._cut(query, self.max_length // 2), passages
            frame = len(encode([self._prompt((query, *[""] * len(passages)))])[0])
            budget = (self.max_length - frame) // len(passages)
            while len(ids[n]) > self.max_length and budget > 0:  # a cut text can have a token more than it was cut to
                cut = [self._cut(p, budget) for p in passages]
                ids[n] = encode([self._prompt((query, *cut))])[0]
                budget -= 1
            if len(ids[n]) > self.max_length:
                raise ValueError(f"the query {query[:60]!r}… leaves no room for passages in {self.max_length} tokens")
            self.cut += sum(short != whole for short, whole in zip(cut, passages))
            self.cut_queries += query != item[0]
        return [(i, None) for i in ids]

    def _cut(self, text: str, budget: int) -> str:
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return text if len(places) <= budget else text[:places[budget - 1][1]]

    def forward(self, batch: list[tuple[list[int], None]]) -> torch.Tensor:
        """sequences -> logit of the first answer minus that of the second, float32 [n], in one decoder step"""
        device, length = self.model.device, max(len(i) for i, _ in batch)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        two = self.model.config.is_encoder_decoder
        # Padded on the left, every sequence ends at the same place: the answer's position for a decoder-only model. T5's
        # encoder is padded on the right, as in training.
        fill = [[pad] * (length - len(i)) for i, _ in batch]
        ids = torch.tensor([i + f if two else f + i for (i, _), f in zip(batch, fill)], device=device)
        attended = torch.tensor([[1] * len(i) + [0] * len(f) if two else [0] * len(f) + [1] * len(i)
                                 for (i, _), f in zip(batch, fill)], device=device)
        if two:
            first = getattr(self.model.config, "decoder_start_token_id", None)
            start = torch.full((len(batch), 1), pad if first is None else first, device=device)
            logits = self.model(input_ids=ids, attention_mask=attended, decoder_input_ids=start).logits[:, -1]
        else:
            positions = (attended.cumsum(1) - 1).clamp(min=0)
            logits = self.model(input_ids=ids, attention_mask=attended, position_ids=positions,
                                logits_to_keep=1).logits[:, -1]
        return logits[:, 0] - logits[:, 1]  # of the answers alone: answer_in_float32


def answer_in_float32(head: nn.Linear, rows: list[int]) -> nn.Linear:
    """These rows of a model's last layer, in float32 whatever the layers before it are in: bfloat16 goes by steps of 1/16
    at a logit of 10. Of a language model's vocabulary only the two answers are left to compute."""
    answer = nn.Linear(head.in_features, len(rows), head.bias is not None, head.weight.device, torch.float32)
    answer.load_state_dict({name: tensor[rows].float() for name, tensor in head.state_dict().items()})
    answer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return answer


def split_spec(spec: str | Path) -> tuple[str, str]:
    """t5:NAME or instruct:NAME, which says how a language model is asked where its name does not -> (t5, NAME)."""
    spec = str(spec)
    given, _, rest = spec.partition(":")
    return (given, rest) if given in ("t5", "instruct") else ("", spec)


def known(spec: str, role: str) -> tuple:
    """What a teacher's settings say, before its weights are read: its name, kind of model, tokenizer and family of prompts.
    Raises ValueError in one sentence for one that cannot be this role's teacher."""
    from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM,
                              AutoModelForSequenceClassification, AutoTokenizer)
    given, spec = split_spec(spec)
    if not spec:
        raise ValueError(f"the {role} teacher has an empty name: give a Hub name or a folder")
    with loading(spec):
        config, tokenizer = (auto.from_pretrained(spec, trust_remote_code=False) for auto in (AutoConfig, AutoTokenizer))
    kind = (config.architectures or [""])[0]
    if "SequenceClassification" in kind:
        trained_for = getattr(config, "teacher_role", "pointwise")
        if given:
            raise ValueError(f"{given}:{spec} is a classifier, not a language model: give it without {given}:")
        if config.num_labels != 1:
            raise ValueError(f"{spec}: a {role} teacher is a classifier with one output, this one has {config.num_labels}")
        if trained_for != role:
            raise ValueError(f'{spec} is a {trained_for} classifier, not a {role} one ("teacher_role" in its config.json)')
        return spec, AutoModelForSequenceClassification, tokenizer, ""
    if config.is_encoder_decoder:
        auto = AutoModelForSeq2SeqLM
    elif any(head in kind for head in ("CausalLM", "ConditionalGeneration", "LMHead")):
        auto = AutoModelForCausalLM
    else:
        raise ValueError(f"{spec}: a {kind or config.model_type} has no head that scores text, so it is no {role} teacher; "
                         f"train:{spec} makes one of it")
    path = Path(spec.lower())  # in the Hub's cache models--castorini--duot5-3b-msmarco/snapshots/b99e
    name = path.parent.parent.name if path.parent.name == "snapshots" else path.name
    if "duot5" in name and role == "pointwise" or "monot5" in name and role == "pairwise":
        raise ValueError(f"{spec} is a {'pairwise' if 'duot5' in name else 'pointwise'} reranker, not a {role} one")
    return spec, auto, tokenizer, given or ("t5" if "monot5" in name or "duot5" in name else "instruct")


def _load(spec: str, role: str, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    given, (spec, auto, tokenizer, family) = split_spec(spec)[0], known(spec, role)
    # Float16 overflows in T5; bfloat16 does not.
    dtype = dtype or (torch.bfloat16 if has_bfloat16(device) else torch.float32)
    model = load_model(auto, spec, dtype=dtype)[0].to(device).eval()
    if not family:
        where, head = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1][-1]
        model.set_submodule(where, answer_in_float32(head, [0]))
        return Classifier(model, tokenizer)
    if model.config.model_type == "t5" and family == "instruct" and not given and "flan" not in spec.lower():
        warnings.warn(f"{role} teacher: {spec} is asked by the instructions of appendix C.1; t5:{spec} asks it as monoT5 and "
                      f"duoT5 are", stacklevel=3)
    reader = Prompted(model, tokenizer, role, family)
    model.set_output_embeddings(answer_in_float32(model.get_output_embeddings(), reader.answers))
    if hasattr(model, "final_logits_bias"):  # BART's
        model.final_logits_bias = model.final_logits_bias[:, reader.answers]
    return reader


# Teachers -----------------------------------------------------------------------------------------------------------

WINDOW = 8192  # sequences that are sorted by length together


class Teacher:
    """Logits of sequences: batches of similar length, and a cache that outlives the process, so that each is computed once."""

    def __init__(self, reader: nn.Module, identity: str, cache: "Cache | None" = None, desc: str | None = None):
        self.reader, self.identity, self.cache, self.desc = reader, identity, cache, desc
        self.asks = f"{identity} {reader.model.dtype} {reader.prompt}"  # what a score in the cache depends on, beside the texts
        self.window, self.batch_tokens = WINDOW, 8192 if reader.model.device.type == "cpu" else 32768
        self.asked = self.read = self.empty = self.tokens = self.padding = 0
        self.warned = set()

    def logits(self, items: Iterable[tuple[str, ...]], total: int | None = None) -> np.ndarray:
        """(query, passage, …) -> float32 [n]; `items` may be a generator of any length, of `total` items.

        Raises ValueError where a score is NaN or infinite. What is computed is in the cache as soon as its batch is done.
        """
        items, out, recent = iter(items), [np.empty(0, np.float32)], {}
        windows = iter(lambda: list(itertools.islice(items, self.window)), [])
        with tqdm(total=total, desc=self.desc, disable=self.desc is None, leave=False, mininterval=1.0) as bar, \
                ThreadPoolExecutor(1) as beside:  # which tokenizes a window while the one before it is computed
            ahead = (beside.submit(self._prepare, window) for window in windows)
            coming = next(ahead, None)
            while coming:
                keys, known, missing, sequences = coming.result()
                coming = next(ahead, None)
                known.update((key, recent[key]) for key in missing if key in recent)  # the same text a window ago
                todo = [n for n, key in enumerate(missing) if key not in known]
                recent = {}
                for batch, scores in self._compute([(missing[n], sequences[n]) for n in todo], bar):
                    recent.update(zip(batch, scores))
                    if self.cache is not None:
                        self.cache.add(batch, scores)
                known.update(recent)
                out.append(np.array([known[key] for key in keys], np.float32))
                bar.update(len(keys) - len(todo))
        self._warn()
        return np.concatenate(out)

    def _prepare(self, items: list[tuple[str, ...]]) -> tuple[list, dict, list, list]:
        """keys of all, {key: score} of those in the cache, keys of the others (each once), and their sequences"""
        self.asked += len(items)
        self.empty += sum(not all(map(str.strip, item)) for item in items)
        keys = [key_of(self.asks, item) for item in items]
        known = self.cache.get(keys) if self.cache is not None else {}
        missing = {key: item for key, item in zip(keys, items) if key not in known}
        self.read += len(missing)
        # A tokenizer takes no empty list.
        return keys, known, list(missing), self.reader.sequences(list(missing.values())) if missing else []

    @torch.inference_mode()
    def _compute(self, todo: list[tuple[bytes, tuple]], bar: tqdm) -> Iterator[tuple[list[bytes], list[float]]]:
        """(key, sequence), … -> batches of (keys, scores)"""
        todo = sorted(todo, key=lambda x: -len(x[1][0]))  # longest first: memory fails at once
        while todo:
            longest = len(todo[0][1][0])
            batch = todo[:max(1, self.batch_tokens // longest)]
            try:
                scores = self.reader([sequence for _, sequence in batch]).float().cpu()
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.batch_tokens = len(batch) * longest // 2
                continue
            if not scores.isfinite().all():
                raise ValueError(f"the teacher {self.identity} returned NaN or an infinite score: its weights are damaged, or overflow in "
                                 f"{self.reader.model.dtype}; nothing of this batch was kept, all before it was")
            self.tokens += (real := sum(len(sequence[0]) for _, sequence in batch))
            self.padding += len(batch) * longest - real
            todo = todo[len(batch):]
            bar.update(len(batch))
            yield [key for key, _ in batch], scores.tolist()

    def _warn(self) -> None:
        """What of the texts it did not see, each kind once for a teacher."""
        cut = f"{self.read:,} questions were longer than it reads, and were cut at their end"
        for what, n, said in (("empty", self.empty, f"{self.empty:,} of {self.asked:,} questions have an empty text, and were "
                                                    f"scored as they are"),
                              ("passages", self.reader.cut, f"{self.reader.cut:,} passages in {cut}"),
                              ("queries", self.reader.cut_queries, f"{self.reader.cut_queries:,} queries in {cut}")):
            if n and what not in self.warned:
                self.warned.add(what)
                warnings.warn(f"{self.identity.split()[0]} teacher: {said}", stacklevel=4)


class Pointwise(Teacher):
    def score(self, items: Iterable[tuple[str, str]], total: int | None = None) -> np.ndarray:
        """(query, passage), … -> float32 [n]: raw logits"""
        return self.logits(items, total)


class Pairwise(Teacher):
    orders: str = "both"

    def ask(self, items: Iterable[tuple[str, str, str]], total: int | None = None) -> np.ndarray:
        """(query, d_i, d_j), … -> float32 [n, 2]: P(d_i > d_j) as asked in this order, and P(d_j > d_i) as asked in
        the other one; with orders="one" the second is 1 minus the first."""
        if self.orders == "both":
            items = (asked for q, d_i, d_j in items for asked in ((q, d_i, d_j), (q, d_j, d_i)))
        n = 2 if self.orders == "both" else 1
        p = 1 / (1 + np.exp(-self.logits(items, total and n * total).astype(np.float64).reshape(-1, n)))
        return (p if n == 2 else np.concatenate([p, 1 - p], 1)).astype(np.float32)

    def prefer(self, items: Iterable[tuple[str, str, str]], total: int | None = None) -> np.ndarray:
        """(query, d_i, d_j), … -> float32 [n]: P(d_i > d_j | q)"""
        return preference(self.ask(items, total))


def preference(asked: np.ndarray) -> np.ndarray:
    """asked [n, 2] -> P(d_i > d_j) [n], the mean of p_ij and 1 - p_ji, on the grid of 2^-24, where 1 - p is exact."""
    half = (asked[:, 0].astype(np.float64) - asked[:, 1]) / 2
    return (0.5 + np.round(half * 2 ** 24) / 2 ** 24).astype(np.float32)


def _identity(spec: str, model: nn.Module) -> str:
    """Which weights: a digest of a local folder, or a name with the Hub's revision."""
    spec = split_spec(spec)[1]
    if Path(spec).is_dir():
        return digest(spec)
    return f"{spec}@{getattr(model.config, '_commit_hash', None)}"


def load_pointwise(spec: str, *, device="cpu", cache: "Cache | None" = None, desc: str | None = None,
                   dtype: torch.dtype | None = None) -> Pointwise:
    """A cross-encoder, monoT5 or instruction LLM by Hub name or local folder. Raises ValueError in one sentence.

    dtype: of the weights; None: bfloat16 where the hardware multiplies in it, else float32. Scores are float32 in both.
    """
    reader = _load(spec, "pointwise", torch.device(device), dtype)
    return Pointwise(reader, "pointwise " + _identity(spec, reader.model), cache, desc)


def load_pairwise(spec: str, orders: str = "both", *, device="cpu", cache: "Cache | None" = None, desc: str | None = None,
                  dtype: torch.dtype | None = None) -> Pairwise:
    """A pair classifier, duoT5 or instruction LLM, as above."""
    if orders not in ("both", "one"):
        raise ValueError(f"orders {orders!r}: it is both or one")
    reader = _load(spec, "pairwise", torch.device(device), dtype)
    teacher = Pairwise(reader, "pairwise " + _identity(spec, reader.model), cache, desc)
    teacher.orders = orders
    return teacher


# Scores asked before ------------------------------------------------------------------------------------------------

VALUES = 900  # in an SQL statement: SQLite takes 32,766, before version 3.32 only 999; even, as a row has two


def key_of(asks: str, item: tuple[str, ...]) -> bytes:
    """16 bytes: a digest of the teacher, its prompt and the query, so that a query's rows lie together; then one of these
    and the passages."""
    digests = (hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
               for texts in ((asks, item[0]), (asks, *item)))
    return b"".join(digests)


class Cache:
    """Scores by key_of, in an SQLite file that all ranks of a machine read and write.

    A batch is a transaction or a few: it is there as soon as it is computed, for every rank, and a process that is killed
    loses the one that it was writing at most. SQLite keeps the rows on disk and a few megabytes of them in memory, whatever
    their number. Several machines with one `--out` have a file each (`name`), as network disks do not lock reliably.
    """

    def __init__(self, folder: str | Path, name: str = "scores"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path, self.asked, self.found = Path(folder) / f"{name}.sqlite", 0, 0
        self.db = None
        self._run("PRAGMA journal_mode = WAL")  # readers and one writer at a time do not wait for one another
        self._run("PRAGMA synchronous = NORMAL")
        self._run("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL) WITHOUT ROWID")

    def _run(self, statement: str, *values) -> list[tuple]:
        deadline = time.monotonic() + 60
        while True:
            try:
                # The teacher tokenizes, and so looks up, in a second thread; the library locks.
                self.db = self.db or sqlite3.connect(self.path, timeout=600, isolation_level=None, check_same_thread=False)
                return self.db.execute(statement, *values).fetchall()
            except sqlite3.DatabaseError as e:
                # SQLite waits for other ranks, but not if two switch to WAL at once.
                if "locked" in str(e) and time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                mend = ("free some space" if "full" in str(e) else "remove it (its scores are then computed again)"
                        if "malformed" in str(e) or "not a database" in str(e) else "see that it can be read and written")
                raise ValueError(f"the teachers' score cache {self.path}: {e}; {mend}, and start again") from e

    def get(self, keys: list[bytes]) -> dict[bytes, float]:
        """{key: score} of those that were asked before"""
        known = {}
        for start in range(0, len(keys), VALUES):
            some = keys[start:start + VALUES]
            known.update(self._run(f"SELECT key, score FROM scores WHERE key IN ({','.join('?' * len(some))})", some))
        self.asked += len(keys)
        self.found += sum(key in known for key in keys)
        return known

    def add(self, keys: list[bytes], scores: list[float]) -> None:
        rows = [value for row in zip(keys, scores) for value in row]
        for start in range(0, len(rows), VALUES):  # a statement is a transaction
            some = rows[start:start + VALUES]
            self._run(f"INSERT OR REPLACE INTO scores VALUES {','.join(['(?, ?)'] * (len(some) // 2))}", some)


# Training a teacher (section 4.1) -----------------------------------------------------------------------------------

def _new_classifier(encoder: str | Path, role: str, device: torch.device, seed: int, query_length: int,
                    passage_length: int) -> Classifier:
    """Any encoder with a head of one output, its own or a new one; matches are marked where it has token types for it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    encoder = str(encoder)
    with loading(encoder):
        config = AutoConfig.from_pretrained(encoder, num_labels=1, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
    config.match_types = getattr(config, "type_vocab_size", 0) >= MARKS + 2 * LEVELS
    config.teacher_role, config.query_length, config.passage_length = role, query_length, passage_length
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _ = load_model(AutoModelForSequenceClassification, encoder, lambda key, prefix: not key.startswith(prefix) or ".pooler." in key,
                              config=config, dtype=torch.float32)
    if config.match_types:  # the marks are read off these vectors: trained on a few labels, they say less of other words
        model.base_model.embeddings.requires_grad_(False)
    return Classifier(model.to(device), tokenizer)


def train_pointwise(encoder: str | Path, groups: list[tuple[str, str, list[str]]], folder: str | Path, *, negatives: int,
                    **options) -> list[list[float]]:
    """Trains a cross-encoder on (query, relevant passage, other passages) and saves it as a transformers checkpoint.

    Binary cross-entropy on triplets (q, d+, d-): a pointwise model's logit for "d+ is better" is s(q, d+) - s(q, d-).
    options are those of _train_classifier. Returns [loss, accuracy] of every step.
    """
    def items_of(query: str, positive: str, others: list[str], draw: np.random.Generator) -> list[tuple[str, ...]]:
        chosen = draw.choice(len(others), negatives, len(others) < negatives)
        return [(query, positive)] + [(query, others[c]) for c in chosen]

    return _train_classifier("pointwise", encoder, groups, folder, items_of,
                             lambda scores: scores[:, :1] - scores[:, 1:], 1 + negatives, negatives, **options)


def train_pairwise(encoder: str | Path, groups: list[tuple[str, str, list[str]]], folder: str | Path,
                   **options) -> list[list[float]]:
    """Trains a classifier over (q, d_i, d_j), with y = 1 where d_i is the relevant one: section 4.1's objective.

    A batch holds every triplet in both orders: what does not depend on the order, which is all that a model knows in the
    beginning, cancels in the gradient instead of drowning the rest. Else as train_pointwise.
    """
    def items_of(query: str, positive: str, others: list[str], draw: np.random.Generator) -> list[tuple[str, ...]]:
        other = others[draw.integers(len(others))]
        return [(query, positive, other), (query, other, positive)]

    return _train_classifier("pairwise", encoder, groups, folder, items_of,  # y = 1 for the first, 0 for the second
                             lambda logits: torch.stack([logits[:, 0], -logits[:, 1]]), 2, 2, **options)


def _train_classifier(role: str, encoder: str | Path, groups: list[tuple[str, str, list[str]]], folder: str | Path,
                      items_of, margins_of, n_items: int, n_margins: int, *, steps: int, batch: int, lr: float,
                      query_length: int = 32, passage_length: int = 180, seed: int = 0,
                      ranks: Ranks = Ranks()) -> list[list[float]]:
    """`batch` groups a step, each as the n_items sequences of items_of, whose logits [groups, n_items] margins_of turns
    into n_margins a group: how much better the relevant passage is."""
    if not groups or not all(others for *_, others in groups) or n_margins < 1:
        raise ValueError(f"a {role} teacher is trained on one query or more, each with a relevant passage and one or more others")
    reader = _new_classifier(encoder, role, ranks.device, seed, query_length, passage_length)
    batches = Batches(len(groups), batch, seed)

    def batch_terms(step: int) -> torch.Tensor:
        rows = batches[step]
        share = ranks.share(len(rows))
        items = [item for r in rows[share.start:share.stop]
                 for item in items_of(*groups[r], np.random.default_rng([seed, step, r]))]
        margin = margins_of(reader(reader.sequences(items)).view(-1, n_items))
        count = len(rows) * n_margins
        return torch.stack([F.softplus(-margin).sum() / count, (margin > 0).float().sum() / count])

    history = fit(reader, batch_terms, steps, lr=lr, warmup=steps // 10, ranks=ranks, desc=f"  train {role}", seed=seed)
    if ranks.first:
        no_truncation(reader.tokenizer)
        reader.model.save_pretrained(folder)
        reader.tokenizer.save_pretrained(folder)
    ranks.barrier()
    return history


# Measuring a teacher ------------------------------------------------------------------------------------------------

PAPER = {"pointwise": (800_000 * 100, "800,000 queries x 100 passages"),
         "pairwise": (800_000 * 50 * 2, "800,000 queries x 50 pairs x 2 orders")}


def made_texts(tokenizer, lengths: Iterable[int], rng: np.random.Generator) -> list[str]:
    """Texts of so many tokens, each of them a word of the tokenizer's."""
    words = np.array(sorted(w for token in tokenizer.get_vocab() if (w := token.strip("▁Ġ")).isalpha() and w.isascii()))
    return [" ".join(rng.choice(words, n)) for n in lengths]


def made_lengths(n: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of n passages as long as MS MARCO's: log-normal, 77 on average."""
    return (71 * np.exp(0.42 * rng.standard_normal(n))).clip(8, 180).astype(int)


def speed(teacher: Teacher, role: str, seconds: float = 20, window: int = WINDOW) -> dict:
    """Items and tokens a second on texts as long as MS MARCO's, tokenizing included."""
    tokenizer, rng, slow = teacher.reader.tokenizer, np.random.default_rng(0), teacher.reader.model.device.type == "cpu"
    n = teacher.window = 256 if slow else window
    passages, queries = (np.array(made_texts(tokenizer, lengths, rng), dtype=object)
                         for lengths in (made_lengths(n, rng), [6] * n))

    def items(until: float) -> Iterator[tuple[str, ...]]:
        while time.time() < until:
            q, *d = rng.integers(0, n, (2 if role == "pointwise" else 3, 1024))
            yield from zip(queries[q], *(passages[rows] for rows in d))

    teacher.logits(itertools.islice(items(float("inf")), 64 if slow else 1024))  # warms up
    start, teacher.tokens, teacher.padding, teacher.asked = time.time(), 0, 0, 0
    while time.time() - start < seconds:  # a GPU's windows follow one another, as in a run; a CPU's are asked one by one
        teacher.logits(itertools.islice(items(start + seconds), n if slow else None))
    spent, n = time.time() - start, teacher.asked
    return {"role": role, "items": n, "seconds": spent, "items/s": n / spent, "tokens/s": teacher.tokens / spent,
            "tokens an item": teacher.tokens / n, "padding": teacher.padding / (teacher.tokens + teacher.padding),
            "device": str(teacher.reader.model.device), "dtype": str(teacher.reader.model.dtype)}


def bench(teacher: Teacher, role: str, seconds: float = 20) -> str:
    """The same as a sentence, and what the counts of the paper (section 5.2) come to."""
    s, (n, counts) = speed(teacher, role, seconds), PAPER[role]
    return (f"{s['items']:,} items of {s['tokens an item']:.0f} tokens in {s['seconds']:.1f} s on {s['device']}, {s['dtype']}: "
            f"{s['items/s']:,.1f} items/s, {s['tokens/s']:,.0f} tokens/s, padding {s['padding']:.1%}\n"
            f"the paper's {counts} = {n / 1e6:.0f} million items: {n / s['items/s'] / 3600:,.0f} hours on one such device")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="teachers.py", description="How fast a teacher is here.")
    parser.add_argument("spec", help="Hub name or local folder")
    parser.add_argument("--role", choices=PAPER, help="default: pairwise where SPEC has duot5 in it, else pointwise")
    parser.add_argument("--bench", action="store_true", required=True, help="items and tokens a second, and the cost of the "
                        "paper's run")
    parser.add_argument("--seconds", type=float, default=20, help="how long to measure, at least (default: 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(argv)
    if not 0 < given.seconds < float("inf"):
        parser.error(f"--seconds {given.seconds}: expected more than 0")
    load = {"pointwise": load_pointwise, "pairwise": load_pairwise}
    role = given.role or ("pairwise" if "duot5" in given.spec.lower() else "pointwise")
    try:
        print(f"{given.spec}, {role}: " + bench(load[role](given.spec, device=given.device), role, given.seconds))
        return 0
    except (ValueError, RuntimeError, AssertionError) as e:  # such as no CUDA
        return refuse(e)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
