"""DiT, conditioned on labels."""

from __future__ import annotations

from torch import Tensor, nn

from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Record


class DiT(Adapter):
    """Call a DiTTransformer2DModel with ``labels`` [B]. Its label dropout is off: data or guidance provide the null label."""

    def __init__(self, net: nn.Module):
        super().__init__(net)
        for module in net.modules():
            if hasattr(module, "token_drop"):
                module.dropout_prob = 0.0  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, timestep=t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]


RECORD = Record(DiT)
