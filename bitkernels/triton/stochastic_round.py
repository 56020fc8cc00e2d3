"""Stochastic rounding of float32 to 16 bits, with random bits that depend on nothing but their key and counter."""

import triton
import triton.language as tl


@triton.jit
def state_random_bits(seed, position, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """uint32 [ROWS, COLUMNS], 16 random bits each, as ``reference.state_random_bits`` has them.

    A draw of Philox serves eight neighbours in a row, which one thread holds.
    """
    group = tl.arange(0, COLUMNS // 8)[None, :] + tl.zeros([ROWS, 1], tl.int32)  # [ROWS, groups]
    row = rows[:, None] + tl.zeros([1, COLUMNS // 8], tl.int32)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros([ROWS, COLUMNS // 8], tl.uint32)
    a, b, c, d = tl.philox(seed.to(tl.uint64), group.to(tl.uint32), row.to(tl.uint32), zero + low, zero + high)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS, groups, 2, 2], the words in order
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, COLUMNS])


@triton.jit
def round_stochastically(v, bits, dtype: tl.constexpr):
    """To bfloat16 or float16: away from zero with the probability of what is cut off, infinity and NaN as they are."""
    raw = v.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = ((raw + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return tl.where((raw & 0x7F800000) == 0x7F800000, v.to(tl.bfloat16), rounded)
    else:
        magnitude = raw & 0x7FFFFFFF
        cut = bits >> 3  # 13 bits are cut off
        normal = (magnitude + cut - 0x38000000) >> 13
        # Subnormal halves are multiples of 2^-24: 13 bits beyond that as an integer, by its truncation.
        small = tl.where(magnitude < 0x38800000, tl.abs(v), 0.0)
        subnormal = ((small * 137438953472.0).to(tl.int32).to(tl.uint32) + cut) >> 13
        rounded = tl.where(magnitude < 0x38800000, subnormal, tl.minimum(normal, 0x7C00))
        rounded = (rounded | ((raw & 0x80000000) >> 16)).to(tl.uint16).to(tl.float16, bitcast=True)
        return tl.where(magnitude >= 0x47800000, v.to(tl.float16), rounded)
