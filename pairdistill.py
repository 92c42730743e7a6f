"""PairDistill's student and how it is trained: sections 3.1, 3.3 and 4.2 of the paper.

A student turns a text into vectors, one a token (ColBERT) or one in all (DPR), and scores a passage by MaxSim,

    s(q, d) = sum over query tokens of the maximum over passage tokens of  q_token . d_token,

which for one vector on each side is the dot product: no loss asks which of the two it has. One iteration trains it
on what the teachers said of the passages that it retrieved itself:

    L = L_CL + lambda_KD L_KD + lambda_pair L_pair        (with no labels at hand: L_ZS = L_KD + lambda_pair L_pair)

Encoding follows ColBERT (`colbert/modeling/tokenization`, `colbert/modeling/colbert.py`): a marker token at position 1;
queries filled up with [MASK]s that nobody attends to but that score; punctuation dropped from passages only; a
projection without bias; L2 normalisation. Passages leave the encoder ragged: `d [T, E]` and `offsets [N + 1]`.

Dimension key, here and in every file: B queries in a batch, K passages a query, N passages in all, P pairs a query,
Q query tokens, T passage tokens (all of them, ragged), E embedding, L a padded length.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import string
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import checkpoints
from checkpoints import most_tokens
from maxsim_kernel import pairdistill_objective
from ranks import AfterStep, Ranks, gather_passages, half, has_bfloat16, sum_gradients

PIECE = 2048  # tokens that go through the encoder at once on a CPU: what a layer makes of them stays in its cache
MARKS, LEVELS = 16, 128  # token types of a teacher's marks, and of each of its two scales


# The student --------------------------------------------------------------------------------------------------------

class Student(nn.Module):
    """A dual encoder: `architecture` "colbert" (a vector a token) or "dpr" (one vector, not normalised)."""

    def __init__(self, encoder: nn.Module, tokenizer, dim: int | None, architecture: str = "colbert",
                 query_length: int = 32, passage_length: int = 180, query_expansion: bool = True,
                 markers: bool | list[str] = True, pooling: str = "cls", skiplist: str | list[str] = string.punctuation,
                 attend_to_masks: bool = False, base_model: str | None = None, chunk: int = 64):
        super().__init__()
        if architecture not in ("colbert", "dpr"):
            raise ValueError(f"architecture {architecture!r}: it is colbert or dpr")
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling {pooling!r}: it is cls or mean")
        for name, length in ("query_length", query_length), ("passage_length", passage_length):
            if not (isinstance(length, int) and length >= 4):
                raise ValueError(f"{name} {length!r}: it counts [CLS], a marker and [SEP] too, and is 4 or more")
        self.encoder, self.tokenizer, self.chunk = encoder, tokenizer, chunk
        width = encoder.config.hidden_size
        self.linear = nn.Linear(width, dim, bias=False) if dim else nn.Identity()
        if dim:
            nn.init.orthogonal_(self.linear.weight)  # keeps angles best: see test_a_new_projection_keeps_angles
        self.colbert = architecture == "colbert"
        if isinstance(markers, bool):
            markers = ["[unused0]", "[unused1]"] if markers and self.colbert else ["", ""]
        self.settings = dict(architecture=architecture, dim=dim, query_length=query_length,
                             passage_length=passage_length, query_expansion=query_expansion, markers=markers,
                             pooling=pooling, skiplist=skiplist, attend_to_masks=attend_to_masks, base_model=base_model)
        self.query_length, self.passage_length = query_length, passage_length
        self.expand = self.colbert and query_expansion
        self.query_marker, self.passage_marker = (self.token_id(m) if m else None for m in markers)
        if lacking := [m for m in markers if m and self.token_id(m) is None]:
            raise ValueError(f"this tokenizer has no {' and no '.join(lacking)} for ColBERT's markers: pass markers=False, or --no-markers")
        ids = set(tokenizer.convert_tokens_to_ids(list(skiplist))) - {None}
        self.skipped = torch.zeros(max(len(tokenizer), encoder.config.vocab_size), dtype=torch.bool)  # [V], on the CPU
        self.skipped[sorted(ids)] = True

    def token_id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return None if found == self.tokenizer.unk_token_id else found

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def dim(self) -> int:
        return self.settings["dim"] or self.encoder.config.hidden_size

    @classmethod
    def from_pretrained(cls, name_or_path: str, architecture: str = "colbert", dim: int | None = 128,
                        query_length: int | None = None, passage_length: int | None = None,
                        query_expansion: bool | None = None, markers: bool | None = None, seed: int = 0) -> "Student":
        """A student that save_pretrained, colbert-ai, PyLate or sentence-transformers wrote (checkpoints.py), or a plain
        encoder to start from, with a new orthogonal projection to `dim`, drawn by `seed` (`dim=None`: none).

        query_length, passage_length (tokens, all included), query_expansion and markers override the folder's own; None leaves
        them, or is 32, 180, True and True where it has none. Its projection, and architecture in a folder of save_pretrained,
        cannot be overridden. Raises ValueError in one sentence where something is missing or different.
        """
        encoder, tokenizer = checkpoints.load_encoder(name_or_path)
        found, weight = checkpoints.read(name_or_path, architecture, tokenizer)
        given = dict(query_length=query_length, passage_length=passage_length, query_expansion=query_expansion, markers=markers)
        settings = dict(architecture=architecture, dim=dim, base_model=None if os.path.isdir(name_or_path) else name_or_path)
        settings |= found | {k: v for k, v in given.items() if v is not None}
        if weight is not None and weight.shape[1] != encoder.config.hidden_size:
            raise ValueError(f"the projection in {name_or_path} takes {weight.shape[1]} dimensions and its encoder gives "
                             f"{encoder.config.hidden_size}: they are not of one model; {checkpoints.AGAIN}")
        with torch.random.fork_rng(devices=[]), checkpoints.loading(name_or_path, (TypeError, AttributeError)):
            torch.manual_seed(seed)
            student = cls(encoder, tokenizer, **settings)
        if weight is not None:
            with torch.no_grad():
                student.linear.weight.copy_(weight)
        student.drawn = weight is None and bool(student.settings["dim"])  # whether its projection is one of random numbers
        return student.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder with a model card, which from_pretrained, colbert-ai, PyLate and sentence-transformers open."""
        checkpoints.save(self, folder)

    # Encoding --------------------------------------------------------------------------------------------------------

    def _ids(self, texts: list[str], marker: int | None, length: int) -> list[list[int]]:
        """[CLS] marker text [SEP]; the text is cut so that all fits into `length`. (ColBERT puts ". " before the text
        and overwrites it with the marker: the same ids.)"""
        if isinstance(texts, str):
            raise ValueError(f"texts are a list, not one str: give [{texts[:40]!r}]")
        cls_, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        head = [cls_] if marker is None else [cls_, marker]
        ids = self.tokenizer(list(texts), add_special_tokens=False, truncation=True,
                             max_length=length - len(head) - 1)["input_ids"] if len(texts) else []
        return [head + i + [sep] for i in ids]

    def _encode(self, ids: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """ids [n, L], attended bool [n, L] -> [n, L, E], or for DPR [n, 1, E]."""
        if not len(ids):
            return torch.zeros(0, ids.shape[1] if self.colbert else 1, self.dim, device=self.device)
        if ids.shape[1] > (most := most_tokens(self.encoder.config)):
            raise ValueError(f"a text has {ids.shape[1]} tokens, and this encoder reads {most} at most: give a smaller query_length "
                             f"({self.query_length} now) or passage_length ({self.passage_length} now)")
        ids, attended = _send(ids, self.device), _send(attended, self.device)
        # A mask for each head and position is taken as it is; of a flat one transformers asks whether it masks anything,
        # and a GPU waits for the answer. (Encoders with local attention need the flat one.)
        made = self.encoder.config.model_type == "bert" and self.encoder.config._attn_implementation == "sdpa"
        mask = attended[:, None, None] if made else attended.long()
        with plainly(self.device):  # here, not in fit alone: recomputing in a backward pass runs outside of what is there
            x = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.colbert:
            return F.normalize(self.linear(x).float(), dim=-1)
        if self.settings["pooling"] == "mean":
            x = (x * attended[..., None]).sum(1) / attended.sum(1, keepdim=True)
        else:
            x = x[:, 0]
        return self.linear(x).float()[:, None]

    def tokenize_queries(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """texts -> ids [B, L], attended bool [B, L], on the CPU."""
        rows = self._ids(texts, self.query_marker, self.query_length)
        fill = self.tokenizer.mask_token_id if self.expand else self.tokenizer.pad_token_id
        ids, attended = _pad(rows, fill, self.query_length if self.expand else None)
        return ids, attended | (self.expand and self.settings["attend_to_masks"])

    def embed_queries(self, ids: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokenize_queries' -> encode_queries'."""
        q = self._encode(ids, attended)
        if not self.colbert or self.expand:  # every position scores: [MASK]s too, although nobody attends to them
            return q, torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        return q, _send(attended, q.device)

    def encode_queries(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """texts -> q [B, Q, E], q_mask bool [B, Q]: which positions score (for DPR Q is 1)."""
        return self.embed_queries(*self.tokenize_queries(texts))

    def tokenize_passages(self, texts: list[str]) -> tuple[list, torch.Tensor, torch.Tensor]:
        """texts -> pieces [(ids [n, L], attended [n, L]), ...] sorted by length, so that little is padding;
        token int64 [T]: where in the pieces' rows, one after the other, each scoring token is; offsets int32 [N + 1]."""
        rows = self._ids(texts, self.passage_marker, self.passage_length)
        order = np.argsort([len(row) for row in rows], kind="stable")
        pieces, kept, start = [], [], 0
        while start < len(order):
            end, most = start + 1, PIECE if self.device.type == "cpu" else np.inf
            while end < len(order) and end - start < self.chunk and (end - start + 1) * len(rows[order[end]]) <= most:
                end += 1
            ids, attended = _pad([rows[n] for n in order[start:end]], self.tokenizer.pad_token_id)
            keep = attended & ~self.skipped[ids] if self.colbert else attended[:, :1]
            pieces.append((ids, attended))
            kept += list(keep.numpy())
            start = end
        rows_at = np.cumsum([0, *map(len, kept)])
        places = [np.flatnonzero(kept[n]) + rows_at[n] for n in np.argsort(order)]  # of each passage
        offsets = torch.tensor(np.cumsum([0, *map(len, places)]), dtype=torch.int32)
        return pieces, torch.from_numpy(np.concatenate(places) if places else np.zeros(0, np.int64)), offsets

    def embed_passages(self, pieces: list, token: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokenize_passages' -> encode_passages'. With more passages than `chunk`, activations are recomputed in the backward
        pass: memory follows the chunk, not the batch."""
        if torch.is_grad_enabled() and len(offsets) - 1 > self.chunk:
            # Sent here: the random state that dropout is repeated from is kept for the devices of the arguments.
            parts = [checkpoint(self._encode, *(_send(x, self.device) for x in piece), use_reentrant=False) for piece in pieces]
        else:
            parts = [self._encode(*piece) for piece in pieces]
        rows = torch.cat([x.flatten(0, 1) for x in parts]) if parts else torch.zeros(0, self.dim, device=self.device)
        return rows[_send(token, self.device)], _send(offsets, self.device)

    def encode_passages(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """texts -> d [T, E] ragged, offsets int32 [N + 1]."""
        return self.embed_passages(*self.tokenize_passages(texts))


def _send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device; to a GPU from page-locked memory, which nothing waits for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def _pad(rows: list[list[int]], fill: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> ids [n, L] filled up with `fill`, and which of them are the text's own."""
    lengths = np.array([len(r) for r in rows], dtype=np.int64)
    length = length or int(lengths.max(initial=1))
    own = np.arange(length) < lengths[:, None]
    ids = np.full((len(rows), length), fill, dtype=np.int64)
    ids[own] = np.concatenate(rows) if rows else []
    return torch.from_numpy(ids), torch.from_numpy(own)


def scratch_encoder(folder: str | Path, texts: list[str], *, vocabulary: int = 16000, hidden: int = 128,
                    layers: int = 2, positions: int = 256, teacher: bool = False, seed: int = 0) -> None:
    """A small BERT with random weights and a WordPiece vocabulary made from `texts`, as an ordinary folder.

    Where no pretrained model is at hand. Small initial weights leave the residual stream nearly alone and small position
    vectors leave a token recognisable wherever it stands: before its first step such an encoder matches words.
    """
    from transformers import BertConfig, BertModel, BertTokenizerFast
    words, texts_V = _wordpieces(texts, vocabulary)
    tokenizer = BertTokenizerFast(tokenizer_object=words._tokenizer, do_lower_case=True)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers,
                        num_attention_heads=hidden // 32, intermediate_size=4 * hidden, max_position_embeddings=positions,
                        type_vocab_size=MARKS + 2 * LEVELS if teacher else 2,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
        common, direction = torch.randn(2, hidden) * config.initializer_range
    with torch.no_grad():
        model.embeddings.position_embeddings.weight *= 0.1
        vectors, types = model.embeddings.word_embeddings.weight, model.embeddings.token_type_embeddings.weight
        types[0] = 0
        if teacher:
            # From 0 for a word of every text to 1 for a word of one: the more frequent a word, the more common its vector.
            rare_V1 = (1 - texts_V.clamp(min=1).log() / np.log(max(2, len(texts))))[:, None]
            vectors.copy_(rare_V1.sqrt() * vectors + (1 - rare_V1).sqrt() * common)
            # Classifier._match_types' two scales begin as numbers on one line.
            types[MARKS:] = (torch.linspace(-1, 1, LEVELS)[:, None] * direction).repeat(2, 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _wordpieces(texts: list[str], size: int):
    """A lower-case WordPiece tokenizer, the same one each time, numbered from the token of most texts to that of fewest,
    and in how many texts each token is [vocabulary]."""
    from tokenizers import BertWordPieceTokenizer
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
    words = BertWordPieceTokenizer(lowercase=True)
    characters = sorted({c for text in texts for c in words.normalize(text)} - {" "})
    # The library draws the order of inner characters and breaks ties by it: as special tokens they have one.
    words.train_from_iterator(texts, vocab_size=size, min_frequency=2, show_progress=False,
                              special_tokens=special + ["##" + c for c in characters])
    found = Counter(token for row in words.encode_batch(texts, add_special_tokens=False) for token in set(row.tokens))
    order = special + sorted(set(words.get_vocab()) - set(special), key=lambda token: (-found[token], token))
    numbered = BertWordPieceTokenizer({token: n for n, token in enumerate(order)}, lowercase=True)
    return numbered, torch.tensor([found[token] for token in order])


# Pairs --------------------------------------------------------------------------------------------------------------

def sample_pairs(n_passages: int, n_pairs: int, delta: int | None, generator: torch.Generator,
                 scores: torch.Tensor | None = None) -> torch.Tensor:
    """Pairs of near neighbours in the pointwise-reranked order (section 4.2): int64 [P, 2], i < j and j - i < delta.

    P = min(n_pairs, pairs available), without repeats, sorted; `delta=None` takes any pair (table 3's "- pair sampling
    heuristic"). # PAPER: delta 10 and 50 pairs. The authors' code has j - i <= 5 and is not seeded.
    # OURS: with `scores` [n_passages], the pointwise teacher's logits, a pair is drawn the sooner the less sure it is of it:
    by p (1 - p), where p = sigmoid(s_i - s_j) is its probability that i answers better.
    """
    i, j = torch.triu_indices(n_passages, n_passages, offset=1)
    if delta is not None:
        i, j = i[j - i < delta], j[j - i < delta]
    if scores is None or not n_pairs or not len(i):
        chosen = torch.randperm(len(i), generator=generator)[:n_pairs]
    else:
        p = torch.sigmoid(scores[i].double() - scores[j].double())
        chosen = torch.multinomial((p * (1 - p)).clamp(min=1e-12), min(n_pairs, len(i)), generator=generator)
    chosen = chosen.sort().values
    return torch.stack([i[chosen], j[chosen]], dim=1)


# Training -----------------------------------------------------------------------------------------------------------

def automatic_chunk(student: Student) -> int:
    """The passages whose activations fit into half of a GPU's free memory, gradients and AdamW's state aside, or into 2 GB
    on a CPU: there more would only save the time of recomputing, and ranks share the memory."""
    c, length = student.encoder.config, student.passage_length
    wide = getattr(c, "intermediate_size", 4 * c.hidden_size)
    # Floats a token and layer: q, k, v, what attention, both dropouts and both norms make of it; around the activation;
    # the attention's weights before and after dropout, which a GPU does not keep.
    plain = 0 if student.device.type == "cuda" else 2 * c.num_attention_heads * length
    of_passage = 4 * length * c.num_hidden_layers * (10 * c.hidden_size + 3 * wide + plain)
    if student.device.type != "cuda":
        return max(1, int(2e9 / of_passage))
    torch.cuda.empty_cache()  # what the teachers and the search left in torch's cache is free, but counts as taken
    free = torch.cuda.mem_get_info(student.device)[0] - 3 * 4 * sum(p.numel() for p in student.parameters())
    return max(1, int(free / 2 / of_passage))


def plainly(device: torch.device):
    """On a CPU, in training: attention and dropout by few and cheap operations."""
    return _Plainly() if device.type == "cpu" and torch.is_grad_enabled() else contextlib.nullcontext()


class _Plainly(TorchFunctionMode):
    """torch's fused attention has a backward pass that costs as much as the rest of a step, its other one asks of each
    row whether all of it is masked, and its dropout draws a float for each element: a fifth of a step of MiniLM."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.OURS.get(function, function)(*args, **(kwargs or {}))


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> torch.Tensor:
    if is_causal or enable_gqa:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                              enable_gqa=enable_gqa)
    scores = query * (scale or query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=scores.dtype).masked_fill_(~attn_mask, torch.finfo(scores.dtype).min)
        scores += attn_mask
    return _dropout(torch.softmax(scores, -1), dropout_p) @ value


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return _Dropout.apply(x, p) if training and p > 0 else x


_Plainly.OURS = {F.scaled_dot_product_attention: _attention, F.dropout: _dropout}


class _Dropout(torch.autograd.Function):
    """# OURS: dropout with p rounded to 1/256, by one random byte an element, because torch draws a float for each."""

    @staticmethod
    def forward(ctx, x, p):
        n = round(256 * p)
        bytes_ = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-2**63, None).view(torch.uint8)
        dropped, ctx.scale = (bytes_[:x.numel()] < n).view(x.shape), 256 / (256 - n)
        ctx.save_for_backward(dropped)  # an attribute would outlive the pass that activation checkpointing repeats
        return x.masked_fill(dropped, 0).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        dropped, = ctx.saved_tensors
        return grad.masked_fill(dropped, 0).mul_(ctx.scale), None


def fit(model: nn.Module, batch_terms, steps: int, *, lr: float, warmup: int, ranks: Ranks, desc: str, seed: int,
        weight_decay: float = 0.0, clip: float = 2.0, checkpoint_folder: Path | None = None,
        checkpoint_every: int = 500, batch_of=None, prepare=lambda step: step, memory: Memory | None = None,
        speed: Speed | None = None, note=lambda **row: None) -> list[list[float]]:
    """AdamW with linear warm-up and decay, on any number of ranks. Returns the loss terms of every step.

    batch_terms(prepare(step)) -> float [n]: the terms of this rank's share of the global batch, the total loss first.
    Their sum over ranks is the batch's loss, so the sum of the ranks' gradients is its gradient. prepare runs a step ahead,
    in another thread. batch_of(step) -> what that batch held, which is written beside the checkpoint if its loss is not
    finite; then ValueError is raised. On SIGTERM, after the step in hand, rank 0 writes a checkpoint where there is a
    checkpoint_folder, and all exit with 143.
    note(steps=..., tokens_per_second=..., share_of_peak=...) is called with every checkpoint and at the end.
    # OURS: weight decay is explicit: 0, as the authors' transformers.AdamW had it; torch's default is 0.01.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    history: list[torch.Tensor] = []
    start = _resume(checkpoint_folder, model, optimizer, history, ranks)
    model.train()
    bar = tqdm(range(start, steps), desc=desc, initial=start, total=steps, disable=not ranks.first, leave=False,
               mininterval=1.0)
    checked, batches = start, _ahead(prepare, start, steps)

    def gradients(batch) -> torch.Tensor:
        # Dropout is a function of (seed, step, rank): a resumed run draws what an undisturbed one draws.
        torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + ranks.rank) % 2**63)
        optimizer.zero_grad()
        with plainly(ranks.device), half(ranks.device):
            terms = batch_terms(batch)
        terms[0].backward()
        return terms.detach()

    with AfterStep(ranks) as sigterm:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))
            batch = next(batches)
            while (terms := memory.agreed(gradients, batch) if memory else gradients(batch)) is None:
                memory.lower()  # which raises the second time
                batches = _ahead(prepare, step, steps)  # the batch made ahead was cut into the old chunks
                batch = next(batches)
            terms = sum_gradients(model, terms, ranks)
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            history.append(terms + 0 * norm)  # NaN where a gradient is not finite, though the loss may be
            optimizer.step()
            stop = sigterm.came  # asked once: what comes from here on is for the next step, which leaves a checkpoint
            due = checkpoint_folder and (stop or step + 1 < steps and (step + 1) % checkpoint_every == 0)
            if step % 10 == 9 or step + 1 == steps or due:  # not at each step: a GPU would wait for the answer
                _refuse_nan(history, checked, checkpoint_folder, batch_of, ranks)
                checked = step + 1
                bar.set_postfix_str(f"loss {float(history[-1][0]):.3f}{speed or ''}")
            if speed and (due or step + 1 == steps):
                note(steps=step + 1, **speed.take())
            if due and ranks.first:
                _save_checkpoint(checkpoint_folder, model, optimizer, history)
            if stop and ranks.first:
                raise SystemExit(143)  # the others find rank 0 gone at their next sum
    model.eval()
    return torch.stack(history).cpu().tolist() if history else []


def _refuse_nan(history: list, checked: int, folder: Path | None, batch_of, ranks: Ranks) -> None:
    """Raises ValueError at the first of the losses from step `checked` on that is not finite."""
    losses = torch.stack([terms[0] for terms in history[checked:]])
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return
    step, held = checked + bad[0], ""
    if batch_of and folder:
        path, batch = folder / f"batch{step}.json", batch_of(step)
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(batch, indent=1))
        held = f", whose queries begin with {batch[0]['query'][:60]!r}; all of them are in {path}"
    mend = ("the same command goes on from the last checkpoint before it, and a lower learning rate, with --restart-from or in "
            "another --out, may mend it" if folder else "a lower learning rate may mend it")
    raise ValueError(f"the loss of step {step} or its gradient is {losses[bad[0]].item()}{held}; {mend}")


def _save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: list) -> None:
    """What a step reads, written beside and renamed. There is no random state: dropout's follows from the step (and from
    `chunk`: a GPU with less free memory draws others after it)."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    for n, slots in optimizer.state_dict()["state"].items():
        state.update({f"optimizer.{n}.{k}": v for k, v in slots.items()})
    state["history"] = torch.stack(history)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, folder / "writing.safetensors")
    if (folder / "last.safetensors").exists():
        os.replace(folder / "last.safetensors", folder / "previous.safetensors")
    os.replace(folder / "writing.safetensors", folder / "last.safetensors")


def _resume(folder: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, history: list,
            ranks: Ranks) -> int:
    """The step to go on from: 0 where there is no checkpoint."""
    state = None
    for file in [folder / f"{name}.safetensors" for name in ("last", "previous")] if folder else []:
        if file.exists() and state is None:
            with contextlib.suppress(SafetensorError):  # half written where the power failed
                state = load_file(file)
    if state is None:
        return 0
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    slots: dict[int, dict] = {}
    for k, v in state.items():
        if k.startswith("optimizer."):
            _, n, name = k.split(".")
            slots.setdefault(int(n), {})[name] = v
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    history.extend(state["history"].to(ranks.device))
    ranks.say(f"  going on from step {len(history)}")
    return len(history)


def _ahead(prepare, start: int, steps: int):
    """prepare(step) of each step, made in another thread while the step before it runs."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(prepare, start)
        for step in range(start, steps):
            ready, coming = coming.result(), pool.submit(prepare, step + 1) if step + 1 < steps else None
            yield ready


class Memory:
    """Halves the student's chunk once when device memory runs out, on all ranks alike; the second time ends the run.

    Ranks agree after encoding and after the backward pass. In between, L_CL makes them exchange embeddings and their gradients,
    and one that runs out there cannot be waited for: that ends the run at once.
    """

    def __init__(self, student: Student, ranks: Ranks, most: int):
        self.student, self.ranks, self.most, self.lowered, self.between = student, ranks, most, False, False

    def agreed(self, work, *args):
        """work(*args), or None on all ranks if memory ran out on one of them."""
        result, out = None, torch.zeros(1)
        try:
            result = work(*args)
        except torch.OutOfMemoryError:
            if self.between and self.ranks.world > 1:
                raise ValueError(self._sentence()) from None
            out += 1
        return None if self.ranks.sum_(out) > 0 else result

    def encoded(self, work, exchange: bool):
        """The same for work() -> d and more, but raises OutOfMemoryError on all ranks. If they exchange d, `between` until its
        gradient is there."""
        self.between = False
        if (result := self.agreed(work)) is None:
            raise torch.OutOfMemoryError
        self.between = exchange
        if result[0].requires_grad:
            result[0].register_hook(lambda _: setattr(self, "between", False))
        return result

    def lower(self) -> None:
        if self.lowered or self.most == 1:
            raise ValueError(self._sentence())
        self.lowered, self.student.chunk = True, max(1, min(self.student.chunk, self.most) // 2)
        if self.student.device.type == "cuda":
            torch.cuda.empty_cache()
        self.ranks.say(f"  memory ran out: --passage-chunk is {self.student.chunk} from here on, and the step is repeated")

    def _sentence(self) -> str:
        return (f"memory ran out with {self.student.chunk} passages at once: give a smaller --passage-chunk, and if 1 is too "
                f"many, a smaller --batch or --passage-length")


BFLOAT16_PEAK = {"H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312, "A10G": 70, "A10": 125,
                 "A30": 165, "A40": 150, "A6000": 155, "L40S": 362, "L40": 181, "L4": 121, "B200": 2250, "4090": 165,
                 "3090": 71}  # dense TFLOP/s, from data sheets


def peak_flops(device: torch.device) -> float:
    """The most operations a second, in bfloat16 where the hardware has it: by a GPU's data sheet, else, as on a CPU, what a
    product of matrices reaches here and now."""
    cuda, dtype = device.type == "cuda", torch.bfloat16 if has_bfloat16(device) else torch.float32
    if cuda and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in BFLOAT16_PEAK.items():
            if re.search(rf"\b{key}\b", name):
                return 1e12 * peak
    a, times = torch.full((8192 if cuda else 512,) * 2, .5, dtype=dtype, device=device), []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * len(a)**3 / min(times)


class Speed:
    """Tokens that are trained on a second, over all ranks (taken to be alike), and the share of the hardware's peak: the
    operations of their products of matrices, forward and backward, padding and recomputing aside. Printed, it says both."""

    def __init__(self, student: Student, ranks: Ranks):
        self.ranks, self.peak, config = ranks, peak_flops(ranks.device), student.encoder.config
        self.weights = sum(p.numel() for name, p in student.named_parameters() if p.dim() == 2 and "embeddings" not in name)
        self.attention = 2 * config.num_hidden_layers * config.hidden_size  # to compare two tokens and to add one's value
        self.tokens = self.operations = 0
        self.since = time.perf_counter()

    def add(self, lengths: np.ndarray) -> None:
        lengths = lengths.astype(np.float64)
        self.tokens += lengths.sum()
        self.operations += 6 * (self.weights * lengths.sum() + self.attention * (lengths**2).sum())

    def rates(self) -> dict:
        seconds = time.perf_counter() - self.since
        return dict(tokens_per_second=round(self.tokens * self.ranks.world / seconds),
                    share_of_peak=round(self.operations / seconds / self.peak, 3))

    def take(self) -> dict:
        rates, self.tokens, self.operations, self.since = self.rates(), 0, 0, time.perf_counter()
        return rates

    def __str__(self) -> str:
        rates = self.rates()
        return f", {rates['tokens_per_second']:,} tokens/s ({rates['share_of_peak']:.0%} of peak)"


class Batches:
    """Rows of each global batch, the same on any number of ranks: a new permutation of all rows every epoch. A batch that
    spans the end of one can hold a row twice."""

    def __init__(self, n: int, size: int, seed: int):
        self.n, self.size, self.seed, self.epoch = n, min(size, n), seed, -1

    def __getitem__(self, step: int) -> np.ndarray:
        rows = []
        for at in range(step * self.size, (step + 1) * self.size):
            epoch, place = divmod(at, self.n)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n)
            rows.append(self.order[place])
        return np.array(rows)


def train(student: Student, queries: list[str], passages, examples: dict[str, np.ndarray], *, steps: int, batch: int,
          lr: float, warmup: int, temperature: float, tau: float, lambda_kd: float, lambda_pair: float, pair_reduction: str, seed: int,
          ranks: Ranks, desc: str, negatives: int = 0, checkpoint_folder: Path | None = None,
          note=lambda **row: None) -> list[list[float]]:
    """Trains `student` in place on one iteration's examples; returns [total, L_CL, L_KD, L_pair] of every step.

    queries: the text of each row. passages: the corpus. temperature divides the student's scores in every loss (the
    authors' code has it, at 1), tau the pointwise teacher's. negatives: so many queries of a batch, or a few more, have one
    another's passages as L_CL's negatives; 0: all of them. examples: the rows, as arrays:
        passages int [n, K], corpus positions          teacher float [n, K], pointwise scores of them
        pairs int [n, P, 2], positions in the row      pair_probs float [n, P], P(d_i > d_j | q)
        positive int [n], position of the labelled passage in the row, -1 where there is none
    """
    batches = Batches(len(queries), batch, seed)
    in_batch = bool((examples["positive"] >= 0).any())  # with no label there is no L_CL, and no use for other columns
    memory = Memory(student, ranks, -(-batches.size // ranks.world) * examples["passages"].shape[1])
    speed = Speed(student, ranks)

    def prepare(step: int) -> dict:
        rows = batches[step]
        share = ranks.share(len(rows))
        mine = rows[share.start:share.stop]
        texts = [passages[p] for p in examples["passages"][mine].reshape(-1)]
        return dict(queries=student.tokenize_queries([queries[r] for r in mine]), passages=student.tokenize_passages(texts),
                    own=[torch.from_numpy(examples[k][mine]) for k in ("teacher", "pairs", "pair_probs", "positive")],
                    first=share.start,
                    counts=dict(n_queries=len(rows), n_labelled=int((examples["positive"][rows] >= 0).sum()),
                                n_pairs=int((examples["pairs"][rows, :, 0] >= 0).sum())))

    def batch_terms(step: dict) -> torch.Tensor:
        d, offsets, q, q_mask = memory.encoded(
            lambda: (*student.embed_passages(*step["passages"]), *student.embed_queries(*step["queries"])), exchange=in_batch)
        for _, attended in (step["queries"], *step["passages"][0]):
            speed.add(attended.sum(1).numpy())
        if in_batch:
            d, offsets = gather_passages(d, offsets, ranks)
        own = [_send(x, q.device) for x in step["own"]]
        objective = lambda rows, d, offsets, first: torch.stack(list(pairdistill_objective(
            q[rows] / temperature, d, offsets, *(x[rows] for x in own), q_mask[rows], in_batch=in_batch, tau=tau,
            lambda_kd=lambda_kd, lambda_pair=lambda_pair, pair_reduction=pair_reduction, max_length=student.passage_length,
            **step["counts"], first_query=first)))
        if not (in_batch and negatives):
            return objective(slice(None), d, offsets, step["first"])
        # A group may lie on two ranks: the result does not depend on their number.
        n, first, K = step["counts"]["n_queries"], step["first"], own[0].shape[1]
        total = torch.zeros(4, device=d.device)
        for g in range(groups := max(1, n // negatives)):
            start, end = n * g // groups, n * (g + 1) // groups
            a, b = max(start, first), min(end, first + len(q))
            if a < b:
                bounds = offsets[start * K:end * K + 1]
                total = total + objective(slice(a - first, b - first), d[bounds[0]:bounds[-1]], bounds - bounds[0], a - start)
        return total

    def batch_of(step: int) -> list[dict]:
        return [dict(query=queries[r], passages=[passages[p] for p in examples["passages"][r]],
                     **{k: v[r].tolist() for k, v in examples.items() if k != "passages"})
                for r in Batches(len(queries), batch, seed)[step]]  # not `batches`, which another thread reads

    return fit(student, batch_terms, steps, lr=lr, warmup=warmup, ranks=ranks, desc=desc, seed=seed,
               checkpoint_folder=checkpoint_folder, batch_of=batch_of, prepare=prepare, memory=memory, speed=speed, note=note)
