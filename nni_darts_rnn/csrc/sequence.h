// What the forward and the backward pass share: the threads of a sequence, what one of them owns, and where its buffers are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cell.h"
#include "edges.h"
#include "product.h"
#include "team.h"

namespace {

constexpr int64_t ROWS = 4;      // of the batch for which another thread pays
constexpr int64_t GRAIN = 4096;  // numbers for which another thread pays

// What the next row needs, fetched while this one is computed: rows lie pages apart, and the hardware does not look across pages.
template <class T> inline void fetch(const T* from, int64_t n) {
  for (int64_t u = 0; u < n; u += int64_t(64 / sizeof(T))) __builtin_prefetch(from + u);
  __builtin_prefetch(from + n - 1);
}

// What threads tell each other of a node: two numbers a unit, and of how many rows. Two of these are used in turn, so that one thread may write
// the next node's while another still reads this one's. In double precision, as torch's BatchNorm sums: Σ dr = 0 over the batch must hold to more digits
// than the terms have, since a sigmoid near 1/2 multiplies it into α's gradient.
struct Share {
  int64_t rows;
  std::vector<double> first, second;  // (H) each
};

// The threads of one sequence.
template <class T> struct Team {
  Meeting meeting;
  std::vector<int64_t> bounds;   // thread k's rows: bounds[k] … bounds[k + 1]
  std::vector<Share> shares[2];  // one a thread

  explicit Team(const Cell& d) : Team(d, size(d)) {}
  int64_t threads() const { return bounds.size() - 1; }

 private:
  Team(const Cell& d, int64_t threads) : meeting(threads) {
    for (int64_t k = 0; k <= threads; k++) bounds.push_back(d.batch * k / threads);
    for (auto& turn : shares) turn.assign(threads, {0, std::vector<double>(d.hidden), std::vector<double>(d.hidden)});
  }
  static int64_t size(const Cell& d) {
    const int64_t edges = d.d_p ? d.nodes * (d.nodes + 1) / 2 : d.edges, meetings = d.normalise ? d.steps : 1;
    const int64_t work = d.batch * d.hidden * (1 + d.hidden / 64) * edges / d.nodes * d.steps / meetings;
    return std::max<int64_t>(1, std::min({d.threads, d.batch / ROWS, work / GRAIN}));
  }
};

// What one thread of a team knows: the cell, and the rows lo … lo + n of the batch that it owns.
template <class T> struct Sequence {
  const Cell& d;
  Team<T>& team;
  const int64_t thread;
  const int64_t S, B, H, N, BH, lo, n;
  const T* mask;
  mutable int64_t turn = 0;
  mutable std::vector<T> mean, spread;  // (H) each: of the node at hand, over the whole batch

  Sequence(const Cell& cell, Team<T>& all, int64_t k)
      : d(cell), team(all), thread(k), S(cell.steps), B(cell.batch), H(cell.hidden), N(cell.nodes), BH(B * H), lo(all.bounds[k]), n(all.bounds[k + 1] - lo),
        mask(static_cast<const T*>(cell.mask)), mean(H), spread(H) {}

  int64_t kept(int64_t t) const { return d.keep ? t : 0; }
  int64_t kept_steps() const { return d.keep ? S : 1; }
  T* state(int64_t i, int64_t t) const { return static_cast<T*>(d.states) + (i * kept_steps() + kept(t)) * BH; }
  T* masked(int64_t i, int64_t t) const { return mask ? static_cast<T*>(d.masked) + (i * kept_steps() + kept(t)) * BH : state(i, t); }
  T* pre0(int64_t t) const { return static_cast<T*>(d.pre0) + kept(t) * B * 2 * H; }
  T* pre(int64_t j, int64_t t) const {  // the block of state j at step t, (B, count·2H)
    int64_t before = 0;
    for (int64_t k = 0; k < j; k++) before += d.count[k];
    return static_cast<T*>(d.pre) + (before * kept_steps() + d.count[j] * kept(t)) * B * 2 * H;
  }
  T* output(int64_t t) const { return static_cast<T*>(d.outputs) + t * BH; }
  const T* before(int64_t t) const { return t ? output(t - 1) : static_cast<const T*>(d.h0); }
  const T* masked_before(int64_t t) const { return mask ? static_cast<const T*>(d.previous) + kept(t) * BH : before(t); }
  T a(int64_t i) const { return static_cast<const T*>(d.average)[i]; }
  Mix<T> mix(int64_t e) const {
    const T* p = static_cast<const T*>(d.p) + 4 * e;
    return {p[0], p[1], p[2], p[3], static_cast<const T*>(d.present)[e]};
  }

  // The edges into node i at step t, as addresses of row 0
  struct Edge {
    T* c;            // z follows, H later
    int64_t stride;  // from row to row of c
    T *state, *d_state;
    Mix<T> p;
    int64_t op;
  };
  std::vector<Edge> edges_into(int64_t i, int64_t t) const {
    std::vector<Edge> edges;
    if (i == 0) {
      edges.push_back({pre0(t), 2 * H, const_cast<T*>(before(t)), static_cast<T*>(d.carry), {1, 0, 0, 0, 1}, TANH});
      return edges;
    }
    for (int64_t e = d.incoming[i - 1]; e < d.incoming[i]; e++) {
      const int64_t j = d.source[e];
      edges.push_back({pre(j, t) + d.slot[e] * 2 * H, d.count[j] * 2 * H, state(j, t), static_cast<T*>(d.d_states) + j * BH, mix(e), d.op[e]});
    }
    return edges;
  }

  // the k-th packed matrix: W0_h, then the W_i in `order`
  T* packed(int64_t k) const { return static_cast<T*>(d.packed) + k * Tile<T>::packed(H, 2 * H); }
  T* packed_back(int64_t k) const { return static_cast<T*>(d.packed_back) + k * Tile<T>::packed(2 * H, H); }

  // `mine` filled in by every thread -> all threads' shares
  const std::vector<Share>& exchange() const {
    team.meeting.wait();
    return team.shares[turn++ % 2];
  }
  Share& mine() const {
    Share& share = team.shares[turn % 2][thread];
    if (!d.normalise) return share;  // nobody reads it
    share.rows = n;
    std::fill(share.first.begin(), share.first.end(), 0.0);
    std::fill(share.second.begin(), share.second.end(), 0.0);
    return share;
  }
};

}  // namespace
