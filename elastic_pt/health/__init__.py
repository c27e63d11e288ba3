"""Judgements about a run that goes wrong while every process lives."""
