// The cross-entropy of a linear layer and its gradients on the CPU, by blocks of rows; `cross_entropy.py` calls it, and what it must equal is torch's
// F.cross_entropy(F.linear(x, w, b), y). Only a block's logits are ever there, and its share of the gradients is taken at once:
//
//   logits = x w^T + b     nll_r = log Σ_v exp(logits_rv) − logits_ry     d = scale (softmax(logits) − onehot(y)), in the logits' place
//   dx = d w               dw += d^T x                                    db += Σ_r d_r
//
// A thread owns a part of a block's rows for everything but dw and db, of which it owns words. dw is kept transposed, (H,V), until the end: the tile of
// product.h then runs along the words, as the logits do.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "elementary.h"
#include "product.h"
#include "team.h"

extern "C" {
struct LinearCrossEntropy {  // mirrored, field by field, in extension.py
  int64_t rows, hidden, words, threads;  // R, H, V
  double scale;                          // of the gradients; 0: none is wanted
  const void *x, *w, *b;                 // (R,H); (V,H); (V) or null
  const int64_t* targets;                // (R)
  double* nll;                           // (R)
  void *d_x, *d_w, *d_b;                 // (R,H); (V,H); (V); a null pointer is a gradient that nobody asked for
  void *logits, *packed, *packed_back;   // (block,V); w^T (H,V) and, for d_x, w (V,H) in panels
  void* d_w_transposed;                  // (H,V), for d_w
};
int64_t cross_entropy_struct_size() { return sizeof(LinearCrossEntropy); }
int64_t cross_entropy_block() { return 256; }
}

namespace {

constexpr int64_t GRAIN = 8192;  // logits for which another thread pays

// n logits without their bias -> −log softmax of the target; with a scale the logits become scale·(softmax − onehot)
template <class T> double softmax_row(int64_t n, T* __restrict x, const T* __restrict bias, int64_t target, double scale) {
  T top = bias ? x[0] + bias[0] : x[0], sum = 0;
  if (bias)
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < n; v++) x[v] += bias[v], top = x[v] > top ? x[v] : top;
  else
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < n; v++) top = x[v] > top ? x[v] : top;
  const T at = x[target];
  const Range<T> range = exp_range<T>();
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < n; v++) {
    x[v] = exp_<T>(range(x[v] - top));
    sum += x[v];
  }
  const double nll = std::log(double(sum)) - double(at - top);
  if (scale == 0) return nll;
  const T share = T(scale / double(sum));
#pragma omp simd
  for (int64_t v = 0; v < n; v++) x[v] *= share;
  x[target] -= T(scale);
  return nll;
}

template <class T> struct Share {
  const LinearCrossEntropy& d;
  Meeting& meeting;
  const int64_t threads, thread, R = d.rows, H = d.hidden, V = d.words;
  static constexpr int64_t C = Tile<T>::columns;
  const T *const x = static_cast<const T*>(d.x), *const w = static_cast<const T*>(d.w), *const b = static_cast<const T*>(d.b);
  T *const logits = static_cast<T*>(d.logits), *const packed = static_cast<T*>(d.packed), *const packed_back = static_cast<T*>(d.packed_back);
  T *const d_x = static_cast<T*>(d.d_x), *const d_w = static_cast<T*>(d.d_w), *const d_b = static_cast<T*>(d.d_b);
  T* const d_w_transposed = static_cast<T*>(d.d_w_transposed);
  // the words that this thread owns
  const int64_t first = Tile<T>::panels(V) * thread / threads * C, last = std::min(V, Tile<T>::panels(V) * (thread + 1) / threads * C);

  void run() const {
    for (int64_t v = first; v < last; v += C) pack<T>(H, V - v, w + v * H, 1, H, packed + v * H);
    if (d_x)
      for (int64_t u = 0, panel = 0; u < H; u += C)
        if (panel++ % threads == thread) pack<T>(V, H - u, w + u, H, 1, packed_back + u * V);
    meeting.wait();
    const int64_t most = cross_entropy_block(), blocks = (R + most - 1) / most, block = (R + blocks - 1) / blocks, share = (block + threads - 1) / threads;
    std::vector<T> left(d_w ? H * block : 0), panel(d_w || d_b ? block * C : 0);
    for (int64_t r = 0; r < R; r += block) {
      // the same place for a thread's logits in every block: without dw and db nobody waits for the others
      const int64_t m = std::min(block, R - r), lo = std::min(m, share * thread), n = std::min(m, share * (thread + 1)) - lo;
      rows(r + lo, n, logits + lo * V);
      if (!d_w && !d_b) continue;
      meeting.wait();
      columns(r, m, left.data(), panel.data());
      meeting.wait();
    }
    if (d_w)
      for (int64_t v = first; v < last; v += C)
        for (int64_t u = 0; u < H; u++)
          for (int64_t k = v; k < std::min(v + C, last); k++) d_w[k * H + u] = d_w_transposed[u * V + k];
  }

  // logits, nll and dx of rows r … r + n
  void rows(int64_t r, int64_t n, T* own) const {
    multiply<T>(n, V, H, x + r * H, H, packed, false, own, V);
    for (int64_t k = 0; k < n; k++) d.nll[r + k] = softmax_row<T>(V, own + k * V, b, d.targets[r + k], d.scale);
    if (!d_x) return;
    for (int64_t v = 0; v < V; v += DEPTH)
      for (int64_t u = 0; u < H; u += C)
        multiply_panel<T>(n, std::min(C, H - u), std::min(DEPTH, V - v), own + v, V, 1, packed_back + u * V + v * C, v > 0, d_x + r * H + u, H);
  }

  // what rows r … r + m add to dw and db of this thread's words
  void columns(int64_t r, int64_t m, T* left, T* panel) const {
    if (d_w) pack_left<T>(H, m, x + r * H, 1, H, left);
    for (int64_t v = first; v < last; v += C) {
      const int64_t n = std::min(C, V - v);
      pack<T>(m, n, logits + v, V, 1, panel);
      if (d_w) multiply_packed<T>(H, n, m, left, panel, r > 0, d_w_transposed + v, V);
      if (d_b)
        for (int64_t u = 0; u < n; u++) {
          T sum = r ? d_b[v + u] : T(0);
          for (int64_t k = 0; k < m; k++) sum += panel[k * C + u];
          d_b[v + u] = sum;
        }
    }
  }
};

// Returns a row whose target is out of range, or −1
template <class T> int64_t cross_entropy(const LinearCrossEntropy& d) {
  for (int64_t r = 0; r < d.rows; r++)
    if (d.targets[r] < 0 || d.targets[r] >= d.words) return r;
  const int64_t threads = std::max<int64_t>(1, std::min({d.threads, d.rows, d.rows * d.words / GRAIN}));
  Meeting meeting(threads);
  together(threads, [&](int64_t k) { Share<T>{d, meeting, threads, k}.run(); });
  return -1;
}

}  // namespace

extern "C" {
int64_t cross_entropy_float(const LinearCrossEntropy* d) { return cross_entropy<float>(*d); }
int64_t cross_entropy_double(const LinearCrossEntropy* d) { return cross_entropy<double>(*d); }
}
