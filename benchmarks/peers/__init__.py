"""Other stores next to ours, as ratios to the same floor: ``python -m benchmarks.peers``.

``registry.py`` lists the peers. Each is a module that records one run, and runs in a process and, where it has packages
of its own, in a virtual environment of its own: nothing that a peer needs is needed here.
"""
