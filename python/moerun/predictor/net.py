"""The net of a predictor as a PyTorch module; the native module computes the same."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from moerun.predictor.shape import NetShape

NORM_EPS = 1e-5
ROPE_THETA = 10000.0


class PathNet(nn.Module):  # type: ignore[misc, unused-ignore]
    """Token ids (B, T) to logits (B, T, outputs): for every token those of its own experts.

    Its parameters have the names of the file's tensors.
    """

    def __init__(
        self, shape: NetShape, vocab_size: int, num_outputs: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(vocab_size, shape.embedding_size)
        self.embedding_projection = _linear(shape.embedding_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.num_blocks))
        self.final_norm = nn.RMSNorm(shape.hidden_size, eps=NORM_EPS)
        self.head = nn.Linear(shape.hidden_size, num_outputs)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        tokens = token_ids.shape[1]
        rotation = _rotation(tokens, self.shape.head_dim)
        offset = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        mask = (offset >= 0) & (offset < self.shape.window)
        x = self.dropout(self.embedding_projection(self.embedding(token_ids)))
        for block in self.blocks:
            x = block(x, rotation, mask)
        logits: torch.Tensor = self.head(self.final_norm(x))
        return logits

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return copies of all parameters by name."""
        return {name: each.detach().numpy().copy() for name, each in self.named_parameters()}

    def load(self, weights: dict[str, NDArray[np.float32]]) -> None:
        """Take parameters from arrays."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name]))


class Block(nn.Module):  # type: ignore[misc, unused-ignore]
    """Attention over the last tokens, then an MLP with squared ReLU; both on a normalised input."""

    def __init__(self, shape: NetShape, dropout: float) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.num_heads = shape.num_heads
        self.attention_norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.qkv = _linear(hidden, 3 * hidden)
        self.attention_output = _linear(hidden, hidden)
        self.mlp_norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.mlp_up = _linear(hidden, shape.mlp_size)
        self.mlp_down = _linear(shape.mlp_size, hidden)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.attention_output.weight)
        nn.init.zeros_(self.mlp_down.weight)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return the residual stream after the block."""
        batch, tokens, hidden = x.shape
        heads = (batch, tokens, self.num_heads, hidden // self.num_heads)
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = (part.view(heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended = attended.transpose(1, 2).reshape(batch, tokens, hidden)
        x = x + self.dropout(self.attention_output(attended))
        wide = functional.relu(self.mlp_up(self.mlp_norm(x))).square()
        result: torch.Tensor = x + self.dropout(self.mlp_down(wide))
        return result


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(inputs))
    return layer


def _rotation(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines (T, head_dim / 2), exact far along a sequence, too."""
    half = head_dim // 2
    frequencies = ROPE_THETA ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosines - b * sines, b * cosines + a * sines), dim=-1)
