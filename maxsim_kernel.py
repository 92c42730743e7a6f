"""MaxSim and the PairDistill losses (Huang & Chen 2024), fused: no similarity matrix in memory.

A late-interaction score (ColBERT) of query b and passage n, over query tokens i and passage tokens t, is

    s[b, n] = sum_i max_{t in n} q[b, i] . d[t]                                                  (forward)

and with w(b, i, n) the token that wins the maximum, its gradients are sums of *rows*, one row a winner:

    dL/dq[b, i] = sum_n dL/ds[b, n] d[w(b, i, n)]        dL/dd[t] = sum_{(b, i): w(b, i, n) = t} dL/ds[b, n] q[b, i]

where n, on the right, is the passage that holds t. So one integer for each (b, i, n) is all that the backward pass
needs. This file computes scores and gradients three times:

    eager        as one would write it in PyTorch, with the similarities of all tokens in memory
    kernels      Triton, for a GPU; the idea and a drawing stand before them
    blockwise    PyTorch on blocks that fit into a core's cache: what a CPU runs

and the losses of the paper twice, eager and in one kernel; pairdistill_objective joins scores and losses.

"All pairs": every query with every passage, scores [B, N]. "paired": every query with its own block of K passages, so
that N = B * K, passage n meets only query n // K, and scores are [B, K]. The passages are ragged: d [T, E] holds all
their tokens and offsets [N + 1] says where each begins: passage n is d[offsets[n]:offsets[n + 1]], with no padding.

Dimension key: B queries, K passages a query, N passages, P pairs a query, Q query tokens, L tokens of the longest
passage, T passage tokens (of all passages together; in a kernel, of one tile), E embedding, C columns = tokens of
several queries, one after the other. A suffix is a shape: q_BQE is [B, Q, E].

Check it: python -m pytest test_pairdistill.py -k maxsim; measure it: python bench.py; compile it without a GPU:
python bench.py --compile.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is for Linux; elsewhere the kernels below stay plain functions that nobody calls
    triton = None

    class tl:
        constexpr = lambda value: value


# ---- The reference: eager PyTorch ------------------------------------------------------------------------------------


def maxsim_eager(q: Tensor, d: Tensor, offsets: Tensor, q_mask: Tensor | None = None, paired: bool = False) -> Tensor:
    """MaxSim as one would write it: pad the passages, hold all similarities, take the maximum."""
    length_N, (B, N) = offsets.diff(), (len(q), len(offsets) - 1)
    if len(d) == 0:
        nothing = q[:0].sum() + d.sum()  # 0, and in the graph
        return nothing.to(_sum_dtype(q.dtype)).expand(_scores_shape(B, N, paired)).clone()
    position_L = torch.arange(int(length_N.max()), device=d.device)
    d_NLE = d[(offsets[:-1, None] + position_L).clamp(max=len(d) - 1)]  # what follows a short passage is masked below
    return maxsim_padded(q, d_NLE, length_N, q_mask, paired, _sum_dtype(q.dtype))


def maxsim_padded(q: Tensor, d_NLE: Tensor, length_N: Tensor, q_mask: Tensor | None, paired: bool,
                  similarity_dtype: torch.dtype) -> Tensor:
    """The same on passages that are padded already, with similarities in any type: what bench.py compares with."""
    position_L = torch.arange(d_NLE.shape[1], device=q.device)
    shape, sum_dtype = _scores_shape(len(q), len(d_NLE), paired), _sum_dtype(q.dtype)
    q, d_NLE = q.to(similarity_dtype), d_NLE.to(similarity_dtype)
    if paired:
        length_N = length_N.view(shape)
        sims = torch.einsum("bqe,bkle->bkql", q, d_NLE.unflatten(0, shape))
    else:
        sims = torch.einsum("bqe,nle->bnql", q, d_NLE)
    sims = sims.masked_fill((position_L >= length_N[..., None])[..., None, :], -torch.inf)
    best = torch.where((length_N > 0)[..., None], sims.max(-1).values, 0)  # an empty passage scores 0
    if q_mask is not None:
        best = torch.where(q_mask[:, None, :], best, 0)
    return best.sum(-1, dtype=sum_dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores_shape(B: int, N: int, paired: bool) -> tuple[int, int]:
    return (B, N // max(B, 1)) if paired else (B, N)


# ---- The kernels: Triton ---------------------------------------------------------------------------------------------
# Eager PyTorch holds the similarities of every query token with every passage token, twice: at the paper's 32 queries x
# 2048 passages (32 query tokens, 180 passage tokens) that is 755 MB in bfloat16, 1.5 GB in float32, for the similarities
# and as much for their gradient. Here they live in registers, and what reaches memory is 0.26 MB of scores and 2 to 8 MB
# of winners:
#
#                                     the columns: tokens of QUERIES queries
#                                     +--- query b ---+-- query b+1 --+ ...
#                           token 0   |               |               |
#     one program,          token 1   |   sims_TC, one tile of them   |     best_TC = max(best_TC, sims_TC)
#     one passage:             :      |      tl.dot(d_TE, q_CE^T)     | --> from_TC = the tile, where it rose
#     its tokens are           :      |                               |     (elementwise, in registers)
#     the rows, in          token 63  |               |               |
#     tiles of BLOCK_T      ----------+---------------+---------------+
#                           token 64  |       the next tile ...       |
#                                     +---------------+---------------+
#     at the end, once:     max over rows -> best_C; the first token that reaches it -> winner_C;
#                           sum of best_C over each query's columns -> scores[b, n]
#
# A tile that sticks out over the end of its passage reads the last token again, which cannot change a maximum, nor
# where it is first reached: no masking of similarities, and none of padding, because there is none. (Implementations
# that multiply padding by 0 score it above every negative similarity.) Passage tokens are the rows because Hopper's
# tensor-core instruction takes 64 rows at least, and a query alone has 32.
#
# The gradients use no atomic additions: each row of either gradient belongs to one program, which adds in a fixed order
# and writes once, in the input's type. Two runs give the same bits.
#
# New to Triton? A kernel is run by many programs at once, each with its own program_id, each on blocks whose sizes are
# powers of two. An address is a pointer plus a number; tl.load and tl.store take a block of them, mostly made of
# `[:, None]` rows and columns, and a mask of those to touch. A tl.constexpr argument is known when the kernel is
# compiled, the others when it is launched. Triton would compile again for a number that is 1 or a multiple of 16: not
# for those in SIZES. Both branches of `x if CONSTANT else y` must have one type: hence terms like `n + 0 * b`.

SIZES = ["B", "Q", "N", "K", "P", "width", "max_length", "first_query", "n_queries", "n_labelled", "n_pairs"]


def _kernel(function):
    if triton is None:
        return function
    return triton.jit(do_not_specialize=SIZES)(function)


INTERPRETED = tl.constexpr(triton is not None and triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: NumPy, on a CPU


@_kernel
def _dot(a, b):
    """a @ b in b's type, with sums in float32; of float32 in float32, not in the tensor cores' shorter tf32."""
    if INTERPRETED and b.dtype == tl.bfloat16:  # which NumPy does not know: it would multiply its bits as integers
        b = b.to(tl.float32)
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@_kernel
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@_kernel
def _largest(x_TC):
    """tl.max(x_TC, 0) leaves out a NaN."""
    if INTERPRETED:  # which would call _larger once an element
        return tl.where(tl.max((x_TC != x_TC).to(tl.int32), 0) != 0, float("nan"), tl.max(x_TC, 0))
    else:
        return tl.reduce(x_TC, 0, _larger)


@_kernel
def _forward_kernel(
    q_ptr,  # [B, Q, E], float
    d_ptr,  # [T, E], float
    offsets_ptr,  # [N + 1], int32
    mask_ptr,  # [B, Q], uint8; read if MASKED
    scores_ptr,  # [B, N], float32, out; PAIRED: [B, K], that is [N]
    winners_ptr,  # [N, C], integer, out if SAVE: C = B * Q columns; PAIRED: C = Q
    B, Q, N, K, max_length,
    E: tl.constexpr, PAIRED: tl.constexpr, MASKED: tl.constexpr, SAVE: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):
    # Locate: one passage, QUERIES queries (PAIRED: the one it belongs to). Neighbouring programs share the passage, so
    # all but the first find it in the cache.
    groups = 1 if PAIRED else tl.cdiv(B, QUERIES)
    n = tl.program_id(0) // groups
    first = n // K if PAIRED else tl.program_id(0) % groups * QUERIES
    start = tl.load(offsets_ptr + n)
    length = tl.load(offsets_ptr + n + 1) - start
    # T * E, N * B * Q and their like may pass 2^31: base addresses are made in 64 bits, what is added to them in 32.
    d_ptr += start.to(tl.int64) * E
    q_ptr += tl.cast(first, tl.int64) * Q * E
    tile_T, e_E = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    column_C = tl.arange(0, QUERIES * BLOCK_Q)
    b_C = column_C // BLOCK_Q  # the column's query, counted from the program's first

    scores = tl.zeros([QUERIES], tl.float32)
    for q0 in range(0, Q, BLOCK_Q):  # once, unless the query is long
        position_C = q0 + column_C % BLOCK_Q
        row_C = b_C * Q + position_C
        inside_C = (first + b_C < B) & (position_C < Q)
        live_C = inside_C
        if MASKED:
            live_C = inside_C & (tl.load(mask_ptr + first * Q + row_C, mask=inside_C, other=0) != 0)
        q_CE = tl.load(q_ptr + row_C[:, None] * E + e_E, mask=live_C[:, None] & (e_E < E), other=0.0)

        # Compute: the running maximum stays elementwise; reducing each tile across threads would cost more than
        # the product itself. A NaN stays a NaN.
        best_TC = tl.full([BLOCK_T, QUERIES * BLOCK_Q], float("-inf"), tl.float32)
        from_TC = tl.zeros([BLOCK_T, QUERIES * BLOCK_Q], tl.int32)
        for t in range(0, length, BLOCK_T):
            token_T = tl.minimum(t + tile_T, length - 1)
            d_TE = tl.load(d_ptr + token_T[:, None] * E + e_E, mask=e_E < E, other=0.0)
            sims_TC = _dot(d_TE, tl.trans(q_CE))
            if SAVE:
                from_TC = tl.where(sims_TC > best_TC, t, from_TC)
            best_TC = _larger(best_TC, sims_TC)

        # Reduce: over the rows, to each column's maximum and the lowest token that has it; then over each query.
        best_C = _largest(best_TC)
        if SAVE:
            winner_C = tl.min(tl.where(best_TC == best_C, from_TC + tile_T[:, None], length), 0)
            base = n.to(tl.int64) * Q if PAIRED else (n.to(tl.int64) * B + first) * Q
            winner_C = tl.minimum(winner_C, tl.minimum(length, max_length) - 1)  # repeated last token; NaN; too long
            tl.store(winners_ptr + base + row_C, tl.maximum(winner_C, 0), mask=inside_C & (length > 0))
        best_C = tl.where(live_C & (length > 0), best_C, 0.0)
        scores += tl.sum(tl.reshape(best_C, [QUERIES, BLOCK_Q]), 1)

    # Store. A passage longer than it was said to be has winners that did not fit their type: it must not go unnoticed.
    scores = tl.where(length <= max_length, scores, float("nan"))
    b = first + tl.arange(0, QUERIES)
    tl.store(scores_ptr + (n + 0 * b if PAIRED else b.to(tl.int64) * N + n), scores, mask=b < B)


# The passages' gradient, dL/dd[t] = sum over the columns (b, i) that t wins of dL/ds[b, n] q[b, i], is a product again:
# [tokens, columns] @ [columns, E], where the left side has dL/ds[b, n] where the column's winner is the row, else 0.
# It is made in registers from the winners, in the inputs' type, and the tensor cores do the rest, in float32. One program
# owns a passage's rows. As in any product, a query that is not finite reaches all of them; and in float16 a weight of less
# than 2^-25 of its tile's largest is 0.


@_kernel
def _backward_passages_kernel(
    q_ptr,  # [B, Q, E], float
    offsets_ptr,  # [N + 1], int32
    mask_ptr,  # [B, Q], uint8; read if MASKED
    winners_ptr,  # [N, C], integer
    grad_scores_ptr,  # [B, N], float32
    grad_d_ptr,  # [T, E], float, out
    B, Q, N, K,
    E: tl.constexpr, PAIRED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):
    n = tl.program_id(0)
    first_row = n // K * Q if PAIRED else n * 0
    columns = Q if PAIRED else B * Q
    start = tl.load(offsets_ptr + n)
    length = tl.load(offsets_ptr + n + 1) - start
    grad_d_ptr += start.to(tl.int64) * E
    winners_ptr += n.to(tl.int64) * columns
    tile_T, tile_C, e_E = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)

    for t in range(0, length, BLOCK_T):
        grad_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for c in range(0, columns, BLOCK_C):
            row = first_row + c
            live_C = c + tile_C < columns
            if MASKED:
                live_C = live_C & (tl.load(mask_ptr + row + tile_C, mask=live_C, other=0) != 0)
            winner_C = tl.load(winners_ptr + c + tile_C, mask=live_C, other=0).to(tl.int32)
            score_C = n + 0 * tile_C if PAIRED else ((row + tile_C) // Q).to(tl.int64) * N + n
            weight_C = tl.load(grad_scores_ptr + score_C, mask=live_C, other=0.0)
            q_tile_ptr = q_ptr + row.to(tl.int64) * E
            q_CE = tl.load(q_tile_ptr + tile_C[:, None] * E + e_E, mask=live_C[:, None] & (e_E < E), other=0.0)
            largest = 1.0
            if q_CE.dtype == tl.float16:  # a scaled loss leaves float16's range: divide before, multiply after
                largest = tl.max(tl.abs(weight_C), 0)
                largest = tl.where(largest > 0, largest, 1.0)
            weight_TC = tl.where(winner_C == (t + tile_T)[:, None], weight_C / largest, 0.0)
            grad_TE += _dot(weight_TC, q_CE) * largest
        real_TE = (t + tile_T < length)[:, None] & (e_E < E)
        tl.store(grad_d_ptr + (t + tile_T)[:, None] * E + e_E, grad_TE.to(grad_d_ptr.dtype.element_ty), mask=real_TE)


# The queries' gradient, dL/dq[b, i] = sum_n dL/ds[b, n] d[w(b, i, n)], gathers one row of d for each passage. One
# program owns one query token; it adds BLOCK_N passages at a time, elementwise, and sums over those at the end.


@_kernel
def _backward_queries_kernel(
    d_ptr,  # [T, E], float
    offsets_ptr,  # [N + 1], int32
    mask_ptr,  # [B, Q], uint8; read if MASKED
    winners_ptr,  # [N, C], integer
    grad_scores_ptr,  # [B, N], float32
    grad_q_ptr,  # [B, Q, E], float, out
    B, Q, N, K,
    E: tl.constexpr, PAIRED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0)
    b = row // Q
    first, last = (b * K, b * K + K) if PAIRED else (0, N)
    columns, column = (Q, row % Q) if PAIRED else (B * Q, row)
    if MASKED:
        last = tl.where(tl.load(mask_ptr + row) != 0, last, first)
    e_E = tl.arange(0, BLOCK_E)

    grad_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for n0 in range(first, last, BLOCK_N):
        n_N = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        start_N = tl.load(offsets_ptr + n_N, mask=n_N < last, other=0)
        live_N = start_N < tl.load(offsets_ptr + n_N + 1, mask=n_N < last, other=0)
        winner_N = tl.load(winners_ptr + n_N * columns + column, mask=live_N, other=0)
        weight_N = tl.load(grad_scores_ptr + (n_N if PAIRED else b.to(tl.int64) * N + n_N), mask=live_N, other=0.0)
        token_N = (start_N + winner_N.to(tl.int32)).to(tl.int64)
        d_NE = tl.load(d_ptr + token_N[:, None] * E + e_E, mask=live_N[:, None] & (e_E < E), other=0.0)
        grad_NE += weight_N[:, None] * d_NE.to(tl.float32)
    grad_E = tl.sum(grad_NE, 0)
    tl.store(grad_q_ptr + row.to(tl.int64) * E + e_E, grad_E.to(grad_q_ptr.dtype.element_ty), mask=e_E < E)


# ---- The loss head ---------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """total = cl + lambda_kd * kd + lambda_pair * pair, each a scalar."""

    total: Tensor
    cl: Tensor
    kd: Tensor
    pair: Tensor


class LossOptions(NamedTuple):
    """The keywords of pairdistill_loss, which explains them."""

    tau: float
    lambda_kd: float
    lambda_pair: float
    pair_reduction: str
    first_query: int
    n_queries: int | None
    n_labelled: int | None
    n_pairs: int | None


def _losses_eager(scores: Tensor, teacher: Tensor, pairs: Tensor, pair_probs: Tensor, positive: Tensor | None,
                  options: LossOptions) -> Losses:
    """The losses as the paper writes them."""
    B, K = teacher.shape
    teacher, pair_probs = teacher.detach().to(scores.dtype), pair_probs.detach().to(scores.dtype)
    in_batch = scores.shape[1] != K
    column_BK = torch.arange(K, device=scores.device).expand(B, K)
    if in_batch:
        column_BK = column_BK + K * (options.first_query + torch.arange(B, device=scores.device))[:, None]
    own_BK = scores.gather(1, column_BK)
    n_queries = B if options.n_queries is None else options.n_queries

    # Section 3.1: L_CL = -log exp s(q, d+) / sum over D' of exp s(q, d), D' being d+ and the other queries' passages.
    # PAPER: D' is "the positive and negative examples". As in ColBERTv2, the own hard negatives are left to L_KD.
    cl = scores.new_zeros(())
    if positive is not None:
        labelled_B = positive >= 0
        positive_B1 = own_BK.gather(1, positive.long().clamp(min=0)[:, None])
        candidates = own_BK
        if in_batch:
            candidates = torch.cat([positive_B1, scores.scatter(1, column_BK, -torch.inf)], 1)
        cl_B = torch.where(labelled_B, candidates.logsumexp(1) - positive_B1[:, 0], 0)
        cl = _mean(cl_B, labelled_B.sum() if options.n_labelled is None else options.n_labelled)

    # Section 3.3: L_KD = 1/|B| sum_q KL(P_point || P), P_point = softmax(teacher / tau); xlogy has 0 log 0 = 0.
    point_BK = (teacher / options.tau).softmax(1)
    kd_BK = torch.xlogy(point_BK, point_BK) - point_BK * own_BK.log_softmax(1)
    kd = _mean(kd_BK, n_queries)

    # Section 4.2: L_pair = KL(P_pair || P), both outcomes; softmax over two scores is the sigmoid of their difference.
    valid_BP = pairs[..., 0] >= 0
    i_BP, j_BP = pairs.long().clamp(min=0).unbind(-1)
    margin_BP = own_BK.gather(1, i_BP) - own_BK.gather(1, j_BP)
    p_BP = torch.where(valid_BP, pair_probs, 0.5)
    kl_BP = (torch.xlogy(p_BP, p_BP) - p_BP * F.logsigmoid(margin_BP)
             + torch.xlogy(1 - p_BP, 1 - p_BP) - (1 - p_BP) * F.logsigmoid(-margin_BP))
    # PAPER: a sum over a query's pairs ("sum"). The authors' code, with lambda_pair = 3, takes the mean over all pairs.
    n_pairs = valid_BP.sum() if options.n_pairs is None else options.n_pairs
    pair = _mean(torch.where(valid_BP, kl_BP, 0), n_pairs if options.pair_reduction == "mean" else n_queries)
    return Losses(cl + options.lambda_kd * kd + options.lambda_pair * pair, cl, kd, pair)


def _mean(terms: Tensor, count: int | Tensor) -> Tensor:
    """terms' sum / count; with a count of 0 there are no terms, and the mean is 0."""
    return terms.sum() / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


# The same in one launch, with the gradients beside the losses. With p the student's softmax over the loss's own candidates (D'
# for L_CL, the own block for L_KD) and sigma a sigmoid,
#
#     dL_CL/ds_k = p_k - [k is the positive]    dL_KD/ds_k = p_k - P_point,k    dL_pair/ds_i = sigma(s_i - s_j) - P_pair
#
# and dL_pair/ds_j its negative. A program owns a query's row of scores, so a pair adds to its two positions by
# comparison with every position, not by an atomic addition.

FAR = tl.constexpr(-1e30)  # for scores that are not there: its exponential is 0, and a difference of two is no NaN


@_kernel
def _head_kernel(
    scores_ptr,  # [B, width], float32: width = K, the own block, or K times all queries, own block among them
    teacher_ptr,  # [B, K], float32
    pairs_ptr,  # [B, P, 2], int32
    probs_ptr,  # [B, P], float32
    positive_ptr,  # [B], int32
    losses_ptr,  # [4, B], float32, out: total, cl, kd, pair, each query's share
    grad_ptr,  # [B, width], float32, out: of the total
    B, K, P, width, first_query, n_queries, n_labelled, n_pairs,  # a count of -1: to be counted here
    inverse_tau, weight_cl, weight_kd, weight_pair,
    OWN: tl.constexpr, PAIR_SUM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    own = b * 0 if OWN else (first_query + b) * K
    scores_ptr += b * width
    grad_ptr += b * width
    block = tl.arange(0, BLOCK)
    k_K = tl.arange(0, BLOCK_K)
    if n_labelled < 0:
        n_labelled = 0
        for b0 in range(0, B, BLOCK):
            label = tl.load(positive_ptr + b0 + block, mask=b0 + block < B, other=-1)
            n_labelled += tl.sum((label >= 0).to(tl.int32), 0)
    if n_pairs < 0 and not PAIR_SUM:
        n_pairs = 0
        for p0 in range(0, B * P, BLOCK):
            i = tl.load(pairs_ptr + 2 * (p0 + block), mask=p0 + block < B * P, other=-1)
            n_pairs += tl.sum((i >= 0).to(tl.int32), 0)

    # L_KD
    own_K = tl.load(scores_ptr + own + k_K, mask=k_K < K, other=FAR)
    shifted_K = own_K - tl.max(own_K, 0)
    normalizer = tl.log(tl.sum(tl.exp(shifted_K), 0))
    student_K = tl.exp(shifted_K - normalizer)
    point_K = tl.load(teacher_ptr + b * K + k_K, mask=k_K < K, other=FAR) * inverse_tau
    point_K -= tl.max(point_K, 0)
    log_point_K = point_K - tl.log(tl.sum(tl.exp(point_K), 0))
    point_K = tl.exp(log_point_K)
    per_query = 1.0 / tl.maximum(n_queries, 1)
    kd = tl.sum(tl.where(point_K != 0, point_K * (log_point_K - shifted_K + normalizer), 0.0), 0) * per_query
    grad_K = weight_kd * per_query * (student_K - point_K)

    # L_pair
    per_pair = per_query if PAIR_SUM else 1.0 / tl.maximum(n_pairs, 1)
    pair_P = tl.zeros([BLOCK_P], tl.float32)
    for p0 in range(0, P, BLOCK_P):
        at_P = b * P + p0 + tl.arange(0, BLOCK_P)
        inside = p0 + tl.arange(0, BLOCK_P) < P
        i_P = tl.load(pairs_ptr + 2 * at_P, mask=inside, other=-1)
        j_P = tl.load(pairs_ptr + 2 * at_P + 1, mask=inside, other=-1)
        valid_P = (i_P >= 0) & (j_P >= 0)
        prob_P = tl.load(probs_ptr + at_P, mask=valid_P, other=0.5)
        margin_P = (tl.load(scores_ptr + own + i_P, mask=valid_P, other=0.0)
                    - tl.load(scores_ptr + own + j_P, mask=valid_P, other=0.0))
        # p (log p - log sigma(x)) + (1 - p) (log(1 - p) - log sigma(-x)) = softplus(x) - p x - H(p)
        small_P = tl.exp(-tl.abs(margin_P))  # the exponential that cannot overflow
        softplus_P = tl.maximum(margin_P, 0.0) + tl.log(1.0 + small_P)
        sigmoid_P = tl.where(margin_P > 0, 1.0, small_P) / (1.0 + small_P)
        negative_entropy_P = (prob_P * tl.log(tl.where(prob_P > 0, prob_P, 1.0))
                              + (1 - prob_P) * tl.log(tl.where(prob_P < 1, 1 - prob_P, 1.0)))
        pair_P += tl.where(valid_P, softplus_P - prob_P * margin_P + negative_entropy_P, 0.0)
        grad_P = tl.where(valid_P, weight_pair * per_pair * (sigmoid_P - prob_P), 0.0)
        signs_PK = (i_P[:, None] == k_K).to(tl.float32) - (j_P[:, None] == k_K).to(tl.float32)
        grad_K += tl.sum(signs_PK * grad_P[:, None], 0)
    pair = tl.sum(pair_P, 0) * per_pair

    # L_CL: the log of the sum is kept as (largest, sum of exp(score - largest)) per lane while columns stream by.
    label = tl.load(positive_ptr + b)
    per_label = tl.where(label >= 0, 1.0 / tl.maximum(n_labelled, 1), 0.0)
    score = tl.load(scores_ptr + own + tl.maximum(label, 0))
    if OWN:
        lse = tl.max(own_K, 0) + normalizer
        grad_K += weight_cl * per_label * (student_K - (k_K == label).to(tl.float32))
    else:
        largest = tl.full([BLOCK], FAR, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for c0 in range(0, width, BLOCK):
            column = c0 + block
            other = (column < width) & ((column < own) | (column >= own + K))
            s = tl.load(scores_ptr + column, mask=other, other=FAR)
            raised = tl.maximum(largest, s)
            total = total * tl.exp(largest - raised) + tl.where(other, tl.exp(s - raised), 0.0)
            largest = raised
        top = tl.maximum(tl.max(largest, 0), score)
        lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0) + tl.exp(score - top))
        for c0 in range(0, width, BLOCK):
            column = c0 + block
            other = (column < width) & ((column < own) | (column >= own + K))
            s = tl.load(scores_ptr + column, mask=other, other=FAR)
            tl.store(grad_ptr + column, weight_cl * per_label * tl.exp(s - lse), mask=other)
        grad_K += tl.where(k_K == label, weight_cl * per_label * (tl.exp(score - lse) - 1), 0.0)
    cl = per_label * (lse - score)

    tl.store(grad_ptr + own + k_K, grad_K, mask=k_K < K)
    tl.store(losses_ptr + b, weight_cl * cl + weight_kd * kd + weight_pair * pair)
    tl.store(losses_ptr + B + b, cl)
    tl.store(losses_ptr + 2 * B + b, kd)
    tl.store(losses_ptr + 3 * B + b, pair)


# ---- Launches --------------------------------------------------------------------------------------------------------
# Tiles, warps and pipeline stages. A table, because an autotuner stalls for seconds at each new shape; up to 768 dimensions
# none of its rows spills registers (`python bench.py --compile`), and `python bench.py --tune` measures them again.

LAUNCH = {
    # (major compute capability, or 0 for any other; bytes an element; dim up to): for each kernel its tile, warps and stages:
    # forward (BLOCK_T, columns, ...), passages' gradient (BLOCK_T, BLOCK_C, ...), queries' gradient (BLOCK_N, warps)
    (9, 2, 128): ((64, 128, 4, 3), (64, 64, 4, 2), (32, 4)),
    (0, 2, 128): ((64, 128, 8, 3), (64, 64, 8, 3), (32, 4)),
    (0, 2, 256): ((64, 64, 8, 2), (64, 64, 8, 2), (16, 4)),
    (0, 2, 512): ((32, 32, 8, 2), (16, 32, 8, 2), (8, 4)),
    (0, 2, 1024): ((16, 16, 4, 2), (16, 16, 8, 2), (8, 4)),
    (0, 4, 128): ((32, 64, 8, 3), (32, 64, 8, 3), (16, 4)),
    (0, 4, 256): ((32, 32, 8, 2), (16, 32, 8, 2), (8, 4)),
    (0, 4, 512): ((16, 16, 8, 2), (16, 16, 8, 1), (8, 4)),
    (0, 4, 1024): ((16, 16, 8, 2), (16, 16, 8, 1), (4, 4)),
}


def _power_of_2(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def launch_options(q_shape: tuple[int, ...], element_size: int, paired: bool, capability: int) -> tuple[dict, ...]:
    """Keyword arguments of MaxSim's three kernels: what shape, type and the table decide."""
    B, Q, E = q_shape
    block_e = max(_power_of_2(E), 16)
    key = (element_size, max(block_e, 128))
    forward, passages, queries = LAUNCH.get((capability, *key)) or LAUNCH[0, *key]
    n_queries = 1 if paired else min(_power_of_2(B), max(forward[1] // _power_of_2(Q), 1))
    block_q = max(min(_power_of_2(Q), forward[1]), 16 // n_queries)  # tl.dot takes 16 columns at least
    block_c = min(passages[1], max(_power_of_2(Q if paired else B * Q), 16))
    common = {"E": E, "BLOCK_E": block_e, "PAIRED": paired}
    return (
        common | {"QUERIES": n_queries, "BLOCK_Q": block_q, "BLOCK_T": forward[0], "num_warps": forward[2],
                  "num_stages": forward[3]},
        common | {"BLOCK_C": block_c, "BLOCK_T": passages[0], "num_warps": passages[2], "num_stages": passages[3]},
        common | {"BLOCK_N": queries[0], "num_warps": queries[1]},
    )


def head_options(K: int, P: int, width: int, pair_reduction: str) -> dict:
    """Keyword arguments of the loss head. A tile [BLOCK_P, BLOCK_K] spreads the pairs over the block's positions."""
    block_k = _power_of_2(K)
    block_p = max(min(_power_of_2(P), 1024 // block_k), 1)
    return {"OWN": width == K, "PAIR_SUM": pair_reduction == "sum", "BLOCK_K": block_k, "BLOCK_P": block_p,
            "BLOCK": 512, "maxnreg": 128}


def _capability(tensor: Tensor) -> int:
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 0


def _on(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _triton_forward(q: Tensor, d: Tensor, offsets: Tensor, q_mask: Tensor | None, paired: bool, save: bool,
                    max_length: int | None) -> tuple[Tensor, Tensor | None]:
    (B, Q, _), N = q.shape, len(offsets) - 1
    K = N // max(B, 1)
    max_length = len(d) if max_length is None else max_length
    scores = torch.empty(_scores_shape(B, N, paired), dtype=torch.float32, device=q.device)
    winners = torch.empty(N, Q if paired else B * Q, dtype=_winner_dtype(max_length), device=q.device) if save else None
    options = launch_options(q.shape, q.element_size(), paired, _capability(q))[0]
    programs = N * (1 if paired else triton.cdiv(B, options["QUERIES"]))
    masked, mask = q_mask is not None, q if q_mask is None else q_mask.view(torch.uint8)
    if programs:
        with _on(q):
            _forward_kernel[(programs,)](q, d, offsets, mask, scores, winners if save else scores, B, Q, N, K,
                                         max_length, MASKED=masked, SAVE=save, **options)
    return scores, winners


def _triton_backward(grad_scores: Tensor, q: Tensor, d: Tensor, offsets: Tensor, q_mask: Tensor | None, winners: Tensor,
                     paired: bool, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    (B, Q, _), N = q.shape, len(offsets) - 1
    _, passages, queries = launch_options(q.shape, q.element_size(), paired, _capability(q))
    masked, mask = q_mask is not None, q if q_mask is None else q_mask.view(torch.uint8)
    grad_q, grad_d = (torch.empty_like(x) if want else None for x, want in zip((q, d), wanted))
    inputs, sizes = (offsets, mask, winners, grad_scores), (B, Q, N, N // max(B, 1))
    with _on(q):
        if N and wanted[1]:
            _backward_passages_kernel[(N,)](q, *inputs, grad_d, *sizes, MASKED=masked, **passages)
        if B * Q and wanted[0]:
            _backward_queries_kernel[(B * Q,)](d, *inputs, grad_q, *sizes, MASKED=masked, **queries)
    return grad_q, grad_d


def _triton_head(scores: Tensor, teacher: Tensor, pairs: Tensor, pair_probs: Tensor, positive: Tensor | None,
                 options: LossOptions, weights: tuple[float, float, float] | None = None) -> tuple[Tensor, Tensor]:
    """[total, cl, kd, pair] and d total / d scores, where weights are those of cl, kd and pair in the total."""
    (B, K), P, width = teacher.shape, pairs.shape[1], scores.shape[1]
    if positive is None:
        positive = torch.full((B,), -1, dtype=torch.int32, device=scores.device)
    inputs = _contiguous(scores, teacher.float(), pairs.int(), pair_probs.float(), positive.int())
    losses, grad = torch.empty(4, B, device=scores.device), torch.empty(B, width, device=scores.device)
    n_queries = B if options.n_queries is None else options.n_queries
    n_labelled, n_pairs = (-1 if count is None else count for count in (options.n_labelled, options.n_pairs))
    weights = weights or (1.0, float(options.lambda_kd), float(options.lambda_pair))
    if B:
        with _on(scores):
            _head_kernel[(B,)](*inputs, losses, grad, B, K, P, width, options.first_query, n_queries, n_labelled,
                               n_pairs, 1 / options.tau, *weights, **head_options(K, P, width, options.pair_reduction))
    return losses.sum(1), grad


# ---- MaxSim blockwise: what a CPU runs ---------------------------------------------------------------------------------

BLOCK_SIMILARITIES = 1 << 18  # held at a time, if no passage needs more: 1 MB, a core's second-level cache


def _blocks(offsets: Tensor, first: int, last: int, n_columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the passages first to last - 1 that are not empty, similar lengths together: their numbers [n], and their
    tokens' rows of d [n, L], where a shorter one repeats its last token."""
    length, number = offsets[first : last + 1].diff().sort(stable=True)
    length_list, begin = length.tolist(), int((length == 0).sum())
    while begin < len(length):
        end = begin + 1
        while end < len(length) and (end + 1 - begin) * length_list[end] * n_columns <= BLOCK_SIMILARITIES:
            end += 1  # lengths rise: that of end - 1 is the block's longest
        number_n = first + number[begin:end]
        position_L = torch.arange(length_list[end - 1], device=offsets.device)
        yield number_n, torch.minimum(offsets[number_n, None] + position_L, offsets[number_n + 1, None] - 1)
        begin = end


def _blockwise_forward(q: Tensor, d: Tensor, offsets: Tensor, q_mask: Tensor | None, paired: bool, save: bool,
                       max_length: int | None) -> tuple[Tensor, Tensor | None]:
    """Scores, and winners [N, C] as positions in their passages: C = B * Q columns, or Q of the own block's query."""
    (B, Q, E), N = q.shape, len(offsets) - 1
    dtype, longest = _sum_dtype(q.dtype), int(offsets.diff().max()) if N else 0
    _expect(max_length is None or longest <= max_length,
            f"max_length is {max_length}, but a passage has {longest} tokens")
    G, M = (B, N // max(B, 1)) if paired else (1, N)  # groups of queries and passages that meet, M passages in each
    C = B * Q // max(G, 1)
    scores_NB = q.new_zeros(N, B // max(G, 1), dtype=dtype)
    winners_NC = q.new_zeros(N, C, dtype=_winner_dtype(longest)) if save else None
    for g in range(G):
        q_EC = q.view(G, C, E)[g].to(dtype).T
        for number_n, token_nL in _blocks(offsets, g * M, g * M + M, q_EC.shape[1]):
            n, L = token_nL.shape
            sims_nLC = (d.index_select(0, token_nL.flatten()).to(dtype) @ q_EC).view(n, L, C)
            best_nC = sims_nLC.amax(1)
            if save:
                # The first row that holds the maximum, in float arithmetic, which is vectorized on a CPU (max with
                # indices is not, and costs half as much as the product): the maximum over rows of (1 where the row
                # holds it, else 0) times L, L - 1, ..., 1 is L less the first such row.
                falling_L1 = torch.arange(L, 0, -1, dtype=dtype, device=q.device)[:, None]
                winner_nC = L - sims_nLC.eq_(best_nC[:, None]).mul_(falling_L1).amax(1)
                last_n1 = (offsets[number_n + 1] - offsets[number_n] - 1)[:, None]
                winners_NC[number_n] = torch.minimum(winner_nC, last_n1).to(winners_NC.dtype)
            if q_mask is not None:
                best_nC = best_nC.masked_fill(~q_mask.view(G, C)[g], 0)
            scores_NB[number_n] = best_nC.view(n, B // G, Q).sum(-1)
    # A copy: what an autograd function returns as a view cannot be changed in place.
    return (scores_NB.view(B, M) if paired else scores_NB.T).clone(memory_format=torch.contiguous_format), winners_NC


def _winner_dtype(longest: int) -> torch.dtype:
    return torch.uint8 if longest <= 256 else torch.int16 if longest <= 32768 else torch.int32


def _blockwise_backward(grad_scores: Tensor, q: Tensor, d: Tensor, offsets: Tensor, q_mask: Tensor | None,
                        winners_NC: Tensor, paired: bool, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """The gradients as weighted sums of rows: torch's embedding_bag, which adds in a fixed order."""
    (B, Q, E), T, (N, C) = q.shape, len(d), winners_NC.shape
    if T == 0 or winners_NC.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(d)
    dtype, (G, M) = _sum_dtype(q.dtype), (B, N // B) if paired else (1, N)
    token_GMC = (offsets[:-1, None] + winners_NC.long()).clamp_(max=T - 1).view(G, M, C)
    weight_GMC = (grad_scores[..., None] if paired else grad_scores.T[None]).to(dtype).repeat_interleave(Q, -1)
    weight_GMC = weight_GMC * (offsets.diff() > 0).view(G, M, 1)
    if q_mask is not None:
        weight_GMC = weight_GMC * q_mask.view(G, 1, C)
        q = q.masked_fill(~q_mask[..., None], 0)  # what is not finite would pass a weight of 0
    grad_q = grad_d = None
    # A bag for each query token: the passage tokens that it chose.
    if wanted[0]:
        token_RM, weight_RM = (x.transpose(1, 2).reshape(B * Q, M) for x in (token_GMC, weight_GMC))
        grad_q = F.embedding_bag(token_RM, d.to(dtype), mode="sum", per_sample_weights=weight_RM).view_as(q).to(q.dtype)
    # A bag for each passage token: the query tokens that chose it, which a stable sort brings together.
    if wanted[1]:
        token, order = token_GMC.flatten().sort(stable=True)
        begin_T = torch.searchsorted(token, torch.arange(T, device=d.device))
        row, weight = order // (M * C) * C + order % C, weight_GMC.flatten()[order]
        grad_d = F.embedding_bag(row, q.view(-1, E).to(dtype), begin_T, mode="sum", per_sample_weights=weight).to(d.dtype)
    return grad_q, grad_d


# ---- Autograd --------------------------------------------------------------------------------------------------------


class _MaxSim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, d, offsets, q_mask, paired, save, max_length, backend):
        ctx.paired, ctx.backend = paired, backend
        forward = _triton_forward if backend == "triton" else _blockwise_forward
        scores, winners = forward(q, d, offsets, q_mask, paired, save, max_length)
        ctx.save_for_backward(q, d, offsets, q_mask, winners)
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_scores):
        backward = _triton_backward if ctx.backend == "triton" else _blockwise_backward
        return *backward(grad_scores.contiguous(), *ctx.saved_tensors, ctx.paired, ctx.needs_input_grad[:2]), *[None] * 6


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, teacher, pairs, pair_probs, positive, options):
        losses, grad = _triton_head(scores, teacher, pairs, pair_probs, positive, options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, teacher, pairs, pair_probs, positive, grad)
        ctx.options = options
        return tuple(map(torch.clone, losses))  # not views, which could not be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, *grad_terms):
        *inputs, grad = ctx.saved_tensors
        grad_scores = None if grad_total is None else grad_total * grad
        for i, grad_term in enumerate(grad_terms):  # rare: somebody looks at one term's gradient
            if grad_term is not None:
                only_this = tuple(float(i == j) for j in range(3))
                grad_of_term = grad_term * _triton_head(*inputs, ctx.options, only_this)[1]
                grad_scores = grad_of_term if grad_scores is None else grad_scores + grad_of_term
        return grad_scores, None, None, None, None, None


class _Objective(torch.autograd.Function):
    """MaxSim, the losses and their gradient in the scores; the backward pass starts from that gradient."""

    @staticmethod
    def forward(ctx, q, d, offsets, q_mask, teacher, pairs, pair_probs, positive, options, paired, save, max_length,
                backend):
        if backend == "triton":
            scores, winners = _triton_forward(q, d, offsets, q_mask, paired, save, max_length)
            losses, grad = _triton_head(scores, teacher, pairs, pair_probs, positive, options)
        else:
            scores, winners = _blockwise_forward(q, d, offsets, q_mask, paired, save, max_length)
            with torch.set_grad_enabled(save):
                losses = _losses_eager(scores.requires_grad_(save), teacher, pairs, pair_probs, positive, options)
                grad = torch.autograd.grad(losses.total, scores)[0] if save else None
            losses = torch.stack(losses).detach()
        ctx.save_for_backward(q, d, offsets, q_mask, winners, grad)
        ctx.paired, ctx.backend = paired, backend
        total, *terms = map(torch.clone, losses)
        ctx.mark_non_differentiable(*terms)
        return total, *terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, *_):
        *inputs, grad = ctx.saved_tensors
        backward = _triton_backward if ctx.backend == "triton" else _blockwise_backward
        return *backward(grad_total * grad, *inputs, ctx.paired, ctx.needs_input_grad[:2]), *[None] * 11


# ---- What other files call -------------------------------------------------------------------------------------------


def maxsim(q: Tensor, d: Tensor, offsets: Tensor, q_mask: Tensor | None = None, backend: str = "auto", *,
           max_length: int | None = None) -> Tensor:
    """Scores of every query with every passage, float32 [B, N]; differentiable once in q and d (twice by "eager" alone).

    q [B, Q, E], d [T, E]: float32, float16 or bfloat16, sums in float32. Where the backend is not triton they may be float64,
    and so are the sums.
    offsets int32 [N + 1], from 0 to T, which on a GPU is not checked: passage n is d[offsets[n]:offsets[n + 1]]; an empty one
    scores 0, with zero gradient. One with a NaN scores NaN.
    q_mask bool [B, Q]: False adds 0 to the score. A tie goes to the lowest token.
    max_length: a bound on the passages' lengths, where the caller knows one (else T is): the saved winners take 1, 2 or
    4 bytes each by it, and a passage that breaks it scores NaN (torch: ValueError; eager has no use for it).
    backend: "triton" (CUDA, or TRITON_INTERPRET=1), "torch" (blockwise; on CUDA it synchronizes), "eager" (the
    reference), "auto" (triton on CUDA where it can, else torch).
    """
    return _maxsim(q, d, offsets, q_mask, backend, max_length, paired=False)


def maxsim_paired(q: Tensor, d: Tensor, offsets: Tensor, q_mask: Tensor | None = None, backend: str = "auto", *,
                  max_length: int | None = None) -> Tensor:
    """Scores of every query with its own block, float32 [B, K]: passage n belongs to query n // K. Else as maxsim."""
    return _maxsim(q, d, offsets, q_mask, backend, max_length, paired=True)


def _maxsim(q: Tensor, d: Tensor, offsets: Tensor, q_mask: Tensor | None, backend: str, max_length: int | None,
            paired: bool) -> Tensor:
    _check_maxsim(q, d, offsets, q_mask, max_length, paired)
    backend = _choose(backend, q)
    with torch.autocast(q.device.type, enabled=False):  # similarities are what bfloat16 inputs make them, no less
        if backend == "eager":
            return maxsim_eager(q, d, offsets, q_mask, paired)
        return _MaxSim.apply(*_contiguous(q, d, offsets, q_mask), paired, _wants_grad(q, d), max_length, backend)


def _wants_grad(q: Tensor, d: Tensor) -> bool:
    """Whether a backward pass can follow; inside an autograd function one cannot tell under torch.no_grad."""
    return torch.is_grad_enabled() and (q.requires_grad or d.requires_grad)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The kernels take sizes for strides."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def pairdistill_loss(scores: Tensor, teacher: Tensor, pairs: Tensor, pair_probs: Tensor, positive: Tensor | None = None,
                     *, tau: float = 1.0, lambda_kd: float = 1.0, lambda_pair: float = 3.0,
                     pair_reduction: str = "mean", backend: str = "auto", first_query: int = 0,
                     n_queries: int | None = None, n_labelled: int | None = None, n_pairs: int | None = None) -> Losses:
    """L = L_CL + lambda_kd L_KD + lambda_pair L_pair (section 4.2), differentiable in scores.

    scores [B, K], each query with its own block, or [B, width], with the blocks of all queries of the global batch, in
    their order; then this rank's queries are first_query to first_query + B - 1, and columns outside the own block are
    L_CL's negatives. In [B, K], and so where there is one query in all, the rest of the own block is. teacher [B, K]: pointwise
    scores of the own block, in any order. pairs int [B, P, 2]: positions (i, j) in it, -1 twice for padding. pair_probs
    [B, P]: P(d_i > d_j | q). positive int [B]: the labelled positive's position, -1 where there is none.
    n_queries, n_labelled, n_pairs: counts over the global batch that the means divide by (None: this batch's own), so
    that the ranks' losses add up to the global batch's. pair_reduction "mean": over all pairs; "sum": over a query's
    pairs, then the mean over queries.
    """
    options = LossOptions(tau, lambda_kd, lambda_pair, pair_reduction, first_query, n_queries, n_labelled, n_pairs)
    _expect_tensor("scores", scores, "float", ("B", "width"), getattr(scores, "device", None))
    _check_losses(scores.shape[1], teacher, pairs, pair_probs, positive, options, len(scores), scores.device)
    scores = scores.to(_sum_dtype(scores.dtype))
    if _choose(backend, scores) == "triton":
        return Losses(*_Head.apply(scores, teacher, pairs, pair_probs, positive, options))
    return _losses_eager(scores, teacher, pairs, pair_probs, positive, options)


def pairdistill_objective(q: Tensor, d: Tensor, offsets: Tensor, teacher: Tensor, pairs: Tensor, pair_probs: Tensor,
                          positive: Tensor | None = None, q_mask: Tensor | None = None, *, in_batch: bool = True,
                          tau: float = 1.0, lambda_kd: float = 1.0, lambda_pair: float = 3.0,
                          pair_reduction: str = "mean", backend: str = "auto", first_query: int = 0,
                          n_queries: int | None = None, n_labelled: int | None = None, n_pairs: int | None = None,
                          max_length: int | None = None) -> Losses:
    """pairdistill_loss of maxsim (in_batch) or maxsim_paired, as one autograd function: what training calls.

    Its total is differentiable in q and d; cl, kd and pair are there to be looked at (with backend "eager", all are).
    """
    options = LossOptions(tau, lambda_kd, lambda_pair, pair_reduction, first_query, n_queries, n_labelled, n_pairs)
    _check_maxsim(q, d, offsets, q_mask, max_length, paired=not in_batch)
    width = _scores_shape(len(q), len(offsets) - 1, not in_batch)[1]
    _check_losses(width, teacher, pairs, pair_probs, positive, options, len(q), q.device)
    backend = _choose(backend, q)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "eager":
            scores = maxsim_eager(q, d, offsets, q_mask, not in_batch)
            return _losses_eager(scores, teacher, pairs, pair_probs, positive, options)
        return Losses(*_Objective.apply(*_contiguous(q, d, offsets, q_mask), teacher, pairs, pair_probs, positive,
                                        options, not in_batch, _wants_grad(q, d), max_length, backend))


# ---- The boundary: one sentence for each thing that can be wrong -----------------------------------------------------
# Values are not looked at on a GPU, which would have to finish first what it is doing.

BACKENDS = ("auto", "triton", "torch", "eager")
TRITON_MAX_DIM = 1024


def _expect(holds: bool | Tensor, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _expect_tensor(name: str, tensor: Tensor, kind: str, shape: tuple, device: torch.device) -> None:
    """kind: a dtype's name, "float" or "int"; a string in shape names an axis of any size."""
    _expect(isinstance(tensor, Tensor), f"{name} must be a tensor, got a {type(tensor).__name__}")
    dtype = str(tensor.dtype).removeprefix("torch.")
    kinds = {"float": ("float32", "float16", "bfloat16", "float64"), "int": ("int64", "int32", "int16", "int8")}
    sizes_fit = len(shape) == tensor.dim() and all(isinstance(n, str) or n == m for n, m in zip(shape, tensor.shape))
    if not (sizes_fit and dtype in kinds.get(kind, (kind,)) and tensor.device == device):
        wanted, got = (f"[{', '.join(map(str, sizes))}]" for sizes in (shape, tensor.shape))
        raise ValueError(f"{name} must be {kind} {wanted} on {device}, got {dtype} {got} on {tensor.device}")


def _choose(backend: str, tensor: Tensor) -> str:
    _expect(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    fits = tensor.dtype != torch.float64 and (tensor.dim() == 2 or tensor.shape[-1] <= _max_dim(tensor))
    if backend == "auto":
        return "triton" if triton is not None and tensor.is_cuda and fits else "torch"
    if backend == "triton":
        _expect(triton is not None, "backend='triton' needs the package triton (for Linux), which is not installed")
        _expect(tensor.is_cuda or INTERPRETED.value, "backend='triton' needs tensors on a CUDA device, or "
                f"TRITON_INTERPRET=1 in the environment before Python starts, got tensors on {tensor.device}")
        _expect(fits, f"backend='triton' takes no float64, and here dim up to {_max_dim(tensor)}, "
                f"got {tensor.dtype} {list(tensor.shape)}")
    return backend


def _max_dim(tensor: Tensor) -> int:
    """A tile holds whole rows; those of more than 512 dimensions in float32 take 128 KB of shared memory."""
    if tensor.is_cuda and tensor.element_size() == 4:
        room = torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
        return TRITON_MAX_DIM if room >= 128 << 10 else TRITON_MAX_DIM // 2
    return TRITON_MAX_DIM


def _check_maxsim(q: Tensor, d: Tensor, offsets: Tensor, q_mask: Tensor | None, max_length: int | None, paired: bool) -> None:
    _expect_tensor("q", q, "float", ("B", "Lq", "dim"), getattr(q, "device", None))
    _expect_tensor("d", d, str(q.dtype).removeprefix("torch."), ("T", q.shape[2]), q.device)
    _expect_tensor("offsets", offsets, "int32", ("N + 1",), q.device)
    if q_mask is not None:
        _expect_tensor("q_mask", q_mask, "bool", tuple(q.shape[:2]), q.device)
    B, N = len(q), len(offsets) - 1
    _expect(q.shape[2] > 0, "q and d must have dimensions, got none")
    _expect(max_length is None or max_length >= 0, f"max_length must be 0 or more, got {max_length}")
    _expect(N >= 0, "offsets must hold one number more than there are passages, got none")
    _expect(not paired or N == 0 or (B > 0 and N % B == 0),
            f"each query needs the same number of passages, got {N} for {B} queries")
    if not q.is_cuda:
        _expect(offsets[0] == 0 and offsets[-1] == len(d) and (offsets.diff() >= 0).all(),
                f"offsets must begin with 0, never fall and end with d's {len(d)} rows")


def _check_losses(width: int, teacher: Tensor, pairs: Tensor, pair_probs: Tensor, positive: Tensor | None,
                  options: LossOptions, B: int, device: torch.device) -> None:
    """B queries with width scores each, on device."""
    _expect_tensor("teacher", teacher, "float", (B, "K"), device)
    _expect_tensor("pairs", pairs, "int", (B, "P", 2), device)
    _expect_tensor("pair_probs", pair_probs, "float", tuple(pairs.shape[:2]), device)
    if positive is not None:
        _expect_tensor("positive", positive, "int", (B,), device)
    K, first = teacher.shape[1], options.first_query
    _expect(K > 0 and (width == K or (width % K == 0 and 0 <= first and (first + B) * K <= width)),
            f"scores must be {K} wide (the own block) or {K} times the number of all queries, of which these are "
            f"{first} to {first + B - 1}, got {width}")
    for name in ("n_queries", "n_labelled", "n_pairs"):
        count = getattr(options, name)
        _expect(count is None or count >= 0, f"{name} must be 0 or more, got {count}")
    _expect(options.tau > 0, f"tau must be more than 0, got {options.tau}")
    _expect(options.pair_reduction in ("mean", "sum"),
            f"pair_reduction must be 'mean' or 'sum', got {options.pair_reduction!r}")
    if device.type == "cpu":
        padding_BP = (pairs == -1).all(-1)
        _expect((padding_BP | ((pairs >= 0) & (pairs < K)).all(-1)).all(),
                f"pairs must lie in 0 to {K - 1}, or be -1 twice")
        _expect((padding_BP | ((pair_probs >= 0) & (pair_probs <= 1))).all(), "pair_probs must lie between 0 and 1")
        _expect(positive is None or ((positive >= -1) & (positive < K)).all(), f"positive must lie in -1 to {K - 1}")
