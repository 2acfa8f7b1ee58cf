// The discrete and the mixed recurrent cell over a whole sequence, forward and backward, on the CPU. `build.py` compiles and loads this file, and
// `compiled.py` calls it. Its results must equal those of the readable forms, `cell.discrete_cell` and `supernet.mixed_cell`. cell.h has what is handed
// over, edges.h the element-wise work, sequence.h what a thread owns, forward.h and backward.h the two passes. No torch headers and no BLAS are used:
// product.h has the products with the weights, which are the same at every time step.
//
// One description covers both cells: a graph of edges e = (j -> i) between states s_0 … s_N, each with mixing weights p_k and P = sum of the p_k.
// The discrete cell has one edge a node, p one-hot, P = 1, and no normalisation. At each time step, with masks m (or none),
//
//   c, z  = x + (h∘m) W0_h                                s_0 = norm( h + σ(c)∘(tanh z − h) )
//   c, z  = (s_j∘m) W_i      for each edge (j -> i)       r_i = Σ_e  P s_j + σ(c)∘(M − P s_j),   M = Σ_k p_k f_k(z)
//   s_i   = norm(r_i),  norm(r) = (r − μ)/√(v + eps) with μ, v the batch's mean and biased variance of each column
//   h'    = Σ_i a_i s_i      (a_i: 1/len(concat) for the states that are averaged, else 0)
//
// A node computes its edges one after the other, and each edge a few rows at a time. So a product's result is still in cache when the edge reads it; in the
// backward pass the edge's result is still there for the product.
//
// Backward, from dh' (the gradient of h' from outside plus what the next step sends back), nodes i = N … 0. Write ds_i for the gradient of s_i:
//
//   ds_i = a_i dh' + Σ_{edges i -> k} ( dr_k∘P∘(1 − σ(c)) + m∘(dpre W_k^T) )
//   dr_i = (ds_i − mean(ds_i) − s_i mean(ds_i∘s_i)) / √(v + eps)
//          since ∂s_b/∂r_a = (δ_ab − 1/B − s_a s_b/B)/√(v + eps)
//   and for each edge (j -> i), with σ = σ(c):
//   dc   = dr∘(M − P s_j)∘σ(1 − σ)        dz = dr∘σ∘Σ_k p_k f_k'(z)                  written over c, z: dpre = [dc, dz]
//   dp_k = Σ dr∘( s_j∘(1 − σ) + σ∘f_k(z) )                                          summed over time, batch and units
//   s_0's r_0 = h + σ(tanh z − h): the same with P = 1, M = tanh z; it gives dx = dpre and dh = dr_0∘(1 − σ) + m∘(dx W0_h^T).
// A drawn cell is a discrete one for which dp is asked, over all pairs j < i. Where p is zero, an edge adds nothing to r_i and sends nothing back.
// So it costs only the forward product, from which dp_k is the same sum.
//
// Weight gradients wait until the loop over time is done: an edge's is (s_j∘m)^T dpre over all T·B rows, one product.
// Kept from the forward pass: σ(c) in c's place, z, states, 1/√(v + eps). The mixture's functions of z are computed again: one exp serves tanh and sigmoid.
//
// One parallel region runs the whole sequence, and a thread owns a part of the batch. It alone writes and reads its rows of every pre-activation and
// state, and so finds them in its own cache. Threads meet only for the batch's statistics, once a node; the discrete cell has none.
// If the batch is too small for that (`by_units`), each thread owns some of the units instead, and reads only its share of the weights. Threads then meet once
// a node, since a product needs all units of a state.
// All W_i are packed first, once for the forward products and transposed for the backward ones.
// Sums over the batch add the threads' sums in the threads' order, so that the same number of threads gives the same bits.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "backward.h"
#include "cell.h"
#include "forward.h"

namespace {

template <class T, class P> void run_forward(const Cell& d) {
  Team<T, P> team(d);
  together(team.threads(), [&](int64_t k) {
    [[maybe_unused]] const typename P::Ready ready;
    Forward<T, P>(d, team, k).run();
  });
}

template <class T, class P> void run_backward(const Cell& d) {
  Team<T, P> team(d);
  const int64_t threads = team.threads(), pairs = d.nodes * (d.nodes + 1) / 2, width = (pairs * 5 + 15) / 8 * 8;  // no two threads in one cache line
  std::vector<double> sums(threads * width, 0.0);
  together(threads, [&](int64_t k) {
    [[maybe_unused]] const typename P::Ready ready;
    const Backward<T, P> part(d, team, k, &sums[k * width]);
    part.run();
    team.meeting.wait();
    part.weight_gradients();
  });
  if (d.d_p)
    for (int64_t k = 0; k < threads; k++)
      for (int64_t e = 0; e < pairs * 5; e++) d.d_p[e] += sums[k * width + e];
}

}  // namespace

extern "C" {
int64_t cell_struct_size() { return sizeof(Cell); }
int64_t cell_rounds() { return rounds(); }
void cell_forward_float(const Cell* cell) {
  with_parts(cell->parts, [&](auto product) { run_forward<float, decltype(product)>(*cell); });
}
void cell_forward_double(const Cell* cell) { run_forward<double, Whole<double>>(*cell); }
void cell_backward_float(const Cell* cell) {
  with_parts(cell->parts, [&](auto product) { run_backward<float, decltype(product)>(*cell); });
}
void cell_backward_double(const Cell* cell) { run_backward<double, Whole<double>>(*cell); }
}
