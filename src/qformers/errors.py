"""The errors a user can cause. Each message is one line: what is wrong, in which file, and the fix."""


class QFormersError(Exception):
    """Base of every error that the command line prints as one line instead of a traceback."""


class ConfigError(QFormersError):
    """A setting is unknown, missing or contradicts another."""


class DataError(QFormersError):
    """A picture, caption file or feature store cannot be used as asked."""


class CheckpointError(QFormersError):
    """A checkpoint is missing, damaged, or belongs to another model."""
