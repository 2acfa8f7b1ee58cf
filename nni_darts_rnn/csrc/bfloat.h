// Products whose operands are sums of bfloat16 numbers, added up in float32, by the tiles of AMX. A tile has 16 rows of 64 bytes. One instruction multiplies
// two tiles, 16x32 numbers by 32x16, and adds to 16x16 sums (Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3).
// One number for an operand rounds it to bfloat16. With two, x = x1 + x2, a product is a1 b1 + a1 b2 + a2 b1, good to 16 bits of its operands. Three numbers,
// in six products, have float32's 24 bits (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations"). Numbers below 2^-126 count as zero. With two or three numbers an infinite operand gives nan.
// The names are those of `Whole` in product.h. Where a compiler or a processor has no AMX, `rounds()` is false and only `Whole` exists.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Linux gives a process the tiles' registers when it asks for them
inline bool rounds() {
  constexpr long ask = 0x1023, tiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, ask, tiles) == 0;
  return granted;
}

// `Parts` numbers for each operand
template <int Parts> struct Tiles {
  using Number = uint16_t;
  using Buffer = std::vector<Number, Aligned<Number>>;
  static constexpr int64_t columns = 32, narrowest = 32, rows = 16, depth = 512, step = 32, tile = rows * step;  // `step` terms of a sum at a time
  static constexpr int64_t group = Parts * tile;  // numbers in the tiles of all parts
  static_assert(columns == Tile<float>::columns, "what lies in panels of float is packed again");
  static int64_t steps(int64_t k) { return (k + step - 1) / step; }
  static int64_t terms(int64_t k) { return steps(k) * step * Parts; }

  // While this object lives, the eight tiles have their full size; afterwards they are configured as they were before
  class Ready {
    struct alignas(64) Shapes {
      uint8_t palette = 0, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    };
    Shapes before;

   public:
    Ready() {
      Shapes mine;
      mine.palette = 1;
      for (int i = 0; i < 8; i++) mine.bytes[i] = 64, mine.rows[i] = 16;
      asm volatile("sttilecfg %0" : "=m"(before));
      asm volatile("ldtilecfg %0" ::"m"(mine));
    }
    ~Ready() { asm volatile("ldtilecfg %0" ::"m"(before)); }
    Ready(const Ready&) = delete;
  };

  // A (m,k) in tiles: 16 rows of all steps one after the other, zero beyond k. Rows beyond m may hold anything: nothing reads their results
  struct Left {
    const Number* a;
    int64_t steps;
  };
  static Left rows_of(int64_t m, int64_t k, const float* a, int64_t lda, Buffer& buffer) {
    const int64_t all = steps(k);
    buffer.resize((m + rows - 1) / rows * all * group);
    for (int64_t r = 0; r < m; r++, a += lda)
      for (int64_t s = 0; s < all; s++) round(std::min(step, k - s * step), a + s * step, buffer.data() + (r / rows * all + s) * group + r % rows * step, tile);
    return {buffer.data(), all};
  }
  static Left columns_of(int64_t m, int64_t k, const float* a, int64_t lda, Buffer& buffer) {
    const int64_t all = steps(k);
    buffer.resize((m + rows - 1) / rows * all * group);
    for (int64_t i = 0; i < m; i += rows)
      for (int64_t s = 0; s < all; s++) {
        alignas(64) Number terms_first[group];
        interleave(std::min(step, k - s * step), std::min(rows, m - i), a + s * step * lda + i, lda, terms_first, tile);
        for (int p = 0; p < Parts; p++) transpose(terms_first + p * tile, buffer.data() + (i / rows * all + s) * group + p * tile);
      }
    return {buffer.data(), all};
  }

  // A panel: for each step and part two tiles, in which the terms 2j and 2j + 1 of a column lie side by side. W lies row after row (column = 1), or column
  // after column (row = 1)
  static void pack(int64_t k, int64_t n, const float* w, int64_t row, int64_t column, Number* panel) {
    for (int64_t s = 0; s < k; s += step, panel += 2 * group)
      for (int64_t v = 0; v < columns; v += 16) {
        const float* const from = w + s * row + v * column;
        const int64_t terms = std::min(step, k - s), width = std::max<int64_t>(0, std::min<int64_t>(16, n - v));
        Number* const to = panel + v / 16 * tile;
        if (row != 1) {
          interleave(terms, width, from, row, to, 2 * tile);
          continue;
        }
        alignas(64) Number columns_first[group];
        if (width < 16) std::fill_n(columns_first, group, Number(0));
        for (int64_t u = 0; u < width; u++) round(terms, from + u * column, columns_first + u * step, tile);
        for (int p = 0; p < Parts; p++) transpose(columns_first + p * tile, to + 2 * p * tile);
      }
  }
  static const Number* repack(int64_t k, const float* w, Buffer& buffer) {
    buffer.resize(columns * terms(k));
    pack(k, columns, w, columns, 1, buffer.data());
    return buffer.data();
  }

  static void multiply(int64_t m, int64_t n, const Left& left, const Number* panels, int64_t stride, bool add, float* c, int64_t ldc) {
    asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
    for (int64_t v = 0; v < n; v += columns, panels += stride)
      for (int64_t r = 0; r < m; r += 2 * rows)
        block(std::min(2 * rows, m - r), std::min(columns, n - v), left.steps, left.a + r / rows * left.steps * group, left.steps * group, panels, add, c + r * ldc + v, ldc);
  }

 private:
  // Rounds n <= step numbers to `step` numbers of each part, zero from n on; one part lies `apart` numbers after the other
  static void round(int64_t n, const float* from, Number* to, int64_t apart) {
    const auto there = [&](int64_t first) { return __mmask16(n >= first + 16 ? 0xffff : n > first ? (1u << (n - first)) - 1 : 0); };
    __m512 high = _mm512_maskz_loadu_ps(there(16), from + 16), low = _mm512_maskz_loadu_ps(there(0), from);
    for (int p = 0; p < Parts; p++, to += apart) {
      const __m512i rounded = both_halves(high, low);
      __builtin_memcpy(to, &rounded, sizeof rounded);
      if (p + 1 == Parts) break;
      low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded)), 16)));
      high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1)), 16)));
    }
  }
  // Rounds terms <= step rows of `width` <= 16 numbers to 16 pairs of rows of each part, zero beyond
  static void interleave(int64_t terms, int64_t width, const float* from, int64_t row, Number* to, int64_t apart) {
    const auto load = [&](int64_t u) { return u < terms ? _mm512_maskz_loadu_ps(__mmask16((1u << width) - 1), from + u * row) : _mm512_setzero_ps(); };
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000)), turns = _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                                                                       _mm512_slli_epi32(_mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16), 16));
    for (int64_t u = 0; u < step; u += 2, to += step) {
      __m512 even = load(u), odd = load(u + 1);
      for (int p = 0; p < Parts; p++) {
        const __m512i pairs = _mm512_permutexvar_epi16(turns, both_halves(odd, even));
        __builtin_memcpy(to + p * apart, &pairs, sizeof pairs);
        if (p + 1 == Parts) break;
        even = _mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
        odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(pairs, upper)));
      }
    }
  }
  static __m512i both_halves(__m512 high, __m512 low) {
    const auto rounded = _mm512_cvtne2ps_pbh(high, low);
    __m512i bits;
    __builtin_memcpy(&bits, &rounded, sizeof bits);
    return bits;
  }
  // Transposes 16x16 pairs
  static void transpose(const Number* from, Number* to) {
    uint32_t pairs[tile / 2], turned[tile / 2];
    std::memcpy(pairs, from, sizeof pairs);
    for (int64_t i = 0; i < 16; i++)
      for (int64_t j = 0; j < 16; j++) turned[i * 16 + j] = pairs[j * 16 + i];
    std::memcpy(to, turned, sizeof turned);
  }

  // `high` rows and `wide` columns of C, at most 32 each. The lower half of A's rows lies `below` numbers after the upper one. A number of C comes out the same
  // wherever its row lies.
  static void block(int64_t high, int64_t wide, int64_t steps, const Number* a, int64_t below, const Number* panel, bool add, float* c, int64_t ldc) {
    if (high % rows == 0 && wide == columns) return high > rows ? whole<2>(steps, a, below, panel, add, c, ldc) : whole<1>(steps, a, below, panel, add, c, ldc);
    alignas(64) float sums[2 * rows * columns];
    for (int64_t r = 0; r < high && add; r++) std::copy_n(c + r * ldc, wide, sums + r * columns);  // as in `whole`, the sums start from what they are added to
    high > rows ? whole<2>(steps, a, below, panel, add, sums, columns) : whole<1>(steps, a, below, panel, add, sums, columns);
    narrow<float>(high, wide, sums, false, c, ldc);
  }

  // 16 R rows and 32 columns of C
  template <int R> static void whole(int64_t steps, const Number* a, int64_t below, const Number* panel, bool add, float* c, int64_t ldc) {
    const int64_t bytes = ldc * int64_t(sizeof(float));
    if (add) {
      _tile_loadd(0, c, bytes);
      _tile_loadd(1, c + 16, bytes);
      if constexpr (R > 1) {
        _tile_loadd(2, c + rows * ldc, bytes);
        _tile_loadd(3, c + rows * ldc + 16, bytes);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const auto left = [&](int p) {
      _tile_loadd(4, a + p * tile, 64);
      if constexpr (R > 1) _tile_loadd(5, a + below + p * tile, 64);
    };
    const auto right = [&](int p) {
      _tile_loadd(6, panel + 2 * p * tile, 64);
      _tile_loadd(7, panel + (2 * p + 1) * tile, 64);
    };
    const auto product = [] {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (R > 1) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    };
    for (int64_t s = 0; s < steps; s++, a += group, panel += 2 * group) {
      right(0);
      for (int p = Parts - 1; p > 0; p--) {  // (Parts − 1, 0), (Parts − 2, 0), (Parts − 2, 1), (Parts − 3, 1) …: each product loads one new operand
        left(p), product();
        if (p < Parts - 1) right(Parts - 1 - p), product();
      }
      left(0), product();
      if constexpr (Parts > 1) right(Parts - 1), product();
      if constexpr (Parts > 2) right(0), product();
    }
    _tile_stored(0, c, bytes);
    _tile_stored(1, c + 16, bytes);
    if constexpr (R > 1) {
      _tile_stored(2, c + rows * ldc, bytes);
      _tile_stored(3, c + rows * ldc + 16, bytes);
    }
    asm volatile("" ::: "memory");
  }
};

// Calls f(product) with the products of `parts` numbers for each operand; 0: operands as they are
template <class F> void with_parts(int64_t parts, F f) {
  switch (parts) {
    case 1: return f(Tiles<1>{});
    case 2: return f(Tiles<2>{});
    case 3: return f(Tiles<3>{});
    default: f(Whole<float>{});
  }
}

#else

inline bool rounds() { return false; }
template <class F> void with_parts(int64_t, F f) { f(Whole<float>{}); }

#endif
