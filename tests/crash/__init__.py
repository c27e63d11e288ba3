"""Processes that are killed anywhere, and bytes that change anywhere: campaigns with a printed seed.

python -m tests.crash --seeds 20                        kill at each failpoint, and at random moments
python -m tests.crash --seeds 20 --store s3             the same on a real S3 server
python -m tests.crash --corruptions 10000               change stored states in random places
"""
