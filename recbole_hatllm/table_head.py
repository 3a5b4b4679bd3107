"""A head that scores against item vectors of another model (SLMRec): scores = E (W h), E frozen."""

from __future__ import annotations

from torch import Tensor, nn

from recbole_hatllm.head import LinearHead


class TableHead(LinearHead):
    """`LinearHead` whose item weights are a frozen table, behind a trained projection without bias.

    Args:
        table: [n_items, width of the other model] float32, frozen; shared, not copied.
        width: size d of the vector. dropout, whiten: as in `LinearHead`, before the projection.
    """

    def __init__(self, table: nn.Parameter, width: int, dropout: float = 0.0, whiten: bool = False):
        super().__init__(1, width, dropout, whiten)
        self.weight = table
        self.projection = nn.Linear(width, table.shape[1], bias=False)

    def _factor(self, vector: Tensor) -> Tensor:
        return self.projection(super()._factor(vector))
