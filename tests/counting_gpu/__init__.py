"""A GPU that counts and computes nothing: all host code of a CUDA build of torch runs on a machine without a GPU.

It stands in for the CUDA runtime, cuBLAS and the driver (`*.c`): kernels, matrix products, copies and waits are counted
with their sizes, memory is reserved address space with a limit, Inductor and Triton compile for sm_90. Values mean
nothing, cuDNN is off.
"""
