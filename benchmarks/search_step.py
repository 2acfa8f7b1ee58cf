"""One whole search step, computed in several ways that take turns in one process: seconds, share of the machine's peak, and peak memory.

    python benchmarks/search_step.py --size paper --rounds 5 --save
    python benchmarks/search_step.py --growth

The versions in second order are the published code's, and ours with the readable cell, with the one that needs no compiler and with the compiled one. Two
more run in Lightning's loop: NNI's stock first-order `DARTS` and the package's strategy, on the same space. "products" is the arithmetic alone.

The shortest of the rounds counts. A second-order step is: the weights' gradient on a training batch, the gradients of weights and α on a validation batch at
w′, two gradients of α at w ± εu, and the weight step. "original" and "own-gradient" compute another gradient for the weight step, as the paper's Algorithm 1
does; the others use the first one. Peak memory is that of a process that runs one version alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from epsilon import LossOf
from hardware import Products, add_options, gemm_peak, keep, made, peak_gb, shortest, use
from published_step import Original
from step_size import CLIP, DECAY, DROPOUT, EPSILON, RATE, SIZES, TAR, Size
from torch import Tensor

from nni_darts_rnn import extension, fused
from nni_darts_rnn.bilevel import RandomState, TrainingPass, architecture_gradient
from nni_darts_rnn.model import LanguageModel, activation_regularisation
from nni_darts_rnn.supernet import MixedRNN
from nni_darts_rnn.weight_step import WeightStep

RESULTS = Path(__file__).parent / "results" / "search_step.json"


class Ours:
    """`bilevel.architecture_gradient` and the weight step, with one of three cells: "readable", "eager" (runs where nothing is compiled) or "fused" (compiled).

    `digits` is the precision of float32 products, as torch is told: "all" or "fewer". The compiled cell computes either on the processor's tiles for bfloat16,
    where it has them. "no tiles" keeps all digits and computes as on a processor without tiles.
    """

    def __init__(self, size: Size, cell: str, relaxation: str = "edge", own_gradient: bool = False, digits: str = "all"):
        self.cell, self.own_gradient, self.digits = cell, own_gradient, digits
        rnn = MixedRNN(size.H, size.H, size.N, dropout_x=DROPOUT["dropout_x"], dropout_h=DROPOUT["dropout_h"], relaxation=relaxation)
        self.model = LanguageModel(size.V, rnn, dropout=DROPOUT["dropout"], dropout_i=DROPOUT["dropout_i"])
        named = dict(self.model.named_parameters())
        self.alpha = named.pop("rnn.alpha").requires_grad_(False)  # as in a search: the training pass computes no gradient of α
        self.names, self.weights = list(named), list(named.values())
        self.optimizer = torch.optim.SGD(self.weights, lr=RATE, weight_decay=DECAY)
        self.arch = torch.optim.Adam([self.alpha], lr=3e-3, weight_decay=1e-3)
        self.module = LossOf(self.model)

    def loss(self, weights, alphas, batch) -> Tensor:
        parameters = {f"lm.{name}": w for name, w in zip(self.names, weights)} | {"lm.rnn.alpha": alphas[0]}
        return torch.func.functional_call(self.module, parameters, batch)

    def __call__(self, train, valid) -> None:
        fused.enable(self.cell == "fused")
        torch.set_float32_matmul_precision("high" if self.digits == "fewer" else "highest")
        with fused.reference() if self.cell == "readable" else no_tiles() if self.digits == "no tiles" else contextlib.nullcontext():
            self.step(train, valid)
        torch.set_float32_matmul_precision("highest")

    def step(self, train, valid) -> None:
        step = WeightStep.of(self.optimizer, self.weights, CLIP)
        ran = None if self.own_gradient else self.backward(train)
        found = architecture_gradient(self.loss, self.weights, [self.alpha], train, valid, step, epsilon=EPSILON, ran=ran)
        self.alpha.grad = found.grads[0]
        self.arch.step()
        if self.own_gradient:
            self.backward(train)
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()

    def backward(self, train) -> TrainingPass:
        """Run the training pass, and leave the weights with their gradients."""
        start = RandomState(self.weights)
        self.optimizer.zero_grad()
        nll, raw, dropped, _ = self.model.loss(*train)
        loss = nll + activation_regularisation(raw, dropped, 0.0, TAR)
        grads = torch.autograd.grad(loss, self.weights)
        for w, g in zip(self.weights, grads):
            w.grad = g
        return TrainingPass(grads, loss.detach(), start)


def no_tiles():
    """In the context, the compiled cell and loss multiply as on a processor without AMX."""
    library = extension.State.loaded
    return contextlib.nullcontext() if library is None else mock.patch.object(library, "rounds", False)


def through_nni(size: Size, **options):
    from through_nni import ThroughNNI  # imported here: the memory that NNI and Lightning take must not count for other versions

    return ThroughNNI(size, **options)


VERSIONS = {
    "original": Original,
    "readable": lambda size: Ours(size, "readable"),
    "eager": lambda size: Ours(size, "eager"),
    "own-gradient": lambda size: Ours(size, "fused", own_gradient=True),
    "no-tiles": lambda size: Ours(size, "fused", digits="no tiles"),
    "fused": lambda size: Ours(size, "fused"),
    "fewer-digits": lambda size: Ours(size, "fused", digits="fewer"),  # the precision to which commands set torch
    "drawn": lambda size: Ours(size, "fused", "gumbel"),  # draws a discrete cell in each pass
    "nni-first-order": lambda size: through_nni(size, first_order=True, fast=False),  # as NNI computes it: the readable cell with autograd
    "nni-second-order": lambda size: through_nni(size, first_order=False, fast=True),  # a search as users run it
    "products": lambda size: Products(size.shared_flops()),  # not a step: the arithmetic alone
}


FLOPS = {"original": Size.flops, "own-gradient": Size.flops, "nni-first-order": Size.first_order_flops, "drawn": Size.drawn_flops}
"""The arithmetic of the versions that differ from the default: a second-order step of the mixed cell whose weight step reuses the gradient."""


def compare(steps: dict[str, tuple[str, Size]], rounds: int) -> dict[str, float]:
    """The shortest run of each step in seconds; the steps take turns. `steps`: name -> (version, size)."""
    torch.manual_seed(0)
    return shortest({name: functools.partial(VERSIONS[version](size), size.batch(), size.batch()) for name, (version, size) in steps.items()}, rounds)


def peak_memory(name: str, size_name: str, options) -> float:
    """The peak memory in GB of a process that runs two steps of one version alone."""
    command = [sys.executable, __file__, "--size", size_name, "--threads", str(options.threads), "--device", options.device, "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(size_name: str, options) -> dict:
    """Measure all chosen versions at one size: its figures, with a row for each version under "versions"."""
    size, names, load = SIZES[size_name], options.versions, os.getloadavg()[0]
    before, best, after = gemm_peak(), compare({name: (name, size) for name in names}, options.rounds), gemm_peak()
    peak = max(before, after)
    print(f"\n{size_name}: {size._asdict()}, {size.shared_flops() / 1e9:,.1f} GFLOP a step, {size.flops() / 1e9:,.1f} with a gradient of the weight step's own, "
          f"GEMM peak {peak / 1e9:,.0f} GFLOP/s (before {before / 1e9:,.0f}, after {after / 1e9:,.0f}), load average at the start {load:.1f}")
    print(f"{'version':>16} {'ms/step':>10} {'ratio':>7} {'of peak':>8} {'peak GB':>8}")
    rows = {}
    for name in names:
        share = FLOPS.get(name, Size.shared_flops)(size) / best[name] / peak
        rows[name] = {"ms": 1e3 * best[name], "ratio": best[names[0]] / best[name], "share_of_peak": share,
                      "peak_gb": peak_memory(name, size_name, options)}
        print(f"{name:>16} {rows[name]['ms']:>10,.1f} {rows[name]['ratio']:>6.2f}x {share:>8.0%} {rows[name]['peak_gb']:>8.2f}")
    return {"size": size._asdict(), "flops": size.flops(), "shared_flops": size.shared_flops(), "gemm_peak_flops": peak, "load_average": load,
            "rounds": options.rounds, "versions": rows}


def growth(size: Size, rounds: int) -> dict:
    """How the time of the compiled step grows when one of T, B, H, V and N is doubled."""
    grown = {}
    print(f"\ngrowth from {size._asdict()}")
    for axis in Size._fields:
        larger = size._replace(**{axis: 2 * getattr(size, axis)})
        before, after = compare({"as it is": ("fused", size), "doubled": ("fused", larger)}, rounds).values()
        grown[axis] = {"ms": 1e3 * before, "ms_doubled": 1e3 * after, "ratio": after / before, "flops_ratio": larger.shared_flops() / size.shared_flops()}
        print(f"  2{axis}: {1e3 * before:,.1f} -> {1e3 * after:,.1f} ms, {after / before:.2f}x (arithmetic {grown[axis]['flops_ratio']:.2f}x)")
    return grown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS), help="the first is what ratios refer to")
    add_options(parser, RESULTS)
    parser.add_argument("--growth", action="store_true", help="how the fast step grows with each axis, from the small size")
    parser.add_argument("--memory-of", choices=VERSIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    use(options)
    if options.memory_of:
        size = SIZES[options.size[0]]
        step = VERSIONS[options.memory_of](size)
        for _ in range(2):
            step(size.batch(), size.batch())
        print(peak_gb())
        return
    if not fused.available():
        print(f"the compiled versions are those that need no compiler here: {fused.why_not()}")
    how = made(__file__, arguments, threads=options.threads)
    if options.growth:
        save(options.save, {"growth": growth(SIZES["small"], options.rounds) | how})
        return
    for name in options.size:
        save(options.save, {name: measure(name, options) | how})


def save(path: Path | None, found: dict) -> None:
    """Add `found` to the file, and keep what it has of other sizes."""
    before = json.loads(path.read_text()) if path is not None and path.exists() else {}
    keep(path, before | found)


if __name__ == "__main__":
    main()
