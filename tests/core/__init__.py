"""Tests of the two pure cores."""
