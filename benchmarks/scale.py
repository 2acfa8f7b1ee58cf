"""What one step costs as the cell grows, for docs/scale.md: seconds and peak memory of a search step and of a training step, by hidden size.

    OMP_NUM_THREADS=1 python benchmarks/scale.py --save

Each is measured in a process of its own. T and B are small, so that a hidden size of 4,000 fits a small machine; the page scales the figures by the
number of tokens. The results file also has the reading of a large text. That was timed separately, on a generated text of 40 million words.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from epsilon import LossOf
from hardware import keep, made, peak_gb

RESULT = Path(__file__).parent / "results" / "scale.json"
T, B, V, N = 8, 8, 10_000, 8
HIDDEN = {"search": (300, 1000, 2000, 4000), "retrain": (300, 850, 2000, 4000)}


def one(part: str, hidden_size: int, rounds: int = 2) -> dict:
    """Seconds of a step of `part`, "search" or "retrain" (the shortest of `rounds`), the process's peak memory in GB, and the number of weights."""
    import torch

    from nni_darts_rnn import DARTS_V2, LanguageModel
    from nni_darts_rnn.bilevel import architecture_gradient
    from nni_darts_rnn.supernet import MixedRNN
    from nni_darts_rnn.weight_step import WeightStep

    torch.manual_seed(0)
    if part == "search":
        lm = LanguageModel(V, MixedRNN(hidden_size, hidden_size, N))
        alpha = [lm.rnn.alpha]
    else:
        lm, alpha = LanguageModel.from_genotype(V, hidden_size, DARTS_V2), []
    weights = {name: p for name, p in lm.named_parameters() if name != "rnn.alpha"}
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)
    train, valid = ((*batch, lm.init_hidden(B)) for batch in torch.randint(V, (2, 2, T, B)))
    module = LossOf(lm)

    def loss(at_weights, at_alphas, batch):
        values = dict(zip((f"lm.{name}" for name in weights), at_weights)) | dict(zip(("lm.rnn.alpha",), at_alphas))
        return torch.func.functional_call(module, values, batch)

    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        if alpha:
            tensors = list(weights.values())
            architecture_gradient(loss, tensors, alpha, train, valid, WeightStep.of(optimizer, tensors, 0.25))
        optimizer.zero_grad()
        module(*train).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 0.25)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds), "gigabytes": peak_gb(), "parameters": sum(p.numel() for p in weights.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--one", nargs=2, metavar=("PART", "H"), help="measure one and print it")
    arguments = parser.parse_args()
    if arguments.one:
        hidden_size = int(arguments.one[1])
        print(json.dumps(one(arguments.one[0], hidden_size, 1 if hidden_size >= 4000 else 2)))
        return
    import torch

    found = made(__file__, ["--save"], sizes={"T": T, "B": B, "V": V, "N": N}, threads=torch.get_num_threads())
    for part, sizes in HIDDEN.items():
        found[part] = {}
        for hidden_size in sizes:
            done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--one", part, str(hidden_size)], capture_output=True, text=True, check=True)
            found[part][str(hidden_size)] = json.loads(done.stdout.splitlines()[-1])
            print(part, hidden_size, found[part][str(hidden_size)], flush=True)
    if arguments.save:
        keep(RESULT, json.loads(RESULT.read_text(encoding="utf-8")) | found)  # keeps the reading of a large text, which was timed separately


if __name__ == "__main__":
    main()
