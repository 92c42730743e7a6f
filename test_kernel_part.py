"""Tests of maxsim_kernel.py. Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for
before they are imported."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import maxsim_kernel
from maxsim_kernel import maxsim, maxsim_paired, pairdistill_loss, pairdistill_objective

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["eager", "torch"]
if maxsim_kernel.triton is not None:
    # The interpreter of Triton 3.6 does not get on with NumPy 2.4.
    versions = [[int(x) for x in module.__version__.split(".")[:2]] for module in (maxsim_kernel.triton, np)]
    if DEVICE == "cuda" or versions[0] >= [3, 7] or versions[1] < [2, 4]:
        BACKENDS.append("triton")
LAYOUTS = pytest.mark.parametrize("paired", [False, True], ids=["all_pairs", "own_block"])
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
# Largest error allowed, relative to the largest value: (scores, each gradient).
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 1e-2),
             torch.float16: (2e-3, 2e-3)}


# ---- maxsim_kernel.py: MaxSim ----------------------------------------------------------------------------------------


def ragged(lengths, B, Q, E, dtype=torch.float32, seed=0, masked=False):
    """Random q, d, offsets and q_mask."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    q = torch.randn(B, Q, E, generator=generator).to(dtype)
    d = torch.randn(int(offsets[-1]), E, generator=generator).to(dtype)
    q_mask = torch.rand(B, Q, generator=generator) < 0.7 if masked else None
    return [None if x is None else x.to(DEVICE) for x in (q, d, offsets, q_mask)]


def maxsim_numpy(q, d, offsets, q_mask, paired, upstream):
    """Scores and both gradients by the definition, in float64."""
    q, d, upstream = (x.double().cpu().numpy() for x in (q, d, upstream))
    B, N = len(q), len(offsets) - 1
    scores, grad_q, grad_d = np.zeros(upstream.shape), np.zeros_like(q), np.zeros_like(d)
    for b in range(B):
        for column in range(upstream.shape[1]):
            n = b * (N // B) + column if paired else column
            start, end = offsets[n], offsets[n + 1]
            for i in range(q.shape[1] if end > start else 0):
                if q_mask is None or q_mask[b, i]:
                    t = start + int(np.argmax(d[start:end] @ q[b, i]))  # argmax: the lowest of a tie
                    scores[b, column] += d[t] @ q[b, i]
                    grad_q[b, i] += upstream[b, column] * d[t]
                    grad_d[t] += upstream[b, column] * q[b, i]
    return scores, grad_q, grad_d


def scores_and_gradients(q, d, offsets, q_mask, paired, backend, upstream=None):
    q, d = q.clone().requires_grad_(), d.clone().requires_grad_()
    scores = (maxsim_paired if paired else maxsim)(q, d, offsets, q_mask, backend)
    if upstream is None:
        upstream = torch.linspace(-2, 3, scores.numel(), device=scores.device).view_as(scores)
    return [scores.detach(), *torch.autograd.grad(scores, (q, d), upstream.to(scores.dtype)), upstream]


def assert_agrees_with_float64(q, d, offsets, q_mask, paired, backend):
    *got, upstream = scores_and_gradients(q, d, offsets, q_mask, paired, backend)
    assert got[0].dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    for x, like in zip(got[1:], (q, d)):
        assert x.dtype == like.dtype and x.shape == like.shape
    truth, (of_scores, of_gradient) = maxsim_numpy(q, d, offsets.cpu(), q_mask, paired, upstream), TOLERANCE[q.dtype]
    for x, true, tolerance in zip(got, truth, (of_scores, of_gradient, of_gradient)):
        error = np.abs(x.double().cpu().numpy() - true).max(initial=0)
        assert error <= tolerance * max(np.abs(true).max(initial=0), 1e-3)


def test_maxsim_of_two_queries_and_three_passages_by_hand():
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [-1.0, 0.0]]], device=DEVICE)
    d = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, -1.0], [-2.0, -1.0]], device=DEVICE)  # passages of 2, 0, 2 tokens
    offsets = torch.tensor([0, 2, 2, 4], dtype=torch.int32, device=DEVICE)
    # Query 0: max(1, 3) + max(2, 0) = 5; empty; max(0, -2) + max(-1, -1) = -1.
    # Query 1: max(3, 3) + max(-1, -3) = 2; empty; max(-1, -3) + max(0, 2) = 1.
    upstream = torch.tensor([[1.0, 10, 100], [0, 0, 2]], device=DEVICE)
    for backend in BACKENDS:
        scores, grad_q, grad_d, _ = scores_and_gradients(q, d, offsets, None, False, backend, upstream)
        assert scores.tolist() == [[5, 0, -1], [2, 0, 1]]
        # The ties (query 0's second token in the last passage, query 1's first in the first) go to the first token.
        assert grad_q.tolist() == [[[3 + 0, 0 - 100], [1 + 0, 2 - 100]], [[0, -2], [-4, -2]]]
        assert grad_d.tolist() == [[0, 1], [1, 0], [100 + 2, 100 + 2], [-2, 0]]


@LAYOUTS
@EVERY_BACKEND
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_maxsim_and_both_gradients_agree_with_float64(dtype, backend, paired):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton computes in float32")
    assert_agrees_with_float64(*ragged([7, 0, 64, 65, 1, 130], 3, 5, 24, dtype, masked=True), paired, backend)


@EVERY_BACKEND
@pytest.mark.parametrize("B, Q, E, lengths, paired", [
    (1, 1, 1, [1], False), (1, 1, 1, [], False), (2, 3, 8, [0, 0], False), (5, 1, 16, [1] * 5, True),
    (7, 1, 40, [1, 2, 0], False), (2, 33, 16, [63, 64], True), (5, 31, 16, [3, 67], False),
    (1, 130, 16, [70, 2], True), (1, 512, 16, [5], False), (2, 4, 300, [9, 33], False),
], ids=str)
def test_maxsim_at_the_edges_of_its_tiles(B, Q, E, lengths, paired, backend):
    assert_agrees_with_float64(*ragged(lengths, B, Q, E, masked=Q > 2), paired, backend)


@pytest.mark.parametrize("seed", range(200))
def test_triton_and_blockwise_agree_with_float64_on_random_ragged_batches(seed):
    rng = np.random.default_rng(seed)
    B, Q, K, paired = rng.integers(1, 5), rng.integers(1, 8), rng.integers(1, 4), bool(rng.integers(2))
    lengths = rng.integers(0, rng.choice([2, 20, 80, 301]), B * K if paired else rng.integers(0, 6))
    dtype = [torch.float32, torch.bfloat16][seed % 2]
    E, masked = int(rng.choice([3, 16, 32, 50])), bool(rng.integers(2))
    q, d, offsets, q_mask = ragged(lengths, B, Q, E, dtype, seed, masked)
    kind = seed % 5
    if kind == 1:  # exact ties: a few small integers
        q, d = q.sign(), d.round().clamp(-1, 1)
    elif kind == 2:  # duplicated tokens, in quarters, so that no order of summation rounds one of the two
        q, d = (4 * q).round() / 4, (4 * d[torch.arange(len(d), device=DEVICE) // 2 * 2]).round() / 4
    elif kind == 3:  # every similarity negative
        q, d = q.abs() + 0.1, -d.abs() - 0.1
    for backend in BACKENDS[1:]:
        assert_agrees_with_float64(q, d, offsets, q_mask, paired, backend)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_triton_and_blockwise_choose_the_same_winners_at_ties():
    q, d, offsets, _ = ragged([130, 3, 64, 0, 9], 3, 6, 16, seed=5)
    q, d = q.sign(), d.sign()
    forwards = maxsim_kernel._triton_forward, maxsim_kernel._blockwise_forward
    winners = [forward(q, d, offsets, None, False, True, 130)[1] for forward in forwards]
    assert winners[0].dtype == winners[1].dtype == torch.uint8
    filled = offsets.diff() > 0  # an empty passage has no winner
    assert torch.equal(winners[0][filled], winners[1][filled])


@LAYOUTS
@EVERY_BACKEND
def test_a_masked_query_token_scores_as_if_it_were_not_there(backend, paired):
    q, d, offsets, _ = ragged([5, 8, 0, 70], 2, 6, 16)
    q_mask = torch.tensor([True, False, True, True, False, False], device=DEVICE)
    full = scores_and_gradients(q, d, offsets, q_mask.expand(2, -1), paired, backend)
    kept = scores_and_gradients(q[:, q_mask], d, offsets, None, paired, backend)
    torch.testing.assert_close(full[0], kept[0])
    torch.testing.assert_close(full[1][:, q_mask], kept[1])
    torch.testing.assert_close(full[2], kept[2])
    assert (full[1][:, ~q_mask] == 0).all()


@EVERY_BACKEND
def test_permuting_passages_permutes_scores_and_gradients(backend):
    lengths, order = [5, 0, 70, 33], [2, 3, 0, 1]
    q, d, offsets, _ = ragged(lengths, 3, 4, 16)
    tokens = torch.cat([torch.arange(offsets[n], offsets[n + 1]) for n in order]).to(DEVICE)
    permuted_offsets = torch.tensor([0, *(lengths[n] for n in order)], device=DEVICE).cumsum(0).int()
    scores, grad_q, grad_d, upstream = scores_and_gradients(q, d, offsets, None, False, backend)
    permuted = scores_and_gradients(q, d[tokens], permuted_offsets, None, False, backend, upstream[:, order])
    torch.testing.assert_close(permuted[0], scores[:, order])
    torch.testing.assert_close(permuted[1], grad_q)
    torch.testing.assert_close(permuted[2], grad_d[tokens])


@LAYOUTS
@EVERY_BACKEND
def test_two_runs_give_the_same_bits(backend, paired):
    batch = ragged([40, 77, 3, 0, 12, 200], 3, 5, 32)
    first, second = (scores_and_gradients(*batch, paired, backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_scaled_loss_does_not_overflow_float16(backend):
    q, d, offsets, _ = ragged([9, 70], 2, 3, 16, torch.float16)
    q, d = q / 1000, d / 1000
    *_, upstream = scores_and_gradients(q, d, offsets, None, False, backend)
    got = scores_and_gradients(q, d, offsets, None, False, backend, upstream * 1e6)[1:3]
    true = maxsim_numpy(q, d, offsets.cpu(), None, False, upstream * 1e6)[1:]
    for x, y in zip(got, true):
        np.testing.assert_allclose(x.double().cpu().numpy(), y, rtol=0, atol=2e-3 * np.abs(y).max())


def test_a_passage_longer_than_it_was_said_to_be_does_not_go_unnoticed():
    q, d, offsets, _ = ragged([4, 9], 2, 3, 16)
    with pytest.raises(ValueError, match="max_length is 8, but a passage has 9 tokens"):
        maxsim(q, d, offsets, None, "torch", max_length=8)
    if "triton" in BACKENDS:
        assert maxsim(q, d, offsets, None, "triton", max_length=8).isnan().tolist() == [[False, True]] * 2


@EVERY_BACKEND
def test_autocast_does_not_round_the_similarities(backend):
    batch = ragged([5, 70], 2, 3, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = maxsim(*batch, backend)
    assert torch.equal(inside, maxsim(*batch, backend))


@LAYOUTS
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_gradients_of_maxsim_are_those_of_finite_differences(backend, paired):
    q, d, offsets, q_mask = ragged([3, 0, 5, 2], 2, 3, 4, torch.float64, masked=True)
    inputs, function = (q.requires_grad_(), d.requires_grad_()), maxsim_paired if paired else maxsim
    assert torch.autograd.gradcheck(lambda q, d: function(q, d, offsets, q_mask, backend), inputs)


# ---- maxsim_kernel.py: losses ----------------------------------------------------------------------------------------


def losses_numpy(scores, teacher, pairs, pair_probs, positive, tau, lambda_kd, lambda_pair, pair_reduction):
    """Sections 3.1, 3.3 and 4.2 of the paper, written out in float64."""
    scores, teacher, pair_probs = (x.detach().double().cpu().numpy() for x in (scores, teacher, pair_probs))
    B, K = teacher.shape
    cl, kd, pair, n_pairs = [], 0.0, 0.0, 0
    for b in range(B):
        first = b * K if scores.shape[1] != K else 0
        own = scores[b, first : first + K]
        if positive is not None and positive[b] >= 0:
            in_batch = scores.shape[1] != K
            negatives = np.delete(scores[b], range(first, first + K)) if in_batch else np.delete(own, positive[b])
            cl.append(-np.log(np.exp(own[positive[b]]) / (np.exp(own[positive[b]]) + np.exp(negatives).sum())))
        student = np.exp(own) / np.exp(own).sum()
        point = np.exp(teacher[b] / tau) / np.exp(teacher[b] / tau).sum()
        kd += (point[point > 0] * np.log(point[point > 0] / student[point > 0])).sum() / B
        for (i, j), p in zip(pairs[b].tolist(), pair_probs[b]):
            if i >= 0:
                n_pairs += 1
                ours = np.exp(own[i]) / (np.exp(own[i]) + np.exp(own[j]))
                pair += sum(t * np.log(t / s) for t, s in ((p, ours), (1 - p, 1 - ours)) if t > 0)
    cl = np.mean(cl) if cl else 0.0
    pair /= B if pair_reduction == "sum" else max(n_pairs, 1)
    return [cl + lambda_kd * kd + lambda_pair * pair, cl, kd, pair]


def loss_batch(B=4, K=5, P=7, in_batch=True, seed=0, dtype=torch.float64):
    """A mixed batch: query 1 has no label, query 2 no pairs, and some probabilities are exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(B, B * K if in_batch else K, generator=generator, dtype=dtype)
    teacher = 4 * torch.randn(B, K, generator=generator, dtype=dtype)
    pairs = torch.stack([torch.randperm(K, generator=generator)[:2] for _ in range(B * P)]).view(B, P, 2)
    pair_probs = torch.rand(B, P, generator=generator, dtype=dtype)
    pair_probs[0, :2] = torch.tensor([0, 1])
    pairs[2], pairs[3:, 4:] = -1, -1
    positive = torch.randint(0, K, (B,), generator=generator)
    positive[1] = -1
    return [x.to(DEVICE) for x in (scores, teacher, pairs, pair_probs, positive)]


IN_BATCH = pytest.mark.parametrize("in_batch", [True, False], ids=["in_batch", "own_block"])


@IN_BATCH
@EVERY_BACKEND
@pytest.mark.parametrize("pair_reduction", ["mean", "sum"])
@pytest.mark.parametrize("labels", ["labelled", "unlabelled", "mixed", "none given"])
def test_losses_agree_with_the_papers_formulas(labels, pair_reduction, backend, in_batch):
    scores, teacher, pairs, pair_probs, positive = loss_batch(in_batch=in_batch)
    positive = {"labelled": positive.clamp(min=0), "unlabelled": positive.clamp(max=-1), "mixed": positive}.get(labels)
    options = dict(tau=0.7, lambda_kd=0.5, lambda_pair=2.0, pair_reduction=pair_reduction)
    given = scores.float() if backend == "triton" else scores
    got = pairdistill_loss(given, teacher, pairs, pair_probs, positive, backend=backend, **options)
    true = losses_numpy(scores, teacher, pairs, pair_probs, positive, **options)
    np.testing.assert_allclose([x.item() for x in got], true, rtol=2e-6 if backend == "triton" else 1e-12, atol=1e-12)
    assert labels in ("labelled", "mixed") or got.cl == 0


def test_losses_of_two_queries_and_three_passages_by_hand():
    log = np.log
    scores = torch.tensor([[log(2), 0, 0], [0, log(3), 0]], device=DEVICE).float()  # softmax .5 .25 .25 and .2 .6 .2
    teacher = torch.tensor([[0, 0, 0], [0, log(3), 0]], device=DEVICE).float()  # 1/3 1/3 1/3 and .2 .6 .2
    pairs = torch.tensor([[[0, 1], [2, 1]], [[1, 2], [-1, -1]]], device=DEVICE)
    pair_probs = torch.tensor([[1.0, 0.5], [0.0, 0.0]], device=DEVICE)  # the student's: 2/3, 1/2 and 3/4
    positive = torch.tensor([0, -1], device=DEVICE)
    for backend in BACKENDS:
        losses = pairdistill_loss(scores, teacher, pairs, pair_probs, positive, backend=backend)
        assert losses.cl.item() == pytest.approx(log(2), rel=1e-6)
        assert losses.kd.item() == pytest.approx((log(2 / 3) + 2 * log(4 / 3)) / 3 / 2, rel=1e-5)
        assert losses.pair.item() == pytest.approx((log(3 / 2) + 0 + log(4)) / 3, rel=1e-6)
        assert losses.total.item() == pytest.approx((losses.cl + losses.kd + 3 * losses.pair).item())


@IN_BATCH
@pytest.mark.parametrize("pair_reduction", ["mean", "sum"])
def test_gradients_of_the_losses_are_those_of_finite_differences(pair_reduction, in_batch):
    scores, *rest = loss_batch(in_batch=in_batch)
    options = dict(tau=0.7, pair_reduction=pair_reduction)
    assert torch.autograd.gradcheck(lambda s: tuple(pairdistill_loss(s, *rest, **options)), (scores.requires_grad_(),))


@IN_BATCH
@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize("K, P", [(5, 7), (1, 0), (64, 50), (33, 130)])
def test_the_fused_head_agrees_with_eager_in_every_loss_and_gradient(K, P, in_batch):
    scores, *rest = loss_batch(K=max(K, 2), P=max(P, 5), in_batch=in_batch, dtype=torch.float32)
    if K == 1:  # nothing to compare
        scores = scores[:, ::2].contiguous()
        rest = [rest[0][:, :1], rest[1][:, :0], rest[2][:, :0], rest[3].clamp(max=0)]
    scores.requires_grad_()
    for upstream in [(1.7, 0, 0, 0), (0, 1, -2, 3), (2, 0, 0, 0.5)]:
        got = []
        for backend in ("eager", "triton"):
            losses = pairdistill_loss(scores, *rest, tau=1.3, backend=backend)
            weighted = sum(weight * loss for weight, loss in zip(upstream, losses) if weight)
            got.append([*losses, torch.autograd.grad(weighted, scores)[0]])
        for x, y in zip(*got):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@EVERY_BACKEND
def test_extreme_scores_and_probabilities_keep_finite_gradients(backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(dtype=torch.float32)
    scores = (100 * scores).requires_grad_()
    losses = pairdistill_loss(scores, 1000 * teacher, pairs, pair_probs.round(), positive, backend=backend)
    (grad,) = torch.autograd.grad(losses.total, scores)
    assert all(x.isfinite() for x in losses) and grad.isfinite().all()


@EVERY_BACKEND
@pytest.mark.parametrize("pair_reduction", ["mean", "sum"])
def test_the_ranks_losses_and_gradients_add_up_to_the_global_batchs(pair_reduction, backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(B=5, dtype=torch.float32)
    scores.requires_grad_()
    batch = scores, teacher, pairs, pair_probs, positive
    options = dict(pair_reduction=pair_reduction, backend=backend)
    whole = pairdistill_loss(*batch, **options)
    options |= dict(n_queries=5, n_labelled=int((positive >= 0).sum()), n_pairs=int((pairs[..., 0] >= 0).sum()))
    parts = slice(0, 2), slice(2, 3), slice(3, 5)  # the second rank has no pair
    ranks = [pairdistill_loss(*(x[part] for x in batch), first_query=part.start, **options) for part in parts]
    for term, sums in zip(whole, zip(*ranks)):
        torch.testing.assert_close(sum(sums), term)
    totals, upstream = (whole.total, sum(rank.total for rank in ranks)), torch.tensor(1.5, device=DEVICE)
    grads = [torch.autograd.grad(total, scores, upstream)[0] for total in totals]
    torch.testing.assert_close(*grads)


@EVERY_BACKEND
def test_permuting_a_querys_passages_changes_no_loss(backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(B=3, K=4, in_batch=False, dtype=torch.float32)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)  # new position k holds the old order[k]
    new_position = order.argsort()
    moved_pairs = torch.where(pairs >= 0, new_position[pairs.clamp(min=0)], -1)
    moved_positive = torch.where(positive >= 0, new_position[positive.clamp(min=0)], -1)
    moved = scores[:, order], teacher[:, order], moved_pairs, pair_probs, moved_positive
    before = pairdistill_loss(scores, teacher, pairs, pair_probs, positive, backend=backend)
    after = pairdistill_loss(*moved, backend=backend)
    torch.testing.assert_close(tuple(before), tuple(after))


@EVERY_BACKEND
def test_a_swapped_pair_is_the_same_as_one_minus_its_probability(backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(dtype=torch.float32)
    scores.requires_grad_()
    results = []
    for args in ((pairs, pair_probs), (pairs.flip(-1), 1 - pair_probs)):
        losses = pairdistill_loss(scores, teacher, *args, positive, backend=backend)
        results.append((losses.pair.detach(), torch.autograd.grad(losses.total, scores)[0]))
    torch.testing.assert_close(*results)


@EVERY_BACKEND
def test_columns_of_the_own_hard_negatives_are_no_negatives_of_the_contrastive_loss(backend):
    scores, teacher, pairs, pair_probs, positive = loss_batch(dtype=torch.float32)
    scores.requires_grad_()
    losses = pairdistill_loss(scores, teacher, pairs, pair_probs, positive, backend=backend)
    (grad,) = torch.autograd.grad(losses.cl, scores)
    K = teacher.shape[1]
    for b, label in enumerate(positive.tolist()):
        own = grad[b, b * K : (b + 1) * K]
        assert (grad[b] != 0).sum() == (0 if label < 0 else grad.shape[1] - K + 1) and (label < 0 or own[label] < 0)


# ---- maxsim_kernel.py: the objective, and its boundary ---------------------------------------------------------------


@IN_BATCH
@EVERY_BACKEND
def test_the_objective_is_the_loss_of_maxsim(backend, in_batch):
    B, K = 3, 4
    q, d, offsets, q_mask = ragged([5, 0, 70, 1, 2, 3, 4, 9, 12, 33, 0, 8], B, 5, 16, masked=True)
    q, d = q.requires_grad_(), d.requires_grad_()
    _, *rest = loss_batch(B, K, dtype=torch.float32)
    options = dict(tau=0.8, lambda_pair=2.0, pair_reduction="sum")
    fused = pairdistill_objective(q, d, offsets, *rest, q_mask=q_mask, in_batch=in_batch, backend=backend, **options)
    scores = (maxsim if in_batch else maxsim_paired)(q, d, offsets, q_mask, "eager")
    composed = pairdistill_loss(scores, *rest, backend="eager", **options)
    torch.testing.assert_close(tuple(fused), tuple(composed), rtol=1e-5, atol=1e-6)
    upstream = torch.tensor(-1.7, device=DEVICE)
    for x, y in zip(*(torch.autograd.grad(losses.total, (q, d), upstream) for losses in (fused, composed))):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_objective_is_that_of_finite_differences():
    q, d, offsets, _ = ragged([2, 0, 3, 1], 2, 2, 3, torch.float64)
    _, *rest = loss_batch(B=4, K=2)
    rest = [x[:2] for x in rest]
    inputs = q.requires_grad_(), d.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, d: pairdistill_objective(q, d, offsets, *rest).total, inputs)


@pytest.mark.parametrize("change, message", [
    (dict(q=torch.zeros(2, 3)), r"q must be float \[B, Lq, dim\]"),
    (dict(q=torch.zeros(2, 3, 4, dtype=torch.int32)), "q must be float"),
    (dict(d=torch.zeros(6, 5)), r"d must be float32 \[T, 4\] on cpu, got float32 \[6, 5\]"),
    (dict(d=torch.zeros(6, 4, dtype=torch.float16)), "d must be float32"),
    (dict(offsets=torch.tensor([0, 2, 6])), "offsets must be int32"),
    (dict(offsets=torch.tensor([0, 2, 5], dtype=torch.int32)), "offsets must .* end with d's 6 rows"),
    (dict(offsets=torch.tensor([0, 7, 6], dtype=torch.int32)), "never fall"),
    (dict(offsets=torch.tensor([0, 1, 2, 6], dtype=torch.int32)), "the same number of passages, got 3 for 2"),
    (dict(q_mask=torch.ones(2, 3)), "q_mask must be bool"),
    (dict(backend="cuda"), "backend must be one of auto, triton, torch, eager"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_maxsim_says_in_one_sentence_what_is_wrong(change, message):
    right = dict(q=torch.zeros(2, 3, 4), d=torch.zeros(6, 4), offsets=torch.tensor([0, 2, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        maxsim_paired(**right | change)


@pytest.mark.parametrize("change, message", [
    (dict(scores=torch.zeros(2, 4)), "scores must be 3 wide"),
    (dict(scores=torch.zeros(2, 6), first_query=1), "of which these are 1 to 2, got 6"),
    (dict(scores=torch.zeros(6)), "scores must be float"),
    (dict(teacher=torch.zeros(3, 3)), "scores must be float"),
    (dict(teacher=torch.zeros(2, 3, dtype=torch.int64)), "teacher must be float"),
    (dict(pairs=torch.zeros(2, 1, 2)), "pairs must be int"),
    (dict(pairs=torch.tensor([[[0, 3]], [[0, 1]]])), "pairs must lie in 0 to 2, or be -1 twice"),
    (dict(pairs=torch.tensor([[[0, -1]], [[0, 1]]])), "pairs must lie"),
    (dict(pair_probs=torch.zeros(2, 2)), "pair_probs must be float"),
    (dict(pair_probs=torch.tensor([[0.5], [1.5]])), "pair_probs must lie between 0 and 1"),
    (dict(positive=torch.zeros(2)), "positive must be int"),
    (dict(positive=torch.tensor([3, 0])), "positive must lie in -1 to 2"),
    (dict(pair_reduction="max"), "pair_reduction must be 'mean' or 'sum'"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_the_loss_says_in_one_sentence_what_is_wrong(change, message):
    right = dict(scores=torch.zeros(2, 3), teacher=torch.zeros(2, 3), pairs=torch.zeros(2, 1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        pairdistill_loss(**right | dict(pair_probs=torch.zeros(2, 1)) | change)


@pytest.mark.parametrize("hide_triton", [False, True], ids=["triton installed", "no triton"])
def test_without_a_gpu_everything_works_on_cpu_tensors_and_triton_says_why_it_cannot(hide_triton):
    program = f"""
import sys
if {hide_triton}: sys.modules["triton"] = None  # import triton then raises ImportError
import torch
from maxsim_kernel import maxsim, pairdistill_objective
q, d, offsets = torch.ones(1, 2, 4, requires_grad=True), torch.ones(3, 4), torch.tensor([0, 1, 3], dtype=torch.int32)
assert maxsim(q, d, offsets).tolist() == [[8, 8]]
losses = pairdistill_objective(q, d, offsets, torch.zeros(1, 2), torch.tensor([[[0, 1]]]), torch.tensor([[.5]]))
losses.total.backward()
try: maxsim(q, d, offsets, backend="triton")
except ValueError as error: print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    hidden = hide_triton or maxsim_kernel.triton is None
    reason = "which is not installed" if hidden else "needs tensors on a CUDA device"
    assert reason in run.stdout and run.stdout.count("\n") == 1
