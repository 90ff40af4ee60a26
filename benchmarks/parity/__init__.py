"""Whole language models of energies against Llama; README.md is the protocol."""
