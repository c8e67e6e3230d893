"""An exponential moving average of the weights (Polyak and Juditsky 1992), which is what is scored and shipped.

    average ← d average + (1-d) weights after every step t = 1, 2, …        d = min(decay, (1+t) / (10+t))

The rise of d (TensorFlow's `ExponentialMovingAverage`) keeps the average over about the last tenth of the steps taken,
until that is longer than 1/(1-decay) steps: a short training would otherwise ship little but its start.

PyTorch's `AveragedModel` is not used for it: it copies the whole learner, with all that the objective keeps, averages
whole-number buffers as well, and has no such rise; its averaging function is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tes.engine.checkpoint import State


class WeightAverage:
    """The average of a module's trained parameters and of what it saves beside them in fractions: norms' statistics.

    Args:
        module: On its device. Its tensors may be changed in place, not replaced by others.
        decay: d's upper end; None: there is no average, and every method does nothing.
    """

    def __init__(self, module: nn.Module, decay: float | None) -> None:
        self.decay, self.num_steps = decay, 0
        saved = {} if decay is None else {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
        self._live = [
            tensor
            for tensor in saved.values()
            if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
        ]
        self._average = [tensor.detach().clone() for tensor in self._live]

    def update(self) -> None:
        """Take in the weights after a step."""
        if self.decay is None:
            return
        self.num_steps += 1
        decay = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        get_ema_multi_avg_fn(decay)(self._average, [tensor.detach() for tensor in self._live], None)

    def state(self) -> State:
        return State({str(number): tensor for number, tensor in enumerate(self._average)}, {"steps": self.num_steps})

    def load(self, state: State) -> None:
        self.num_steps = state.values["steps"]
        for number, tensor in enumerate(self._average):
            tensor.copy_(state.tensors[str(number)])

    def apply(self) -> None:
        """Put the average in the module's place, and the module's weights in the average's: twice changes nothing."""
        for live, average in zip(self._live, self._average):
            live.data, average.data = average.data, live.data

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module has the average's weights."""
        self.apply()
        try:
            yield
        finally:
            self.apply()
