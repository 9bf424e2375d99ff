"""The measured search: space, sampler, evaluation in a child process, proof."""
