"""DistillKit's compressed log-probs (github.com/arcee-ai/DistillKit): from its columns to ids and log-probs.

Three forms of a position's K entries, by the columns that are there:

- `compressed_logprobs` and `bytepacked_indices`: the first `exact_k` values in `exact_dtype`, then the coefficients of
  `polynomial_terms` in the rank, then bins of quantised residuals, each with its scale; with `delta_encoding` the
  values are differences between ranks. Ids are packed with ceil(log2(d)) bits each, the highest bit first.
- `packed_indices`, `exact_values` and `coeffs`: the older form. Its values are logits less their mean, so that only
  their ratios among the K are known. Ids are packed into 64-bit words, the first one in the lowest bits.
- `token_ids` and `top_values`: as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_Dtype = Literal["float16", "bfloat16", "float32", "float64"]
_Count = Annotated[int, Field(ge=0)]


class Bin(BaseModel):
    """Residuals of `num_elements` ranks, `element_bits` each, in units of a scale."""

    scale_dtype: _Dtype
    element_bits: Annotated[int, Field(ge=1, le=63)]
    num_elements: Annotated[int, Field(ge=1)]


class Compression(BaseModel):
    """`compression_config.yaml`: `d` is the size of the vocabulary, `k` the entries per position."""

    d: Annotated[int, Field(ge=2)]
    k: Annotated[int, Field(ge=1)]
    exact_k: _Count
    exact_dtype: _Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: _Dtype = "float32"
    residual_bins: list[Bin] = []
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of the log-probs of a position."""
        sizes = [self.exact_k * _DTYPES[self.exact_dtype].itemsize]
        sizes.append(len(self.polynomial_terms or []) * _DTYPES[self.term_dtype].itemsize)
        for part in self.residual_bins:
            sizes += [_DTYPES[part.scale_dtype].itemsize, math.ceil(part.num_elements * part.element_bits / 8)]
        return sum(sizes)

    @property
    def is_exact(self) -> bool:
        """Whether all K values are stored without loss, so that the tail mass is one minus their sum."""
        return self.exact_k == self.k and self.exact_dtype in ("float32", "float64")


class LegacyCompression(BaseModel):
    """The config of the older form."""

    vocab_size: Annotated[int, Field(ge=2)]
    k: Annotated[int, Field(ge=1)]
    exact_k: _Count
    polynomial_degree: _Count
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: _Dtype = "float32"


def decode_new(columns: dict[str, list[Any]], config: Compression) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T, K] and log-probs [T, K] in float32, in the order that they are stored in."""
    data_TB = torch.tensor(columns["compressed_logprobs"], dtype=torch.uint8)
    exact_dtype, at = _DTYPES[config.exact_dtype], 0

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal at
        size = count * dtype.itemsize
        part = data_TB[:, at : at + size].contiguous()
        at += size
        return part.view(dtype) if count else torch.zeros(len(data_TB), 0, dtype=dtype)

    exact_TK = take(config.exact_k, exact_dtype)
    approximate = config.k - config.exact_k
    terms = config.polynomial_terms or []
    coefficients_TC = take(len(terms), _DTYPES[config.term_dtype])
    residuals = []
    for part in config.residual_bins:
        scale_T1 = take(1, _DTYPES[part.scale_dtype])
        num_bytes = math.ceil(part.num_elements * part.element_bits / 8)
        levels = _unpack_bits(data_TB[:, at : at + num_bytes].numpy(), part.element_bits, part.num_elements)
        at += num_bytes
        residuals.append(_dequantised(torch.from_numpy(levels), scale_T1, part.element_bits))
    values_TK = torch.zeros(len(data_TB), approximate)
    if residuals:
        known = torch.cat(residuals, dim=1).to(exact_dtype).float()
        values_TK[:, : known.shape[1]] = known
    if terms:
        values_TK = values_TK + _polynomial(terms, approximate, coefficients_TC, config.normalize_t).float()
    all_TK = torch.cat([exact_TK.float(), values_TK], dim=1)
    if config.delta_encoding:
        all_TK = all_TK.cumsum(dim=1).to(exact_dtype).float()
    packed = np.array(columns["bytepacked_indices"], np.uint8)
    return _unpack_bits(packed, math.ceil(math.log2(config.d)), config.k), all_TK.numpy()


def decode_legacy(columns: dict[str, list[Any]], config: LegacyCompression) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T, K] and log-probs among the K alone [T, K]."""
    words_TW = np.array(columns["packed_indices"], np.uint64)
    bits = math.ceil(math.log2(config.vocab_size))
    per_word = 64 // bits
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    ids_TWE = (words_TW[:, :, None] >> shifts) & np.uint64(2**bits - 1)
    ids_TK = ids_TWE.reshape(len(words_TW), -1)[:, : config.k].astype(np.int64)
    exact_TK = torch.tensor(columns["exact_values"], dtype=torch.float32)
    rank = torch.arange(config.k - config.exact_k, dtype=torch.float32) + 1
    sign = -1 if config.invert_polynomial else 1
    terms = [rank ** (sign * power) for power in range(config.polynomial_degree + 1)]
    terms += [rank.sqrt()] if config.with_sqrt_term else []
    values_TK = exact_TK
    if config.exact_k < config.k:
        coefficients_TC = torch.tensor(columns["coeffs"], dtype=torch.float32)
        values_TK = torch.cat([exact_TK, coefficients_TC @ torch.stack(terms)], dim=1)
    return ids_TK, torch.log_softmax(values_TK.double(), dim=1).float().numpy()


def _polynomial(terms: list[Any], number: int, coefficients_TC: Tensor, normalize: bool) -> Tensor:
    """Values at the ranks 0 to number - 1, or at equal steps from 0 to 1."""
    dtype = coefficients_TC.dtype
    rank = torch.linspace(0, 1, steps=number, dtype=dtype) if normalize else torch.arange(number, dtype=dtype)
    named: dict[str, Callable[[Tensor], Tensor]] = {"sqrt": torch.sqrt, "exp": torch.exp}
    values = [rank**term if isinstance(term, int) else named[term](rank) for term in terms]
    return (torch.stack(values, dim=-1)[None] * coefficients_TC[:, None, :]).sum(dim=-1)


def _dequantised(levels: Tensor, scale_T1: Tensor, bits: int) -> Tensor:
    signed = levels.float() * 2 - 1 if bits == 1 else (levels - 2 ** (bits - 1)).float()
    return signed * scale_T1


def _unpack_bits(packed_TB: np.ndarray, bits: int, number: int) -> np.ndarray:
    """`number` integers of `bits` bits each, the highest bit first, [T, number]."""
    if packed_TB.shape[1] != math.ceil(bits * number / 8):
        raise ValueError(f"{packed_TB.shape[1]} bytes do not hold {number} numbers of {bits} bits")
    bits_TNB = np.unpackbits(packed_TB, axis=1)[:, : bits * number].reshape(len(packed_TB), number, bits)
    unpacked: np.ndarray = bits_TNB @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
    return unpacked
