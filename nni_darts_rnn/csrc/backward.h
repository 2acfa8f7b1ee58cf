// The backward pass over a sequence, on one thread of a team: gradients of the pre-activations and states, then those of the weights.

#pragma once

#include <algorithm>

#include "sequence.h"

namespace {

template <class T, class P> struct Backward : Sequence<T, P> {
  using Base = Sequence<T, P>;
  using typename Base::Edge;
  using Base::d, Base::team, Base::thread, Base::S, Base::B, Base::H, Base::N, Base::BH, Base::lo, Base::n, Base::begin, Base::units, Base::mask, Base::mean, Base::spread, Base::first, Base::second;
  using Base::state, Base::masked, Base::pre0, Base::pre, Base::output, Base::before, Base::a, Base::edges_into, Base::few, Base::last_reader,
      Base::forth, Base::back, Base::packed, Base::exchange, Base::mine;

  double* const sums;                            // this thread's share of d_p
  mutable typename P::Buffer left, packed_rows;  // a weight gradient's operands
  mutable std::vector<T> undrawn;                // (few(),2H): pre-activations of an edge that the drawn cell does not have

  Backward(const Cell& cell, Team<T, P>& all, int64_t k, double* s)
      : Base(cell, all, k), sums(s), undrawn(d.d_p && d.edges == N ? few() * 2 * H : 0) {}

  void run() const {
    T *const carry = static_cast<T*>(d.carry), *const dh = static_cast<T*>(d.d_h);
    for (int64_t t = S - 1; t >= 0; t--) {
      for (int64_t i = N; i >= 0; i--) node_backward(i, t);
      // node 0 has written to `carry` what its gate lets through to h; here comes what reaches h through the weights
      for (int64_t b = lo; b < lo + n; b++)
        for (int64_t u = b * H + begin; u < b * H + begin + units; u++) carry[u] += mask ? dh[u] * mask[u] : dh[u];
    }
    for (int64_t b = lo; b < lo + n && d.d_h0; b++) std::copy_n(carry + b * H + begin, units, static_cast<T*>(d.d_h0) + b * H + begin);
  }

  void node_backward(int64_t i, int64_t t) const {
    const std::vector<Edge> edges = edges_into(i, t);
    T* const dr = static_cast<T*>(d.d_states) + i * BH;
    Share& share = mine();
    for (int64_t b = lo; b < lo + n; b++) gather_row(i, t, b, share.first.data(), share.second.data());
    if (d.normalise) {
      const int64_t end = begin + units;
      double *__restrict across = first.data(), *__restrict along = second.data();
      std::fill(across + begin, across + end, 0.0), std::fill(along + begin, along + end, 0.0);
      for (const Share& other : exchange()) {
        const double *__restrict one = other.first.data(), *__restrict two = other.second.data();
#pragma omp simd
        for (int64_t u = begin; u < end; u++) across[u] += one[u], along[u] += two[u];
      }
      T *__restrict m = mean.data(), *__restrict v = spread.data();
#pragma omp simd
      for (int64_t u = begin; u < end; u++) m[u] = T(across[u] / double(B)), v[u] = T(along[u] / double(B));
    }
    for (int64_t b = lo; b < lo + n && i == 0; b++) std::fill_n(static_cast<T*>(d.carry) + b * H + begin, units, T(0));
    const int64_t rows = few();
    for (int64_t from = lo; from < lo + n; from += rows) {
      const int64_t to = std::min(from + rows, lo + n);
      for (int64_t b = from; b < to && d.normalise; b++) normalise_row(i, t, b, dr + b * H);
      if (i && d.d_p && d.op[d.incoming[i - 1]] != MIX) drawn_sums(i, t, from, to, edges.front());
      for (size_t k = 0; k < edges.size(); k++) {
        const Edge& e = edges[k];
        // what the loop reads next: it lies in memory since the forward pass, and is too short a piece for the processor to prefetch by itself
        const T* const next = k + 1 < edges.size() ? edges[k + 1].pre + from * 2 * H : to < lo + n ? edges[0].pre + to * 2 * H : nullptr;
        for (int64_t b = from; b < to; b++) {
          T *const c = e.pre + b * 2 * H + begin, *const z = c + H, *const ds = e.d_state + b * H + begin;
          const T *const s = e.state + b * H + begin, *const row = dr + b * H + begin;
          for (int64_t v = begin; v < begin + units && next; v += 64 / int64_t(sizeof(T)))
            __builtin_prefetch(next + (b - from) * 2 * H + v, 0, 2), __builtin_prefetch(next + (b - from) * 2 * H + H + v, 0, 2);
          switch (e.op) {
            case TANH: edge_backward<T, TANH, false>(units, c, z, s, row, e.p, ds, nullptr); break;
            case RELU: edge_backward<T, RELU, false>(units, c, z, s, row, e.p, ds, nullptr); break;
            case SIGMOID: edge_backward<T, SIGMOID, false>(units, c, z, s, row, e.p, ds, nullptr); break;
            case IDENTITY: edge_backward<T, IDENTITY, false>(units, c, z, s, row, e.p, ds, nullptr); break;
            default:
              if (d.d_p) edge_backward<T, MIX, true>(units, c, z, s, row, e.p, ds, sums + (i * (i - 1) / 2 + k) * 5);
              else edge_backward<T, MIX, false>(units, c, z, s, row, e.p, ds, nullptr);
          }
        }
        if (!d.by_units) back(to - from, e.pre + from * 2 * H, e.packed_back, e.add, e.d_masked + from * H);
      }
    }
    if (!d.by_units) return;
    team.meeting.wait();  // a product needs the gradients of all units
    for (const Edge& e : edges) back(n, e.pre, e.packed_back, e.add, e.d_masked);
  }

  // Overwrites a row of ds_i with that of dr_i
  void normalise_row(int64_t i, int64_t t, int64_t b, T* __restrict dr) const {
    const T *__restrict s = state(i, t) + b * H, *__restrict across = mean.data(), *__restrict along = spread.data();
    const T* __restrict scale = static_cast<const T*>(d.scale) + (t * (N + 1) + i) * H;
#pragma omp simd
    for (int64_t u = begin; u < begin + units; u++) dr[u] = scale[u] * (dr[u] - across[u] - s[u] * along[u]);
  }

  // Adds to dp of all pairs (j, i) what comes from the rows from … to of dr_i, in a cell whose one edge into node i is `drawn`
  void drawn_sums(int64_t i, int64_t t, int64_t from, int64_t to, const Edge& drawn) const {
    const T* const dr = static_cast<const T*>(d.d_states) + i * BH;
    for (int64_t j = 0; j < i; j++) {
      double* const sum = sums + (i * (i - 1) / 2 + j) * 5;
      const bool there = j == d.source[d.incoming[i - 1]];
      if (!there) forth(to - from, masked(j, t) + from * H, packed(i), false, undrawn.data());
      for (int64_t b = from; b < to; b++) {
        const T *const c = (there ? drawn.pre + b * 2 * H : undrawn.data() + (b - from) * 2 * H) + begin, *const s = state(j, t) + b * H + begin;
        if (there) edge_sums<T, true>(units, c, c + H, s, dr + b * H + begin, sum);
        else edge_sums<T, false>(units, c, c + H, s, dr + b * H + begin, sum);
      }
    }
  }

  // Completes a row of ds_i, and adds it to the sums over the batch if states are normalised
  void gather_row(int64_t i, int64_t t, int64_t b, double* __restrict mean, double* __restrict along) const {
    T* const d_states = static_cast<T*>(d.d_states);
    T* __restrict ds = d_states + i * BH + b * H;
    T* __restrict dh = static_cast<T*>(d.d_h) + b * H;
    const int64_t end = begin + units;
    if (i == N) {  // a new time step: dh' is known, and no state has a gradient yet
      const T *out = static_cast<const T*>(d.d_outputs) + t * BH + b * H, *carry = static_cast<const T*>(d.carry) + b * H;
      for (int64_t u = begin; u < end; u++) dh[u] = out[u] + carry[u];
      for (int64_t j = 0; j <= N; j++) std::fill_n(d_states + j * BH + b * H + begin, units, T(0));
    }
    if (const T w = a(i); w != 0)
#pragma omp simd
      for (int64_t u = begin; u < end; u++) ds[u] += w * dh[u];
    if (last_reader[i]) {
      const T* __restrict g = static_cast<const T*>(d.d_masked) + i * BH + b * H;
      const T* __restrict m = mask ? mask + b * H : nullptr;
      if (m)
#pragma omp simd
        for (int64_t u = begin; u < end; u++) ds[u] += m[u] * g[u];
      else
#pragma omp simd
        for (int64_t u = begin; u < end; u++) ds[u] += g[u];
    }
    if (d.normalise) {
      const T* __restrict s = state(i, t) + b * H;
#pragma omp simd
      for (int64_t u = begin; u < end; u++) mean[u] += ds[u], along[u] += double(ds[u]) * s[u];
    }
  }

  // Computes this thread's columns of all weight gradients, once every row is done
  void weight_gradients() const {
    std::vector<bool> there(N + 1);  // gradients already begun: in the mixed cell several states add to one
    if (T* dW = static_cast<T*>(d.d_W0_h)) {
      const Reader first{dW, pre0(0)};
      if (mask) add_gradients(S * B, static_cast<const T*>(d.previous), {first}, false);
      else {
        add_gradients(B, before(0), {first}, false);
        if (S > 1) add_gradients((S - 1) * B, output(0), {{dW, pre0(1)}}, true);
      }
    }
    if (!d.d_Ws) return;
    for (int64_t j = 0; j < N; j++) {
      std::vector<Reader> fresh, more;
      for (int64_t i = 1; i <= N; i++)
        for (int64_t e = d.incoming[i - 1]; e < d.incoming[i]; e++) {
          if (d.source[e] != j) continue;
          (there[i] ? more : fresh).push_back({static_cast<T*>(d.d_Ws) + (i - 1) * H * 2 * H, pre(e, 0)});
          there[i] = true;
        }
      add_gradients(S * B, masked(j, 0), fresh, false);
      add_gradients(S * B, masked(j, 0), more, true);
    }
  }

  // A matrix that multiplies a state: its gradient dW (H,2H), and G (m,2H), the gradient of the pre-activations
  struct Reader {
    T* dW;
    const T* G;
  };

  // dW (H,2H) = [dW +] A^T G for all matrices that read the state A (m,H). `depth` rows are packed at a time: of a few rows after the other, all of this
  // thread's columns, as they lie in memory
  void add_gradients(int64_t m, const T* A, const std::vector<Reader>& readers, bool add) const {
    constexpr int64_t C = P::columns, few = 32;
    constexpr int64_t least = P::narrowest;
    const int64_t all = (2 * H + least - 1) / least, from = all * thread / team.threads() * least, to = std::min(2 * H, all * (thread + 1) / team.threads() * least);
    const int64_t stride = P::terms(P::depth) * C;
    packed_rows.resize((to - from + C - 1) / C * stride);
    for (int64_t r = 0; r < m && !readers.empty(); r += P::depth) {
      const int64_t k = std::min(P::depth, m - r);
      const auto transposed = P::columns_of(H, k, A + r * H, H, left);
      for (const Reader& reader : readers) {
        for (int64_t u = 0; u < k; u += few)
          for (int64_t v = from; v < to; v += C)
            P::pack(std::min(few, k - u), 2 * H - v, reader.G + (r + u) * 2 * H + v, 2 * H, 1, packed_rows.data() + (v - from) / C * stride + P::terms(u) * C);
        P::multiply(H, to - from, transposed, packed_rows.data(), stride, add || r, reader.dW + from, 2 * H);
      }
    }
  }
};

}  // namespace
