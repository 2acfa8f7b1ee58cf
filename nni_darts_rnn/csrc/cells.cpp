// The discrete and the mixed recurrent cell over a whole sequence, forward and backward, on the CPU. `extension.py` compiles and loads this file,
// `compiled.py` calls it; the readable forms that it must equal are `cell.discrete_cell` and `supernet.mixed_cell`. cell.h has what is handed over,
// edges.h the element-wise work, sequence.h what a thread owns, forward.h and backward.h the two passes. No torch headers, no BLAS: products with the
// weights, which are the same at every time step, are those of product.h.
//
// One description covers both cells: a graph of edges e = (j -> i) between states s_0 … s_N, each with mixing weights p_k and P = sum of the p_k.
// The discrete cell has one edge a node, p one-hot, P = 1, and no normalisation. At each time step, with masks m (or none),
//
//   c, z  = x + (h∘m) W0_h                                s_0 = norm( h + σ(c)∘(tanh z − h) )
//   c, z  = (s_j∘m) W_i      for each edge (j -> i)       r_i = Σ_e  P s_j + σ(c)∘(M − P s_j),   M = Σ_k p_k f_k(z)
//   s_i   = norm(r_i),  norm(r) = (r − μ)/√(v + eps) with μ, v the batch's mean and biased variance of each column
//   h'    = Σ_i a_i s_i      (a_i: 1/len(concat) for the states that are averaged, else 0)
//
// A node takes its edges one after the other, and each a few rows at a time, so that what a product has left is still in cache for the edge, and what the edge
// leaves in the backward pass for the product.
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
// A drawn cell is a discrete one of which dp is asked for, over all pairs j < i: where p is zero an edge adds nothing to r_i and sends nothing back,
// so it costs the product forward, of which dp_k is the same sum.
//
// Weight gradients wait until the loop over time is done: an edge's is (s_j∘m)^T dpre over all T·B rows, one product.
// Kept from the forward pass: σ(c) in c's place, z, states, 1/√(v + eps). What the mixture needs of z is computed again: one exp serves tanh and sigmoid.
//
// One parallel region runs the whole sequence, and a thread owns a part of the batch: its rows of every pre-activation and state, which it alone
// writes and reads, and so finds in its own cache. Threads meet only over the batch's statistics, once a node; the discrete cell has none.
// Of a batch too small for that (`by_units`) each owns some of the units instead, and reads its share of the weights alone; they meet once a node, since a
// product takes all units of a state.
// All W_i are packed first, once for the forward products and transposed for the backward ones.
// Sums over the batch are made of the threads' sums in the threads' order, so that the same number of threads gives the same bits.

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
