"""The marks by which a few options are told from each other in one drawing."""

# (shape, class): the shape tells them apart where colours do not.
SERIES = (
    ("circle", "g-0"),
    ("square", "g-1"),
    ("triangle", "g-2"),
    ("diamond", "g-3"),
    ("circle", "g-4"),
)
