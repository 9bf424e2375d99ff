"""Training Medusa heads: what they learn from, how they learn it, and how often they are right."""
