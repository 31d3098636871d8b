"""Memory and throughput, measured and kept."""
