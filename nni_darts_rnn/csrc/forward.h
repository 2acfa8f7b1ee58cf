// The forward pass over a sequence, on one thread of a team.

#pragma once

#include <cmath>
#include <cstring>

#include "sequence.h"

namespace {

template <class T> struct Forward : Sequence<T> {
  using Base = Sequence<T>;
  using typename Base::Edge;
  using Base::d, Base::team, Base::thread, Base::S, Base::B, Base::H, Base::N, Base::BH, Base::lo, Base::n, Base::mask, Base::mean, Base::spread;
  using Base::kept, Base::state, Base::masked, Base::pre0, Base::pre, Base::output, Base::masked_before, Base::a, Base::edges_into, Base::packed,
      Base::packed_back, Base::exchange, Base::mine;

  using Base::Base;

  void run() const {
    pack_weights();
    if (mask)
      for (int64_t u = lo * H; u < (lo + n) * H; u++) static_cast<T*>(d.previous)[u] = static_cast<const T*>(d.h0)[u] * mask[u];
    team.meeting.wait();
    for (int64_t t = 0; t < S; t++) {
      std::memcpy(pre0(t) + lo * 2 * H, static_cast<const T*>(d.x_proj) + (t * B + lo) * 2 * H, sizeof(T) * n * 2 * H);
      multiply<T>(n, 2 * H, H, masked_before(t) + lo * H, H, packed(0), true, pre0(t) + lo * 2 * H, 2 * H);
      node_forward(0, t);
      for (int64_t j = 0; j < N; j++) {
        const int64_t width = d.count[j] * 2 * H;
        for (int64_t k = 0; k < d.count[j]; k++)
          multiply<T>(n, 2 * H, H, masked(j, t) + lo * H, H, packed(1 + d.first[j] + k), false, pre(j, t) + lo * width + k * 2 * H, width);
        node_forward(j + 1, t);
      }
    }
  }

  void node_forward(int64_t i, int64_t t) const {
    const std::vector<Edge> edges = edges_into(i, t);
    T* const r = state(i, t);
    Share& share = mine();
    for (int64_t b = lo; b < lo + n; b++) {
      T* const row = r + b * H;
      std::fill(row, row + H, T(0));
      for (const Edge& e : edges) {
        T *const c = e.c + b * e.stride;
        const T *z = c + H, *sj = e.state + b * H;
        if (b + 1 < lo + n) fetch(c + e.stride, 2 * H);
        switch (e.op) {
          case TANH: edge_forward<T, TANH>(H, c, z, sj, e.p, row); break;
          case RELU: edge_forward<T, RELU>(H, c, z, sj, e.p, row); break;
          case SIGMOID: edge_forward<T, SIGMOID>(H, c, z, sj, e.p, row); break;
          case IDENTITY: edge_forward<T, IDENTITY>(H, c, z, sj, e.p, row); break;
          default: edge_forward<T, MIX>(H, c, z, sj, e.p, row);
        }
      }
      if (d.normalise) {
        double* __restrict sum = share.first.data();
#pragma omp simd
        for (int64_t u = 0; u < H; u++) sum[u] += row[u];
      }
    }
    if (d.normalise) statistics(r, share, static_cast<T*>(d.scale) + (kept(t) * (N + 1) + i) * H);
    for (int64_t b = lo; b < lo + n; b++) finish_row(i, t, b);
  }

  // `mean` and 1/√(v + eps) in `spread`, of the whole batch: each thread's mean and its squares about that (Chan, Golub and LeVeque 1979, eq. 2.1)
  void statistics(const T* r, Share& share, T* scale) const {
    for (int64_t u = 0; u < H; u++) share.first[u] /= double(n);
    for (int64_t b = lo; b < lo + n; b++) {
      const T* __restrict row = r + b * H;
      const double* __restrict centre = share.first.data();
      double* __restrict squares = share.second.data();
#pragma omp simd
      for (int64_t u = 0; u < H; u++) squares[u] += (row[u] - centre[u]) * (row[u] - centre[u]);
    }
    const std::vector<Share>& all = exchange();
    for (int64_t u = 0; u < H; u++) {
      double centre = 0, squares = 0;
      for (const Share& other : all) centre += other.first[u] * (double(other.rows) / double(B));
      for (const Share& other : all) squares += other.second[u] + double(other.rows) * (other.first[u] - centre) * (other.first[u] - centre);
      mean[u] = T(centre), spread[u] = T(1 / std::sqrt(squares / double(B) + d.eps));
    }
    if (thread == 0) std::copy(spread.begin(), spread.end(), scale);
  }

  // what becomes of a state's row: normalised, masked for the product, added to the output
  void finish_row(int64_t i, int64_t t, int64_t b) const {
    T* __restrict row = state(i, t) + b * H;
    T* __restrict out = output(t) + b * H;
    if (d.normalise) {
      const T *__restrict centre = mean.data(), *__restrict v = spread.data();
#pragma omp simd
      for (int64_t u = 0; u < H; u++) row[u] = (row[u] - centre[u]) * v[u];
    }
    if (i == 0) std::fill(out, out + H, T(0));
    if (const T w = a(i); w != 0)
#pragma omp simd
      for (int64_t u = 0; u < H; u++) out[u] += w * row[u];
    if (!mask) return;
    const T* __restrict m = mask + b * H;
    if (i < N) {
      T* __restrict sm = masked(i, t) + b * H;
#pragma omp simd
      for (int64_t u = 0; u < H; u++) sm[u] = row[u] * m[u];
    } else if (t + 1 < S) {
      T* __restrict hm = static_cast<T*>(d.previous) + kept(t + 1) * BH + b * H;
#pragma omp simd
      for (int64_t u = 0; u < H; u++) hm[u] = out[u] * m[u];
    }
  }

  // this thread's share of the panels of all W
  void pack_weights() const {
    constexpr int64_t C = Tile<T>::columns;
    int64_t panel = 0;
    for (int64_t k = 0; k <= N; k++) {
      const T* const W = k ? static_cast<const T*>(d.Ws) + d.order[k - 1] * H * 2 * H : static_cast<const T*>(d.W0_h);
      for (int64_t v = 0; v < 2 * H; v += C)
        if (panel++ % team.threads() == thread) pack<T>(H, 2 * H - v, W + v, 2 * H, 1, packed(k) + v * H);
      for (int64_t v = 0; v < H && d.keep; v += C)
        if (panel++ % team.threads() == thread) pack<T>(2 * H, H - v, W + v * 2 * H, 1, 2 * H, packed_back(k) + v * 2 * H);
    }
  }
};

}  // namespace
