"""The record of a study: many trainings under one name (the folds of a cross-validation, the trials of a sweep).

It is written once and compared with the request each time the study is opened. A default name comes from the same
request, so that the same command finds its study again wherever and on however many workers it goes on.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

from mclstexp import storage
from mclstexp.errors import RunError
from mclstexp.training.run import TrackedRecord, known_name, name_of, with_tracking

Record = TypeVar("Record", bound=TrackedRecord)
Request = Mapping[str, object]
"""What a study's results depend on: the fields of its record without the MLflow run, as JSON has them."""
Track = Callable[[str | None], str]
"""Returns the id of a study's MLflow run from the recorded one (None for a new study)."""


def study_name(out: str, file: str, kind: str, request: Request, former: str) -> str:
    """Returns the name of a study that was given none: `kind` and digests of its request.

    Args:
        out: folder of the studies.
        file: name of the record in a study's folder.
        kind: first part of the name.
        request: what the results depend on.
        former: the name that earlier versions gave, used where it has a study of the same request.
    """
    return known_name(out, file, request, [name_of(kind, request), former])


def open_record(kind: type[Record], uri: str, file: str, request: Request, track: Track) -> Record:
    """Returns the record of the study at `uri`, made from the request if there is none.

    Raises:
        RunError: the study was made from another request; names the fields that differ.
    """
    record_uri = storage.join(uri, file)
    is_new = not storage.exists(record_uri)
    if is_new:
        new = kind.model_validate({**request, "mlflow_run_id": track(None)})
        storage.publish(record_uri, new.model_dump_json(indent=1).encode(), previous=None)
    record = kind.model_validate_json(storage.read(record_uri))
    other = [name for name, value in request.items() if getattr(record, name) != value]
    if other:
        what = file.partition(".")[0]
        raise RunError(f"{uri} holds a {what} with another {', '.join(other)}; give another --name")
    return record if is_new else with_tracking(record, record_uri, track(record.mlflow_run_id))
