"""C++ kernels for what PyTorch's CPU ops do slowly: grouped products with few rows, and sums over branches."""
