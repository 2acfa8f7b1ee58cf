"""Searches for recurrent cells with second-order DARTS on NNI, and retrains them through fastai."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_WHERE = {
    "genotype": ("Genotype", "PRIMITIVES", "DARTS_V1", "DARTS_V2", "ENAS", "DRAWN_V1", "derive"),
    "cell": ("register_primitive",),
    "layer": ("DartsRNN",),
    "model": ("LanguageModel",),
    "supernet": ("MixedRNN",),
    "corpus": ("load_corpus",),
    "recipes": ("RECIPES", "get_recipe"),
    "trained": ("load_searched_model",),
    "space": ("DartsRnnSpace",),
    "strategy": ("SecondOrderDARTS",),
    "evaluator": ("search_evaluator",),
    "fastai_evaluator": ("FastaiEvaluator",),
    "callbacks.arch_update": ("ArchParamUpdate",),
    "callbacks.averaging": ("NTASGD",),
    "callbacks.reports": ("PrintGenotype", "NNIReporter"),
    "learner": ("lm_learner", "search_learner"),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    # at the first use of a name, so that importing the package does not import torch, NNI, Lightning or fastai
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
