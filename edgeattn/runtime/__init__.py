"""What the machine can do, and how kernels are compiled, kept and run on threads."""
