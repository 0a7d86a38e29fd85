"""Mutants of the CUDA kernels that no test notices, and why none could.

Of a program that is named here ``make gates`` fails for a survivor that is not. Program -> what the mutant changes (as mutate.py words it) -> why the kernel is as right with it.
"""

_SPREAD = "another permutation of a row's chunks, by which both sides go: only banks change"

WHY = {
    "quantize": {},
    "norm": {},
    "attention": {
        "2 + 1 in: const int turn = kRowBytes == 32 ? row >> 2 & 1 : kRowBytes == 64 ? row >> 1 & 3 : row & 7;": _SPREAD,
        "1 + 1 in: const int turn = kRowBytes == 32 ? row >> 2 & 1 : kRowBytes == 64 ? row >> 1 & 3 : row & 7;": _SPREAD,
        "0 + 1 in: return v < 0 ? 0 : v > most ? static_cast<int>(most) : v;": "0 becomes 0 either way",
        "0 + 1 in: place.rows = span_of(cu, 0, total), place.blocks = blocks_of(place.rows.count);": (
            "without cu every sequence is as long"
        ),
        "0 + 1 in: return {page < 0 || page >= w.pages ? 0 : page, key % size};": "page 0 is page 0 either way",
        "0 + 1 in: const int bytes = left > 0 ? 16 : 0;": "aligned rows end with a whole chunk: one value is never left",
        "2 + 1 in: return combine(v, ptx::shuffle_xor(v, 2));": "lanes 1 apart already hold the same: 3 apart is 2 apart",
        "0 + 1 in: if (row >= w.item.rows || (column >= a.v_depth && column > 0)) continue;": "columns are multiples of 8",
    },
    "linear_int8": {
        "1 + 1 in: return (chunk ^ (row >> 1 & 3)) * kChunk;": _SPREAD,
        "2 + 1 in: sum = sum + ptx::shuffle_xor(sum, 2);": "lanes 1 apart already hold the same: 3 apart is 2 apart",
    },
    "conv2d_int8": {
        "1 + 1 in: return (chunk ^ (row >> 1 & 3)) * kChunk;": _SPREAD,
        "0 + 1 in: const int exist = left <= 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;": (
            "packed rows are multiples of 16, so one byte is never left"
        ),
        "1 + 1 in: const int steps = static_cast<int>((packed.row + kStep - 1) / kStep);": (
            "packed rows are multiples of 16: rounded up the same"
        ),
    },
    "linear_grouped": {
        "0 + 1 in: const uint32_t bits = shift >= 0 ? word << shift : word >> -shift;": "a shift by 0 either way",
        "2 + 1 in: return kBits == 4 ? chunk ^ (row >> 2 & 1) : chunk ^ (row >> 1 & 1) << 1;": _SPREAD,
        "1 + 1 in: return kBits == 4 ? chunk ^ (row >> 2 & 1) : chunk ^ (row >> 1 & 1) << 1;": _SPREAD,
        "0 + 1 in: exists ? kChunk : 0);": (
            "a stray byte where nothing exists: rows that are not stored, or values behind the last group, whose sums "
            "are never taken up"
        ),
        "1 + 1 in: const int64_t steps = (k1 - k0 + kStep - 1) / kStep;": "K is a multiple of 32: rounded up the same",
    },
}
