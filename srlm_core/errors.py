"""What can go wrong, each with three beats: what was expected, what came, what to do."""


class SrlmError(Exception):
    """Base of every error a user can mend; the command line prints it without a traceback."""


class ConfigError(SrlmError):
    """A setting is unknown, ill-typed, or cannot work with another one."""


class DataError(SrlmError):
    """A file that the user gave cannot be used."""


class ModelError(SrlmError):
    """A model is missing, or is not a causal language model with a chat template."""


class StoreError(SrlmError):
    """The campaign folder cannot be used: locked, changed under a finished campaign, or full."""


class NothingLeft(SrlmError):
    """A stage has no row to hand on: no prompt survived, no judgment was readable, or no pair is left."""


class EngineDied(SrlmError):
    """An engine's process ended while requests were in flight; carries its own last words."""


class EngineClosed(SrlmError):
    """The campaign is stopping: an engine was closed while shards were still asking it. Not retried."""


class TrainingFailed(SrlmError):
    """The training process ended without a model; carries its own last words."""


class Stopped(SrlmError):
    """A campaign that was ended on purpose, with everything kept: nothing broke."""

    title = "Stopped"
    """What to call such an end in a word or two."""


class StoppedByGate(Stopped):
    """A model did not keep to a limit of `gates`; names each gate that failed."""

    title = "Stopped by a gate"


class StoppedByPerson(Stopped):
    """Somebody decided that the campaign ends after an iteration."""

    title = "Stopped by a person"


class WaitsForPerson(Stopped):
    """The campaign needs somebody's decision, and nobody could be asked."""

    title = "Waits for a person"


class CancelledByPerson(Stopped):
    """Somebody cancelled the campaign while it waited for a decision."""

    title = "Cancelled"
