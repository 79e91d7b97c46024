"""Floors fitted on a model's training spots: train mean, zeros, and ridges on colour and on frozen image features.

Features are embedded once and serve every target, in which the floors are fitted anew. Each network costs a pass over
all training tiles, which is the price of an honest comparison.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mclstexp import storage
from mclstexp.data.genes import Normaliser
from mclstexp.data.spots import SpotReader
from mclstexp.data.stream import Batch
from mclstexp.evaluation import baselines
from mclstexp.evaluation.measured import MeasuredSection
from mclstexp.inference.embed import ImageNetwork, embed_sections, encoder_network, network_of
from mclstexp.inference.model_version import ModelVersion

SEED = 0
Show = Callable[[str, int, int], None]
"""Called with (what is embedded, spots done, spots in all)."""
Features = dict[str, dict[str, np.ndarray]]
"""Each ridge's features of each section, (N, F)."""


class Floors:
    """What was fitted on the training spots in one target."""

    def __init__(self, training: Sequence[MeasuredSection], features: Features, target: Normaliser) -> None:
        """Fits the mean and, on each kind of features, a ridge.

        Raises:
            UserError: there are fewer than two training spots.
        """
        expression = np.concatenate([section.expression(target) for section in training])
        patient, section_id = (
            np.concatenate([np.full(len(section), getattr(section, name), object) for section in training])
            for name in ("patient_id", "section_id")
        )
        groups = baselines.training_groups(patient, section_id)
        self._features = features
        self._mean = expression.mean(axis=0, dtype=np.float64)
        self._ridges = {
            method: baselines.RidgeFloor(
                np.concatenate([of_section[section.section_id] for section in training]), expression, groups
            )
            for method, of_section in features.items()
        }

    def predict(self, section: MeasuredSection) -> dict[str, np.ndarray]:
        """Returns each floor's prediction of a section whose features are known, float32 (N, G), by its name."""
        return {
            "train mean": baselines.constant(self._mean, len(section)),
            "zeros": baselines.constant(np.zeros(len(self._mean)), len(section)),
        } | {
            method: ridge.predict(self._features[method][section.section_id]) for method, ridge in self._ridges.items()
        }

    def alphas(self) -> str:
        """Returns the penalty of each ridge in words."""
        return ", ".join(f"{method} {ridge.alpha:g}" for method, ridge in self._ridges.items())


def floor_features(
    model: ModelVersion,
    reader: SpotReader,
    section_ids: Sequence[str],
    probe_weights: str | None,
    show: Show,
    feature_cache: str | None,
) -> Features:
    """Returns what ridges see: colour, and features of the model's encoder with random weights and as trained.

    Args:
        model: the version that is scored.
        reader: of the tile table.
        section_ids: all sections that features are needed of.
        probe_weights: `imagenet`, or a file: adds the pretrained encoder's features.
        show: told of progress.
        feature_cache: folder (local or s3://) that keeps the features of encoders that were not trained here: they
            are the same for all models of one encoder and tile. None: nothing is kept.

    Raises:
        ConfigError, ModelError: the probe's weights cannot be had or do not fit.
    """
    networks = {"random": encoder_network(model, "random", SEED)}
    if probe_weights:
        networks["pretrained"] = encoder_network(model, probe_weights, SEED)
    networks["trained"] = replace(network_of(model), head=None)
    features: Features = {}
    for word, network in networks.items():
        what = f"{word} {model.config.model.image_encoder}"
        if feature_cache is None or word == "trained":
            found = embed_shown(reader, section_ids, network, what, show)
        else:
            found = _embed_once(reader, section_ids, network, what, show, storage.join(feature_cache, word))
        features.setdefault("ridge on RGB", {name: arrays["rgb"] for name, arrays in found.items()})
        features[f"ridge on {what}"] = {name: arrays["embedding"] for name, arrays in found.items()}
    return features


def _embed_once(
    reader: SpotReader, section_ids: Sequence[str], network: ImageNetwork, what: str, show: Show, cache: str
) -> dict[str, Batch]:
    """Returns the same as `embed_shown`, read from where it is kept for the sections that are there."""
    table = {name: reader.manifest.section(name).sha256 for name in section_ids}
    places = {name: storage.join(cache, network.digest(), f"{name}-{sha256}.npz") for name, sha256 in table.items()}
    missing = [name for name, place in places.items() if not storage.exists(place)]
    for name, arrays in embed_shown(reader, missing, network, what, show).items() if missing else ():
        buffer = io.BytesIO()
        np.savez(buffer, embedding=arrays["embedding"], rgb=arrays["rgb"])
        storage.write(places[name], buffer.getvalue())
    return {name: dict(np.load(io.BytesIO(storage.read(place)))) for name, place in places.items()}


def embed_shown(
    reader: SpotReader, section_ids: Sequence[str], network: ImageNetwork, what: str, show: Show
) -> dict[str, Batch]:
    """Returns each section's `embedding` and `rgb`, as `embed_sections`; progress is shown under the name `what`."""
    total, done = sum(reader.manifest.section(name).num_spots for name in section_ids), 0

    def advance(num_spots: int) -> None:
        nonlocal done
        done += num_spots
        show(what, done, total)

    return dict(embed_sections(reader.root, reader.manifest, section_ids, network, advance))
