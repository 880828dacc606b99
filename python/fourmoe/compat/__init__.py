"""Faces of other libraries: their names, arguments and layouts, computed by fourmoe."""
