"""A small table of painted tiles of 224 px, for measurements that train DenseNet-121 with the product's own code."""

from ingest.prepare import prepare
from ingest.synthetic import CohortSpec, make_cohort
from mclstexp.config import Config, override

SPOTS = 4
"""Spots of a sentence."""
SETTINGS = {
    "tiles.size_px": 224,
    "tiles.wide_um": None,
    "tiles.sentence_length": SPOTS,
    "genes.num_genes": 100,
    "split.test_patients": ["P3"],
    "model.image_weights": "random",
    "model.batch_norm": "frozen",
    "train.epochs": 1,
    "train.augmentation": "none",
    "train.cpus_per_worker": 1,
}


def configuration(**settings: object) -> Config:
    """Returns the settings of this module with others, such as `train__epochs=2`."""
    return override(Config(), SETTINGS | {name.replace("__", "."): value for name, value in settings.items()})


def make_table(folder: str, array_side: int = 8) -> str:
    """Writes a tile table of two patients that train and one that is left out, and returns its URI; needs Ray.

    Each has a section of at most `array_side` squared spots.
    """
    spec = CohortSpec(num_patients=3, sections_per_patient=1, array_side=array_side)
    prepare(make_cohort(f"{folder}/cohort", spec), f"{folder}/tiles", configuration())
    return f"{folder}/tiles"
