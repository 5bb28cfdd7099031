"""The fused kernels: whether they can serve a call, and if not, why.

This version of the package ships no kernel library, so the answer is always no and `implementation="auto"`
takes the reference path.
"""


def can_use(raise_error: bool = False) -> bool:
    """Whether the fused kernels can serve a call.

    Args:
        raise_error: Raise instead of returning `False`.

    Returns:
        `True` or `False`.

    Raises:
        RuntimeError: With `raise_error`, saying why the kernels cannot be used.
    """
    reason = why_not()
    if reason and raise_error:
        raise RuntimeError(f'implementation="native" cannot be used: {reason}. Use "auto" or "reference".')
    return not reason


def why_not() -> str:
    """Says why the fused kernels cannot be used, or "" where they can."""
    return "this version of keras_das has no kernel library"
