"""Integrations: distckpt through the hooks of the libraries that people train with; no names.

Nothing here is imported by ``import distckpt``; each file imports one library.
"""
