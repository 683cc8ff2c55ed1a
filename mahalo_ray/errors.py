"""Errors that end a run without being the user's wrong input (that is ValueError) or a defect."""


class StageError(RuntimeError):
    """A stage could not finish: workers or servers failed more often than allowed. The message says why and
    what is kept for the next run."""
