"""The training stream over a prepared tile table, and the CPU time of a tree of processes, for measurements."""

import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq

from ingest.prepare import prepare
from ingest.synthetic import CohortSpec, make_cohort
from mclstexp import cluster
from mclstexp.config import Config, override
from mclstexp.data import stream
from mclstexp.data.genes import GenePanel
from mclstexp.data.schema import Manifest, load_genes, load_manifest
from mclstexp.data.spots import Batch, SentenceLoader, make_reader

SIZE_PX, CPUS, MAX_GENES = 224, 2, 1000
PAINTED = CohortSpec(num_patients=6, sections_per_patient=1, pitch_px=112)
_SAMPLE_S = 1.0


@dataclass(frozen=True)
class TileTable:
    """A tile table with one view of 224 px, cut by `prepare` with its default encoding."""

    root: str
    manifest: Manifest
    detail: str
    batch_sentences: int = 2

    @property
    def section_ids(self) -> list[str]:
        """The sections with counts."""
        return [entry.section_id for entry in self.manifest.sections if entry.measured]

    @property
    def files(self) -> list[str]:
        """Their Parquet files."""
        return [str(Path(self.root, self.manifest.section(name).file)) for name in self.section_ids]

    @property
    def num_tiles(self) -> int:
        """Tiles of these sections."""
        return self.manifest.num_spots(self.section_ids)

    def loader(self) -> SentenceLoader:
        """Returns what training loads its sentences with: all spots, the first genes."""
        genes = GenePanel.from_table(load_genes(self.root, self.manifest))
        panel = genes.take(np.arange(min(MAX_GENES, len(genes))))
        return SentenceLoader(make_reader(self.root, self.manifest, panel, Config(), self.section_ids), 0.0, 0)

    def rows(self, epoch: int, repeats: int = 1) -> stream.Rows:
        """Returns a lone worker's rows of an epoch in which every sentence comes `repeats` times."""
        sentences = stream.sentence_index(self.manifest, self.section_ids)
        orders = (stream.epoch_order(sentences, 0, epoch * repeats + each) for each in range(repeats))
        return list(chain(*(stream.rank_slice(order, self.batch_sentences, 0, 1, epoch) for order in orders)))

    def batches(self, loader: SentenceLoader, epochs: list[stream.Rows], cpus: int = CPUS) -> Iterator[Batch]:
        """Returns the training stream of some epochs."""
        shape = stream.BatchShape(self.batch_sentences, self.manifest.sentence_length * 3 * SIZE_PX**2)
        return stream.stream(epochs, loader, shape, stream.StreamShare(cpus, 500 * 2**20, None))


def connect() -> Config:
    """Starts Ray on this machine and returns the configuration of the tables."""
    config = override(Config(), {"tiles.size_px": SIZE_PX, "tiles.wide_um": None, "cluster.local_cpus": 1 + CPUS})
    cluster.connect(config, {})
    return config


def tile_table(data: str | None, folder: str) -> TileTable:
    """Returns the table of the real sections of DATA/samples.csv, or of painted ones; starts Ray on this machine."""
    config = connect()
    sheet = f"{data}/samples.csv" if data else make_cohort(f"{folder}/cohort", PAINTED)
    prepare(sheet, f"{folder}/tiles", config)
    manifest = load_manifest(f"{folder}/tiles")
    num_tiles = sum(entry.num_spots for entry in manifest.sections if entry.measured)
    detail = f"{num_tiles} {'real' if data else 'painted'} tiles of {SIZE_PX} px, JPEG {manifest.jpeg_quality}"
    return TileTable(f"{folder}/tiles", manifest, detail)


def stored_bytes(path: str) -> int:
    """Returns the bytes of the tiles in a section's file."""
    footer = pq.read_metadata(path)
    groups = map(footer.row_group, range(footer.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(group.num_columns))
    return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema == "image")


class CpuMeter:
    """CPU-seconds of this process and all below it, from `start` on, but for some children and all below those."""

    def __init__(self, left_out: Container[psutil.Process]) -> None:
        self._left_out = left_out
        self._taken: dict[tuple[int, float], float] = {}
        self._before: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()

    @property
    def seconds(self) -> float:
        """What they have taken so far; a process that has ended counts as last seen."""
        self._sample()
        return sum(taken - self._before.get(key, 0.0) for key, taken in self._taken.items())

    def run(self) -> None:
        """Samples until `stop`."""
        while not self._stop.wait(_SAMPLE_S):
            self._sample()

    def start(self) -> None:
        """Begins to count."""
        self._sample()
        self._before = dict(self._taken)

    def stop(self) -> None:
        """Ends `run`."""
        self._stop.set()

    def _sample(self) -> None:
        for process in self._processes():
            with suppress(psutil.Error):
                self._taken[process.pid, process.create_time()] = sum(process.cpu_times()[:2])

    def _processes(self) -> Iterator[psutil.Process]:
        yield psutil.Process()
        for child in psutil.Process().children():
            if child not in self._left_out:
                yield child
                with suppress(psutil.Error):
                    yield from child.children(recursive=True)


@contextmanager
def cpu_meter(left_out: Container[psutil.Process] = ()) -> Iterator[CpuMeter]:
    """Counts the CPU time of this process and of all below it, such as Ray's, sampled once a second."""
    meter = CpuMeter(left_out)
    meter.start()
    thread = threading.Thread(target=meter.run, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        meter.stop()
        thread.join()
