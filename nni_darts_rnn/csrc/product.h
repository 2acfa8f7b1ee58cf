// Products with matrices that are packed once and used at every time step: C (m,n) = [C +] A (m,k) W (k,n), in all digits; bfloat.h has those by AMX tiles.
//
// A BLAS copies W into an order of its own at every call, which takes a tenth of the time and more where m is a small batch. Here W is cut into panels
// of `columns` columns, each stored row after row. A tile of `rows` x `columns` numbers of C stays in registers while a panel passes through it (Goto and
// van de Geijn 2008, "Anatomy of high-performance matrix multiplication", figure 8: the packed operand in cache, the tile in registers). A is read in place,
// a number at a time, so it may lie in any order. The sum over k runs in the same order whatever m, n and the number of threads are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

constexpr int64_t DEPTH = 256;     // terms of a long sum at a time: a panel of as many rows fits the first cache
constexpr int64_t NEAR = 1 << 18;  // bytes: a larger matrix is assumed to have left the second cache since it was last read

template <class T> struct Tile {
#if defined(__AVX512F__)
  static constexpr int bytes = 64, rows = 12;  // 24 of 32 registers hold the tile
#elif defined(__AVX__)
  static constexpr int bytes = 32, rows = 6;   // 12 of 16
#elif defined(__aarch64__)
  static constexpr int bytes = 16, rows = 10;  // 20 of 32: GCC 12 takes ten more for the numbers of A
#else
  static constexpr int bytes = 16, rows = 6;   // 12 of 16
#endif
  static constexpr int lanes = bytes / int(sizeof(T)), columns = 2 * lanes;
  typedef T Vector __attribute__((vector_size(bytes)));
  static_assert(columns <= 32, "compiled.py allots panels of at most 32 columns");
};

template <class T> inline typename Tile<T>::Vector load(const T* from) {
  typename Tile<T>::Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// Writes the sums of a tile to C, or adds them to it: of n <= columns columns
template <class T> void narrow(int64_t rows, int64_t n, const T* sums, bool add, T* c, int64_t ldc) {
  for (int64_t r = 0; r < rows; r++, c += ldc, sums += Tile<T>::columns)
    for (int64_t v = 0; v < n; v++) c[v] = add ? c[v] + sums[v] : sums[v];
}

// R rows and n <= columns columns of C, from one panel; the columns fill W registers. A's element (r, u) is a[r * row + u * step]. Every eight terms, `lines`
// cache lines of what is multiplied next are prefetched, from `next` on: the tile reads panels faster than the third cache delivers them, and would wait
template <class T, int R, int W>
void tile(int64_t n, int64_t k, const T* __restrict a, int64_t row, int64_t step, const T* __restrict panel, bool add, T* __restrict c, int64_t ldc,
          const T* next, int64_t lines) {
  using V = typename Tile<T>::Vector;
  constexpr int L = Tile<T>::lanes, C = Tile<T>::columns;
  V sum[R][W];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < W; v++) sum[r][v] = V{};
  for (int64_t u = 0; u < k; u++, a += step, panel += C) {
    if (u % 8 == 0) {
      // C is seldom in cache. Its rows are prefetched one at a time, or the panel would wait behind all of them
      if (u / 8 < R) __builtin_prefetch(c + u / 8 * ldc, 1), __builtin_prefetch(c + u / 8 * ldc + n - 1, 1);
      for (int64_t l = 0; l < lines; l++, next += 64 / sizeof(T)) __builtin_prefetch(next, 0, 2);
    }
    V w[W];
#pragma GCC unroll 2
    for (int v = 0; v < W; v++) w[v] = load(panel + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < W; v++) sum[r][v] += a[r * row] * w[v];
  }
  if (n < W * L) {
    T sums[R * C];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < W; v++) __builtin_memcpy(sums + r * C + v * L, &sum[r][v], sizeof(V));
    return narrow<T>(R, n, sums, add, c, ldc);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++, c += ldc)
#pragma GCC unroll 2
    for (int v = 0; v < W; v++) {
      if (add) sum[r][v] += load(c + v * L);
      __builtin_memcpy(c + v * L, &sum[r][v], sizeof(V));
    }
}

// `tile` for m <= R rows
template <class T, int R = Tile<T>::rows>
void few_rows(int64_t m, int64_t n, int64_t k, const T* a, int64_t row, int64_t step, const T* panel, bool add, T* c, int64_t ldc, const T* next, int64_t lines) {
  if constexpr (R > 1)
    if (m < R) return few_rows<T, R - 1>(m, n, k, a, row, step, panel, add, c, ldc, next, lines);
  if (n > Tile<T>::lanes) tile<T, R, 2>(n, k, a, row, step, panel, add, c, ldc, next, lines);
  else tile<T, R, 1>(n, k, a, row, step, panel, add, c, ldc, next, lines);
}

// Memory that begins with a cache line: a register or a tile's row that lies across two lines is loaded at half the speed
template <class T> struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U> Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

// The layout of a product's numbers, and the product itself; `Tiles` in bfloat.h has the same names
template <class T> struct Whole {
  using Number = T;  // of what is packed
  using Buffer = std::vector<Number, Aligned<Number>>;
  struct Ready {};  // what a thread holds while it multiplies
  // `narrowest`: this many columns take no longer than their share of a panel
  static constexpr int64_t columns = Tile<T>::columns, narrowest = Tile<T>::lanes, rows = Tile<T>::rows, depth = DEPTH;
  static int64_t terms(int64_t k) { return k; }  // including what fills up the last step of a sum

  // A (m,k) as `multiply` reads it: rows `lda` apart, or, for lda = 0, in separate tiles, each stored column after column
  struct Left {
    const T* a;
    int64_t k, lda;
  };
  static Left rows_of(int64_t, int64_t k, const T* a, int64_t lda, Buffer&) { return {a, k, lda}; }
  // of A^T, where the rows of A (k,m) are `lda` apart
  static Left columns_of(int64_t m, int64_t k, const T* a, int64_t lda, Buffer& buffer) {
    buffer.resize(m * k);
    const int64_t tiles = (m + rows - 1) / rows;
    for (int64_t u = 0; u < k; u++, a += lda)  // as A lies in memory
      for (int64_t i = 0; i < tiles; i++) {
        const int64_t from = m * i / tiles, high = m * (i + 1) / tiles - from;
        T* const to = buffer.data() + from * k + u * high;
        if (high == rows) __builtin_memcpy(to, a + from, rows * sizeof(T));  // of a size that the compiler knows
        else std::copy_n(a + from, high, to);
      }
    return {buffer.data(), k, 0};
  }

  // A panel (k,columns) from W, whose element (u,v) is w[u * row + v * column]; columns from n on are zero
  static void pack(int64_t k, int64_t n, const T* w, int64_t row, int64_t column, T* panel) {
    for (int64_t u = 0; u < k; u++, w += row, panel += columns)
      if (n >= columns && column == 1) __builtin_memcpy(panel, w, columns * sizeof(T));
      else
        for (int64_t v = 0; v < columns; v++) panel[v] = v < n ? w[v * column] : T(0);
  }
  // of W (k,columns), row after row
  static const T* repack(int64_t, const T* w, Buffer&) { return w; }

  // for W in panels, `stride` numbers apart; the m rows are cut into tiles of nearly the same height
  static void multiply(int64_t m, int64_t n, const Left& left, const T* panels, int64_t stride, bool add, T* c, int64_t ldc) {
    const int64_t tiles = (m + rows - 1) / rows, bytes = columns * sizeof(T);  // of a panel's row
    const int64_t lines = left.k * n * int64_t(sizeof(T)) > NEAR ? (8 * bytes / 64 + tiles - 1) / tiles : 0;
    for (int64_t v = 0; v < n; v += columns, panels += stride)
      for (int64_t i = 0; i < tiles; i++) {
        const int64_t from = m * i / tiles, high = m * (i + 1) / tiles - from, wide = std::min(columns, n - v);
        T* const to = c + from * ldc + v;
        const T* const next = panels + stride + left.k * i / tiles * columns;  // each tile prefetches a part of the next panel
        if (left.lda) few_rows<T>(high, wide, left.k, left.a + from * left.lda, left.lda, 1, panels, add, to, ldc, next, lines);
        else few_rows<T>(high, wide, left.k, left.a + from * left.k, 1, high, panels, add, to, ldc, next, lines);
      }
  }
};

// The number of panels of a matrix (k,n), and of the numbers in them
template <class P> int64_t panels(int64_t n) { return (n + P::columns - 1) / P::columns; }
template <class P> int64_t numbers(int64_t k, int64_t n) { return panels<P>(n) * P::columns * P::terms(k); }
