"""fastai's transfer learning with a found cell: a language model of docstrings, then a classifier that uses its encoder and needs few labels.

    python examples/transfer.py [--genotype FILE] [--epochs 6]

The text needs no download: it is paragraphs from the docstrings of four packages that fastai depends on. The classifier says which package a paragraph
comes from; the packages' names are cut out. The same classifier trained without the encoder shows what the language model is worth.
"""

import argparse
import ast
import importlib.util
import random
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from fastai.text.all import TextDataLoaders, accuracy, language_model_learner, set_seed, text_classifier_learner

from nni_darts_rnn.fastai_text import AWD_DARTS, awd_darts_clas_config, awd_darts_lm_config
from nni_darts_rnn.genotype import load_genotype

PACKAGES = ("matplotlib", "numpy", "pandas", "scipy")
NAMES = re.compile(rf"\b({'|'.join(PACKAGES)}|mpl|np|pd|plt|dataframe|series|axes|ndarray)\b", re.IGNORECASE)


def paragraphs(package, n, rng):
    """`n` random paragraphs from a package's docstrings that start with a capital letter and have 15 to 60 words, with the package names cut out."""
    found = set()
    for path in sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py")):
        if "tests" not in path.parts:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            documented = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))]
            for text in filter(None, map(ast.get_docstring, documented)):
                found |= {NAMES.sub("", " ".join(p.split())) for p in text.split("\n\n") if p[:1].isupper() and 15 <= len(p.split()) <= 60}
        if len(found) > 4 * n:
            break
    return rng.sample(sorted(found), n)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genotype", default="DARTS_V2", help="a name (default DARTS_V2), or the genotype.json of a search")
    parser.add_argument("--epochs", type=int, default=6, help="of the language model; a classifier gets three times as many; default 6")
    parser.add_argument("--paragraphs", type=int, default=1500, help="of each package, without labels; default 1500")
    parser.add_argument("--labels", type=int, default=20, help="paragraphs of each package with a label; default 20")
    parser.add_argument("--units", type=int, default=128, help="of the embedding and of each state; default 128")
    arguments = parser.parse_args(argv)
    try:
        genotype = load_genotype(arguments.genotype)
    except ValueError as wrong:
        parser.error(str(wrong))
    rng, sizes = random.Random(0), dict(emb_sz=arguments.units, n_hid=arguments.units, genotype=genotype)
    texts = {package: paragraphs(package, arguments.paragraphs, rng) for package in PACKAGES}
    unlabelled = pd.DataFrame({"text": [p for some in texts.values() for p in some]})
    labelled = pd.DataFrame([(p, package, k >= arguments.labels) for package, some in texts.items()
                             for k, p in enumerate(some[:arguments.labels + 100])], columns=["text", "package", "is_valid"])
    with TemporaryDirectory() as folder:
        dls = TextDataLoaders.from_df(unlabelled, folder, text_col="text", is_lm=True, seed=0, bs=32, seq_len=30)
        set_seed(0)
        lm = language_model_learner(dls, AWD_DARTS, config=awd_darts_lm_config | sizes, drop_mult=0.3, pretrained=False, path=folder)
        lm.fit_one_cycle(arguments.epochs, 5e-3)
        lm.save_encoder("docstrings")
        print(lm.predict("This function returns", 12, temperature=0.7))
        dls = TextDataLoaders.from_df(labelled, folder, text_col="text", label_col="package", valid_col="is_valid", text_vocab=dls.vocab, bs=16)
        found = {}
        for name in ("with the encoder", "from scratch"):
            set_seed(0)
            learn = text_classifier_learner(dls, AWD_DARTS, config=awd_darts_clas_config | sizes, drop_mult=0.6, pretrained=False,
                                            metrics=accuracy, path=folder)
            if name == "with the encoder":
                learn.load_encoder("docstrings")  # this also freezes the encoder: the head learns first
            learn.fit_one_cycle(arguments.epochs, 1e-2)
            learn.unfreeze()
            learn.fit_one_cycle(2 * arguments.epochs, slice(3e-4, 3e-3))
            found[name] = float(learn.validate()[1])
        for name, value in found.items():
            print(f"accuracy {name}: {value:.3f} (chance {1 / len(PACKAGES):.3f})")
    return found


if __name__ == "__main__":
    main()
