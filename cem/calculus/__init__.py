"""Derivatives and curvature of energies."""
