"""`tensor.data` in a trace: the tensor itself, so that what is written into it is seen.

Models fill tables made in `forward` by `table.data[...].copy_(...)`, which autograd does not see, nor does a trace.
Without gradients `detach` is the same alias, and traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DATA: Any = torch.Tensor.data
GETTER = _DATA.__get__


class TrackedData(TorchFunctionMode):
    """Makes `tensor.data` be `tensor.detach()`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func == GETTER:
            return args[0].detach()
        return func(*args, **dict(kwargs or {}))
