"""Reads one section; the counts and positions in hand-written files of sections."""

import pytest

from ingest.readers.features import named_features
from ingest.readers.files import read_expression
from mclstexp.errors import SourceError

COUNTS = {"10x20": [1, 0, 3], "11x20": [0, 2, 0], "10x21": [5, 6, 7], "12x20": [4, 4, 4]}
POSITIONS = {(10, 20): (100.5, 200.25), (11, 20): (110, 200), (10, 21): (100, 210), (12, 20): (120, 200)}


def read(row, tmp_path):
    return read_expression(row, str(tmp_path))


def refused(row, tmp_path):
    with pytest.raises(SourceError) as caught:
        read(row, tmp_path)
    return str(caught.value)


def named_gene(name, ensembl=""):
    """The gene of a source that has no other one."""
    return named_features([name], [ensembl]).genes[0]
