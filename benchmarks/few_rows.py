"""Tokens per second of a layer's forward pass over few rows: with threads that divide the rows, with threads that divide the units, and as published.

    python benchmarks/few_rows.py --rounds 5 --save

An evaluation in one stream has so few rows. There are no gradients and no dropout, and float32 keeps all digits; a pass has 70 time steps. LSTM and GRU run
beside the cell, with as many recurrent parameters, as in retrain_step.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import torch
from hardware import add_options, keep, made, shortest, use
from retrain_step import layers
from step_size import Size
from torch import nn

from nni_darts_rnn import compiled, fused
from nni_darts_rnn.genotype import DARTS_V2

RESULTS = Path(__file__).parent / "results" / "few_rows.json"
STEPS = 70


def step(layer: nn.Module, rows: int, shared: bool | None):
    """A function that runs one forward pass. `shared`: whether the compiled cell's threads divide the units, not the rows; None: no compiled cell."""
    x, h = torch.randn(STEPS, rows, layer.hidden_size), torch.zeros(rows, layer.hidden_size)

    def forward():
        fused.enable(shared is not None)
        with torch.no_grad(), mock.patch.object(compiled, "by_units", lambda *_: shared):
            layer(x, h)

    return forward


def measure(units: int, rows: int, rounds: int) -> dict[str, float]:
    """Tokens per second of each form. The forms take turns."""
    torch.manual_seed(0)
    built = {name: layer.eval() for name, layer in layers(Size(STEPS, rows, units, 0), DARTS_V2).items()}
    forms = {"original": (built["original"], None), "rows": (built["fused"], False), "units": (built["fused"], True), "LSTM": (built["LSTM"], None), "GRU": (built["GRU"], None)}
    best = shortest({name: step(layer, rows, shared) for name, (layer, shared) in forms.items()}, rounds)
    return {name: STEPS * rows / seconds for name, seconds in best.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", nargs="+", type=int, default=[300, 512, 850])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 10])
    add_options(parser, RESULTS)
    options = parser.parse_args(arguments)
    use(options)
    if not fused.available():
        parser.error(f"nothing to compare here: {fused.why_not()}")
    result = made(__file__, arguments, threads=options.threads) | {"tokens_per_second": {}}
    print(f"{'units':>6} {'rows':>5} {'original':>9} {'rows':>9} {'units':>9} {'LSTM':>9} {'GRU':>9}")
    for units in options.units:
        for rows in options.rows:
            found = measure(units, rows, options.rounds)
            result["tokens_per_second"][f"{units} units, {rows} rows"] = found
            print(f"{units:>6} {rows:>5} " + " ".join(f"{value:>9,.0f}" for value in found.values()), flush=True)
    keep(options.save, result)


if __name__ == "__main__":
    main()
