"""The sizes that an engine is built for: optimization profiles by the names of the symbolic dimensions.

A profile gives each symbolic dimension a lowest, a best and a highest size.  An engine runs inside its profiles and
nowhere else: a size outside is refused with the nearest legal one, before the engine sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.shapes import symbols
from quantempo.errors import EngineError, RequestError, nearest

_ITEM = re.compile(r"([^=:,\s]+)=(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Range:
    """Sizes that a dimension may have, both ends included; the engine is tuned for `best`."""

    low: int
    best: int
    high: int

    def clamp(self, size: int) -> int:
        """The legal size closest to a size."""
        return min(max(size, self.low), self.high)

    def __str__(self) -> str:
        return f"{self.low}:{self.best}:{self.high}"


@dataclass(frozen=True)
class Profile:
    """One range per symbolic dimension."""

    sizes: Mapping[str, Range]

    def nearest(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The legal sizes closest to some sizes."""
        return {name: self.sizes[name].clamp(size) for name, size in sizes.items()}

    def __str__(self) -> str:
        return ",".join(f"{name}={span}" for name, span in sorted(self.sizes.items()))


def parse_profile(text: str) -> Profile:
    """A profile as typed: `batch=1:2:8,tokens=77`; one number alone is a fixed size, two are lowest and highest.

    Raises:
        RequestError: other text, or sizes that do not ascend from 1.
    """
    sizes = {}
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        numbers = [int(number) for number in match.groups()[1:] if number] if match else []
        if match is None or numbers != sorted(numbers) or numbers[0] < 1:
            raise RequestError(
                "shapes", found=repr(item.strip()), wanted="NAME=LOWEST:BEST:HIGHEST, e.g. batch=1:2:8",
                cause="a misspelling, or sizes that do not ascend from 1",
                remedy="separate dimensions with commas; a single number is a fixed size",
            )
        sizes[match.group(1)] = Range(numbers[0], numbers[len(numbers) // 2 if len(numbers) == 3 else 0], numbers[-1])
    return Profile(sizes)


def complete(
    where: str, inputs: Mapping[str, TensorSpec], asked: Sequence[Profile], default: Mapping[str, Range]
) -> tuple[Profile, ...]:
    """One profile per asked one (or a single one), each with a range for every symbolic dimension of the inputs.

    Args:
        where: the graph, for messages.
        inputs: of the graph.
        asked: what the user wants; a dimension that is left out takes its default.
        default: by dimension.

    Raises:
        RequestError: a dimension without a range.
    """
    known = symbols(inputs)
    profiles = []
    for profile in asked or (Profile({}),):
        sizes = {}
        for name in known:
            span = profile.sizes.get(name, default.get(name))
            if span is None:
                raise RequestError(
                    f"{where}: shapes", found=f"no sizes for dimension {name!r}",
                    wanted=f"a range for each of {', '.join(known)}", cause="the graph leaves this size open",
                    remedy=f"pass --shapes {name}=LOWEST:BEST:HIGHEST",
                )
            sizes[name] = span
        profiles.append(Profile(sizes))
    return tuple(profiles)


def require_known(asked: Iterable[Profile], known: Iterable[str]) -> None:
    """Refuse a dimension that no graph has.

    Raises:
        RequestError: names the closest one.
    """
    names = sorted(set(known))
    for profile in asked:
        for name in profile.sizes:
            if name not in names:
                raise RequestError(
                    "shapes", found=f"a range for {name!r}, which no graph has",
                    wanted=f"dimensions among {', '.join(names) or 'none'}", cause="a misspelling, or a fixed size",
                    remedy=nearest(name, names),
                )


def choose(where: str, profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """The profile that takes these sizes; among several, the one whose best sizes are closest.

    Raises:
        EngineError: none does; the nearest legal sizes are named.
    """

    def distance(profile: Profile, wanted: Mapping[str, int]) -> int:
        return sum(abs(size - wanted[name]) for name, size in sizes.items())

    legal = [i for i, profile in enumerate(profiles) if profile.nearest(sizes) == dict(sizes)]
    if legal:
        return min(legal, key=lambda i: distance(profiles[i], {n: s.best for n, s in profiles[i].sizes.items()}))
    closest = min(profiles, key=lambda profile: distance(profile, profile.nearest(sizes)))
    shown = ", ".join(f"{name} = {size}" for name, size in sorted(closest.nearest(sizes).items()))
    raise EngineError(
        f"{where}: shapes", found=", ".join(f"{name} = {size}" for name, size in sorted(sizes.items())),
        wanted=" or ".join(str(profile) for profile in profiles), cause="the engine was built for other sizes",
        remedy=f"the nearest legal sizes are {shown}; for others, build again with --shapes",
    )


def input_shapes(
    inputs: Mapping[str, TensorSpec], profile: Profile
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Lowest, best and highest shape of each input that has a symbolic dimension."""
    found = {}
    for name, spec in inputs.items():
        if any(isinstance(size, str) for size in spec.shape):
            ends = ({n: getattr(s, end) for n, s in profile.sizes.items()} for end in ("low", "best", "high"))
            low, best, high = (spec.resolve(dict(sizes)) for sizes in ends)
            found[name] = (low, best, high)
    return found
