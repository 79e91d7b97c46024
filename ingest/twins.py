"""Sections that are one and the same under two patients: their data would leak from training into the test.

Files are compared before anything is cut. Counts are compared once they are decoded, since a file that is saved again
has other bytes; that costs no reading of its own.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from scipy.sparse import csr_array

from mclstexp.data.schema import SectionEntry
from mclstexp.data.sheet import SectionRow
from mclstexp.errors import SourceError

_COUNTS_PARTS = {"h5", "matrix", "expression"}
"""Files with counts: one in a folder, else the sheet's column."""
_FIX = "give them one patient_id if they are of one patient, else fix the files, or remove all but one from the sheet"


def require_own_files(rows: Iterable[SectionRow], contents: Mapping[str, Mapping[str, str]]) -> None:
    """Checks that no image and no counts are those of two patients.

    Args:
        rows: the sections.
        contents: a digest of each source file's content by section id and part.

    Raises:
        SourceError: some are; names sections, patients and files.
    """
    owners: defaultdict[tuple[str, str, str], list[SectionRow]] = defaultdict(list)
    for row in rows:
        for what, digest, library in _identities(row, contents[row.section_id]):
            owners[what, digest, library].append(row)
    _require_one_patient(
        (what, [(row.section_id, row.patient_id, f", {_file(row, what)}") for row in same])
        for (what, _, _), same in owners.items()
    )


def require_own_counts(sections: Iterable[SectionEntry]) -> None:
    """Checks that no counts are those of two patients, whatever files they came from.

    Raises:
        SourceError: some are; names sections and patients.
    """
    owners: defaultdict[str, list[SectionEntry]] = defaultdict(list)
    for entry in sections:
        if entry.counts_digest is not None:
            owners[entry.counts_digest].append(entry)
    same_counts = ([(entry.section_id, entry.patient_id, "") for entry in same] for same in owners.values())
    _require_one_patient(("counts", same) for same in same_counts)


def counts_digest(counts: csr_array) -> str | None:
    """Returns a digest of a section's counts, int (n, G), whatever the order and the names of its spots and genes.

    Each gene is described by its counts in spots that are described by their totals, then each spot by its genes.
    Spots and genes without counts do not matter. None without any counts.
    """
    table = csr_array(counts, dtype=np.uint64)
    totals = table.sum(axis=1, dtype=np.uint64)
    if not totals.any():
        return None
    genes = table.T @ _mixed(totals)
    spots = table @ _mixed(genes)
    content = b"/".join(np.sort(each[each > 0]).astype("<u8").tobytes() for each in (genes, spots))
    return hashlib.sha256(content).hexdigest()[:16]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Returns random bits for each value, uint64: splitmix64 (Steele et al. 2014, doi:10.1145/2714064.2660195)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _identities(row: SectionRow, contents: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yields what a section must not share with another patient's: what it is, its digest, the section in its file."""
    yield "image", contents["image"], ""
    for part in contents.keys() & _COUNTS_PARTS:
        yield "counts", contents[part], row.library_id or ""


def _file(row: SectionRow, what: str) -> str:
    return row.image if what == "image" else str(row.expression)


def _require_one_patient(groups: Iterable[tuple[str, list[tuple[str, str, str]]]]) -> None:
    """Raises if one of the groups of (section, patient, file) with the same image or counts has several patients."""
    faults = [
        f"the same {what}: " + "; ".join(f"{section} (patient {patient}{file})" for section, patient, file in same)
        for what, same in groups
        if len({patient for _, patient, _ in same}) > 1
    ]
    if faults:
        listed = "\n  ".join(sorted(faults))
        raise SourceError(
            f"sections of different patients are the same, which would leak into a test; {_FIX}:\n  {listed}"
        )
