"""Searches for losses: genetic programming (gp_lfl, evomal)."""
