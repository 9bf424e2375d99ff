"""The page of a plan: what to get, at what price, and how sure that is."""
