"""What `bench_peers.py` and `bench_start.py` are made of."""
