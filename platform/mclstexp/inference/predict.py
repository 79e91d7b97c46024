"""Prediction of a cohort of slides: resumable, exactly once, and no slide stops another.

Slides stream through Ray Data part by part; a part is written to the slide's staging folder as soon as it is there, and
the slide is published when all its parts are. Whatever dies meanwhile, the same command does what is left: settled
slides are known from the ledger, written parts from the staging folder. A slide's files are replaced one by one, so
that a reader should go by the ledger, which is written last.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

from mclstexp import storage
from mclstexp.errors import StorageError
from mclstexp.inference import ledger
from mclstexp.inference.cohort import Cohort, Report, Show
from mclstexp.inference.cohort_run import CohortRun, Work
from mclstexp.inference.ledger import Owner
from mclstexp.inference.model_facts import choose_genes
from mclstexp.inference.model_version import ModelVersion
from mclstexp.inference.predict_stage import cluster_size, facts_of, stages
from mclstexp.inference.redraw import redraw
from mclstexp.inference.staging_folder import clear_staging
from mclstexp.settings import PredictConfig


def predict_cohort(
    model: ModelVersion,
    make_cohort: Callable[[int], Cohort],
    out: str,
    genes: Sequence[str],
    show: Show,
    config: PredictConfig,
) -> Report:
    """Predicts all slides that `out` does not hold yet. Ray must be connected.

    Args:
        model: the version to predict with.
        make_cohort: gives the slides, to be read by that many actors.
        out: where predictions, ledger and staging go.
        genes: names of genes that are drawn and written as GeoJSON, for slides that are done too; none: the panel's
            first are drawn, and slides that are done stay as they are.
        show: told of progress.
        config: how slides are cut, the bank is held and how much of the cluster is used.

    Raises:
        PredictError: `out` holds predictions by another model, or cut otherwise.
        ConfigError: the panel lacks one of `genes`.
        ResourceError: the cluster is too small.
    """
    out, facts = storage.absolute(out), facts_of(model)
    choose_genes(facts.panel, genes)
    dealt = stages(*cluster_size(config))
    cohort = make_cohort(dealt.num_readers)
    storage.require_conditional_puts(out)
    ledger.claim(out, Owner(model_digest=model.digest, settings=dict(cohort.settings)))
    there = ledger.entries(out, [*cohort.attempt_keys, *cohort.unreadable])
    again = config.retry_quarantined
    report = Report(skipped={name: entry for name, entry in there.items() if cohort.stands(entry, again)})
    left = [name for name in cohort.attempt_keys if name not in report.skipped]
    total = len(left) + len(cohort.unreadable)
    work = Work(model, cohort, out, facts, tuple(genes), dealt, config.bank_shards)
    run = CohortRun(work, report, lambda: show(report, total))
    for name, reason in cohort.unreadable.items():
        run.fail(name, reason)
    run.run(left)
    for entry, fault in redraw({**report.skipped, **report.entries}, out, facts, genes):
        of_which = report.skipped if entry.slide_id in report.skipped else report.entries
        of_which[entry.slide_id] = entry
        report.num_redrawn += not fault
        report.undrawn |= {entry.slide_id: fault} if fault else {}
    found = {**report.skipped, **report.entries}
    report.summary = ledger.summarise(out, found)
    with suppress(StorageError):  # the next run clears what is left
        clear_staging(out, {name for name, entry in found.items() if entry.state != "failed"})
    return report
