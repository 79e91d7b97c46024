"""From a sample sheet to a tile table: Ray tasks over sections, published at once.

`manifest.json` is exchanged only if it is still the one that the run started from, so of two writers one wins and
the other changes nothing. A section that fails does not stop the others; the run then ends with an error that names
it. Files that no manifest needs any more are removed one run later, so that a reader of the last table can finish;
that costs the space of one generation.
"""

import hashlib
import io
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ingest.header import Header, gene_rows, read_header
from ingest.plan import Plan, describe, last_versions, make_plan, save_known
from ingest.readers.spots import Gene
from ingest.section import cut_section
from mclstexp import storage
from mclstexp.config import Config
from mclstexp.data.schema import GENE_SCHEMA, MANIFEST, Manifest, SectionEntry
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError, UserError
from mclstexp.slides.slide import MAX_PLAIN_PX, PLAIN_BYTES_PER_PX

_WAITING_FOR_NODES = 8
_MAX_RETRIES = 2  # of a section whose process died
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
    """What was read of the sections' sources, in words: resolutions, gene names, what all share."""
    seconds: float


def prepare(sheet_uri: str, out_uri: str, config: Config, progress: bool = True) -> PrepareReport:
    """Makes the tile table at `out_uri` hold the sheet's sections, doing only what changed. Ray must be connected.

    Raises:
        SheetError, ConfigError, TableError: before any work.
        SourceError: a source is faulty; where only cutting found it, the other sections are published all the same.
        ConflictError: another writer published meanwhile; the table is the other's.
    """
    started = time.monotonic()
    storage.require_conditional_puts(out_uri)
    with _bar(progress) as bar:
        plan = make_plan(sheet_uri, out_uri, config, lambda rows: _headers(rows, bar))
        entries, failures = _cut_all(plan, bar)
    failed = {row.section_id for row in plan.todo.values()} - {entry.section_id for entry in entries}
    manifest = plan.previous if plan.is_done else _publish(plan, [*entries, *last_versions(plan, failed)])
    save_known(plan.root, plan.known)
    if failures:
        listed = "\n  ".join(failures)
        raise SourceError(
            f"{len(failures)} of {len(plan.todo) + len(plan.kept)} section(s) could not be prepared, the others are "
            f"in {plan.root}:\n  {listed}"
        )
    assert manifest is not None, "without failures there is something to publish, or it was there"
    redone = tuple(row.section_id for row in plan.todo.values())
    unchanged = tuple(entry.section_id for entry in plan.kept)
    seconds = time.monotonic() - started
    return PrepareReport(plan.root, manifest, redone, unchanged, plan.removed, plan.sources, seconds)


def plan(sheet_uri: str, out_uri: str, config: Config) -> str:
    """Returns what `prepare` would do, in words, without Ray.

    Raises:
        SheetError, ConfigError, TableError, SourceError: what `prepare` would end with before any work.
    """
    return describe(make_plan(sheet_uri, out_uri, config, lambda rows: map(read_header, rows)))


def _bar(progress: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[last]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not progress)


def _headers(rows: list[SectionRow], bar: Progress) -> list[Header]:
    """Reads all headers with Ray tasks; refuses the run with all that is wrong with them."""
    headers: dict[int, Header] = {}
    faults: list[str] = []
    for place, result in _run(read_header, [(row,) for row in rows], rows, bar, "prepare: headers"):
        if isinstance(result, Header):
            headers[place] = result
        else:
            faults.append(str(result))
    if faults:
        raise SourceError("\n  ".join([f"{len(faults)} section(s) cannot be prepared:", *sorted(faults)]))
    return [headers[place] for place in range(len(rows))]


def _cut_all(plan: Plan, bar: Progress) -> tuple[list[SectionEntry], list[str]]:
    rows = list(plan.todo.values())
    shared = (ray.put(plan.recipe), ray.put(gene_rows(plan.genes))) if rows else ()
    calls = [(row, *shared, plan.root, fingerprint) for fingerprint, row in plan.todo.items()]
    entries: list[SectionEntry] = []
    failures: list[str] = []
    for _, result in _run(cut_section, calls, rows, bar, "prepare: sections"):
        if isinstance(result, SectionEntry):
            entries.append(result)
        else:
            failures.append(str(result))
    return entries, sorted(failures)


def _run(
    function: Callable[..., object], calls: Sequence[tuple], rows: Sequence[SectionRow], bar: Progress, title: str
) -> Iterator[tuple[int, object]]:
    """Runs one Ray task a section, a few at once; yields (place, result or error) as they end."""
    if not calls:
        return
    task = ray.remote(num_cpus=1, max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD")(_guarded)
    shown = bar.add_task(title, total=len(calls), last="")
    waiting = iter(enumerate(calls))
    running: dict[ray.ObjectRef, int] = {}
    while True:
        while len(running) < _most_at_once() and (following := next(waiting, None)):
            running[task.remote(function, *following[1])] = following[0]
        if not running:
            return
        done, _ = ray.wait(list(running), num_returns=1)
        place = running.pop(done[0])
        bar.update(shown, advance=1, last=rows[place].section_id)
        yield place, _result(done[0], rows[place])


def _guarded(function: Callable[..., object], *arguments: object) -> object:
    """Returns a user's error as a value: raised, Ray would wrap its message into a traceback."""
    try:
        return function(*arguments)
    except UserError as error:
        return error


def _result(reference: ray.ObjectRef, row: SectionRow) -> object:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return SourceError(f"section {row.section_id} failed in an unforeseen way: {error.cause!r}\n{error}")
    except ray.exceptions.RayError as error:
        return SourceError(f"section {row.section_id}: its process died {_MAX_RETRIES + 1} times: {error}")


def _most_at_once() -> int:
    """Returns how many sections the cluster cuts at once: one a CPU, and memory for the largest plain image each.

    Where there is no CPU yet, some wait: an autoscaler adds nodes for waiting tasks alone.
    """
    resources = ray.cluster_resources()
    if not resources.get("CPU"):
        return _WAITING_FOR_NODES
    by_memory = int(resources.get("memory", 0) // (MAX_PLAIN_PX * PLAIN_BYTES_PER_PX))
    return max(1, min(int(resources["CPU"]), by_memory))


def _publish(plan: Plan, entries: Iterable[SectionEntry]) -> Manifest | None:
    """Publishes the new manifest and then removes what neither it nor the one before names.

    Candidates are listed before publishing: their writers started from an older manifest, so they cannot publish.
    """
    sections = tuple(sorted((*plan.kept, *entries), key=lambda entry: entry.section_id))
    if not sections:
        return None
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
    )
    candidates = [uri for folder in _FOLDERS for uri in storage.list_files(storage.join(plan.root, folder))]
    storage.publish(storage.join(plan.root, MANIFEST), manifest.encode(), plan.version)
    needed = _named_files(manifest) | (_named_files(plan.previous) if plan.previous else set())
    for uri in candidates:
        if uri.removeprefix(f"{plan.root}/") not in needed and _OWN_FILE.fullmatch(uri.rsplit("/", 1)[1]):
            storage.delete(uri)
    return manifest


def _named_files(manifest: Manifest) -> set[str]:
    files = {name for entry in manifest.sections for name in (entry.file, entry.rejects_file, entry.thumbnail_file)}
    return files | {manifest.genes_file}


def _write_genes(plan: Plan) -> tuple[str, str]:
    """Writes the gene table where it grew; returns its path under the root and its SHA-256."""
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
