// The backward pass over a sequence, on one thread of a team: gradients of the pre-activations and states, then those of the weights.

#pragma once

#include <algorithm>
#include <cstring>

#include "sequence.h"

namespace {

template <class T> struct Backward : Sequence<T> {
  using Base = Sequence<T>;
  using typename Base::Edge;
  using Base::d, Base::team, Base::thread, Base::S, Base::B, Base::H, Base::N, Base::BH, Base::lo, Base::n, Base::mask, Base::mean, Base::spread;
  using Base::state, Base::masked, Base::pre0, Base::pre, Base::output, Base::before, Base::a, Base::edges_into, Base::packed, Base::packed_back,
      Base::exchange, Base::mine;

  double* const sums;                  // this thread's share of d_p
  mutable std::vector<T> left, panel;  // a weight gradient's operands
  mutable std::vector<T> undrawn;      // (n,2H): the pre-activations of an edge that the drawn cell has not

  Backward(const Cell& cell, Team<T>& all, int64_t k, double* s)
      : Base(cell, all, k), sums(s), left(d.d_Ws || d.d_W0_h ? H * DEPTH : 0), panel(DEPTH * Tile<T>::columns), undrawn(d.d_p && d.edges == N ? n * 2 * H : 0) {}

  void run() const {
    T *const g = static_cast<T*>(d.scratch), *const carry = static_cast<T*>(d.carry), *const dh = static_cast<T*>(d.d_h);
    for (int64_t t = S - 1; t >= 0; t--) {
      for (int64_t i = N; i >= 0; i--) {
        const int64_t readers = i < N ? d.count[i] : 0, width = readers * 2 * H;
        for (int64_t k = 0; k < readers; k++)
          multiply<T>(n, H, 2 * H, pre(i, t) + lo * width + k * 2 * H, width, packed_back(1 + d.first[i] + k), k > 0, g + lo * H, H);
        node_backward(i, t, readers > 0);
      }
      multiply<T>(n, H, 2 * H, pre0(t) + lo * 2 * H, 2 * H, packed_back(0), false, dh + lo * H, H);
      // what reaches h beside `carry`, which node 0 has written
      for (int64_t u = lo * H; u < (lo + n) * H; u++) carry[u] += mask ? dh[u] * mask[u] : dh[u];
    }
    if (d.d_h0) std::memcpy(static_cast<T*>(d.d_h0) + lo * H, carry + lo * H, sizeof(T) * n * H);
  }

  void node_backward(int64_t i, int64_t t, bool later) const {
    const std::vector<Edge> edges = edges_into(i, t);
    T* const d_states = static_cast<T*>(d.d_states);
    const T* const v = static_cast<const T*>(d.scale) + (t * (N + 1) + i) * H;
    Share& share = mine();
    for (int64_t b = lo; b < lo + n; b++) gather_row(i, t, b, later, share.first.data(), share.second.data());
    if (d.normalise) {
      const std::vector<Share>& all = exchange();
      for (int64_t u = 0; u < H; u++) {
        double across = 0, along = 0;
        for (const Share& other : all) across += other.first[u], along += other.second[u];
        mean[u] = T(across / double(B)), spread[u] = T(along / double(B));
      }
    }
    if (i && d.d_p && d.op[d.incoming[i - 1]] != MIX) drawn_sums(i, t, edges.front());
    for (int64_t b = lo; b < lo + n; b++) {
      T* __restrict dr = d_states + i * BH + b * H;
      if (d.normalise) {
        const T *__restrict s = state(i, t) + b * H, *__restrict across = mean.data(), *__restrict along = spread.data(), *__restrict scale = v;
#pragma omp simd
        for (int64_t u = 0; u < H; u++) dr[u] = scale[u] * (dr[u] - across[u] - s[u] * along[u]);
      }
      if (i == 0) std::fill_n(static_cast<T*>(d.carry) + b * H, H, T(0));
      for (size_t k = 0; k < edges.size(); k++) {
        const Edge& e = edges[k];
        T *c = e.c + b * e.stride, *z = c + H, *ds = e.d_state + b * H;
        const T* sj = e.state + b * H;
        if (b + 1 < lo + n) fetch(c + e.stride, 2 * H);
        switch (e.op) {
          case TANH: edge_backward<T, TANH, false>(H, c, z, sj, dr, e.p, ds, nullptr); break;
          case RELU: edge_backward<T, RELU, false>(H, c, z, sj, dr, e.p, ds, nullptr); break;
          case SIGMOID: edge_backward<T, SIGMOID, false>(H, c, z, sj, dr, e.p, ds, nullptr); break;
          case IDENTITY: edge_backward<T, IDENTITY, false>(H, c, z, sj, dr, e.p, ds, nullptr); break;
          default:
            if (d.d_p) edge_backward<T, MIX, true>(H, c, z, sj, dr, e.p, ds, sums + (i * (i - 1) / 2 + k) * 5);
            else edge_backward<T, MIX, false>(H, c, z, sj, dr, e.p, ds, nullptr);
        }
      }
    }
  }

  // dp of all pairs (j, i), from dr_i, in a cell whose one edge into node i is `drawn`
  void drawn_sums(int64_t i, int64_t t, const Edge& drawn) const {
    const T* const dr = static_cast<const T*>(d.d_states) + i * BH;
    const int64_t place = std::find(d.order, d.order + N, i - 1) - d.order;
    for (int64_t j = 0; j < i; j++) {
      double* const to = sums + (i * (i - 1) / 2 + j) * 5;
      const bool there = j == d.source[d.incoming[i - 1]];
      if (!there) multiply<T>(n, 2 * H, H, masked(j, t) + lo * H, H, packed(1 + place), false, undrawn.data(), 2 * H);
      for (int64_t b = lo; b < lo + n; b++) {
        const T *const c = there ? drawn.c + b * drawn.stride : undrawn.data() + (b - lo) * 2 * H, *const s = state(j, t) + b * H;
        if (there) edge_sums<T, true>(H, c, c + H, s, dr + b * H, to);
        else edge_sums<T, false>(H, c, c + H, s, dr + b * H, to);
      }
    }
  }

  // ds_i's row complete, and for batch statistics its sums over the batch
  void gather_row(int64_t i, int64_t t, int64_t b, bool later, double* __restrict mean, double* __restrict along) const {
    T* const d_states = static_cast<T*>(d.d_states);
    T* __restrict ds = d_states + i * BH + b * H;
    T* __restrict dh = static_cast<T*>(d.d_h) + b * H;
    if (i == N) {  // a new time step: dh' is known, and no state has heard of it
      const T *out = static_cast<const T*>(d.d_outputs) + t * BH + b * H, *carry = static_cast<const T*>(d.carry) + b * H;
      for (int64_t u = 0; u < H; u++) dh[u] = out[u] + carry[u];
      for (int64_t j = 0; j <= N; j++) std::fill_n(d_states + j * BH + b * H, H, T(0));
    }
    if (const T w = a(i); w != 0)
#pragma omp simd
      for (int64_t u = 0; u < H; u++) ds[u] += w * dh[u];
    if (later) {
      const T* __restrict g = static_cast<const T*>(d.scratch) + b * H;
      const T* __restrict m = mask ? mask + b * H : nullptr;
      if (m)
#pragma omp simd
        for (int64_t u = 0; u < H; u++) ds[u] += m[u] * g[u];
      else
#pragma omp simd
        for (int64_t u = 0; u < H; u++) ds[u] += g[u];
    }
    if (d.normalise) {
      const T* __restrict s = state(i, t) + b * H;
#pragma omp simd
      for (int64_t u = 0; u < H; u++) mean[u] += ds[u], along[u] += double(ds[u]) * s[u];
    }
  }

  // this thread's share of the columns of all weight gradients, once every row is done
  void weight_gradients() const {
    std::vector<bool> there(N + 1);  // in the mixed cell several states add to one matrix
    if (T* dW = static_cast<T*>(d.d_W0_h)) {
      const Reader first{dW, pre0(0), 2 * H};
      if (mask) add_gradients(S * B, static_cast<const T*>(d.previous), {first}, false);
      else {
        add_gradients(B, before(0), {first}, false);
        if (S > 1) add_gradients((S - 1) * B, output(0), {{dW, pre0(1), 2 * H}}, true);
      }
    }
    if (!d.d_Ws) return;
    for (int64_t j = 0; j < N; j++) {
      std::vector<Reader> fresh, more;
      for (int64_t k = 0; k < d.count[j]; k++) {
        const int64_t node = d.order[d.first[j] + k];
        (there[node] ? more : fresh).push_back({static_cast<T*>(d.d_Ws) + node * H * 2 * H, pre(j, 0) + k * 2 * H, d.count[j] * 2 * H});
        there[node] = true;
      }
      add_gradients(S * B, masked(j, 0), fresh, false);
      add_gradients(S * B, masked(j, 0), more, true);
    }
  }

  // A matrix that multiplies a state: its gradient (H,2H), and that of the pre-activations, G (m,2H) with `ldg` from row to row
  struct Reader {
    T* dW;
    const T* G;
    int64_t ldg;
  };

  // dW (H,2H) = [dW +] A^T G for all matrices that read the state A (m,H); DEPTH rows are packed at a time
  void add_gradients(int64_t m, const T* A, const std::vector<Reader>& readers, bool add) const {
    constexpr int64_t C = Tile<T>::columns;
    const int64_t panels = Tile<T>::panels(2 * H), from = panels * thread / team.threads() * C, to = std::min(2 * H, panels * (thread + 1) / team.threads() * C);
    for (int64_t r = 0; r < m && !readers.empty(); r += DEPTH) {
      const int64_t k = std::min(DEPTH, m - r);
      pack_left<T>(H, k, A + r * H, 1, H, left.data());
      for (const Reader& reader : readers)
        for (int64_t v = from; v < to; v += C) {
          pack<T>(k, 2 * H - v, reader.G + r * reader.ldg + v, reader.ldg, 1, panel.data());
          multiply_packed<T>(H, std::min(C, 2 * H - v), k, left.data(), panel.data(), add || r, reader.dW + v, 2 * H);
        }
    }
  }
};

}  // namespace
