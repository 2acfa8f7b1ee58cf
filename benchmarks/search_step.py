"""One whole search step, several ways in one process: second order as published code computes it, with the readable cell and with the fast one,
NNI's stock first-order `DARTS` on the same space, and the package's strategy, these two in Lightning's loop.

    python benchmarks/search_step.py --size paper --rounds 5 --save
    python benchmarks/search_step.py --growth

Versions take turns, and the shortest of the rounds counts. A step is: the weights' gradient on a training batch, the gradient of weights and α on a
validation batch at w′, two α gradients at w ± εu, and the weight step. Peak memory is that of a process that runs one version alone.

Arithmetic, counting a multiplication and an addition as two: a forward pass is 4·T·B·H²·(E + 2) for the cell (E edges, and the two halves
of W0) and 2·T·B·H·V for the decoder; a backward pass costs the same again for data and once more for weights. A step is then
3 + 3 + 2 + 2 + 3 = 13 forward passes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_darts_rnn import fused
from nni_darts_rnn.bilevel import WeightStep, architecture_gradient
from nni_darts_rnn.cell import variational_mask
from nni_darts_rnn.genotype import PRIMITIVES
from nni_darts_rnn.model import LanguageModel, activation_regularisation
from nni_darts_rnn.supernet import MixedRNN

RESULTS = Path(__file__).parent / "results" / "search_step.json"
RATE, DECAY, CLIP, TAR, EPSILON = 20.0, 5e-7, 0.25, 1e-3, 1e-2
DROPOUT = {"dropout": 0.75, "dropout_h": 0.25, "dropout_x": 0.75, "dropout_i": 0.2}


class Size(NamedTuple):
    """T steps, B streams, H units, V words, N nodes."""

    T: int
    B: int
    H: int
    V: int
    N: int = 8

    def flops(self) -> int:
        """Of one search step; the formula is at the top."""
        edges = self.N * (self.N + 1) // 2
        return 13 * (4 * self.T * self.B * self.H**2 * (edges + 2) + 2 * self.T * self.B * self.H * self.V)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (T, B), targets (T, B), hidden (B, H)."""
        return (*torch.randint(self.V, (2, self.T, self.B)).unbind(0), torch.zeros(self.B, self.H))


SIZES = {"small": Size(35, 32, 64, 2000), "medium": Size(35, 64, 128, 5000), "paper": Size(35, 256, 300, 10000)}


class OriginalModel(nn.Module):
    """The supernet in the shape published code gives it: a loop over nodes, one over primitives, `torch.cat` of states, log-softmax of all logits."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        H, N = size.H, size.N
        self.encoder = nn.Embedding(size.V, H)
        self.decoder = nn.Linear(H, size.V)
        self.decoder.weight = self.encoder.weight
        self.W0 = nn.Parameter(torch.empty(2 * H, 2 * H).uniform_(-0.04, 0.04))
        self.Ws = nn.ParameterList([nn.Parameter(torch.empty(H, 2 * H).uniform_(-0.04, 0.04)) for _ in range(N)])
        self.bn = nn.BatchNorm1d(H, affine=False)
        nn.init.uniform_(self.encoder.weight, -0.04, 0.04)
        nn.init.zeros_(self.decoder.bias)
        self.alpha = (1e-3 * torch.randn(N * (N + 1) // 2, len(PRIMITIVES))).requires_grad_()

    def rebuilt(self, theta: Tensor) -> OriginalModel:
        """A new model with the weights of one flat vector."""
        model, at, state = OriginalModel(self.size), 0, self.state_dict()
        for name, p in self.named_parameters():
            state[name] = theta[at:at + p.numel()].view_as(p)
            at += p.numel()
        state["decoder.weight"] = state["encoder.weight"]
        model.load_state_dict(state)
        model.alpha.data.copy_(self.alpha.data)
        return model

    def step(self, x: Tensor, h: Tensor, p: Tensor, mask_x: Tensor, mask_h: Tensor) -> Tensor:
        c, z = torch.split(torch.cat([x * mask_x, h * mask_h], -1).mm(self.W0), self.size.H, -1)
        s0 = h + c.sigmoid() * (z.tanh() - h)
        states, row = self.bn(s0).unsqueeze(0), 0
        for i, W in enumerate(self.Ws):
            masked = states * mask_h.unsqueeze(0)
            c, z = torch.split(masked.view(-1, self.size.H).mm(W).view(i + 1, -1, 2 * self.size.H), self.size.H, -1)
            c, s = c.sigmoid(), torch.zeros_like(s0)
            for k, name in enumerate(PRIMITIVES):
                if name == "none":
                    continue
                f = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda v: v}[name]
                s = s + torch.sum(p[row:row + i + 1, k].unsqueeze(-1).unsqueeze(-1) * (states + c * (f(z) - states)), dim=0)
            states = torch.cat([states, self.bn(s).unsqueeze(0)], 0)
            row += i + 1
        return torch.mean(states[-self.size.N:], dim=0)

    def forward(self, x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        e = F.embedding(x, self.encoder.weight)
        e = e * variational_mask(e[0], DROPOUT["dropout_i"], True)
        p, outputs = F.softmax(self.alpha, -1), []
        mask_x, mask_h = variational_mask(h, DROPOUT["dropout_x"], True), variational_mask(h, DROPOUT["dropout_h"], True)
        for t in range(len(x)):
            h = self.step(e[t], h, p, mask_x, mask_h)
            outputs.append(h)
        raw = torch.stack(outputs)
        dropped = raw * variational_mask(h, DROPOUT["dropout"], True)
        logits = F.log_softmax(self.decoder(dropped.view(-1, self.size.H)), -1)
        return F.nll_loss(logits, y.reshape(-1)), raw


class Original:
    """Weights moved by +R, −2R, +R in place, w′ in a rebuilt model, a garbage collection each step."""

    def __init__(self, size: Size):
        self.model = OriginalModel(size)
        self.weights = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.weights, lr=RATE, weight_decay=DECAY)
        self.arch = torch.optim.Adam([self.model.alpha], lr=3e-3, weight_decay=1e-3)

    def __call__(self, train, valid) -> None:
        model, alpha = self.model, self.model.alpha
        gc.collect()
        grads = torch.autograd.grad(model(*train)[0], self.weights)
        theta = torch.cat([p.data.reshape(-1) for p in self.weights])
        direction = torch.cat([g.reshape(-1) for g in grads]) + DECAY * theta
        clip = CLIP / (torch.cat([g.reshape(-1) for g in grads]).norm() + 1e-6)
        unrolled = model.rebuilt(theta - RATE * clip * direction)
        unrolled(*valid)[0].backward()
        direct = unrolled.alpha.grad
        vector = [p.grad.data for p in unrolled.parameters()]
        torch.nn.utils.clip_grad_norm_(unrolled.parameters(), CLIP)
        R = EPSILON / torch.cat([v.reshape(-1) for v in vector]).norm()
        ends = []
        for factor in (1, -2):
            for p, v in zip(self.weights, vector):
                p.data.add_(v, alpha=float(factor * R))
            ends.append(torch.autograd.grad(model(*train)[0], alpha)[0])
        for p, v in zip(self.weights, vector):
            p.data.add_(v, alpha=float(R))
        alpha.grad = direct - RATE * clip * (ends[0] - ends[1]) / (2 * R)
        self.arch.step()
        self.optimizer.zero_grad()
        loss, raw = model(*train)
        (loss + TAR * (raw[1:] - raw[:-1]).pow(2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        gc.collect()


class Ours:
    """`bilevel.architecture_gradient` and the weight step, with the readable cell or the fast one."""

    def __init__(self, size: Size, fast: bool):
        self.fast = fast
        cell = MixedRNN(size.H, size.H, size.N, dropout_x=DROPOUT["dropout_x"], dropout_h=DROPOUT["dropout_h"])
        self.model = LanguageModel(size.V, cell, dropout=DROPOUT["dropout"], dropout_i=DROPOUT["dropout_i"])
        named = dict(self.model.named_parameters())
        self.alpha = named.pop("rnn.alpha")
        self.names, self.weights = list(named), list(named.values())
        self.optimizer = torch.optim.SGD(self.weights, lr=RATE, weight_decay=DECAY)
        self.arch = torch.optim.Adam([self.alpha], lr=3e-3, weight_decay=1e-3)
        self.module = _LossModule(self.model)

    def loss(self, weights, alphas, batch) -> Tensor:
        parameters = {f"model.{name}": w for name, w in zip(self.names, weights)} | {"model.rnn.alpha": alphas[0]}
        return torch.func.functional_call(self.module, parameters, batch)

    def __call__(self, train, valid) -> None:
        fused.enable(self.fast)
        step = WeightStep.of(self.optimizer, self.weights, CLIP)
        found = architecture_gradient(self.loss, self.weights, [self.alpha], train, valid, step, epsilon=EPSILON)
        self.alpha.grad = found.grads[0]
        self.arch.step()
        self.optimizer.zero_grad()
        nll, raw, dropped, _ = self.model.loss(*train)
        # as in a search: the weights' gradient alone
        grads = torch.autograd.grad(nll + activation_regularisation(raw, dropped, 0.0, TAR), self.weights)
        for w, g in zip(self.weights, grads):
            w.grad = g
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()


class _LossModule(nn.Module):
    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets, hidden):
        return self.model.loss(tokens, targets, hidden)[0]


def through_nni(size: Size, **options):
    from through_nni import ThroughNNI  # NNI and Lightning take memory, which is not that of the other versions

    return ThroughNNI(size, **options)


VERSIONS = {
    "original": Original,
    "readable": lambda size: Ours(size, False),
    "fused": lambda size: Ours(size, True),
    "nni-first-order": lambda size: through_nni(size, first_order=True, fast=False),  # as NNI computes it: with autograd
    "nni-second-order": lambda size: through_nni(size, first_order=False, fast=True),  # the whole product
}


def seconds(step, train, valid) -> float:
    start = time.perf_counter()
    counted = step(train, valid)  # by itself, where a step is only a part of the call
    return time.perf_counter() - start if counted is None else counted


def gemm_peak(repeats: int = 5) -> float:
    """FLOP/s of the best of several torch.mm shapes: squares, and those of the cell and of the decoder at the paper's size."""
    best = 0.0
    for m, k, n in ((1024,) * 3, (2048,) * 3, (3072,) * 3, (256, 300, 4800), (8960, 300, 600), (512, 300, 10000)):
        a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.mm(a, b, out=c)
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def compare(size: Size, names: list[str], rounds: int) -> dict[str, float]:
    """Shortest seconds of a step for each version, taking turns, after one step to warm up."""
    torch.manual_seed(0)
    steps, train, valid = {name: VERSIONS[name](size) for name in names}, size.batch(), size.batch()
    best = dict.fromkeys(names, float("inf"))
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            took = seconds(step, train, valid)
            if round_:
                best[name] = min(best[name], took)
    return best


def peak_memory(name: str, size_name: str, threads: int) -> float:
    """GB of resident memory, at most, of a process that runs two steps of one version alone."""
    command = [sys.executable, __file__, "--size", size_name, "--threads", str(threads), "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(size_name: str, names: list[str], rounds: int, threads: int) -> dict:
    """One size: a dictionary with a row for each version."""
    size = SIZES[size_name]
    load = os.getloadavg()[0]
    before, best, after = gemm_peak(), compare(size, names, rounds), gemm_peak()
    peak = max(before, after)
    print(f"\n{size_name}: {size._asdict()}, {size.flops() / 1e9:,.1f} GFLOP a step, GEMM peak {peak / 1e9:,.0f} GFLOP/s "
          f"(before {before / 1e9:,.0f}, after {after / 1e9:,.0f}), load average at the start {load:.1f}")
    print(f"{'version':>16} {'ms/step':>10} {'ratio':>7} {'of peak':>8} {'peak GB':>8}")
    rows = {}
    for name in names:
        share = size.flops() / best[name] / peak
        rows[name] = {"ms": 1e3 * best[name], "ratio": best[names[0]] / best[name], "share_of_peak": share,
                      "peak_gb": peak_memory(name, size_name, threads)}
        print(f"{name:>16} {rows[name]['ms']:>10,.1f} {rows[name]['ratio']:>6.2f}x {share:>8.0%} {rows[name]['peak_gb']:>8.2f}")
    return {"size": size._asdict(), "flops": size.flops(), "gemm_peak_flops": peak, "load_average": load, "rounds": rounds, "versions": rows}


def growth(size: Size, rounds: int) -> dict:
    """How the fast step's seconds grow when one of T, B, H, V, N is doubled."""
    grown = {}
    print(f"\ngrowth from {size._asdict()}")
    for axis in Size._fields:
        larger = size._replace(**{axis: 2 * getattr(size, axis)})
        before, after = compare(size, ["fused"], rounds)["fused"], compare(larger, ["fused"], rounds)["fused"]
        grown[axis] = {"ms": 1e3 * before, "ms_doubled": 1e3 * after, "ratio": after / before, "flops_ratio": larger.flops() / size.flops()}
        print(f"  2{axis}: {1e3 * before:,.1f} -> {1e3 * after:,.1f} ms, {after / before:.2f}x (arithmetic {grown[axis]['flops_ratio']:.2f}x)")
    return grown


def machine() -> dict:
    model = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS), help="the first is what ratios refer to")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--growth", action="store_true", help="how the fast step grows with each axis, from the small size")
    parser.add_argument("--save", nargs="?", type=Path, const=RESULTS, help=f"write JSON (default {RESULTS.name})")
    parser.add_argument("--memory-of", choices=VERSIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        size = SIZES[options.size[0]]
        step = VERSIONS[options.memory_of](size)
        for _ in range(2):
            step(size.batch(), size.batch())
        # ru_maxrss would count the parent's memory from before exec
        high = next((line for line in _lines("/proc/self/status") if line.startswith("VmHWM")), None)  # kB
        print((int(high.split()[1]) if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e6)
        return
    if not fused.available():
        print(f"the fast version is the readable one here: {fused.why_not()}")
    made = {"command": "python benchmarks/search_step.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
            "date": date.today().isoformat(), "machine": machine(), "threads": options.threads}
    if options.growth:
        save(options.save, {"growth": growth(SIZES["small"], options.rounds) | made})
        return
    for name in options.size:
        save(options.save, {name: measure(name, options.versions, options.rounds, options.threads) | made})


def save(path: Path | None, found: dict) -> None:
    """Add what was found to the file, where other sizes may stand."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
