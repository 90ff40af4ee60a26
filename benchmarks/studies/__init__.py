"""Choices in the design of a language model of energies, one at a time; README.md is the protocol."""
