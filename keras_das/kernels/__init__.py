"""The compiled kernels: which library a framework requires, how it is built, found and loaded."""
