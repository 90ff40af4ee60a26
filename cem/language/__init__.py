"""The energy language: words, symbols, normal form, the torch pen, notation and serialisation."""
