"""Every op against its peers and its ceiling: ``python -m benchmarks.run``. A wrong result prints no number."""
