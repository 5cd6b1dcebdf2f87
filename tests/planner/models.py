"""Small models of blocks, for the planner."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.planner.runs import Run, runs_of


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act, self.drop = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
        return mixed + self.drop(self.down(self.act(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, depth: int = 7, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class Latent(nn.Module):
    """Causal attention whose values are narrower than its keys, or by a mask of the same."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, masked: bool = False) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(width, heads * 192), nn.Linear(width, heads * 128)
        self.heads, self.dropout, self.masked = heads, dropout, masked

    def forward(self, x: Tensor) -> Tensor:
        query, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.value)
        )
        length = x.shape[1]
        mask = x.new_ones(1, 1, length, length, dtype=torch.bool).tril() if self.masked else None
        return F.scaled_dot_product_attention(
            query, query, value, mask, self.dropout, not self.masked
        )


def on_meta(**settings: float) -> tuple[Model, Tensor]:
    with torch.device("meta"):
        return Model(**settings), torch.empty(8, 256, dtype=torch.int64)


def singles(model: nn.Module) -> list[Run]:
    """Each block by itself, so that all are walked."""
    return [
        Run((name,), run.container, int(name.rpartition(".")[2]))
        for run in runs_of(model)
        for name in run.names
    ]
