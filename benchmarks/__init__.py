"""Programs that measure the companion against what a user would do instead.

``python -m benchmarks.scoring``, ``.best_of_n``, ``.from_text``, ``.training``, ``.tokenising``,
``.compile`` and ``.startup``: each prints a table and writes a JSON file with the machine and the
versions into ``benchmarks/results/``. Methods take turns, so that a busy moment of the machine hits
all of them, and a ratio is the median of the ratios of the rounds, with its smallest and largest.

``python -m benchmarks.overoptimization`` measures no time but a danger: what a reward model
promises and what its choices are worth, against KL.

``python -m benchmarks.probe`` asks a GPU everything at once, in ten minutes.
"""
