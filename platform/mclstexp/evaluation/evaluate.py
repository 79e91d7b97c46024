"""Scores a model version on sections that it never saw, beside floors fitted on those that it did.

Tiles stream through Ray and leave features behind: only those and panel matrices are held, never images. The floors
cost a pass over all training tiles (two with a pretrained probe), which is the price of an honest comparison.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mclstexp import storage
from mclstexp.data.genes import coverage
from mclstexp.data.schema import Manifest, load_manifest
from mclstexp.data.spots import SpotReader, make_reader
from mclstexp.data.stream import Batch
from mclstexp.data.table import read_columns, read_counts
from mclstexp.errors import ModelError, SplitError
from mclstexp.evaluation import baselines
from mclstexp.evaluation.metrics import pearson_per_gene, score
from mclstexp.evaluation.score_card import FLOOR, LINE, MODEL, ScoreCard, SectionResult, score_row
from mclstexp.inference.embed import ImageNetwork, embed_sections, encoder_network, network_of
from mclstexp.inference.model_version import ModelVersion

FLOOR_SEED = 0
Show = Callable[[str, int, int], None]
"""Called with (what is embedded, spots done, spots in all)."""


@dataclass(frozen=True)
class _Floors:
    """What was fitted on the training spots."""

    mean: np.ndarray
    ridges: dict[str, baselines.RidgeFloor]
    features: dict[str, dict[str, np.ndarray]]
    """Each ridge's features of each section, (N, F)."""


def held_out(model: ModelVersion, manifest: Manifest, asked: Sequence[str] = ()) -> list[str]:
    """Returns the sections to score: those asked for, else those that the model held out.

    Raises:
        SplitError: there are none, or one was fitted on, shares a training patient under `patient`, or lacks counts.
        TableError, ModelError: the table lacks them or the model's training sections, or was cut otherwise.
    """
    model.require_table(manifest)
    record = model.training
    names = list(dict.fromkeys(asked or record.test_sections))
    if not names:
        raise SplitError("the model was trained with nothing held out; name sections that it has not seen: --sections")
    entries = [manifest.section(name) for name in names]
    seen = [name for name in names if name in {*record.sections, *record.validation_sections}]
    if seen:
        raise SplitError(f"the model was fitted on {', '.join(seen)}; it can be scored on other sections only")
    siblings = [entry.section_id for entry in entries if entry.patient_id in record.patients]
    if siblings and record.protocol == "patient":
        raise SplitError(
            f"the model was trained on other sections of the patients of {', '.join(siblings)}; under the protocol "
            "patient it can be scored on other patients only"
        )
    unmeasured = [entry.section_id for entry in entries if not entry.measured]
    if unmeasured:
        raise SplitError(f"{', '.join(unmeasured)} have no measured expression to score against")
    there = {entry.section_id for entry in manifest.sections if entry.measured}
    missing = [name for name in record.sections if name not in there]
    if missing:
        raise ModelError(
            f"floors are fitted on the model's training sections, and the tile table lacks {', '.join(missing)}; "
            "prepare them together with the sections to score"
        )
    return names


def evaluate(
    model: ModelVersion, tiles: str, show: Show, sections: Sequence[str] = (), probe_weights: str | None = None
) -> ScoreCard:
    """Returns the score card of a model on held-out sections of a tile table that also has its training sections.

    Args:
        model: the version to score.
        tiles: the tile table.
        show: told of progress.
        sections: what to score; default what the model held out.
        probe_weights: `imagenet`, or a file: adds the ridge on a pretrained encoder's features.

    Raises:
        SplitError, TableError, ModelError: as `held_out`; or the table lacks genes of the panel.
        ConfigError, ModelError: the probe's weights cannot be had or do not fit.
    """
    root = storage.absolute(tiles)
    manifest = load_manifest(root)
    names = held_out(model, manifest, sections)
    reader = make_reader(root, manifest, model.panel, model.config)
    if (reader.columns < 0).any():
        raise ModelError(f"there is no truth for all genes of the model: {coverage(model.panel, reader.columns)}")
    embedded = _embed(reader, names, network_of(model), "model", show)
    floors = _fit_floors(model, reader, names, probe_weights, show)
    rows, genes, example = [], [], None
    for name in names:
        patient_id, truth = manifest.section(name).patient_id, reader.read_section(name)["payload"]
        said = _predictions(model, reader, name, embedded[name]["embedding"], floors)
        for (method, kind), prediction in said.items():
            rows.append(score_row(name, patient_id, len(truth), method, kind, score(truth, prediction)))
            genes.append(_gene_rows(name, method, model.panel.names(), truth, prediction))
        example = example or SectionResult(name, _place(reader, name), truth, said[MODEL, MODEL])
    assert example is not None
    return ScoreCard(
        protocol=model.training.protocol,
        unit=reader.target.unit(),
        model_digest=model.digest,
        notes=_notes(model, reader, names, floors),
        genes=model.panel.names(),
        rows=pd.DataFrame(rows),
        per_gene=pd.concat(genes, ignore_index=True),
        example=example,
    )


def _embed(reader: SpotReader, names: Sequence[str], network: ImageNetwork, what: str, show: Show) -> dict[str, Batch]:
    """Returns each section's `embedding` and `rgb`."""
    total, done = sum(reader.manifest.section(name).num_spots for name in names), 0

    def advance(num_spots: int) -> None:
        nonlocal done
        done += num_spots
        show(what, done, total)

    return dict(embed_sections(reader.root, reader.manifest, names, network, advance))


def _fit_floors(
    model: ModelVersion, reader: SpotReader, names: list[str], probe_weights: str | None, show: Show
) -> _Floors:
    encoder, training = model.config.model.image_encoder, model.training.sections
    features: dict[str, dict[str, np.ndarray]] = {}
    for word, weights in (("random", "random"), ("pretrained", probe_weights)):
        if weights:
            what = f"{word} {encoder}"
            network = encoder_network(model, weights, FLOOR_SEED)
            found = _embed(reader, [*training, *names], network, what, show)
            features.setdefault("ridge on RGB", {name: arrays["rgb"] for name, arrays in found.items()})
            features[f"ridge on {what}"] = {name: arrays["embedding"] for name, arrays in found.items()}
    sections = [reader.read_section(name) for name in training]
    target, patient, section = (
        np.concatenate([part[column] for part in sections]) for column in ("payload", "patient_id", "section_id")
    )
    groups = baselines.training_groups(patient, section)
    ridges = {
        method: baselines.RidgeFloor(np.concatenate([by_section[name] for name in training]), target, groups)
        for method, by_section in features.items()
    }
    return _Floors(target.mean(axis=0, dtype=np.float64), ridges, features)


def _predictions(
    model: ModelVersion, reader: SpotReader, name: str, queries: np.ndarray, floors: _Floors
) -> dict[tuple[str, str], np.ndarray]:
    """Returns all methods' predictions for one section by (method, kind), float32 (N, G) each."""
    num_spots, num_genes = len(queries), len(model.panel)
    counts = read_counts(reader.root, reader.manifest.section(name), reader.manifest.num_genes)
    totals = np.asarray(counts.sum(axis=1), np.float64).ravel()
    return {
        (MODEL, MODEL): model.predict(queries).prediction,
        ("train mean", FLOOR): baselines.constant(floors.mean, num_spots),
        ("zeros", FLOOR): baselines.constant(np.zeros(num_genes), num_spots),
        **{(method, FLOOR): ridge.predict(floors.features[method][name]) for method, ridge in floors.ridges.items()},
        ("library-size oracle", LINE): baselines.library_size(totals, num_genes),
    }


def _gene_rows(
    section_id: str, method: str, genes: list[str], truth: np.ndarray, prediction: np.ndarray
) -> pd.DataFrame:
    columns = {"truth_mean": truth.mean(axis=0, dtype=np.float64), "pcc": pearson_per_gene(truth, prediction)}
    return pd.DataFrame({"section_id": section_id, "method": method, "gene": genes} | columns)


def _place(reader: SpotReader, name: str) -> np.ndarray:
    table = read_columns(reader.root, reader.manifest.section(name), ["x_um", "y_um"])
    return np.stack([table["x_um"].to_numpy(), table["y_um"].to_numpy()], axis=1)


def _notes(model: ModelVersion, reader: SpotReader, names: list[str], floors: _Floors) -> tuple[str, ...]:
    record, manifest = model.training, reader.manifest
    alphas = ", ".join(f"{method} {ridge.alpha:g}" for method, ridge in floors.ridges.items())
    notes = [
        f"trained on {', '.join(record.sections)}; alpha by cross-validation over them: {alphas}",
        "library-size oracle: ln(1 + spot total), reads the held-out section itself; a reference line, not a floor",
    ]
    siblings = sorted({manifest.section(name).patient_id for name in names} & set(record.patients))
    if siblings:
        notes.insert(0, f"LEAK that this protocol allows: other sections of patients {', '.join(siblings)} trained")
    if manifest.digest() != record.manifest_digest:
        notes.append(f"scored on tile table {manifest.digest()}, trained on tile table {record.manifest_digest}")
    return tuple(notes)
