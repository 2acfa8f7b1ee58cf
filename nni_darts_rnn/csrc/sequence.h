// What the forward and the backward pass share: the threads of a sequence, what one of them owns, and where its buffers are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bfloat.h"
#include "cell.h"
#include "edges.h"
#include "product.h"
#include "team.h"

namespace {

constexpr int64_t ROWS = 4;          // rows of the batch for which another thread is worth its cost
constexpr int64_t GRAIN = 4096;      // numbers for which another thread is worth its cost
constexpr int64_t CACHED = 1 << 17;  // bytes: a quarter of a second cache
constexpr int64_t LARGE = 1 << 20;   // bytes of a matrix that a second cache has no room for

// What threads tell each other about a node: two numbers for each unit, and how many rows they cover. Two of these are used in turn, so that one thread may
// write the next node's while another still reads this one's. Sums are in double precision, as in torch's BatchNorm: Σ dr = 0 over the batch must hold to more
// digits than the terms have, since a sigmoid near 1/2 multiplies it into α's gradient.
struct Share {
  int64_t rows = 0;
  std::vector<double> first, second;  // (H) each
  explicit Share(int64_t units) : first(units), second(units) {}
};

// The threads of one sequence.
template <class T, class P> struct Team {
  Meeting meeting;
  std::vector<int64_t> bounds;   // thread k's rows, or units: bounds[k] … bounds[k + 1]
  std::vector<Share> shares[2];  // one a thread

  explicit Team(const Cell& d) : Team(d, size(d)) {}
  int64_t threads() const { return bounds.size() - 1; }

 private:
  Team(const Cell& d, int64_t threads) : meeting(threads) {
    for (int64_t k = 0; k <= threads; k++)
      bounds.push_back(d.by_units ? std::min(d.hidden, panels<P>(d.hidden) * k / threads * P::columns) : d.batch * k / threads);
    for (auto& turn : shares) turn.assign(d.by_units ? 0 : threads, Share(d.hidden));
  }
  static int64_t size(const Cell& d) {
    const int64_t edges = d.d_p ? d.nodes * (d.nodes + 1) / 2 : d.edges, meetings = d.normalise || d.by_units ? d.steps : 1;
    const int64_t rows = d.by_units ? std::max(d.batch, P::rows) : d.batch;  // a single row takes as long as a tile of rows: the weights pass by once
    const int64_t work = rows * d.hidden * (1 + d.hidden / 64) * edges / d.nodes * d.steps / meetings;
    return std::max<int64_t>(1, std::min({d.threads, d.by_units ? panels<P>(d.hidden) : d.batch / ROWS, work / GRAIN}));
  }
};

// What one thread of a team knows: the cell, and its own part, which is the units begin … begin + units of the batch's rows lo … lo + n.
// P: `Whole<T>` or `Tiles<…>`.
template <class T, class P> struct Sequence {
  using Number = typename P::Number;
  const Cell& d;
  Team<T, P>& team;
  const int64_t thread;
  const int64_t S, B, H, N, BH, lo, n, begin, units;
  const T* mask;
  mutable int64_t turn = 0;
  mutable std::vector<T> mean, spread;        // (H) each: of the node at hand, over the whole batch
  mutable std::vector<double> first, second;  // (H) each: the shares added up
  mutable std::vector<Share> whole;     // one share, of a thread that has all rows
  mutable typename P::Buffer operand;   // of a product
  std::vector<int64_t> last_reader;     // (N+1): the last node that reads a state; 0: none

  Sequence(const Cell& cell, Team<T, P>& all, int64_t k)
      : d(cell), team(all), thread(k), S(cell.steps), B(cell.batch), H(cell.hidden), N(cell.nodes), BH(B * H), lo(d.by_units ? 0 : all.bounds[k]),
        n(d.by_units ? B : all.bounds[k + 1] - lo), begin(d.by_units ? all.bounds[k] : 0), units(d.by_units ? all.bounds[k + 1] - begin : H),
        mask(static_cast<const T*>(cell.mask)), mean(H), spread(H), first(H), second(H), whole(d.by_units, Share(H)), last_reader(N + 1) {
    for (int64_t i = 1; i <= N; i++)
      for (int64_t e = d.incoming[i - 1]; e < d.incoming[i]; e++) last_reader[d.source[e]] = i;
  }

  // The number of rows whose pre-activations stay in the second cache between a product and its edge, in whole tiles. A matrix that does not fit that cache is
  // read again for every so many rows, so the number is then larger.
  int64_t few() const {
    const bool large = numbers<P>(H, 2 * units) * int64_t(sizeof(Number)) > LARGE;
    return std::max<int64_t>(1, (large ? 4 : 1) * CACHED / (P::rows * 2 * units * int64_t(sizeof(T)))) * P::rows;
  }

  int64_t kept(int64_t t) const { return d.keep ? t : 0; }
  int64_t kept_steps() const { return d.keep ? S : 1; }
  T* state(int64_t i, int64_t t) const { return static_cast<T*>(d.states) + (i * kept_steps() + kept(t)) * BH; }
  T* masked(int64_t i, int64_t t) const { return mask ? static_cast<T*>(d.masked) + (i * kept_steps() + kept(t)) * BH : state(i, t); }
  T* pre0(int64_t t) const { return static_cast<T*>(d.pre0) + kept(t) * B * 2 * H; }
  T* pre(int64_t e, int64_t t) const { return static_cast<T*>(d.pre) + (d.keep ? e * S + t : 0) * B * 2 * H; }
  T* output(int64_t t) const { return static_cast<T*>(d.outputs) + t * BH; }
  const T* before(int64_t t) const { return t ? output(t - 1) : static_cast<const T*>(d.h0); }
  const T* masked_before(int64_t t) const { return mask ? static_cast<const T*>(d.previous) + kept(t) * BH : before(t); }
  T a(int64_t i) const { return static_cast<const T*>(d.average)[i]; }
  Mix<T> mix(int64_t e) const {
    const T* p = static_cast<const T*>(d.p) + 4 * e;
    return {p[0], p[1], p[2], p[3], static_cast<const T*>(d.present)[e]};
  }

  // An edge into node i at step t, as addresses of the batch's row 0
  struct Edge {
    T* pre;                              // c, and z H later
    const T *state, *masked;             // what the gate lets through, and what W multiplies
    const Number *packed, *packed_back;  // W
    T *d_state, *d_masked;               // gradients that the two get from this node
    bool add;                            // another node has written to d_masked before
    Mix<T> p;
    int64_t op;
  };
  std::vector<Edge> edges_into(int64_t i, int64_t t) const {
    if (i == 0)  // node 0 reads h, and has x in its pre-activations
      return {{pre0(t), before(t), masked_before(t), packed(0), packed_back(0), static_cast<T*>(d.carry), static_cast<T*>(d.d_h), false, {1, 0, 0, 0, 1}, TANH}};
    std::vector<Edge> edges;
    for (int64_t e = d.incoming[i - 1]; e < d.incoming[i]; e++) {
      const int64_t j = d.source[e];
      edges.push_back({pre(e, t), state(j, t), masked(j, t), packed(i), packed_back(i), static_cast<T*>(d.d_states) + j * BH, static_cast<T*>(d.d_masked) + j * BH,
                       last_reader[j] > i, mix(e), d.op[e]});
    }
    return edges;
  }

  // W0_h, then the W_i
  Number* packed(int64_t i) const { return static_cast<Number*>(d.packed) + i * 2 * numbers<P>(H, H); }
  Number* packed_back(int64_t i) const { return static_cast<Number*>(d.packed_back) + i * numbers<P>(2 * H, H); }

  // Computes this thread's units of c and z for m rows: pre (m,2H) = [pre +] A W for A (m,H) and a packed W (H,2H)
  void forth(int64_t m, const T* a, const Number* packed, bool add, T* pre) const {
    const auto left = P::rows_of(m, H, a, H, operand);
    const int64_t width = d.by_units ? units : 2 * H;
    for (int64_t v = begin; v < (d.by_units ? 2 * H : H); v += H, packed += numbers<P>(H, H))
      P::multiply(m, width, left, packed + begin * P::terms(H), P::columns * P::terms(H), add, pre + v, 2 * H);
  }
  // Likewise, what the gradient of c and z, dpre (m,2H), sends back to A: d_a (m,H) = [d_a +] dpre W^T
  void back(int64_t m, const T* dpre, const Number* packed_back, bool add, T* d_a) const {
    P::multiply(m, units, P::rows_of(m, 2 * H, dpre, 2 * H, operand), packed_back + begin * P::terms(2 * H), P::columns * P::terms(2 * H), add, d_a + begin, H);
  }

  // Once every thread has filled in `mine`: the shares of all threads that have rows of this thread's units
  const std::vector<Share>& exchange() const {
    if (d.by_units) return whole;
    team.meeting.wait();
    return team.shares[turn++ % 2];
  }
  Share& mine() const {
    Share& share = d.by_units ? whole[0] : team.shares[turn % 2][thread];
    if (!d.normalise) return share;  // nobody reads it
    share.rows = n;
    std::fill(share.first.begin(), share.first.end(), 0.0);
    std::fill(share.second.begin(), share.second.end(), 0.0);
    return share;
  }
};

}  // namespace
