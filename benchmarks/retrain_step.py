"""Tokens per second of a retraining step: the discrete cell as published code runs it, readable and fast, and `nn.LSTM` and `nn.GRU`.

    python benchmarks/retrain_step.py --size paper --rounds 5 --save

"layer" is forward and backward of the recurrent layer alone, on T·B tokens of random numbers. LSTM and GRU have as many recurrent parameters as the cell,
4H² + 2NH², so their H is larger. The arithmetic of a time step is then the same for all: two operations for each parameter and token.
"model" is the same with embedding, decoder, loss, clipping and SGD, for the forms of the cell alone.

"fused" keeps all digits of float32. "fewer-digits" keeps those to which commands set torch (TF32 on a GPU). "bfloat16" runs under torch's autocast, as a
training with `retrain.precision=bfloat16` does where the processor gains from it. On a CPU the compiled cell gains from either only with AMX.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from hardware import add_options, gemm_peak, keep, made, shortest, use
from step_size import Size
from torch import Tensor, nn

from nni_darts_rnn import fused
from nni_darts_rnn.cell import ACTIVATIONS, DiscreteRNN, variational_mask
from nni_darts_rnn.genotype import DARTS_V2, Genotype
from nni_darts_rnn.model import LanguageModel

RESULTS = Path(__file__).parent / "results" / "retrain_step.json"
SIZES = {"small": Size(35, 32, 64, 2000), "paper": Size(35, 64, 850, 10000)}
DROPOUT_X, DROPOUT_H = 0.75, 0.25
FORMS = ("readable", "fused", "fewer-digits", "bfloat16")


class OriginalLayer(nn.Module):
    """The layer as published code runs it: a loop over time steps and nodes. Each time step concatenates input and hidden state and multiplies them."""

    def __init__(self, hidden_size: int, genotype: Genotype):
        super().__init__()
        H = self.input_size = self.hidden_size = hidden_size
        self.genotype = genotype
        self.W0 = nn.Parameter(torch.empty(2 * H, 2 * H).uniform_(-0.04, 0.04))
        self.Ws = nn.ParameterList([nn.Parameter(torch.empty(H, 2 * H).uniform_(-0.04, 0.04)) for _ in genotype.recurrent])

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        mask_x, mask_h = variational_mask(h, DROPOUT_X, True), variational_mask(h, DROPOUT_H, True)
        outputs = []
        for x_t in x:
            c, z = torch.split(torch.cat([x_t * mask_x, h * mask_h], -1).mm(self.W0), self.hidden_size, -1)
            states = [h + c.sigmoid() * (z.tanh() - h)]
            for W, (op, j) in zip(self.Ws, self.genotype.recurrent):
                s = states[j]
                c, z = torch.split((s * mask_h).mm(W), self.hidden_size, -1)
                states.append(s + c.sigmoid() * (ACTIVATIONS[op](z) - s))
            h = torch.mean(torch.stack([states[i] for i in self.genotype.concat], -1), -1)
            outputs.append(h)
        return torch.stack(outputs)  # (T, B, H)


class TorchLayer(nn.Module):
    """nn.LSTM or nn.GRU with as near `target` parameters as its H allows, not counting biases."""

    def __init__(self, kind: str, target: int):
        super().__init__()
        gates = {"LSTM": 4, "GRU": 3}[kind]
        self.hidden_size = round((target / (2 * gates)) ** 0.5)
        self.rnn = getattr(nn, kind)(self.hidden_size, self.hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.rnn(x)[0]


def layers(size: Size, genotype: Genotype) -> dict[str, nn.Module]:
    count = 4 * size.H**2 + 2 * genotype.n_nodes * size.H**2
    ours = {name: DiscreteRNN(size.H, size.H, genotype, DROPOUT_X, DROPOUT_H) for name in FORMS}
    return {"original": OriginalLayer(size.H, genotype), **ours, **{name: TorchLayer(name.partition(",")[0], count) for name in ("LSTM", "LSTM, bfloat16", "GRU")}}


def precision(name: str):
    """Set the compiled cell and the precision of products for the form `name`, and return the context in which its forward pass runs."""
    fused.enable(name in FORMS[1:])
    torch.set_float32_matmul_precision("high" if name == "fewer-digits" else "highest")
    return torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled="bfloat16" in name)


def layer_step(name: str, layer: nn.Module, size: Size):
    x, h = torch.randn(size.T, size.B, layer.hidden_size, requires_grad=True), torch.zeros(size.B, layer.hidden_size)

    def step():
        with precision(name):
            out = layer(x, h)
        out.sum().backward()

    return step


def model_step(name: str, layer: nn.Module, size: Size):
    model = LanguageModel(size.V, layer, dropout=0.75, dropout_i=0.2, dropout_e=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x, y, h = size.batch()

    def step():
        optimizer.zero_grad()
        with precision(name):
            if name == "original":
                decoded, _, _, _ = model(x, h)
                loss = F.nll_loss(F.log_softmax(decoded.view(-1, size.V), -1), y.view(-1))
            else:
                loss = model.loss(x, y, h)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    return step


def that_run(steps: dict) -> dict:
    """Those `steps` that run on this machine. oneDNN has no LSTM in bfloat16 for processors without AVX-512; such a step is left out with a message."""
    able = {}
    for name, step in steps.items():
        try:
            step()
            able[name] = step
        except RuntimeError as problem:
            if "primitive" not in str(problem):
                raise
            print(f"{name} is left out: torch cannot run it on this machine ({str(problem).splitlines()[0]})")
    return able


def report(title: str, best: dict[str, float], size: Size) -> dict:
    print(f"{title:>14} {'tokens/s':>10} {'ratio':>8}")
    for name, seconds in best.items():
        print(f"{name:>14} {size.T * size.B / seconds:>10,.0f} {best['original'] / seconds:>7.2f}x")
    return {name: {"tokens_per_second": size.T * size.B / s, "ratio": best["original"] / s} for name, s in best.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    add_options(parser, RESULTS)
    options = parser.parse_args(arguments)
    use(options)
    if not fused.available():
        print(f"the fast version is the readable one here: {fused.why_not()}")
    result = made(__file__, arguments, threads=options.threads) | {"sizes": {}}
    for name in options.size:
        size, genotype, load, peak = SIZES[name], DARTS_V2, os.getloadavg()[0], gemm_peak()
        torch.manual_seed(0)
        built = layers(size, genotype)
        flops = 3 * 2 * (4 + 2 * genotype.n_nodes) * size.H**2 * size.T * size.B  # 3: forward, backward for data, backward for weights
        best = shortest(that_run({n: layer_step(n, layer, size) for n, layer in built.items()}), options.rounds)
        print(f"\n{name}: {size._asdict()}, layer {flops / 1e9:,.1f} GFLOP a step, GEMM peak {peak / 1e9:,.0f} GFLOP/s, "
              f"fast layer at {flops / best['fused'] / peak:.0%} of it, load average at the start {load:.1f}")
        rows = report("layer", best, size)
        models = {n: model_step(n, built[n], size) for n in ("original", *FORMS)}
        result["sizes"][name] = {"size": size._asdict(), "gemm_peak_flops": peak, "load_average": load, "layer_flops": flops, "layer": rows,
                                 "layer_hidden_sizes": {n: layer.hidden_size for n, layer in built.items()},
                                 "model": report("model", shortest(models, options.rounds), size)}
    keep(options.save, result)


if __name__ == "__main__":
    main()
