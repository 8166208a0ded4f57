"""Linears whose weights are int8 or fp8."""
