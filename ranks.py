"""Ranks: the same code on one process or on many (design: `--gpus` changes the speed, never the result).

A rank is one process with one device. All ranks hold the same weights and walk the same global batches; each works on
its contiguous share of the rows, and what is split is put together again in rank order, so that no result depends on
the number of ranks, but for rounding and what dropout draws. One process takes the same path with a world of 1.

The gradient of a global batch is the *sum* of the ranks' gradients, because every loss is normalised by global counts.
The authors' ColBERT averages losses that each rank normalised by its own counts, and reads the same rows on every rank.
"""
from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

LAUNCHED = "PAIRDISTILL_LAUNCHED"  # in the environment of ranks that `launch` started


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> range:
        """This rank's contiguous part of n rows: sizes differ by at most one."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def barrier(self) -> None:
        """Without it a rank could open a file that rank 0 is still writing."""
        if self.world > 1:
            self.gather(torch.zeros(1))

    def close(self) -> None:
        """All ranks end together: one whose group is still open can abort as it exits, and take the others with it."""
        if self.world > 1:
            self.barrier()
            dist.destroy_process_group()

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place: without it every rank would step with the gradient of its own share."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n_r, ...] of every rank -> [sum n_r, ...] in rank order, on the device that rows came from."""
        if self.world == 1:
            return rows
        x = rows.detach().to(self.device).contiguous()
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(x)], device=self.device))
        counts = [int(c) for c in counts]
        # Collectives want equal shapes: pad to the largest share, cut again afterwards.
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[:len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts)]).to(rows.device)


class _GatherRows(torch.autograd.Function):
    """Gather whose backward sums what every rank's loss says of a row, and gives each rank the rows it sent."""

    @staticmethod
    def forward(ctx, rows, ranks, start):
        ctx.ranks, ctx.start, ctx.n = ranks, start, len(rows)
        return ranks.gather(rows)

    @staticmethod
    def backward(ctx, grad):
        grad = ctx.ranks.sum_(grad.contiguous())
        return grad[ctx.start:ctx.start + ctx.n], None, None


def gather_passages(d: torch.Tensor, offsets: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged passages of all ranks, differentiable: d [T_r, E], offsets [N_r + 1] -> d [T, E], offsets [N + 1].

    # OURS: without it the in-batch negatives of L_CL would be those of one rank (as they are in the authors' code), and the
    result would depend on the number of GPUs.
    """
    if ranks.world == 1:
        return d, offsets
    totals = ranks.gather(offsets[-1:].to(torch.int64)).tolist()
    d = _GatherRows.apply(d, ranks, sum(totals[:ranks.rank]))
    lengths = ranks.gather(offsets.diff())
    return d, torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


def sum_gradients(model: torch.nn.Module, terms: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """One all-reduce for the gradients of all parameters and for the loss terms that go into the log."""
    if ranks.world == 1:
        return terms.detach()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A parameter that this rank's share did not touch still has a place in the sum.
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = ranks.sum_(torch.cat([g.reshape(-1).float() for g in gradients] + [terms.detach().float()]))
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters] + [len(terms)])):
        p.grad = part.view_as(p).to(p.dtype)
    return flat[-len(terms):].clone()  # a view would keep all gradients of the step in memory


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in it."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


def half(device: torch.device) -> torch.autocast:
    """bfloat16 autocast where the hardware has it; elsewhere a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def peak_memory() -> float:
    """The most memory that this process has held so far, in GB; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()  # a scheduler may set one of them


def cores() -> int:
    """That this process may use, by its affinity; a container's quota of time is not seen."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def init() -> Ranks:
    """The rank that torchrun's environment describes, or the only one."""
    world, rank = (int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])) if under_torchrun() else (1, 0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif world > 1:  # ranks share the cores: without this each would start a thread for every core
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        torch.set_num_threads(max(1, cores() // local))
    if world > 1:
        # Rank 0 may index or train a tokenizer for long while the others wait.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    return Ranks(rank, world, device)


def how_many(asked: int) -> tuple[int, str]:
    """Ranks to start for `--gpus asked`, and the sentence that says why it is another number.

    Raises ValueError where there are CUDA devices, but too few.
    """
    devices = torch.cuda.device_count()
    if devices:
        if asked > devices:
            raise ValueError(f"--gpus {asked}: this machine has {devices} CUDA device{'s' * (devices > 1)}; "
                             f"ask for --gpus {devices} or fewer")
        return asked, ""
    n = min(asked, cores())
    return n, (f"--gpus {asked}: no CUDA device here, so {n} gloo ranks on the CPU do the same work" if n > 1 else
               f"--gpus {asked}: no CUDA device here, so one process on the CPU does the work")


def launch(n: int, argv: list[str]) -> int:
    """Start n ranks of `python argv` on this machine through torchrun's elastic launcher; returns the exit code.

    The launcher ends all ranks when one fails and on Ctrl-C or SIGTERM.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    import logging
    import uuid
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # our own sentence is below
    os.environ[LAUNCHED] = "1"
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=n, run_id=str(uuid.uuid4()), rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1)
    try:
        elastic_launch(config, sys.executable)(*argv)
        return 0
    except SignalException as e:
        return 128 + int(e.sigval)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ChildFailedError as e:
        killed = {rank: -failure.exitcode for rank, failure in e.failures.items()
                  if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM}  # which the launcher sends to the others
        for rank, number in killed.items():
            print(f"error: rank {rank} was ended by signal {number}"
                  f"{', perhaps because memory ran out' * (number == signal.SIGKILL)}", file=sys.stderr, flush=True)
        # Of two that end within a tenth of a second the first one is not known: the one that has said why (2) counts.
        code = 2 if any(f.exitcode == 2 for f in e.failures.values()) else e.get_first_failure()[1].exitcode
        return 128 + max(killed.values()) if killed else code if code > 0 else 128 - code


def exit_on_sigterm() -> None:
    """A scheduler's SIGTERM: this rank ends in order, and after 8 seconds anyway, if it waits for one that is gone."""
    def leave(*_) -> None:
        signal.alarm(8)
        raise SystemExit(143)
    signal.signal(signal.SIGTERM, leave)


class AfterStep:
    """While steps are made, a SIGTERM is only noted; an error that then follows from rank 0's exit is an exit too."""

    def __init__(self, ranks: Ranks):
        self.came, self.ranks, self.before = False, ranks, None
        if threading.current_thread() is threading.main_thread():  # elsewhere there are no signals
            self.before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_) -> None:
        self.came = True
        if not self.ranks.first:
            signal.alarm(25)  # ends a rank that waits for one that is gone, before torchrun kills it after 30 s

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
        if self.came and isinstance(error, RuntimeError):
            raise SystemExit(143) from None
        if self.came and error is None:  # it came in the last step
            signal.raise_signal(signal.SIGTERM)


def end_with_launcher() -> None:
    """A rank whose launcher was killed ends too: it runs in a session of its own, which no signal to the launcher reaches."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(128 + signal.SIGKILL)
    threading.Thread(target=watch, daemon=True).start()


def is_lost(error: Exception) -> bool:
    """Whether this is what a collective raises when another rank has ended."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def refuse(error: Exception) -> int:
    """A user's mistake: one sentence, from one rank, and exit code 2."""
    if under_torchrun() and os.environ["RANK"] != "0":
        time.sleep(3)  # let rank 0 say it, if it is its error too: the first rank that ends takes the others with it
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2
