// What `compiled.py` hands over: a cell, a sequence for it to run over, and the buffers.

#pragma once

#include <cstdint>

extern "C" {
struct Cell {  // mirrored, field by field, in exports.py
  int64_t steps, batch, hidden, nodes, edges, threads;
  int64_t normalise;  // 1: with the batch's statistics, 0: not at all
  int64_t keep;       // 1: pre0, pre, states, masked have all time steps, for the backward pass; 0: one step, and pre one edge, used again and again
  int64_t by_units;   // what a thread owns: 1: units, of all rows of the batch; 0: rows of the batch, with all units
  int64_t parts;      // bfloat16 numbers that stand for an operand of a product, 1 to 3, in a `float` cell where `cell_rounds()`; 0: the operand as it is
  double eps;
  const int64_t *incoming;         // (N+1): node i's edges are incoming[i-1] … incoming[i]
  const int64_t *source, *op;      // (E): the state an edge reads; MIX or one nonlinearity
  const void *x_proj, *h0, *W0_h, *Ws, *mask;     // (T,B,2H) (B,H) (H,2H) (N,H,2H) (B,H) or null
  const void *p, *present, *average;              // (E,4) in the order tanh relu sigmoid identity; (E); (N+1)
  void *pre0, *pre, *states, *masked, *previous;  // (T,B,2H); (E,T,B,2H); (N+1,T,B,H); (N,T,B,H), (T,B,H) or null without mask
  void *outputs, *scale;                          // (T,B,H); 1/√(v + eps) (T,N+1,H)
  void *packed, *packed_back;                     // W0_h and the W_i, N+1 matrices (H,2H) in panels, if `by_units` those of c before those of z; the same transposed, if `keep`
  // backward only; a null pointer is a gradient that nobody asked for
  const void* d_outputs;                          // (T,B,H)
  void *d_states, *d_masked, *carry, *d_h;        // (N+1,B,H); (N,B,H); (B,H); (B,H)
  void *d_h0, *d_W0_h, *d_Ws;                     // as the inputs
  double* d_p;                                    // (N(N+1)/2,5), a row for each pair of node and earlier state: Σ dr∘s_j∘(1−σ), then Σ dr∘σ∘f_k
};
}
