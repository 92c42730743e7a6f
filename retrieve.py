"""Retrieval: the best passages of many queries by MaxSim, from 42 bytes a passage token.

    index = Index.build(student, passages, "runs/docs/iter1/index")       # or Index.load("runs/docs/iter1/index")
    q, q_mask = student.encode_queries(["how do I join two paths"])
    scores, positions = index.search(q, 10, q_mask)                       # passages[n] for n in positions[0]

    python retrieve.py runs/docs "how do I join two paths"                # with no question: a prompt
    python retrieve.py --student FOLDER --data SPEC --index FOLDER --queries queries.jsonl --run out.trec -k 1000

What is stored. K-means gives each token a centroid (2 bytes), then eight times one of 256 vectors for what is left
(8 bytes), and FAISS's product quantizer a code of the rest, a byte for 4 dimensions (the size of the paper's 2 bits a
dimension, but one of 256 codewords for the four together instead of one of 4 values for each):

    token  ~  (centroid + refinement_1 ... refinement_8 + [codeword_1 ... codeword_32]) / norm

ColBERT renormalises too. Centroids and refinements are stored in a byte an element, as the codes that follow make up for
the rounding. So there is room for twice as many centroids, which lowers the squared error by a tenth (SciFact, MiniLM).

Codes are in corpus order, so that a passage's tokens lie together. All files are memory-mapped: on a CPU an index of
any size opens at once. What lists hold which tokens follows from the codes, and is sorted when a search first needs it.

How it is searched. (1) The tokens of each query token's nearest lists are compared with it; those count that are more
similar than the centroids of two thirds of these lists. (2) A passage is ranked by its partial MaxSim, where a query token
that found nothing in it adds an imputed similarity, below those that count (XTR's idea). Each similarity is packed
behind its query, passage and query token in one integer, so that one sort does both the grouping and the maximum. (One
query alone has too few to gain by a shared decoding: it adds up its products with the tables, in a row a passage.)
(3) The best 5 k candidates (k + 600, where k is 150 or more) are decoded whole and scored exactly.

OURS: PLAID, ColBERT's engine, ranks candidates by centroids alone and needs 16 sqrt(T) of them for that. Decoded tokens
rank better, so that half as many suffice.

A single-vector student (DPR) is the case of one token a passage, not normalised. No other token makes up for the error of its
code, so that the vector is stored beside it, in 16 bits a dimension: codes only find the candidates.

Any number of ranks builds the same files, in a folder that they share: passages are encoded in blocks that do not depend on
the ranks. A build writes beside its target and renames, so that one that is killed leaves nothing that opens.

Dimension key: B queries, N passages, T passage tokens, Q query tokens, E embedding, K centroids, M codewords a token,
S refinements, C candidates a query, X query tokens of several queries one after the other, without padding.
"""
from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import load_collection, read_queries, sample_digest
from maxsim_kernel import maxsim, maxsim_paired
from ranks import half, has_bfloat16

FORMAT = 5
BLOCK = 1024  # passages that are encoded and written together
CODED = 4  # dimensions in a byte of code; four float32s are also 16 bytes, which move as one element when decoding
REFINEMENTS = 8
GAIN_BITS = 24  # of the 64 in which a similarity is packed behind its query, passage and query token
PROBES, SHORT = 32, 24  # lists that a query token visits, for the best 100; a query with fewer tokens visits as many lists
QUERIES, QUERIES_LISTED, QUERIES_RANKED = 4096, 512, 64  # scored together; of these, candidates found, and ranked
SMALL = 1 << 19  # tokens of a corpus that is compared whole: its lists would save little time, and lose passages
DECODED = 1 << 13  # tokens decoded at a time: 4 MB at 128 dimensions, which stay in a cache
MEASURED, DEPTH = 32, 100  # queries that a new index is measured by, and how many passages of each
DTYPES = {"codes": np.uint8, "lists": np.uint16, "list_starts": np.int64, "offsets": np.int64,
          "centroids": np.int8, "refinements": np.int8, "steps": np.float32,  # of these two tables' grids
          "codewords": np.float16, "vectors": np.float16}  # one raw file each; the manifest has their shapes


class Index:
    """Passage tokens in inverted lists. len(index) is the number of passages, index.passage_ids are their names.

    codes [T, M + S] and lists [T] code the tokens in corpus order, offsets [N + 1] cuts them into passages; list_starts
    [K + 1] cuts `order` into lists; centroids [K, E], refinements [S, 256, E],
    codewords [M, 256, 4]; vectors [T, E], if a passage has one, else [0, E].
    """

    def __init__(self, folder: Path, manifest: dict, arrays: dict[str, Tensor]):
        self.folder, self.manifest = folder, manifest
        self.__dict__.update(arrays)
        self.device = self.codes.device
        self.centroids, self.refinements = _off_grid(self.centroids, self.refinements, self.steps)
        self.codewords = self.codewords.float()
        self.first_codeword_M = 256 * torch.arange(len(self.codewords), dtype=torch.int32, device=self.device)
        self.rows = torch.cat([self.centroids, *self.refinements])  # [K + 256 S, E]
        self.first_row_S = len(self.centroids) + 256 * torch.arange(len(self.refinements), dtype=torch.int32,
                                                                    device=self.device)
        self.codeword_elements = self.codewords.flatten().view(torch.complex128)  # nothing complex: 16 bytes each

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def order(self) -> Tensor:
        """The tokens' numbers [T], list by list. Sorted when first needed: on disk it would be a tenth of the index."""
        order = np.argsort(self.lists.cpu().numpy().view(np.uint16), kind="stable")  # 16 bits: a radix sort
        return torch.from_numpy(order.astype(np.int32) if len(order) < 1 << 31 else order).to(self.device)

    @functools.cached_property
    def small(self) -> Tensor:
        """A small corpus's embeddings [T, E], decoded once, not for each query: .27 GB at most, at 128 dimensions."""
        return torch.cat([self._decode(t) for t in torch.arange(len(self.lists), device=self.device).split(DECODED)])

    @property
    def passage_ids(self) -> list[str] | None:
        path = self.folder / "passage_ids.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as e:
            raise ValueError(f"{self.folder} is a damaged index: {path.name} is no JSON ({e}); "
                             "remove it and build it again") from None

    @property
    def measured(self) -> str:
        """What build measured, in a line."""
        m = self.manifest.get("measured")
        return f"{self.bytes_per_token:.1f} bytes a token" + (
            f", R@{m['k']} of exact search {m['recall']:.3f}, {m['queries_per_second']:,.0f} queries/s" if m else "")

    @property
    def bytes_per_token(self) -> float:
        return sum(path.stat().st_size for path in self.folder.iterdir()) / max(len(self.codes), 1)

    # Build and load ---------------------------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def build(cls, student, passages: Sequence[str], folder: str | Path, *, passage_ids: Sequence[str] | None = None,
              student_digest: str | None = None, rank: int = 0, world: int = 1,
              barrier: Callable[[], None] = lambda: None, seed: int = 0, queries: Sequence[str] = ()) -> "Index":
        """Encodes, codes and stores `passages`. Every rank calls it with its rank; every rank gets the index.

        queries: a sample of them, of which `measured` then says how the index does: how much of exact search on the
        uncoded embeddings it finds, and how fast.
        """
        folder = Path(folder)
        if not len(passages):
            raise ValueError(f"cannot build the index {folder}: there are no passages")
        if passage_ids is not None and len(passage_ids) != len(passages):
            raise ValueError(f"cannot build the index {folder}: {len(passages):,} passages and {len(passage_ids):,} passage_ids")
        if folder.exists() and any(folder.iterdir()) and not _is_index(folder):
            raise ValueError(f"cannot build the index {folder}: something else is there, which would be lost; name another folder")
        partial = folder.with_name(folder.name + ".tmp")
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()  # without it a rank could write into what rank 0 is about to remove
        # The sample trains the quantizers. Its tokens wait in files for their turn: nothing is encoded twice.
        sample = np.random.default_rng(seed).permutation(len(passages))[:3000 + 24 * math.isqrt(len(passages))]
        sample.sort()  # OURS: ColBERT takes 16 sqrt(120 N) passages, for large N seven times as many
        groups = np.split(sample, range(BLOCK, len(sample), BLOCK))
        for g in range(rank, len(groups), world):
            d, lengths = _encode(student, [passages[n] for n in groups[g]])
            np.savez(partial / f"sample{g}.npz", d=d.numpy(), lengths=lengths.numpy())
        barrier()  # without it rank 0 would train on part of the sample
        parts = [np.load(partial / f"sample{g}.npz") for g in range(len(groups))]
        d_sample, sample_lengths = (torch.from_numpy(np.concatenate([part[name] for part in parts]))
                                    for name in ("d", "lengths"))
        if rank == 0:
            _train(d_sample.float(), len(passages) / len(sample), partial, seed)
        barrier()  # without it a rank would read quantizers that are still being trained
        asked = _encode_queries(student, list(queries[:MEASURED])) if len(queries) else None
        _code_share(student, passages, partial, sample, d_sample, sample_lengths, rank, world, asked)
        barrier()  # without it rank 0 would merge a part that is still growing
        if rank == 0:
            _merge(partial, world, dict(format=FORMAT, student=student_digest, passages=len(passages),
                                        texts=sample_digest(len(passages), passages), seed=seed,
                                        normalised=bool((d_sample.float().norm(dim=1) - 1).abs().max() < .01)))
            if passage_ids is not None:
                (partial / "passage_ids.json").write_text(json.dumps(list(passage_ids)))
            if asked:
                _measure(cls.load(partial, student.device), *asked, partial, world)
            if folder.exists():  # the manifest goes last: what a killed removal leaves is still known as an index, if a damaged one
                for path in sorted(folder.iterdir(), key=lambda path: path.name == "manifest.json"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                folder.rmdir()
            os.replace(partial, folder)
        barrier()  # without it a rank would open what is not there yet
        return cls.load(folder, student.device)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", student_digest: str | None = None) -> "Index":
        """Opens a folder that build has made; on a CPU nothing is read before it is needed.

        Raises ValueError in one sentence where it is none, is damaged, or is another student's than student_digest.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            version = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{folder} is not an index: it has no readable manifest.json; name another one, or build it") from None
        if version != FORMAT:
            raise ValueError(f"{folder} is an index of format {version}, expected {FORMAT}: build it again")
        if student_digest and manifest.get("student") != student_digest:
            raise ValueError(f"{folder} is the index of student {manifest.get('student')}, expected {student_digest}: "
                             "build it again with this one")
        try:
            shapes = {name: tuple(map(int, manifest["shapes"][name])) for name in DTYPES}
            manifest["normalised"], manifest["texts"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{folder} is a damaged index: its manifest does not describe {', '.join(DTYPES)}; "
                             "remove it and build it again") from None
        arrays = {}
        for name, dtype in DTYPES.items():
            path, shape = folder / name, shapes[name]
            size, expected = path.stat().st_size if path.exists() else 0, math.prod(shape) * np.dtype(dtype).itemsize
            if size != expected:
                raise ValueError(f"{folder} is a damaged index: {name} has {size} bytes, expected {expected}; "
                                 "remove it and build it again")
            # Copy-on-write, because torch wants to be able to write; an empty file cannot be mapped.
            array = np.memmap(path, dtype, "c", shape=shape) if expected else np.empty(shape, dtype)
            # torch cannot index with uint16, nor compute: the same bits as int16, and a mask where they are read.
            arrays[name] = torch.from_numpy(array.view(np.int16) if dtype == np.uint16 else array).to(device)
        return cls(folder, manifest, arrays)

    # Search -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def search(self, q: Tensor, k: int, q_mask: Tensor | None = None, exact: bool = False) -> tuple[Tensor, Tensor]:
        """q [B, Q, E], q_mask bool [B, Q] -> scores float32 [B, k], positions in the corpus int64 [B, k], best first.

        Where there are fewer than k passages, the rest have score -inf and position -1. exact: score every passage.
        """
        if q.ndim != 3 or q.shape[2] != self.centroids.shape[1] or k < 1:
            E = self.centroids.shape[1]
            raise ValueError(f"search: q has shape {tuple(q.shape)} and k is {k}, expected [B, Q, {E}] and k >= 1")
        q = q.to(self.device, torch.float32)
        q_mask = q.new_ones(q.shape[:2], dtype=torch.bool) if q_mask is None else q_mask.to(self.device, torch.bool)
        scores = q.new_full((len(q), k), -torch.inf)
        positions = torch.full((len(q), k), -1, device=self.device)
        C = 5 * k if k < 150 else k + 600  # the deeper, the less it matters who comes last
        for start in range(0, len(q), QUERIES):
            rows = slice(start, start + QUERIES)
            if exact or 2 * C > len(self) or len(self.lists) < SMALL:
                best = self._search_all(q[rows], q_mask[rows], k)
            else:
                best = self._search_lists(q[rows], q_mask[rows], k, C)
            scores[rows, :best[0].shape[1]], positions[rows, :best[0].shape[1]] = best
        return scores, positions

    def _search_all(self, q: Tensor, q_mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The best k by MaxSim with every passage, decoded as a stream."""
        best = _Best(q, q_mask, k)
        for first, last in _runs(self.offsets, 8 * DECODED):
            offsets = self.offsets[first:last + 1]
            s, e = int(offsets[0]), int(offsets[-1])
            d_TE = self.small[s:e] if len(self.lists) < SMALL else self._decode(torch.arange(s, e, device=q.device))
            best.add(d_TE, offsets - offsets[0], first)
        return best.scores, best.positions

    def _search_lists(self, q: Tensor, q_mask: Tensor, k: int, C: int) -> tuple[Tensor, Tensor]:
        # So many queries that the keys, of 63 bits, do not overflow, and that their similarities with all centroids take 2 GB.
        n = min(QUERIES_LISTED, (1 << 63 - GAIN_BITS) // (len(self) * q.shape[1]) - QUERIES_RANKED)
        n = max(min(n, (1 << 29) // (len(self.centroids) * q.shape[1])), 1)
        candidates_BC = torch.cat([self._candidates(q[b:b + n], q_mask[b:b + n], k, C) for b in range(0, len(q), n)])
        # On a CPU it pays to read a passage once for all queries that chose it; a GPU prefers few launches.
        score = self._score_paired if q.is_cuda else self._score_shared
        scores_BC = score(q, q_mask, candidates_BC).masked_fill_(candidates_BC < 0, -torch.inf)
        scores, top = scores_BC.topk(k)
        positions = candidates_BC.gather(1, top)
        lacking = (candidates_BC[:, k - 1] < 0).nonzero().flatten()
        if len(lacking):  # fewer than k passages have a token near the query's: these queries are compared with all
            scores[lacking], positions[lacking] = self._search_all(q[lacking], q_mask[lacking], k)
        return scores, positions

    def _candidates(self, q: Tensor, q_mask: Tensor, k: int, C: int) -> Tensor:
        """The passages [B, C] with the largest partial MaxSim, best first; -1 where no more were found."""
        (B, Q, _), N = q.shape, len(self)
        b_X, i_X = q_mask.nonzero(as_tuple=True)
        q_XE = q[b_X, i_X]
        # A token visits fewer lists where fewer passages are wanted, and more where the query has few tokens.
        probes = max(min(PROBES, PROBES // 4 + k // 4), k // 50)
        probes_X = (SHORT * probes // q_mask.sum(1)[b_X]).clamp(min=probes, max=len(self.centroids) - 1)
        # One query's products with all rows of the tables serve below.
        sims_RX = self.rows @ _sixteens(q_XE.T) if B == 1 else None
        sims_XK = q_XE @ self.centroids.T if B > 1 else sims_RX[:len(self.centroids), :len(b_X)].T.contiguous()
        near = sims_XK.topk(int(probes_X.max()) + 1 if len(b_X) else 1)
        # A centroid is the mean of its tokens: the first list that is not visited tells what is missed on average, one
        # of those visited what a match is. What is less similar does not count, and half-way is imputed for it.
        # (.8: in a list of one token, or of equal ones, they are as similar as their centroid, but for rounding.)
        match_X, missed_X = (near.values.gather(1, rank_X[:, None])[:, 0] for rank_X in (probes_X // 3, probes_X))
        imputed_X = (missed_X + match_X) / 2
        margin_X = .8 * (match_X - imputed_X)
        visits_XV = torch.arange(near.indices.shape[1], device=q.device) < probes_X[:, None]
        visited_V, order_V = near.indices[visits_XV].sort()
        if B == 1:
            return self._rank_alone(q_XE, sims_RX, visited_V.unique_consecutive(), imputed_X, margin_X, C)
        x_V, key_X = visits_XV.nonzero()[:, 0][order_V], b_X * (N * Q) + i_X << GAIN_BITS
        found = _sorted(torch.cat([torch.zeros(0, dtype=torch.int64, device=q.device),
                                   *self._find(q_XE, visited_V, x_V, imputed_X, margin_X, key_X, Q)]))
        # What fits into a cache is ranked in half the time.
        firsts = torch.arange(0, B + QUERIES_RANKED, QUERIES_RANKED, device=q.device) * N * Q << GAIN_BITS
        bounds = torch.searchsorted(found, firsts).tolist()
        return torch.cat([self._rank(found[s:e] - first, min(QUERIES_RANKED, B - n * QUERIES_RANKED), Q, C)
                          for n, (s, e, first) in enumerate(zip(bounds, bounds[1:], firsts))])

    def _find(self, q_XE, visited_V, x_V, imputed_X, margin_X, key_X, Q: int) -> Iterator[Tensor]:
        """Many queries: the tokens of a list are decoded once and multiplied by all query tokens that visit it."""
        for token_T, visits, spans in self._visited_lists(visited_V):
            d_ET = self._decode(token_T).T
            key_T = self._passage(token_T) * Q << GAIN_BITS
            x = x_V[visits]
            q_VE, imputed_V = q_XE.index_select(0, x), imputed_X[x]
            margin_V1, key_V1 = margin_X[x, None], key_X[x, None]
            for s, e, i, j in spans:
                gain_VT = torch.addmm(-imputed_V[i:j, None], q_VE[i:j], d_ET[:, s:e])
                packed_VT = _gain_bits(gain_VT) + key_T[s:e] + key_V1[i:j]
                yield packed_VT.masked_select(gain_VT > margin_V1[i:j])

    def _rank_alone(self, q_XE, sims_RX, lists_V, imputed_X, margin_X, C: int) -> Tensor:
        """One query: its products with every row of the tables are added up for each token, of which none is decoded."""
        (X, E), (M, S) = q_XE.shape, (len(self.codewords), len(self.refinements))
        by_codeword = torch.einsum("mcd,xmd->mcx", self.codewords, q_XE.view(X, M, CODED)).flatten(0, 1)
        table_RX = torch.cat([sims_RX, _sixteens(by_codeword)])
        first_row_MS = torch.cat([len(self.rows) + self.first_codeword_M, self.first_row_S])
        starts, lengths = self.list_starts[lists_V], self.list_starts[lists_V + 1] - self.list_starts[lists_V]
        token_T, list_T = self.order[_ragged(starts, lengths)], lists_V.int().repeat_interleave(lengths)
        passage_P, place_T = self._passage(token_T).unique(return_inverse=True)
        best_PX = _sixteens(imputed_X).repeat(len(passage_P), 1)
        size = DECODED // 2  # so many tokens' row numbers stay in a cache
        row_TR = torch.empty(size, 1 + M + S, dtype=torch.int32, device=q_XE.device)
        for first in range(0, len(token_T), size):
            part = slice(first, first + size)
            row_tR = row_TR[:len(token_T[part])]
            row_tR[:, 0] = list_T[part]
            torch.add(self.codes.index_select(0, token_T[part]), first_row_MS, out=row_tR[:, 1:])
            sims_tX = F.embedding_bag(row_tR, table_RX, mode="sum")
            best_PX.scatter_reduce_(0, place_T[part, None].expand_as(sims_tX), sims_tX, "amax")
        gain_PX = best_PX[:, :X] - imputed_X
        total_P = gain_PX.masked_fill_(gain_PX <= margin_X, 0).sum(1)
        top = total_P.topk(min(C, int((total_P > 0).sum()))).indices
        return F.pad(passage_P[top], (0, C - len(top)), value=-1)[None]

    def _passage(self, token_T: Tensor) -> Tensor:
        return torch.searchsorted(self.offsets, token_T.long(), right=True) - 1

    def _visited_lists(self, visited_V: Tensor):
        """Of the lists in visited_V (sorted, with repetitions), a few at a time: the numbers of all their tokens, the
        slice of their visits, and for each list its first and last token and visit within these."""
        lists, n_visits = visited_V.unique_consecutive(return_counts=True)
        lengths = self.list_starts[lists + 1] - self.list_starts[lists]
        token_bounds, visit_bounds = _bounds(lengths), _bounds(n_visits)
        size = 64 * DECODED if visited_V.is_cuda else DECODED  # a GPU prefers few launches
        for first, last in _runs(token_bounds, size):
            tokens, visits = ((x[first:last + 1] - x[first]).tolist() for x in (token_bounds, visit_bounds))
            yield (self.order[_ragged(self.list_starts[lists[first:last]], lengths[first:last])],
                   slice(visit_bounds[first], visit_bounds[last]), list(zip(tokens, tokens[1:], visits, visits[1:])))

    def _rank(self, found: Tensor, B: int, Q: int, C: int) -> Tensor:
        """found: packed (query, passage, query token; gain over what is imputed), sorted -> candidates [B, C]."""
        key, gain = _unpack(found)
        largest = key != torch.cat([key[1:], key.new_full((1,), -1)])  # the last one of its key
        pair, number = (key[largest] // Q).unique_consecutive(return_inverse=True)
        total = found.new_zeros(len(pair), dtype=torch.float32).index_add_(0, number, gain[largest])
        b, passage = pair // len(self), pair % len(self)
        counts = torch.bincount(b, minlength=B)
        column = torch.arange(len(pair), device=found.device) - _bounds(counts)[b]
        total_BP = total.new_full((B, max(C, int(counts.max()))), -torch.inf).index_put_((b, column), total)
        passage_BP = torch.full_like(total_BP, -1, dtype=torch.int64).index_put_((b, column), passage)
        return passage_BP.gather(1, total_BP.topk(C).indices)

    def _score_shared(self, q: Tensor, q_mask: Tensor, candidates: Tensor) -> Tensor:
        """MaxSim [B, C], passage by passage: each is decoded once and multiplied by the tokens of all queries that
        chose it. On a CPU a third of maxsim_paired's time, which wants a passage's tokens once for every query."""
        n_tokens, q_XE = q_mask.sum(1), q[q_mask]
        chosen, pair = candidates.flatten().sort()
        chosen, pair = chosen[chosen >= 0], pair[chosen >= 0]
        passages, counts = chosen.unique_consecutive(return_counts=True)
        query, pair_bounds = pair // candidates.shape[1], _bounds(counts)
        lengths = self.offsets[passages + 1] - self.offsets[passages]
        token_bounds, scores = _bounds(lengths), q.new_zeros(candidates.numel())
        for first, last in _runs(token_bounds, DECODED):
            d_TE = self._decode(_ragged(self.offsets[passages[first:last]], lengths[first:last]))
            mine = slice(pair_bounds[first], pair_bounds[last])
            if len(q) == 1:
                scores[pair[mine]] = _maxsim_alone(q_XE, d_TE, token_bounds[first:last + 1] - token_bounds[first])
                continue
            n_tokens_mine = n_tokens[query[mine]]
            x_X = _ragged(_bounds(n_tokens)[query[mine]], n_tokens_mine)  # all tokens of all queries of all passages
            x_edges = _bounds(n_tokens_mine)[pair_bounds[first:last + 1] - pair_bounds[first]].tolist()
            t_edges = (token_bounds[first:last + 1] - token_bounds[first]).tolist()
            best = [(d_TE[s:e] @ q_XE.index_select(0, x_X[i:j]).T).amax(0) if e > s else q.new_zeros(j - i)
                    for s, e, i, j in zip(t_edges, t_edges[1:], x_edges, x_edges[1:])]
            scores.index_add_(0, pair[mine].repeat_interleave(n_tokens_mine), torch.cat(best))
        return scores.view_as(candidates)

    def _score_paired(self, q: Tensor, q_mask: Tensor, candidates: Tensor) -> Tensor:
        """MaxSim [B, C] by the fused kernel, as many queries at a time as fit; no candidate is an empty passage."""
        start_BC = self.offsets[candidates.clamp(min=0)]
        length_BC = torch.where(candidates < 0, 0, self.offsets[candidates.clamp(min=0) + 1] - start_BC)
        scores = []
        for first, last in _runs(_bounds(length_BC.sum(1)), 256 * DECODED):
            lengths = length_BC[first:last].flatten()
            d_TE = self._decode(_ragged(start_BC[first:last].flatten(), lengths))
            scores.append(maxsim_paired(q[first:last], d_TE, _bounds(lengths).int(), q_mask[first:last]))
        return torch.cat(scores)

    def _decode(self, token_T: Tensor) -> Tensor:
        """Token numbers -> embeddings [T, E]."""
        if len(self.vectors):
            return self.vectors.index_select(0, token_T).float()
        code_TM, refinement_TS = self.codes.index_select(0, token_T).split([len(self.codewords), len(self.refinements)], 1)
        rest_TM = self.codeword_elements.index_select(0, (code_TM + self.first_codeword_M).flatten())
        d_TE = rest_TM.view(torch.float32).view(len(token_T), self.rows.shape[1])  # also of no token at all
        list_T1 = self.lists.index_select(0, token_T).int()[:, None] & 0xFFFF
        d_TE += F.embedding_bag(torch.cat([list_T1, refinement_TS + self.first_row_S], 1), self.rows, mode="sum")
        if self.manifest["normalised"]:
            d_TE *= torch.linalg.vector_norm(d_TE, dim=1, keepdim=True).reciprocal_()
        return d_TE


# MaxSim of passages as they come: on a CPU, maxsim's padded blocks are slow -------------------------------------------

def _maxsim_by_place(q: Tensor, d_TE: Tensor, offsets: Tensor, q_mask: Tensor) -> Tensor:
    """maxsim for thousands of queries on a CPU: the first tokens of many passages at once, then the second ones, …

    The maximum is then elementwise on a tile that stays in the cache: four times as fast as blocks of whole passages.
    """
    lengths, order = offsets.diff().long().sort(descending=True)
    q_XE, b_X = q[q_mask], q_mask.nonzero()[:, 0]
    out = q.new_zeros(len(q), len(lengths))
    for x in torch.arange(len(b_X)).split(512):
        for n in torch.arange(len(lengths)).split(512):
            best_XN = torch.full((len(x), len(n)), -torch.inf)
            starts, live = offsets[:-1].long()[order[n]], lengths[n]
            for place in range(int(live[0])):
                still = int((live > place).sum())  # a prefix: the longest passages come first
                best_XN[:, :still] = torch.maximum(best_XN[:, :still], q_XE[x] @ d_TE[starts[:still] + place].T)
            best_XN[:, int((live > 0).sum()):] = 0  # an empty passage scores 0
            part = q.new_zeros(len(q), len(n)).index_add_(0, b_X[x], best_XN)
            out[:, order[n]] += part
    return out


def _maxsim_alone(q_XE: Tensor, d_TE: Tensor, offsets: Tensor) -> Tensor:
    """maxsim [N] of one query, of the tokens that are not masked, on a CPU: its passages are not padded."""
    sims_TX, filled = d_TE @ _sixteens(q_XE.T), offsets.diff() > 0
    best = np.maximum.reduceat(sims_TX.numpy(), offsets[:-1][filled].numpy(), 0)[:, :len(q_XE)]
    return sims_TX.new_zeros(len(filled)).masked_scatter_(filled, torch.from_numpy(best).sum(1))


class _Best:
    """The best k passages of q [B, Q, E] among those added so far: scores, positions [B, up to k]."""

    def __init__(self, q: Tensor, q_mask: Tensor, k: int):
        self.q, self.q_mask, self.k = q, q_mask, k
        self.scores, self.positions = q.new_zeros(len(q), 0), q_mask.new_zeros(len(q), 0, dtype=torch.int64)

    def add(self, d_TE: Tensor, offsets: Tensor, first: int) -> None:
        """Passages from number `first` on: passage first + n is d_TE[offsets[n]:offsets[n + 1]]."""
        if len(self.q) == 1 and not self.q.is_cuda:
            new = _maxsim_alone(self.q[self.q_mask], d_TE, offsets)[None]
        else:
            new = (maxsim if self.q.is_cuda else _maxsim_by_place)(self.q, d_TE, offsets.int(), self.q_mask)
        scores = torch.cat([self.scores, new], 1)
        numbers = torch.arange(first, first + len(offsets) - 1, device=self.q.device).expand(len(self.q), -1)
        self.scores, top = scores.topk(min(self.k, scores.shape[1]))
        self.positions = torch.cat([self.positions, numbers], 1).gather(1, top)


# Ragged rows, and integers that hold two things -----------------------------------------------------------------------

def _bounds(lengths: Tensor) -> Tensor:
    """[n] -> [n + 1]: where each of n runs begins, and the last one ends."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _ragged(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of every run, one run after the other."""
    bounds = _bounds(lengths)
    return torch.arange(int(bounds[-1]), device=starts.device) + (starts - bounds[:-1]).repeat_interleave(lengths)


def _runs(bounds: Tensor, size: int) -> list[tuple[int, int]]:
    """Cuts the rows between bounds into (first, last) with about `size` elements each, and one row at least."""
    runs, first = [], 0
    while first < len(bounds) - 1:
        last = max(first + 1, int(torch.searchsorted(bounds, bounds[first] + size, right=True)) - 1)
        runs.append((first, last))
        first = last
    return runs


def _sixteens(columns: Tensor) -> Tensor:
    """[..., X] with zeros up to a multiple of 16 columns: products of matrices take half the time of 15."""
    return F.pad(columns, (0, -columns.shape[-1] % 16))


def _sorted(numbers: Tensor) -> Tensor:
    """NumPy sorts millions of integers in a quarter of torch's time on a CPU."""
    return numbers.sort().values if numbers.is_cuda else torch.from_numpy(np.sort(numbers.numpy()))


def _gain_bits(gain: Tensor) -> Tensor:
    """Positive floats are ordered as their bits are. Left out are the sign and the last 7 digits of the mantissa."""
    return gain.view(torch.int32) >> 31 - GAIN_BITS


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    gain = (packed & (1 << GAIN_BITS) - 1) << 31 - GAIN_BITS
    return packed >> GAIN_BITS, gain.int().view(torch.float32)


# Building -------------------------------------------------------------------------------------------------------------

def _is_index(folder: Path) -> bool:
    return (folder / "manifest.json").exists() and '"format"' in (folder / "manifest.json").read_text(errors="replace")


def _encode(student, texts: list[str]) -> tuple[Tensor, Tensor]:
    """texts -> d float16 [T, E], lengths [N]. Float16 halves the sample's files; the codes' error is far larger than
    its own, and than that of an encoder in bfloat16, where the hardware has it (ColBERT's is in float16)."""
    with half(student.device):
        d, offsets = student.encode_passages(texts)
    d = d.cpu().half()
    if not d.isfinite().all():
        raise ValueError("the student's embeddings are not finite in float16: its weights are damaged")
    return d, offsets.cpu().long().diff()


def _train(d: Tensor, passages_per_sample: float, folder: Path, seed: int) -> None:
    """Trains centroids [K, E], refinements [S, 256, E] and codewords [M, 256, 4] on the sample's tokens; writes them."""
    T, E = d.shape
    if T == 0 or E % CODED:
        raise ValueError(f"cannot build the index {folder}: the sample has {T} tokens of {E} dimensions, expected more "
                         f"than 0, of a multiple of {CODED}")

    # OURS: half of ColBERT's number, because it is tokens that are compared, and not their centroids alone.
    K = min(math.ceil(8 * math.sqrt(T * passages_per_sample)), 1 << 16, T)
    order = np.random.default_rng(seed).permutation(T)
    tables = [_cluster_many(d[torch.from_numpy(order[:96 * K])], K, seed)]
    # Each kind of table is trained on other tokens, where there are enough: what is left of the tokens that a table was
    # trained on is smaller than what it will leave of others. FAISS is five times slower with less than 2^15 rows.
    n_rows = 1 << 15 if T > 256 else 256
    for_refinements, for_codewords = torch.from_numpy(np.resize(order[::-1].copy(), 2 * n_rows)).view(2, n_rows)
    rest, other = d[for_refinements], d[for_codewords]
    for number in range(1 + REFINEMENTS):
        if number:
            tables.append(_cluster(rest, 256, 6, seed))
        nearest = _Nearest(tables[-1])
        rest, other = (x - tables[-1][nearest(x)] for x in (rest, other))
    quantizer = faiss.ProductQuantizer(E, E // CODED, 8)
    quantizer.cp.niter, quantizer.cp.seed, quantizer.cp.min_points_per_centroid = 6, seed + 1, 1
    _on_one_thread(quantizer.train, other.numpy())
    codewords = faiss.vector_to_array(quantizer.centroids)
    steps = torch.stack([_step(table) for table in tables])
    whole = [torch.round(table / step) for table, step in zip(tables, steps)]
    for name, array in (("centroids", whole[0]), ("refinements", torch.stack(whole[1:])), ("steps", steps),
                        ("codewords", codewords)):
        np.asarray(array).astype(DTYPES[name]).tofile(folder / name)


def _step(table: Tensor) -> Tensor:
    """Of the grid that a table is stored on, a byte an element: the codes that follow make up for the rounding."""
    return table.abs().max().clamp(min=1e-30) / 127


def _on_grid(table: Tensor) -> Tensor:
    return torch.round(table / _step(table)) * _step(table)


def _off_grid(centroids: Tensor, refinements: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    return centroids * steps[0], refinements * steps[1:, None, None]


def _cluster(rows: Tensor, K: int, niter: int, seed: int) -> Tensor:
    """FAISS's k-means: [K, E], on the grid on which it will be stored."""
    kmeans = faiss.Kmeans(rows.shape[1], K, niter=niter, seed=seed + 1, min_points_per_centroid=1,
                          max_points_per_centroid=128, gpu=faiss.get_num_gpus() > 0)
    _on_one_thread(kmeans.train, rows.numpy())
    return _on_grid(torch.from_numpy(kmeans.centroids))


def _on_one_thread(train: Callable, rows: np.ndarray) -> None:
    """FAISS adds up what its threads did: with another number of them, as ranks have, the last digits would differ."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        train(rows)
    finally:
        faiss.omp_set_num_threads(threads)


def _cluster_many(rows: Tensor, K: int, seed: int) -> Tensor:
    """Thousands of centroids, sooner than by FAISS: clusters of clusters, and three iterations over all of them."""
    first = _cluster(rows, max(1, math.isqrt(K) // 2), 6, seed)
    near = _Nearest(first)(rows)
    n_rows = near.bincount(minlength=len(first))
    shares = (n_rows.cumsum(0) * K / len(rows)).round().long().diff(prepend=n_rows.new_zeros(1))
    centroids = torch.cat([_cluster(rows[near == c], int(k), 6, seed) for c, k in enumerate(shares.minimum(n_rows)) if k])
    for _ in range(3):
        near = _Nearest(centroids)(rows)
        n_rows = near.bincount(minlength=len(centroids))[:, None]
        centroids = torch.where(n_rows > 0, torch.zeros_like(centroids).index_add_(0, near, rows) / n_rows, centroids)
    return _on_grid(centroids)


class _Nearest:
    """d [T, E] -> the centroid at the least distance [T]: |d - c|^2 = |d|^2 - 2 (d . c - |c|^2 / 2).

    In bfloat16 where the hardware has it: twice as fast, and where it errs the distance is nearly the same. Of thousands,
    a token is compared with an eighth only: those whose direction is nearest to that of one of 256 centres, the token's
    nearest. It misses its centroid in one case of 40, and then takes one that is nearly as near.
    """

    def __init__(self, centroids: Tensor):
        dtype = torch.bfloat16 if has_bfloat16(centroids.device) else torch.float32
        self.rows, self.half, K = centroids.to(dtype), (centroids.square().sum(1) / 2).to(dtype), len(centroids)
        self.around = None
        if K > 1024:
            centres = F.normalize(_cluster(centroids.cpu(), 256, 8, 0).to(centroids.device), dim=1)
            self.centres = _Nearest(centres)
            self.around = (centres @ F.normalize(centroids, dim=1).T).topk(256 + K // 8).indices

    def __call__(self, d: Tensor) -> Tensor:
        d = d.to(self.rows.dtype)
        if self.around is None:
            return self._best(d, self.rows, self.half)
        centre, order = self.centres(d).sort()
        out = torch.empty_like(order)
        for mine, around in zip(order.split(centre.bincount(minlength=len(self.around)).tolist()), self.around):
            out[mine] = around[self._best(d[mine], self.rows[around], self.half[around])]
        return out

    @staticmethod
    def _best(d: Tensor, rows: Tensor, half: Tensor) -> Tensor:
        # max is faster than argmax on a CPU.
        parts = [torch.addmm(-half, part, rows.T).max(1).indices for part in d.split(1024)]
        return torch.cat(parts)


class _Coder:
    """Embeddings -> codes and lists, by the tables that _train wrote."""

    def __init__(self, folder: Path, E: int, device: torch.device):
        read = lambda name: torch.from_numpy(np.fromfile(folder / name, DTYPES[name])).to(device)
        self.centroids, self.refinements = _off_grid(read("centroids").view(-1, E), read("refinements").view(-1, 256, E),
                                                     read("steps"))
        self.list_of, self.refine = _Nearest(self.centroids), [_Nearest(table) for table in self.refinements]
        self.quantizer = faiss.ProductQuantizer(E, E // CODED, 8)
        faiss.copy_array_to_vector(read("codewords").float().cpu().numpy(), self.quantizer.centroids)
        self.quantizer.sync_transposed_centroids()  # faster, with the same result

    def __call__(self, d: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """d [T, E] -> codes uint8 [T, M + S], lists uint16 [T]"""
        d = d.to(self.centroids.device)
        lists, codes = self.list_of(d), np.empty((len(d), len(self.refine) + self.quantizer.M), np.uint8)
        for first in range(0, len(d), DECODED):
            part = slice(first, first + DECODED)
            rest, refined = d[part] - self.centroids[lists[part]], []
            for nearest, table in zip(self.refine, self.refinements):
                refined.append(nearest(rest))
                rest -= table[refined[-1]]
            codes[part, :self.quantizer.M] = self.quantizer.compute_codes(rest.cpu().numpy())
            codes[part, self.quantizer.M:] = torch.stack(refined, 1).cpu().numpy()
        return codes, lists.cpu().numpy().astype(np.uint16)


def _code_share(student, passages: Sequence[str], folder: Path, sample: np.ndarray, d_sample: Tensor,
                sample_lengths: Tensor, rank: int, world: int, asked: tuple[Tensor, Tensor] | None) -> None:
    """Encodes and codes this rank's blocks of passages, into files of its own; keeps the best of them for `asked`."""
    E, n_blocks, sample_bounds = d_sample.shape[1], -(-len(passages) // BLOCK), _bounds(sample_lengths)
    coder = _Coder(folder, E, student.device)
    files = [open(folder / f"{name}.{rank}", "wb") for name in ("codes", "lists", "lengths", "vectors")]
    single = bool((sample_lengths == 1).all())
    bar = tqdm(total=len(passages) // world, desc="  index", unit=" passages", disable=rank > 0, leave=False,
               mininterval=1.0)
    best = _Best(asked[0].float(), asked[1], DEPTH) if asked else None
    for block in range(n_blocks * rank // world, n_blocks * (rank + 1) // world):
        numbers = np.arange(block * BLOCK, min((block + 1) * BLOCK, len(passages)))
        first, last = np.searchsorted(sample, (numbers[0], numbers[-1] + 1))
        d, lengths = _fill_in(student, passages, numbers, sample[first:last] - numbers[0],
                              d_sample[sample_bounds[first]:sample_bounds[last]], sample_lengths[first:last])
        vectors = d if single else d[:0]  # ColBERT's are in their codes
        for file, array in zip(files, (*coder(d), lengths.numpy(), vectors.half().numpy())):
            file.write(array.tobytes())
        if best:
            best.add(d.to(best.q.device), _bounds(lengths).to(best.q.device), int(numbers[0]))
        bar.update(len(numbers))
    bar.close()
    for file in files:
        file.close()
    if best:
        np.savez(folder / f"best.{rank}.npz", scores=best.scores.cpu().numpy(), positions=best.positions.cpu().numpy())


def _fill_in(student, passages: Sequence[str], numbers: np.ndarray, known: np.ndarray, d_known: Tensor,
             known_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """A block's tokens d [T, E] and lengths: those at places `known` are given, the others are encoded now."""
    unknown = np.setdiff1d(np.arange(len(numbers)), known)
    d_new, new_lengths = _encode(student, [passages[n] for n in numbers[unknown]])
    lengths = torch.cat([known_lengths, new_lengths])
    place = torch.from_numpy(np.argsort(np.concatenate([known, unknown])))
    return torch.cat([d_known, d_new])[_ragged(_bounds(lengths)[place], lengths[place])].float(), lengths[place]


def _merge(folder: Path, world: int, manifest: dict) -> None:
    """The ranks' files, one after the other, are the corpus; the lists follow from it."""
    for name in ("codes", "lists", "lengths", "vectors"):
        with open(folder / f"{name}.0", "ab") as whole:
            for rank in range(1, world):
                with open(folder / f"{name}.{rank}", "rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 24)
                os.remove(folder / f"{name}.{rank}")
        os.replace(folder / f"{name}.0", folder / name)
    lists, lengths = np.fromfile(folder / "lists", np.uint16), np.fromfile(folder / "lengths", np.int64)
    for path in [folder / "lengths", *folder.glob("sample*.npz")]:
        path.unlink()
    T, M = len(lists), os.path.getsize(folder / "codes") // len(lists) - REFINEMENTS
    K = os.path.getsize(folder / "centroids") // (M * CODED)
    n_tokens = sum(np.bincount(part, minlength=K) for part in np.array_split(lists, 1 + (T >> 24)))  # it makes int64 of them
    arrays = dict(list_starts=np.append(0, n_tokens.cumsum()),
                  offsets=np.append(0, lengths.cumsum()))
    for name, array in arrays.items():
        array.astype(DTYPES[name]).tofile(folder / name)
    manifest["shapes"] = dict(codes=[T, M + REFINEMENTS], lists=[T], list_starts=[K + 1],
                              offsets=[len(lengths) + 1], centroids=[K, M * CODED],
                              refinements=[REFINEMENTS, 256, M * CODED], steps=[1 + REFINEMENTS],
                              codewords=[M, 256, CODED],
                              vectors=[os.path.getsize(folder / "vectors") // (2 * M * CODED), M * CODED])
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _measure(index: Index, q: Tensor, q_mask: Tensor, folder: Path, world: int) -> None:
    """Adds to the manifest how much of exact search on the uncoded tokens `index` finds, and how fast it searches."""
    parts = [np.load(folder / f"best.{rank}.npz") for rank in range(world)]
    scores, positions = (np.concatenate([part[name] for part in parts], 1) for name in ("scores", "positions"))
    k = min(DEPTH, len(index))
    exact = np.take_along_axis(positions, np.argsort(-scores, 1, kind="stable")[:, :k], 1)
    index.search(q[:1], k, q_mask[:1])  # the first search sorts the tokens by their lists
    start = time.time()
    found = index.search(q, k, q_mask)[1].cpu().numpy()
    spent = time.time() - start
    recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found)]))
    index.manifest["measured"] = dict(k=k, queries=len(q), recall=recall, queries_per_second=len(q) / spent)
    (folder / "manifest.json").write_text(json.dumps(index.manifest, indent=1))
    for rank in range(world):
        (folder / f"best.{rank}.npz").unlink()


# The command line -----------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        queries = read_queries(Path(args.queries))[0] if args.queries else {}  # before an index is built
        student, index, collection = _open(args)
        k = min(args.k, len(index))
        if args.queries:
            _write_run(student, index, queries, Path(args.run), k)
        elif args.question:
            _answer(student, index, collection, args.question, k)
        else:
            while question := _ask():
                _answer(student, index, collection, question, k)
    except (ValueError, OSError) as error:
        print(f"retrieve.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="retrieve.py", description="Finds the best passages for a question, or for a "
                                     "file of them. With neither it asks for questions, until an empty line.")
    parser.add_argument("folder", nargs="?", metavar="RUN", help="the folder of a run of run.py")
    parser.add_argument("question", nargs="?", help="what to look for")
    parser.add_argument("-k", type=int, help="passages to find (default: 5; 1000 with --queries)")
    parser.add_argument("--student", metavar="FOLDER", help="instead of RUN: any student's folder or Hub name,")
    parser.add_argument("--data", metavar="SPEC", help='any collection: "docs", a BEIR folder, "ir_datasets:NAME",')
    parser.add_argument("--index", metavar="FOLDER", help="and where its index is, or is to be built")
    parser.add_argument("--queries", metavar="FILE", help="as in BEIR: jsonl, gzipped or not, of _id and text")
    parser.add_argument("--run", metavar="OUT", help="writes the results of --queries there, as trec_eval reads them")
    args = parser.parse_args(argv)
    if args.student and args.question is None:  # then the only word is the question
        args.folder, args.question = None, args.folder
    if bool(args.folder) == bool(args.student) or not bool(args.student) == bool(args.data) == bool(args.index):
        parser.error("give either a RUN or --student, --data and --index, all three")
    if bool(args.queries) != bool(args.run):
        parser.error("--queries FILE and --run OUT go together")
    if args.queries and args.question:
        parser.error(f"give either a question ({args.question!r}) or --queries")
    if args.run and (Path(args.run).is_dir() or not Path(args.run).parent.is_dir()):  # before an index is built
        parser.error(f"--run {args.run}: expected the name of a file, in a folder that is there")
    args.k = args.k if args.k is not None else 1000 if args.queries else 5
    if args.k < 1:
        parser.error(f"-k {args.k}: expected 1 or more")
    return args


def _open(args: argparse.Namespace):
    """The student, its index (built where there is none yet) and the collection that the command line names."""
    from transformers.utils import logging  # here, as a library's user may never need it, and it takes seconds
    from checkpoints import digest
    from pairdistill import Student
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.folder:
        student_folder, index_folder, data = _newest(Path(args.folder))
    else:
        student_folder, index_folder, data = args.student, Path(args.index), args.data
    collection = load_collection(data)
    student = Student.from_pretrained(str(student_folder))
    student.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # A name on the Hub has no folder to digest: the name stands for it.
    identity = digest(student_folder) if Path(student_folder).is_dir() else str(student_folder)
    if student.drawn:
        raise ValueError(f"{student_folder} has no projection to {student.dim} dimensions, and one drawn at random finds little: "
                         f"make a student of it by run.py, with --dim 0 or --base-steps")
    if not (index_folder / "manifest.json").exists():
        print(f"building {index_folder}", file=sys.stderr)
        index = Index.build(student, collection.passages, index_folder, passage_ids=collection.passage_ids,
                            student_digest=identity, queries=list(collection.queries.values())[:MEASURED])
        print(f"{len(index):,} passages, {len(index.codes):,} tokens, {index.measured}", file=sys.stderr)
    else:
        index = Index.load(index_folder, student.device, identity)
    names, texts = index.passage_ids, sample_digest(len(collection.passages), collection.passages)
    if names != list(collection.passage_ids) or index.manifest["texts"] != texts:
        what = "without passage ids" if names is None else f"of another collection than {data}"
        raise ValueError(f"{index_folder} is an index {what}: give another folder")
    return student, index, collection


def _newest(run: Path) -> tuple[Path, Path, str]:
    """A run's newest student that has an index -> the student's folder, the index's, and the collection's name."""
    try:
        data = os.fspath(json.loads((run / "config.json").read_text())["data"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{run} is not a run's folder: it has no config.json that names its data") from None
    finished = [folder for folder in run.glob("iter[0-9]*")
                if folder.name[4:].isdigit() and (folder / "student").is_dir() and (folder / "index" / "manifest.json").exists()]
    if not finished:
        raise ValueError(f"{run} has no finished iteration yet: no iterN with a student and its index")
    newest = max(finished, key=lambda folder: int(folder.name[4:]))
    copy = run / "collection"  # as it was when the run began
    return newest / "student", newest / "index", str(copy) if data == "docs" and copy.exists() else data


def _ask() -> str:
    try:
        return input("question: ").strip()
    except EOFError:
        return ""


@torch.no_grad()
def _answer(student, index: Index, collection, question: str, k: int) -> None:
    q, q_mask = student.encode_queries([question.encode("utf-8", "replace").decode()])
    scores, positions = index.search(q, k, q_mask)
    for rank, (score, position) in enumerate(zip(scores[0].tolist(), positions[0].tolist()), 1):
        if position >= 0:
            snippet = textwrap.shorten(collection.passages[position], 3 * 96, placeholder=" ...")
            print(f"{rank:3}  {score:7.3f}  {collection.passage_ids[position]}")
            print(textwrap.fill(snippet, 110, initial_indent=" " * 14, subsequent_indent=" " * 14))


@torch.no_grad()
def _write_run(student, index: Index, queries: dict[str, str], out: Path, k: int) -> None:
    """A line for each query and passage, "qid Q0 passage rank score tag": a finished file or none."""
    qids, names, beside = list(queries), index.passage_ids, out.with_name(out.name + ".tmp")
    if spaced := next((name for name in (*qids, *names) if len(name.split()) != 1), None):
        raise ValueError(f"{out}: a TREC run separates by spaces, and the id {spaced!r} has one: give it another in the collection")
    with open(beside, "w", encoding="utf-8") as file, tqdm(total=len(qids), desc="search", unit=" queries") as bar:
        for start in range(0, len(qids), QUERIES):
            part = qids[start:start + QUERIES]
            q, q_mask = _encode_queries(student, [queries[qid] for qid in part])
            for qid, row, where in zip(part, *(x.tolist() for x in index.search(q, k, q_mask))):
                file.writelines(f"{qid} Q0 {names[n]} {rank} {score:.6f} pairdistill\n"
                                for rank, (score, n) in enumerate(zip(row, where), 1) if n >= 0)
            bar.update(len(part))
    os.replace(beside, out)


def _encode_queries(student, texts: list[str], size: int = 256) -> tuple[Tensor, Tensor]:
    """encode_queries, a few at a time: q [B, Q, E] and q_mask [B, Q], Q being the longest query's."""
    parts = [student.encode_queries(texts[start:start + size]) for start in range(0, len(texts), size)]
    Q = max(mask.shape[1] for _, mask in parts)
    return (torch.cat([F.pad(q, (0, 0, 0, Q - q.shape[1])) for q, _ in parts]),
            torch.cat([F.pad(mask, (0, Q - mask.shape[1])) for _, mask in parts]))


if __name__ == "__main__":
    sys.exit(main())
