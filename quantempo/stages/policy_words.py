"""Words of caching policies that carry a share, such as `masks:0.5`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantempo.errors import RequestError, nearest


def parse_share(
    text: str, policies: Sequence[str], wanted: str, legal: Callable[[float], bool], example: str
) -> tuple[str, float]:
    """Name and share of a policy.

    Args:
        text: as typed, `NAME:SHARE`.
        policies: the known names.
        wanted: what is legal, in words.
        legal: whether a share is.
        example: a share that is.

    Raises:
        RequestError: not such a word.
    """
    name, _, number = text.partition(":")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if name not in policies or not legal(share):
        raise RequestError(
            "cache policy", found=repr(text), wanted=wanted,
            cause="a misspelling" if name not in policies else "the share is missing or out of range",
            remedy=nearest(name, policies) if name not in policies else f"write for example {name}:{example}",
        )
    return name, share
