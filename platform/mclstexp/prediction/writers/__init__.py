"""The files that `predict` publishes for each slide, one line each.

A new file is a module with one function and one line here; publishing and the removal of a slide's files walk over
this list. Pictures of genes are `draw`'s.
"""

from mclstexp.prediction.writers.h5ad import write_h5ad
from mclstexp.prediction.writers.preview import write_preview
from mclstexp.prediction.writers.slide import Writer
from mclstexp.prediction.writers.table import write_table

TABLE, H5AD = "{slide_id}.parquet", "{slide_id}.h5ad"
WRITERS = (
    Writer(TABLE, write_table),  # first: the others are made from it; uploaded last, so that it states they are there
    Writer("previews/{slide_id}.jpg", write_preview, without_tissue=True),
    Writer(H5AD, write_h5ad),
)
