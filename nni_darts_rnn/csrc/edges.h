// What an edge does to n units of one row of the batch, forward and backward; the formulas stand at the head of cells.cpp.

#pragma once

#include <cstdint>

#include "elementary.h"

namespace {

enum Op : int64_t { TANH, RELU, SIGMOID, IDENTITY, MIX };

template <class T> struct Mix { T tanh, relu, sigmoid, identity, P; };

// Where the functions of an edge are taken: the exponentials of a mixture are multiplied
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

// r += P s + σ(c)(M − P s) on n units; c becomes σ(c)
template <class T, int64_t OP>
void edge_forward(int64_t n, T* __restrict c, const T* __restrict z, const T* __restrict s, Mix<T> p, T* __restrict r) {
  const Range<T> range = argument<T, OP>(), gates = exp_range<T>();
#pragma omp simd
  for (int64_t u = 0; u < n; u++) c[u] = gate(gates(c[u]));  // apart from what follows: the processor then has more numbers under way
#pragma omp simd
  for (int64_t u = 0; u < n; u++) {
    T slope, t, g;
    const T m = mixture<T, OP>(z[u], p, range, slope, t, g), carried = p.P * s[u];
    r[u] += carried + c[u] * (m - carried);
  }
}

// σ(c), z -> dc, dz; ds += dr P (1 − σ); with PROB the sums for dp
template <class T, int64_t OP, bool PROB>
void edge_backward(int64_t n, T* __restrict c, T* __restrict z, const T* __restrict s, const T* __restrict dr, Mix<T> p,
                   T* __restrict ds, double* sums) {
  const Range<T> range = argument<T, OP>();
  T stay = 0, st = 0, sr = 0, ss = 0, si = 0;
#pragma omp simd reduction(+ : stay, st, sr, ss, si)
  for (int64_t u = 0; u < n; u++) {
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
  }
  if constexpr (PROB) sums[0] += stay, sums[1] += st, sums[2] += sr, sums[3] += ss, sums[4] += si;
}

// edge_backward's sums for dp alone; `OPEN`: σ(c) is in c's place already
template <class T, bool OPEN> void edge_sums(int64_t n, const T* __restrict c, const T* __restrict z, const T* __restrict s, const T* __restrict dr, double* sums) {
  const Range<T> range = argument<T, MIX>(), gates = exp_range<T>();
  T stay = 0, st = 0, sr = 0, ss = 0, si = 0;
#pragma omp simd reduction(+ : stay, st, sr, ss, si)
  for (int64_t u = 0; u < n; u++) {
    T t, g;
    tanh_sigmoid(range(z[u]), t, g);
    const T open = OPEN ? c[u] : gate(gates(c[u])), moved = dr[u] * open;
    stay += dr[u] * (T(1) - open) * s[u];
    st += moved * t;
    sr += moved * (z[u] < T(0) ? T(0) : z[u]);
    ss += moved * g;
    si += moved * z[u];
  }
  sums[0] += stay, sums[1] += st, sums[2] += sr, sums[3] += ss, sums[4] += si;
}

}  // namespace
