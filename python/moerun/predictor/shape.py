"""Sizes of the net, and what they are unless somebody chooses others."""

from __future__ import annotations

from dataclasses import dataclass

from moerun.arguments import check_int
from moerun.errors import InvalidArgumentError

_UNIT = 32  # rows of weights are read in such pieces
_MAX_WIDTH = 8192
_EMBEDDING_PARAMETERS = 2_000_000
_FEW_OUTPUTS = 512


@dataclass(frozen=True)
class NetShape:
    """Sizes of a predictor's net.

    Attributes:
        embedding_size: of a token's row in the table; a product brings it to `hidden_size`.
        hidden_size: of the residual stream.
        mlp_size: of the middle of a block's MLP.
        num_blocks: attention and MLP, so often.
        num_heads: of attention.
        window: tokens that attention sees, the current one included.

    Raises:
        InvalidArgumentError: a size is out of its range.
    """

    embedding_size: int = 128
    hidden_size: int = 256
    mlp_size: int = 1024
    num_blocks: int = 3
    num_heads: int = 8
    window: int = 64

    def __post_init__(self) -> None:
        for name, most in (
            ("embedding_size", _MAX_WIDTH),
            ("hidden_size", _MAX_WIDTH),
            ("mlp_size", 4 * _MAX_WIDTH),
        ):
            size = check_int(name, getattr(self, name), _UNIT, most)
            if size % _UNIT != 0:
                raise InvalidArgumentError(f"{name} must be a multiple of {_UNIT}, not {size}")
        check_int("num_blocks", self.num_blocks, 1, 32)
        check_int("num_heads", self.num_heads, 1, self.hidden_size // 8)
        check_int("window", self.window, 1, 4096)
        if self.hidden_size % (8 * self.num_heads) != 0:
            raise InvalidArgumentError(
                f"num_heads must divide hidden_size ({self.hidden_size}) into heads of a multiple "
                f"of 8, not {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_heads

    def num_parameters(self, vocab_size: int, num_outputs: int) -> int:
        """Return the number of weights with so many tokens and layers times experts."""
        block = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.mlp_size
        return (
            vocab_size * self.embedding_size
            + self.embedding_size * self.hidden_size
            + self.num_blocks * (block + 2 * self.hidden_size)
            + self.hidden_size
            + num_outputs * (self.hidden_size + 1)
        )

    def tensors(self, vocab_size: int, num_outputs: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a file's weights by name: matrices are bf16, vectors float32."""
        hidden, mlp = self.hidden_size, self.mlp_size
        shapes: dict[str, tuple[int, ...]] = {
            "embedding.weight": (vocab_size, self.embedding_size),
            "embedding_projection.weight": (hidden, self.embedding_size),
        }
        for index in range(self.num_blocks):
            block = {
                "attention_norm.weight": (hidden,),
                "qkv.weight": (3 * hidden, hidden),
                "attention_output.weight": (hidden, hidden),
                "mlp_norm.weight": (hidden,),
                "mlp_up.weight": (mlp, hidden),
                "mlp_down.weight": (hidden, mlp),
            }
            shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
        return shapes | {
            "final_norm.weight": (hidden,),
            "head.weight": (num_outputs, hidden),
            "head.bias": (num_outputs,),
        }


def default_shape(
    vocab_size: int,
    num_outputs: int,
    *,
    embedding_size: int | None = None,
    hidden_size: int | None = None,
    mlp_size: int | None = None,
    num_blocks: int | None = None,
    num_heads: int | None = None,
    window: int | None = None,
) -> NetShape:
    """Return the sizes for a vocabulary and a number of layers times experts: what is given, and
    for the rest what docs/predictor.md found good.

    Raises:
        InvalidArgumentError: a size is out of its range.
    """
    plain = NetShape()
    hidden = hidden_size
    if hidden is None:
        hidden = plain.hidden_size if num_outputs > _FEW_OUTPUTS else plain.hidden_size // 2
    if embedding_size is None:
        # A large table gets narrow rows, so that it does not outweigh all the rest.
        rows = _EMBEDDING_PARAMETERS // max(1, vocab_size) // _UNIT * _UNIT
        embedding_size = min(plain.embedding_size, max(_UNIT, rows))
    return NetShape(
        embedding_size=embedding_size,
        hidden_size=hidden,
        mlp_size=4 * hidden if mlp_size is None else mlp_size,
        num_blocks=plain.num_blocks if num_blocks is None else num_blocks,
        num_heads=max(1, hidden // 32) if num_heads is None else num_heads,
        window=plain.window if window is None else window,
    )
