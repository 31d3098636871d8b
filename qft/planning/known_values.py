"""Real tensors beside fake ones: what a batch says of itself stays known while its model is fake.

Which positions have a label, say, decides how many logits a loss is made of. A mask that is real
can be asked; a fake one cannot. Within `KnownValues` a real tensor stays where it can be read, also
if it is sent to a device that is planned and not there; where it meets a fake one it becomes fake.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map


class KnownValues(TorchFunctionMode):
    """See above.

    Args:
        mode: whose the fake tensors are.
        device: which they are on.
    """

    def __init__(self, mode: FakeTensorMode, device: str) -> None:
        super().__init__()
        self._mode, self._device = mode, device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Every function of tensors passes here, those within the model too."""
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return func(args[0], self._counted(args[1]))
        if func is Tensor.to and _is_known(args[0]):
            here: Any = [torch.device("cpu") if _is_device(value) else value for value in args[1:]]
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
            return func(args[0], *here, **kwargs) if here or kwargs else args[0]
        both = (args, kwargs)
        if self._device != "cpu" and tree_any(_is_known, both) and tree_any(_is_fake, both):
            args, kwargs = tree_map(self._faked, both)
        return func(*args, **kwargs)

    def _faked(self, value: Any) -> Any:
        if not _is_known(value):
            return value
        with self._mode:
            return torch.empty(value.shape, dtype=value.dtype, device=self._device)

    def _counted(self, index: Any) -> Any:
        """Real masks as indices, of which there are as many as the mask has ones."""
        if not isinstance(index, tuple):
            index = (index,)
        made: list[Any] = []
        for part in index:
            if _is_known(part) and part.dtype == torch.bool:
                count = int(part.sum())
                with self._mode:
                    made += [
                        torch.empty(count, dtype=torch.long, device=self._device)
                        for _ in range(part.dim())
                    ]
            else:
                made.append(part)
        return tuple(made)


def _is_known(value: Any) -> bool:
    real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
    return real and value.device.type == "cpu"


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _is_device(value: Any) -> bool:
    return isinstance(value, (torch.device, str))
