// The discrete and the mixed recurrent cell over a whole sequence, forward and backward, on the CPU. `extension.py` compiles and loads this file,
// `fused.py` calls it; the readable forms that it must equal are `cell.discrete_cell` and `supernet.mixed_cell`. No torch headers, no BLAS: products
// with the weights, which are the same at every time step, are those of product.h.
//
// One description covers both cells: a graph of edges e = (j -> i) between states s_0 … s_N, each with mixing weights p_k and P = sum of the p_k.
// The discrete cell has one edge a node, p one-hot, P = 1, and no normalisation. At each time step, with masks m (or none),
//
//   c, z  = x + (h∘m) W0_h                                s_0 = norm( h + σ(c)∘(tanh z − h) )
//   c, z  = (s_j∘m) W_i      for each edge (j -> i)       r_i = Σ_e  P s_j + σ(c)∘(M − P s_j),   M = Σ_k p_k f_k(z)
//   s_i   = norm(r_i),  norm(r) = (r − μ)/√(v + eps) with μ, v the batch's mean and biased variance of each column
//   h'    = Σ_i a_i s_i      (a_i: 1/len(concat) for the states that are averaged, else 0)
//
// All edges that leave state j share one block of pre-activations, (s_j∘m) times the W_i of all nodes that read s_j, side by side.
//
// Backward, from dh' (the gradient of h' from outside plus what the next step sends back), nodes i = N … 0. Write ds_i for the gradient of s_i:
//
//   ds_i = a_i dh' + Σ_{edges i -> k} ( dr_k∘P∘(1 − σ(c)) + m∘(dpre W_k^T) )        the last for all k at once
//   dr_i = (ds_i − mean(ds_i) − s_i mean(ds_i∘s_i)) / √(v + eps)
//          since ∂s_b/∂r_a = (δ_ab − 1/B − s_a s_b/B)/√(v + eps)
//   and for each edge (j -> i), with σ = σ(c):
//   dc   = dr∘(M − P s_j)∘σ(1 − σ)        dz = dr∘σ∘Σ_k p_k f_k'(z)                  written over c, z: dpre = [dc, dz]
//   dp_k = Σ dr∘( s_j∘(1 − σ) + σ∘f_k(z) )                                          summed over time, batch and units
//   s_0's r_0 = h + σ(tanh z − h): the same with P = 1, M = tanh z; it gives dx = dpre and dh = dr_0∘(1 − σ) + m∘(dx W0_h^T).
// A drawn cell is a discrete one of which dp is asked for, over all pairs j < i: where p is zero an edge adds nothing to r_i and sends nothing back,
// so it costs the product forward, of which dp_k is the same sum.
//
// Weight gradients wait until the loop over time is done: those of the nodes that read s_j are (s_j∘m)^T dpre over all T·B rows, one product.
// Kept from the forward pass: σ(c) in c's place, z, states, 1/√(v + eps). What the mixture needs of z is computed again: one exp serves tanh and sigmoid.
//
// One parallel region runs the whole sequence, and a thread owns a part of the batch: its rows of every pre-activation and state, which it alone
// writes and reads, and so finds in its own cache. Threads meet only over the batch's statistics, once a node; the discrete cell has none.
// All W_i are packed first, once for the forward products and transposed for the backward ones.
// Sums over the batch are made of the threads' sums in the threads' order, so that the same number of threads gives the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "elementary.h"
#include "product.h"
#include "team.h"

extern "C" {
struct Cell {  // mirrored, field by field, in extension.py
  int64_t steps, batch, hidden, nodes, edges, threads;
  int64_t normalise;  // 1: with the batch's statistics, 0: not at all
  int64_t keep;       // 1: pre0, pre, states, masked have all time steps, for the backward pass; 0: one step, used again and again
  double eps;
  const int64_t *order;            // (N): the nodes, counted from 0, in the order in which their weights lie side by side
  const int64_t *first, *count;    // (N): the nodes that read state j have the places first[j] … first[j] + count[j] in that order
  const int64_t *incoming;         // (N+1): node i's edges are incoming[i-1] … incoming[i]
  const int64_t *source, *slot;    // (E): the state an edge reads, and its place among the `count` of that state
  const int64_t *op;               // (E): MIX or one nonlinearity
  const void *x_proj, *h0, *W0_h, *Ws, *mask;     // (T,B,2H) (B,H) (H,2H) (N,H,2H) (B,H) or null
  const void *p, *present, *average;              // (E,4) in the order tanh relu sigmoid identity; (E); (N+1)
  void *pre0, *pre, *states, *masked, *previous;  // (T,B,2H); one block (T,B,count·2H) a state; (N+1,T,B,H); (N,T,B,H), (T,B,H) or null without mask
  void *outputs, *scale;                          // (T,B,H); 1/√(v + eps) (T,N+1,H)
  void *packed, *packed_back;                     // W0_h and the W_i in `order`, N+1 matrices (H,2H) in panels; the same transposed, if `keep`
  // backward only; a null pointer is a gradient that nobody asked for
  const void* d_outputs;                          // (T,B,H)
  void *d_states, *scratch, *carry, *d_h;         // (N+1,B,H); (B,H); (B,H); (B,H)
  void *d_h0, *d_W0_h, *d_Ws;                     // as the inputs
  double* d_p;                                    // (N(N+1)/2,5), a row a pair of node and earlier state: Σ dr∘s_j∘(1−σ), then Σ dr∘σ∘f_k
};
int64_t cell_struct_size() { return sizeof(Cell); }
}

namespace {

enum Op : int64_t { TANH, RELU, SIGMOID, IDENTITY, MIX };
constexpr int64_t ROWS = 4;      // of the batch for which another thread pays
constexpr int64_t GRAIN = 4096;  // numbers for which another thread pays

template <class T> struct Mix { T tanh, relu, sigmoid, identity, P; };

// M = Σ p_k f_k(z) and, in `slope`, Σ p_k f_k'(z)
template <class T, int64_t OP> ALWAYS_INLINE T mixture(T z, const Mix<T>& p, T& slope, T& t, T& s) {
  if constexpr (OP == MIX) {
    tanh_sigmoid(z, t, s);
    slope = p.tanh * (T(1) - t * t) + p.sigmoid * s * (T(1) - s) + p.identity + (z > T(0) ? p.relu : T(0));
    return p.tanh * t + p.sigmoid * s + p.identity * z + p.relu * (z < T(0) ? T(0) : z);
  } else if constexpr (OP == TANH) {
    t = tanh_(z), slope = T(1) - t * t;
    return t;
  } else if constexpr (OP == SIGMOID) {
    s = gate(z), slope = s * (T(1) - s);
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
#pragma omp simd
  for (int64_t u = 0; u < n; u++) {
    T slope, t, g;
    const T m = mixture<T, OP>(z[u], p, slope, t, g), carried = p.P * s[u];
    const T open = gate(c[u]);
    r[u] += carried + open * (m - carried);
    c[u] = open;
  }
}

// σ(c), z -> dc, dz; ds += dr P (1 − σ); with PROB the sums for dp
template <class T, int64_t OP, bool PROB>
void edge_backward(int64_t n, T* __restrict c, T* __restrict z, const T* __restrict s, const T* __restrict dr, Mix<T> p,
                   T* __restrict ds, double* sums) {
  T stay = 0, st = 0, sr = 0, ss = 0, si = 0;
#pragma omp simd reduction(+ : stay, st, sr, ss, si)
  for (int64_t u = 0; u < n; u++) {
    T slope, t, g;
    const T m = mixture<T, OP>(z[u], p, slope, t, g), carried = p.P * s[u], open = c[u];
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
  T stay = 0, st = 0, sr = 0, ss = 0, si = 0;
#pragma omp simd reduction(+ : stay, st, sr, ss, si)
  for (int64_t u = 0; u < n; u++) {
    T t, g;
    tanh_sigmoid(z[u], t, g);
    const T open = OPEN ? c[u] : gate(c[u]), moved = dr[u] * open;
    stay += dr[u] * (T(1) - open) * s[u];
    st += moved * t;
    sr += moved * (z[u] < T(0) ? T(0) : z[u]);
    ss += moved * g;
    si += moved * z[u];
  }
  sums[0] += stay, sums[1] += st, sums[2] += sr, sums[3] += ss, sums[4] += si;
}

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
  double* const sums;  // this thread's share of d_p
  const int64_t S, B, H, N, BH, lo, n;
  const T* mask;
  mutable int64_t turn = 0;
  mutable std::vector<T> mean, spread;  // (H) each: of the node at hand, over the whole batch
  mutable std::vector<T> left, panel;   // a weight gradient's operands
  mutable std::vector<T> undrawn;       // (n,2H): the pre-activations of an edge that the drawn cell has not

  Sequence(const Cell& cell, Team<T>& all, int64_t k, double* s)
      : d(cell), team(all), thread(k), sums(s), S(cell.steps), B(cell.batch), H(cell.hidden), N(cell.nodes), BH(B * H), lo(all.bounds[k]),
        n(all.bounds[k + 1] - lo), mask(static_cast<const T*>(cell.mask)), mean(H), spread(H),
        left(cell.d_Ws || cell.d_W0_h ? H * DEPTH : 0), panel(DEPTH * Tile<T>::columns),
        undrawn(cell.d_p && cell.edges == N ? n * 2 * H : 0) {}

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

  void forward() const {
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

  void backward() const {
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

template <class T> void run_forward(const Cell& d) {
  Team<T> team(d);
  together(team.threads(), [&](int64_t k) { Sequence<T>(d, team, k, nullptr).forward(); });
}

template <class T> void run_backward(const Cell& d) {
  Team<T> team(d);
  const int64_t threads = team.threads(), pairs = d.nodes * (d.nodes + 1) / 2, width = (pairs * 5 + 15) / 8 * 8;  // no two threads in one cache line
  std::vector<double> sums(threads * width, 0.0);
  together(threads, [&](int64_t k) {
    const Sequence<T> part(d, team, k, &sums[k * width]);
    part.backward();
    team.meeting.wait();
    part.weight_gradients();
  });
  if (d.d_p)
    for (int64_t k = 0; k < threads; k++)
      for (int64_t e = 0; e < pairs * 5; e++) d.d_p[e] += sums[k * width + e];
}

}  // namespace

extern "C" {
void cell_forward_float(const Cell* cell) { run_forward<float>(*cell); }
void cell_forward_double(const Cell* cell) { run_forward<double>(*cell); }
void cell_backward_float(const Cell* cell) { run_backward<float>(*cell); }
void cell_backward_double(const Cell* cell) { run_backward<double>(*cell); }
}
