"""A found cell in the place of `nn.GRU`, on numbers instead of words: it predicts the next sample of a four-channel EEG, which matplotlib ships.

    python examples/time_series.py [--genotype FILE]

The two layers have about equally many weights, and the same readout, optimizer and batches. The error is the mean squared error over the last fifth of the
record, in units of a channel's variance. "The sample before" is the error of a forecast that nothing changes.
"""

import argparse

import numpy as np
import torch
from matplotlib import cbook
from torch import nn

from nni_darts_rnn import DartsRNN
from nni_darts_rnn.genotype import load_genotype


def eeg():
    """The record (T, 4), and the index at which its test part begins. Up to there each channel has mean 0 and variance 1."""
    x = np.fromfile(cbook.get_sample_data("eeg.dat", asfileobj=False), dtype=np.float64).reshape(-1, 4)
    cut = len(x) * 4 // 5
    return torch.tensor((x - x[:cut].mean(0)) / x[:cut].std(0), dtype=torch.float32), cut


class Forecast(nn.Module):
    """Predicts the next sample, as the present one plus a change that the layer computes from the samples so far."""

    def __init__(self, rnn, hidden_size):
        super().__init__()
        self.rnn, self.readout = rnn, nn.Linear(hidden_size, 4)

    def forward(self, x, h=None):  # (T, B, 4) -> (T, B, 4), (layers, B, H)
        output, h = self.rnn(x, h)
        return x + self.readout(output), h


def error(rnn, hidden_size, x, cut, steps, seed=0):
    """The mean squared error on the test part, after `steps` steps of training on the rest in windows of 32 predictions."""
    generator = torch.Generator().manual_seed(seed)
    model = Forecast(rnn, hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        starts = torch.randint(cut - 33, (16,), generator=generator)
        window = torch.stack([x[s:s + 33] for s in starts], 1)  # (33, 16, 4)
        loss = (model(window[:-1])[0] - window[1:]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        forecast, _ = model(x[:-1, None])
    return float((forecast[cut - 1:, 0] - x[cut:]).pow(2).mean())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genotype", default="DARTS_V2", help="a name (default DARTS_V2), or the genotype.json of a search")
    parser.add_argument("--steps", type=int, default=400, help="of training, of 16 windows each; default 400")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    arguments = parser.parse_args(argv)
    try:
        genotype = load_genotype(arguments.genotype)
    except ValueError as wrong:
        parser.error(str(wrong))
    torch.manual_seed(arguments.seed)
    x, cut = eeg()
    found = {"the sample before": float((x[cut:] - x[cut - 1:-1]).pow(2).mean())}
    layers = {"nn.GRU": (nn.GRU(4, 46), 46), "DartsRNN": (DartsRNN(4, 20, genotype), 20)}
    for name, (rnn, hidden_size) in layers.items():
        found[name] = error(rnn, hidden_size, x, cut, arguments.steps, arguments.seed)
        print(f"{name}: {found[name]:.4f} with {sum(p.numel() for p in rnn.parameters()):,} weights", flush=True)
    print(f"the sample before: {found['the sample before']:.4f}")
    return found


if __name__ == "__main__":
    main()
