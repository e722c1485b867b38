"""The two ways a run can end badly, and what each means for the caller."""


class InputError(ValueError):
    """Something the user gave cannot be used. Raised before compute where it can be known; the CLI exits 2.

    The message names the thing, its value and what is allowed, in one line.
    """


class IntegrityError(RuntimeError):
    """A result failed a gate (non-finite, does not reload, logits differ). The CLI exits 1 and nothing is published."""
