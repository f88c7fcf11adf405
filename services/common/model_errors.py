"""Why a base model can't be used."""


class BaseModelError(Exception):
    """A base model can't be used; the message says why and what to do."""


class ModelNotFoundError(BaseModelError):
    """There is no folder for this model."""


class ModelIncompleteError(BaseModelError):
    """A file, a field or a tensor that every such model needs is missing or unreadable."""


class UnsupportedModelError(BaseModelError):
    """The model is of a kind that the engine does not compute."""


class ContextTooLongError(BaseModelError, ValueError):
    """A longer context was asked for than the model has."""
