"""The public edge for arrays on a GPU: arguments checked once, then edgeattn.kernels.cuda, imported by the call for
it.
"""
