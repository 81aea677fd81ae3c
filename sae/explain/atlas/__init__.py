"""A map of a dictionary: neighbours, a plane, splitting, completeness, search."""
