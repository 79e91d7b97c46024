"""From a sample sheet to a tile table: one Ray task per section, published at once.

`manifest.json` is replaced only if it is still the one that the run started from: of two writers one wins and the other
changes nothing. A section that fails does not stop the others; the run then ends with an error that names it. Files
that no manifest names any more are removed one run later, so that readers of the last table can finish; that costs the
space of one generation.
"""

import hashlib
import io
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ingest.header import Header, gene_rows, read_header
from ingest.plan import Plan, describe, last_versions, make_plan, save_stamps
from ingest.readers.spots import Gene
from ingest.section import cut_section
from ingest.twins import require_own_counts
from mclstexp import storage
from mclstexp.cluster import MAX_RETRIES, guarded
from mclstexp.config import Config
from mclstexp.data.schema import GENE_SCHEMA, MANIFEST, WIDE_SCHEMA_VERSION, Manifest, SectionEntry
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError
from mclstexp.progress import Show, hidden
from mclstexp.slides.plain import MAX_PLAIN_PX, PLAIN_BYTES_PER_PX

_TASKS_WITHOUT_NODES = 8
_FOLDERS = ("tiles", "rejects", "thumbnails", "genes")
_OWN_FILE = re.compile(r"\.?[A-Za-z0-9._-]+-[0-9a-f]{32}\.(parquet|jpg)(\.[0-9a-f]{32})?")


@dataclass(frozen=True)
class PrepareReport:
    """What a run did."""

    root: str
    manifest: Manifest
    redone: tuple[str, ...]
    """Sections that were cut."""
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    """Sections that left the table because they left the sheet."""
    sources: str
    """What was found in the sources that were read, in words: resolutions, gene names, genes in common."""
    seconds: float


def prepare(sheet_uri: str, out_uri: str, config: Config, show: Show = hidden) -> PrepareReport:
    """Makes the tile table at `out_uri` match the sample sheet and does only what changed. Ray must be connected.

    Raises:
        SheetError, ConfigError, TableError: before any work.
        SourceError: a source is faulty; if only cutting found it, the other sections are published all the same. Or
            two patients have the same image or counts: nothing is published.
        ConflictError: another writer published meanwhile; the table is the other's.
    """
    started = time.monotonic()
    storage.require_conditional_puts(out_uri)
    plan = make_plan(sheet_uri, out_uri, config, lambda rows: _read_headers(rows, show))
    entries, failures = _cut_all(plan, show)
    failed = {row.section_id for row in plan.todo.values()} - {entry.section_id for entry in entries}
    manifest = plan.previous if plan.is_done else _publish(plan, [*entries, *last_versions(plan, failed)])
    save_stamps(plan.root, plan.stamps)
    if failures:
        listed = "\n  ".join(failures)
        raise SourceError(
            f"{len(failures)} of {len(plan.todo) + len(plan.kept)} section(s) could not be prepared; the others are "
            f"in {plan.root}:\n  {listed}"
        )
    assert manifest is not None, "without failures something is published, or was before"
    redone = tuple(row.section_id for row in plan.todo.values())
    unchanged = tuple(entry.section_id for entry in plan.kept)
    seconds = time.monotonic() - started
    return PrepareReport(plan.root, manifest, redone, unchanged, plan.removed, plan.sources, seconds)


def dry_run(sheet_uri: str, out_uri: str, config: Config) -> str:
    """Returns what `prepare` would do, in words; uses no Ray.

    Raises:
        SheetError, ConfigError, TableError, SourceError: what `prepare` would raise before any work.
    """
    return describe(make_plan(sheet_uri, out_uri, config, lambda rows: map(read_header, rows)))


def _read_headers(rows: list[SectionRow], show: Show) -> list[Header]:
    """Reads all headers with Ray tasks; raises one error with all their faults."""
    headers: dict[int, Header] = {}
    faults: list[str] = []
    for index, result in _run(read_header, [(row,) for row in rows], rows, show, "prepare: headers"):
        if isinstance(result, Header):
            headers[index] = result
        else:
            faults.append(str(result))
    if faults:
        raise SourceError("\n  ".join([f"{len(faults)} section(s) cannot be prepared:", *sorted(faults)]))
    return [headers[index] for index in range(len(rows))]


def _cut_all(plan: Plan, show: Show) -> tuple[list[SectionEntry], list[str]]:
    """Cuts the plan's sections with Ray tasks; returns the entries, and the faults of the others, sorted."""
    rows = list(plan.todo.values())
    shared = (ray.put(plan.recipe), ray.put(gene_rows(plan.genes))) if rows else ()
    calls = [(row, *shared, plan.root, digest) for digest, row in plan.todo.items()]
    entries: list[SectionEntry] = []
    failures: list[str] = []
    for _, result in _run(cut_section, calls, rows, show, "prepare: sections"):
        if isinstance(result, SectionEntry):
            entries.append(result)
        else:
            failures.append(str(result))
    return entries, sorted(failures)


def _run(
    function: Callable[..., object], calls: Sequence[tuple], rows: Sequence[SectionRow], show: Show, what: str
) -> Iterator[tuple[int, object]]:
    """Runs one Ray task per section, a limited number at once; yields (index, result or error) as tasks end."""
    if not calls:
        return
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(guarded)
    show(what, 0, len(calls))
    waiting = iter(enumerate(calls))
    running: dict[ray.ObjectRef, int] = {}
    num_done = 0
    while True:
        while len(running) < _max_tasks() and (following := next(waiting, None)):
            running[task.remote(function, *following[1])] = following[0]
        if not running:
            return
        done, _ = ray.wait(list(running), num_returns=1)
        index = running.pop(done[0])
        num_done += 1
        show(what, num_done, len(calls), rows[index].section_id)
        yield index, _result(done[0], rows[index])


def _result(reference: ray.ObjectRef, row: SectionRow) -> object:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return SourceError(f"section {row.section_id} failed with an unexpected error: {error.cause!r}\n{error}")
    except ray.exceptions.RayError as error:
        return SourceError(f"section {row.section_id}: its process died {MAX_RETRIES + 1} times: {error}")


def _max_tasks() -> int:
    """Returns how many sections the cluster cuts at once: one per CPU, each with memory for the largest plain image.

    If the cluster has no CPU yet, some tasks are started all the same: an autoscaler only adds nodes for waiting tasks.
    """
    resources = ray.cluster_resources()
    if not resources.get("CPU"):
        return _TASKS_WITHOUT_NODES
    by_memory = int(resources.get("memory", 0) // (MAX_PLAIN_PX * PLAIN_BYTES_PER_PX))
    return max(1, min(int(resources["CPU"]), by_memory))


def _publish(plan: Plan, entries: Iterable[SectionEntry]) -> Manifest | None:
    """Publishes the new manifest, then removes the files that neither it nor the previous one names.

    Candidates are listed before publishing: their writers started from an older manifest, so they cannot publish.
    """
    sections = tuple(sorted((*plan.kept, *entries), key=lambda entry: entry.section_id))
    if not sections:
        return None
    require_own_counts(sections)
    genes_file, genes_sha256 = _write_genes(plan)
    manifest = Manifest(
        tile_size_px=plan.recipe.tiles.size_px,
        mpp=plan.recipe.mpp,
        encoding=plan.recipe.tiles.encoding,
        jpeg_quality=plan.recipe.tiles.jpeg_quality,
        sentence_length=plan.recipe.tiles.sentence_length,
        genes_file=genes_file,
        genes_sha256=genes_sha256,
        num_genes=len(plan.genes),
        sections=sections,
        **_wide_fields(plan),
    )
    candidates = [uri for folder in _FOLDERS for uri in storage.list_files(storage.join(plan.root, folder))]
    storage.publish(storage.join(plan.root, MANIFEST), manifest.encode(), plan.version)
    needed = _named_files(manifest) | (_named_files(plan.previous) if plan.previous else set())
    for uri in candidates:
        if uri.removeprefix(f"{plan.root}/") not in needed and _OWN_FILE.fullmatch(uri.rsplit("/", 1)[1]):
            storage.delete(uri)
    return manifest


def _wide_fields(plan: Plan) -> dict[str, Any]:
    """Returns what the manifest records of the wide view; nothing without one."""
    if plan.recipe.wide_mpp is None:
        return {}
    return {
        "schema_version": WIDE_SCHEMA_VERSION,
        "wide_px": plan.recipe.tiles.wide_px,
        "wide_mpp": plan.recipe.wide_mpp,
    }


def _named_files(manifest: Manifest) -> set[str]:
    files = {name for entry in manifest.sections for name in (entry.file, entry.rejects_file, entry.thumbnail_file)}
    return files | {manifest.genes_file}


def _write_genes(plan: Plan) -> tuple[str, str]:
    """Writes the gene table if it changed; returns its path under the root and its SHA-256."""
    data = _encoded_genes(plan.genes)
    digest = hashlib.sha256(data).hexdigest()
    if plan.previous and plan.previous.genes_sha256 == digest:
        return plan.previous.genes_file, digest
    name = f"genes/genes-{uuid.uuid4().hex}.parquet"
    storage.write(storage.join(plan.root, name), data)
    return name, digest


def _encoded_genes(genes: Sequence[Gene]) -> bytes:
    buffer = io.BytesIO()
    table = pa.Table.from_pylist([gene._asdict() for gene in genes], GENE_SCHEMA)
    pq.write_table(table, buffer, compression="zstd", store_schema=False)
    return buffer.getvalue()
