"""Geometry of a packed KV-cache page, shared by every kernel and by the engine that allocates it.

A page holds ``block_size`` tokens of one KV head. It is a row of *tiles* of 16 tokens, optionally followed by a
*sink area*::

    page = tile * (block_size / 16) + sink area
    tile = [key codes][value codes][scales and zeros]

``D`` is the head size, ``kb`` and ``vb`` the bits, ``r`` the token in its tile (0..15).

Key codes
    A token's row is ``D*kb/8`` bytes, little endian. Rows are cut into planes of at most 64 bytes; a plane stores
    its 16 row pieces one after another. (A lane of a tensor-core kernel reads 16 contiguous bytes of one row without
    bank conflicts; a SIMD kernel reads four rows per 64-byte load.)
Value codes
    Tokens ``2t`` and ``2t+1`` of each half tile share 32-bit words: the even token's 16 bits low, the odd token's
    high, each holding ``16/vb`` consecutive channels. So one shift and mask of a word yields a pair of codes for a
    two-way dot product, and a single token can be written in whole 2-byte granules. Word ``k`` of a pair belongs to
    channel group ``g = k // L``; words are ordered ``(plane, half, g, pair, word in plane)``.
Scales and zeros
    fp16, ``x = code * scale + zero``, in slot ``(r % 8) * 2 + r // 8``: key scale, key zero, value scale, value zero;
    a 16-bit side has neither codes nor scales, its elements are stored as they are.
Sink area
    fp16 keys then fp16 values of the page's first ``sink_tokens`` tokens. Readers use it only in the first page of a
    sequence.

The same bytes are read by the CPU kernels and, at 92-102 % of copy bandwidth for 4 bits and up, by tensor-core
kernels on Hopper; any block size that is a multiple of 16 gives the same tiles.
"""

from dataclasses import dataclass
from functools import cached_property

TILE_TOKENS = 16
SUPPORTED_BITS = (16, 8, 4, 2)
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 32, 256


@dataclass(frozen=True)
class PageLayout:
    """Where every byte of a packed page lies.

    Args:
        head_size: channels per head; a multiple of 16 from 32 to 256.
        key_bits: bits per key element: 16, 8, 4 or 2.
        value_bits: bits per value element: 16, 8, 4 or 2.
        sink_tokens: tokens at the start of a sequence that are also kept at 16 bits; 0 to 16.

    Raises:
        ValueError: one sentence naming the value found and the values allowed.
    """

    head_size: int
    key_bits: int
    value_bits: int
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.head_size % 16 or not MIN_HEAD_SIZE <= self.head_size <= MAX_HEAD_SIZE:
            raise ValueError(
                f"head size {self.head_size} is not supported: use a multiple of 16 from "
                f"{MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
            )
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in SUPPORTED_BITS:
                raise ValueError(f"{name} {getattr(self, name)} is not supported: use one of {SUPPORTED_BITS}")
        if not 0 <= self.sink_tokens <= TILE_TOKENS:
            raise ValueError(f"sink_tokens {self.sink_tokens} is not supported: use 0 to {TILE_TOKENS}")

    @property
    def key_row_bytes(self) -> int:
        """Bytes of one token's key codes."""
        return self.head_size * self.key_bits // 8

    @property
    def key_bytes(self) -> int:
        """Bytes of the key codes of one tile."""
        return TILE_TOKENS * self.key_row_bytes

    @property
    def value_bytes(self) -> int:
        """Bytes of the value codes of one tile."""
        return TILE_TOKENS * self.head_size * self.value_bits // 8

    @property
    def meta_bytes_per_token(self) -> int:
        """Bytes of scales and zeros per token: 4 for each side below 16 bits."""
        return 4 * (self.key_bits < 16) + 4 * (self.value_bits < 16)

    @property
    def tile_bytes(self) -> int:
        """Bytes of 16 tokens, scales and zeros included."""
        return self.key_bytes + self.value_bytes + TILE_TOKENS * self.meta_bytes_per_token

    @property
    def sink_bytes(self) -> int:
        """Bytes of the sink area of one page."""
        return self.sink_tokens * self.head_size * 4

    def bytes_per_token(self, block_size: int) -> int:
        """Bytes of cache per token and KV head, scales, zeros and sink area included.

        Raises:
            ValueError: if ``block_size`` is not a positive multiple of 16.
        """
        if block_size < TILE_TOKENS or block_size % TILE_TOKENS:
            raise ValueError(f"block size {block_size} is not supported: use a multiple of {TILE_TOKENS}")
        return self.tile_bytes // TILE_TOKENS + -(-self.sink_bytes // block_size)

    @cached_property
    def value_words(self) -> tuple[int, int, int]:
        """``(groups, planes, words per plane)`` of the value codes; their product is the words per token pair."""
        words = self.head_size * self.value_bits // 16
        groups = next(g for g in (8, 4, 2, 1) if words % g == 0)
        per_group = words // groups
        width = next(w for w in (4, 2, 1) if per_group % w == 0)
        return groups, per_group // width, width

    def key_offset(self, token: int, byte: int) -> int:
        """Offset in a tile of byte ``byte`` of the key row of token ``token`` (0..15)."""
        plane, rest = divmod(byte, 64)
        width = min(64, self.key_row_bytes - 64 * plane)
        return plane * 64 * TILE_TOKENS + token * width + rest

    def value_offset(self, token: int, word: int) -> int:
        """Offset in a tile of the 16-bit granule ``word`` of the values of token ``token`` (0..15)."""
        groups, planes, width = self.value_words
        half, pair, odd = token // 8, token % 8 // 2, token % 2
        group, inner = divmod(word, planes * width)
        plane, column = divmod(inner, width)
        index = (((plane * 2 + half) * groups + group) * 4 + pair) * width + column
        return self.key_bytes + 4 * index + 2 * odd

    def meta_offset(self, token: int) -> int:
        """Offset in a tile of the scales and zeros of token ``token`` (0..15)."""
        slot = token % 8 * 2 + token // 8
        return self.key_bytes + self.value_bytes + slot * self.meta_bytes_per_token
