"""PairDistill's student and how it is trained: sections 3.1, 3.3 and 4.2 of the paper.

A student turns a text into vectors, one a token (ColBERT) or one in all (DPR), and scores a passage by MaxSim,

    s(q, d) = sum over query tokens of the maximum over passage tokens of  q_token . d_token,

which for one vector on each side is the dot product: nothing below asks which of the two it has. One iteration trains it
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
import hashlib
import json
import os
import string
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from maxsim_kernel import pairdistill_objective
from ranks import AfterStep, Ranks, gather_passages, has_bfloat16, sum_gradients

MARKS, LEVELS = 16, 128  # token types of a teacher's marks, and of each of its two scales
METADATA, OURS = "artifact.metadata", "pairdistill.json"  # ColBERT's settings file, and ours for what it has no word for


# The student --------------------------------------------------------------------------------------------------------

class Student(nn.Module):
    """A dual encoder: `architecture` "colbert" (a vector a token) or "dpr" (one vector, not normalised)."""

    def __init__(self, encoder: nn.Module, tokenizer, dim: int | None, architecture: str = "colbert",
                 query_length: int = 32, passage_length: int = 180, query_expansion: bool = True,
                 markers: bool = True, pooling: str = "cls", chunk: int = 64):
        super().__init__()
        if architecture not in ("colbert", "dpr"):
            raise ValueError(f"architecture {architecture!r}: it is colbert or dpr")
        self.encoder, self.tokenizer, self.chunk = encoder, tokenizer, chunk
        width = encoder.config.hidden_size
        self.linear = nn.Linear(width, dim, bias=False) if dim else nn.Identity()
        if dim:
            nn.init.orthogonal_(self.linear.weight)  # keeps angles best: see test_a_new_projection_keeps_angles
        self.settings = dict(architecture=architecture, dim=dim, query_length=query_length,
                             passage_length=passage_length, query_expansion=query_expansion, markers=markers,
                             pooling=pooling)
        self.colbert = architecture == "colbert"
        self.query_length, self.passage_length = query_length, passage_length
        self.expand = self.colbert and query_expansion
        ids = tokenizer.convert_tokens_to_ids(["[unused0]", "[unused1]"]) if markers and self.colbert else [None, None]
        if tokenizer.unk_token_id in ids:
            raise ValueError("this tokenizer has no [unused0] and [unused1] for ColBERT's markers: pass markers=False")
        self.query_marker, self.passage_marker = ids
        punctuation = [tokenizer(c, add_special_tokens=False)["input_ids"][:1] for c in string.punctuation]
        self.register_buffer("skiplist", torch.tensor(sorted({i for ids in punctuation for i in ids})), False)

    @property
    def device(self) -> torch.device:
        return self.skiplist.device

    @property
    def dim(self) -> int:
        return self.settings["dim"] or self.encoder.config.hidden_size

    @classmethod
    def from_pretrained(cls, name_or_path: str, architecture: str = "colbert", dim: int | None = 128,
                        query_length: int = 32, passage_length: int = 180, query_expansion: bool = True,
                        markers: bool = True, seed: int = 0) -> "Student":
        """A plain encoder (a new orthogonal projection to `dim` is drawn by `seed`; `dim=None`: none), a ColBERTv2
        checkpoint (its `linear.weight`), or a folder of save_pretrained, whose own settings then hold.

        Raises ValueError in one sentence where nothing can be loaded by that name.
        """
        from transformers import AutoModel, AutoTokenizer
        files = {name: _file(name_or_path, name) for name in (OURS, METADATA, "1_Pooling/config.json")}
        settings = dict(architecture=architecture, dim=dim, query_length=query_length, passage_length=passage_length,
                        query_expansion=query_expansion, markers=markers)
        if files["1_Pooling/config.json"] and json.loads(files["1_Pooling/config.json"].read_text()).get(
                "pooling_mode_mean_tokens"):
            settings["pooling"] = "mean"  # sentence-transformers was trained that way
        weight = _linear_weight(name_or_path)
        if weight is not None and architecture == "colbert":
            settings["dim"] = weight.shape[0]
        if files[OURS]:
            settings.update(json.loads(files[OURS].read_text()))
        try:
            pooler = {"add_pooling_layer": False} if _has_pooler(name_or_path) else {}
            encoder = AutoModel.from_pretrained(name_or_path, **pooler)
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError, ImportError) as e:
            raise ValueError(cannot_load(name_or_path, e)) from e
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = cls(encoder.float(), tokenizer, **settings)
        if weight is not None and settings["dim"]:
            with torch.no_grad():
                student.linear.weight.copy_(weight)
        return student.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """A ColBERTv2 checkpoint: the encoder under its own prefix, linear.weight, artifact.metadata, tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        state = {f"{self.encoder.base_model_prefix}.{k}": v for k, v in self.encoder.state_dict().items()}
        state.update({f"linear.{k}": v for k, v in self.linear.state_dict().items()})
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "model.safetensors",
                  metadata={"format": "pt"})
        s = self.settings
        (folder / OURS).write_text(json.dumps(s, indent=1))
        (folder / METADATA).write_text(json.dumps(dict(
            dim=self.dim, query_maxlen=s["query_length"], doc_maxlen=s["passage_length"], similarity="cosine",
            mask_punctuation=True, attend_to_mask_tokens=False, query_token="[Q]", doc_token="[D]",
            query_token_id="[unused0]", doc_token_id="[unused1]"), indent=1))

    # Encoding --------------------------------------------------------------------------------------------------------

    def _ids(self, texts: list[str], marker: int | None, length: int) -> list[list[int]]:
        """[CLS] marker text [SEP]; the text is cut so that all fits into `length`. (ColBERT puts ". " before the text
        and overwrites it with the marker: the same ids.)"""
        cls_, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        head = [cls_] if marker is None else [cls_, marker]
        ids = self.tokenizer(list(texts), add_special_tokens=False, truncation=True,
                             max_length=length - len(head) - 1)["input_ids"] if len(texts) else []
        return [head + i + [sep] for i in ids]

    def _encode(self, ids: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """ids [n, L], attended bool [n, L] -> [n, L, E], or for DPR [n, 1, E]."""
        x = self.encoder(input_ids=ids, attention_mask=attended.long()).last_hidden_state
        if self.colbert:
            return F.normalize(self.linear(x).float(), dim=-1)
        if self.settings["pooling"] == "mean":
            x = (x * attended[..., None]).sum(1) / attended.sum(1, keepdim=True)
        else:
            x = x[:, 0]
        return self.linear(x).float()[:, None]

    def encode_queries(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """texts -> q [B, Q, E], q_mask bool [B, Q]: which positions score (for DPR Q is 1)."""
        rows = self._ids(texts, self.query_marker, self.query_length)
        fill = self.tokenizer.mask_token_id if self.expand else self.tokenizer.pad_token_id
        ids, attended = _pad(rows, fill, self.query_length if self.expand else None)
        q = self._encode(ids.to(self.device), attended.to(self.device))
        if not self.colbert or self.expand:  # every position scores: [MASK]s too, although nobody attends to them
            return q, torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        return q, attended.to(q.device)

    def encode_passages(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """texts -> d [T, E] ragged, offsets int32 [N + 1].

        Passages go through the encoder `chunk` at a time, sorted by length, so that little is padding. With more chunks
        than one, activations are recomputed in the backward pass: memory follows the chunk, not the batch.
        """
        rows = self._ids(texts, self.passage_marker, self.passage_length)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        parts, lengths = [], []
        for start in range(0, len(order), self.chunk):
            ids, attended = (x.to(self.device) for x in
                             _pad([rows[n] for n in order[start:start + self.chunk]], self.tokenizer.pad_token_id))
            if torch.is_grad_enabled() and len(order) > self.chunk:
                x = checkpoint(self._encode, ids, attended, use_reentrant=False)
            else:
                x = self._encode(ids, attended)
            keep = attended & ~torch.isin(ids, self.skiplist) if self.colbert else attended[:, :1]
            parts.append(x[keep])
            lengths.append(keep.sum(1))
        if not parts:
            return torch.zeros(0, self.dim, device=self.device), torch.zeros(1, dtype=torch.int32, device=self.device)
        return _in_order(torch.cat(parts), torch.cat(lengths), torch.tensor(order, device=self.device))


def _pad(rows: list[list[int]], fill: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> ids [n, L] filled up with `fill`, and which of them are the text's own."""
    lengths = np.array([len(r) for r in rows], dtype=np.int64)
    length = length or int(lengths.max(initial=1))
    own = np.arange(length) < lengths[:, None]
    ids = np.full((len(rows), length), fill, dtype=np.int64)
    ids[own] = np.concatenate(rows) if rows else []
    return torch.from_numpy(ids), torch.from_numpy(own)


def _in_order(d: torch.Tensor, lengths: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged passages in the order `order` -> in their original order."""
    starts = lengths.cumsum(0) - lengths
    back = torch.argsort(order)
    lengths, starts = lengths[back], starts[back]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    token = torch.arange(len(d), device=d.device) + (starts - offsets[:-1]).repeat_interleave(lengths)
    return d[token], offsets.to(torch.int32)


def _file(name: str, filename: str) -> Path | None:
    """A file of a local folder or of a Hub repository; None where there is none."""
    if Path(name).is_dir():
        path = Path(name) / filename
        return path if path.exists() else None
    from transformers.utils import cached_file
    try:
        found = cached_file(name, filename, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)
    except OSError:  # no such repository: loading the model says so in one sentence
        found = None
    return Path(found) if found else None


def _linear_weight(name: str) -> torch.Tensor | None:
    """ColBERT's projection [E, hidden], where the checkpoint has one."""
    if path := _file(name, "model.safetensors"):
        with safe_open(path, "pt") as f:
            return f.get_tensor("linear.weight") if "linear.weight" in f.keys() else None
    if path := _file(name, "pytorch_model.bin"):
        return torch.load(path, map_location="cpu", weights_only=True).get("linear.weight")
    return None


def _has_pooler(name: str) -> bool:
    """BERT's pooler has no part in a token embedding: without it there is nothing untrained to save."""
    path = _file(name, "config.json")
    return bool(path) and json.loads(path.read_text()).get("model_type") == "bert"


def cannot_load(name: str, error: Exception) -> str:
    return (f"cannot load {name!r}: no local folder with a model, and the Hugging Face Hub did not give one "
            f"({str(error).splitlines()[0][:120]}); with no network, download it elsewhere "
            f"(`hf download NAME --local-dir FOLDER`) and give the folder")


def digest(folder: str | Path) -> str:
    """Which weights and settings these are, in 16 hexadecimal digits."""
    h = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in (".safetensors", ".bin", ".json", ".metadata"):
            h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()


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
            rare_V1 = (1 - texts_V.clamp(min=1).log() / np.log(len(texts)))[:, None]
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

def sample_pairs(n_passages: int, n_pairs: int, delta: int | None, generator: torch.Generator) -> torch.Tensor:
    """Pairs of near neighbours in the pointwise-reranked order (section 4.2): int64 [P, 2], i < j and j - i < delta.

    P = min(n_pairs, pairs available), without repeats, sorted; `delta=None` takes any pair (table 3's "- pair sampling
    heuristic"). # PAPER: delta 10 and 50 pairs of the top 100. The authors' code has j - i <= 5 and is not seeded.
    """
    i, j = torch.triu_indices(n_passages, n_passages, offset=1)
    if delta is not None:
        i, j = i[j - i < delta], j[j - i < delta]
    chosen = torch.randperm(len(i), generator=generator)[:n_pairs].sort().values
    return torch.stack([i[chosen], j[chosen]], dim=1)


# Training -----------------------------------------------------------------------------------------------------------

def half(device: torch.device) -> torch.autocast:
    """bfloat16 autocast where the hardware has it; elsewhere a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def attention(device: torch.device):
    """On a CPU, in training: torch's fused attention has a backward pass that costs as much as the rest of a step."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def fit(model: nn.Module, batch_terms, steps: int, *, lr: float, warmup: int, ranks: Ranks, desc: str, seed: int,
        weight_decay: float = 0.0, clip: float = 2.0, checkpoint_folder: Path | None = None,
        checkpoint_every: int = 500, batch_of=None) -> list[list[float]]:
    """AdamW with linear warm-up and decay, on any number of ranks. Returns the loss terms of every step.

    batch_terms(step) -> float [n]: the terms of this rank's share of the global batch, the total loss first. Their sum
    over ranks is the batch's loss, so the sum of the ranks' gradients is its gradient. batch_of(step) -> what that batch
    held, which is written beside the checkpoint if its loss is not finite; then ValueError is raised. On SIGTERM rank 0
    writes a checkpoint after the step in hand, and all exit with 143.
    # OURS: weight decay is explicit: 0, as the authors' transformers.AdamW had it; torch's default is 0.01.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    history: list[list[float]] = []
    start = _resume(checkpoint_folder, model, optimizer, history, ranks)
    model.train()
    bar = tqdm(range(start, steps), desc=desc, initial=start, total=steps, disable=not ranks.first, leave=False,
               mininterval=1.0)
    checked = start
    with AfterStep(ranks) as sigterm:
        for step in bar:
            # Dropout is a function of (seed, step, rank): a resumed run draws what an undisturbed one draws.
            torch.manual_seed((seed * 1_000_003 + step) * 1_009 + ranks.rank)
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))
            optimizer.zero_grad()
            with attention(ranks.device):
                with half(ranks.device):
                    terms = batch_terms(step)
                terms[0].backward()
                history.append(sum_gradients(model, terms, ranks))
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            stop = sigterm.came  # asked once: what comes from here on is for the next step, which leaves a checkpoint
            due = checkpoint_folder and (step + 1 < steps) and ((step + 1) % checkpoint_every == 0 or stop)
            if step % 10 == 9 or step + 1 == steps or due:  # not at each step: a GPU would wait for the answer
                _refuse_nan(history, checked, checkpoint_folder, batch_of, ranks)
                checked = step + 1
                bar.set_postfix(loss=f"{float(history[-1][0]):.3f}")
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
    raise ValueError(f"the loss of step {step} is {losses[bad[0]].item()}{held}; the same command goes on from the last "
                     f"checkpoint before it, and a lower learning rate, in another --out, may mend it")


def _save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: list) -> None:
    """Everything that a step reads, written beside and renamed. There is no random state: it follows from the step."""
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
    files = [folder / f"{name}.safetensors" for name in ("last", "previous")] if folder else []
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return 0
    state = load_file(file)
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


class Batches:
    """Rows of each global batch, the same on any number of ranks: a new permutation of all rows every epoch."""

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
          ranks: Ranks, desc: str, checkpoint_folder: Path | None = None) -> list[list[float]]:
    """Trains `student` in place on one iteration's examples; returns [total, L_CL, L_KD, L_pair] of every step.

    queries: the text of each row. passages: the corpus. temperature divides the student's scores in every loss (the
    authors' code has it, at 1), tau the pointwise teacher's. examples: the rows, as arrays:
        passages int [n, K], corpus positions          teacher float [n, K], pointwise scores of them
        pairs int [n, P, 2], positions in the row      pair_probs float [n, P], P(d_i > d_j | q)
        positive int [n], position of the labelled passage in the row, -1 where there is none
    """
    batches = Batches(len(queries), batch, seed)
    in_batch = bool((examples["positive"] >= 0).any())  # with no label there is no L_CL, and no use for other columns

    def batch_terms(step: int) -> torch.Tensor:
        rows = batches[step]
        share = ranks.share(len(rows))
        mine = rows[share.start:share.stop]
        positive = examples["positive"][rows]
        q, q_mask = student.encode_queries([queries[r] for r in mine])
        d, offsets = student.encode_passages([passages[p] for p in examples["passages"][mine].reshape(-1)])
        if in_batch:
            d, offsets = gather_passages(d, offsets, ranks)
        own = {k: torch.from_numpy(v[mine]).to(q.device) for k, v in examples.items() if k != "passages"}
        losses = pairdistill_objective(
            q / temperature, d, offsets, own["teacher"], own["pairs"], own["pair_probs"], own["positive"], q_mask,
            in_batch=in_batch, tau=tau, lambda_kd=lambda_kd, lambda_pair=lambda_pair, pair_reduction=pair_reduction,
            first_query=share.start, n_queries=len(rows), n_labelled=int((positive >= 0).sum()),
            n_pairs=int((examples["pairs"][rows, :, 0] >= 0).sum()))
        return torch.stack(list(losses))

    def batch_of(step: int) -> list[dict]:
        return [dict(query=queries[r], passages=[passages[p] for p in examples["passages"][r]],
                     **{k: v[r].tolist() for k, v in examples.items() if k != "passages"}) for r in batches[step]]

    return fit(student, batch_terms, steps, lr=lr, warmup=warmup, ranks=ranks, desc=desc, seed=seed,
               checkpoint_folder=checkpoint_folder, batch_of=batch_of)
