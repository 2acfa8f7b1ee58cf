// Products whose operands are rounded to bfloat16 and whose sums are float32's, by the tiles of AMX: 16 rows of 64 bytes, of which one instruction multiplies
// two, 16x32 numbers by 32x16, onto 16x16 sums (Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3). The names are those of
// `Whole` in product.h. Where a compiler or a processor has no AMX, `rounds()` is false and `Rounded` is `Whole`.

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

struct Rounded {
  using Number = uint16_t;
  using Buffer = std::vector<Number, Aligned<Number>>;
  static constexpr int64_t columns = 32, rows = 16, depth = 512, step = 32, tile = rows * step;  // `step` terms of a sum at a time
  static_assert(columns == Tile<float>::columns, "what lies in panels of float is packed again");
  static int64_t steps(int64_t k) { return (k + step - 1) / step; }
  static int64_t terms(int64_t k) { return steps(k) * step; }

  // The eight tiles are whole ones for as long as this is there; then they are what they were to somebody else
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

  // A (m,k) in tiles: 16 rows of all steps one after the other, zero beyond k. Rows beyond m may hold anything: nothing reads what comes of them
  struct Left {
    const Number* a;
    int64_t steps;
  };
  static Left rows_of(int64_t m, int64_t k, const float* a, int64_t lda, Buffer& buffer) {
    const int64_t all = steps(k);
    buffer.resize((m + rows - 1) / rows * all * tile);
    for (int64_t r = 0; r < m; r++, a += lda)
      for (int64_t s = 0; s < all; s++) round(std::min(step, k - s * step), a + s * step, buffer.data() + (r / rows * all + s) * tile + r % rows * step);
    return {buffer.data(), all};
  }
  static Left columns_of(int64_t m, int64_t k, const float* a, int64_t lda, Buffer& buffer) {
    const int64_t all = steps(k);
    buffer.resize((m + rows - 1) / rows * all * tile);
    for (int64_t i = 0; i < m; i += rows)
      for (int64_t s = 0; s < all; s++) {
        alignas(64) uint32_t pairs[tile / 2];
        interleave(std::min(step, k - s * step), std::min(rows, m - i), a + s * step * lda + i, lda, pairs);
        transpose(pairs, buffer.data() + (i / rows * all + s) * tile);
      }
    return {buffer.data(), all};
  }

  // A panel: of each step two tiles, in which the terms 2j and 2j + 1 of a column lie side by side. W lies row after row (column = 1), or column after column (row = 1)
  static void pack(int64_t k, int64_t n, const float* w, int64_t row, int64_t column, Number* panel) {
    for (int64_t s = 0; s < k; s += step)
      for (int64_t v = 0; v < columns; v += 16, panel += tile) {
        const float* const from = w + s * row + v * column;
        const int64_t terms = std::min(step, k - s), width = std::max<int64_t>(0, std::min<int64_t>(16, n - v));
        alignas(64) uint32_t pairs[tile / 2] = {};
        if (row == 1) {
          for (int64_t u = 0; u < width; u++) round(terms, from + u * column, reinterpret_cast<Number*>(pairs) + u * step);
          transpose(pairs, panel);
        } else {
          interleave(terms, width, from, row, pairs);
          std::memcpy(panel, pairs, sizeof pairs);
        }
      }
  }
  static const Number* repack(int64_t k, const float* w, Buffer& buffer) {
    buffer.resize(columns * terms(k));
    pack(k, columns, w, columns, 1, buffer.data());
    return buffer.data();
  }

  static void multiply(int64_t m, int64_t n, const Left& left, const Number* panels, int64_t stride, bool add, float* c, int64_t ldc) {
    asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
    const int64_t piece = m > 2 * rows ? 8 : left.steps;  // steps of a panel that stay in the first cache for all rows
    for (int64_t v = 0; v < n; v += columns, panels += stride)
      for (int64_t s = 0; s < left.steps; s += piece) {
        const int64_t count = std::min(piece, left.steps - s);
        for (int64_t r = 0; r < m; r += 2 * rows)
          block(std::min(2 * rows, m - r), std::min(columns, n - v), count, left.a + (r / rows * left.steps + s) * tile, left.steps * tile, panels + 2 * s * tile, add || s,
                c + r * ldc + v, ldc);
      }
  }

 private:
  // n <= step numbers -> step, zero from n on
  static void round(int64_t n, const float* from, Number* to) {
    const auto there = [&](int64_t first) { return __mmask16(n >= first + 16 ? 0xffff : n > first ? (1u << (n - first)) - 1 : 0); };
    const auto rounded = _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(there(16), from + 16), _mm512_maskz_loadu_ps(there(0), from));
    std::memcpy(to, &rounded, sizeof rounded);
  }
  // terms <= step rows of `width` <= 16 numbers -> 16 pairs of rows, zero beyond
  static void interleave(int64_t terms, int64_t width, const float* from, int64_t row, uint32_t* pairs) {
    const auto load = [&](int64_t u) { return u < terms ? _mm512_maskz_loadu_ps(__mmask16((1u << width) - 1), from + u * row) : _mm512_setzero_ps(); };
    for (int64_t u = 0; u < step; u += 2, pairs += 16) {
      const auto even = _mm512_cvtneps_pbh(load(u)), odd = _mm512_cvtneps_pbh(load(u + 1));
      __m256i low, high;
      std::memcpy(&low, &even, sizeof low), std::memcpy(&high, &odd, sizeof high);
      const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      std::memcpy(pairs, &both, sizeof both);
    }
  }
  // 16x16 pairs
  static void transpose(const uint32_t* pairs, Number* to) {
    uint32_t turned[tile / 2];
    for (int64_t i = 0; i < 16; i++)
      for (int64_t j = 0; j < 16; j++) turned[i * 16 + j] = pairs[j * 16 + i];
    std::memcpy(to, turned, sizeof turned);
  }

  // `high` rows and `wide` columns of C, at most 32 each; the lower half of A's rows lies `below` the upper one. A number of C is the same wherever its row lies.
  static void block(int64_t high, int64_t wide, int64_t steps, const Number* a, int64_t below, const Number* panel, bool add, float* c, int64_t ldc) {
    if (high % rows == 0 && wide == columns) return high > rows ? whole<2>(steps, a, below, panel, add, c, ldc) : whole<1>(steps, a, below, panel, add, c, ldc);
    alignas(64) float sums[2 * rows * columns];
    for (int64_t r = 0; r < high && add; r++) std::copy_n(c + r * ldc, wide, sums + r * columns);  // what is added to comes first here too
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
    for (int64_t s = 0; s < steps; s++, a += tile, panel += 2 * tile) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, panel, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, panel + tile, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (R > 1) {
        _tile_loadd(5, a + below, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
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

#else

inline bool rounds() { return false; }
using Rounded = Whole<float>;

#endif
