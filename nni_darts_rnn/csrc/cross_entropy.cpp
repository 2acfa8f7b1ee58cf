// The cross-entropy of a linear layer and its gradients on the CPU, by blocks of rows. `cross_entropy.py` calls it. Its results must equal torch's
// F.cross_entropy(F.linear(x, w, b), y). Only one block's logits exist at a time, and the block's share of the gradients is computed at once:
//
//   logits = x w^T + b     e_rv = exp(logits_rv − base_r), in the logits' place     nll_r = log Σ_v e_rv − log e_ry
//   g_rv = e_rv − [v = y_r] Σ_v e_rv, in the same place     q_r = scale / Σ_v e_rv
//   dx_r = q_r Σ_v g_rv w_v     dw_v = Σ_r q_r g_rv x_r     db_v = Σ_r q_r g_rv
//
// base_r is the row's largest logit at the time when base_r was chosen. A few words of all rows are taken at a time, exponentials included, while they are in
// cache (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). Only where later logits are far above base_r is it chosen anew, and the
// earlier exponentials are scaled down.
// A thread owns a part of a block's rows; of dw and db it owns some words instead. Its logits lie in the order in which products write and read them. dw is
// kept transposed, a panel of words after the other, until the end: the tile of product.h then runs along the words, as the logits do.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "bfloat.h"
#include "elementary.h"
#include "product.h"
#include "team.h"

extern "C" {
struct LinearCrossEntropy {  // mirrored, field by field, in exports.py
  int64_t rows, hidden, words, threads;  // R, H, V
  int64_t parts;                         // as in cell.h
  double scale;                          // of the gradients; 0: none is wanted
  const void *x, *w, *b;                 // (R,H); (V,H); (V) or null
  const int64_t* targets;                // (R)
  double* nll;                           // (R)
  void *d_x, *d_w, *d_b;                 // (R,H); (V,H); (V); a null pointer is a gradient that nobody asked for
  void *logits, *packed, *packed_back;   // (block,V); w^T (H,V) and, for d_x, w (V,H) in panels
  void* d_w_transposed;                  // panels of (H,columns), for d_w
};
int64_t cross_entropy_struct_size() { return sizeof(LinearCrossEntropy); }
int64_t cross_entropy_block() { return 256; }
}

namespace {

constexpr int64_t GRAIN = 8192;  // logits for which another thread is worth its cost
constexpr int HIGHER = 20;       // a logit may be this much above `base`: e^20 times the number of words is far below float's largest

// Adds the bias to n logits of a row; returns the largest of them
template <class T> T add_bias(int64_t n, T* __restrict x, const T* __restrict bias) {
  T top = std::numeric_limits<T>::lowest();
  if (bias)
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < n; v++) x[v] += bias[v], top = x[v] > top ? x[v] : top;
  else
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < n; v++) top = x[v] > top ? x[v] : top;
  return top;
}

// Overwrites n logits of a row with exp(x − base); returns their sum
template <class T> T exponentials(int64_t n, T* __restrict x, T base) {
  T sum = 0;
  const Range<T> range = exp_range<T>();
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < n; v++) {
    x[v] = exp_<T>(range(x[v] - base));
    sum += x[v];
  }
  return sum;
}

// P: `Whole<T>` or `Tiles<…>`
template <class T, class P> struct Share {
  using Number = typename P::Number;
  using Buffer = typename P::Buffer;
  const LinearCrossEntropy& d;
  Meeting& meeting;
  std::vector<T>& q;  // of a block's rows
  const int64_t threads, thread, R = d.rows, H = d.hidden, V = d.words;
  static constexpr int64_t C = P::columns;
  const T *const x = static_cast<const T*>(d.x), *const w = static_cast<const T*>(d.w), *const b = static_cast<const T*>(d.b);
  T* const logits = static_cast<T*>(d.logits);
  Number *const packed = static_cast<Number*>(d.packed), *const packed_back = static_cast<Number*>(d.packed_back);
  T *const d_x = static_cast<T*>(d.d_x), *const d_w = static_cast<T*>(d.d_w), *const d_b = static_cast<T*>(d.d_b);
  T* const d_w_transposed = static_cast<T*>(d.d_w_transposed);
  // the words that this thread owns
  const int64_t first = panels<P>(V) * thread / threads * C, last = std::min(V, panels<P>(V) * (thread + 1) / threads * C);

  void run() const {
    for (int64_t v = first; v < last; v += C) P::pack(H, V - v, w + v * H, 1, H, packed + v * P::terms(H));
    if (d_x)
      for (int64_t u = 0, panel = 0; u < H; u += C)
        if (panel++ % threads == thread) P::pack(V, H - u, w + u, H, 1, packed_back + u * P::terms(V));
    meeting.wait();
    const int64_t most = cross_entropy_block(), blocks = (R + most - 1) / most, block = (R + blocks - 1) / blocks, share = (block + threads - 1) / threads;
    std::vector<T> panel(d_w || d_b ? block * C : 0);
    Buffer left, right;
    for (int64_t r = 0; r < R; r += block) {
      // a thread's logits have the same place in every block: without dw and db no thread waits for the others
      const int64_t m = std::min(block, R - r), lo = std::min(m, share * thread);
      rows(r, lo, std::min(m, lo + share) - lo, left);
      if (!d_w && !d_b) continue;
      meeting.wait();
      columns(r, m, share, panel.data(), left, right);
      meeting.wait();
    }
    for (int64_t v = first; v < last && d_w; v += C)
      for (int64_t k = v; k < std::min(v + C, last); k++)
        for (int64_t u = 0; u < H; u++) d_w[k * H + u] = d_w_transposed[v * H + u * C + k - v];
  }

  // Computes logits, nll, q and dx of n rows from r + lo on, in the block that starts at r
  void rows(int64_t r, int64_t lo, int64_t n, Buffer& left) const {
    if (!n) return;  // the last block has too few rows for all threads
    T* const own = logits + lo * V;
    const auto from = P::rows_of(n, H, x + (r + lo) * H, H, left);
    const int64_t* const y = d.targets + r + lo;
    std::vector<T> base(n, std::numeric_limits<T>::lowest()), at(n);
    std::vector<double> sum(n);
    for (int64_t v = 0; v < V; v += DEPTH) {
      const int64_t width = std::min(DEPTH, V - v);
      T* const part = own + v * n;  // (n,width)
      P::multiply(n, width, from, packed + v * P::terms(H), C * P::terms(H), false, part, width);
      for (int64_t k = 0; k < n; k++) {
        T* const row = part + k * width;
        if (const T top = add_bias<T>(width, row, b ? b + v : nullptr); top > base[k] + HIGHER) {
          const T smaller = exp_<T>(exp_range<T>()(base[k] - top));
          for (int64_t u = 0; u < v; u += DEPTH)
            for (T *e = own + u * n + k * DEPTH, *end = e + DEPTH; e < end; e++) *e *= smaller;
          base[k] = top, sum[k] *= smaller;
        }
        if (y[k] / DEPTH * DEPTH == v) at[k] = row[y[k] - v];
        sum[k] += exponentials<T>(width, row, base[k]);
      }
    }
    for (int64_t k = 0; k < n; k++) {
      d.nll[r + lo + k] = std::log(sum[k]) - double(at[k] - base[k]);
      q[lo + k] = T(d.scale / sum[k]);
      const int64_t v = y[k] / DEPTH * DEPTH;
      own[v * n + k * std::min(DEPTH, V - v) + y[k] - v] -= T(sum[k]);
    }
    if (!d_x) return;
    T* const dx = d_x + (r + lo) * H;
    for (int64_t v = 0; v < V; v += DEPTH) {
      const int64_t width = std::min(DEPTH, V - v);
      P::multiply(n, H, P::rows_of(n, width, own + v * n, width, left), packed_back + P::terms(v) * C, C * P::terms(V), v > 0, dx, H);
    }
    for (int64_t k = 0; k < n; k++)
      for (int64_t u = 0; u < H; u++) dx[k * H + u] *= q[lo + k];
  }

  // Adds to dw and db of this thread's words what comes from rows r … r + m, of which each thread had `share`
  void columns(int64_t r, int64_t m, int64_t share, T* panel, Buffer& left, Buffer& right) const {
    const auto transposed = P::columns_of(d_w ? H : 0, m, x + r * H, H, left);
    for (int64_t v = first; v < last; v += C) {
      const int64_t n = std::min(C, V - v), part = v / DEPTH * DEPTH, width = std::min(DEPTH, V - part);
      for (int64_t lo = 0; lo < m; lo += share) {
        const int64_t own = std::min(share, m - lo);
        Whole<T>::pack(own, n, logits + lo * V + part * own + v - part, width, 1, panel + lo * C);
      }
      T sums[C] = {};
      for (int64_t k = 0; k < m; k++)
#pragma omp simd
        for (int64_t u = 0; u < C; u++) sums[u] += panel[k * C + u] *= q[k];
      if (d_w) P::multiply(H, n, transposed, P::repack(m, panel, right), 0, r > 0, d_w_transposed + v * H, C);
      for (int64_t u = 0; u < n && d_b; u++) d_b[v + u] = r ? d_b[v + u] + sums[u] : sums[u];
    }
  }
};

// Returns a row whose target is out of range, or −1
template <class T, class P> int64_t cross_entropy(const LinearCrossEntropy& d) {
  for (int64_t r = 0; r < d.rows; r++)
    if (d.targets[r] < 0 || d.targets[r] >= d.words) return r;
  const int64_t threads = std::max<int64_t>(1, std::min({d.threads, d.rows, d.rows * d.words / GRAIN}));
  Meeting meeting(threads);
  std::vector<T> q(cross_entropy_block());
  together(threads, [&](int64_t k) {
    [[maybe_unused]] const typename P::Ready ready;
    Share<T, P>{d, meeting, q, threads, k}.run();
  });
  return -1;
}

}  // namespace

extern "C" {
int64_t cross_entropy_float(const LinearCrossEntropy* d) {
  int64_t bad;
  with_parts(d->parts, [&](auto product) { bad = cross_entropy<float, decltype(product)>(*d); });
  return bad;
}
int64_t cross_entropy_double(const LinearCrossEntropy* d) { return cross_entropy<double, Whole<double>>(*d); }
}
