"""fastai callbacks for training and searching recurrent language models.

Batches are as in fastai: tokens and targets (B, T). A model returns `(decoded (B, T, V), raw (B, T, H), dropped (B, T, H))`, as fastai's `RNNCallback`
expects.

The callbacks depend on their `order`. At 60, fastai's schedulers and `AnnealLR` set the learning rate. `ScaleLRByLength` (61) scales it, and
`ArchParamUpdate` (62) unrolls the step with the scaled rate. `SaveModelCallback` (61) saves the weights that were validated, before `NTASGD` (62) puts the
weights of the iteration back.
"""

from .arch_passes import architecture_parameters, weight_parameters
from .arch_update import ArchParamUpdate
from .averaging import NTASGD
from .best_model import BestModel
from .fit_only import FitOnly
from .reports import EpochReport, MetricsCSV, NNIReporter, PerplexityInBar, PrintGenotype
from .step import ActivationRegularizer, AnnealLR, FiniteNumbers, ScaleLRByLength

__all__ = ["ActivationRegularizer", "AnnealLR", "ArchParamUpdate", "BestModel", "EpochReport", "FiniteNumbers", "FitOnly", "MetricsCSV", "NNIReporter", "NTASGD",
           "PerplexityInBar", "PrintGenotype", "ScaleLRByLength", "architecture_parameters", "weight_parameters"]
