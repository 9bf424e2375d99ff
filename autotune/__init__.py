"""The product: workload, load, search, proof, deployment."""
