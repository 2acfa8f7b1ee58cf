// exp, tanh and the logistic function to the last digits of float or double, without branches or calls, so that loops over them vectorise.

#pragma once

#include <cstdint>
#include <type_traits>

#define INLINED __attribute__((always_inline))  // otherwise loops over these are not vectorised
#define ALWAYS_INLINE inline INLINED

template <class T> struct Format;
template <> struct Format<float> {
  using Bits = uint32_t;
  static constexpr int degree = 7, bias = 127, shift = 23;  // of the Taylor polynomial on |r| <= ln2/2; of the number format
  static constexpr float low = -87.f, both = -29.f;         // ends of the arguments' ranges, against overflow: for exp and σ, and for the product in tanh_sigmoid
};
template <> struct Format<double> {
  using Bits = uint64_t;
  static constexpr int degree = 13, bias = 1023, shift = 52;
  static constexpr double low = -700., both = -230.;
};

// An argument's range, made before a loop. Its ends are hidden from the compiler. GCC 12 would otherwise carry them through the arithmetic as constants, in
// many instructions, where a minimum and a maximum are enough.
template <class T> class Range {
  T low, high;

 public:
  Range(T from, T to) : low(from), high(to) { asm("" : "+m"(low), "+m"(high)); }
  ALWAYS_INLINE T operator()(T x) const {  // NaN stays NaN
    x = low > x ? low : x;
    return x > high ? high : x;
  }
};
template <class T> ALWAYS_INLINE Range<T> exp_range() { return {Format<T>::low, -Format<T>::low}; }
template <class T> ALWAYS_INLINE Range<T> both_range() { return {Format<T>::both, -Format<T>::both}; }

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

template <class T, int k> ALWAYS_INLINE T taylor(T r) {
  constexpr T term = T(inverse_factorial(k));  // constexpr, or clang computes it anew for every number
  if constexpr (k == Format<T>::degree) return term;
  else return term + r * taylor<T, k + 1>(r);
}

// Returns r, where x = n ln2 + r with |r| <= ln2/2, and 2^n in `scale`. Branch-free, so that loops over it vectorise. NaN stays NaN. x must be in range.
template <class T> ALWAYS_INLINE T reduce(T x, T& scale) {
  using F = Format<T>;
  constexpr T whole = T(int64_t(3) << (F::shift - 1));  // 1.5 · 2^shift: a number added to it is rounded to a whole one, which the lowest bits then hold
  const T sum = x * T(1.4426950408889634074) + whole, n = sum - whole;
  typename F::Bits bits;
  __builtin_memcpy(&bits, &sum, sizeof bits);
  bits = (bits + F::bias) << F::shift;
  __builtin_memcpy(&scale, &bits, sizeof scale);
#ifdef __FP_FAST_FMAF
  if constexpr (std::is_same<T, float>::value) return __builtin_fmaf(n, T(-0.6931471805599453), x);  // float's ln2 is off by 2e-9, the result by n times that, which changes no digit up to |x| = 20
#endif
  const T high = std::is_same<T, float>::value ? T(0.693359375) : T(6.93145751953125e-1);
  const T rest = std::is_same<T, float>::value ? T(-2.12194440054690581e-4) : T(1.42860682030941723e-6);
  return (x - n * high) - n * rest;
}

template <class T> ALWAYS_INLINE T exp_(T x) {
  T scale;
  const T r = reduce(x, scale);
  return taylor<T, 0>(r) * scale;
}

// exp(x) − 1, with all its digits near 0 too
template <class T> ALWAYS_INLINE T expm1_(T x) {
  T scale;
  const T r = reduce(x, scale);
  return taylor<T, 1>(r) * r * scale + (scale - T(1));
}

// σ(c) for c in exp_range
template <class T> ALWAYS_INLINE T gate(T c) { return T(1) / (T(1) + exp_<T>(-c)); }

// tanh and σ of z in both_range, from one exp and one division: with e = exp(−z), σ = 1/(1+e) and tanh = (1−e)(1+e)/(1+e²), where 1−e must not cancel near 0
template <class T> ALWAYS_INLINE void tanh_sigmoid(T z, T& t, T& s) {
  const T m = expm1_<T>(-z), up = T(2) + m, e = T(1) + m, both = T(1) + e * e, q = T(1) / (up * both);  // up = 1 + e
  s = q * both;
  t = -m * up * up * q;
}

// tanh z for z in both_range
template <class T> ALWAYS_INLINE T tanh_(T z) {
  const T m = expm1_<T>(T(-2) * z);
  return -m / (T(2) + m);
}
