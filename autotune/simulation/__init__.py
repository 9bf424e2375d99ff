"""Engines in virtual time, alone or in fleets; what is not known of them is drawn many times."""
