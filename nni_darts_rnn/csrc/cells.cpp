// The discrete and the mixed recurrent cell over a whole sequence, forward and backward, on the CPU. `fused.py` compiles, loads and calls this file;
// the readable forms that it must equal are `cell.discrete_cell` and `supernet.mixed_cell`. No torch headers: BLAS's gemm comes in as a pointer.
//
// One description covers both cells: a graph of edges e = (j -> i) between states s_0 … s_N, each with mixing weights p_k and P = sum of the p_k.
// The discrete cell has one edge a node, p one-hot, P = 1, and no normalisation. At each time step, with masks m (or none),
//
//   c, z  = x + (h∘m) W0_h                                s_0 = norm( h + σ(c)∘(tanh z − h) )
//   c, z  = (s_j∘m) W_i      for each edge (j -> i)       r_i = Σ_e  P s_j + σ(c)∘(M − P s_j),   M = Σ_k p_k f_k(z)
//   s_i   = norm(r_i),  norm(r) = (r − μ)/√(v + eps) with μ, v the batch's mean and biased variance of each column
//   h'    = Σ_i a_i s_i      (a_i: 1/len(concat) for the states that are averaged, else 0)
//
// All edges that leave state j share one GEMM, (s_j∘m) times the columns of all W_i that read s_j, which lie side by side in W_cat.
//
// Backward, from dh' (the gradient of h' from outside plus what the next step sends back), nodes i = N … 0. Write ds_i for the gradient of s_i:
//
//   ds_i = a_i dh' + Σ_{edges i -> k} ( dr_k∘P∘(1 − σ(c)) + m∘(dpre W_k^T) )        the last for all k at once: one GEMM against W_cat^T
//   dr_i = (ds_i − mean(ds_i) − s_i mean(ds_i∘s_i)) / √(v + eps)
//          since ∂s_b/∂r_a = (δ_ab − 1/B − s_a s_b/B)/√(v + eps)
//   and for each edge (j -> i), with σ = σ(c):
//   dc   = dr∘(M − P s_j)∘σ(1 − σ)        dz = dr∘σ∘Σ_k p_k f_k'(z)                  written over c, z: dpre = [dc, dz]
//   dp_k = Σ dr∘( s_j∘(1 − σ) + σ∘f_k(z) )                                          summed over time, batch and units
//   s_0's r_0 = h + σ(tanh z − h): the same with P = 1, M = tanh z; it gives dx = dpre and dh = dr_0∘(1 − σ) + m∘(dx W0_h^T).
//
// Weight gradients wait until the loop over time is done: dW_cat's columns of state j are (s_j∘m)^T dpre over all T·B rows, one GEMM a state.
// Kept from the forward pass: pre-activations, states, 1/√(v + eps). Nonlinearities are computed again: one exp serves tanh and sigmoid.
//
// Each node is one parallel region in which a thread owns a block of columns, so that batch statistics need no barrier and sums have one order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

extern "C" {
struct Cell {  // mirrored, field by field, in fused.py
  int64_t steps, batch, hidden, nodes, edges, threads;
  int64_t normalise;  // 1: with the batch's statistics, 0: not at all
  int64_t keep;       // 1: pre0, pre, states, masked have all time steps, for the backward pass; 0: one step, used again and again
  int64_t columns;    // W_cat's width in units of 2H
  double eps;
  const int64_t *first, *count;    // (N): state j's nodes are the columns first[j] … first[j] + count[j] of W_cat, in units of 2H
  const int64_t *incoming;         // (N+1): node i's edges are incoming[i-1] … incoming[i]
  const int64_t *source, *slot;    // (E): the state an edge reads, and its place among the `count` of that state
  const int64_t *op;               // (E): MIX or one nonlinearity
  void* gemm;                      // sgemm_ or dgemm_
  const void *x_proj, *h0, *W0_h, *W_cat, *mask;  // (T,B,2H) (B,H) (H,2H) (H,columns·2H) (B,H) or null
  const void *p, *present, *average;              // (E,4) in the order tanh relu sigmoid identity; (E); (N+1)
  void *pre0, *pre, *states, *masked, *previous;  // (T,B,2H); one block (T,B,count·2H) a state; (N+1,T,B,H); (N,T,B,H), (T,B,H) or null without mask
  void *outputs, *scale;                          // (T,B,H); 1/√(v + eps) (T,N+1,H)
  // backward only; a null pointer is a gradient that nobody asked for
  const void* d_outputs;                          // (T,B,H)
  void *d_states, *scratch, *carry, *d_h;         // (N+1,B,H); (B,H); (B,H); (B,H)
  void *d_h0, *d_W0_h, *d_W_cat;                  // as the inputs
  double* d_p;                                    // (E,5): Σ dr∘s_j∘(1−σ), then Σ dr∘σ∘f_k
};
int64_t cell_struct_size() { return sizeof(Cell); }
}

namespace {

enum Op : int64_t { TANH, RELU, SIGMOID, IDENTITY, MIX };
constexpr int64_t BLOCK = 16;       // columns a thread owns come in multiples of a cache line
constexpr int64_t GRAIN = 4096;     // edge elements for which starting another thread pays

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

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

template <class T, int k> inline T taylor(T r) {
  if constexpr (k == Limits<T>::degree) return T(inverse_factorial(k));
  else return T(inverse_factorial(k)) + r * taylor<T, k + 1>(r);
}

// exp(x) = 2^n exp(r), |r| <= ln2/2; branch-free so that loops over it vectorise. NaN stays NaN. x must not overflow.
template <class T> inline T exp_(T x) {
  using L = Limits<T>;
  x = x < L::low ? L::low : x;
  const T n = __builtin_rint(x * T(1.4426950408889634074));
  const T high = std::is_same<T, float>::value ? T(0.693359375) : T(6.93145751953125e-1);
  const T rest = std::is_same<T, float>::value ? T(-2.12194440054690581e-4) : T(1.42860682030941723e-6);
  const T r = (x - n * high) - n * rest;
  typename L::Int bits = (typename L::Int(int32_t(n)) + L::bias) << L::shift;
  T scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return taylor<T, 0>(r) * scale;
}

template <class T> inline T gate(T c) {
  c = c < Limits<T>::gate ? Limits<T>::gate : c;
  return T(1) / (T(1) + exp_<T>(-c));
}

// tanh and sigmoid from one exp and one division: with e = exp(−z), σ = 1/(1+e) and tanh = 2/(1+e²) − 1
template <class T> inline void tanh_sigmoid(T z, T& t, T& s) {
  z = z < Limits<T>::both ? Limits<T>::both : z;
  const T e = exp_<T>(-z), e2 = e * e, q = T(1) / ((T(1) + e) * (T(1) + e2));
  s = q * (T(1) + e2);
  t = T(2) * q * (T(1) + e) - T(1);
}

template <class T> inline T tanh_(T z) {
  z = z < Limits<T>::both ? Limits<T>::both : z;
  return T(2) / (T(1) + exp_<T>(T(-2) * z)) - T(1);
}

template <class T> struct Mix { T tanh, relu, sigmoid, identity, P; };

// M = Σ p_k f_k(z) and, in `slope`, Σ p_k f_k'(z)
template <class T, int64_t OP> inline T mixture(T z, const Mix<T>& p, T& slope, T& t, T& s) {
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

// r += P s + σ(c)(M − P s) on n units
template <class T, int64_t OP>
void edge_forward(int64_t n, const T* __restrict c, const T* __restrict z, const T* __restrict s, Mix<T> p, T* __restrict r) {
#pragma omp simd
  for (int64_t u = 0; u < n; u++) {
    T slope, t, g;
    const T m = mixture<T, OP>(z[u], p, slope, t, g), carried = p.P * s[u];
    r[u] += carried + gate(c[u]) * (m - carried);
  }
}

// c, z -> dc, dz; ds += dr P (1 − σ); with PROB the sums for dp
template <class T, int64_t OP, bool PROB>
void edge_backward(int64_t n, T* __restrict c, T* __restrict z, const T* __restrict s, const T* __restrict dr, Mix<T> p,
                   T* __restrict ds, double* sums) {
  T stay = 0, st = 0, sr = 0, ss = 0, si = 0;
#pragma omp simd reduction(+ : stay, st, sr, ss, si)
  for (int64_t u = 0; u < n; u++) {
    T slope, t, g;
    const T m = mixture<T, OP>(z[u], p, slope, t, g), carried = p.P * s[u], open = gate(c[u]);
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

// What the next row needs, fetched while this one is computed: rows lie pages apart, and the hardware does not look across pages.
template <class T> inline void fetch(const T* from, int64_t n) {
  for (int64_t u = 0; u < n; u += int64_t(64 / sizeof(T))) __builtin_prefetch(from + u);
  __builtin_prefetch(from + n - 1);
}

template <class T>
using GemmFunction = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*, const T*, const int*,
                              const T*, T*, const int*);

template <class T> struct Sequence {
  const Cell& d;
  const int64_t S, B, H, N, BH;
  const T* mask;

  explicit Sequence(const Cell& cell)
      : d(cell), S(cell.steps), B(cell.batch), H(cell.hidden), N(cell.nodes), BH(B * H), mask(static_cast<const T*>(cell.mask)) {}

  // row-major C (m,n) = beta C + op(A) op(B); BLAS is column-major, so the operands trade places
  void gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) const {
    const int M = int(m), Nn = int(n), K = int(k), LA = int(lda), LB = int(ldb), LC = int(ldc);
    const T one = 1;
    reinterpret_cast<GemmFunction<T>>(d.gemm)(tb ? "T" : "N", ta ? "T" : "N", &Nn, &M, &K, &one, b, &LB, a, &LA, &beta, c, &LC);
  }

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
  const T* W(int64_t j) const { return static_cast<const T*>(d.W_cat) + d.first[j] * 2 * H; }
  T a(int64_t i) const { return static_cast<const T*>(d.average)[i]; }
  Mix<T> mix(int64_t e) const {
    const T* p = static_cast<const T*>(d.p) + 4 * e;
    return {p[0], p[1], p[2], p[3], static_cast<const T*>(d.present)[e]};
  }

  // The edges into node i at step t, as addresses of row 0
  struct Edge {
    T* pre;
    int64_t stride;  // from row to row of `pre`
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

  // run f(first column, last column, thread) with the columns shared out among threads
  template <class F> void columns(int64_t edges, const F& f) const {
    const int64_t blocks = (H + BLOCK - 1) / BLOCK;
    const int64_t n = std::max<int64_t>(1, std::min({d.threads, blocks, edges * BH / GRAIN}));
    if (n == 1) return f(0, H, 0);
#pragma omp parallel for num_threads(n) schedule(static, 1)
    for (int64_t k = 0; k < n; k++) f(blocks * k / n * BLOCK, std::min(H, blocks * (k + 1) / n * BLOCK), k);
  }

  T* scale(int64_t i, int64_t t) const { return static_cast<T*>(d.scale) + (kept(t) * (N + 1) + i) * H; }

  void forward() const {
    if (mask) multiply(static_cast<const T*>(d.h0), static_cast<T*>(d.previous));
    for (int64_t t = 0; t < S; t++) {
      std::memcpy(pre0(t), static_cast<const T*>(d.x_proj) + t * B * 2 * H, sizeof(T) * B * 2 * H);
      gemm(false, false, B, 2 * H, H, masked_before(t), H, static_cast<const T*>(d.W0_h), 2 * H, 1, pre0(t), 2 * H);
      node_forward(0, t);
      for (int64_t j = 0; j < N; j++) {
        const int64_t width = d.count[j] * 2 * H;
        if (width) gemm(false, false, B, width, H, masked(j, t), H, W(j), d.columns * 2 * H, 0, pre(j, t), width);
        node_forward(j + 1, t);
      }
    }
  }

  void multiply(const T* h, T* to) const {
    for (int64_t k = 0; k < BH; k++) to[k] = h[k] * mask[k];
  }

  void node_forward(int64_t i, int64_t t) const {
    const std::vector<Edge> edges = edges_into(i, t);
    columns(edges.size(), [&](int64_t lo, int64_t hi, int64_t) {
      const int64_t n = hi - lo;
      T* const r = state(i, t) + lo;
      std::vector<T> mean(n, T(0));
      for (int64_t b = 0; b < B; b++) {
        T* const row = r + b * H;
        std::fill(row, row + n, T(0));
        for (const Edge& e : edges) {
          const T *c = e.pre + b * e.stride + lo, *sj = e.state + b * H + lo;
          if (b + 1 < B) fetch(c + e.stride, n), fetch(c + e.stride + H, n);
          switch (e.op) {
            case TANH: edge_forward<T, TANH>(n, c, c + H, sj, e.p, row); break;
            case RELU: edge_forward<T, RELU>(n, c, c + H, sj, e.p, row); break;
            case SIGMOID: edge_forward<T, SIGMOID>(n, c, c + H, sj, e.p, row); break;
            case IDENTITY: edge_forward<T, IDENTITY>(n, c, c + H, sj, e.p, row); break;
            default: edge_forward<T, MIX>(n, c, c + H, sj, e.p, row);
          }
        }
        if (d.normalise)
#pragma omp simd
          for (int64_t u = 0; u < n; u++) mean[u] += row[u];
      }
      if (d.normalise) {
        T* const v = scale(i, t) + lo;
        for (int64_t u = 0; u < n; u++) mean[u] /= T(B), v[u] = 0;
        for (int64_t b = 0; b < B; b++)
#pragma omp simd
          for (int64_t u = 0; u < n; u++) v[u] += (r[b * H + u] - mean[u]) * (r[b * H + u] - mean[u]);
        for (int64_t u = 0; u < n; u++) v[u] = T(1) / std::sqrt(v[u] / T(B) + T(d.eps));
      }
      for (int64_t b = 0; b < B; b++) finish_row(i, t, b, lo, n, mean.data());
    });
  }

  // what becomes of a state's row: normalised, masked for the GEMM, added to the output
  void finish_row(int64_t i, int64_t t, int64_t b, int64_t lo, int64_t n, const T* __restrict mean) const {
    T* __restrict row = state(i, t) + b * H + lo;
    T* __restrict out = output(t) + b * H + lo;
    if (d.normalise) {
      const T* __restrict v = scale(i, t) + lo;
#pragma omp simd
      for (int64_t u = 0; u < n; u++) row[u] = (row[u] - mean[u]) * v[u];
    }
    if (i == 0) std::fill(out, out + n, T(0));
    if (const T w = a(i); w != 0)
#pragma omp simd
      for (int64_t u = 0; u < n; u++) out[u] += w * row[u];
    if (!mask) return;
    const T* __restrict m = mask + b * H + lo;
    if (i < N) {
      T* __restrict sm = masked(i, t) + b * H + lo;
#pragma omp simd
      for (int64_t u = 0; u < n; u++) sm[u] = row[u] * m[u];
    } else if (t + 1 < S) {
      T* __restrict hm = static_cast<T*>(d.previous) + kept(t + 1) * BH + b * H + lo;
#pragma omp simd
      for (int64_t u = 0; u < n; u++) hm[u] = out[u] * m[u];
    }
  }

  void backward() const {
    std::vector<double> sums(d.d_p ? d.threads * d.edges * 5 : 0, 0.0);
    T *const g = static_cast<T*>(d.scratch), *const carry = static_cast<T*>(d.carry);
    for (int64_t t = S - 1; t >= 0; t--) {
      for (int64_t i = N; i >= 0; i--) {
        const int64_t width = i < N ? d.count[i] * 2 * H : 0;
        if (width) gemm(false, true, B, H, width, pre(i, t), width, W(i), d.columns * 2 * H, 0, g, H);
        node_backward(i, t, width > 0, sums);
      }
      // what reaches h beside `carry`, which node 0 has written
      gemm(false, true, B, H, 2 * H, pre0(t), 2 * H, static_cast<const T*>(d.W0_h), 2 * H, 0, static_cast<T*>(d.d_h), H);
      columns(1, [&](int64_t lo, int64_t hi, int64_t) {
        for (int64_t b = 0; b < B; b++) {
          T *dh = static_cast<T*>(d.d_h) + b * H, *c = carry + b * H;
          for (int64_t u = lo; u < hi; u++) c[u] += mask ? dh[u] * mask[b * H + u] : dh[u];
        }
      });
    }
    if (d.d_h0) std::memcpy(d.d_h0, carry, sizeof(T) * BH);
    if (d.d_p)
      for (int64_t k = 0; k < d.threads; k++)
        for (int64_t e = 0; e < d.edges * 5; e++) d.d_p[e] += sums[k * d.edges * 5 + e];
    weight_gradients();
  }

  void node_backward(int64_t i, int64_t t, bool later, std::vector<double>& sums) const {
    const std::vector<Edge> edges = edges_into(i, t);
    T* const d_states = static_cast<T*>(d.d_states);
    columns(edges.size(), [&](int64_t lo, int64_t hi, int64_t thread) {
      const int64_t n = hi - lo;
      std::vector<T> mean(n, T(0)), along(n, T(0));
      for (int64_t b = 0; b < B; b++) gather_row(i, t, b, lo, n, later, mean.data(), along.data());
      for (int64_t u = 0; u < n; u++) mean[u] /= T(B), along[u] /= T(B);
      for (int64_t b = 0; b < B; b++) {
        T* __restrict dr = d_states + i * BH + b * H + lo;
        const T* __restrict s = state(i, t) + b * H + lo;
        if (d.normalise) {
          const T* __restrict v = scale(i, t) + lo;
#pragma omp simd
          for (int64_t u = 0; u < n; u++) dr[u] = v[u] * (dr[u] - mean[u] - s[u] * along[u]);
        }
        if (i == 0) std::fill_n(static_cast<T*>(d.carry) + b * H + lo, n, T(0));
        for (size_t k = 0; k < edges.size(); k++) {
          const Edge& e = edges[k];
          T *c = e.pre + b * e.stride + lo, *ds = e.d_state + b * H + lo;
          const T* sj = e.state + b * H + lo;
          if (b + 1 < B) fetch(c + e.stride, n), fetch(c + e.stride + H, n);
          switch (e.op) {
            case TANH: edge_backward<T, TANH, false>(n, c, c + H, sj, dr, e.p, ds, nullptr); break;
            case RELU: edge_backward<T, RELU, false>(n, c, c + H, sj, dr, e.p, ds, nullptr); break;
            case SIGMOID: edge_backward<T, SIGMOID, false>(n, c, c + H, sj, dr, e.p, ds, nullptr); break;
            case IDENTITY: edge_backward<T, IDENTITY, false>(n, c, c + H, sj, dr, e.p, ds, nullptr); break;
            default:
              if (d.d_p) edge_backward<T, MIX, true>(n, c, c + H, sj, dr, e.p, ds, &sums[(thread * d.edges + d.incoming[i - 1] + k) * 5]);
              else edge_backward<T, MIX, false>(n, c, c + H, sj, dr, e.p, ds, nullptr);
          }
        }
      }
    });
  }

  // ds_i's row complete, and for batch statistics its sums over the batch
  void gather_row(int64_t i, int64_t t, int64_t b, int64_t lo, int64_t n, bool later, T* __restrict mean, T* __restrict along) const {
    T* const d_states = static_cast<T*>(d.d_states);
    T* __restrict ds = d_states + i * BH + b * H + lo;
    T* __restrict dh = static_cast<T*>(d.d_h) + b * H + lo;
    if (i == N) {  // a new time step: dh' is known, and no state has heard of it
      const T *out = static_cast<const T*>(d.d_outputs) + t * BH + b * H + lo, *carry = static_cast<const T*>(d.carry) + b * H + lo;
      for (int64_t u = 0; u < n; u++) dh[u] = out[u] + carry[u];
      for (int64_t j = 0; j <= N; j++) std::fill_n(d_states + j * BH + b * H + lo, n, T(0));
    }
    if (const T w = a(i); w != 0)
#pragma omp simd
      for (int64_t u = 0; u < n; u++) ds[u] += w * dh[u];
    if (later) {
      const T* __restrict g = static_cast<const T*>(d.scratch) + b * H + lo;
      const T* __restrict m = mask ? mask + b * H + lo : nullptr;
      if (m)
#pragma omp simd
        for (int64_t u = 0; u < n; u++) ds[u] += m[u] * g[u];
      else
#pragma omp simd
        for (int64_t u = 0; u < n; u++) ds[u] += g[u];
    }
    if (d.normalise) {
      const T* __restrict s = state(i, t) + b * H + lo;
#pragma omp simd
      for (int64_t u = 0; u < n; u++) mean[u] += ds[u], along[u] += ds[u] * s[u];
    }
  }

  void weight_gradients() const {
    if (T* dw = static_cast<T*>(d.d_W0_h)) {
      if (mask) {
        gemm(true, false, H, 2 * H, S * B, static_cast<const T*>(d.previous), H, pre0(0), 2 * H, 0, dw, 2 * H);
      } else {
        gemm(true, false, H, 2 * H, B, before(0), H, pre0(0), 2 * H, 0, dw, 2 * H);
        if (S > 1) gemm(true, false, H, 2 * H, (S - 1) * B, output(0), H, pre0(1), 2 * H, 1, dw, 2 * H);
      }
    }
    if (T* dw = static_cast<T*>(d.d_W_cat)) {  // starts at zero: the mixed cell's column ranges overlap
      for (int64_t j = 0; j < N; j++)
        if (const int64_t width = d.count[j] * 2 * H)
          gemm(true, false, H, width, S * B, masked(j, 0), H, pre(j, 0), width, 1, dw + d.first[j] * 2 * H, d.columns * 2 * H);
    }
  }
};

// logits (rows, V) without bias -> nll (rows); with scale != 0 the logits become scale·(softmax − onehot).
// Returns a row whose target is out of range, or −1.
template <class T>
int64_t softmax_rows(int64_t rows, int64_t V, T* logits, const T* bias, const int64_t* targets, double scale, double* nll, int64_t threads) {
  for (int64_t r = 0; r < rows; r++)
    if (targets[r] < 0 || targets[r] >= V) return r;
  const int64_t n = std::max<int64_t>(1, std::min({threads, rows, rows * V / GRAIN}));
#pragma omp parallel for num_threads(n) schedule(static) if (n > 1)
  for (int64_t r = 0; r < rows; r++) {
    T* __restrict x = logits + r * V;
    T top = bias ? x[0] + bias[0] : x[0], sum = 0;
    if (bias)
#pragma omp simd reduction(max : top)
      for (int64_t v = 0; v < V; v++) x[v] += bias[v], top = x[v] > top ? x[v] : top;
    else
#pragma omp simd reduction(max : top)
      for (int64_t v = 0; v < V; v++) top = x[v] > top ? x[v] : top;
    const T at = x[targets[r]];
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < V; v++) {
      x[v] = exp_<T>(x[v] - top);
      sum += x[v];
    }
    nll[r] = std::log(double(sum)) - double(at - top);
    if (scale == 0) continue;
    const T share = T(scale / double(sum));
#pragma omp simd
    for (int64_t v = 0; v < V; v++) x[v] *= share;
    x[targets[r]] -= T(scale);
  }
  return -1;
}

}  // namespace

extern "C" {
void cell_forward_float(const Cell* cell) { Sequence<float>(*cell).forward(); }
void cell_forward_double(const Cell* cell) { Sequence<double>(*cell).forward(); }
void cell_backward_float(const Cell* cell) { Sequence<float>(*cell).backward(); }
void cell_backward_double(const Cell* cell) { Sequence<double>(*cell).backward(); }
int64_t softmax_rows_float(int64_t rows, int64_t V, float* x, const float* b, const int64_t* y, double scale, double* nll, int64_t threads) {
  return softmax_rows(rows, V, x, b, y, scale, nll, threads);
}
int64_t softmax_rows_double(int64_t rows, int64_t V, double* x, const double* b, const int64_t* y, double scale, double* nll, int64_t threads) {
  return softmax_rows(rows, V, x, b, y, scale, nll, threads);
}
}
