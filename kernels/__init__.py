"""Mathematics on tensors; knows nothing of requests.

This file imports nothing on purpose: ``transformers`` probes for a distribution called ``kernels``
and imports whatever it finds, so importing this package must be free of cost and of failure.
"""

__version__ = "0.1.0"
