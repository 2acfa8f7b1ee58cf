"""NNI's own strategies, each with its fault of NNI 3.0 worked round; what needs no workaround is NNI's class itself.

| here | NNI 3.0 with today's packages | can go once NNI |
|---|---|---|
| `DARTS`, `GumbelDARTS`, `Proxyless` | list α as `list(set(…))`, in the order of addresses: a resumed Adam may give a moment to another α | lists α in the order of the modules |
| `DARTS`, `GumbelDARTS`, `Proxyless` | fail at the end of an epoch with `ReduceLROnPlateau`, which is refused here | leaves it out, as it means to |
| `Proxyless` | exports a path drawn anew from α | exports the strongest path |
| `RandomOneShot` | draws its paths from a generator that nothing seeds | draws from one that can be seeded |
| `ENAS` | its loader hands Lightning 2 batches that its step takes apart wrongly | unpacks what its loader yields |
| `ENAS` | makes a new, untrained controller to export from; never clips the gradient | keeps the controller in `set_model` |
| `ENAS`, `PolicyBasedRL` | without a fitting tianshou fail with advice to install one that does not fit | says `tianshou<0.5` |
| `TPE` | raises on an `InputChoice` and on numbers, and takes the smallest metric for the best where every other strategy takes the largest | gives `CategoricalMultiple` and `Numerical` an `as_legacy_dict` |
| `GridSearch` | hands out one dictionary as the sample of all models in format "raw", and empties it | copies it |
| `PolicyBasedRL` | trains a sample again as often as its policy draws it | gives it the `dedup` of the other strategies |

All take the largest metric for the best.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from nni.mutable import Categorical, CategoricalMultiple, Numerical
from nni.nas import strategy as nni_strategy
from nni.nas.execution.event import ModelEventType
from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedInput, DifferentiableMixedLayer
from nni.nas.oneshot.pytorch.supermodule.proxyless import ProxylessMixedInput, ProxylessMixedLayer, ProxylessMixedRepeat
from nni.nas.space import ModelStatus
from nni.nas.strategy import Random, RegularizedEvolution
from nni.nas.strategy.middleware import Deduplication

from .strategy import SecondOrderDARTS, alpha_in_order, check_schedulers

__all__ = ["DARTS", "ENAS", "GridSearch", "GumbelDARTS", "PolicyBasedRL", "Proxyless", "Random", "RandomOneShot", "RegularizedEvolution",
           "SecondOrderDARTS", "TPE"]


PATIENCE = 100
"""Known samples in a row after which `PolicyBasedRL` stops: its policy has settled, or the space holds no other."""


class _InOrder:
    """α in the order of the modules, for a strategy of NNI's DARTS family."""

    def configure_oneshot_module(self, training_module):
        module = super().configure_oneshot_module(training_module)
        module.arch_parameters = functools.partial(alpha_in_order, module)
        module.on_train_start = functools.partial(_checked_start, module, module.on_train_start)
        return module


def _checked_start(module, usual):
    check_schedulers(module.trainer, module.training_module)
    return usual()


class DARTS(_InOrder, nni_strategy.DARTS):
    """NNI's `DARTS`: first order."""


class GumbelDARTS(_InOrder, nni_strategy.GumbelDARTS):
    """NNI's `GumbelDARTS`. On our space its noise is drawn once per sequence, and not once per time step."""


class Proxyless(_InOrder, nni_strategy.Proxyless):
    """NNI's `Proxyless`, exporting for every choice the path that its α makes likeliest."""

    def configure_oneshot_module(self, training_module):
        module = super().configure_oneshot_module(training_module)
        module.export = functools.partial(_strongest_paths, module)
        return module


def _strongest_paths(module) -> dict:
    """What the mixed layers below Proxyless's would export; its own draw a path. Of a `Repeat` the depth that is likeliest of those allowed."""
    below = {ProxylessMixedLayer: DifferentiableMixedLayer, ProxylessMixedInput: DifferentiableMixedInput}
    sample: dict = {}
    repeats = [layer for layer in module.supernet_modules() if isinstance(layer, ProxylessMixedRepeat)]
    for layer in module.supernet_modules():
        if layer not in repeats:
            sample.update(below.get(type(layer), type(layer)).export(layer, memo=sample))
    for repeat in repeats:  # a depth is how many of its blocks are there, each by a choice of its own
        probabilities = repeat.export_probs({})[repeat.depth_choice.label]
        depth = max(repeat.depth_choice.values, key=lambda d: float(probabilities[d]))
        sample[repeat.depth_choice.label] = depth
        for k in range(repeat.min_depth, repeat.max_depth):
            sample[repeat.blocks[k].label] = "1" if k < depth else "0"
    return sample


class RandomOneShot(nni_strategy.RandomOneShot):
    """NNI's `RandomOneShot`, whose paths follow numpy's seed, as `pytorch_lightning.seed_everything` sets it."""

    def mutate_model(self, model):
        supernet = super().mutate_model(model)
        state = np.random.RandomState(np.random.randint(2**31))
        for mutable in supernet.simplify().values():
            mutable.random = functools.partial(_draw, mutable.random, state)
        return supernet


def _draw(random, usual, memo=None, random_state=None):
    """`random` with the caller's generator, or else the usual one; the space's own choices are asked by the next strategy too, with its own."""
    return random(memo, usual if random_state is None else random_state)


def require_tianshou(what: str) -> None:
    """`ImportError` with one line that says what to install, where the reinforcement-learning library that NNI 3.0 was written for is absent."""
    wanted = "needs tianshou>=0.4.8,<0.5; pip install 'nni-darts-rnn[rl]'"
    try:
        found = version("tianshou")
    except PackageNotFoundError:
        raise ImportError(f"{what} {wanted}") from None
    if not (0, 4, 8) <= tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < (0, 5):
        raise ImportError(f"{what} {wanted}: tianshou {found} is installed, which NNI 3.0 does not work with")


class _Alternating:
    """All training batches and then all validation batches of an epoch, each with the word that the step of NNI's ENAS looks for."""

    def __init__(self, train, valid):
        self.parts = {"train": train, "val": valid}

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def __iter__(self):
        for word, part in self.parts.items():
            yield from zip(part, itertools.repeat(word))


class ENAS(nni_strategy.ENAS):
    """NNI's `ENAS`. The evaluator's `validation_step` has to log the reward, as "default" unless `reward_metric_name` says otherwise.

    gradient_clip_val
        Largest norm of the weights' gradient, as in `DARTS`; NNI's own never clips.
    """

    def __init__(self, *, gradient_clip_val: float | None = None, reward_metric_name: str = "default", **kwargs):
        require_tianshou("ENAS")
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(f"gradient_clip_val: {gradient_clip_val!r} must be above 0")
        super().__init__(reward_metric_name=reward_metric_name, **kwargs)
        self.gradient_clip_val = gradient_clip_val

    def train_dataloader(self, train_dataloader_fn, val_dataloader_fn):
        return _Alternating(train_dataloader_fn(), val_dataloader_fn())

    def configure_oneshot_module(self, training_module):
        module = super().configure_oneshot_module(training_module)
        module.advance_optimization = functools.partial(module.advance_optimization, gradient_clip_val=self.gradient_clip_val)
        module.set_model = functools.partial(_set_model_once, module)
        module.on_train_start = functools.partial(_whole_epochs, module, module.on_train_start)
        return module


def _whole_epochs(module, usual):
    """`ValueError` where an epoch is cut off before the validation batches, by which the controller learns."""
    check_schedulers(module.trainer, module.training_module)
    batches, loader = module.trainer.num_training_batches, module.trainer.train_dataloader
    if isinstance(loader, _Alternating) and math.isfinite(batches) and batches < len(loader) and not module.trainer.fast_dev_run:
        raise ValueError(f"limit_train_batches, overfit_batches: an epoch of ENAS is the training batches and then the validation batches, {len(loader)} in all, and {batches} of them "
                         "leave its controller untrained; shorten the loaders instead")
    return usual()


def _set_model_once(module, model) -> None:
    """`set_model` that makes the controller the first time only; NNI calls it again before it exports."""
    if module._generator is None:
        type(module).set_model(module, model)
    else:
        module.training_module.set_model(model)


class GridSearch(nni_strategy.GridSearch):
    """NNI's `GridSearch`."""

    def _grid_generator(self, model_space):
        for model in super()._grid_generator(model_space):
            model.sample = dict(model.sample)
            yield model


class _Replay(Deduplication):
    """NNI's middleware that gives a sample tried before the metrics it had. NNI's own passes on the missing metric of one that still runs."""

    def __init__(self):
        super().__init__("replay", patience=PATIENCE)

    def handle_duplicate_model(self, model) -> bool:
        while True:
            same = [m for m in self.engine.list_models() if m.sample == model.sample and m is not model]
            done = next((m for m in same if m.status == ModelStatus.Trained and m.metric is not None), None)
            if done is not None or all(m.status.completed() for m in same):
                break
            time.sleep(1)
        if done is None:  # it failed: that is no result
            return False
        for metric in done.metrics.intermediates:
            self.dispatch_model_event(ModelEventType.IntermediateMetric, metric=metric, model=model)
        self.dispatch_model_event(ModelEventType.FinalMetric, metric=done.metric, model=model)
        self.dispatch_model_event(ModelEventType.TrainingEnd, status=ModelStatus.Trained, model=model)
        return True


class PolicyBasedRL(nni_strategy.PolicyBasedRL):
    """NNI's `PolicyBasedRL`. With `dedup` a sample that the policy draws again gets the metrics it had and is not trained again."""

    def __init__(self, *, dedup: bool = True, **kwargs):
        require_tianshou("PolicyBasedRL")
        super().__init__(**kwargs)
        self.dedup = dedup

    def initialize(self, model_space, engine):
        if self.dedup:
            replay = _Replay()
            replay.set_engine(engine)
            engine = replay
        return super().initialize(model_space, engine)


class _Number:
    """A number to be drawn, as a tuner can read it."""

    def __init__(self, number: Numerical):
        self.number = number

    def as_legacy_dict(self) -> dict:
        n = self.number
        bounds, q = ([n.low, n.high] if n.mu is None else [n.mu, n.sigma]), ([] if n.quantize is None else [n.quantize])
        return {"_type": f"{'q' if q else ''}{'log' if n.log_distributed else ''}{'uniform' if n.mu is None else 'normal'}", "_value": bounds + q}


class _Plain:
    """A model space as a tuner can read it: a choice of several becomes one plain choice among all its values, and a number says how it is drawn."""

    def __init__(self, space):
        self.space = space

    def simplify(self) -> dict:
        def plain(label, mutable):
            if isinstance(mutable, CategoricalMultiple):
                return Categorical(list(mutable.grid()), label=label)
            # a distribution of the user's own, or a normal one that is cut off, no tuner has a word for
            described = isinstance(mutable, Numerical) and math.isfinite(mutable.low) == math.isfinite(mutable.high) == (mutable.mu is None)
            return _Number(mutable) if described else mutable

        return {label: plain(label, mutable) for label, mutable in self.space.simplify().items()}

    def freeze(self, sample: dict):
        return self.space.freeze(sample)


class TPE(nni_strategy.TPE):
    """NNI's `TPE`. `optimize_mode` is "maximize" unless given, as in every other strategy; NNI's own minimizes."""

    def __init__(self, optimize_mode: str = "maximize", seed: int | None = None, tpe_args: dict | None = None):
        super().__init__(optimize_mode, seed, tpe_args)

    def _initialize(self, model_space, engine):
        self._model_space = _Plain(model_space)
        return super()._initialize(model_space, engine)
