"""The fused MaxSim against eager PyTorch, torch.compile and, where they are installed, the other fused kernels.

    python bench.py              times every shape, prints a table, writes results/bench.json and results/bench.png
    python bench.py --compile    needs no GPU: compiles every kernel for sm_80, sm_90 and sm_100, and exits with 1 if
                                 one spills registers or does without the tensor cores
    python bench.py --tune       measures the rows of maxsim_kernel.LAUNCH on this GPU, prints the best and writes
                                 results/bench-tune.json

A time is a median with quartiles, over rounds in which the contestants take turns, on inputs that rotate, with the
second-level cache filled with other data before each. "wall" includes Python and the launches; "gpu" is a CUDA graph's replay.
Memory is the peak beyond inputs and gradients. The roofline's share is the least time that the bytes and the arithmetic
need, at the speeds of a large copy and a large matrix product measured in the same run, over the time taken. The errors
(scores, gradients) are those against float64, looked at before anything is timed. The eager contestants get the layout
they like best, passages padded beforehand. On a CPU it is the blockwise path against eager.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import maxsim_kernel as mk

GPU = torch.cuda.is_available()
DEVICE, DTYPE, OURS = ("cuda", torch.bfloat16, "fused") if GPU else ("cpu", torch.float32, "blockwise")
COPIES = 3  # of the inputs, in rotation


class Shape(NamedTuple):
    name: str
    B: int
    K: int  # passages a query
    paired: bool  # own block; else all B queries with all B * K passages
    Q: int = 32
    L: int = 180  # tokens of the longest passage
    E: int = 128
    mean: int | None = None  # of the passages' tokens; None: all have L


SHAPES = [
    Shape("own block 32x64", 32, 64, True), Shape("all pairs 32x2048", 32, 64, False),
    Shape("own block 32x64, ragged", 32, 64, True, mean=77), Shape("all pairs 32x2048, ragged", 32, 64, False, mean=77),
    Shape("micro-batch, own 4x64", 4, 64, True), Shape("micro-batch, all 4x256", 4, 64, False),
    Shape("in-batch 128x128", 128, 1, False), Shape("in-batch 512x512", 512, 1, False),
    Shape("DPR 32x2048", 32, 64, False, Q=1, L=1, E=768), Shape("own block 32x64, L 512", 32, 64, True, L=512),
] if GPU else [
    Shape("all pairs 8x128", 8, 16, False), Shape("all pairs 8x128, ragged", 8, 16, False, mean=77),
    Shape("own block 8x16", 8, 16, True), Shape("DPR 32x512", 32, 16, False, Q=1, L=1, E=768),
]


class Batch:
    """Unit vectors, as ColBERT's are, the passages both ragged (d) and padded (d_NLE), and what the losses read."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int):
        torch.manual_seed(seed)
        N, P = shape.B * shape.K, 50
        length_N = torch.full((N,), shape.L)
        if shape.mean:  # log-normal, as MS MARCO's are
            length_N = (shape.mean * 0.92 * torch.exp(0.42 * torch.randn(N))).round().clamp(8, shape.L).long()
        self.length_N, self.offsets = length_N.int().to(DEVICE), F.pad(length_N.cumsum(0), (1, 0)).int().to(DEVICE)
        self.real_NL = (torch.arange(shape.L) < length_N[:, None]).to(DEVICE)
        self.q = F.normalize(torch.randn(shape.B, shape.Q, shape.E), dim=-1).to(DEVICE, dtype).requires_grad_()
        self.d = F.normalize(torch.randn(int(length_N.sum()), shape.E, device=DEVICE), dim=-1).to(dtype).requires_grad_()
        self.d_NLE = torch.zeros(N, shape.L, shape.E, dtype=dtype, device=DEVICE)
        self.d_NLE[self.real_NL] = self.d.detach()
        self.d_NLE.requires_grad_()
        self.upstream = torch.randn(shape.B, shape.K if shape.paired else N).to(DEVICE)
        pairs = torch.randint(0, shape.K, (shape.B, P, 2))
        losses = torch.randn(shape.B, shape.K), pairs.int(), torch.rand(shape.B, P), torch.zeros(shape.B).int()
        self.losses = [x.to(DEVICE) for x in losses]


# ---- The contestants -------------------------------------------------------------------------------------------------


def ours(shape: Shape) -> Callable[[Batch], Tensor]:
    scores = mk.maxsim_paired if shape.paired else mk.maxsim
    return lambda x: scores(x.q, x.d, x.offsets, max_length=shape.L)


def contestants(shape: Shape) -> dict[str, Callable[[Batch], Tensor]]:
    """{name: scores of a batch}. Ours read its ragged passages, the others its padded ones."""
    def eager(dtype: torch.dtype, x: Batch) -> Tensor:
        return mk.maxsim_padded(x.q, x.d_NLE, x.length_N, None, shape.paired, dtype)

    players = {OURS: ours(shape)}
    if not GPU:
        return players | {"eager": partial(eager, torch.float32)}
    players |= {"eager bfloat16": partial(eager, torch.bfloat16), "eager float32": partial(eager, torch.float32),
                "torch.compile": torch.compile(lambda x: eager(torch.bfloat16, x), dynamic=False)}
    blocks = (shape.B, shape.K) if shape.paired else (shape.B * shape.K,)

    def lik(x: Batch) -> Tensor:
        from late_interaction_kernels import maxsim
        return maxsim(*asked(x.q, x.d_NLE.unflatten(0, blocks)), d_mask=x.real_NL.unflatten(0, blocks) if shape.mean else None)

    def flash(x: Batch) -> Tensor:
        from flash_maxsim import flash_maxsim_batched, flash_maxsim_batched_train
        q, d = asked(x.q, x.d_NLE.unflatten(0, blocks))
        if torch.is_grad_enabled():
            return flash_maxsim_batched_train(q, d, not shape.paired, x.length_N)
        return flash_maxsim_batched(q, d, x.length_N, not shape.paired, pad_lq=False)  # a DPR's one token would be multiplied as 32

    for name, peer in ("late-interaction-kernels", lik), ("flash-maxsim", flash):
        if importlib.util.find_spec(name.replace("-", "_")):
            players[name] = peer
    return players


def asked(*tensors: Tensor) -> list[Tensor]:
    """Given a leaf that wants a gradient, a peer keeps what the backward pass reads, under no_grad too."""
    return [x if torch.is_grad_enabled() else x.detach() for x in tensors]


def forget_tuning() -> None:
    """What the peers found to be fastest for another layout or length, which are not in their keys."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("late_interaction_kernels", "flash_maxsim")):
            for kernel in vars(module).values():
                if isinstance(kernel, mk.triton.runtime.Autotuner):
                    kernel.cache.clear()
                    kernel.cache_results = False  # else what it noted on disk for the last shape is read again


def passages(name: str, x: Batch) -> Tensor:
    return x.d if name == OURS else x.d_NLE


def forward(shape: Shape, name: str, scores_of: Callable[[Batch], Tensor], x: Batch) -> Tensor:
    with torch.no_grad():
        return scores_of(x)


def forward_backward(shape: Shape, name: str, scores_of: Callable[[Batch], Tensor], x: Batch) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scores_of(x), (x.q, passages(name, x)), x.upstream)


def with_losses(shape: Shape, name: str, scores_of: Callable[[Batch], Tensor], x: Batch) -> tuple[Tensor, ...]:
    if name == OURS:
        losses = mk.pairdistill_objective(x.q, x.d, x.offsets, *x.losses, in_batch=not shape.paired, max_length=shape.L)
    else:
        losses = mk.pairdistill_loss(scores_of(x), *x.losses, backend="eager")
    return torch.autograd.grad(losses.total, (x.q, passages(name, x)))


def pair_loss_loop(scores: Tensor, pairs: Tensor, pair_probs: Tensor) -> Tensor:
    """L_pair the way the authors' code goes about it: a Python loop over queries and pairs."""
    terms = []
    for scores_K, pairs_P, probs_P in zip(scores, pairs.tolist(), pair_probs.tolist()):
        for pair, p in zip(pairs_P, probs_P):
            target = torch.tensor([p, 1 - p], device=scores.device)
            terms.append(F.kl_div(scores_K[pair].log_softmax(0), target, reduction="sum"))
    return sum(terms) / len(terms)


def loss_contestants() -> dict[str, Callable[[int], Tensor]]:
    """The losses and their gradient alone, from scores [32, 64] and 50 pairs a query."""
    x = Batch(Shape("", 32, 64, True, L=1), torch.float32, 0)
    scores = x.upstream.requires_grad_()
    losses = {
        "loss head": lambda: mk.pairdistill_loss(scores, *x.losses).total,
        "eager losses": lambda: mk.pairdistill_loss(scores, *x.losses, backend="eager").total,
        "authors' loop, pairs only": lambda: pair_loss_loop(scores, x.losses[1], x.losses[2]),
    }
    if not GPU:
        del losses["eager losses"]  # on a CPU they are the loss head
    return {name: lambda _, loss=loss: torch.autograd.grad(loss(), scores)[0] for name, loss in losses.items()}


# ---- Measuring -------------------------------------------------------------------------------------------------------


def time_ms(functions: dict[str, Callable[[int], object]], seconds: float, on_gpu: bool = False) -> dict[str, list]:
    """{name: [median, lower quartile, upper quartile]}; a function's argument says which copy of the inputs to take."""
    cache = torch.zeros(256 << 20 if GPU else 16 << 20, device=DEVICE)  # four bytes each: .25 ms of a GPU, in which to launch
    times, deadline = {name: [] for name in functions}, time.monotonic() + seconds
    for function in functions.values():
        for copy in range(COPIES):
            function(copy)
    for turn in itertools.count():
        for name, function in functions.items():
            cache.sum()  # read, not written: what is written would have to leave the cache while `function` is timed
            times[name].append((gpu_ms if on_gpu else wall_ms)(partial(function, turn % COPIES)))
        if turn >= 4 and time.monotonic() > deadline:
            quantiles = torch.tensor([0.5, 0.25, 0.75])
            return {name: torch.tensor(t).quantile(quantiles).tolist() for name, t in times.items()}


def wall_ms(function: Callable[[], object]) -> float:
    synchronize = torch.cuda.synchronize if GPU else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def gpu_ms(function: Callable[[], object]) -> float:
    """Between two events. The GPU is still filling the cache when they are queued, so no launch is waited for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def graph(function: Callable[[int], object], pool=None) -> Callable[[int], None] | None:
    """The GPU's work for each copy, captured; None where it cannot be, because it waits for the CPU. Graphs whose results
    nobody reads may have one memory pool: each with its own would hold all contestants' similarities at once."""
    graphs = [torch.cuda.CUDAGraph() for _ in range(COPIES)]
    try:
        function(0)
        torch.cuda.set_sync_debug_mode("error")  # what waits is found here: a capture that fails spoils those after it
        try:
            function(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for copy, captured in enumerate(graphs):
            function(copy)
            with torch.cuda.graph(captured, pool=pool):
                function(copy)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return lambda copy: graphs[copy].replay()


def peak_mb(function: Callable[[int], object], gradient_bytes: int) -> float:
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(0)
        return max(torch.cuda.max_memory_allocated() - before - gradient_bytes, 0) / 1e6
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # the profiler chats
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(0)
    os.dup2(stderr, 2)
    os.close(null), os.close(stderr)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(max(held, default=0) - gradient_bytes, 0) / 1e6


def ceilings() -> tuple[float, float]:
    """Bytes a millisecond of a large copy, operations a millisecond of a large matrix product."""
    size, n_bytes = (8192, 1 << 30) if GPU else (1024, 1 << 27)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    source, target = (torch.randint(-128, 128, (n_bytes,), dtype=torch.int8, device=DEVICE) for _ in range(2))
    times = time_ms({"copy": lambda _: target.copy_(source), "product": lambda _: a @ b}, 2, on_gpu=GPU)
    return 2 * n_bytes / times["copy"][1], 2 * size**3 / times["product"][1]


def least_ms(shape: Shape, x: Batch, backward: bool, bytes_per_ms: float, flops_per_ms: float) -> float:
    queries = 1 if shape.paired else shape.B  # that meet each passage
    n_bytes = (x.q.numel() + x.d.numel()) * x.q.element_size()
    flops = 2 * x.d.numel() * shape.Q * queries
    if backward:  # write both gradients, read the rows that win, add each with its weight to both
        winners = shape.B * shape.K * shape.Q * queries
        n_bytes += n_bytes + min(winners, len(x.d)) * shape.E * x.d.element_size()
        flops += 4 * winners * shape.E
    return max(n_bytes / bytes_per_ms, flops / flops_per_ms)


def errors_of(shape: Shape, name: str, scores_of: Callable[[Batch], Tensor], x: Batch) -> tuple[float, float]:
    """Against float64, for the first two queries: the scores' largest error, relative to the largest score, and the
    gradients' (Frobenius norm, relative to the true ones': where two tokens nearly tie, rounding picks the winner)."""
    N = (2 if shape.paired else shape.B) * shape.K
    n_tokens = int(x.offsets[N])
    q, d = x.q[:2].detach().double().requires_grad_(), x.d[:n_tokens].detach().double().requires_grad_()
    true = mk.maxsim_eager(q, d, x.offsets[: N + 1], None, shape.paired)
    got = scores_of(x)
    of_scores = ((got[:2] - true).abs().max() / true.abs().max()).item()
    upstream = torch.cat([x.upstream[:2], torch.zeros_like(x.upstream[2:])])
    grad_q, grad_d = torch.autograd.grad(got, (x.q, passages(name, x)), upstream.to(got.dtype))
    grad_d = grad_d if name == OURS else grad_d[x.real_NL]
    true_grads = torch.autograd.grad(true, (q, d), upstream[:2].double())
    of_gradients = [((a - b).norm() / b.norm()).item() for a, b in zip((grad_q[:2], grad_d[:n_tokens]), true_grads)]
    return of_scores, max(of_gradients)


def benchmark(shapes: list[Shape], out: Path, seconds: float) -> None:
    machine = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads, blockwise and eager"
    speeds = ceilings()
    about = dict(machine=machine, dtype=str(DTYPE), torch=torch.__version__, commit=commit(),
                 triton=getattr(mk.triton, "__version__", None), bytes_per_ms=speeds[0], flops_per_ms=speeds[1])
    print(f"{machine}, {DTYPE}; copy {speeds[0] / 1e6:.0f} GB/s, matrix product {speeds[1] / 1e9:.2f} TFLOP/s\n")
    table = "{:27}{:18}{:26}{:>10}{:>18}{:>9}{:>10}{:>10}{:>8}  {}".format
    print(table("shape", "what", "who", "wall ms", "quartiles", "gpu ms", "extra MB", "roofline", "ours is",
                "errors"))
    rows, wrong = [], []

    def compete(name: str, what: str, functions: dict, errors: dict, gradient_bytes: dict, least: float) -> None:
        wall = time_ms(functions, seconds)
        pool = torch.cuda.graph_pool_handle() if GPU else None
        graphs = {who: captured for who, f in functions.items() if GPU and (captured := graph(f, pool))}
        gpu = time_ms(graphs, seconds, on_gpu=True) if graphs else {}
        first = next(iter(functions))
        for who, function in functions.items():
            taken, common = gpu.get(who, wall[who])[0], gpu if who in gpu and first in gpu else wall
            row = dict(shape=name, what=what, who=who, wall_ms=wall[who], gpu_ms=gpu.get(who), errors=errors.get(who),
                       extra_mb=peak_mb(function, gradient_bytes.get(who, 0)), roofline=least / taken,
                       ours_is_faster=common[who][0] / common[first][0])
            rows.append(row)
            print(table(name, what, who, f"{wall[who][0]:.3f}", "{:.3f}-{:.3f}".format(*wall[who][1:]),
                        f"{gpu[who][0]:.3f}" if who in gpu else "-", f"{row['extra_mb']:.1f}",
                        f"{row['roofline']:.0%}" if least else "-", f"{row['ours_is_faster']:.2f}x",
                        "{:.0e} {:.0e}".format(*errors[who]) if who in errors else "-"), flush=True)

    for shape in shapes:
        torch.compiler.reset()  # or torch.compile would give up after eight shapes
        forget_tuning()
        batches = [Batch(shape, DTYPE, seed) for seed in range(COPIES)]
        modes = {"forward": forward, "forward+backward": forward_backward, "with the losses": with_losses}
        players, errors = contestants(shape), {}
        for who, scores_of in list(players.items()):
            try:
                errors[who] = errors_of(shape, who, scores_of, batches[0])
                for mode in modes.values():
                    mode(shape, who, scores_of, batches[0])
            except Exception as reason:  # out of memory, a shape a peer does not take: the others go on without it
                print(f"{shape.name:27}{who} cannot: {(str(reason).splitlines() or [repr(reason)])[0][:80]}", flush=True)
                del players[who]
        of_scores, of_gradients = errors.get(OURS, (1, 1))
        if not (of_scores <= (2e-3 if GPU else 1e-5) and of_gradients <= (1e-2 if GPU else 1e-5)):
            wrong.append(f"{shape.name}: {OURS} does not agree with float64: scores {of_scores}, gradients {of_gradients}")
            print(wrong[-1], flush=True)
            continue
        for what, mode in modes.items():
            functions = {who: lambda copy, who=who, scores_of=scores_of: mode(shape, who, scores_of, batches[copy])
                         for who, scores_of in players.items()}
            n_bytes = {who: sum(x.numel() * x.element_size() for x in (batches[0].q, passages(who, batches[0])))
                       for who in players if mode != forward}
            compete(shape.name, what, functions, errors, n_bytes, least_ms(shape, batches[0], mode != forward, *speeds))
        del batches
        write(rows, about, out)  # after each shape: a run that is cut short leaves what it has
    compete("losses 32x64, 50 pairs", "losses+gradient", loss_contestants(), {}, {}, 0)
    write(rows, about, out)
    print(f"\nwrote {out.with_suffix('.json')} and {out.with_suffix('.png')}")
    sys.exit("\n".join(wrong) or 0)


def commit() -> str | None:
    """Of the code, where it is a checkout; else what the variable COMMIT says."""
    try:
        said = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except FileNotFoundError:  # no git
        said = ""
    return said or os.environ.get("COMMIT")


def write(rows: list[dict], about: dict, out: Path) -> None:
    out.with_suffix(".json").write_text(json.dumps(about | {"rows": rows}, indent=1))
    if drawn := [row for row in rows if row["what"] == "forward+backward"]:
        plot(drawn, about["machine"], out.with_suffix(".png"))


def plot(rows: list[dict], machine: str, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "who"))
    figure, axes = plt.subplots(1, 2, figsize=(13, 1.5 + 0.6 * len(shapes)), sharey=True, layout="constrained")
    for axis, label in zip(axes, ("forward + backward, milliseconds", "peak memory beyond inputs and gradients, MB")):
        for i, who in enumerate(names):
            mine = [row for row in rows if row["who"] == who]
            values = [(row["gpu_ms"] or row["wall_ms"])[0] if axis is axes[0] else row["extra_mb"] for row in mine]
            places = [shapes.index(row["shape"]) + 0.8 * (i + 0.5) / len(names) - 0.4 for row in mine]
            axis.barh(places, values, height=0.8 / len(names), label=who)
            for place, value in zip(places, values):
                axis.text(value, place, f" {value:.3g}", va="center", fontsize=7)
        axis.set(xscale="log", xlabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(yticks=range(len(shapes)), yticklabels=shapes)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"MaxSim on {machine}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- --compile: what the compiler makes of the kernels, without a GPU ------------------------------------------------

COMPILED = [("bf16", (32, 32, 128)), ("fp16", (32, 32, 128)), ("fp32", (32, 32, 128)), ("bf16", (32, 32, 96)),
            ("bf16", (8, 300, 256)), ("bf16", (32, 1, 768))]  # type, (B, Q, E)
POINTERS = dict(offsets="i32", mask="u8", scores="fp32", winners="u8", grad_scores="fp32", teacher="fp32", pairs="i32",
                probs="fp32", positive="i32", losses="fp32", grad="fp32")  # the others have the inputs' type
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # as the instructions are called in SASS; HGMMA is PTX's wgmma


def compile_kernel(kernel, options: dict, dtype: str, target: int) -> tuple[int, int, int, dict[str, int]]:
    """Registers, spills, shared memory, and the tensor-core instructions."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = {name: options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    constants = {name: value for name, value in options.items() if name not in launch}
    types = {name: "constexpr" if name in constants else "*" + POINTERS.get(name[:-4], dtype) if name.endswith("_ptr")
             else "fp32" if name.startswith(("inverse", "weight")) else "i32" for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = mk.triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch)
    tool = Path(mk.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    count = {name: n for name in ("STL", "LDL", *TENSOR_CORES.values()) if (n := len(re.findall(rf"\b{name}\b", sass)))}
    spills = count.pop("STL", 0) + count.pop("LDL", 0)  # stores to and loads from local memory
    return int(re.search(r"REG:(\d+)", usage)[1]), spills, compiled.metadata.shared, count


def launches(target: int) -> list[tuple]:
    """(kernel, type, what it is for, options) of every kernel, as maxsim_kernel.py launches them."""
    rows = []
    for width, reduction in itertools.product((64, 2048), ("mean", "sum")):
        label = f"K 64, P 50, width {width}, {reduction}"
        rows.append((mk._head_kernel, "fp32", label, mk.head_options(64, 50, width, reduction)))
    kernels = (mk._forward_kernel, mk._backward_passages_kernel, mk._backward_queries_kernel)
    for (dtype, shape), paired in itertools.product(COMPILED, (True, False)):
        label = "B {}, Q {}, E {}, {}".format(*shape, "own block" if paired else "all pairs")
        options = mk.launch_options(shape, 4 if dtype == "fp32" else 2, paired, target // 10)
        for kernel, option, extra in zip(kernels, options, ({"SAVE": True}, {}, {})):
            rows.append((kernel, dtype, label, option | extra | {"MASKED": True}))
    return rows


def compile_all(targets: list[int]) -> None:
    table, bad = "{:8}{:27}{:6}{:34}{:>10}{:>8}{:>9}  {}".format, 0
    print(table("target", "kernel", "type", "shape", "registers", "spills", "shared", "tensor cores"))
    for target, (kernel, dtype, label, options) in ((t, row) for t in targets for row in launches(t)):
        registers, spills, shared, found = compile_kernel(kernel, options, dtype, target)
        # 16-bit products belong on the tensor cores. Wide rows leave room for tiles of fewer than 64 tokens only, and
        # those are multiplied by the instruction that every generation has.
        wanted = "HMMA" if options.get("BLOCK_T", 0) < 64 else TENSOR_CORES[target]
        multiplies = kernel in (mk._forward_kernel, mk._backward_passages_kernel) and dtype != "fp32"
        wrong = spills > 0 or (multiplies and wanted not in found)
        bad += wrong
        found = ", ".join(f"{n} {name}" for name, n in found.items()) + ("   <- wrong" if wrong else "")
        name = kernel.__name__.strip("_")
        print(table(f"sm_{target}", name, dtype, label, registers, spills, shared, found), flush=True)
    sys.exit(f"{bad} kernels spill registers or do without the tensor cores" if bad else 0)


# ---- --tune ----------------------------------------------------------------------------------------------------------


def compile_row(row: tuple, dtype: torch.dtype, mode: Callable) -> None:
    """In a process of its own: has Triton's cache on disk hold what these launch options make, if they can be compiled."""
    mk.LAUNCH[torch.cuda.get_device_capability()[0], dtype.itemsize, 128] = row
    for shape in SHAPES[:2]:
        shape = shape._replace(K=1)  # as many columns, and fewer passages
        try:
            mode(shape, OURS, ours(shape), Batch(shape, dtype, 0))
        except Exception:  # whoever measures it finds out again
            pass


def tune(out: Path, seconds: float) -> None:
    """The rows for dim 128: for each kernel the candidate with the least product of own block's and all pairs' time."""
    capability = torch.cuda.get_device_capability()[0]
    tiles = [tile for tile in itertools.product((32, 64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4))
             if tile[0] * tile[1] <= 128 * 32 * tile[2]]  # a thread's registers hold no more sums
    gathers = list(itertools.product((8, 16, 32, 64), (2, 4, 8)))
    kernels = (forward, tiles), (forward_backward, tiles), (forward_backward, gathers)
    found = dict(machine=torch.cuda.get_device_name(), torch=torch.__version__, triton=mk.triton.__version__, launch={}, times=[])
    for dtype in (torch.bfloat16, torch.float32):
        key = (capability, dtype.itemsize, 128)
        row = list(mk.LAUNCH.get(key) or mk.LAUNCH[0, *key[1:]])
        rows = [(*row[:k], candidate, *row[k + 1:]) for k, (_, candidates) in enumerate(kernels) for candidate in candidates]
        modes = [mode for mode, candidates in kernels for _ in candidates]
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_row, rows, [dtype] * len(rows), modes))
        inputs = [(shape, Batch(shape, dtype, 0)) for shape in SHAPES[:2]]
        for kernel, (mode, candidates) in enumerate(kernels):
            results = []
            for row[kernel] in candidates:
                mk.LAUNCH[key] = tuple(row)
                try:
                    graphs = {shape.paired: graph(lambda _, shape=shape, x=x: mode(shape, OURS, ours(shape), x))
                              for shape, x in inputs}
                    times = time_ms(graphs, seconds / 20, on_gpu=True)
                except Exception:  # not compiled, not captured, or larger than the GPU's shared memory
                    continue
                results.append((times[True][0] * times[False][0], row[kernel], times[True][0], times[False][0]))
                found["times"].append(dict(dtype=str(dtype), kernel=kernel, candidate=row[kernel], own_ms=times[True][0],
                                           all_pairs_ms=times[False][0]))
            if not results:
                sys.exit(f"{dtype}, kernel {kernel}: no candidate could be measured")
            _, row[kernel], own, every = min(results)
            print(f"{dtype}, kernel {kernel}: {row[kernel]}, own {own:.3f} ms, all pairs {every:.3f} ms", flush=True)
            found["launch"][str(key)] = row
            out.with_name(out.name + "-tune.json").write_text(json.dumps(found))
        mk.LAUNCH[key] = tuple(row)
        print(f"    {key}: {tuple(row)},", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile every kernel for --targets; needs no GPU")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TENSOR_CORES), choices=list(TENSOR_CORES))
    parser.add_argument("--tune", action="store_true", help="measure the launch table's rows on this GPU")
    parser.add_argument("--seconds", type=float, default=2, help="for each shape and what is timed (default: 2)")
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), choices=range(len(SHAPES)), metavar="N",
                        help=f"only these: {', '.join(f'{n} {shape.name}' for n, shape in enumerate(SHAPES))}")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="default: results/bench")
    arguments = parser.parse_args()
    if arguments.compile:
        if mk.triton is None or mk.INTERPRETED.value:
            sys.exit("--compile needs the package triton, and TRITON_INTERPRET unset")
        compile_all(arguments.targets)
    elif not 0 <= arguments.seconds < float("inf"):
        parser.error(f"--seconds {arguments.seconds}: expected 0 or more")
    elif arguments.tune and not GPU:
        sys.exit("--tune needs a GPU")
    else:
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {arguments.out}: {error}; name another one")
        if arguments.tune:
            tune(arguments.out, arguments.seconds)
        else:
            benchmark([SHAPES[n] for n in arguments.shapes], arguments.out, arguments.seconds)
