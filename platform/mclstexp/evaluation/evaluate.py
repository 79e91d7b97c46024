"""Scores a model version on sections that it never saw, beside floors fitted on those that it did.

Every section is scored in several targets, the model's own first. A model that retrieves expression answers in another
target by the same neighbours and weights; programs and a direct regression know only their own unit, so in other
targets only their correlations mean something. Tiles stream through Ray once per network; their features serve all
targets.

Shapes: N spots of a section, G genes, D embedding dimensions.
"""

import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from mclstexp import storage
from mclstexp.data.genes import GenePanel, Normaliser, coverage, unique_labels
from mclstexp.data.measured import MeasuredSection, read_measured
from mclstexp.data.panel import require_counts
from mclstexp.data.schema import Manifest, load_genes, load_manifest
from mclstexp.data.spots import SpotReader, make_reader
from mclstexp.data.table import read_thumbnail
from mclstexp.data.totals import GeneCounts, other_totals
from mclstexp.errors import ModelError, SplitError
from mclstexp.evaluation.coverage import coverage_notes
from mclstexp.evaluation.floors import (
    SEED,
    Floors,
    floor_features,
    library_size,
    noise_ceiling,
)
from mclstexp.evaluation.markers import marker_columns
from mclstexp.evaluation.score_card import CEILING, FLOOR, LINE, MODEL, ORACLE, ScoreCard
from mclstexp.evaluation.scores import gene_scores, gene_sets, set_table, with_only, without_unit
from mclstexp.evaluation.sections import SectionResult, scored_targets, with_target
from mclstexp.messages import some_of
from mclstexp.model.bank import Bank
from mclstexp.model.embed import embed_sections, head_of, network_of
from mclstexp.model.extract import features, wanted
from mclstexp.model.retrieval import Retrieved, resolve, retrieve
from mclstexp.model.version import ModelVersion, TrainingRecord
from mclstexp.progress import Show, hidden

Labels = dict[str, str | int | list[str]]
"""Columns that name what a table's rows belong to, with their values."""


def evaluate(
    model: ModelVersion,
    tiles: str,
    show: Show = hidden,
    sections: Sequence[str] = (),
    floor_weights: str | None = None,
    markers: Mapping[str, GenePanel] | None = None,
    on_validation: bool = False,
) -> ScoreCard:
    """Returns the score card of a model on held-out sections of a tile table that also has its training sections.

    Args:
        model: the version to score.
        tiles: the tile table.
        show: takes progress.
        sections: what to score; default: what the model held out.
        floor_weights: `imagenet`, or a file: adds the ridge on a pretrained encoder's features.
        markers: sets of genes to score by name, see `markers.load_markers`.
        on_validation: scores the model's validation sections instead, to compare models before one is chosen.

    Raises:
        SplitError, TableError, ModelError: as `held_out`; or the table does not have all genes of the panel, or its
            training spots are not those of the model's bank.
        ConfigError: a section names the panel's genes differently, or measures none of them, or too few of those that
            its model's spot totals are over.
        ConfigError, ModelError: `floor_weights` cannot be loaded or do not fit.
    """
    # What is scored, in which units
    root = storage.absolute(tiles)
    manifest = load_manifest(root)
    names = held_out(model, manifest, sections, on_validation)
    reader = make_reader(root, manifest, model.panel, model.config, model.training.sections, model.total_genes)
    if (reader.columns < 0).any():
        raise ModelError(f"there is no truth for all genes of the model: {coverage(model.panel, reader.columns)}")
    all_genes = load_genes(root, manifest)
    require_counts(root, manifest, names, "the model's panel", reader.columns.tolist(), all_genes)
    sections_read = [*model.training.sections, *names]
    odd_totals = other_totals(GeneCounts(root, manifest), model.training.sections, sections_read, reader.total)
    training, tested = ([read_measured(reader, name) for name in part] for part in (model.training.sections, names))
    targets = scored_targets(reader.target, reader.input)
    banks = _banks(model, reader.target, training, targets)

    # Every spot through every network
    with tempfile.TemporaryDirectory() as scratch:
        queries = _queries(model, reader, names, show, scratch)
        seen = floor_features(model, reader, sections_read, floor_weights, show, scratch)
    answers = {each.section_id: model.predict(queries[each.section_id], each.xy_um) for each in tested}

    # Every section in every target
    labels = unique_labels(model.panel.names(), model.panel.gene_id, GenePanel.from_table(all_genes).names())
    marker_sets, missing = marker_columns(markers or {}, model.panel)
    notes = [*_notes(model, manifest, names, missing), *_unmeasured_notes(training, tested, labels), *odd_totals]
    if model.calibration is not None:
        notes.extend(coverage_notes(model.calibration, tested, answers, reader.target))
    rows, genes = [], []
    for name, target in targets.items():
        floors = Floors(training, seen, target)
        notes.append(f"alpha of the ridges in {name}, by leave-one-out over training spots: {floors.alphas()}")
        for section in tested:
            predicted = _answer(model, queries[section.section_id], banks[name], answers[section.section_id])
            in_unit = target == reader.target or banks[name] is not None
            tables = _gene_tables(section, target, predicted, in_unit, floors)
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
        sections=tuple(_result(model, reader, each, answers[each.section_id].prediction) for each in tested),
    )


def held_out(
    model: ModelVersion, manifest: Manifest, asked: Sequence[str] = (), on_validation: bool = False
) -> list[str]:
    """Returns the sections to score: `asked`, or by default those that the model held out.

    With `on_validation`: the model's validation sections; the score card then says so.

    Raises:
        SplitError: there are none, or one was fitted on, shares a patient with training or validation under `patient`,
            or has no counts.
        TableError, ModelError: they or the model's training sections are not in the table, or it was cut differently.
    """
    model.require_table(manifest)
    record = model.training
    names = list(dict.fromkeys(record.validation_sections if on_validation else asked or record.test_sections))
    if not names:
        raise SplitError("the model was trained with nothing held out; name sections that it has not seen: --sections")
    entries = [manifest.section(name) for name in names]

    # Nothing that the model has seen
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

    # Counts for all of it, and for the floors
    unmeasured = [entry.section_id for entry in entries if not entry.measured]
    if unmeasured:
        raise SplitError(f"{', '.join(unmeasured)} have no measured expression to score against")
    measured = {entry.section_id for entry in manifest.sections if entry.measured}
    missing = [name for name in record.sections if name not in measured]
    if missing:
        raise ModelError(
            f"floors are fitted on the model's training sections, and the tile table has no {', '.join(missing)}; "
            "prepare them together with the sections to score"
        )
    return names


def _siblings(record: TrainingRecord, manifest: Manifest, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the sections of `names` that share a patient with other sections of training, and of validation.

    A section that is itself a validation section is not among the second. Versions that do not name their validation
    patients have the patients of those validation sections that are in the table.
    """
    validated = {entry.patient_id for entry in manifest.sections if entry.section_id in record.validation_sections}
    validated |= set(record.validation_patients)
    patient_of = {name: manifest.section(name).patient_id for name in names}
    trained_on = [name for name, patient in patient_of.items() if patient in record.patients]
    others = {name: patient for name, patient in patient_of.items() if name not in record.validation_sections}
    return trained_on, [name for name, patient in others.items() if patient in validated]


def _banks(
    model: ModelVersion, own: Normaliser, training: Sequence[MeasuredSection], targets: Mapping[str, Normaliser]
) -> dict[str, Bank | None]:
    """Returns the bank from which a retrieval model reads its answer in each target; None for others."""
    if model.bank is None or model.programs is not None:
        return dict.fromkeys(targets)
    others = {name: with_target(model.bank, training, target) for name, target in targets.items() if target != own}
    return {name: others.get(name, model.bank) for name in targets}


def _queries(
    model: ModelVersion, reader: SpotReader, names: Sequence[str], show: Show, scratch: str
) -> dict[str, np.ndarray]:
    """Returns each section's spots as the model embeds them, (N, D); a frozen encoder's features are read."""
    root, manifest = reader.root, reader.manifest
    if model.encoder is None:
        embedded = embed_sections(root, manifest, names, network_of(model), show, "tiles through model")
        return {name: arrays["embedding"] for name, arrays in embedded}
    stored = features(root, manifest, names, model.encoder, wanted(model.config), show, scratch=scratch)
    embed = head_of(model).build(torch.device("cpu"))
    return {name: embed(stored.read_section(name)) for name in names}


def _answer(model: ModelVersion, queries: np.ndarray, bank: Bank | None, own: Retrieved) -> np.ndarray:
    """Returns the model's prediction for a section's embedded tiles (N, D), float32 (N, G), in the unit of the bank.

    `own` is its answer in its own target, which is also that of a model without another bank.
    """
    if bank is None or bank is model.bank:
        return own.prediction
    return retrieve(queries, bank, resolve(model.config.retrieval, len(bank))).prediction


def _gene_tables(
    section: MeasuredSection, target: Normaliser, predicted: np.ndarray, in_unit: bool, floors: Floors
) -> dict[tuple[str, str], pd.DataFrame]:
    """Returns each method's scores by gene (`gene_scores`), by (method, kind).

    `predicted` is the model's prediction, (N, G); `in_unit` says whether it is in the target's unit.
    """
    truth, totals = section.expression(target), section.totals
    own = gene_scores(truth, predicted, totals)
    oracle = without_unit(gene_scores(truth, library_size(totals, truth.shape[1]), totals))
    ceiling = noise_ceiling(section.counts, totals, target, SEED, section.in_total)[["pcc", "pcc_density_free"]]
    return {
        (MODEL, MODEL): own if in_unit else without_unit(own),
        **{(method, FLOOR): gene_scores(truth, values, totals) for method, values in floors.predict(section).items()},
        (ORACLE, LINE): oracle,
        (CEILING, LINE): with_only(oracle, ceiling),  # the columns of the truth are those of any method
    }


def _set_rows(
    section: MeasuredSection,
    target: str,
    tables: Mapping[tuple[str, str], pd.DataFrame],
    sets: Mapping[str, np.ndarray],
) -> list[pd.DataFrame]:
    """Returns one section's part of `ScoreCard.rows` in one target, one table per method."""
    of: Labels = {"section_id": section.section_id, "patient_id": section.patient_id, "num_spots": len(section)}
    return [
        _labelled(set_table(table, sets), of | {"target": target, "method": method, "kind": kind})
        for (method, kind), table in tables.items()
    ]


def _gene_rows(
    section: MeasuredSection, target: str, tables: Mapping[tuple[str, str], pd.DataFrame], genes: list[str]
) -> list[pd.DataFrame]:
    """Returns one section's part of `ScoreCard.per_gene` in one target, one table per method."""
    of: Labels = {"section_id": section.section_id, "patient_id": section.patient_id, "target": target}
    return [_labelled(table, of | {"method": method, "gene": genes}) for (method, _), table in tables.items()]


def _labelled(table: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    """Returns a table with more columns before its own."""
    return table.assign(**labels)[[*labels, *table.columns]]


def _result(model: ModelVersion, reader: SpotReader, section: MeasuredSection, prediction: np.ndarray) -> SectionResult:
    entry = reader.manifest.section(section.section_id)
    return SectionResult(
        section=section,
        panel=model.panel,
        truth=section.expression(reader.target),
        prediction=prediction,
        thumbnail=read_thumbnail(reader.root, entry),
        thumbnail_scale=entry.thumbnail_scale,
    )


def _notes(
    model: ModelVersion, manifest: Manifest, names: Sequence[str], missing: Mapping[str, Sequence[str]]
) -> list[str]:
    """Returns the card's notes, leaks first; `missing` are the marker genes that are not in the panel, by set."""
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
            patients = ", ".join(sorted(manifest.patients(siblings)))
            notes.insert(0, f"LEAK that this protocol allows: other sections of patients {patients} {saw}")
    if manifest.digest() != record.manifest_digest:
        notes.append(f"scored on tile table {manifest.digest()}, trained on tile table {record.manifest_digest}")
    notes += [
        f"genes of {name} that are not in the panel: {', '.join(genes)}" for name, genes in missing.items() if genes
    ]
    if model.total_genes is not None:
        notes.append(f"spot totals are over the {len(model.total_genes)} genes that all training sections measure")
    if model.licence:
        encoder = model.config.model.image_encoder
        notes.append(f"the image encoder, {encoder}, began with weights under this licence: {model.licence}")
    if model.bank is None or model.programs is not None:
        what = "a direct regression" if model.bank is None else "a model of programs"
        notes.append(f"{what} predicts in its own target alone: in others it has correlations only")
    return notes


def _unmeasured_notes(
    training: Sequence[MeasuredSection], tested: Sequence[MeasuredSection], genes: Sequence[str]
) -> list[str]:
    """Returns which of the panel's `genes` the sections do not measure, in a sentence per scored section."""
    notes = [
        f"section {section.section_id} does not measure {len(section.unmeasured)} of the {len(genes)} genes, so they "
        f"have no score there: {some_of([genes[index] for index in section.unmeasured])}"
        for section in tested
        if len(section.unmeasured)
    ]
    partial = [f"{section.section_id} ({len(section.unmeasured)})" for section in training if len(section.unmeasured)]
    if partial:
        notes.append(
            f"training sections that do not measure all {len(genes)} genes: {some_of(partial)}; what is fitted to such "
            "a gene leaves them out"
        )
    return notes
