"""Published benchmarks, one small file each: their rows, and how their figure is formed."""
