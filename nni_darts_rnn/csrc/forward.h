// The forward pass over a sequence, on one thread of a team.

#pragma once

#include <algorithm>
#include <cmath>

#include "sequence.h"

namespace {

template <class T, class P> struct Forward : Sequence<T, P> {
  using Base = Sequence<T, P>;
  using typename Base::Edge;
  using Base::d, Base::team, Base::thread, Base::S, Base::B, Base::H, Base::N, Base::BH, Base::lo, Base::n, Base::begin, Base::units, Base::mask, Base::mean, Base::spread, Base::first, Base::second;
  using Base::kept, Base::state, Base::masked, Base::pre0, Base::output, Base::a, Base::edges_into, Base::few, Base::forth, Base::packed, Base::packed_back, Base::exchange,
      Base::mine;

  using Base::Base;

  void run() const {
    pack_weights();
    for (int64_t b = lo; b < lo + n && mask; b++)
      for (int64_t u = b * H + begin; u < b * H + begin + units; u++) static_cast<T*>(d.previous)[u] = static_cast<const T*>(d.h0)[u] * mask[u];
    team.meeting.wait();
    for (int64_t t = 0; t < S; t++)
      for (int64_t i = 0; i <= N; i++) node_forward(i, t);
  }

  void node_forward(int64_t i, int64_t t) const {
    const std::vector<Edge> edges = edges_into(i, t);
    T* const r = state(i, t);
    Share& share = mine();
    const int64_t rows = few();
    for (int64_t from = lo; from < lo + n; from += rows) {
      const int64_t to = std::min(from + rows, lo + n);
      for (int64_t b = from; b < to; b++) {
        std::fill_n(r + b * H + begin, units, T(0));
        if (i) continue;
        const T* const x = static_cast<const T*>(d.x_proj) + (t * B + b) * 2 * H + begin;
        T* const c = pre0(t) + b * 2 * H + begin;
        std::copy_n(x, units, c), std::copy_n(x + H, units, c + H);
      }
      for (const Edge& e : edges) {
        forth(to - from, e.masked + from * H, e.packed, i == 0, e.pre + from * 2 * H);
        for (int64_t b = from; b < to; b++) {
          T *const c = e.pre + b * 2 * H + begin, *const row = r + b * H + begin;
          const T *const z = c + H, *const s = e.state + b * H + begin;
          switch (e.op) {
            case TANH: edge_forward<T, TANH>(units, c, z, s, e.p, row); break;
            case RELU: edge_forward<T, RELU>(units, c, z, s, e.p, row); break;
            case SIGMOID: edge_forward<T, SIGMOID>(units, c, z, s, e.p, row); break;
            case IDENTITY: edge_forward<T, IDENTITY>(units, c, z, s, e.p, row); break;
            default: edge_forward<T, MIX>(units, c, z, s, e.p, row);
          }
        }
      }
      for (int64_t b = from; b < to && d.normalise; b++) {
        double* __restrict sum = share.first.data();
        const T* __restrict row = r + b * H;
#pragma omp simd
        for (int64_t u = begin; u < begin + units; u++) sum[u] += row[u];
      }
    }
    if (d.normalise) statistics(r, share, static_cast<T*>(d.scale) + (kept(t) * (N + 1) + i) * H);
    for (int64_t b = lo; b < lo + n; b++) finish_row(i, t, b);
    if (d.by_units) team.meeting.wait();  // a product needs all units of a state
  }

  // Computes `mean` and, in `spread`, 1/√(v + eps) of the whole batch, from each thread's mean and sum of squares about that mean (Chan, Golub and LeVeque
  // 1979, eq. 2.1)
  void statistics(const T* r, Share& share, T* scale) const {
    for (int64_t u = begin; u < begin + units; u++) share.first[u] /= double(n);
    for (int64_t b = lo; b < lo + n; b++) {
      const T* __restrict row = r + b * H;
      const double* __restrict centre = share.first.data();
      double* __restrict squares = share.second.data();
#pragma omp simd
      for (int64_t u = begin; u < begin + units; u++) squares[u] += (row[u] - centre[u]) * (row[u] - centre[u]);
    }
    const std::vector<Share>& all = exchange();
    const int64_t end = begin + units;
    double *__restrict centre = first.data(), *__restrict squares = second.data();
    std::fill(centre + begin, centre + end, 0.0), std::fill(squares + begin, squares + end, 0.0);
    for (const Share& other : all) {
      const double part = double(other.rows) / double(B), *__restrict its = other.first.data();
#pragma omp simd
      for (int64_t u = begin; u < end; u++) centre[u] += its[u] * part;
    }
    for (const Share& other : all) {
      const double count = double(other.rows), *__restrict its = other.first.data(), *__restrict about = other.second.data();
#pragma omp simd
      for (int64_t u = begin; u < end; u++) squares[u] += about[u] + count * (its[u] - centre[u]) * (its[u] - centre[u]);
    }
    T *__restrict to = mean.data(), *__restrict v = spread.data();
#pragma omp simd
    for (int64_t u = begin; u < end; u++) to[u] = T(centre[u]), v[u] = T(1 / std::sqrt(squares[u] / double(B) + d.eps));
    if (lo == 0) std::copy_n(spread.data() + begin, units, scale + begin);
  }

  // Finishes a state's row: normalises it, masks it for the product, adds it to the output
  void finish_row(int64_t i, int64_t t, int64_t b) const {
    T* __restrict row = state(i, t) + b * H;
    T* __restrict out = output(t) + b * H;
    if (d.normalise) {
      const T *__restrict centre = mean.data(), *__restrict v = spread.data();
#pragma omp simd
      for (int64_t u = begin; u < begin + units; u++) row[u] = (row[u] - centre[u]) * v[u];
    }
    if (i == 0) std::fill_n(out + begin, units, T(0));
    if (const T w = a(i); w != 0)
#pragma omp simd
      for (int64_t u = begin; u < begin + units; u++) out[u] += w * row[u];
    if (!mask) return;
    const T* __restrict m = mask + b * H;
    if (i < N) {
      T* __restrict sm = masked(i, t) + b * H;
#pragma omp simd
      for (int64_t u = begin; u < begin + units; u++) sm[u] = row[u] * m[u];
    } else if (t + 1 < S) {
      T* __restrict hm = static_cast<T*>(d.previous) + kept(t + 1) * BH + b * H;
#pragma omp simd
      for (int64_t u = begin; u < begin + units; u++) hm[u] = out[u] * m[u];
    }
  }

  // Packs this thread's share of the panels of all W
  void pack_weights() const {
    constexpr int64_t C = P::columns;
    const int64_t width = d.by_units ? H : 2 * H;
    int64_t panel = 0;
    for (int64_t k = 0; k <= N; k++) {
      const T* const W = k ? static_cast<const T*>(d.Ws) + (k - 1) * H * 2 * H : static_cast<const T*>(d.W0_h);
      for (int64_t from = 0; from < 2 * H; from += width)
        for (int64_t v = 0; v < width; v += C)
          if (panel++ % team.threads() == thread) P::pack(H, width - v, W + from + v, 2 * H, 1, packed(k) + (from ? numbers<P>(H, H) : 0) + v * P::terms(H));
      for (int64_t v = 0; v < H && d.keep; v += C)
        if (panel++ % team.threads() == thread) P::pack(2 * H, H - v, W + v * 2 * H, 1, 2 * H, packed_back(k) + v * P::terms(2 * H));
    }
  }
};

}  // namespace
