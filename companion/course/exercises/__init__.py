"""The exercises, one module each: properties, mutants and hints. Spoilers."""
