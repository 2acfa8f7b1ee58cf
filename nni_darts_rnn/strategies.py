"""NNI's own strategies, with workarounds for faults of NNI 3.0. A strategy that needs none is NNI's class itself.

| class here | what NNI 3.0 does with today's packages | can go once NNI |
|---|---|---|
| `DARTS`, `GumbelDARTS`, `Proxyless` | list α as `list(set(…))`, whose order depends on addresses: a resumed Adam may give its moments to another α | lists α in the order of the modules |
| `DARTS`, `GumbelDARTS`, `Proxyless` | give a `penalty` no gradient for α (`penalty.py`, also for `SecondOrderDARTS`) | computes it from tensors |
| `DARTS`, `GumbelDARTS`, `Proxyless` | fail at the end of an epoch with `ReduceLROnPlateau`, which is refused here | skips it, as intended |
| `Proxyless` | exports a path that it draws anew from α | exports the strongest path |
| `RandomOneShot` | draws its paths from a generator that nothing seeds | draws from one that can be seeded |
| `ENAS` | its loader gives batches that its step unpacks wrongly under Lightning 2 | unpacks what its loader yields |
| `ENAS` | exports from a new, untrained controller; never clips the gradient | keeps the controller in `set_model` |
| `ENAS`, `PolicyBasedRL` | fail without a suitable tianshou, and advise to install an unsuitable one | says `tianshou<0.5` |
| `TPE` | raises for an `InputChoice` and for numbers; minimizes the metric where every other strategy maximizes it | gives `CategoricalMultiple` and `Numerical` an `as_legacy_dict` |
| `GridSearch` | gives all models in format "raw" one and the same dictionary as their sample, and later empties it | copies it |
| `PolicyBasedRL` | trains a sample again each time that its policy draws it | gives it the `dedup` of the other strategies |

All maximize the metric.
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

from .penalty import with_gradient
from .strategy import SecondOrderDARTS, alpha_in_order, check_schedulers

__all__ = ["DARTS", "ENAS", "GridSearch", "GumbelDARTS", "PolicyBasedRL", "Proxyless", "Random", "RandomOneShot", "RegularizedEvolution",
           "SecondOrderDARTS", "TPE"]


PATIENCE = 100
"""`PolicyBasedRL` stops after this many known samples in a row: its policy has settled, or the space is exhausted."""


class _Mended:
    """α in the order of the modules, and penalties with a gradient; a mixin for strategies of NNI's DARTS family."""

    def configure_oneshot_module(self, training_module):
        module = super().configure_oneshot_module(training_module)
        module.arch_parameters = functools.partial(alpha_in_order, module)
        module.on_train_start = functools.partial(_checked_start, module, module.on_train_start)
        with_gradient(module)
        return module


def _checked_start(module, usual):
    check_schedulers(module.trainer, module.training_module)
    return usual()


class DARTS(_Mended, nni_strategy.DARTS):
    """NNI's `DARTS`: first order."""


class GumbelDARTS(_Mended, nni_strategy.GumbelDARTS):
    """NNI's `GumbelDARTS`. On our space it draws its noise once per sequence, not once per time step."""


class Proxyless(_Mended, nni_strategy.Proxyless):
    """NNI's `Proxyless`. For every choice it exports the most probable path by α."""

    def configure_oneshot_module(self, training_module):
        module = super().configure_oneshot_module(training_module)
        module.export = functools.partial(_strongest_paths, module)
        return module


def _strongest_paths(module) -> dict:
    """What the parent classes of Proxyless's mixed layers would export, since its own draw a path. For a `Repeat`, the most probable of the allowed depths."""
    below = {ProxylessMixedLayer: DifferentiableMixedLayer, ProxylessMixedInput: DifferentiableMixedInput}
    sample: dict = {}
    repeats = [layer for layer in module.supernet_modules() if isinstance(layer, ProxylessMixedRepeat)]
    for layer in module.supernet_modules():
        if layer not in repeats:
            sample.update(below.get(type(layer), type(layer)).export(layer, memo=sample))
    for repeat in repeats:  # a depth is the number of its blocks that are present; each has a choice of its own
        probabilities = repeat.export_probs({})[repeat.depth_choice.label]
        depth = max(repeat.depth_choice.values, key=lambda d: float(probabilities[d]))
        sample[repeat.depth_choice.label] = depth
        for k in range(repeat.min_depth, repeat.max_depth):
            sample[repeat.blocks[k].label] = "1" if k < depth else "0"
    return sample


class RandomOneShot(nni_strategy.RandomOneShot):
    """NNI's `RandomOneShot`. Its paths depend on numpy's seed, which `pytorch_lightning.seed_everything` sets."""

    def mutate_model(self, model):
        supernet = super().mutate_model(model)
        state = np.random.RandomState(np.random.randint(2**31))
        for mutable in supernet.simplify().values():
            mutable.random = functools.partial(_draw, mutable.random, state)
        return supernet


def _draw(random, usual, memo=None, random_state=None):
    """`random` with the caller's generator, or with `usual` where there is none. The space's choices outlive a strategy, and the next one brings its own generator."""
    return random(memo, usual if random_state is None else random_state)


def require_tianshou(what: str) -> None:
    """`ImportError` with one line that says what to install, unless the reinforcement-learning library that NNI 3.0 was written for is there."""
    wanted = "needs tianshou>=0.4.8,<0.5; pip install 'nni-darts-rnn[rl]'"
    try:
        found = version("tianshou")
    except PackageNotFoundError:
        raise ImportError(f"{what} {wanted}") from None
    if not (0, 4, 8) <= tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < (0, 5):
        raise ImportError(f"{what} {wanted}: tianshou {found} is installed, which NNI 3.0 does not work with")


class _Alternating:
    """All training batches of an epoch and then all validation batches, each with the word by which the step of NNI's ENAS tells them apart."""

    def __init__(self, train, valid):
        self.parts = {"train": train, "val": valid}

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def __iter__(self):
        for word, part in self.parts.items():
            yield from zip(part, itertools.repeat(word))


class ENAS(nni_strategy.ENAS):
    """NNI's `ENAS`. The evaluator's `validation_step` has to log the reward under the name `reward_metric_name`.

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
    """`ValueError` where an epoch ends before the last validation batch: these are what the controller learns from."""
    check_schedulers(module.trainer, module.training_module)
    batches, loader = module.trainer.num_training_batches, module.trainer.train_dataloader
    if isinstance(loader, _Alternating) and math.isfinite(batches) and batches < len(loader) and not module.trainer.fast_dev_run:
        raise ValueError(f"limit_train_batches, overfit_batches: an epoch of ENAS is the training batches and then the validation batches, {len(loader)} in all, and {batches} of them "
                         "leave its controller untrained; shorten the loaders instead")
    return usual()


def _set_model_once(module, model) -> None:
    """`set_model` that makes the controller only once; NNI calls it again before it exports."""
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
    """NNI's middleware that answers a known sample with the metrics it had. Where that sample still runs, this one waits; NNI's own passes on a missing metric."""

    def __init__(self):
        super().__init__("replay", patience=PATIENCE)

    def handle_duplicate_model(self, model) -> bool:
        while True:
            same = [m for m in self.engine.list_models() if m.sample == model.sample and m is not model]
            done = next((m for m in same if m.status == ModelStatus.Trained and m.metric is not None), None)
            if done is not None or all(m.status.completed() for m in same):
                break
            time.sleep(1)
        if done is None:  # they failed, which is no result
            return False
        for metric in done.metrics.intermediates:
            self.dispatch_model_event(ModelEventType.IntermediateMetric, metric=metric, model=model)
        self.dispatch_model_event(ModelEventType.FinalMetric, metric=done.metric, model=model)
        self.dispatch_model_event(ModelEventType.TrainingEnd, status=ModelStatus.Trained, model=model)
        return True


class PolicyBasedRL(nni_strategy.PolicyBasedRL):
    """NNI's `PolicyBasedRL`. With `dedup`, a sample that the policy draws again is not trained again but gets the metrics it had."""

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
    """A numerical choice in the words of NNI's tuners."""

    def __init__(self, number: Numerical):
        self.number = number

    def as_legacy_dict(self) -> dict:
        n = self.number
        bounds, q = ([n.low, n.high] if n.mu is None else [n.mu, n.sigma]), ([] if n.quantize is None else [n.quantize])
        return {"_type": f"{'q' if q else ''}{'log' if n.log_distributed else ''}{'uniform' if n.mu is None else 'normal'}", "_value": bounds + q}


def _is_described(n: Numerical) -> bool:
    """Whether its bounds, or its mean and deviation, are its distribution: tuners have no word for a truncated normal one, nor for one of the user's own."""
    if math.isfinite(n.low) != math.isfinite(n.high) or math.isfinite(n.low) != (n.mu is None):
        return False
    return n.equals(Numerical(n.low, n.high, mu=n.mu, sigma=n.sigma, log_distributed=n.log_distributed, quantize=n.quantize, default=n.default_value, label=n.label))


class _Plain:
    """A model space in the words of NNI's tuners: a choice of several becomes one plain choice among all combinations, and a number says how it is drawn."""

    def __init__(self, space):
        self.space = space

    def simplify(self) -> dict:
        def plain(label, mutable):
            if isinstance(mutable, CategoricalMultiple):
                return Categorical(list(mutable.grid()), label=label)
            return _Number(mutable) if isinstance(mutable, Numerical) and _is_described(mutable) else mutable

        return {label: plain(label, mutable) for label, mutable in self.space.simplify().items()}

    def freeze(self, sample: dict):
        return self.space.freeze(sample)


class TPE(nni_strategy.TPE):
    """NNI's `TPE`. It maximizes by default, as every other strategy does; NNI's own minimizes."""

    def __init__(self, optimize_mode: str = "maximize", seed: int | None = None, tpe_args: dict | None = None):
        super().__init__(optimize_mode, seed, tpe_args)

    def _initialize(self, model_space, engine):
        self._model_space = _Plain(model_space)
        return super()._initialize(model_space, engine)
