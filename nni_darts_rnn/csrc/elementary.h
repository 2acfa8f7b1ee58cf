// exp, tanh and the logistic function to the last digits of float or double, without branches or calls, so that loops over them vectorise.

#pragma once

#include <cstdint>
#include <type_traits>

template <class T> struct Limits;
template <> struct Limits<float> {
  using Int = int32_t;
  static constexpr float low = -87.f, gate = -87.f, both = -29.f;  // below these exp, σ and (σ, tanh) are taken at them: no overflow
  static constexpr int degree = 7, bias = 127, shift = 23;         // of the Taylor polynomial on |r| <= ln2/2; of the number format
};
template <> struct Limits<double> {
  using Int = int64_t;
  static constexpr double low = -708., gate = -700., both = -230.;
  static constexpr int degree = 13, bias = 1023, shift = 52;
};

#define ALWAYS_INLINE inline __attribute__((always_inline))  // or loops over these are not vectorised

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

template <class T, int k> ALWAYS_INLINE T taylor(T r) {
  if constexpr (k == Limits<T>::degree) return T(inverse_factorial(k));
  else return T(inverse_factorial(k)) + r * taylor<T, k + 1>(r);
}

// x = n ln2 + r with |r| <= ln2/2 -> r, and 2^n in `scale`; branch-free so that loops over it vectorise. NaN stays NaN. x must not overflow exp.
template <class T> ALWAYS_INLINE T reduce(T x, T& scale) {
  using L = Limits<T>;
  x = x < L::low ? L::low : x;
  const T n = __builtin_rint(x * T(1.4426950408889634074));
  const T high = std::is_same<T, float>::value ? T(0.693359375) : T(6.93145751953125e-1);
  const T rest = std::is_same<T, float>::value ? T(-2.12194440054690581e-4) : T(1.42860682030941723e-6);
  typename L::Int bits = (typename L::Int(int32_t(n)) + L::bias) << L::shift;
  __builtin_memcpy(&scale, &bits, sizeof scale);
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

template <class T> ALWAYS_INLINE T gate(T c) {
  c = c < Limits<T>::gate ? Limits<T>::gate : c;
  return T(1) / (T(1) + exp_<T>(-c));
}

// tanh and sigmoid from one exp and one division: with e = exp(−z), σ = 1/(1+e) and tanh = (1−e)(1+e)/(1+e²), where 1−e must not cancel near 0
template <class T> ALWAYS_INLINE void tanh_sigmoid(T z, T& t, T& s) {
  z = z < Limits<T>::both ? Limits<T>::both : z;
  const T m = expm1_<T>(-z), up = T(2) + m, e = T(1) + m, both = T(1) + e * e, q = T(1) / (up * both);  // up = 1 + e
  s = q * both;
  t = -m * up * up * q;
}

template <class T> ALWAYS_INLINE T tanh_(T z) {
  z = z < Limits<T>::both ? Limits<T>::both : z;
  const T m = expm1_<T>(T(-2) * z);
  return -m / (T(2) + m);
}
