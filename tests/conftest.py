"""What every test runs under."""

from __future__ import annotations

import torch

torch.set_num_threads(
    1
)  # networks here are tiny: threads cost more than they give, above all beside other tests
