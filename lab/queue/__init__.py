"""One agent feeds many GPUs: proposals in a queue of refs, and the workers that run them."""
