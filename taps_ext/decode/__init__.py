"""Decoding: one call is a sequence of steps: propose, score, verify, commit, observe."""
