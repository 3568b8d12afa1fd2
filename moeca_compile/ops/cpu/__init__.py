"""C++ kernels for what PyTorch's CPU ops do slowly: products with few rows, one after the other."""
