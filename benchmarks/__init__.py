"""How fast edgeattn is on this machine, alone and beside other libraries: ``python -m benchmarks --help``."""
