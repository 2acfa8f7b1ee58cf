// What an edge does to n units of one row of the batch, forward and backward; the formulas stand at the head of cells.cpp.

#pragma once

#include <cstdint>

#include "elementary.h"

#define ALONE __attribute__((noinline))  // inlined among a caller's loops, the functions' constants would not all stay in registers

namespace {

enum Op : int64_t { TANH, RELU, SIGMOID, IDENTITY, MIX };

template <class T> struct Mix { T tanh, relu, sigmoid, identity, P; };

// The range of an edge's functions: narrower than exp's but for the sigmoid, because a mixture multiplies exponentials
template <class T, int64_t OP> ALWAYS_INLINE Range<T> argument() {
  return OP == SIGMOID ? exp_range<T>() : both_range<T>();
}

// M = Σ p_k f_k(z) and, in `slope`, Σ p_k f_k'(z)
template <class T, int64_t OP> ALWAYS_INLINE T mixture(T z, const Mix<T>& p, const Range<T>& range, T& slope, T& t, T& s) {
  if constexpr (OP == MIX) {
    tanh_sigmoid(range(z), t, s);
    slope = p.tanh * (T(1) - t * t) + p.sigmoid * s * (T(1) - s) + p.identity + (z > T(0) ? p.relu : T(0));
    return p.tanh * t + p.sigmoid * s + p.identity * z + p.relu * (z < T(0) ? T(0) : z);
  } else if constexpr (OP == TANH) {
    t = tanh_(range(z)), slope = T(1) - t * t;
    return t;
  } else if constexpr (OP == SIGMOID) {
    s = gate(range(z)), slope = s * (T(1) - s);
    return s;
  } else if constexpr (OP == RELU) {
    slope = z > T(0) ? T(1) : T(0);
    return z < T(0) ? T(0) : z;
  } else {
    slope = T(1);
    return z;
  }
}

// The number of units of a row that fill whole registers. With masks (AVX-512) the others are one more register. A compiler would take them in pieces and
// one by one: the last 12 of 300 took as long as 64.
#if defined(__AVX512F__)
template <class T> constexpr int64_t LANES = 64 / sizeof(T);
template <class T> constexpr T lane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
template <class T> constexpr int64_t LANES = 1;
template <class T> constexpr T lane[] = {0};
#endif
template <class T> ALWAYS_INLINE int64_t whole_registers(int64_t n) { return n / LANES<T> * LANES<T>; }

// r += P s + σ(c)(M − P s) on n units; c becomes σ(c)
template <class T, int64_t OP>
ALONE void edge_forward(int64_t n, T* __restrict c, const T* __restrict z, const T* __restrict s, Mix<T> p, T* __restrict r) {
  const Range<T> range = argument<T, OP>(), gates = exp_range<T>();
  const auto open = [&](int64_t u) INLINED { c[u] = gate(gates(c[u])); };
  const auto add = [&](int64_t u) INLINED {
    T slope, t, g;
    const T m = mixture<T, OP>(z[u], p, range, slope, t, g), carried = p.P * s[u];
    r[u] += carried + c[u] * (m - carried);
  };
  const int64_t whole = whole_registers<T>(n);
#pragma omp simd
  for (int64_t u = 0; u < whole; u++) open(u);  // in a loop of its own: the processor then has more numbers in flight
#pragma omp simd
  for (int64_t u = 0; u < whole; u++) add(u);
  if (whole == n) return;
#pragma omp simd
  for (int64_t u = 0; u < LANES<T>; u++)
    if (lane<T>[u] < T(n - whole)) open(whole + u), add(whole + u);
}

// Calls `unit(u, stay, st, sr, ss, si)` for n units, and adds their terms to the five sums
template <class T, class F> ALWAYS_INLINE void add_up(int64_t n, const F& unit, double* sums) {
  T stay = 0, st = 0, sr = 0, ss = 0, si = 0;
  const int64_t whole = whole_registers<T>(n);
#pragma omp simd reduction(+ : stay, st, sr, ss, si)
  for (int64_t u = 0; u < whole; u++) unit(u, stay, st, sr, ss, si);
  if (whole < n)
#pragma omp simd reduction(+ : stay, st, sr, ss, si)
    for (int64_t u = 0; u < LANES<T>; u++)
      if (lane<T>[u] < T(n - whole)) unit(whole + u, stay, st, sr, ss, si);
  if (sums) sums[0] += stay, sums[1] += st, sums[2] += sr, sums[3] += ss, sums[4] += si;
}

// Overwrites σ(c), z with dc, dz; ds += dr P (1 − σ); with PROB also adds to the sums for dp
template <class T, int64_t OP, bool PROB>
ALONE void edge_backward(int64_t n, T* __restrict c, T* __restrict z, const T* __restrict s, const T* __restrict dr, Mix<T> p,
                         T* __restrict ds, double* sums) {
  const Range<T> range = argument<T, OP>();
  add_up<T>(n, [&](int64_t u, T& stay, T& st, T& sr, T& ss, T& si) INLINED {
    T slope, t, g;
    const T m = mixture<T, OP>(z[u], p, range, slope, t, g), carried = p.P * s[u], open = c[u];
    const T moved = dr[u] * open, left = dr[u] * (T(1) - open);
    if constexpr (PROB) {
      stay += left * s[u];
      st += moved * t;
      sr += moved * (z[u] < T(0) ? T(0) : z[u]);
      ss += moved * g;
      si += moved * z[u];
    }
    ds[u] += p.P * left;
    c[u] = left * open * (m - carried);
    z[u] = moved * slope;
  }, PROB ? sums : nullptr);
}

// Only the sums for dp of edge_backward; `OPEN`: c holds σ(c) already
template <class T, bool OPEN> ALONE void edge_sums(int64_t n, const T* __restrict c, const T* __restrict z, const T* __restrict s, const T* __restrict dr, double* sums) {
  const Range<T> range = argument<T, MIX>(), gates = exp_range<T>();
  add_up<T>(n, [&](int64_t u, T& stay, T& st, T& sr, T& ss, T& si) INLINED {
    T t, g;
    tanh_sigmoid(range(z[u]), t, g);
    const T open = OPEN ? c[u] : gate(gates(c[u])), moved = dr[u] * open;
    stay += dr[u] * (T(1) - open) * s[u];
    st += moved * t;
    sr += moved * (z[u] < T(0) ? T(0) : z[u]);
    ss += moved * g;
    si += moved * z[u];
  }, sums);
}

}  // namespace
