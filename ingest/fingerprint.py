"""Which bytes an image holds, told without reading it whole: slides are gigabytes, cohorts thousands of them.

In object storage it is length and ETag: a copy uploaded in other parts counts as another file, which costs a new
prediction and no error. On disk it is length and SHA-256 of the first and last MiB, where headers and directories lie:
an edit in between that keeps the length goes unseen. Companion files (the folder of an .mrxs, the parts of a .vms) are
not looked at.
"""

import hashlib

from mclstexp import storage

_END_BYTES = 2**20


def fingerprint(image: str) -> str:
    """Returns a token of a local or `s3://` image that changes when its content does, within the stated limits.

    Raises:
        FileNotFoundError: there is no such image.
        StorageError: it cannot be read.
    """
    size = storage.size(image)
    if storage.is_s3(storage.absolute(image)):
        version = storage.version(image)
        if version is None:
            raise FileNotFoundError(image)
        return f"{size}-{version.strip(chr(34))}"
    head = storage.read(image, 0, min(size, _END_BYTES))
    tail = storage.read(image, max(size - _END_BYTES, 0), min(size, _END_BYTES))
    return f"{size}-{hashlib.sha256(head + tail).hexdigest()}"
