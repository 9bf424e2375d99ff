"""What would help, by how much, at which cost."""
