"""The CUDA kernels: C++ templates, compiled for each shape when it is first needed, and their launch."""
