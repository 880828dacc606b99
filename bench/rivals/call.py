"""What a rival binds to one routing: its two GEMMs, launched one after the other."""
import dataclasses
from typing import Callable

import torch


@dataclasses.dataclass
class Call:
    first: Callable[[], torch.Tensor]   # bf16 [rows, outputs of the first projection]
    second: Callable[[], torch.Tensor]  # bf16 [rows, hidden]
    places: torch.Tensor | None = None  # where the rows are in both, if not in order

    def __call__(self):
        self.out = self.first(), self.second()

    def results(self):
        return [out if self.places is None else out[self.places] for out in self.out]
