"""The same search through NNI's strategy and through one fastai `Learner.fit`: the same α from the same seed."""

from __future__ import annotations

import pytest
import torch

from nni_darts_rnn.corpus import Corpus, Vocabulary
from nni_darts_rnn.recipes import get_recipe


def corpus(n: int) -> Corpus:
    words = ("<eos>", "<unk>", *(f"w{i}" for i in range(10)))
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, len(words), (k,), generator=generator) for k in (n, n // 3, n // 3)]
    return Corpus("made", Vocabulary(words), *texts)


@pytest.mark.parametrize("settings", [{}, {"search.unrolled_lr": 0.5, "search.warmup_epochs": 1}, {"search.hvp": "first_order", "search.ar": 0.1},
                                      {"search.relaxation": "node"}, {"search.own_gradient": True}, {"search.hvp": "exact"}, {"search.relaxation": "gumbel"},
                                      {"search.relaxation": "gumbel", "search.alpha_dropout": False, "search.draws": 3},
                                      {"search.optimizer": "adam", "search.lr": 0.01}, {"search.optimizer": "adam", "search.lr": 0.01, "search.unrolled_lr": 0.1, "search.relaxation": "gumbel"},
                                      {"search.anneal": 0.7, "search.short_bptt_probability": 0.5}])
def test_nni_and_fastai_give_the_same_alpha_step_for_step(tmp_path, settings, monkeypatch):
    from fastai.callback.core import Callback

    from nni_darts_rnn.learner import language_dls, search_learner
    from nni_darts_rnn.search import search

    recipe = get_recipe("tiny", {"search.epochs": 2, "search.bptt": 6, "search.batch_size": 4, "search.eval_batch_size": 4} | settings).search
    steps: list[torch.Tensor] = []  # α after each of its steps

    def step(self, *args, **kwargs):
        adam_step(self, *args, **kwargs)
        first = self.param_groups[0]["params"][0]
        if first.shape == (recipe.n_nodes * (recipe.n_nodes + 1) // 2, 5):  # and not the weights', where they have Adam too
            steps.append(first.detach().clone())

    adam_step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    torch.set_default_dtype(torch.float64)
    try:
        through_nni = search(corpus(400), recipe, seed=5, device="cpu")
        through_strategy, steps[:] = list(steps), []
        learn = search_learner(language_dls(corpus(400), recipe, seed=5, device="cpu"), recipe, seed=5, path=tmp_path)
        alphas = [learn.model.lm.rnn.alpha.detach().clone()]
        learn.add_cb(Callback(after_train=lambda _: alphas.append(learn.model.lm.rnn.alpha.detach().clone())))
        with learn.no_bar(), learn.no_logging():
            begun = 0
            for end in [recipe.epochs] if recipe.anneal else range(1, recipe.epochs + 1):  # the falling rate has to know where the whole fit ends
                learn.fit(end, start_epoch=begun, reset_opt=False)
                begun = end
    finally:
        torch.set_default_dtype(torch.float32)
    ours = torch.tensor(through_nni.alphas, dtype=torch.float64)  # (epochs+1, E, K)
    moved = (ours[-1] - ours[0]).abs().max()
    assert moved > 1e-3
    assert torch.allclose(ours, torch.stack(alphas), rtol=0, atol=1e-8)  # fastai takes AR and TAR in float32
    assert len(steps) == len(through_strategy) > 10
    assert torch.allclose(torch.stack(steps), torch.stack(through_strategy), rtol=0, atol=1e-8)
