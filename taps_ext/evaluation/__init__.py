"""Evaluation: tasks, variants, the runner, the report, and the check of losslessness."""
