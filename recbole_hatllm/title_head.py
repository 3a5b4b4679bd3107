"""Vector and history -> scores of items that are known by their titles, those that training never saw included."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_hatllm.head import Extra, cross_entropy
from recbole_hatllm.whitening import Whitening

SCALE = 10.0  # of cosines, as scores, before training
DECAY = 0.5  # of an item's weight in the history with its age, before training
# Adam moves every number by about its learning rate, however large it is: the few that have far to go are kept in units of this.
UNIT = 4.0
ROWS = 256  # whose words are compared at once: a number a term for each


class TitleHead(nn.Module):
    """score(j) = s <q, e_j> + again [j in history] + cold_bias [j is cold] + words cos(t_j, sum_a w_a t_{i_a}).

    - e_j = v_j + o_j: v_j the item's title vector, whitened over all items and of length 1; o_j a free offset, which only
      `offsets` brings and which is zero for cold items, those that training never saw.
    - q = c + M c + R h: c = sum_a w_a e_{i_a} the history's mean item vector, weighted by age a and of weights that sum to 1;
      M and R linear maps that start at zero; h the readout. So untrained it ranks by the similarity of titles, and training may
      overrule that.

    Cold items are no negatives: training would only learn that they are cold. `cold_bias` makes up for what that leaves open. The
    last term is for ranking alone too: t_j are the words of item j's title (`set_words`), which states of titles blur.

    Args:
        n_items: number of internal item ids, the padding item 0 included. width: size d of readout and title vectors.
        longest: items a history can have.
        offsets: whether there are o_j.
        dropout: of h and, before M, of c, while training.
        whiten: put a `Whitening` before R.
        cold_bias, words: see above.
    """

    vectors: Tensor
    seen: Tensor

    def __init__(
        self,
        n_items: int,
        width: int,
        longest: int,
        offsets: bool = False,
        dropout: float = 0.0,
        whiten: bool = False,
        cold_bias: float = 0.0,
        words: float = 0.0,
    ):
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(n_items, width), dim=1))  # until `set_titles`
        self.vectors[0] = 0
        self.register_buffer("seen", torch.arange(n_items) > 0)
        self.title_whitening = Whitening(width)
        self.whitening = Whitening(width) if whiten else None
        self.offsets = nn.Parameter(torch.zeros(n_items, width)) if offsets else None
        self.recency = nn.Parameter(math.log(DECAY) / UNIT * torch.arange(longest))
        self.mix = nn.Parameter(torch.zeros(width, width))
        self.readout = nn.Parameter(torch.zeros(width, width))
        self.scale = nn.Parameter(torch.tensor(math.log(SCALE) / UNIT))
        self.again = nn.Parameter(torch.tensor(-SCALE / UNIT))
        self.dropout = nn.Dropout(dropout)
        self.cold_bias, self.words = cold_bias, words
        self._words: tuple[Tensor, Tensor] | None = None
        self._warm: tuple[Tensor, int, Tensor, Tensor] | None = None

    @torch.no_grad()
    def set_titles(self, vectors: Tensor, floor: float) -> None:
        """Makes the title vectors out of what the backbone says of each title, [n_items, d], padding's first.

        Args:
            floor: of the whitening.
        """
        self.title_whitening.fit(vectors[1:].float(), floor)
        self.vectors.copy_(self.title_vectors(vectors))
        self.vectors[0] = 0

    def title_vectors(self, vectors: Tensor) -> Tensor:
        """The title vectors [N, d] of titles of which the backbone says `vectors` [N, d], these items or any others."""
        return F.normalize(self.title_whitening(vectors.to(self.vectors.dtype)), dim=1)

    def set_words(self, words: Tensor) -> None:
        """Says what words the titles have: [n_items, terms] sparse float32, of length 1 or 0, padding 0. No part of a
        checkpoint."""
        self._words = words.coalesce(), words.t().coalesce()

    @torch.no_grad()
    def set_seen(self, items: Tensor) -> None:
        """Says which items [N] int64 training sees; all others are cold."""
        self.seen.zero_()
        self.seen[items] = True
        self.seen[0] = False

    @torch.no_grad()
    def add_items(self, vectors: Tensor) -> None:
        """Adds cold items behind those there are. vectors: what the backbone says of their titles, [N, d]."""
        new = self.title_vectors(vectors)
        self.vectors = torch.cat([self.vectors, new])
        self.seen = F.pad(self.seen, (0, len(new)))
        if self.offsets is not None:
            self.offsets = nn.Parameter(F.pad(self.offsets, (0, 0, 0, len(new))))

    def items(self, said: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[n_items, d]: e_j, zero for padding. said: as for `loss`."""
        vectors = self.vectors
        if said is not None:
            vectors = vectors.index_copy(0, said[0], self.title_vectors(said[1]))
        return vectors if self.offsets is None else vectors + self.offsets * self.seen[:, None]

    def weights(self, history: Tensor) -> Tensor:
        """[B, L]: w_a of each item of a history, 0 behind the last."""
        present = history > 0
        age = present.sum(1, keepdim=True) - 1 - torch.arange(history.shape[1], device=history.device)
        return (UNIT * self.recency)[age.clamp(min=0)].masked_fill(~present, -torch.inf).softmax(1)

    def query(self, vector: Tensor | None, history: Tensor, items: Tensor) -> Tensor:
        """[B, d]: s q.

        Args:
            vector: [B, d] readouts; None leaves R h out.
            history: [B, L] int64 item ids, oldest first, 0 behind the last. items: of `items()`.
        """
        content = torch.einsum("bl,bld->bd", self.weights(history), F.embedding(history, items))
        query = content + self.dropout(content) @ self.mix
        if vector is not None:
            vector = vector.to(items.dtype)
            vector = vector if self.whitening is None else self.whitening(vector)
            query = query + self.dropout(vector) @ self.readout / math.sqrt(vector.shape[1])
        return (UNIT * self.scale).exp() * query

    def reads(self) -> bool:
        """Whether a readout changes a score: R is no longer zero."""
        return bool(self.readout.any())

    def forward(self, vector: Tensor | None, history: Tensor) -> Tensor:
        """Readouts [B, d] of any float type, None for those that change nothing, and the histories [B, L] -> [B, n_items] scores,
        column 0 (padding) at -inf."""
        items = self.items()
        scores = self.query(vector, history, items) @ items.T
        scores = scores + self.cold_bias * (~self.seen).to(scores.dtype)
        scores = self._repeats(history, history).on(scores, slice(None))
        if self.words and self._words is not None:
            scores = scores + self.words * torch.cat([self._shared_words(part) for part in history.split(ROWS)])
        scores[:, 0] = -torch.inf
        return scores

    def loss(
        self,
        vector: Tensor | None,
        target: Tensor,
        label_smoothing: float = 0.0,
        *,
        history: Tensor,
        said: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Mean cross-entropy over all items that training sees.

        Args:
            vector, history: as above; no vector leaves R h out. target: [B] int64 of such items.
            said: ids [K] int64 and what the backbone says of their titles by now, [K, d], for gradients to go through; all other
                titles, or with None all, are as `set_titles` left them.
        """
        warm, column = self._warm_items()
        items = self.items(said)
        query = self.query(vector, history, items)
        extra = self._repeats(history, column[history])
        return cross_entropy(query, items[warm], column[target], label_smoothing, extra)

    def _shared_words(self, history: Tensor) -> Tensor:
        """[B, n_items]: the cosine of the words of each title and of those of the history together; 0 where either has none."""
        words, by_term = self._words = tuple(part.to(self.vectors.device) for part in self._words or ())
        taken = self.vectors.new_zeros(len(history), len(words)).scatter_add_(1, history, self.weights(history))
        sums = torch.sparse.mm(by_term, taken.T)  # [terms, B]
        return (torch.sparse.mm(words, sums) / torch.linalg.vector_norm(sums, dim=0).clamp(min=1e-12)).T

    def _repeats(self, history: Tensor, column: Tensor) -> Extra:
        """`again` for each item of a history once. column [B, L]: of each item's score, -1 where it has none."""
        before = (history[:, :, None] == history[:, None, :]).tril(-1).any(2)
        once = (history > 0) & (column >= 0) & ~before
        return Extra(column.clamp(min=0), once.to(self.again.dtype), UNIT * self.again)

    def _warm_items(self) -> tuple[Tensor, Tensor]:
        """Ids of the items that training sees, and for each id its place among them, -1 for others; made when `seen` changes."""
        known = self._warm
        if known is None or known[0] is not self.seen or known[1] != self.seen._version:
            seen = self.seen if self.seen.device.type != "meta" else torch.arange(len(self.seen)) > 0
            warm, column = seen.nonzero()[:, 0], torch.where(seen, seen.cumsum(0) - 1, -1)
            known = self._warm = self.seen, self.seen._version, warm.to(self.seen.device), column.to(self.seen.device)
        return known[2:]
