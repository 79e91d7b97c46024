"""Scores a model version on sections that it never saw, beside floors fitted on those that it did.

Every section is scored in several targets, the model's own first. A model that reads its answer from a bank answers in
another target by the same neighbours and weights; a direct regression knows its own unit alone, so that elsewhere only
its correlations mean something. Tiles stream through Ray and leave features behind, which serve all targets.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mclstexp import storage
from mclstexp.data.genes import GenePanel, Normaliser, coverage, unique_labels
from mclstexp.data.panel import require_counts
from mclstexp.data.schema import Manifest, load_genes, load_manifest
from mclstexp.data.spots import SpotReader, make_reader
from mclstexp.data.table import read_thumbnail
from mclstexp.errors import ModelError, SplitError
from mclstexp.evaluation.floors import SEED, Floors, Show, embed_shown, floor_features, library_size, noise_ceiling
from mclstexp.evaluation.markers import marker_columns
from mclstexp.evaluation.score_card import CEILING, FLOOR, LINE, MODEL, ORACLE, ScoreCard
from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table
from mclstexp.evaluation.sections import MeasuredSection, SectionResult, read_measured, scored_targets, with_target
from mclstexp.model.bank import Bank
from mclstexp.model.embed import network_of
from mclstexp.model.retrieval import resolve, retrieve
from mclstexp.model.version import ModelVersion, TrainingRecord

Labels = dict[str, str | int | list[str]]
"""Values of the columns that say what a table's rows are of."""


def held_out(
    model: ModelVersion, manifest: Manifest, asked: Sequence[str] = (), on_validation: bool = False
) -> list[str]:
    """Returns the sections to score: those asked for, else those that the model held out.

    With `on_validation` it is the model's validation sections, which the score card then says.

    Raises:
        SplitError: there are none, or one was fitted on, shares a patient with training or validation under `patient`,
            or lacks counts.
        TableError, ModelError: the table lacks them or the model's training sections, or was cut otherwise.
    """
    model.require_table(manifest)
    record = model.training
    names = list(dict.fromkeys(record.validation_sections if on_validation else asked or record.test_sections))
    if not names:
        raise SplitError("the model was trained with nothing held out; name sections that it has not seen: --sections")
    entries = [manifest.section(name) for name in names]
    fitted = {*record.sections, *(() if on_validation else record.validation_sections)}
    seen = [name for name in names if name in fitted]
    if seen:
        raise SplitError(f"the model was fitted on {', '.join(seen)}; it can be scored on other sections only")
    trained, validated = _siblings(record, manifest, names)
    for what, siblings in (("was trained", trained), ("had its settings chosen", validated)):
        if siblings and record.protocol == "patient":
            raise SplitError(
                f"the model {what} on other sections of the patients of {', '.join(siblings)}; under the protocol "
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


def _siblings(record: TrainingRecord, manifest: Manifest, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns those of the sections whose patient's other sections the model was trained on, and validated on.

    Sections that it was validated on themselves are not among the latter. Versions that do not name their validation
    patients have those of their validation sections that the table holds.
    """
    validated = {entry.patient_id for entry in manifest.sections if entry.section_id in record.validation_sections}
    validated |= set(record.validation_patients)
    patient_of = {name: manifest.section(name).patient_id for name in names}
    trained_on = [name for name, patient in patient_of.items() if patient in record.patients]
    others = {name: patient for name, patient in patient_of.items() if name not in record.validation_sections}
    return trained_on, [name for name, patient in others.items() if patient in validated]


def evaluate(
    model: ModelVersion,
    tiles: str,
    show: Show,
    sections: Sequence[str] = (),
    probe_weights: str | None = None,
    markers: Mapping[str, GenePanel] | None = None,
    feature_cache: str | None = None,
    on_validation: bool = False,
) -> ScoreCard:
    """Returns the score card of a model on held-out sections of a tile table that also has its training sections.

    Args:
        model: the version to score.
        tiles: the tile table.
        show: told of progress.
        sections: what to score; default what the model held out.
        probe_weights: `imagenet`, or a file: adds the ridge on a pretrained encoder's features.
        markers: sets of genes that are scored by name, see `markers.load_markers`.
        feature_cache: as `floor_features` takes it.
        on_validation: scores the model's validation sections instead, to compare models while none is chosen.

    Raises:
        SplitError, TableError, ModelError: as `held_out`; or the table lacks genes of the panel, or its training spots
            are not those of the model's bank.
        ConfigError: a section names the panel's genes otherwise.
        ConfigError, ModelError: the probe's weights cannot be had or do not fit.
    """
    root = storage.absolute(tiles)
    manifest = load_manifest(root)
    names = held_out(model, manifest, sections, on_validation)
    reader = make_reader(root, manifest, model.panel, model.config)
    if (reader.columns < 0).any():
        raise ModelError(f"there is no truth for all genes of the model: {coverage(model.panel, reader.columns)}")
    all_genes = load_genes(root, manifest)
    require_counts(root, manifest, names, "the model's panel", reader.columns.tolist(), all_genes)
    training, tested = ([read_measured(reader, name) for name in part] for part in (model.training.sections, names))
    targets = scored_targets(reader.target, reader.input)
    banks = _banks(model, reader.target, training, targets)
    embedded = embed_shown(reader, names, network_of(model), "model", show)
    features = floor_features(model, reader, [*model.training.sections, *names], probe_weights, show, feature_cache)
    labels = unique_labels(model.panel, all_genes)
    marker_sets, lacking = marker_columns(markers or {}, model.panel)
    notes = _notes(model, manifest, names, lacking)
    rows, genes = [], []
    for name, target in targets.items():
        floors = Floors(training, features, target)
        notes.append(f"alpha of the ridges in {name}, by cross-validation over training: {floors.alphas()}")
        for section in tested:
            said = _answer(model, embedded[section.section_id]["embedding"], banks[name])
            known_unit = target == reader.target or model.bank is not None
            tables = _gene_tables(section, target, said, known_unit, floors)
            rows += _set_rows(section, name, tables, gene_sets(section.expression(target), marker_sets))
            genes += _gene_rows(section, name, tables, labels)
    return ScoreCard(
        protocol=model.training.protocol,
        targets={name: target.unit() for name, target in targets.items()},
        model_digest=model.digest,
        notes=tuple(notes),
        genes=labels,
        rows=pd.concat(rows, ignore_index=True),
        per_gene=pd.concat(genes, ignore_index=True),
        sections=tuple(
            _result(model, reader, section, embedded[section.section_id]["embedding"]) for section in tested
        ),
    )


def _banks(
    model: ModelVersion, own: Normaliser, training: Sequence[MeasuredSection], targets: Mapping[str, Normaliser]
) -> dict[str, Bank | None]:
    """Returns the bank that the model reads its answer from in each target; None for a direct regression."""
    if model.bank is None:
        return dict.fromkeys(targets)
    others = {name: with_target(model.bank, training, target) for name, target in targets.items() if target != own}
    return {name: others.get(name, model.bank) for name in targets}


def _answer(model: ModelVersion, queries: np.ndarray, bank: Bank | None) -> np.ndarray:
    """Returns what the model says of embedded tiles, float32 (N, G), in the unit of the bank."""
    if bank is None:
        return model.predict(queries).prediction
    return retrieve(queries, bank, resolve(model.config.retrieval, len(bank))).prediction


def _gene_tables(
    section: MeasuredSection, target: Normaliser, said: np.ndarray, known_unit: bool, floors: Floors
) -> dict[tuple[str, str], pd.DataFrame]:
    """Returns each method's scores by gene (`gene_scores`), by (method, kind); `said` is the model's prediction."""
    truth, totals = section.expression(target), section.totals
    own = gene_scores(truth, said, totals)
    oracle = _unitless(gene_scores(truth, library_size(totals, truth.shape[1]), totals))
    ceiling = noise_ceiling(section.counts, totals, target, SEED)[["pcc", "pcc_density_free"]]
    return {
        (MODEL, MODEL): own if known_unit else _unitless(own),
        **{(method, FLOOR): gene_scores(truth, values, totals) for method, values in floors.predict(section).items()},
        (ORACLE, LINE): oracle,
        (CEILING, LINE): oracle.assign(**ceiling),  # the truth's columns are those of any method
    }


def _unitless(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the scores of what has no unit, or another one than the truth: correlations only."""
    return table.assign(mse=np.nan, mae=np.nan)


def _set_rows(
    section: MeasuredSection,
    target: str,
    tables: Mapping[tuple[str, str], pd.DataFrame],
    sets: Mapping[str, np.ndarray],
) -> list[pd.DataFrame]:
    """Returns one section's part of `ScoreCard.rows` in one target, a table a method."""
    of: Labels = {"section_id": section.section_id, "patient_id": section.patient_id, "num_spots": len(section)}
    return [
        _labelled(set_table(table, sets), of | {"target": target, "method": method, "kind": kind})
        for (method, kind), table in tables.items()
    ]


def _gene_rows(
    section: MeasuredSection, target: str, tables: Mapping[tuple[str, str], pd.DataFrame], genes: list[str]
) -> list[pd.DataFrame]:
    """Returns one section's part of `ScoreCard.per_gene` in one target, a table a method."""
    of: Labels = {"section_id": section.section_id, "patient_id": section.patient_id, "target": target}
    return [_labelled(table, of | {"method": method, "gene": genes}) for (method, _), table in tables.items()]


def _labelled(table: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    """Returns a table with columns put before its own."""
    return table.assign(**labels)[[*labels, *table.columns]]


def _result(model: ModelVersion, reader: SpotReader, section: MeasuredSection, queries: np.ndarray) -> SectionResult:
    entry = reader.manifest.section(section.section_id)
    return SectionResult(
        section=section,
        panel=model.panel,
        truth=section.expression(reader.target),
        prediction=model.predict(queries).prediction,
        thumbnail=read_thumbnail(reader.root, entry),
        thumbnail_scale=entry.thumbnail_scale,
    )


def _notes(
    model: ModelVersion, manifest: Manifest, names: Sequence[str], lacking: Mapping[str, Sequence[str]]
) -> list[str]:
    record = model.training
    notes = [
        f"trained on {', '.join(record.sections)}",
        "reference lines, not floors: the library-size oracle, ln(1 + spot total), which reads the held-out section "
        "itself; the noise ceiling, which counting noise alone leaves",
    ]
    if set(names) & set(record.validation_sections):
        notes.insert(0, "VALIDATION: settings were chosen on these sections, no figure here is a test result")
    trained, validated = _siblings(record, manifest, names)
    for saw, siblings in (("chose settings", validated), ("trained", trained)):
        if siblings:
            patients = ", ".join(sorted({manifest.section(name).patient_id for name in siblings}))
            notes.insert(0, f"LEAK that this protocol allows: other sections of patients {patients} {saw}")
    if manifest.digest() != record.manifest_digest:
        notes.append(f"scored on tile table {manifest.digest()}, trained on tile table {record.manifest_digest}")
    notes += [f"{name}: the panel lacks {', '.join(genes)}" for name, genes in lacking.items() if genes]
    if model.bank is None:
        notes.append("a direct regression predicts in its own target alone: in others it has correlations only")
    return notes
