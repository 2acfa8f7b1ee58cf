"""Both cells over a whole sequence on a GPU: Triton kernels, cuBLAS products, one CUDA graph a time step."""
