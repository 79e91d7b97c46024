"""The best model of a sweep becomes `challenger`; `champion` moves to it only where a paired comparison says so."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mclstexp import tracking
from mclstexp.config import override
from mclstexp.data.genes import normalisers
from mclstexp.data.spots import make_reader
from mclstexp.errors import ModelError, RunError, UserError
from mclstexp.evaluation.floors import embed_shown
from mclstexp.evaluation.measured import read_measured
from mclstexp.inference.embed import network_of
from mclstexp.inference.model_version import ModelVersion
from mclstexp.training import finish, trainer
from tuning.comparison import Pair, compare
from tuning.scores import finished_model
from tuning.sweep import Sweep, Trial
from tuning.trial import open_trial


@dataclass(frozen=True)
class Promotion:
    """What was decided."""

    version: str
    is_champion: bool
    reason: str


def promote(sweep: Sweep, best: Trial) -> Promotion:
    """Registers the best trial's model as challenger, compares it with the champion, and moves `champion` or not.

    The best settings are trained again with other seeds (tune.replicates), and those stand for them: the trial itself
    was the best of many on these patients. They chose the settings too, which still favours the challenger a little.
    """
    run = open_trial(best.name, best.settings, sweep.plan)
    config = run.config.tracking
    earlier = tracking.version_of(config, tracking.CHAMPION)
    version = _register(run)
    tracking.set_alias(config, version, tracking.CHALLENGER)
    if earlier is None:
        tracking.set_alias(config, version, tracking.CHAMPION)
        return _decided(sweep, Promotion(version, True, f"{config.model_name} had no champion"))
    if earlier == version:
        return _decided(sweep, Promotion(version, True, "it is the champion already"))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = tracking.fetch_model(config, f"models:/{config.model_name}/{earlier}", scratch)
            champion = ModelVersion.load(folder)
        obstacle = _obstacle(run, champion)
        if obstacle:
            return _decided(sweep, Promotion(version, False, f"not compared with version {earlier}: {obstacle}"))
        pairs = _pairs(run, champion, _replicates(sweep, best))
        difference = compare(pairs, run.config.tune.block_um, run.config.tune.seed)
    except UserError as error:
        return _decided(sweep, Promotion(version, False, f"not compared with version {earlier}: {error}"))
    said = f"PCC over the 50 highest genes, against version {earlier}: {difference}"
    if difference.is_better:
        tracking.set_alias(config, version, tracking.CHAMPION)
        return _decided(sweep, Promotion(version, True, said))
    return _decided(sweep, Promotion(version, False, f"{said}: the interval does not lie above zero"))


def _register(run: trainer.Run) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = tracking.fetch_model(run.config.tracking, finish.model_uri(run), scratch)
        tags = {"protocol": run.config.split.protocol, "run": run.name}
        return tracking.register(run.config.tracking, run.mlflow_run_id, folder, tags)


def _obstacle(run: trainer.Run, champion: ModelVersion) -> str:
    """Returns why the champion cannot be compared with the run, or nothing."""
    validation = {run.manifest.section(name).patient_id for name in run.split.validation}
    known = sorted(validation & set(champion.training.patients))
    if known:
        return f"it was trained on the validation patients {', '.join(known)}"
    _, unit = normalisers(champion.config.genes)
    if unit != run.reader.target:
        return f"it answers in another unit: {unit.unit()}, not {run.reader.target.unit()}"
    if unit.scheme == "per_spot_panel" and set(champion.panel.gene_id) != set(run.panel.gene_id):
        return "both divide by the panel's own total, and their panels differ"
    if not set(champion.panel.gene_id) & set(run.panel.gene_id):
        return "the panels share no gene"
    try:
        champion.require_table(run.manifest)
    except ModelError as error:
        return str(error)
    return ""


def _replicates(sweep: Sweep, best: Trial) -> list[ModelVersion]:
    """Returns the models of the best settings under the seeds that follow the best trial's own.

    Raises:
        RunError: a training failed or left no checkpoint.
    """
    seed = override(sweep.plan.config, best.settings).train.seed
    return [_replicate(sweep, best, seed + step) for step in range(1, sweep.plan.config.tune.replicates + 1)]


def _replicate(sweep: Sweep, best: Trial, seed: int) -> ModelVersion:
    run = open_trial(f"{best.name}-seed{seed}", best.settings | {"train.seed": seed}, sweep.plan)
    if not finish.is_finished(run):
        metrics = tracking.metric_log(run.config.tracking, run.mlflow_run_id)
        try:
            finish.finish(run, trainer.fit(run, metrics.log))
        finally:
            metrics.close()
    tracking.finish_run(run.config.tracking, run.mlflow_run_id)
    model = finished_model(run)
    if model is None:
        raise RunError(f"the training {run.name} left no checkpoint; delete {run.uri} and run the same command again")
    return model


def _pairs(run: trainer.Run, champion: ModelVersion, challengers: list[ModelVersion]) -> list[Pair]:
    """Returns each validation section with what champion and challengers say, over the genes that they share."""
    shared = [gene for gene in champion.panel.gene_id if gene in set(run.panel.gene_id)]
    answers = [_answers(run, model, shared) for model in (champion, *challengers)]
    truth = {name: read_measured(run.reader, name) for name in run.split.validation}
    own = _columns(run.panel.gene_id, shared)
    return [
        Pair(
            section.patient_id,
            section.place,
            section.expression(run.reader.target)[:, own],
            answers[0][name],
            np.stack([said[name] for said in answers[1:]]),
        )
        for name, section in truth.items()
    ]


def _answers(run: trainer.Run, model: ModelVersion, genes: list[str]) -> Mapping[str, np.ndarray]:
    """Returns what a model says of each validation section, float32 (N, genes)."""
    reader = make_reader(run.reader.root, run.manifest, model.panel, model.config)
    embedded = embed_shown(reader, list(run.split.validation), network_of(model), "model", lambda *_: None)
    columns = _columns(model.panel.gene_id, genes)
    return {name: model.predict(arrays["embedding"]).prediction[:, columns] for name, arrays in embedded.items()}


def _columns(panel: tuple[str, ...], genes: list[str]) -> list[int]:
    place = {gene: index for index, gene in enumerate(panel)}
    return [place[gene] for gene in genes]


def _decided(sweep: Sweep, promotion: Promotion) -> Promotion:
    config = sweep.plan.config.tracking
    tags = {"promotion": str(promotion.is_champion).lower(), "promotion.reason": promotion.reason}
    tracking.finish_run(config, sweep.plan.mlflow_run_id, tags=tags)
    tracking.tag_version(config, f"models:/{config.model_name}/{promotion.version}", tags)
    return promotion
