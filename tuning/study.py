"""The record of a place where many trainings lie (a cross-validation, a sweep): made once, compared ever after."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from mclstexp import storage
from mclstexp.errors import RunError


class StudyRecord(BaseModel):
    """What every such record holds; each kind adds what its own results depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, dict[str, object]]
    """As `trainer.identity`."""
    manifest_digest: str
    mlflow_run_id: str


Record = TypeVar("Record", bound=StudyRecord)


def open_record(
    kind: type[Record], uri: str, file: str, asked: Mapping[str, object], start_tracking: Callable[[], str]
) -> Record:
    """Returns the record at a place, made of what is asked for and a new MLflow run where there is none.

    Raises:
        RunError: the record there was made of something else; names what.
    """
    place = storage.join(uri, file)
    if not storage.exists(place):
        made = kind.model_validate({**asked, "mlflow_run_id": start_tracking()})
        storage.publish(place, made.model_dump_json(indent=1).encode(), previous=None)
    record = kind.model_validate_json(storage.read(place))
    other = [name for name, value in asked.items() if getattr(record, name) != value]
    if other:
        what = file.partition(".")[0]
        raise RunError(f"{uri} holds a {what} with another {', '.join(other)}; give another --name")
    return record
