"""Speed, as ratios to a floor in the same run: ``python -m benchmarks``. ``suite.py`` lists the benchmarks."""
