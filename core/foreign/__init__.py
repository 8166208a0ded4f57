"""Modules of other libraries as forwards: finding sites and rewriting calls."""
