"""What this package raises.

Every message says what is wrong, in which file, what was expected, and what to do about it.
Command lines print the message alone and exit with a status; a traceback means a bug.
"""


class UniconError(Exception):
    """Base of every error that is meant for a person."""


class DatasetError(UniconError):
    """An image, a label map, a table or a task folder is not what it must be."""


class PlanError(UniconError):
    """No valid plan exists for this data, this foundation and this machine."""


class CheckpointError(UniconError):
    """A checkpoint or model folder is damaged, foreign or does not fit."""


class PredictionError(UniconError):
    """A case could not be predicted."""
