"""CPU kernels and the modules that call them."""
