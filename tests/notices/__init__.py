"""Tests of elastic_pt.notices."""
