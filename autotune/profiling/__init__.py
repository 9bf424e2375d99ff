"""Where the time of a serving engine goes: from its records to `profile.json`."""
