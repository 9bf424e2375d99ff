"""What the machine is: processor, memory, GPUs, and the limits a container puts on them."""
