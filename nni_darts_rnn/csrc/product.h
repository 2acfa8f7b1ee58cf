// Products with matrices that are packed once and used at every time step: C (m,n) = [C +] A (m,k) W (k,n).
//
// A BLAS copies W into an order of its own at every call, which is a tenth of the time and more where m is a small batch. Here W is cut into panels
// of `columns` columns, each stored row after row; a tile of `rows` x `columns` numbers of C stays in registers while a panel passes through it (Goto and
// van de Geijn 2008, "Anatomy of high-performance matrix multiplication", figure 8: the packed operand in cache, the tile in registers). A is read where it is,
// a number at a time, so it may lie in any order. The sum over k runs in one order whatever m, n and the number of threads are.

#pragma once

#include <algorithm>
#include <cstdint>

constexpr int64_t DEPTH = 256;  // terms of a long sum at a time: a panel of as many rows fits the first cache

template <class T> struct Tile {
#if defined(__AVX512F__)
  static constexpr int bytes = 64, rows = 12;  // 24 of 32 registers hold the tile
#else
  static constexpr int bytes = 32, rows = 6;   // 12 of 16
#endif
  static constexpr int lanes = bytes / int(sizeof(T)), columns = 2 * lanes;
  typedef T Vector __attribute__((vector_size(bytes)));
  static_assert(columns <= 32, "fused.py allots panels of at most 32 columns");

  static int64_t panels(int64_t n) { return (n + columns - 1) / columns; }
  static int64_t packed(int64_t k, int64_t n) { return panels(n) * columns * k; }  // numbers
};

template <class T> inline typename Tile<T>::Vector load(const T* from) {
  typename Tile<T>::Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// A panel (k, columns) from W, whose element (u, v) is w[u * row + v * column]; columns from n on are zero
template <class T> void pack(int64_t k, int64_t n, const T* w, int64_t row, int64_t column, T* panel) {
  constexpr int64_t C = Tile<T>::columns;
  for (int64_t u = 0; u < k; u++, w += row, panel += C)
    if (n >= C && column == 1) __builtin_memcpy(panel, w, C * sizeof(T));
    else
      for (int64_t v = 0; v < C; v++) panel[v] = v < n ? w[v * column] : T(0);
}

// The sums of a tile, of n < columns columns, to or onto C
template <class T> void narrow(int64_t rows, int64_t n, const T* sums, bool add, T* c, int64_t ldc) {
  for (int64_t r = 0; r < rows; r++, c += ldc, sums += Tile<T>::columns)
    for (int64_t v = 0; v < n; v++) c[v] = add ? c[v] + sums[v] : sums[v];
}

// R rows of C, the n <= columns of one panel; A's element (r, u) is a[r * row + u * step]
template <class T, int R>
void tile(int64_t n, int64_t k, const T* __restrict a, int64_t row, int64_t step, const T* __restrict panel, bool add, T* __restrict c, int64_t ldc) {
  using V = typename Tile<T>::Vector;
  constexpr int L = Tile<T>::lanes, C = Tile<T>::columns;
  V left[R], right[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    left[r] = right[r] = V{};
    __builtin_prefetch(c + r * ldc, 1), __builtin_prefetch(c + r * ldc + n - 1, 1);  // C is seldom in cache
  }
  for (int64_t u = 0; u < k; u++, a += step, panel += C) {
    const V w0 = load(panel), w1 = load(panel + L);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      left[r] += a[r * row] * w0;
      right[r] += a[r * row] * w1;
    }
  }
  if (n < C) {
    T sums[R * C];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      __builtin_memcpy(sums + r * C, &left[r], sizeof(V));
      __builtin_memcpy(sums + r * C + L, &right[r], sizeof(V));
    }
    return narrow<T>(R, n, sums, add, c, ldc);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++, c += ldc) {
    if (add) left[r] += load(c), right[r] += load(c + L);
    __builtin_memcpy(c, &left[r], sizeof(V));
    __builtin_memcpy(c + L, &right[r], sizeof(V));
  }
}

// `tile` for m <= R rows
template <class T, int R = Tile<T>::rows>
void few_rows(int64_t m, int64_t n, int64_t k, const T* a, int64_t row, int64_t step, const T* panel, bool add, T* c, int64_t ldc) {
  if constexpr (R > 1)
    if (m < R) return few_rows<T, R - 1>(m, n, k, a, row, step, panel, add, c, ldc);
  tile<T, R>(n, k, a, row, step, panel, add, c, ldc);
}

// one panel: m rows in tiles of nearly the same height
template <class T>
void multiply_panel(int64_t m, int64_t n, int64_t k, const T* a, int64_t row, int64_t step, const T* panel, bool add, T* c, int64_t ldc) {
  const int64_t tiles = (m + Tile<T>::rows - 1) / Tile<T>::rows;
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t from = m * i / tiles, to = m * (i + 1) / tiles;
    few_rows<T>(to - from, n, k, a + from * row, row, step, panel, add, c + from * ldc, ldc);
  }
}

// A (m,k) in the order in which `multiply_packed` reads it, for an A whose columns are far apart; element (r, u) is a[r * row + u * step]
template <class T> void pack_left(int64_t m, int64_t k, const T* a, int64_t row, int64_t step, T* to) {
  const int64_t tiles = (m + Tile<T>::rows - 1) / Tile<T>::rows;
  for (int64_t i = 0; i < tiles; i++)
    for (int64_t u = 0; u < k; u++)
      for (int64_t r = m * i / tiles; r < m * (i + 1) / tiles; r++) *to++ = a[r * row + u * step];
}

// `multiply_panel` for A as `pack_left` leaves it
template <class T> void multiply_packed(int64_t m, int64_t n, int64_t k, const T* left, const T* panel, bool add, T* c, int64_t ldc) {
  const int64_t tiles = (m + Tile<T>::rows - 1) / Tile<T>::rows;
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t from = m * i / tiles, to = m * (i + 1) / tiles;
    few_rows<T>(to - from, n, k, left + from * k, 1, to - from, panel, add, c + from * ldc, ldc);
  }
}

// C (m,n) = [C +] A W for W in panels; A (m,k) with `lda` from row to row
template <class T> void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* panels, bool add, T* c, int64_t ldc) {
  constexpr int64_t C = Tile<T>::columns;
  for (int64_t v = 0; v < n; v += C, panels += C * k) multiply_panel<T>(m, std::min(C, n - v), k, a, lda, 1, panels, add, c + v, ldc);
}
