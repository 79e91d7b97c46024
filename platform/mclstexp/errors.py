"""Every mistake that a user can make and fix, as an exception of its own.

All are raised on the driver before workers start wherever that is possible. A message says what is wrong,
where, what was found, what is allowed and how to fix it.
"""


class UserError(Exception):
    """Base of all errors that a user can fix; jobs print it without a traceback and exit with code 2."""


class ConfigError(UserError):
    """A setting is unknown, mistyped, out of range or contradicts another."""


class SheetError(UserError):
    """The sample sheet has faults; the message lists all of them with row and column."""


class SourceError(UserError):
    """A source file (counts, positions, image) of a section is missing, damaged or inconsistent."""


class TableError(UserError):
    """A tile table is missing, damaged or of another schema version."""


class ConflictError(UserError):
    """Another writer published first; nothing of the loser's work is visible."""


class StorageError(UserError):
    """A URI cannot be resolved, read or written."""


class PartError(StorageError):
    """A part of a slide's unfinished prediction is missing or was damaged and removed; it has to be made again."""


class ResourceError(UserError):
    """The cluster cannot give what the run asks for; names the numbers and the setting to change."""


class SplitError(UserError):
    """Held-out sections or patients are unknown, or training would see a held-out patient."""


class ModelError(UserError):
    """A model version is incomplete, or does not belong to the data it is applied to."""


class RunError(UserError):
    """A run name is in use with another configuration."""


class PredictError(UserError):
    """An output holds other predictions, or slides of a cohort could not be predicted; names each with its reason."""


class ResultError(UserError):
    """A result folder is missing, incomplete or of an older version."""
