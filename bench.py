"""The fused MaxSim against eager PyTorch, torch.compile and the other fused kernels that are installed.

    python bench.py                       times every shape, prints the table, writes results/bench.json and .png
    python bench.py --compile             no GPU needed: compiles every kernel for sm_80, sm_90 and sm_100, and exits with
                                          1 if one spills registers or does without the tensor cores
    python bench.py --tune                measures the rows of maxsim_kernel.LAUNCH on this GPU and prints the best

Each time is a median and quartiles over rounds in which all contestants take turns, on inputs that rotate, after the
second-level cache was overwritten. "wall" includes Python and the launches, "gpu" is a CUDA graph's replay. Memory is
the peak beyond inputs and gradients. The share of the roofline is the least time that the arithmetic and the bytes
allow, at the speeds of a large matrix product and a large copy measured in the same run, over the time taken. The eager
baselines get their favourite layout, passages padded beforehand. On a CPU the contest is blockwise against eager.
"""

import argparse
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

import maxsim_kernel
from maxsim_kernel import maxsim, maxsim_eager, maxsim_padded, maxsim_paired, pairdistill_loss, pairdistill_objective

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COPIES = 3  # of the inputs, in rotation


class Shape(NamedTuple):
    name: str
    B: int
    K: int  # passages a query; all pairs: N = B * K
    paired: bool
    Q: int = 32
    L: int = 180
    E: int = 128
    mean: int | None = None  # ragged: the passages' mean length, L is the longest


GPU_SHAPES = [
    Shape("own block 32x64", 32, 64, True), Shape("all pairs 32x2048", 32, 64, False),
    Shape("own block 32x64, ragged", 32, 64, True, mean=77), Shape("all pairs 32x2048, ragged", 32, 64, False, mean=77),
    Shape("micro-batch own 4x64", 4, 64, True), Shape("micro-batch all 4x256", 4, 64, False),
    Shape("in-batch 128x128", 128, 1, False), Shape("in-batch 512x512", 512, 1, False),
    Shape("DPR 32x2048", 32, 64, False, Q=1, L=1, E=768), Shape("long passages 32x64", 32, 64, True, L=512),
]
CPU_SHAPES = [
    Shape("all pairs 8x128", 8, 16, False), Shape("all pairs 8x128, ragged", 8, 16, False, mean=77),
    Shape("own block 8x16", 8, 16, True), Shape("DPR 32x512", 32, 16, False, Q=1, L=1, E=768),
]


def make_batch(shape: Shape, dtype: torch.dtype, seed: int) -> dict:
    """Unit vectors, as ColBERT's are; the passages both ragged and padded; and what the losses read."""
    torch.manual_seed(seed)
    N, P = shape.B * shape.K, 50
    length_N = torch.full((N,), shape.L)
    if shape.mean:  # a log-normal's, as MS MARCO's are, between 8 tokens and L
        length_N = (shape.mean * 0.92 * torch.exp(0.42 * torch.randn(N))).round().clamp(8, shape.L).long()
    offsets = F.pad(length_N.cumsum(0), (1, 0)).int()
    q = F.normalize(torch.randn(shape.B, shape.Q, shape.E), dim=-1).to(DEVICE, dtype)
    d = F.normalize(torch.randn(int(offsets[-1]), shape.E), dim=-1).to(DEVICE, dtype)
    real_NL = torch.arange(shape.L) < length_N[:, None]
    d_NLE = torch.zeros(N, shape.L, shape.E, dtype=dtype, device=DEVICE)
    d_NLE[real_NL.to(DEVICE)] = d
    pairs = torch.randint(0, shape.K, (shape.B, P, 2), dtype=torch.int32)
    losses = (torch.randn(shape.B, shape.K), pairs, torch.rand(shape.B, P), torch.zeros(shape.B, dtype=torch.int32))
    upstream = torch.randn(shape.B, shape.K if shape.paired else N)
    batch = dict(q=q.requires_grad_(), d=d.requires_grad_(), d_NLE=d_NLE.requires_grad_(), offsets=offsets.to(DEVICE))
    return batch | dict(length_N=length_N.to(DEVICE), real_NL=real_NL.to(DEVICE), upstream=upstream.to(DEVICE),
                        losses=[x.to(DEVICE) for x in losses])


# ---- The contestants: name -> scores of a batch, and which tensor holds its passages ---------------------------------


def contestants(shape: Shape) -> dict[str, tuple[Callable[[dict], torch.Tensor], str]]:
    scorer = maxsim_paired if shape.paired else maxsim
    rows = {"fused" if DEVICE == "cuda" else "blockwise": (lambda x: scorer(x["q"], x["d"], x["offsets"], max_length=shape.L), "d")}

    def eager(dtype: torch.dtype) -> Callable[[dict], torch.Tensor]:
        return lambda x: maxsim_padded(x["q"], x["d_NLE"], x["length_N"], None, shape.paired, dtype)

    if DEVICE == "cpu":
        return rows | {"eager": (eager(torch.float32), "d_NLE")}
    rows |= {"eager bfloat16": (eager(torch.bfloat16), "d_NLE"), "eager float32": (eager(torch.float32), "d_NLE"),
             "torch.compile": (torch.compile(eager(torch.bfloat16), dynamic=False), "d_NLE")}
    blocks = (shape.B, shape.K) if shape.paired else (shape.B * shape.K,)
    if importlib.util.find_spec("late_interaction_kernels"):
        from late_interaction_kernels import maxsim as lik

        rows["late-interaction-kernels"] = (
            lambda x: lik(x["q"], x["d_NLE"].unflatten(0, blocks), d_mask=x["real_NL"].unflatten(0, blocks) if shape.mean else None), "d_NLE")
    if importlib.util.find_spec("flash_maxsim"):
        from flash_maxsim import flash_maxsim_batched_train as flash

        rows["flash-maxsim"] = (
            lambda x: flash(x["q"], x["d_NLE"].unflatten(0, blocks), not shape.paired, x["length_N"].int() if shape.mean else None), "d_NLE")
    return rows


def modes(shape: Shape, name: str, scores_of: Callable[[dict], torch.Tensor], passages: str) -> dict[str, Callable[[dict], object]]:
    def forward(x: dict) -> torch.Tensor:
        with torch.no_grad():
            return scores_of(x)

    def forward_backward(x: dict) -> tuple:
        return torch.autograd.grad(scores_of(x), (x["q"], x[passages]), x["upstream"])

    def with_loss(x: dict) -> tuple:
        if name in ("fused", "blockwise"):
            total = pairdistill_objective(x["q"], x["d"], x["offsets"], *x["losses"], in_batch=not shape.paired, max_length=shape.L).total
        else:
            total = pairdistill_loss(scores_of(x), *x["losses"], backend="eager").total
        return torch.autograd.grad(total, (x["q"], x[passages]))

    return {"forward": forward, "forward+backward": forward_backward, "with the loss": with_loss}


def pair_loss_loop(scores: torch.Tensor, pairs: torch.Tensor, pair_probs: torch.Tensor) -> torch.Tensor:
    """L_pair as the authors compute it: a Python loop over queries and pairs."""
    total, count = 0.0, 0
    for scores_K, pairs_P, probs_P in zip(scores, pairs.tolist(), pair_probs.tolist()):
        for pair, p in zip(pairs_P, probs_P):
            target = torch.tensor([p, 1 - p], device=scores.device)
            total = total + F.kl_div(scores_K[pair].log_softmax(0), target, reduction="sum")
            count += 1
    return total / count


# ---- Measuring -------------------------------------------------------------------------------------------------------


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def time_ms(functions: dict[str, Callable[[int], object]], seconds: float) -> dict[str, tuple[float, float, float]]:
    """{name: (median, lower quartile, upper quartile)}; the argument says which copy of the inputs to take."""
    flush = torch.empty(256 << 20 if DEVICE == "cuda" else 64 << 20, dtype=torch.int8, device=DEVICE)
    times, end = {name: [] for name in functions}, time.monotonic() + seconds
    for function in functions.values():
        function(0)
    for turn in range(200):
        for name, function in functions.items():
            flush.zero_()
            synchronize()
            start = time.perf_counter()
            function(turn % COPIES)
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
        if turn >= 4 and time.monotonic() > end:
            break
    return {name: tuple(torch.tensor(t).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()) for name, t in times.items()}


def graph(function: Callable[[int], object]) -> Callable[[int], None] | None:
    """The function's GPU work for each copy, captured; None where it cannot be, because it waits for the GPU."""
    graphs = []
    try:
        for copy in range(COPIES):
            with torch.cuda.stream(stream := torch.cuda.Stream()):
                function(copy)
            torch.cuda.current_stream().wait_stream(stream)
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                function(copy)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return lambda copy: graphs[copy].replay()


def peak_mb(function: Callable[[int], object], gradients: int) -> float:
    """Peak of the memory taken beyond what was there, less the gradients' bytes."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(0)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function(0)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        peak = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)
    return max(peak - gradients, 0) / 1e6


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes and floating-point operations per millisecond, of a large copy and a large matrix product."""
    size = 8192 if DEVICE == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    big = torch.empty((1 << 30) if DEVICE == "cuda" else (1 << 27), dtype=torch.int8, device=DEVICE)
    times = time_ms({"copy": lambda _: big.clone(), "matmul": lambda _: a @ b}, 3)
    return 2 * len(big) / times["copy"][1], 2 * size**3 / times["matmul"][1]


def least_ms(shape: Shape, x: dict, mode: str, ceiling: tuple[float, float]) -> float:
    q, d = (t.numel() * t.element_size() for t in (x["q"], x["d"]))
    winners = shape.Q * shape.B * shape.K * (1 if shape.paired else shape.B)
    flops = 2 * x["d"].numel() * shape.Q * (1 if shape.paired else shape.B)
    moved = q + d
    if mode != "forward":  # read the winners' rows, write both gradients; one multiplication and addition a winner, twice
        moved += q + d + min(winners / len(x["d"]), 1) * d
        flops += 4 * winners * shape.E
    return max(moved / ceiling[0], flops / ceiling[1])


def worst_error(shape: Shape, x: dict, scores_of: Callable[[dict], torch.Tensor]) -> float:
    """Of the first two queries' scores against float64, relative to the largest score."""
    N = 2 * shape.K if shape.paired else shape.B * shape.K
    with torch.no_grad():
        d, offsets = x["d"][: int(x["offsets"][N])].double(), x["offsets"][: N + 1]
        true = maxsim_eager(x["q"][:2].double(), d, offsets, None, shape.paired)
        return ((scores_of(x)[:2].double() - true).abs().max() / true.abs().max()).item()


def benchmark(out: Path, seconds: float) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads (no GPU: blockwise against eager)"
    ceiling = ceilings(dtype)
    print(f"{machine}; {dtype}; copy {ceiling[0] / 1e9:.2f} TB/s, matrix product {ceiling[1] / 1e9:.1f} TFLOP/s")
    print(f"{'shape':28s}{'mode':18s}{'contestant':26s}{'wall ms (quartiles)':>28s}{'gpu ms':>10s}{'extra MB':>10s}{'roofline':>10s}{'speed':>8s}{'error':>10s}")
    rows = []
    for shape in GPU_SHAPES if DEVICE == "cuda" else CPU_SHAPES:
        batches = [make_batch(shape, dtype, seed) for seed in range(COPIES)]
        players = {}
        for name, (scores_of, passages) in contestants(shape).items():
            try:
                error = worst_error(shape, batches[0], scores_of)
            except (RuntimeError, ValueError, AssertionError) as reason:  # out of memory, or a shape that a peer does not take
                print(f"{shape.name:28s}{name} cannot: {str(reason).splitlines()[0][:90]}")
                continue
            if name in ("fused", "blockwise") and error > (2e-3 if DEVICE == "cuda" else 1e-5):
                sys.exit(f"{shape.name}: {name} differs from float64 by {error:.1e}")
            players[name] = (modes(shape, name, scores_of, passages), passages, error)
        for mode in ("forward", "forward+backward", "with the loss"):
            functions = {name: (lambda copy, f=player[0][mode]: f(batches[copy])) for name, player in players.items()}
            wall = time_ms(functions, seconds)
            graphs = {name: g for name, f in functions.items() if DEVICE == "cuda" and (g := graph(f))}
            gpu = time_ms(graphs, seconds) if graphs else {}
            ours = next(iter(functions))
            for name, (_, passages, error) in players.items():
                gradients = 0 if mode == "forward" else sum(batches[0][t].numel() * batches[0][t].element_size() for t in ("q", passages))
                best = gpu.get(name, wall[name])[0]
                row = dict(shape=shape._asdict(), mode=mode, contestant=name, wall_ms=wall[name], gpu_ms=gpu.get(name), error=error,
                           extra_mb=peak_mb(functions[name], gradients), roofline=least_ms(shape, batches[0], mode, ceiling) / best,
                           ours_is_faster=best / gpu.get(ours, wall[ours])[0])
                rows.append(row)
                quartiles = "{:.3f} ({:.3f}-{:.3f})".format(*wall[name])
                print(f"{shape.name:28s}{mode:18s}{name:26s}{quartiles:>28s}{gpu[name][0] if name in gpu else float('nan'):10.3f}{row['extra_mb']:10.1f}"
                      f"{row['roofline']:10.0%}{row['ours_is_faster']:7.2f}x{error:10.1e}", flush=True)
    rows += pair_loss_rows(seconds)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = dict(machine=machine, torch=torch.__version__, triton=getattr(maxsim_kernel.triton, "__version__", None), commit=commit)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(versions | dict(bytes_per_ms=ceiling[0], flops_per_ms=ceiling[1], rows=rows), indent=1))
    plot([row for row in rows if row["mode"] == "forward+backward"], machine, out.with_suffix(".png"))
    print(f"wrote {out.with_suffix('.json')} and {out.with_suffix('.png')}")


def pair_loss_rows(seconds: float) -> list[dict]:
    """The losses alone at 32 queries x 64 passages x 50 pairs; the authors' loop does L_pair only."""
    x = make_batch(Shape("", 32, 64, False, L=1), torch.float32, 0)
    scores, (teacher, pairs, probs, positive) = x["upstream"][:, :64].contiguous().requires_grad_(), x["losses"]
    functions = {
        "fused head" if DEVICE == "cuda" else "losses": lambda _: torch.autograd.grad(pairdistill_loss(scores, teacher, pairs, probs, positive).total, scores),
        "authors' loop (pairs only)": lambda _: torch.autograd.grad(pair_loss_loop(scores, pairs, probs), scores),
    }
    if DEVICE == "cuda":
        functions["eager losses"] = lambda _: torch.autograd.grad(pairdistill_loss(scores, teacher, pairs, probs, positive, backend="eager").total, scores)
    rows = [dict(shape=dict(name="losses 32x64x50"), mode="losses", contestant=name, wall_ms=t) for name, t in time_ms(functions, seconds).items()]
    for row in rows:
        print(f"{'losses 32x64, 50 pairs':28s}{'losses+gradient':18s}{row['contestant']:26s}{'{:.3f} ({:.3f}-{:.3f})'.format(*row['wall_ms']):>28s}")
    return rows


def plot(rows: list[dict], machine: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes, names = (list(dict.fromkeys(values)) for values in ([r["shape"]["name"] for r in rows], [r["contestant"] for r in rows]))
    figure, axes = plt.subplots(1, 2, figsize=(13, 1.5 + 0.55 * len(shapes)), sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("ms", "extra_mb"), ("forward + backward, milliseconds", "peak memory beyond inputs and gradients, MB")):
        for i, name in enumerate(names):
            mine = [r for r in rows if r["contestant"] == name]
            values = [(r["gpu_ms"] or r["wall_ms"])[0] if key == "ms" else r[key] for r in mine]
            places = [shapes.index(r["shape"]["name"]) + 0.8 * (i + 0.5) / len(names) - 0.4 for r in mine]
            axis.barh(places, values, height=0.8 / len(names), label=name)
            for place, value in zip(places, values):
                axis.text(value, place, f" {value:.3g}", va="center", fontsize=7)
        axis.set(xscale="log", xlabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(yticks=range(len(shapes)), yticklabels=shapes)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, loc="lower right")
    figure.suptitle(f"MaxSim on {machine}")
    figure.savefig(path, dpi=150)


# ---- --compile: what the compiler makes of the kernels, without a GPU ------------------------------------------------

COMPILED = [("bf16", (32, 32, 128)), ("fp16", (32, 32, 128)), ("fp32", (32, 32, 128)), ("bf16", (32, 32, 96)),
            ("bf16", (8, 300, 256)), ("bf16", (32, 1, 768))]  # dtype, (B, Q, E)
POINTERS = dict(offsets_ptr="i32", mask_ptr="u8", scores_ptr="fp32", winners_ptr="u8", grad_scores_ptr="fp32", teacher_ptr="fp32",
                pairs_ptr="i32", probs_ptr="fp32", positive_ptr="i32", losses_ptr="fp32", grad_ptr="fp32")
TENSOR_CORES = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA")}


def compile_kernel(kernel, options: dict, dtype: str, capability: int) -> dict:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants = {name: value for name, value in options.items() if name not in launch}
    types = {name: "constexpr" if name in constants else "*" + POINTERS.get(name, dtype) if name.endswith("_ptr") else
             "fp32" if name.startswith(("inverse", "weight")) else "i32" for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = maxsim_kernel.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    cuobjdump = Path(maxsim_kernel.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True).stdout for flag in ("-res-usage", "-sass"))
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("STL", "LDL", "HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")}
    return dict(registers=int(re.search(r"REG:(\d+)", usage)[1]), shared=compiled.metadata.shared, spills=count["STL"] + count["LDL"],
                tensor_cores={op: n for op, n in count.items() if n and "MMA" in op})


def compile_all(capabilities: list[int]) -> None:
    forward, passages, queries = (getattr(maxsim_kernel, f"_{name}_kernel") for name in ("forward", "backward_passages", "backward_queries"))
    jobs = [(maxsim_kernel._head_kernel, lambda _, width=width, reduction=reduction: maxsim_kernel.head_options(64, 50, width, reduction), "fp32",
             f"width {width}, {reduction}") for width in (64, 2048) for reduction in ("mean", "sum")]
    for (dtype, shape), paired in itertools.product(COMPILED, (True, False)):
        for i, (kernel, extra) in enumerate(((forward, {"SAVE": True}), (passages, {}), (queries, {}))):
            size = 4 if dtype == "fp32" else 2
            options = lambda arch, i=i, extra=extra, arguments=(shape, size, paired): maxsim_kernel.launch_options(*arguments, arch // 10)[i] | extra | {"MASKED": True}
            jobs.append((kernel, options, dtype, "B {}, Q {}, E {}, {}".format(*shape, "own block" if paired else "all pairs")))
    failures = 0
    print(f"{'target':8s}{'kernel':28s}{'type':6s}{'shape':36s}{'registers':>10s}{'spills':>8s}{'shared':>9s}  tensor cores")
    for capability, (kernel, options, dtype, label) in itertools.product(capabilities, jobs):
        made = compile_kernel(kernel, options(capability), dtype, capability)
        # Products of 16-bit rows must be on the tensor cores; tiles of fewer than 64 rows, for wide rows, are on those
        # of before Hopper.
        multiplies = kernel in (forward, passages) and dtype != "fp32"
        wanted = TENSOR_CORES[capability] if options(capability).get("BLOCK_T", 0) >= 64 else sum(TENSOR_CORES.values(), ())
        bad = made["spills"] > 0 or (multiplies and not any(op in made["tensor_cores"] for op in wanted))
        failures += bad
        found = ", ".join(f"{n} {op}" for op, n in made["tensor_cores"].items()) or "-"
        print(f"sm_{capability:<5d}{kernel.__name__.strip('_'):28s}{dtype:6s}{label:36s}{made['registers']:10d}{made['spills']:8d}{made['shared']:9d}  {found}{'  <- BAD' if bad else ''}", flush=True)
    sys.exit(f"{failures} of {len(jobs) * len(capabilities)} kernels spill or miss the tensor cores" if failures else 0)


# ---- --tune ----------------------------------------------------------------------------------------------------------


def tune(seconds: float) -> None:
    """For bfloat16 and float32 at dim 128, each kernel's candidates on own block and all pairs, by the product of times."""
    capability = torch.cuda.get_device_capability()[0]
    blocks = list(itertools.product((32, 64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4)))
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        key = (capability, size, 128)
        row = list(maxsim_kernel.LAUNCH.get(key) or maxsim_kernel.LAUNCH[0, size, 128])
        inputs = [(shape, make_batch(shape, dtype, 0)) for shape in GPU_SHAPES[:2]]
        for part, candidates in enumerate((blocks, blocks, list(itertools.product((8, 16, 32, 64), (2, 4, 8))))):
            scored = []
            for candidate in candidates:
                maxsim_kernel.LAUNCH[key] = (*row[:part], candidate, *row[part + 1 :])
                functions = {}
                for shape, x in inputs:
                    parts = modes(shape, "fused", *contestants(shape)["fused"])
                    functions[shape.name] = graph(lambda _, f=parts["forward" if part == 0 else "forward+backward"], x=x: f(x))
                try:
                    times = time_ms(functions, seconds / 20)
                except (RuntimeError, TypeError, maxsim_kernel.triton.runtime.errors.OutOfResources):
                    continue
                medians = [t[0] for t in times.values()]
                scored.append((medians[0] * medians[1], candidate, medians))
            row[part] = min(scored)[1]
            print(f"{dtype} kernel {part}: {row[part]}, own block and all pairs {min(scored)[2]} ms", flush=True)
        maxsim_kernel.LAUNCH[key] = tuple(row)
        print(f"    {key}: {tuple(row)},")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile the kernels for --targets and report; needs no GPU")
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], choices=sorted(TENSOR_CORES))
    parser.add_argument("--tune", action="store_true", help="measure the launch table's rows on this GPU")
    parser.add_argument("--seconds", type=float, default=2, help="for each shape and mode")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    arguments = parser.parse_args()
    if arguments.compile:
        if maxsim_kernel.triton is None or maxsim_kernel.INTERPRETED.value:
            sys.exit("--compile needs the package triton, and TRITON_INTERPRET unset")
        compile_all(arguments.targets)
    elif arguments.tune:
        if DEVICE == "cpu":
            sys.exit("--tune needs a GPU")
        tune(arguments.seconds)
    else:
        benchmark(arguments.out, arguments.seconds)
